"""What policies are evaluated on: prompts, references, comparisons, closed tasks and text, read and checked at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from instructgpt_jax import simulated
from instructgpt_jax.data import chats, datasets, encoding, sources
from instructgpt_jax.evaluation import curves, earlier, people, text
from instructgpt_jax.training import checkpoint


class Data(NamedTuple):
    """Everything that is read before anything is computed.

    prompts: distribution -> its distinct prompts, the list of them `answers_per_prompt` times over. A prompt that is
      messages is a `chats.Dialogue`, here and below.
    prefix_prompts, snapshot_prompts: to choose the prefix by, and for the answers of snapshots.
    references: prompt -> the texts that people wrote.
    comparisons, tasks: records of comparisons; task -> its records.
    text: (T,) int32 each, sequences of pretraining text.
    curves: stage -> what its metrics.jsonl says.
    earlier: what earlier stages have found out, sections of the report.
    judged: what people said of answers; not in `read`: they may say more before the report is made again.
    read: key of `config.evaluate` -> what was read of it, see data.datasets.described.
    """

    prompts: dict[str, list[str]]
    prefix_prompts: list[str]
    snapshot_prompts: list[str]
    references: dict[str, list[str]]
    comparisons: list[dict]
    tasks: dict[str, list[dict]]
    text: list[np.ndarray]
    curves: dict[str, dict[str, list]]
    earlier: dict[str, dict]
    judged: people.Judged
    read: dict[str, dict]


def load(config: ConfigDict, tokenizer, longest: int) -> Data:
    """Reads and checks all records.

    Args:
      longest: tokens that the reward model reads; with config.data.skip_long, longer comparisons are left out.

    Raises:
      ValueError: records that are wrong, or a key of `config.evaluate` whose sources leave none.
    """
    c, read, whole = config.evaluate, {}, {}  # key -> its prompts, those that are not used too
    for name, workdir in c.overoptimisation.runs.items():
        if not checkpoint.steps(workdir, checkpoint.SNAPSHOTS):
            where = f"config.evaluate.overoptimisation.runs.{name}"
            raise ValueError(f"{where} must be a workdir with snapshots (config.snapshot_every), got {workdir!r}")
    drawn = {stage: curves.read(c.curves[stage]) for stage in c.curves}
    found_earlier = earlier.read(c.prompt_sets, c.folds, c.sweep_report)

    def plain(key: str, found: Sequence) -> list:
        """Records that are all used as they are."""
        read[key] = datasets.described_whole(found)
        return list(found)

    def records(key: str, names: Sequence[str], kind: str) -> sources.Records:
        found = sources.load(tuple(names), kind, config.data.skip_bad, config.data.data_dir)
        if c.split == "valid":
            found = datasets.split(found, config.data.valid_fraction)[1]
        if kind == "comparisons" and config.data.skip_long:
            found = encoding.that_fit(found, tokenizer, longest)
        if not len(found):
            why = f"config.evaluate.split={c.split!r}, config.data.skip_long={config.data.skip_long}"
            raise ValueError(f"config.evaluate.{key} must leave at least one record ({why}), got none")
        return found

    def prompts(key: str, names: Sequence[str]) -> list[str]:
        """Distinct prompts, those that are too long left out as in training."""
        if not names:
            return []
        found, allowed = records(key, names, "prompts"), datasets.allowed(config.data)
        whole[key] = [chats.named(record) for record in found] if c.rankings or c.ratings else ()
        kept = encoding.prompts(found, tokenizer, allowed, max_prompt_length=c.max_prompt_length)
        distinct = list(dict.fromkeys(chats.named(found[i]) for i in kept.records))
        used = distinct[: c.num_prompts or None]  # their hash and number are what counts, not those beyond
        if c.labelers:
            for prompt in used:
                if simulated.parse(prompt)["kind"] == "unknown":
                    where = f"config.evaluate.labelers=True must have prompts of the simulated world in {key}"
                    raise ValueError(f"{where}, got {prompt[:80]!r}")
        about = {"examples": len(used), "fingerprint": encoding.fingerprint(used)}
        read[key] = datasets.described([{key: kept}])[key] | about
        return used

    times = c.answers_per_prompt
    found = {name: prompts(f"distributions.{name}", c.distributions[name]) * times for name in c.distributions}
    references: dict[str, list[str]] = {}
    if c.references:
        for record in plain("references", list(records("references", c.references, "demonstrations"))):
            prompt, completion = chats.asked_and_said(record)
            references.setdefault(prompt, []).append(completion)
    if references and not any(prompt in references for given in found.values() for prompt in given):
        raise ValueError("config.evaluate.references must have a prompt of config.evaluate.distributions, got none")
    if c.slots:
        for prompt in (prompt for given in found.values() for prompt in given):
            text.slots(prompt)
    sequences = []
    if c.pretraining.num_sequences:
        length = c.pretraining.row_length
        running = records("pretraining", config.data.pretraining, "pretraining")
        sequences = encoding.pretraining(running, tokenizer, row_length=length, cache_dir="").examples
    text_used = [sequences[i].tokens for i in range(min(c.pretraining.num_sequences, len(sequences)))]
    return Data(
        prompts=found,
        prefix_prompts=prompts("prefix.prompts", c.prefix.prompts),
        snapshot_prompts=prompts("overoptimisation.prompts", c.overoptimisation.prompts),
        references=references,
        comparisons=plain("accuracy", records("accuracy", c.accuracy, "comparisons")) if c.accuracy else [],
        tasks={
            task: plain(f"tasks.{task}", list(records(f"tasks.{task}", c.tasks[task], "tasks"))) for task in c.tasks
        },
        text=plain("pretraining", text_used),
        curves=drawn,
        earlier=found_earlier,
        judged=people.load(config, {name: whole[f"distributions.{name}"] for name in found}),
        read=read,
    )
