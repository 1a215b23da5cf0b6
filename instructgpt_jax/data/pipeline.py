"""From records to the batches of a training step: shuffle, repeat, mix, batch, and this process's slice of it, packed.

The number of a batch says everything about it. A seeded permutation of the examples of each epoch, one after another,
is one long list of example numbers; batch `i` is the `i`-th cut of `batch_size` numbers. Each process takes its slice
of the cut and packs it. So the state of an iterator is one integer, a run may be continued with another number of
processes on the same examples, and the batches of several processes hold together what one process would have had.

`batch_size` counts the examples of the global batch (demonstrations, comparison prompts, prompts, pretraining
sequences), `microbatch_rows` the rows of a global microbatch. A process is told its slice as `process_index` of
`process_count`, from `process_slice(mesh)`: processes that hold the same rows (tensor parallelism across hosts) get the
same slice. `data/datasets.py` makes these calls from a config.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instructgpt_jax import sharding
from instructgpt_jax.data import encoding, packing

ROWS = PartitionSpec(None, sharding.BATCH)  # (M, B, T) and (M, G, …): rows, and the comparisons of a microbatch
EXAMPLES = PartitionSpec(sharding.BATCH)  # (B, …)
_PREFETCH = 2  # batches made ahead


@dataclasses.dataclass(frozen=True)
class Batches:
    """Random access to the batches of this process.

    Attributes:
      source: the batches, dicts of numpy int32 arrays: a Grain data set.
      num_examples: examples of one epoch.
      steps_per_epoch: batches of one epoch, at least 1; batches run on across the end of an epoch.
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
      pretraining, pretraining_fraction: records of text, and their share of all examples (the policy that starts RLHF
        has 0.1: the paper, appendix C.3). Not available with `seed=None`.
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
    numbers = _numbers(encoded, seed, num_epochs)
    text = None
    if pretraining_fraction:
        if pretraining is None or seed is None or not 0 < pretraining_fraction < 1:
            raise ValueError(
                "pretraining_fraction must be below 1 and come with pretraining records and a seed, "
                f"got {pretraining_fraction!r}, {pretraining!r}, {seed!r}"
            )
        text = encoding.pretraining(pretraining, tokenizer, row_length=row_length, cache_dir=cache_dir)
        more = _numbers(text, seed, None, offset=len(encoded.examples))
        numbers = grain.MapDataset.mix([numbers, more], [1 - pretraining_fraction, pretraining_fraction])
    count = len(encoded.examples)

    def pack(chosen):
        examples = [encoded.examples[i] if i < count else text.examples[i - count] for i in chosen]
        return packing.pack_examples(examples, row_length, microbatches, local_rows)

    microbatches = packing.num_microbatches(_largest_slice(batch_size, process_count), local_rows)
    read = {"demonstrations": encoded} | ({"pretraining": text} if text else {})
    share = 1 - pretraining_fraction
    return _batches(numbers, read, share, pack, seed, batch_size, process_index, process_count, ROWS)


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
    read = {"comparisons": encoded}
    return _batches(numbers, read, 1.0, pack, seed, batch_size, process_index, process_count, ROWS)


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
    read = {"prompts": encoded}
    return _batches(numbers, read, 1.0, pack, seed, batch_size, process_index, process_count, EXAMPLES)


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
    read = {"pretraining": encoded}
    return _batches(numbers, read, 1.0, pack, seed, batch_size, process_index, process_count, ROWS)


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


def _batches(
    numbers: grain.MapDataset,
    read: dict[str, encoding.Encoded],
    share: float,
    pack: Callable[[np.ndarray], dict[str, np.ndarray]],
    seed: int | None,
    batch_size: int,
    process_index: int,
    process_count: int,
    spec: PartitionSpec,
) -> Batches:
    """Cuts numbers into batches and packs the slice of this process; `share` of them number the first of `read`."""
    if seed is not None and len(numbers) < batch_size:
        raise ValueError(
            f"the data must have at least batch_size={batch_size} examples in all epochs, got {len(numbers)}"
        )
    low, high = (p * batch_size // process_count for p in (process_index, process_index + 1))
    batches = numbers.batch(batch_size, drop_remainder=seed is not None).map(lambda cut: pack(cut[low:high]))
    encoded = next(iter(read.values()))
    steps = int(len(encoded.examples) / share) // batch_size if seed is not None else len(batches)
    return Batches(batches, len(encoded.examples), max(1, steps), encoded.left_out, spec, encoded.groups, read)


def _largest_slice(batch_size: int, process_count: int) -> int:
    return -(-batch_size // process_count)


def _local_rows(microbatch_rows: int, process_count: int) -> int:
    if microbatch_rows < 1 or microbatch_rows % process_count:
        raise ValueError(
            f"microbatch_rows must be a positive multiple of the {process_count} processes, got {microbatch_rows}"
        )
    return microbatch_rows // process_count


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """(process_index, process_count): which slice of the rows of a batch this process holds, of how many.

    Raises:
      ValueError: its devices do not hold one run of neighbouring rows.
    """
    shards = sharding.batch_shards(mesh)
    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH)).addressable_devices_indices_map((shards,))
    held = sorted({(index[0].start or 0) for index in where.values()})
    if shards % len(held) or held[0] % len(held) or held[-1] - held[0] + 1 != len(held):
        raise ValueError(f"config.mesh must give each process neighbouring rows of a batch, got {held} of {shards}")
    return held[0] // len(held), shards // len(held)


def iterate(dataset, mesh: Mesh, start: int, spec=None) -> Iterator:
    """Batches from number `start` on as global arrays, made ahead on a thread of their own.

    Args:
      dataset: `Batches`, or anything with a length and `dataset[i]` -> a pytree of numpy arrays.
      mesh: where the arrays go.
      start: the first batch, i.e. the number of steps already taken.
      spec: PartitionSpec of all arrays, or a tree of them that is a prefix of the batch; `dataset.spec` by default.
    Yields:
      batches, until the data ends. `.close()` stops the thread. An error of the thread is raised here.
    """
    spec = dataset.spec if spec is None else spec
    ready: queue.Queue = queue.Queue(_PREFETCH)
    stop = threading.Event()

    def put(item) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for index in range(start, len(dataset)):
                if stop.is_set():
                    return
                put((global_arrays(dataset[index], mesh, spec), None))
            put((None, None))
        except BaseException as error:  # whatever it is, the consumer must see it
            put((None, error))

    def consume():
        thread.start()
        try:
            while True:
                batch, error = ready.get()
                if error is not None:
                    raise error
                if batch is None:
                    return
                yield batch
        finally:
            stop.set()
            thread.join()

    thread = threading.Thread(target=work, name="batches", daemon=True)
    return consume()


def global_arrays(batch, mesh: Mesh, spec):
    """The arrays of all processes' batches as one, laid out on the mesh by `spec` (a prefix tree of PartitionSpecs)."""

    def place(one, arrays):
        layout = NamedSharding(mesh, one)
        return jax.tree.map(lambda array: jax.make_array_from_process_local_data(layout, array), arrays)

    return jax.tree.map(place, spec, batch, is_leaf=lambda node: isinstance(node, PartitionSpec))
