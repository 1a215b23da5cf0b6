"""How a reward model generalises to people, or to prompts, whose judgements it never saw.

People (`config.reward.fold_by = "group"`; Ouyang et al. 2022, section 4.1): the labeler groups (field `group` of a
comparison) are dealt into `config.reward.folds` folds. For each fold a reward model is trained on the others, in
`fold<i>/` of the workdir and exactly as if it had been started alone there, and measured on two sets that share no
prompt with its training data: validation prompts of the groups it trained on, and the fold that was held out. The
paper: five groups, 72.4 ± 0.4 % of pairs right on labelers seen in training, 69.6 ± 0.9 % on the others.

Prompts (`"prompt"`): fold i trains on all comparisons but the part `#i/N` of their prompts (data/sources.py) and scores
that part, so that every comparison is scored once by a model that never saw its prompt. The scores go to
`held_out.jsonl`, for a paired comparison with something else.
"""

import json
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, process, responses, run_tokenizer
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import encoding, sources, tokenizer
from instructgpt_jax.evaluation import rewards
from instructgpt_jax.stages import reward as reward_stage
from instructgpt_jax.training import loop, metrics

TRAINED, HELD_OUT = "reward/valid_accuracy", "reward/held_out_accuracy"
REPORT = "generalisation.json"
SCORES = "held_out.jsonl"
BATCH = 64  # texts scored at once


def run(config: ConfigDict, mesh: Mesh, workdir: epath.PathLike) -> dict:
    """Trains and measures every fold, of people or of prompts."""
    return (by_prompt if config.reward.fold_by == "prompt" else by_group)(config, mesh, workdir)


def by_group(config: ConfigDict, mesh: Mesh, workdir: epath.PathLike) -> dict:
    """Folds over labelers; complete folds are skipped, a cut one resumes. Writes `generalisation.json`.

    Args:
      config: of a reward stage, `config.reward.folds` at least 2, with validation data to measure the training groups.

    Returns:
      What the file holds: `folds` (a list: held_out_groups and the final accuracies) and, under `training_groups` and
      `held_out_groups`, `mean`, `standard_error` and `interval95` (half the width of Student's interval) over folds.

    Raises:
      ValueError: fewer labeler groups than folds.
    """
    workdir, data = epath.Path(workdir), config.data
    records = sources.load(tuple(data.comparisons), "comparisons", data.skip_bad, data.data_dir)
    names = sorted({encoding.group_name(record) for record in records} - {""})
    folds = deal(names, config.reward.folds)
    workdirs.claim(config, workdir)

    rows = []
    for number, held_out in enumerate(folds):
        process.say(f"reward: fold {number + 1} of {len(folds)}, held out: {', '.join(held_out)}")
        folder = workdir / f"fold{number}"
        _train(config, {"reward.held_out_groups": held_out}, mesh, folder)
        lines = metrics.read_lines(folder / "metrics.jsonl")
        last = next(line for line in reversed(lines) if HELD_OUT in line)
        rows.append({"held_out_groups": held_out, **{name: last[name] for name in (TRAINED, HELD_OUT)}})

    report = {
        "folds": rows,
        "training_groups": interval([row[TRAINED] for row in rows]),
        "held_out_groups": interval([row[HELD_OUT] for row in rows]),
    }
    _write(workdir / REPORT, json.dumps(report, indent=2) + "\n")
    for name in ("training_groups", "held_out_groups"):
        found = report[name]
        process.say(f"reward: accuracy on {name}: {found['mean']:.3f} ± {found['standard_error']:.3f} (standard error)")
    return report


def by_prompt(config: ConfigDict, mesh: Mesh, workdir: epath.PathLike) -> dict:
    """Folds over prompts; complete folds are skipped, a cut one resumes.

    Writes `generalisation.json`, the accuracy on untied pairs of held-out prompts with its interval over prompts, and
    `held_out.jsonl`, each comparison with the `scores` of its completions and its `fold`, by fold and in their order.

    Args:
      config: of a reward stage, `config.reward.folds` at least 2.

    Returns:
      What `generalisation.json` holds: `accuracy` of all pairs, and `folds`, that of each fold.
    """
    workdir, data, count = epath.Path(workdir), config.data, config.reward.folds
    workdirs.claim(config, workdir)
    scored = []
    for number in range(1, count + 1):
        process.say(f"reward: fold {number} of {count}, held out: a part of the prompts")
        folder = workdir / f"fold{number - 1}"
        others = tuple(sources.with_option(name, f"!{number}/{count}") for name in data.comparisons)
        _train(config, {"data.comparisons": others}, mesh, folder)
        part = tuple(sources.with_option(name, f"{number}/{count}") for name in data.comparisons)
        records = sources.load(part, "comparisons", data.skip_bad, data.data_dir)
        rows = [records[i] for i in range(len(records))]
        options = dict(row_length=config.reward.row_length, microbatch_rows=config.reward.microbatch_rows)
        scores = completion_scores(str(folder), rows, mesh, **options)
        scored += [row | {"scores": s, "fold": number - 1} for row, s in zip(rows, scores, strict=True)]

    def accuracy(rows):
        return rewards.accuracy(rows, [x for row in rows for x in row["scores"]])["accuracy"]

    by_fold = [accuracy([row for row in scored if row["fold"] == fold]) for fold in range(count)]
    report = {"accuracy": accuracy(scored), "folds": by_fold}
    _write(workdir / SCORES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored))
    _write(workdir / REPORT, json.dumps(report, indent=2) + "\n")
    for group, found in report["accuracy"].items():
        low, high = found["low"], found["high"]
        process.say(f"reward: accuracy on unseen prompts, {group}: {found['mean']:.3f} [{low:.3f}, {high:.3f}]")
    return report


def _train(config: ConfigDict, changes: dict, mesh: Mesh, folder: epath.Path) -> None:
    """One fold, `config` with some `changes`, exactly as if it had been started alone in its folder."""
    fold = ConfigDict(config.to_dict())
    fold.update_from_flattened_dict(changes | {"reward.folds": 0})
    loop.train(reward_stage.build, run_tokenizer.settled(fold, folder), mesh, folder)
    if jax.process_count() > 1:  # its metrics are read next
        multihost_utils.sync_global_devices(str(folder))


def _write(path: epath.Path, text: str) -> None:
    if jax.process_index() == 0:
        workdirs.write_atomically(path, text)


def completion_scores(
    init_from: str, records: Sequence[dict], mesh: Mesh, row_length: int, microbatch_rows: int
) -> list[list[float]]:
    """The scores that a trained reward model gives the completions of some comparisons, each completion by itself.

    Args:
      init_from: its workdir or export, with its tokenizer.
      records: comparisons; their ranking is not read.
      row_length, microbatch_rows: of the packed rows it runs in, made longer where a prompt and completion are.
    """
    text = tokenizer.load(run_tokenizer.beside(init_from))
    network = networks.build("config.models.model", {"init_from": init_from}, "scalar", mesh, text, seed=0)
    params = networks.freeze(network)
    texts = responses.completions(records, text)
    scores = responses.score(network.config, params, *texts, mesh, BATCH, row_length, microbatch_rows).tolist()
    left = iter(scores)
    return [[next(left) for _ in record["completions"]] for record in records]


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
    from scipy import stats  # a quarter of a second that no other run pays

    n = len(values)
    error = float(np.std(values, ddof=1) / n**0.5)
    return {
        "mean": float(np.mean(values)),
        "standard_error": error,
        "interval95": float(stats.t.ppf(0.975, n - 1)) * error,
    }
