"""Keys and values kept from token to token, so that sampling runs each token through the network once."""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout
from jax.sharding import PartitionSpec as P

from instructgpt_jax.models import adapters, attention, flash, quantised, stores, transformer
from instructgpt_jax.models.attention import EMPTY, Layout
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.models.stores import Store
from instructgpt_jax.sharding import BATCH, ROLLOUT_RULES, constrain, constrain_params

CHUNK = 64  # columns of a prompt that `replay` runs at once

SHARDING = P(BATCH, None, "tensor", None, None)  # of keys and values


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one slot a sequence.

    keys, values: a tuple over the groups of layers (see `unstack`), each (B, l, M, S, H), as computed or in 8 bits.
    positions: (B, S) int32, the position of each slot's column; EMPTY where it holds no token.
    """

    keys: tuple[Store, ...]
    values: tuple[Store, ...]
    positions: jax.Array

    def emptied(self) -> "Cache":
        return self._replace(positions=jnp.full_like(self.positions, EMPTY))

    def with_copies(
        self, other: "Cache", slots: jax.Array, places: jax.Array, lengths: jax.Array, column: jax.Array, chunk: int
    ) -> "Cache":
        """Sequences of another cache in slots of this one, one on each of D shards of both; whole chunks are copied.

        Args:
          other: (b', l, M, S', H), where each sequence ends at the last column and begins with position 0.
          slots, places: (D,) int32, where a sequence goes and comes from, counted on its shard.
          lengths: (D,) int32 in tokens; -1 = no copy on this shard.
          column: () int32, at least S'; the copies end before it.
          chunk: columns that are copied at once, divides S'.
        """
        D, S, copied = len(slots), self.positions.shape[1], lengths >= 0

        def copy(back, mine, theirs, slot, place, copied):
            """A chunk that begins `back` columns before the end; of scales, which have no H, too."""
            (_, l, M, _, *H), start = mine.shape, column - back
            at = lambda sequence, first: (sequence[0], 0, 0, first, *[0] * len(H))  # noqa: E731
            block = jax.lax.dynamic_slice(theirs, at(place, theirs.shape[3] - back), (1, l, M, chunk, *H))
            if D > 1:
                old = jax.lax.dynamic_slice(mine, at(slot, start), (1, l, M, chunk, *H))
                block = jnp.where(copied[0], block, old)
            return jax.lax.dynamic_update_slice(mine, block, at(slot, start))

        def copy_chunk(i, arrays):
            function = functools.partial(copy, (i + 1) * chunk)
            one = lambda mine, theirs: _laid(_by_shard(D, function, mine, theirs, slots, places, copied))  # noqa: E731
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

        def turn(x):  # layer by layer, so that one is there twice; XLA must not know how often this runs
            def one(layer, x):
                cut = jax.lax.dynamic_slice_in_dim(x, layer, 1, axis=1)
                return _laid(jax.lax.dynamic_update_slice_in_dim(x, roll(cut, 3), layer, axis=1))

            return jax.lax.fori_loop(0, jnp.minimum(column, 1) * x.shape[1], one, x)

        keys, values = jax.tree.map(turn, (self.keys, self.values))
        return Cache(keys, values, jnp.where(jnp.arange(S) < column, roll(self.positions, 1), EMPTY))

    def selected(self, kept: jax.Array) -> "Cache":
        """Only the slots (D, b/D) int32, counted on each of D shards."""
        D, n = kept.shape
        rows = lambda x: _by_shard(D, lambda x, kept: x[kept], x, kept.ravel())  # noqa: E731

        def take(x):  # layer by layer: of what is gathered at once a TPU's compiler makes a copy first

            def one(layer, taken):
                cut = rows(jax.lax.dynamic_slice_in_dim(x, layer, 1, axis=1))
                return _laid(jax.lax.dynamic_update_slice_in_dim(taken, cut, layer, axis=1))

            return jax.lax.fori_loop(0, x.shape[1], one, _split(jnp.zeros((D * n, *x.shape[1:]), x.dtype)))

        keys, values = jax.tree.map(take, (self.keys, self.values))
        return Cache(keys, values, rows(self.positions))


def _laid(x):
    """The array (B, l, M, S, H) of a cache, on a TPU in the memory order that its decode loop has.

    Left alone the compiler lays out the loops that copy sequences by the order of the axes, and copies the whole cache
    before and after each of them. B goes to the lanes where H does not fill them.
    """
    if flash.platform() != "tpu" or x.ndim < 5:  # scales are small
        return x
    order = (1, 3, 2, 0, 4) if x.shape[-1] % 128 == 0 else (1, 3, 2, 4, 0)
    lay = functools.partial(layout.with_layout_constraint, layouts=layout.Layout(order))
    if jax.sharding.get_abstract_mesh().empty:
        return lay(x)
    return jax.shard_map(lay, in_specs=SHARDING, out_specs=SHARDING, check_vma=False)(x)  # else it is gathered first


def _by_shard(D: int, function: Callable, *arrays: jax.Array) -> jax.Array:
    """function of each shard's part of arrays that D shards split along axis 0: it stays where it is."""
    if D == 1:
        return function(*arrays)
    result = jax.vmap(function)(*(x.reshape(D, -1, *x.shape[1:]) for x in arrays))
    return result.reshape(-1, *result.shape[2:])


