"""Sequences of tokens as full batches of one shape, so that one program serves all of them."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax import sharding

NARROW = 3  # most prompts are short: those up to a third of the longest go through a narrower program


def cuts(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(count)`."""
    return (slice(low, min(low + size, count)) for low in range(0, count, size))


def by_width(lengths: Sequence[int], widest: int) -> dict[int, list[int]]:
    """Numbers of the sequences, the shortest first, by the width of the batches that they go through."""
    narrow, order = -(-widest // NARROW), sorted(range(len(lengths)), key=lambda number: lengths[number])
    return {
        narrow: [number for number in order if lengths[number] <= narrow],
        widest: [number for number in order if lengths[number] > narrow],
    }


def fill(array: np.ndarray, rows: int) -> np.ndarray:
    """(rows, …): the array, then copies of its first row."""
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def pad(sequences: Sequence[np.ndarray], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (…,) int32 right-padded with 0 to (rows, width), and their lengths (rows,); filled as by `fill`."""
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
    return fill(tokens, rows), fill(np.array([len(ids) for ids in sequences], np.int32), rows)


def rows(wanted: int, mesh: Mesh) -> int:
    """The number of rows, rounded up to a multiple of the mesh's batch shards."""
    shards = sharding.batch_shards(mesh)
    return -(-wanted // shards) * shards


def put(arrays, mesh: Mesh):
    """Host arrays on the mesh, split over its batch shards."""
    return jax.device_put(arrays, NamedSharding(mesh, P(sharding.BATCH)))
