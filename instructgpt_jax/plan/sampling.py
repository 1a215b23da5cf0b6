"""What a sampling program decodes: laps of its loops, bytes of its cache and of the weights that a token reads."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructgpt_jax import models, rollout
from instructgpt_jax.models import ModelConfig, attention, quantised
from instructgpt_jax.plan import shapes
from instructgpt_jax.sharding import batch_shards, path_name

LAP = "_run.<locals>.loop.<locals>.lap"  # of rollout.py: the function that wrote the loops of sampling


class Sampled(NamedTuple):
    """What a sampling program decodes.

    network: of the policy.
    slots: decoded at once. columns: of the cache. steps: tokens decoded one after another in a call.
    filled: columns that hold a token, on average over the steps.
    cache: how keys and values are kept, see rollout.generate.
    """

    network: ModelConfig
    slots: int
    columns: int
    steps: int
    filled: float
    cache: str = "full"


def waves_of(count: int, wave: int) -> tuple[int, int]:
    """How many waves of slots answer so many prompts, and the slots."""
    slots = min(wave or count, count)
    return -(-count // slots), slots


def laps(
    network: ModelConfig, prompts: int, Q: int, R: int, slots: int, waves: int, mesh: Mesh
) -> dict[str, float | tuple[float, ...]]:
    """Laps of rollout.py's loops where every prompt and every response is as long as it may be."""
    tray = max(rollout.TRAY, -(-slots // rollout.TRAY))
    chunks_of_prompt = -(-Q // rollout.PREFILL_CHUNK)
    columns = chunks_of_prompt * rollout.PREFILL_CHUNK + R
    # A loop for each size of read, each for the steps whose longest sequence needs it; the last slots, which have
    # loops of their own, end with the others.
    bounds = itertools.pairwise((0, *attention.read_sizes(columns, rollout.READS)))
    steps = tuple(waves * max(0, min(most, Q + R - 1) - max(fewest, Q - 1)) for fewest, most in bounds)
    return {
        f"{LAP}/_decode": (*steps, *[0] * len(attention.read_sizes(columns, rollout.FEW_READS))),
        f"{LAP}/_prefill": -(-prompts // tray),
        f"{LAP}/_seat": -(-prompts // batch_shards(mesh)),
        "_prefill": chunks_of_prompt,
        "Cache.with_copies": chunks_of_prompt,
        "_rewind": waves - 1,
        "Cache.rewound.<locals>.turn": network.num_layers if mesh.devices.flat[0].platform == "tpu" else 1,
    }


def cache_bytes(sampled: Sampled, mesh: Mesh) -> float:
    """Bytes of keys and values on a device: slots over the batch shards, heads over `tensor`."""
    n = sampled.network
    size = n.head_width * jnp.dtype(n.dtype).itemsize if sampled.cache == "full" else n.head_width + 4  # and a scale
    values = 2 * n.num_layers * sampled.slots * sampled.columns * n.num_kv_heads * size
    heads = mesh.shape["tensor"] if n.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    return values / (batch_shards(mesh) * heads)


def weight_bytes(sampled: Sampled, mesh: Mesh) -> float:
    """Bytes of the parameters that every decoded token reads on a device."""
    net, shaped = sampled.network, jax.eval_shape(lambda: models.init(sampled.network, jax.random.key(0)))
    if net.adapter and net.adapter.base:
        shaped = quantised.abstract(shaped, net.adapter.base)
    kind = lambda path, x: x.dtype if "/kernel/" in path_name(path) else net.dtype  # noqa: E731
    size = lambda path, x: x.size * shapes.item_bytes(kind(path, x))  # noqa: E731
    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, shaped))) / mesh.shape["tensor"]
