"""Keys and values kept from token to token, so that sampling runs each token through the network once."""

import operator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from instructgpt_jax.models import attention, transformer
from instructgpt_jax.models.attention import EMPTY, Layout
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.sharding import BATCH, constrain


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one slot a sequence.

    keys, values: a tuple over the layers, each (B, M, S, H).
    positions: (B, S) int32, the position of each slot's column; EMPTY where it holds no token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` sequences of at most `length` tokens."""
    shape = (batch, config.num_kv_heads, length, config.head_width)
    empty = (constrain(jnp.zeros(shape, config.dtype), BATCH, "tensor", None, None),) * config.num_layers
    return Cache(empty, empty, constrain(jnp.full((batch, length), EMPTY, jnp.int32), BATCH, None))


def unstack(config: ModelConfig, params: dict) -> dict:
    """Parameters in the compute dtype with a tuple of layers in place of the stacked blocks, ready for `extend`.

    Sampling reads each weight once a token: slices of a stacked array would be copied out each time (on a CPU three
    times the traffic), so they are made once, outside the loop.
    """
    params = transformer.cast(params, config.dtype)
    layers = tuple(jax.tree.map(operator.itemgetter(layer), params["blocks"]) for layer in range(config.num_layers))
    return params | {"blocks": layers}


def extend(
    config: ModelConfig, params: dict, cache: Cache, tokens: jax.Array, positions: jax.Array, column: jax.Array
) -> tuple[jax.Array, Cache]:
    """Runs C more tokens of each sequence, a chunk of a prompt or one sampled token, and adds them to the cache.

    Args:
      params: from `unstack`.
      tokens, positions: (B, C) int32; position -1 marks padding, which nothing ever sees.
      column: () int32, where the chunk goes in the cache (the same column for every sequence: rows are aligned by
        column, and their positions say how far each one is).

    Returns:
      hidden states (B, C, D) after the final norm, and the longer cache.
    """
    chex.assert_equal_shape([tokens, positions])
    query = Layout(positions)
    slots = jnp.where(positions < 0, EMPTY, positions)
    slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, slots, column, axis=1)
    shared = transformer.layer_inputs(config, query, Layout(slots))
    local = transformer.local_rotary(config, query, shared)
    x = transformer.embed(config, params, jnp.where(positions < 0, 0, tokens), jnp.maximum(positions, 0))
    keys, values = [], []
    for layer, window in enumerate(config.layer_windows):
        inputs = shared
        if window:
            mask = shared.mask & attention.within_window(query, Layout(slots), window)
            inputs = shared._replace(mask=mask, rotary=local)
        past = (cache.keys[layer], cache.values[layer], column)
        x, (k, v) = transformer.Block(config).apply({"params": params["blocks"][layer]}, x, inputs, past)
        keys.append(k)
        values.append(v)
    return transformer.final_norm(config, params, x), Cache(tuple(keys), tuple(values), slots)
