"""The data of a stage, as its config names them: sources, split, tokenizer and pipeline in one call."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instructgpt_jax import splits
from instructgpt_jax.data import batches, encoding, feeding, sources
from instructgpt_jax.data import tokenizer as tokenizers


class StageData(NamedTuple):
    """What a stage needs of its data."""

    tokenizer: tokenizers.Tokenizer
    vocab_size: int  # what a model's vocabulary must hold
    train_batches: batches.Batches
    valid_batches: batches.Batches | None  # in order, once through; None without validation records
    train: Callable[[int], Iterator]  # global batches from that step on
    valid: dict[str, Callable[[], Iterator]]  # "valid": once through the validation batches; "held_out": those groups'
    groups: dict[str, tuple[str, ...]]  # of comparisons: labeler groups in each set of `valid`
    num_steps: int  # batches of all epochs
    steps_per_epoch: int
    abstract_batch: Callable[[], Any]  # a training batch as ShapeDtypeStructs with shardings
    read: dict[str, dict]  # kind -> what was read, see `described`
    valid_records: sources.Records


def load(config, options, kind: str, mesh: Mesh) -> StageData:
    """The training and validation batches of one kind.

    Args:
      config: `seed` and `data`, which has `tokenizer`, sources of each kind under its name, `data_dir`, `cache_dir`,
        `skip_bad`, `max_prompt_tokens` and `valid_fraction`.
      options: `config.<stage>`, which has `batch_size`, `num_epochs` (0 = for ever), and the arguments of the function
        of `data/batches.py` called `kind`: `row_length` and `microbatch_rows`, but for prompts `max_prompt_length`;
        for demonstrations `loss_on_prompt`, `pretraining_fraction` and `pretraining_fraction_of`; for comparisons
        `max_completions`, `shared_prompt` and `held_out_groups`.
      kind: "demonstrations", "comparisons", "prompts" or "pretraining".
      mesh: which processes hold which rows.
    """
    data = config.data
    process_index, process_count = feeding.process_slice(mesh)
    tokenizer = tokenizers.load(data.tokenizer)
    records = sources.load(tuple(data[kind]), kind, data.skip_bad, data.data_dir)
    train, valid = split(records, data.valid_fraction)
    held_out = ()
    if kind == "comparisons" and options.held_out_groups:
        train, valid, held_out = hold_out(records, train, valid, tuple(options.held_out_groups))
    same = dict(batch_size=options.batch_size, process_index=process_index, process_count=process_count)
    if kind != "pretraining":
        same |= dict(max_prompt_tokens=data.max_prompt_tokens, skip_bad=data.skip_bad)
    if kind != "prompts":
        same |= dict(row_length=options.row_length, microbatch_rows=options.microbatch_rows)
    only_train = {}
    if kind == "demonstrations":
        build = batches.demonstrations
        same |= dict(loss_on_prompt=options.loss_on_prompt)
        if options.pretraining_fraction:
            text = sources.load(tuple(data.pretraining), "pretraining", data.skip_bad, data.data_dir)
            only_train = dict(
                pretraining=split(text, data.valid_fraction)[0],
                pretraining_fraction=options.pretraining_fraction,
                pretraining_fraction_of=options.pretraining_fraction_of,
                cache_dir=data.cache_dir,
            )
    elif kind == "comparisons":
        build = batches.comparisons
        same |= dict(max_completions=options.max_completions, shared_prompt=options.shared_prompt)
    elif kind == "prompts":
        build = batches.prompts
        same |= dict(max_prompt_length=options.max_prompt_length)
    else:
        build = batches.pretraining
        same |= dict(cache_dir=data.cache_dir)
    training = build(train, tokenizer, seed=config.seed, num_epochs=options.num_epochs or None, **same, **only_train)
    try:
        validation = build(valid, tokenizer, seed=None, num_epochs=1, **same) if len(valid) else None
    except ValueError as error:
        raise ValueError(f"validation data (config.data.valid_fraction={data.valid_fraction}): {error}") from error
    in_order = {"valid": validation} if validation else {}
    if held_out:
        in_order["held_out"] = build(held_out, tokenizer, seed=None, num_epochs=1, **same)
    return StageData(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        train_batches=training,
        valid_batches=validation,
        train=lambda start: feeding.iterate(training, mesh, start),
        valid={name: functools.partial(feeding.iterate, batches, mesh, 0) for name, batches in in_order.items()},
        groups={name: batches.groups for name, batches in in_order.items()},
        num_steps=len(training),
        steps_per_epoch=training.steps_per_epoch,
        abstract_batch=lambda: abstract(training, mesh),
        read=described([batches.read for batches in (training, *in_order.values())]),
        valid_records=valid,
    )


def described(sets: list[dict[str, encoding.Encoded]]) -> dict[str, dict]:
    """kind -> `records`, `examples` (of training), `validation` (those of the other sets), `left_out`: reason -> number
    of records, and `fingerprint`: of all examples in their order, whatever the number of processes.

    Args:
      sets: kind -> examples, of training, then of the other sets.
    """
    found = {}
    for kind in sets[0]:
        parts = [one[kind] for one in sets if kind in one]
        left_out: dict[str, int] = {}
        for part in parts:
            for why, count in part.left_out.items():
                left_out[why] = left_out.get(why, 0) + count
        skipped = parts[0].skipped  # by the sources, before the records were split
        if skipped:
            left_out["bad"] = left_out.get("bad", 0) + skipped
        examples = [len(part.examples) for part in parts]
        found[kind] = {
            "records": skipped + sum(part.num_records for part in parts),
            "examples": examples[0],
            "validation": sum(examples[1:]),
            "left_out": left_out,
            "fingerprint": encoding.fingerprint([part.fingerprint for part in parts]),
        }
    return found


def abstract(batches, mesh: Mesh):
    """A global batch of what `feeding.iterate` takes, as ShapeDtypeStructs with shardings."""
    _, process_count = feeding.process_slice(mesh)

    def of(spec, arrays):
        axis = len(spec) - 1  # the one that is split, see batches.ROWS and EXAMPLES

        def one(array):
            shape = (*array.shape[:axis], array.shape[axis] * process_count, *array.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, arrays)

    return jax.tree.map(of, batches.spec, batches[0], is_leaf=lambda node: isinstance(node, PartitionSpec))


def split(records: sources.Records, valid_fraction: float) -> tuple[sources.Records, sources.Records]:
    """Training and validation records, by a hash of the user, or of the prompt or text where there is none.

    All records of a user are on one side and stay there when the data grow, and so are those of a prompt without a
    user, in every kind of data. Validation has no prompt that training has too, from another user or from none.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"config.data.valid_fraction must be in [0, 1), got {valid_fraction!r}")
    if not valid_fraction:
        return records, _subset(records, np.zeros(len(records), bool))
    valid, about = np.zeros(len(records), bool), np.zeros(len(records), np.uint64)
    for i in range(len(records)):
        record = records[i]
        who = {"user": record.get("user"), "prompt": record.get("prompt", record.get("text"))}
        valid[i] = splits.split_of(who, "instructgpt_jax", valid_fraction, 0.0) == "valid"
        about[i] = _digest(record)
    held_out = valid & ~np.isin(about, about[~valid])
    validation = _subset(records, held_out)
    if lost := int(valid.sum() - held_out.sum()):
        validation.left_out = {"prompt that is in training too, by another user": lost}
    return _subset(records, ~valid), validation


