"""From records to the batches of a training step: shuffle, repeat, mix, batch, and this process's slice of it, packed.

The number of a batch says everything about it. A seeded permutation of the examples of each epoch, one after another,
is one long list of example numbers; batch `i` is the `i`-th cut of `batch_size` numbers. Each process takes its slice
of the cut and packs it. So the state of an iterator is one integer, a run may be continued with another number of
processes on the same examples, and the batches of several processes hold together what one process would have had.

`data/datasets.py` makes these calls from a config.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import NamedTuple

import grain
import numpy as np
from jax.sharding import PartitionSpec

from instructgpt_jax import sharding
from instructgpt_jax.data import encoding, packing, sources

ROWS = PartitionSpec(None, sharding.BATCH)  # (M, B, T) and (M, G, …): rows, and the comparisons of a microbatch
EXAMPLES = PartitionSpec(sharding.BATCH)  # (B, …)
_REQUESTS = 64  # examples that are waited for at once, where they come over a network


class Order(NamedTuple):
    """Which examples the batches hold, in what order, and which of them this process has.

    seed: of the shuffle; None gives the examples once in their order, the last batch possibly smaller.
    num_epochs: None = for ever.
    batch_size: examples of the global batch: demonstrations, comparison prompts, prompts, pretraining sequences.
    process_index, process_count: this process's slice of a batch, from `feeding.process_slice(mesh)`: processes that
      hold the same rows (tensor parallelism across hosts) have the same slice.
    """

    seed: int | None
    num_epochs: int | None
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    @property
    def largest_slice(self) -> int:
        """The most examples of a batch that a process has."""
        return -(-self.batch_size // self.process_count)


class Rows(NamedTuple):
    """The rows that examples are packed into: T tokens each, and how many a global microbatch has."""

    row_length: int
    microbatch_rows: int

    def of_process(self, order: Order) -> int:
        """How many rows of a microbatch a process has."""
        count = order.process_count
        if self.microbatch_rows < 1 or self.microbatch_rows % count:
            raise ValueError(
                f"microbatch_rows must be a positive multiple of the {count} processes, got {self.microbatch_rows}"
            )
        return self.microbatch_rows // count


class Mix(NamedTuple):
    """Pretraining text among demonstrations (the policy that starts RLHF has a tenth: the paper, appendix C.3).

    records: of text.
    fraction: its share, above 0 and below 1.
    fraction_of: what the share is of: 'examples', 'tokens' (loss tokens over the run), or 'loss', where every batch
      holds the same number of texts, about that share of its examples, and the stage weighs the two kinds.
    cache_dir: where encoded text is kept, see `encoding.pretraining`.
    """

    records: sources.Records
    fraction: float
    fraction_of: str
    cache_dir: str


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random access to the batches of this process.

    Attributes:
      source: the batches, dicts of numpy int32 arrays: a Grain data set.
      steps_per_epoch: whole batches of one epoch, at least 1; batches run on across the end of an epoch.
      spec: how every array of a batch lies on the mesh.
      read: kind of data -> its examples; the first is what epochs are counted by.
    """

    source: Sequence
    steps_per_epoch: int
    spec: PartitionSpec
    read: dict[str, encoding.Encoded]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch index must be in 0..{len(self) - 1}, got {index}")
        return self.source[index]


def demonstrations(
    records: sources.Records,
    tokenizer,
    order: Order,
    rows: Rows,
    allowed: encoding.Allowed,
    loss_on_prompt: bool,
    mix: Mix | None = None,
) -> Batches:
    """Batches of prompt + completion + EOS, with a share of texts, which are kind 2 in `loss_mask`.

    Args:
      loss_on_prompt: prompt tokens are loss tokens too.
      mix: text to mix in, None = none; `order` must have a seed then.
    """
    local_rows = rows.of_process(order)
    if mix and (order.seed is None or not 0 < mix.fraction < 1):
        raise ValueError(
            f"pretraining_fraction must be above 0 and below 1, with a seed, got {mix.fraction!r}, {order.seed!r}"
        )
    encoded = encoding.demonstrations(
        records, tokenizer, allowed, row_length=rows.row_length, loss_on_prompt=loss_on_prompt
    )
    own, read, count = order.batch_size, {"demonstrations": encoded}, len(encoded.examples)
    if mix is None:
        cuts = _cuts(_numbers(encoded, order), order)
    else:
        text = encoding.pretraining(mix.records, tokenizer, row_length=rows.row_length, cache_dir=mix.cache_dir)
        cuts, own = _mixed(encoded, text, mix, order)
        read["pretraining"] = text

    def example(number):
        if number < count:
            return encoded.examples[number]
        return text.examples[number - count]._replace(kind=2)

    remote = mix is not None and text.examples.remote
    return _batches(cuts, read, own, _packed(example, rows.row_length, local_rows, order, remote), order, ROWS)


