"""The E2E pipeline: its sources, folds over prompts, the linear baseline beside them."""

import json

import jax
import numpy as np

from instructgpt_jax import reward_folds, sharding
from instructgpt_jax.data import sources
from tests import tiny_supervised


def test_folds_over_prompts_score_every_comparison_once_without_its_prompt(tmp_path):
    world = tiny_supervised.make_world(tmp_path / "world")
    config = tiny_supervised.config(
        "reward", world, **{"reward.folds": 2, "reward.fold_by": "prompt", "reward.num_steps": 2, "eval_every": 0}
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        report = reward_folds.run(config, mesh, tmp_path / "folds")
        (tmp_path / "folds" / "generalisation.json").unlink()
        assert reward_folds.run(config, mesh, tmp_path / "folds") == report  # complete folds are read, not trained
    rows = [json.loads(line) for line in (tmp_path / "folds" / "held_out.jsonl").read_text().splitlines()]
    written = [json.loads(line) for line in (world / "comparisons.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == sorted(row["prompt"] for row in written)
    for fold in range(2):
        settings = json.loads((tmp_path / "folds" / f"fold{fold}" / "config.json").read_text())
        trained = sources.load(tuple(settings["data"]["comparisons"]), "comparisons", 0)
        held_out = {row["prompt"] for row in rows if row["fold"] == fold}
        assert held_out and {record["prompt"] for record in trained} == {r["prompt"] for r in written} - held_out
    right, pairs = {group: 0 for group in "abc"}, {group: 0 for group in "abc"}
    for row in rows:
        scores, ranking = np.array(row["scores"]), np.array(row["ranking"])
        better = ranking[:, None] < ranking[None]
        right[row["group"]] += (better & (scores[:, None] > scores[None])).sum()
        pairs[row["group"]] += better.sum()
    assert {group: found["mean"] for group, found in report["accuracy"].items()} == {
        group: right[group] / pairs[group] for group in "abc"
    }
    assert len(report["folds"]) == 2
