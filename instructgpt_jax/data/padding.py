"""Sequences of tokens as full batches of one shape, so that one program serves all of them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax import sharding

NARROW = 3  # most prompts are short: those up to a third of the longest go through a narrower program


class Batch(NamedTuple):
    """Sequences that go through a program together.

    places: of the sequences in their list, at most `rows`.
    rows, width: the shape that they are padded to.
    """

    places: Sequence[int]
    rows: int
    width: int


def cuts(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(count)`."""
    return (slice(low, min(low + size, count)) for low in range(0, count, size))


def by_width(lengths: Sequence[int], widest: int, rows: int, rows_of_widest: int) -> Iterator[Batch]:
    """Batches of sequences of similar length: the shortest first, in two shapes, see NARROW."""
    narrow, order = -(-widest // NARROW), sorted(range(len(lengths)), key=lambda number: lengths[number])
    for size, width, wanted in (
        (rows, narrow, [number for number in order if lengths[number] <= narrow]),
        (rows_of_widest, widest, [number for number in order if lengths[number] > narrow]),
    ):
        yield from (Batch(wanted[cut], size, width) for cut in cuts(len(wanted), size))


def joined(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Up to `count` batches of one shape that follow one another as one, with the places of all."""
    for _, some in itertools.groupby(batches, key=lambda batch: (batch.rows, batch.width)):
        while group := list(itertools.islice(some, count)):
            yield group[0]._replace(places=[place for batch in group for place in batch.places])


def fill(array: np.ndarray, rows: int) -> np.ndarray:
    """(rows, …): the array, then copies of its first row."""
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def pad(sequences: Sequence[np.ndarray], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (length,) right-padded with 0 to (rows, width), and their lengths (rows,); filled as by `fill`."""
    padded = np.zeros((len(sequences), width), sequences[0].dtype)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return fill(padded, rows), fill(np.array([len(sequence) for sequence in sequences], np.int32), rows)


def rows(wanted: int, mesh: Mesh) -> int:
    """The number of rows, rounded up to a multiple of the mesh's batch shards."""
    shards = sharding.batch_shards(mesh)
    return -(-wanted // shards) * shards


def put(arrays, mesh: Mesh):
    """Host arrays on the mesh, split over its batch shards."""
    return jax.device_put(arrays, NamedSharding(mesh, P(sharding.BATCH)))