def _mixed(encoded: encoding.Encoded, text: encoding.Encoded, mix: Mix, order: Order) -> tuple[grain.MapDataset, float]:
    """The numbers of each batch, those of texts behind all others, and how many others a batch has on average."""
    numbers = _numbers(encoded, order)
    texts = _numbers(text, order._replace(num_epochs=None), offset=len(encoded.examples))
    if mix.fraction_of == "loss":
        return _with_texts(numbers, texts, mix.fraction, order)
    share = mix.fraction
    if mix.fraction_of == "tokens":
        share = _share_of_examples(share, encoded.examples, len(text.examples[0].tokens) - 1)
    return _cuts(grain.MapDataset.mix([numbers, texts], [1 - share, share]), order), (1 - share) * order.batch_size


def _share_of_examples(share: float, demonstrations: Sequence[packing.Example], text_tokens: int) -> float:
    """The share of texts among the examples that gives them `share` of the loss tokens.

    Of n examples, s n are texts of T loss tokens and (1 - s) n demonstrations of d on average: s T = share (s T +
    (1 - s) d).
    """
    d = float(np.mean([example.loss.sum() for example in demonstrations]))
    return share * d / ((1 - share) * text_tokens + share * d)


def own_of(batch_size: int, fraction: float) -> int:
    """The demonstrations of a batch whose texts carry `fraction` of the loss; the others are texts, at least one."""
    return batch_size - max(1, round(fraction * batch_size))


def _with_texts(
    numbers: grain.MapDataset, texts: grain.MapDataset, fraction: float, order: Order
) -> tuple[grain.MapDataset, int]:
    """Batches with the same number of texts in each, spread over it, and the number of demonstrations in each."""
    own = own_of(order.batch_size, fraction)
    count = order.batch_size - own
    if own <= 0:
        raise ValueError(
            f"batch_size must hold demonstrations and texts (pretraining_fraction={fraction}), got {order.batch_size}"
        )
    places = np.arange(count) * own // count
    beside = texts.batch(count)
    cuts = _cuts(numbers, order._replace(batch_size=own))
    return cuts.map_with_index(lambda i, cut: np.insert(cut, places, beside[i])), own


