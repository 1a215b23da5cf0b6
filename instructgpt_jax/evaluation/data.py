"""What policies are evaluated on: prompts, references, comparisons, closed tasks and text, read and checked at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from instructgpt_jax.data import datasets, encoding, sources
from instructgpt_jax.evaluation import curves, text
from instructgpt_jax.training import checkpoint


class Data(NamedTuple):
    """Everything that is read before anything is computed.

    prompts: distribution -> its distinct prompts, the list of them `answers_per_prompt` times over.
    prefix_prompts, snapshot_prompts: to choose the prefix by, and for the answers of snapshots.
    references: prompt -> the texts that people wrote.
    comparisons, tasks: records of comparisons; task -> its records.
    text: (T,) int32 each, sequences of pretraining text.
    curves: stage -> what its metrics.jsonl says.
    """

    prompts: dict[str, list[str]]
    prefix_prompts: list[str]
    snapshot_prompts: list[str]
    references: dict[str, list[str]]
    comparisons: list[dict]
    tasks: dict[str, list[dict]]
    text: list[np.ndarray]
    curves: dict[str, dict[str, list]]


def load(config: ConfigDict, tokenizer) -> Data:
    """Reads and checks all records."""
    c = config.evaluate
    for name, workdir in c.overoptimisation.runs.items():
        if not checkpoint.steps(workdir, checkpoint.SNAPSHOTS):
            where = f"config.evaluate.overoptimisation.runs.{name}"
            raise ValueError(f"{where} must be a workdir with snapshots (config.snapshot_every), got {workdir!r}")
    drawn = {stage: curves.read(c.curves[stage]) for stage in c.curves}

    def records(names: Sequence[str], kind: str) -> sources.Records:
        found = sources.load(tuple(names), kind, config.data.skip_bad, config.data.data_dir)
        return datasets.split(found, config.data.valid_fraction)[1] if c.split == "valid" else found

    def prompts(names: Sequence[str]) -> list[str]:
        """Distinct prompts, those that are too long left out as in training."""
        found = records(names, "prompts") if names else []
        if not len(found):
            return []
        lengths = dict(max_prompt_length=c.max_prompt_length, max_prompt_tokens=config.data.max_prompt_tokens)
        kept = encoding.prompts(found, tokenizer, **lengths, skip_bad=config.data.skip_bad).records
        distinct = list(dict.fromkeys(found[i]["prompt"] for i in kept))
        return distinct[: c.num_prompts or None]

    found = {name: prompts(c.distributions[name]) * c.get("answers_per_prompt", 1) for name in c.distributions}
    for name, given in found.items():
        if not given:
            raise ValueError(
                f"config.evaluate.distributions.{name} must have a prompt (config.evaluate.split={c.split!r})"
            )
    references: dict[str, list[str]] = {}
    for record in records(c.references, "demonstrations") if c.references else ():
        references.setdefault(record["prompt"], []).append(record["completion"])
    if references and not any(prompt in references for given in found.values() for prompt in given):
        raise ValueError("config.evaluate.references must have a prompt of config.evaluate.distributions, got none")
    if c.slots:
        for prompt in (prompt for given in found.values() for prompt in given):
            text.slots(prompt)
    sequences = []
    if c.pretraining.num_sequences:
        length = c.pretraining.row_length
        running = records(config.data.pretraining, "pretraining")
        sequences = encoding.pretraining(running, tokenizer, row_length=length, cache_dir="").examples
    return Data(
        prompts=found,
        prefix_prompts=prompts(c.prefix.prompts),
        snapshot_prompts=prompts(c.overoptimisation.prompts),
        references=references,
        comparisons=list(records(c.accuracy, "comparisons")) if c.accuracy else [],
        tasks={task: list(records(c.tasks[task], "tasks")) for task in c.tasks},
        text=[sequences[i].tokens for i in range(min(c.pretraining.num_sequences, len(sequences)))],
        curves=drawn,
    )
