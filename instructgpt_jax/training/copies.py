"""Whether the copies of a value that several devices hold are still the same: a bit that flips in one goes unnoticed.

Each device adds up the bits of its own part of every array. Arrays that are laid out over the same axes of the mesh
share one sum, and along all other axes the sums must be equal. It reads all arrays once and sends a few bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax import sharding

PyTree = Any


def axes_of(spec: P) -> frozenset[str]:
    """The axes of the mesh over which an array is split."""
    return frozenset(axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part))


class Groups(NamedTuple):
    """The mesh, and for each sum the axes of it over which its arrays are split."""

    mesh: Mesh
    axes: list[frozenset[str]]


def make_sums(tree: PyTree) -> tuple[Callable[[PyTree], jax.Array], Groups]:
    """How to add up the bits of a tree, of what trains and what does not.

    Args:
      tree: arrays on one mesh, or ShapeDtypeStructs with their shardings.

    Returns:
      A jitted function of the tree to (G, data, fsdp, tensor) uint32, whole on every device, and its G groups.
    """
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
    groups = sorted({axes_of(spec) for spec in specs}, key=sorted)
    mesh = jax.tree.leaves(tree)[0].sharding.mesh

    def local(*leaves: jax.Array) -> jax.Array:  # the parts of one device -> (G, 1, 1, 1)
        sums = [jnp.uint32(0)] * len(groups)
        for number, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
            place = groups.index(axes_of(spec))
            sums[place] += _bits(leaf) * jnp.uint32(2 * number + 1)  # odd: no two arrays can change places
        return jnp.stack(sums).reshape(-1, 1, 1, 1)

    summed = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=P(None, *sharding.AXES), check_vma=False)
    whole = NamedSharding(mesh, P())
    return jax.jit(lambda tree: summed(*jax.tree.leaves(tree)), out_shardings=whole), Groups(mesh, groups)


def _bits(x: jax.Array) -> jax.Array:
    """The sum of the bits of an array, as words of its own size, modulo 2^32."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    narrow = x.dtype in (jnp.bool_, jnp.uint4)  # nf4 has four bits a code
    x = x.astype(jnp.uint8) if narrow else jax.lax.bitcast_convert_type(x, words)
    return jnp.sum(x, dtype=jnp.uint32)


def unequal(sums: np.ndarray, groups: Groups) -> str:
    """Where the sums say that copies differ: '' or the first pair of devices, with their processes."""
    for group, found in zip(groups.axes, sums, strict=True):
        first = found
        for number, axis in enumerate(sharding.AXES):
            if axis not in group:
                first = np.take(first, [0], axis=number)
        wrong = np.argwhere(found != first)
        if len(wrong):
            place = tuple(wrong[0])
            source = tuple(n if axis in group else 0 for n, axis in zip(place, sharding.AXES, strict=True))
            one, other = (groups.mesh.devices[where] for where in (source, place))
            return f"of {one} (process {one.process_index}) and {other} (process {other.process_index})"
    return ""
