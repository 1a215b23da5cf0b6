"""Batches from the host onto the mesh: which rows a process holds, global arrays, batches made ahead on a thread."""

import queue
import threading
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instructgpt_jax import sharding

_PREFETCH = 2  # batches made ahead


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
