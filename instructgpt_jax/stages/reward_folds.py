"""How a reward model generalises to people, or to prompts, whose judgements it never saw.

People (Ouyang et al. 2022, section 4.1, appendix E.2): with `config.reward.fold_by = "labeler"` the labelers (field
`labeler` of a comparison) are dealt into `config.reward.folds` folds that have about as many comparisons each, with
`"group"` the labeler groups (field `group`), by name. For each fold a reward model is trained on the others, in
`fold<i>/` of the workdir and exactly as if it had been started alone there, and measured on two sets that share no
prompt with its training data: validation prompts of the people it trained on, and the fold that was held out. With
`config.reward.fold_seeds` above 1 each fold is trained as often, with the seeds that follow, in `fold<i>_seed<j>/`.
The paper: five groups of about equal data, three seeds, 72.4 ± 0.4 % of pairs right on labelers seen in training,
69.6 ± 0.9 % on the others.

Prompts (`"prompt"`): fold i trains on all comparisons but the part `#i/N` of their prompts (data/sources.py) and scores
that part, so that every comparison is scored once by a model that never saw its prompt. The scores go to
`held_out.jsonl`, for a paired comparison with something else.
"""

import collections
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
from instructgpt_jax.evaluation import earlier, rewards
from instructgpt_jax.stages import reward as reward_stage
from instructgpt_jax.training import loop, metrics

TRAINED, HELD_OUT = "reward/valid_accuracy", "reward/held_out_accuracy"
REPORT = earlier.FOLDS
SCORES = "held_out.jsonl"
BATCH = 64  # texts scored at once


def run(config: ConfigDict, mesh: Mesh, workdir: epath.PathLike) -> dict:
    """Trains and measures every fold, of people or of prompts."""
    return (by_prompt if config.reward.fold_by == "prompt" else by_group)(config, mesh, workdir)


def by_group(config: ConfigDict, mesh: Mesh, workdir: epath.PathLike) -> dict:
    """Folds over labelers or their groups; complete folds are skipped, a cut one resumes. Writes `generalisation.json`.

    Args:
      config: of a reward stage, `config.reward.folds` at least 2, with validation data to measure the training groups.

    Returns:
      What the file holds: `folds` (a list with a row for each fold and seed: held_out_groups, seed, comparisons, the
      final accuracies) and, under `training_groups`, `held_out_groups` and `difference` (the second less the first),
      `values`, a mean over the seeds for each fold, and their `mean`, `standard_error` and `interval95` (half the width
      of Student's interval).

    Raises:
      ValueError: fewer labelers or groups than folds, a comparison that does not name its labeler.
    """
    workdir, data, c, by = epath.Path(workdir), config.data, config.reward, config.reward.fold_by
    named = tuple(sources.with_option(name, "group=labeler") if by == "labeler" else name for name in data.comparisons)
    records = sources.load(named, "comparisons", data.skip_bad, data.data_dir)
    if by == "labeler":
        for n, record in enumerate(records):
            if record.get("labeler") is None:
                raise ValueError(f"{records.origin(n)}: labeler must be there for config.reward.fold_by='labeler'")
    counts = collections.Counter(encoding.group_name(record) for record in records)
    del counts[""]
    folds = deal_evenly(counts, c.folds) if by == "labeler" else deal(sorted(counts), c.folds)
    workdirs.claim(config, workdir)

    rows = []
    for number, held_out in enumerate(folds):
        for more in range(c.fold_seeds):
            about = f", seed {config.seed + more}" if more else ""
            process.say(f"reward: fold {number + 1} of {len(folds)}{about}, held out: {', '.join(held_out)}")
            folder = workdir / (f"fold{number}_seed{more}" if more else f"fold{number}")
            changes = {"reward.held_out_groups": held_out, "data.comparisons": named, "seed": config.seed + more}
            _train(config, changes, mesh, folder)
            lines = metrics.read_lines(folder / "metrics.jsonl")
            last = next(line for line in reversed(lines) if HELD_OUT in line)
            size = sum(counts[name] for name in held_out)
            about = {"held_out_groups": held_out, "seed": config.seed + more, "comparisons": size}
            rows.append(about | {name: last[name] for name in (TRAINED, HELD_OUT)})

    def over_seeds(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows]).reshape(len(folds), c.fold_seeds).mean(axis=1)

    seen, unseen = over_seeds(TRAINED), over_seeds(HELD_OUT)
    report = {"folds": rows}
    for name, values in (("training_groups", seen), ("held_out_groups", unseen), ("difference", unseen - seen)):
        report[name] = interval(values) | {"values": values.tolist()}
    _write(workdir / REPORT, json.dumps(report, indent=2) + "\n")
    for name in ("training_groups", "held_out_groups"):
        found = report[name]
        process.say(f"reward: accuracy on {name}: {found['mean']:.3f} ± {found['standard_error']:.3f} (standard error)")
    return report