def comparisons(
    records: sources.Records,
    tokenizer,
    order: Order,
    rows: Rows,
    allowed: encoding.Allowed,
    max_completions: int,
    shared_prompt: bool,
) -> Batches:
    """Batches of comparisons, all completions of a prompt in one microbatch.

    Args:
      max_completions: K of the arrays, at least the completions of any record.
      shared_prompt: the encoding, see `packing.pack_comparisons`.
    """
    if shared_prompt and max_completions > packing.MAX_BRANCHES:
        raise ValueError(
            f"max_completions must be at most {packing.MAX_BRANCHES} with a shared prompt, got {max_completions}"
        )
    local_rows = rows.of_process(order)
    encoded = encoding.comparisons(
        records,
        tokenizer,
        allowed,
        row_length=rows.row_length,
        process_rows=local_rows,
        max_completions=max_completions,
        shared_prompt=shared_prompt,
    )
    examples = order.largest_slice
    microbatches = packing.num_comparison_microbatches(examples, local_rows, max_completions)
    slots = -(-examples // local_rows) * local_rows  # a multiple of the rows, so that it splits over the same devices

    def pack(chosen):
        return packing.pack_comparisons(
            [encoded.examples[i] for i in chosen],
            rows.row_length,
            microbatches,
            local_rows,
            slots,
            max_completions,
            shared_prompt,
            first_row=order.process_index * local_rows,
        )

    cuts = _cuts(_numbers(encoded, order), order)
    return _batches(cuts, {"comparisons": encoded}, order.batch_size, pack, order, ROWS)


def prompts(
    records: sources.Records, tokenizer, order: Order, allowed: encoding.Allowed, max_prompt_length: int
) -> Batches:
    """Batches of `prompts` (B, Q) int32 right-padded with 0, `prompt_lengths` (B,), and `index` (B,) of the record.

    Without a seed the last batch is filled with copies of the first prompt, whose `index` is -1.

    Args:
      max_prompt_length: Q; a longer prompt is a bad record.
    """
    batch_size, process_count = order.batch_size, order.process_count
    if batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of the {process_count} processes, got {batch_size}")
    encoded = encoding.prompts(records, tokenizer, allowed, max_prompt_length=max_prompt_length)
    rows = batch_size // process_count

    def pack(chosen):
        index = np.full(rows, -1, np.int32)
        index[: len(chosen)] = encoded.records[chosen]
        tokens = np.zeros((rows, max_prompt_length), np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, number in enumerate([*chosen, *[0] * (rows - len(chosen))]):
            lengths[row] = len(encoded.examples[number])
            tokens[row, : lengths[row]] = encoded.examples[number]
        return {"prompts": tokens, "prompt_lengths": lengths, "index": index}

    cuts = _cuts(_numbers(encoded, order), order)
    return _batches(cuts, {"prompts": encoded}, batch_size, pack, order, EXAMPLES)


def pretraining(records: sources.Records, tokenizer, order: Order, rows: Rows, cache_dir: str) -> Batches:
    """Batches of `row_length` tokens of running text, one sequence a row in the order of the shuffle.

    Args:
      cache_dir: where encoded text is kept, see `encoding.pretraining`.
    """
    local_rows = rows.of_process(order)
    encoded = encoding.pretraining(records, tokenizer, row_length=rows.row_length, cache_dir=cache_dir)
    pack = _packed(encoded.examples.__getitem__, rows.row_length, local_rows, order, encoded.examples.remote)
    cuts = _cuts(_numbers(encoded, order), order)
    return _batches(cuts, {"pretraining": encoded}, order.batch_size, pack, order, ROWS)


def _packed(
    example: Callable[[int], packing.Example], row_length: int, local_rows: int, order: Order, remote: bool
) -> Callable[[Sequence[int]], dict[str, np.ndarray]]:
    """Numbers of examples -> their packed rows; those that come over a network are asked for together."""
    microbatches = packing.num_microbatches(order.largest_slice, local_rows)
    together = futures.ThreadPoolExecutor(_REQUESTS).map if remote else map

    def pack(chosen):
        return packing.pack_examples(list(together(example, chosen)), row_length, microbatches, local_rows)

    return pack


def _numbers(encoded: encoding.Encoded, order: Order, offset: int = 0) -> grain.MapDataset:
    """The example numbers (from `offset` on) of all epochs, each shuffled anew; sources mixed by their weights.

    With weights an epoch is as many examples as there are, drawn in those proportions.
    """
    count, seed, num_epochs = len(encoded.examples), order.seed, order.num_epochs
    if seed is None:
        return grain.MapDataset.range(offset, offset + count)
    weights = [weight for _, weight in encoded.parts]
    if len(weights) == 1 or weights[0] is None:
        return grain.MapDataset.range(offset, offset + count).shuffle(seed).repeat(num_epochs)
    streams, start = [], offset
    for part, (size, _) in enumerate(encoded.parts):
        if not size:
            raise ValueError(f"data source {part} must have at least one usable record, got none")
        streams.append(grain.MapDataset.range(start, start + size).shuffle(seed + part).repeat(None))
        start += size
    mixed = grain.MapDataset.mix(streams, weights)
    return mixed if num_epochs is None else mixed[: num_epochs * count]


def _cuts(numbers: grain.MapDataset, order: Order) -> grain.MapDataset:
    """The numbers of each batch; in order without a seed, where the last one may be smaller."""
    whole = order.seed is not None
    if whole and len(numbers) < order.batch_size:
        raise ValueError(
            f"the data must have at least batch_size={order.batch_size} examples in all epochs, got {len(numbers)}"
        )
    return numbers.batch(order.batch_size, drop_remainder=whole)


def _batches(
    cuts: grain.MapDataset,
    read: dict[str, encoding.Encoded],
    own: float,
    pack: Callable[[np.ndarray], dict[str, np.ndarray]],
    order: Order,
    spec: PartitionSpec,
) -> Batches:
    """Packs this process's slice of each cut; on average `own` examples of a batch are of the first kind of `read`."""
    low, high = (p * order.batch_size // order.process_count for p in (order.process_index, order.process_index + 1))
    count = len(next(iter(read.values())).examples)
    return Batches(cuts.map(lambda cut: pack(cut[low:high])), max(1, int(count // own)), spec, read)
