"""The training and validation batches that a config names: sources, split, tokenizer and pipeline in one call."""

import hashlib

import numpy as np
from jax.sharding import Mesh

from instructgpt_jax.data import pipeline, sources
from instructgpt_jax.data import tokenizer as tokenizers


def load(config, options, kind: str, mesh: Mesh):
    """The training and validation batches of one kind, as a config names them.

    Args:
      config: `seed` and `data`, which has `tokenizer`, sources of each kind under its name, `data_dir`, `cache_dir`,
        `skip_bad`, `max_prompt_tokens` and `valid_fraction`.
      options: `config.<stage>`, which has `batch_size`, `num_epochs` (0 = for ever), and the arguments of the function
        of `data/pipeline.py` called `kind`: `row_length` and `microbatch_rows`, but for prompts `max_prompt_length`; for demonstrations
        `loss_on_prompt` and `pretraining_fraction`; for comparisons `max_completions` and `shared_prompt`.
      kind: "demonstrations", "comparisons", "prompts" or "pretraining".
      mesh: which processes hold which rows.
    Returns:
      (tokenizer, training `Batches`, validation `Batches`); the last in order, once through, and None without
      validation records.
    """
    data = config.data
    tokenizer = tokenizers.load(data.tokenizer)
    records = sources.load(tuple(data[kind]), kind, data.skip_bad, data.data_dir)
    train, valid = split(records, data.valid_fraction)
    process_index, process_count = pipeline.process_slice(mesh)
    same = dict(batch_size=options.batch_size, process_index=process_index, process_count=process_count)
    if kind != "pretraining":
        same |= dict(max_prompt_tokens=data.max_prompt_tokens, skip_bad=data.skip_bad)
    if kind != "prompts":
        same |= dict(row_length=options.row_length, microbatch_rows=options.microbatch_rows)
    only_train = {}
    if kind == "demonstrations":
        build = pipeline.demonstrations
        same |= dict(loss_on_prompt=options.loss_on_prompt)
        if options.pretraining_fraction:
            text = sources.load(tuple(data.pretraining), "pretraining", data.skip_bad, data.data_dir)
            only_train = dict(
                pretraining=split(text, data.valid_fraction)[0],
                pretraining_fraction=options.pretraining_fraction,
                cache_dir=data.cache_dir,
            )
    elif kind == "comparisons":
        build = pipeline.comparisons
        same |= dict(max_completions=options.max_completions, shared_prompt=options.shared_prompt)
    elif kind == "prompts":
        build = pipeline.prompts
        same |= dict(max_prompt_length=options.max_prompt_length)
    else:
        build = pipeline.pretraining
        same |= dict(cache_dir=data.cache_dir)
    training = build(train, tokenizer, seed=config.seed, num_epochs=options.num_epochs or None, **same, **only_train)
    validation = build(valid, tokenizer, seed=None, num_epochs=1, **same) if len(valid) else None
    return tokenizer, training, validation


def split(records: sources.Records, valid_fraction: float) -> tuple[sources.Records, sources.Records]:
    """Splits records into training and validation by a hash of the user, or of the prompt or text where there is none.

    All records of a user (or a prompt) are on one side, in every kind of data, and stay there when the data grow.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"config.data.valid_fraction must be in [0, 1), got {valid_fraction!r}")
    valid = np.array([_fraction(records[i]) < valid_fraction for i in range(len(records))], bool)
    return _subset(records, ~valid), _subset(records, valid)


def _fraction(record) -> float:
    """A number in [0, 1) that is a fixed function of who or what the record is about."""
    name = record.get("user")
    name = record.get("prompt", record.get("text")) if name is None else f"user {name}"
    return int.from_bytes(hashlib.sha256(f"valid|{name}".encode()).digest()[:8], "big") / 2**64


def _subset(records: sources.Records, keep: np.ndarray) -> sources.Records:
    def of(numbers, base):
        return sources.Records(len(numbers), lambda i: base[numbers[i]], lambda i: base.origin(numbers[i]))

    subset = of(np.flatnonzero(keep), records)
    parts, start = [], 0
    for part in records.parts:
        parts.append(of(np.flatnonzero(keep[start : start + len(part)]), part))
        parts[-1].weight = part.weight
        start += len(part)
    subset.parts, subset.skipped, subset.weight = tuple(parts), records.skipped, records.weight
    return subset
