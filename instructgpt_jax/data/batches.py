"""From records to the batches of a training step: shuffle, repeat, mix, batch, and this process's slice of it, packed.

The number of a batch says everything about it. A seeded permutation of the examples of each epoch, one after another,
is one long list of example numbers; batch `i` is the `i`-th cut of `batch_size` numbers. Each process takes its slice
of the cut and packs it. So the state of an iterator is one integer, a run may be continued with another number of
processes on the same examples, and the batches of several processes hold together what one process would have had.

`batch_size` counts the examples of the global batch (demonstrations, comparison prompts, prompts, pretraining
sequences), `microbatch_rows` the rows of a global microbatch. A process is told its slice as `process_index` of
`process_count`, from `feeding.process_slice(mesh)`: processes that hold the same rows (tensor parallelism across hosts)
get the same slice. `data/datasets.py` makes these calls from a config.
"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np
from jax.sharding import PartitionSpec

from instructgpt_jax import sharding
from instructgpt_jax.data import encoding, packing

ROWS = PartitionSpec(None, sharding.BATCH)  # (M, B, T) and (M, G, …): rows, and the comparisons of a microbatch
EXAMPLES = PartitionSpec(sharding.BATCH)  # (B, …)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random access to the batches of this process.

    Attributes:
      source: the batches, dicts of numpy int32 arrays: a Grain data set.
      num_examples: examples of one epoch.
      steps_per_epoch: whole batches of one epoch, at least 1; batches run on across the end of an epoch.
      left_out: reason -> number of records left out.
      spec: how every array of a batch lies on the mesh.
      groups: names of the labeler groups that `groups` of a batch of comparisons indexes.
      read: kind of data -> its examples.
    """

    source: Sequence
    num_examples: int
    steps_per_epoch: int
    left_out: dict[str, int]
    spec: PartitionSpec
    groups: tuple[str, ...]
    read: dict[str, encoding.Encoded]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"batch index must be in 0..{len(self) - 1}, got {index}")
        return self.source[index]


