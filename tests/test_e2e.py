"""The E2E pipeline: its sources, folds over prompts, the linear baseline beside them."""

import json
import platform

import jax
import numpy as np
import pytest
import scipy.sparse

from instructgpt_jax import pipeline, sharding
from instructgpt_jax.data import sources
from instructgpt_jax.evaluation import baselines
from instructgpt_jax.stages import reward_folds
from tests import tiny_supervised


def test_folds_over_prompts_score_every_comparison_once_without_its_prompt(tmp_path, capfd):
    world = tiny_supervised.make_world(tmp_path / "world")
    with (world / "comparisons.jsonl").open("a") as file:  # longer than the context: left out of training and scoring
        json.dump({"prompt": "long", "completions": ["red " * 200, "blue"], "ranking": [1, 2], "group": "a"}, file)
    options = {"folds": 2, "fold_by": "prompt", "num_steps": 2}
    config = tiny_supervised.config("reward", world, **{f"reward.{key}": value for key, value in options.items()})
    config.update_from_flattened_dict({"eval_every": 0, "data.skip_long": True})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        report = reward_folds.run(config, mesh, tmp_path / "folds")
        (tmp_path / "folds" / "generalisation.json").unlink()
        assert reward_folds.run(config, mesh, tmp_path / "folds") == report  # complete folds are read, not trained
    rows = [json.loads(line) for line in (tmp_path / "folds" / "held_out.jsonl").read_text().splitlines()]
    written = [json.loads(line) for line in (world / "comparisons.jsonl").read_text().splitlines()][:-1]
    assert "left out {'longer than 96 tokens': 1}" in capfd.readouterr().err
    assert sorted(row["prompt"] for row in rows) == sorted(row["prompt"] for row in written)
    for fold in range(2):
        settings = json.loads((tmp_path / "folds" / f"fold{fold}" / "config.json").read_text())
        trained = sources.load(tuple(settings["data"]["comparisons"]), "comparisons", 0)
        held_out = {row["prompt"] for row in rows if row["fold"] == fold}
        assert held_out and {r["prompt"] for r in trained} - {"long"} == {r["prompt"] for r in written} - held_out
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


def test_differences_of_words_and_bigrams_by_hand():
    assert baselines.features("The cat, the dog") == {
        "the", "cat", ",", "dog", ("the", "cat"), ("cat", ","), (",", "the"), ("the", "dog"),
    }  # fmt: skip
    rows = [
        {"completions": ["a b", "a", "b"], "ranking": [1, 2, 2]},
        {"completions": ["b", "a"], "ranking": [2, 1]},
    ]
    assert baselines.pairs(rows[0]) == [(0, 1), (0, 2)]
    x, places, _ = baselines.differences(rows)
    assert places.tolist() == [0, 0, 1]
    # b and "a b" against a; a and "a b" against b; a against b. Columns in the order of their first appearance.
    columns = [column.tolist() for column in x.toarray().T]
    assert sorted(columns) == sorted([[1, 0, -1], [1, 1, 0], [0, 1, 1]])


def test_fit_is_where_the_gradient_vanishes():
    rng = np.random.default_rng(0)
    x = scipy.sparse.csr_matrix(rng.normal(size=(40, 3)))
    w = baselines.fit(x, strength=2.0)
    gradient = 2.0 * w - x.toarray().T @ (1 / (1 + np.exp(x.toarray() @ w)))
    assert np.abs(gradient).max() < 1e-3 and np.abs(w).max() > 0.05


def _held_out(rows, folds):
    x, places, _ = baselines.differences(rows)
    return baselines.held_out(x, folds[places])


def test_linear_model_learns_a_word_and_is_at_chance_without_one():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        words = [f"{rng.integers(5)} {rng.integers(5)}" for _ in range(3)]
        rows.append({"prompt": str(i), "completions": [words[0] + " good", words[1], words[2]], "ranking": [1, 2, 2]})
    folds = np.arange(60) % 5
    margins, chosen = _held_out(rows, folds)
    assert baselines.right(margins).mean() > 0.97 and len(chosen) == 5 and set(chosen) <= set(baselines.STRENGTHS)
    for row in rows:
        row["completions"][0] = row["completions"][0].removesuffix(" good")
    margins, _ = _held_out(rows, folds)
    assert 0.3 < baselines.right(margins).mean() < 0.7


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_of_a_stage_is_given_back():
    def resident():
        with open("/proc/self/status") as lines:
            return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])  # KiB

    blocks = [b"x" * (60_000 + number) for number in range(2000)]  # 120 MB, and the last one holds the heap's end
    kept = blocks.pop()
    del blocks
    before = resident()
    pipeline.release_memory()
    assert before - resident() > 60_000 and kept
