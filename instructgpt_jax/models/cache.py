"""Keys and values kept from token to token, so that sampling runs each token through the network once."""

import functools
import operator
from collections.abc import Callable
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

    def emptied(self) -> "Cache":
        return self._replace(positions=jnp.full_like(self.positions, EMPTY))

    def with_copies(
        self, other: "Cache", slots: jax.Array, places: jax.Array, lengths: jax.Array, column: jax.Array, chunk: int
    ) -> "Cache":
        """Sequences of another cache in slots of this one, one on each of D shards of both; whole chunks are copied.

        Args:
          other: (b', M, S', H), where each sequence ends at the last column and begins with position 0.
          slots, places: (D,) int32, where a sequence goes and comes from, counted on its shard.
          lengths: (D,) int32 in tokens; -1 = no copy on this shard.
          column: () int32, at least S'; the copies end before it.
          chunk: columns that are copied at once, divides S'.
        """
        D, S, copied = len(slots), self.positions.shape[1], lengths >= 0

        def copy(back, mine, theirs, slot, place, copied):
            """A chunk that begins `back` columns before the end."""
            (_, M, _, H), start = mine.shape, column - back
            block = jax.lax.dynamic_slice(theirs, (place[0], 0, theirs.shape[2] - back, 0), (1, M, chunk, H))
            if D > 1:
                old = jax.lax.dynamic_slice(mine, (slot[0], 0, start, 0), (1, M, chunk, H))
                block = jnp.where(copied[0], block, old)
            return jax.lax.dynamic_update_slice(mine, block, (slot[0], 0, start, 0))

        def copy_chunk(i, arrays):
            function = functools.partial(copy, (i + 1) * chunk)
            one = lambda mine, theirs: _by_shard(D, function, mine, theirs, slots, places, copied)  # noqa: E731
            return jax.tree.map(one, arrays, (other.keys, other.values))

        chunks = (jnp.max(lengths) + chunk - 1) // chunk
        keys, values = jax.lax.fori_loop(0, chunks, copy_chunk, (self.keys, self.values))
        new = jnp.arange(S) - (column - lengths)[:, None]
        new = jnp.where((new >= 0) & (new < lengths[:, None]), new, EMPTY)
        b = len(self.positions)
        rows = jnp.where(copied, slots + jnp.arange(D) * (b // D), b)
        return Cache(keys, values, self.positions.at[rows].set(new, mode="drop"))

    def rewound(self, column: jax.Array) -> "Cache":
        """The cache with its last `column` columns, () int32 above 0, at the front, and none behind them."""
        S = self.positions.shape[1]
        roll = lambda x, axis: jnp.roll(x, column - S, axis)  # noqa: E731
        # Each in a loop of its own, so that one array at a time is there twice; XLA must not know that it runs once.
        turn = lambda x: jax.lax.fori_loop(0, jnp.minimum(column, 1), lambda _, x: roll(x, 2), x)  # noqa: E731
        keys, values = jax.tree.map(turn, (self.keys, self.values))
        return Cache(keys, values, jnp.where(jnp.arange(S) < column, roll(self.positions, 1), EMPTY))

    def selected(self, kept: jax.Array) -> "Cache":
        """Only the slots (D, b/D) int32, counted on each of D shards."""
        take = lambda x: _by_shard(len(kept), lambda x, kept: x[kept], x, kept.ravel())  # noqa: E731
        return jax.tree.map(take, self)


def _by_shard(D: int, function: Callable, *arrays: jax.Array) -> jax.Array:
    """function of each shard's part of arrays that D shards split along axis 0: it stays where it is."""
    if D == 1:
        return function(*arrays)
    result = jax.vmap(function)(*(x.reshape(D, -1, *x.shape[1:]) for x in arrays))
    return result.reshape(-1, *result.shape[2:])


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
    config: ModelConfig,
    params: dict,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    column: jax.Array,
    longest: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs C more tokens of each sequence, a chunk of a prompt or one sampled token, and adds them to the cache.

    Args:
      params: from `unstack`.
      tokens, positions: (B, C) int32; position -1 marks padding, which nothing ever sees.
      column: () int32, where the chunk goes in the cache (the same column for every sequence: rows are aligned by
        column, and their positions say how far each one is).
      longest: () int32, how many columns up to the last of the chunk can hold tokens; no others are read (see
        attention.attend_last). None = all.

    Returns:
      hidden states (B, C, D) after the final norm, and the longer cache.
    """
    chex.assert_equal_shape([tokens, positions])
    query, end = Layout(positions), column + tokens.shape[1]
    slots = jnp.where(positions < 0, EMPTY, positions)
    slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, slots, column, axis=1)
    shared = transformer.layer_inputs(config, query, Layout(slots))
    local = transformer.local_rotary(config, query, shared)
    x = transformer.embed(config, params, jnp.where(positions < 0, 0, tokens), jnp.maximum(positions, 0))
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    keys, values = [], []
    for layer, window in enumerate(config.layer_windows):
        inputs = shared
        if window:
            mask = shared.mask & attention.within_window(query, Layout(slots), window)
            inputs = shared._replace(mask=mask, rotary=local)
        if longest is not None:
            read = functools.partial(attention.attend_last, mask=inputs.mask, scale=scale, end=end, longest=longest)
            inputs = inputs._replace(mask=None, fused=read)
        past = (cache.keys[layer], cache.values[layer], column)
        x, (k, v) = transformer.Block(config).apply({"params": params["blocks"][layer]}, x, inputs, past)
        keys.append(k)
        values.append(v)
    return transformer.final_norm(config, params, x), Cache(tuple(keys), tuple(values), slots)
