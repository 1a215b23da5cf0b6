"""How a reward model generalises to people whose judgements it never saw (Ouyang et al. 2022, section 4.1).

The labeler groups (field `group` of a comparison) are dealt into `config.reward.folds` folds. For each fold a reward
model is trained on the others, in `fold<i>/` of the workdir and exactly as if it had been started alone there, and
measured on two sets that share no prompt with its training data: validation prompts of the groups it trained on, and
the fold that was held out. The paper: five groups, 72.4 ± 0.4 % of pairs right on labelers seen in training,
69.6 ± 0.9 % on the others.
"""

import json
from collections.abc import Sequence

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy import stats

from instructgpt_jax import reward
from instructgpt_jax.data import encoding, sources, tokenizer
from instructgpt_jax.training import loop, metrics

TRAINED, HELD_OUT = "reward/valid_accuracy", "reward/held_out_accuracy"
REPORT = "generalisation.json"


def run(config: ConfigDict, mesh: Mesh, workdir: epath.PathLike) -> dict:
    """Trains and measures every fold and writes `generalisation.json`; complete folds are skipped, a cut one resumes.

    Args:
      config: of a reward stage, `config.reward.folds` at least 2.

    Returns:
      What the file holds: `folds` (a list: held_out_groups and the final accuracies) and, under `training_groups` and
      `held_out_groups`, `mean`, `standard_error` and `interval95` (half the width of Student's interval) over folds.

    Raises:
      ValueError: fewer labeler groups than folds, or no validation data.
    """
    workdir, data = epath.Path(workdir), config.data
    if not data.valid_fraction:
        raise ValueError("config.data.valid_fraction must be above 0: it measures the training groups, got 0")
    records = sources.load(tuple(data.comparisons), "comparisons", data.skip_bad, data.data_dir)
    names = sorted({encoding.group_name(record) for record in records} - {""})
    folds = deal(names, config.reward.folds)
    loop.claim_workdir(config, workdir)

    rows = []
    for number, held_out in enumerate(folds):
        metrics.say(f"reward: fold {number + 1} of {len(folds)}, held out: {', '.join(held_out)}")
        folder = workdir / f"fold{number}"
        fold = ConfigDict(config.to_dict())
        fold.reward.folds, fold.reward.held_out_groups = 0, held_out
        tokenizer.prepare(fold, str(folder))
        loop.run(reward.build(fold, mesh), fold, folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = next(line for line in reversed(lines) if HELD_OUT in line)
        rows.append({"held_out_groups": held_out, **{name: last[name] for name in (TRAINED, HELD_OUT)}})

    report = {
        "folds": rows,
        "training_groups": interval([row[TRAINED] for row in rows]),
        "held_out_groups": interval([row[HELD_OUT] for row in rows]),
    }
    metrics.write_atomically(workdir / REPORT, json.dumps(report, indent=2) + "\n")
    for name in ("training_groups", "held_out_groups"):
        found = report[name]
        metrics.say(f"reward: accuracy on {name}: {found['mean']:.3f} ± {found['standard_error']:.3f} (standard error)")
    return report


def deal(names: Sequence[str], folds: int) -> list[tuple[str, ...]]:
    """The groups held out of each fold: every group in one, sizes as even as they can be."""
    if not 2 <= folds <= len(names):
        raise ValueError(
            f"config.reward.folds must be from 2 to the number of labeler groups (`group` of the comparisons), "
            f"{len(names)}: {list(names)}, got {folds}"
        )
    return [tuple(names[fold::folds]) for fold in range(folds)]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of some measurements, its standard error, and half the width of Student's 95 % interval."""
    n = len(values)
    error = float(np.std(values, ddof=1) / n**0.5)
    return {
        "mean": float(np.mean(values)),
        "standard_error": error,
        "interval95": float(stats.t.ppf(0.975, n - 1)) * error,
    }
