"""Reward models on comparisons that people ranked: ours, or any classifier with one label in Hugging Face format.

Each network of `config.models` scores the comparisons of each source in `config.evaluate_reward.comparisons`. Beside
them stand two that know little: the longer completion, and with `bag_of_words` a linear model of words that learns from
comparisons of its own (`evaluation/baselines.py`). Networks may have tokenizers of their own.

Scores lie in `parts/` of the workdir as they come, so that a run that was killed goes on where it was. In the end
`scores.jsonl` has every comparison with all its scores, and `rewards.json` what `evaluation/scorers.py` makes of them.
"""

import json
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, process, responses, run_tokenizer
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import datasets, encoding, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation import baselines, scorers
from instructgpt_jax.evaluation.parts import Parts
from instructgpt_jax.networks import Network
from instructgpt_jax.training import resume

LONGER, WORDS = "longer", "bag_of_words"  # rows of the table that are no network
ALL = "all"  # sources together
RESULTS, SCORES = "rewards.json", "scores.jsonl"


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Writes `scores.jsonl` and `rewards.json` into the workdir, and prints the table of accuracies.

    Raises:
      ValueError: a network that is no reward model, comparisons that are longer than its context, or none in a source.
    """
    folder = epath.Path(workdir)
    nets = {name: build(config, name, mesh) for name in sorted(config.models)}
    workdirs.claim(workdirs.resolved(config, {name: network.entry for name, (network, _) in nets.items()}), folder)
    if (folder / RESULTS).exists():
        process.say(f"evaluate_reward: complete in {folder}, nothing to do")
        return
    sets = read(config)
    if config.data.skip_long:  # for one network: for all, so that they are asked the same
        for network, tokenizer in nets.values():
            longest = network.config.max_length
            sets = {name: encoding.that_fit(records, tokenizer, longest) for name, records in sets.items()}
        if not all(map(len, sets.values())):
            raise ValueError(f"config.evaluate_reward.comparisons must have one that fits {longest} tokens, got none")
    train = _bag_of_words(config, sets)
    used = sets | ({"bag of words": train} if train is not None else {})
    about = {name: datasets.described_whole(records) for name, records in used.items()}
    parts, found = Parts(folder / "parts"), {}
    if len(parts):  # they are scores of these comparisons
        resume.check_data("evaluate_reward", resume.read_data(folder), about, allowed=None)
    resume.tell_data(about, folder)
    for name, (network, tokenizer) in nets.items():
        found[name] = parts.get(name, lambda: score(config, network, tokenizer, sets, mesh))  # noqa: B023
    everything = [record for records in sets.values() for record in records]
    found[LONGER] = _cut(baselines.longer(everything), sets)
    if train is not None:
        scores, strength = baselines.words(list(train), everything, train.keys[:, 1])
        process.say(f"evaluate_reward: {WORDS} learned from {len(train)} comparisons (penalty {strength:g})")
        found[WORDS] = _cut(scores, sets)
    best_of = config.evaluate_reward.best_of
    results = {
        name: {scorer: scorers.examine(records, scores[name], best_of) for scorer, scores in found.items()}
        for name, records in sets.items()
    }
    if len(sets) > 1:
        joined = {scorer: [one for name in sets for one in scores[name]] for scorer, scores in found.items()}
        results[ALL] = {scorer: scorers.examine(everything, scores, best_of) for scorer, scores in joined.items()}
    if jax.process_index() == 0:
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in _scored(sets, found))
        workdirs.write_atomically(folder / SCORES, "".join(lines))
        workdirs.write_atomically(folder / RESULTS, json.dumps(results, indent=2) + "\n")  # last: it says "complete"
    tell(results)
    process.say(f"evaluate_reward: the results are in {folder / RESULTS}")


def build(config: ConfigDict, name: str, mesh: Mesh) -> tuple[Network, tokenizers.Tokenizer]:
    """A reward model, and the tokenizer that it reads by: `config.data.tokenizer`, or the one that comes with it."""
    key, entry = f"config.models.{name}", config.models[name]
    wanted = config.data.tokenizer or run_tokenizer.beside(entry.init_from)
    if not wanted:
        raise ValueError(f"config.data.tokenizer must be set, {key}.init_from={entry.init_from!r} has none")
    tokenizer = tokenizers.load(wanted, run_tokenizer.chat_of(config, wanted))
    network = networks.build(key, entry, "scalar", mesh, tokenizer, config.seed)
    if network.grown:
        raise ValueError(f"{key} must be a reward model, got a language model from {entry.init_from!r}")
    networks.check_context("config.evaluate_reward.row_length", config.evaluate_reward.row_length, network.config)
    return network, tokenizer


def read(config: ConfigDict) -> dict[str, sources.Records]:
    """The comparisons of each source, of both sides of the split or of the validation side alone."""
    c = config.evaluate_reward
    records = sources.load(tuple(c.comparisons), "comparisons", config.data.skip_bad, config.data.data_dir)
    if c.split == "valid":
        records = datasets.split(records, config.data.valid_fraction)[1]
    sets = dict(zip(c.comparisons, records.parts, strict=True))
    for name, part in sets.items():
        if not len(part):
            raise ValueError(f"config.evaluate_reward.comparisons: {name!r} has no comparison (split={c.split!r})")
    return sets


def score(
    config: ConfigDict, network: Network, tokenizer: tokenizers.Tokenizer, sets: dict[str, sources.Records], mesh: Mesh
) -> dict[str, list[float]]:
    """source -> the scores of its completions, one record after another."""
    c, params, found = config.evaluate_reward, networks.freeze(network), {}
    for name, records in sets.items():
        process.end_if_stopped()
        of = f"{name!r} of config.evaluate_reward.comparisons"
        texts = responses.completions(list(records), tokenizer, of, network.config.max_length)
        rows = c.batch_size, c.row_length, c.microbatch_rows
        found[name] = responses.score(network.config, params, *texts, mesh, *rows).tolist()
    return found


def tell(results: dict[str, dict[str, dict]]) -> None:
    """A line for each source and scorer."""
    for name, of in results.items():
        for scorer, found in of.items():
            said = "no pair that is not tied"
            if "accuracy" in found:
                said = "accuracy {mean:.3f} [{low:.3f}, {high:.3f}]".format(**found["accuracy"])
                best = ", ".join(f"of {n} {x['chosen']['mean']:.3f}" for n, x in found["best_of"].items())
                said += f", {found['pairs']} pairs" + (f"; quality of the best {best}" if best else "")
            process.say(f"evaluate_reward: {name}: {scorer}: {said}")


def _bag_of_words(config: ConfigDict, sets: dict[str, sources.Records]) -> sources.Records | None:
    """The comparisons that the linear model learns from, without prompts that it will be asked about; None = no model.

    Where the validation side is examined, it learns from the training side.
    """
    c = config.evaluate_reward
    if not c.bag_of_words:
        return None
    records = sources.load(tuple(c.bag_of_words), "comparisons", config.data.skip_bad, config.data.data_dir)
    if c.split == "valid":
        records = datasets.split(records, config.data.valid_fraction)[0]
    asked = np.concatenate([examined.keys[:, 1] for examined in sets.values()])
    records = records.subset(~np.isin(records.keys[:, 1], asked))
    if not len(records):
        raise ValueError("config.evaluate_reward.bag_of_words must have a prompt that is not examined, got none")
    return records


def _cut(scores: np.ndarray, sets: dict[str, sources.Records]) -> dict[str, list[float]]:
    """The scores of the completions of all sources, by source."""
    counts = [sum(len(record["completions"]) for record in records) for records in sets.values()]
    parts = np.split(scores, np.cumsum(counts)[:-1])
    return {name: part.tolist() for name, part in zip(sets, parts, strict=True)}


def _scored(sets: dict[str, sources.Records], found: dict[str, dict[str, list[float]]]) -> Iterator[dict]:
    """Every comparison with the scores of its completions by each scorer."""
    for name, records in sets.items():
        start = 0
        for record in records:
            end = start + len(record["completions"])
            scores = {scorer: of[name][start:end] for scorer, of in found.items()}
            kept = {key: record[key] for key in ("prompt", "messages", "completions", "ranking") if key in record}
            yield {"source": name} | kept | {"scores": scores}
            start = end