def _digest(record: dict) -> int:
    """64 bits of the prompt of a record, or of its text where it has none."""
    text = record.get("prompt", record.get("text"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def count_trained_on(valid: sources.Records, earlier: dict) -> int:
    """How many validation prompts stand in the training demonstrations of an earlier stage.

    Demonstrations without a user are split by prompt, prompts by user: the two need not agree.

    Args:
      earlier: `data` of that stage's resolved configuration.

    Raises:
      ValueError: its demonstrations cannot be read any more.
    """
    records = sources.load(tuple(earlier["demonstrations"]), "demonstrations", earlier["skip_bad"], earlier["data_dir"])
    train, _ = split(records, earlier["valid_fraction"])
    trained = {_digest(record) for record in train}
    return sum(_digest(record) in trained for record in valid)


def hold_out(
    records: sources.Records, train: sources.Records, valid: sources.Records, groups: tuple[str, ...]
) -> tuple[sources.Records, sources.Records, sources.Records]:
    """Training and validation comparisons without those of some labeler groups, and those, less prompts trained on."""

    def keep(records, wanted):
        return _subset(records, np.array([wanted(records[i]) for i in range(len(records))], bool))

    def is_held(record):
        return encoding.group_name(record) in groups

    train, valid = (keep(side, lambda record: not is_held(record)) for side in (train, valid))
    seen = {train[i]["prompt"] for i in range(len(train))}
    held = keep(records, lambda record: is_held(record) and record["prompt"] not in seen)
    for name, side in (("the other", train), ("these", held)):
        if not len(side):
            raise ValueError(f"config.reward.held_out_groups must leave {name} groups comparisons, got {groups}")
    return train, valid, held


def sample(records: sources.Records, count: int, seed: int) -> sources.Records:
    """At most `count` of the records, drawn without replacement, in their order."""
    keep = np.zeros(len(records), bool)
    keep[np.random.default_rng(seed).permutation(len(records))[:count]] = True
    return _subset(records, keep)


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
    subset.left_out = records.left_out
    return subset
