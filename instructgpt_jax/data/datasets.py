"""The data of a stage, as its config names them: sources, split, tokenizer and batches in one call."""

import collections
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instructgpt_jax import process
from instructgpt_jax.data import batches, encoding, feeding, sources, tokens
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.batches import Batches, Order, Rows


class StageData(NamedTuple):
    """What a stage needs of its data."""

    tokenizer: tokenizers.Tokenizer
    train_batches: Batches
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
      options: `config.<stage>`, which has `batch_size`, `num_epochs` (0 = for ever), what the function below that is
        called `kind` reads, and for comparisons `held_out_groups`.
      kind: "demonstrations", "comparisons", "prompts" or "pretraining".
      mesh: which processes hold which rows.
    """
    data = config.data
    build, tokenizer = BUILD[kind], tokenizers.load(data.tokenizer)
    found = read(data, kind)
    train, valid = split(found, data.valid_fraction)
    held_out = ()
    if kind == "comparisons" and options.held_out_groups:
        train, valid, held_out = hold_out(found, train, valid, tuple(options.held_out_groups))
    once = in_order(options, mesh)
    shuffled = once._replace(seed=config.seed, num_epochs=options.num_epochs or None)
    training = build(train, tokenizer, shuffled, data, options)
    sets = {}
    if len(valid):
        try:
            sets["valid"] = build(valid, tokenizer, once, data, options)
        except ValueError as error:
            raise ValueError(f"validation data (config.data.valid_fraction={data.valid_fraction}): {error}") from error
    if held_out:
        sets["held_out"] = build(held_out, tokenizer, once, data, options)
    return StageData(
        tokenizer=tokenizer,
        train_batches=training,
        train=lambda start: feeding.iterate(training, mesh, start),
        valid={name: functools.partial(feeding.iterate, one, mesh, 0) for name, one in sets.items()},
        groups={name: one.read[kind].groups for name, one in sets.items()},
        num_steps=len(training),
        steps_per_epoch=training.steps_per_epoch,
        abstract_batch=lambda: abstract(training, mesh),
        read=described([one.read for one in (training, *sets.values())]),
        valid_records=valid,
    )


def read(data, kind: str) -> sources.Records:
    """All records of a kind of data that `config.data` names."""
    return sources.load(tuple(data[kind]), kind, data.skip_bad, data.data_dir, process.say)


def in_order(options, mesh: Mesh) -> Order:
    """Once through, unshuffled: this process's slice of batches of `options.batch_size`."""
    return Order(None, 1, options.batch_size, *feeding.process_slice(mesh))


# One builder for each kind of data: (records, tokenizer, order, config.data, config.<stage>) -> Batches.


def demonstrations(records: sources.Records, tokenizer, order: Order, data, options) -> Batches:
    """By `row_length`, `microbatch_rows` and `loss_on_prompt`; with a seed, `pretraining_fraction` of them is text."""
    mix = None
    if options.pretraining_fraction and order.seed is not None:
        text, _ = split(read(data, "pretraining"), data.valid_fraction)
        mix = batches.Mix(text, options.pretraining_fraction, options.pretraining_fraction_of, data.cache_dir)
    return batches.demonstrations(records, tokenizer, order, _rows(options), allowed(data), options.loss_on_prompt, mix)


def comparisons(records: sources.Records, tokenizer, order: Order, data, options) -> Batches:
    """By `row_length`, `microbatch_rows`, `max_completions` and `shared_prompt`."""
    rows, shared = _rows(options), options.shared_prompt
    return batches.comparisons(records, tokenizer, order, rows, allowed(data), options.max_completions, shared)


def prompts(records: sources.Records, tokenizer, order: Order, data, options) -> Batches:
    """By `max_prompt_length`."""
    return batches.prompts(records, tokenizer, order, allowed(data), options.max_prompt_length)


def pretraining(records: sources.Records, tokenizer, order: Order, data, options) -> Batches:
    """By `row_length` and `microbatch_rows`."""
    return batches.pretraining(records, tokenizer, order, _rows(options), data.cache_dir)


BUILD = {
    "demonstrations": demonstrations,
    "comparisons": comparisons,
    "prompts": prompts,
    "pretraining": pretraining,
}


def _rows(options) -> Rows:
    return Rows(options.row_length, options.microbatch_rows)


def allowed(data) -> encoding.Allowed:
    """Which records `config.data` lets be left out."""
    return encoding.Allowed(data.max_prompt_tokens, data.skip_bad, data.skip_long)


def described(sets: list[dict[str, encoding.Encoded]]) -> dict[str, dict]:
    """kind -> `records`, `examples` (of training), `validation` (those of the other sets), `left_out`: reason -> number
    of records, `fingerprint`: of all examples in their order, whatever the number of processes, and of comparisons that
    carry one, `groups`: labeler group -> comparisons of training.

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
        if parts[0].groups:
            counts = collections.Counter(example.group for example in parts[0].examples)
            found[kind]["groups"] = {name: counts[i] for i, name in enumerate(parts[0].groups)}
    return found


def described_whole(found: Sequence) -> dict:
    """As `described`, of one set whose records are all used as they are: dicts, texts or arrays."""
    left_out = dict(found.left_out) if isinstance(found, sources.Records) else {}
    if isinstance(found, sources.Records) and found.skipped:
        left_out["bad"] = len(found.skipped)
    used = [json.dumps(one, sort_keys=True) if isinstance(one, dict) else one for one in found]
    return {
        "records": len(used) + sum(left_out.values()),
        "examples": len(used),
        "validation": 0,
        "left_out": left_out,
        "fingerprint": encoding.fingerprint(used),
    }


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
    of_tokens = isinstance(records, tokens.Corpus)
    if not valid_fraction:
        return records, records.none() if of_tokens else records.subset(np.zeros(len(records), bool))

    def held(places):
        return places / 2**64 < valid_fraction

    if of_tokens:
        return records.split(held, valid_fraction)
    places, about = records.keys.T
    valid = held(places)
    held_out = valid & ~np.isin(about, about[~valid])
    validation = records.subset(held_out)
    lost = int(valid.sum() - held_out.sum())  # what the sources left out stays with training, to be counted once
    validation.left_out = {"prompt that is in training too, by another user": lost} if lost else {}
    return records.subset(~valid), validation


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
    return int(np.isin(valid.keys[:, 1], train.keys[:, 1]).sum())


def hold_out(
    records: sources.Records, train: sources.Records, valid: sources.Records, groups: tuple[str, ...]
) -> tuple[sources.Records, sources.Records, sources.Records]:
    """Training and validation comparisons without those of some labeler groups, and those, less prompts trained on."""

    def held(records):
        return np.array([encoding.group_name(record) in groups for record in records], bool)

    train, valid = (side.subset(~held(side)) for side in (train, valid))
    held_out = records.subset(held(records) & ~np.isin(records.keys[:, 1], train.keys[:, 1]))
    held_out.left_out = {}
    for name, side in (("the other", train), ("these", held_out)):
        if not len(side):
            raise ValueError(f"config.reward.held_out_groups must leave {name} groups comparisons, got {groups}")
    return train, valid, held_out


def draw(records: sources.Records, count: int, seed: int) -> sources.Records:
    """At most `count` of the records, drawn without replacement, in their order."""
    keep = np.zeros(len(records), bool)
    keep[np.random.default_rng(seed).permutation(len(records))[:count]] = True
    return records.subset(keep)