def by_prompt(config: ConfigDict, mesh: Mesh, workdir: epath.PathLike) -> dict:
    """Folds over prompts; complete folds are skipped, a cut one resumes.

    Writes `generalisation.json`, the accuracy on untied pairs of held-out prompts with its interval over prompts, and
    `held_out.jsonl`, each comparison with the `scores` of its completions and its `fold`, by fold and in their order;
    those that are longer than the model's context are left out, as they are of training.

    Args:
      config: of a reward stage, `config.reward.folds` at least 2.

    Returns:
      What `generalisation.json` holds: `accuracy` of all pairs, and `folds`, that of each fold.

    Raises:
      ValueError: a fold whose comparisons are all too long.
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
        network, text = load(str(folder), mesh)
        # Whether they may be left out is for the training of the other folds to say, which reads them too.
        kept = encoding.that_fit(records, text, network.config.max_length)
        if not len(kept):
            raise ValueError(f"config.data.comparisons must leave fold {number} one that fits the context, got none")
        if len(kept) < len(records):
            process.say(f"reward: fold {number}: left out {kept.left_out}")
        rows = list(kept)
        scores = completion_scores(network, text, rows, mesh, config.reward.row_length, config.reward.microbatch_rows)
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
    off = {"reward.folds": 0} | ({"reward.fold_seeds": 1} if config.reward.fold_seeds > 1 else {})
    fold.update_from_flattened_dict(changes | off)
    loop.train(reward_stage.build, run_tokenizer.settled(fold, folder), mesh, folder)
    if jax.process_count() > 1:  # its metrics are read next
        multihost_utils.sync_global_devices(str(folder))


def _write(path: epath.Path, text: str) -> None:
    if jax.process_index() == 0:
        workdirs.write_atomically(path, text)


def load(init_from: str, mesh: Mesh) -> tuple[networks.Network, tokenizer.Tokenizer]:
    """A trained reward model in its workdir or export, with its tokenizer."""
    text = tokenizer.load(run_tokenizer.beside(init_from))
    return networks.build("config.models.model", {"init_from": init_from}, "scalar", mesh, text, seed=0), text


def completion_scores(
    network: networks.Network,
    text: tokenizer.Tokenizer,
    records: Sequence[dict],
    mesh: Mesh,
    row_length: int,
    microbatch_rows: int,
) -> list[list[float]]:
    """The scores that a trained reward model gives the completions of some comparisons, each completion by itself.

    Args:
      network, text: see `load`.
      records: comparisons; their ranking is not read.
      row_length, microbatch_rows: of the packed rows it runs in, made longer where a prompt and completion are.

    Raises:
      ValueError: a prompt and completion are longer than its context.
    """
    params = networks.freeze(network)
    texts = responses.completions(records, text, "a comparison", network.config.max_length)
    scores = responses.score(network.config, params, *texts, mesh, BATCH, row_length, microbatch_rows).tolist()
    left = iter(scores)
    return [[next(left) for _ in record["completions"]] for record in records]


def deal(names: Sequence[str], folds: int) -> list[tuple[str, ...]]:
    """The groups held out of each fold: every group in one, sizes as even as they can be."""
    _check_folds(names, folds, "labeler groups (`group` of the comparisons)")
    return [tuple(names[fold::folds]) for fold in range(folds)]


def deal_evenly(comparisons: dict[str, int], folds: int) -> list[tuple[str, ...]]:
    """The labelers held out of each fold: every one in one, the folds about as large in comparisons.

    The one with the most comparisons first, each goes to the fold that has the fewest so far.

    Args:
      comparisons: labeler -> number of comparisons.
    """
    _check_folds(sorted(comparisons), folds, "labelers (`labeler` of the comparisons)")
    names: list[list[str]] = [[] for _ in range(folds)]
    sizes = [0] * folds
    for name in sorted(comparisons, key=lambda name: (-comparisons[name], name)):
        smallest = sizes.index(min(sizes))
        names[smallest].append(name)
        sizes[smallest] += comparisons[name]
    return [tuple(sorted(part)) for part in names]


def _check_folds(names: Sequence[str], folds: int, of: str) -> None:
    if not 2 <= folds <= len(names):
        raise ValueError(
            f"config.reward.folds must be from 2 to the number of {of}, {len(names)}: {list(names)}, got {folds}"
        )


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