def replay(
    config: ModelConfig,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    responses: jax.Array,
    kind: str,
    each: Callable[[jax.Array, jax.Array, Any], Any],
    carry: Any,
) -> Any:
    """Goes through responses that are known as sampling does: prompts by chunks, then a token at a time.

    Args:
      params: from `sampling_params`.
      prompts, lengths: (B, Q) and (B,) int32.
      responses: (B, R) int32.
      kind: of the cache, see `init_cache`.
      each: (t, hidden states (B, D) of which response token t is drawn, carry) -> carry.
      carry: the first.

    Returns:
      The last carry.
    """
    (B, Q), R, C = prompts.shape, responses.shape[1], min(CHUNK, prompts.shape[1])
    width = -(-max(Q - 1, 1) // C) * C  # prompts end here, without their last token
    whole = lambda x: constrain(x, BATCH, None)  # noqa: E731

    def chunk(i, cache):
        positions = jnp.maximum(i * C + jnp.arange(C) - width + lengths[:, None] - 1, -1)
        tokens = jnp.take_along_axis(prompts, jnp.maximum(positions, 0), axis=1)
        return extend(config, params, cache, whole(tokens), whole(positions), i * C)[1]

    cache = jax.lax.fori_loop(0, width // C, chunk, init_cache(config, B, width + R, kind))
    given = jnp.concatenate([jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1), responses[:, :-1]], axis=1)

    def step(t, state):
        carry, cache = state
        tokens = jax.lax.dynamic_slice_in_dim(given, t, 1, axis=1)
        y, cache = extend(config, params, cache, whole(tokens), whole(lengths[:, None] - 1 + t), width + t)
        return each(t, y[:, 0], carry), cache

    return jax.lax.fori_loop(0, R, step, (carry, cache))[0]


def init_cache(config: ModelConfig, batch: int, length: int, kind: str = "full") -> Cache:
    """An empty cache for `batch` sequences of at most `length` tokens; `kind` is one of stores.KINDS."""
    shape = (config.num_kv_heads, length, config.head_width)
    empty = tuple(
        jax.tree.map(_split, stores.empty(kind, (batch, layers, *shape), config.dtype)) for layers in _groups(config)
    )
    return Cache(empty, empty, constrain(jnp.full((batch, length), EMPTY, jnp.int32), BATCH, None))


def _split(x: jax.Array) -> jax.Array:
    """Keys, values or scales (B, l, M, S, …) of a cache, over the mesh."""
    return constrain(x, *SHARDING[: x.ndim])


def sampling_params(config: ModelConfig, params: dict) -> dict:
    """Parameters as they are trained, brought into the form and the layout in which sampling reads them."""
    if config.dtype == "float32" and adapters.has_adapter(params) and not quantised.found(params):
        # Once for all tokens. In bfloat16 the sum would round to the base wherever the change is below 1/256 of it:
        # there the adapter stays beside its kernel. And the sum of a quantised kernel would take its full memory.
        params = adapters.merged(params)
    return unstack(config, constrain_params(transformer.cast(params, config.dtype), ROLLOUT_RULES))


def unstack(config: ModelConfig, params: dict) -> dict:
    """Parameters in the compute dtype with a tuple of groups of layers in place of the blocks, ready for `extend`.

    A group is a stack that is scanned. On a TPU all layers are one, so that compile time does not grow with depth: its
    compiler fuses the slice of a weight into the product that reads it. Elsewhere each layer is its own: sampling reads
    each weight once a token, and compilers for GPUs and CPUs copy the slice out first (three times the traffic).
    """
    params = transformer.cast(params, config.dtype)
    bounds = np.cumsum((0, *_groups(config)))
    groups = (jax.tree.map(operator.itemgetter(slice(*pair)), params["blocks"]) for pair in itertools.pairwise(bounds))
    return params | {"blocks": tuple(groups)}


def _groups(config: ModelConfig) -> tuple[int, ...]:
    """How many layers each group has."""
    return (config.num_layers,) if flash.platform() == "tpu" else (1,) * config.num_layers


def extend(
    config: ModelConfig,
    params: dict,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    column: jax.Array,
    read: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs C more tokens of each sequence, a chunk of a prompt or one sampled token, and adds them to the cache.

    Args:
      params: from `unstack`.
      tokens, positions: (B, C) int32; position -1 marks padding, which nothing ever sees.
      column: () int32, where the chunk goes in the cache (the same column for every sequence: rows are aligned by
        column, and their positions say how far each one is).
      read: how many columns up to the last of the chunk can hold tokens: no others are read. None = all.

    Returns:
      hidden states (B, C, D) after the final norm, and the longer cache.
    """
    chex.assert_equal_shape([tokens, positions])
    slots = jnp.where(positions < 0, EMPTY, positions)
    slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, slots, column, axis=1)
    read = slots.shape[1] if read is None else read
    start = jnp.maximum(column + tokens.shape[1] - read, 0)
    query, key = Layout(positions), Layout(jax.lax.dynamic_slice_in_dim(slots, start, read, axis=1))
    shared = transformer.layer_inputs(config, query, key)
    local = transformer.local_rotary(config, query, shared)
    x = transformer.embed(config, params, jnp.where(positions < 0, 0, tokens), jnp.maximum(positions, 0))
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale

    def layer(carry, scanned):
        x, keys, values = carry
        block, window, index = scanned
        mask, rotary = shared.mask, shared.rotary
        if any(config.windows):
            mask &= attention.within_window(query, key, window)
        if local is not rotary:
            rotary = jax.tree.map(functools.partial(jnp.where, window > 0), local, rotary)
        attend = functools.partial(attention.attend_to_cache, mask=mask, scale=scale, layer=index, start=start)
        inputs = shared._replace(mask=None, rotary=rotary, fused=attend)
        block = quantised.plain(block, config.dtype, after=x)
        x, past = transformer.Block(config).apply({"params": block}, x, inputs, (keys, values, index, column))
        return (x, *past), None

    groups, first = [], 0
    for blocks, keys, values in zip(params["blocks"], cache.keys, cache.values, strict=True):
        count = jax.tree.leaves(keys)[0].shape[1]
        windows = jnp.array(config.layer_windows[first : first + count], jnp.int32)
        (x, *past), _ = jax.lax.scan(layer, (x, keys, values), (blocks, windows, jnp.arange(count)))
        groups, first = [*groups, past], first + count
    keys, values = zip(*groups, strict=True)
    return transformer.final_norm(config, params, x), Cache(keys, values, slots)