def demonstrations(
    records,
    tokenizer,
    *,
    seed: int | None,
    batch_size: int,
    row_length: int,
    microbatch_rows: int,
    num_epochs: int | None,
    loss_on_prompt: bool,
    max_prompt_tokens: int,
    skip_bad: int,
    pretraining=None,
    pretraining_fraction: float = 0.0,
    pretraining_fraction_of: str = "loss",
    cache_dir: str = "",
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of prompt + completion + EOS, with a share of pretraining sequences.

    Args:
      records: `sources.Records` of demonstrations.
      seed: of the shuffle; None gives the examples once in their order, the last batch possibly smaller.
      num_epochs: over the demonstrations; None = for ever.
      loss_on_prompt: prompt tokens are loss tokens too.
      max_prompt_tokens: longer prompts are left out; 0 keeps all.
      skip_bad: records that may be left out because they do not fit a row.
      pretraining, pretraining_fraction: records of text, and their share (the policy that starts RLHF has 0.1: the
        paper, appendix C.3). Not available with `seed=None`.
      pretraining_fraction_of: what the share is of: 'examples', 'tokens' (loss tokens over the run), or 'loss', where
        every batch holds the same number of texts, about that share of its examples, and the stage weighs the two
        kinds. Texts are kind 2 in `loss_mask`.
      cache_dir: where encoded text is kept, see `encoding.pretraining`.
    """
    local_rows = _local_rows(microbatch_rows, process_count)
    encoded = encoding.demonstrations(
        records,
        tokenizer,
        row_length=row_length,
        loss_on_prompt=loss_on_prompt,
        max_prompt_tokens=max_prompt_tokens,
        skip_bad=skip_bad,
    )
    numbers, own, text = _numbers(encoded, seed, num_epochs), batch_size, None
    if not pretraining_fraction:
        cuts = _cuts(numbers, batch_size, seed is not None)
    else:
        if pretraining is None or seed is None or not 0 < pretraining_fraction < 1:
            raise ValueError(
                "pretraining_fraction must be below 1 and come with pretraining records and a seed, "
                f"got {pretraining_fraction!r}, {pretraining!r}, {seed!r}"
            )
        text = encoding.pretraining(pretraining, tokenizer, row_length=row_length, cache_dir=cache_dir)
        texts = _numbers(text, seed, None, offset=len(encoded.examples))
        if pretraining_fraction_of == "loss":
            cuts, own = _with_texts(numbers, texts, pretraining_fraction, batch_size)
        else:
            share = pretraining_fraction
            if pretraining_fraction_of == "tokens":
                share = _share_of_examples(share, encoded.examples, row_length - 1)
            cuts = _cuts(grain.MapDataset.mix([numbers, texts], [1 - share, share]), batch_size, whole=True)
            own = (1 - share) * batch_size
    count = len(encoded.examples)

    def pack(chosen):
        examples = [encoded.examples[i] if i < count else text.examples[i - count]._replace(kind=2) for i in chosen]
        return packing.pack_examples(examples, row_length, microbatches, local_rows)

    microbatches = packing.num_microbatches(_largest_slice(batch_size, process_count), local_rows)
    read = {"demonstrations": encoded} | ({"pretraining": text} if text else {})
    return _batches(cuts, read, own, pack, batch_size, process_index, process_count, ROWS)


def _share_of_examples(share: float, demonstrations: Sequence[packing.Example], text_tokens: int) -> float:
    """The share of texts among the examples that gives them `share` of the loss tokens.

    Of n examples, s n are texts of T loss tokens and (1 - s) n demonstrations of d on average: s T = share (s T +
    (1 - s) d).
    """
    d = float(np.mean([len(example.tokens) - example.loss_from for example in demonstrations]))
    return share * d / ((1 - share) * text_tokens + share * d)


def _with_texts(
    numbers: grain.MapDataset, texts: grain.MapDataset, fraction: float, batch_size: int
) -> tuple[grain.MapDataset, int]:
    """Batches with the same number of texts in each, spread over it, and the number of demonstrations in each."""
    count = max(1, round(fraction * batch_size))
    if count >= batch_size:
        raise ValueError(
            f"batch_size must hold demonstrations and texts (pretraining_fraction={fraction}), got {batch_size}"
        )
    places = np.arange(count) * (batch_size - count) // count
    beside = texts.batch(count)
    cuts = _cuts(numbers, batch_size - count, whole=True)
    return cuts.map_with_index(lambda i, cut: np.insert(cut, places, beside[i])), batch_size - count


def comparisons(
    records,
    tokenizer,
    *,
    seed: int | None,
    batch_size: int,
    row_length: int,
    microbatch_rows: int,
    num_epochs: int | None,
    max_completions: int,
    shared_prompt: bool,
    max_prompt_tokens: int,
    skip_bad: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of comparisons, all completions of a prompt in one microbatch; `batch_size` counts prompts.

    Args:
      max_completions: K of the arrays, at least the completions of any record.
      shared_prompt: the encoding, see `packing.pack_comparisons`.
      The others as in `demonstrations`.
    """
    rows = _local_rows(microbatch_rows, process_count)
    encoded = encoding.comparisons(
        records,
        tokenizer,
        row_length=row_length,
        process_rows=rows,
        max_completions=max_completions,
        shared_prompt=shared_prompt,
        max_prompt_tokens=max_prompt_tokens,
        skip_bad=skip_bad,
    )
    examples = _largest_slice(batch_size, process_count)
    microbatches = packing.num_comparison_microbatches(examples, rows, max_completions)
    slots = -(-examples // rows) * rows  # a multiple of the rows, so that it splits over the same devices

    def pack(chosen):
        return packing.pack_comparisons(
            [encoded.examples[i] for i in chosen],
            row_length,
            microbatches,
            rows,
            slots,
            max_completions,
            shared_prompt,
            first_row=process_index * rows,
        )

    numbers = _numbers(encoded, seed, num_epochs)
    cuts, read = _cuts(numbers, batch_size, seed is not None), {"comparisons": encoded}
    return _batches(cuts, read, batch_size, pack, batch_size, process_index, process_count, ROWS)


def prompts(
    records,
    tokenizer,
    *,
    seed: int | None,
    batch_size: int,
    max_prompt_length: int,
    num_epochs: int | None,
    max_prompt_tokens: int,
    skip_bad: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of `prompts` (B, Q) int32 right-padded with 0, `prompt_lengths` (B,), and `index` (B,) of the record.

    Args:
      max_prompt_length: Q; a longer prompt is a bad record.
      The others as in `demonstrations`. With `seed=None` the last batch is filled with copies of the first prompt,
      whose `index` is -1.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of the {process_count} processes, got {batch_size}")
    encoded = encoding.prompts(
        records,
        tokenizer,
        max_prompt_length=max_prompt_length,
        max_prompt_tokens=max_prompt_tokens,
        skip_bad=skip_bad,
    )
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

    numbers = _numbers(encoded, seed, num_epochs)
    cuts, read = _cuts(numbers, batch_size, seed is not None), {"prompts": encoded}
    return _batches(cuts, read, batch_size, pack, batch_size, process_index, process_count, EXAMPLES)


def pretraining(
    records,
    tokenizer,
    *,
    seed: int | None,
    batch_size: int,
    row_length: int,
    microbatch_rows: int,
    num_epochs: int | None,
    cache_dir: str = "",
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches of `row_length` tokens of running text, one sequence a row in the order of the shuffle."""
    local_rows = _local_rows(microbatch_rows, process_count)
    encoded = encoding.pretraining(records, tokenizer, row_length=row_length, cache_dir=cache_dir)
    microbatches = packing.num_microbatches(_largest_slice(batch_size, process_count), local_rows)

    def pack(chosen):
        return packing.pack_examples([encoded.examples[i] for i in chosen], row_length, microbatches, local_rows)

    numbers = _numbers(encoded, seed, num_epochs)
    cuts, read = _cuts(numbers, batch_size, seed is not None), {"pretraining": encoded}
    return _batches(cuts, read, batch_size, pack, batch_size, process_index, process_count, ROWS)


def _numbers(encoded: encoding.Encoded, seed: int | None, num_epochs: int | None, offset: int = 0) -> grain.MapDataset:
    """The example numbers (from `offset` on) of all epochs, each shuffled anew; sources mixed by their weights.

    With weights an epoch is as many examples as there are, drawn in those proportions.
    """
    count = len(encoded.examples)
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


def _cuts(numbers: grain.MapDataset, batch_size: int, whole: bool) -> grain.MapDataset:
    """The numbers of each batch; the last one may be smaller, unless all shall be `whole`."""
    if whole and len(numbers) < batch_size:
        raise ValueError(
            f"the data must have at least batch_size={batch_size} examples in all epochs, got {len(numbers)}"
        )
    return numbers.batch(batch_size, drop_remainder=whole)


def _batches(
    cuts: grain.MapDataset,
    read: dict[str, encoding.Encoded],
    own: float,
    pack: Callable[[np.ndarray], dict[str, np.ndarray]],
    batch_size: int,
    process_index: int,
    process_count: int,
    spec: PartitionSpec,
) -> Batches:
    """Packs this process's slice of each cut; on average `own` examples of a batch are of the first kind of `read`."""
    low, high = (p * batch_size // process_count for p in (process_index, process_index + 1))
    batches = cuts.map(lambda cut: pack(cut[low:high]))
    encoded = next(iter(read.values()))
    count = len(encoded.examples)
    return Batches(batches, count, max(1, int(count // own)), encoded.left_out, spec, encoded.groups, read)


def _largest_slice(batch_size: int, process_count: int) -> int:
    return -(-batch_size // process_count)


def _local_rows(microbatch_rows: int, process_count: int) -> int:
    if microbatch_rows < 1 or microbatch_rows % process_count:
        raise ValueError(
            f"microbatch_rows must be a positive multiple of the {process_count} processes, got {microbatch_rows}"
        )
    return microbatch_rows // process_count
