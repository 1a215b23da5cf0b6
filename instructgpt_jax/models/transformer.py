"""One decoder-only transformer for every family, as pure functions over a plain dict of parameters.

Axis letters, used throughout the project:
  B rows · T tokens of a row · S keys · Q prompt · R response · C tokens of a chunk · D width · N heads ·
  M key/value heads · H head width · E embedding width (mostly D) · F feed-forward · V vocabulary · L layers ·
  K ranked completions · P prompts

A `Block` is the one Flax module that sees the residual stream; its parameters are stacked over the layers (axis 0) and
visited by `lax.scan`, so compile time does not grow with depth and only one layer's weights are gathered at a time.
Training runs packed rows (`hidden`); sampling runs the same blocks against a key/value cache (cache.py).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from instructgpt_jax.models import adapters, attention, flash, heads, quantised, stores
from instructgpt_jax.models.adapters import dropout
from instructgpt_jax.models.attention import Layout
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.sharding import BATCH, batch_shards, constrain, path_name

INIT_STD = 0.02  # GPT-2's; positions 0.01, and projections onto the residual stream 0.02 / sqrt(2 L)
POSITIONS_INIT_STD = 0.01

ACTIVATIONS = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


SAVED = {  # by the forward pass for the backward
    "none": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, flash.saved_by_the_kernel
    ),
    "light": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("light"), flash.saved_by_the_kernel
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32; returns the configuration's dtype."""

    kind: str
    epsilon: float
    dtype: str
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = x.astype(jnp.float32)
        start = nn.initializers.constant(1 - self.offset) if self.offset else nn.initializers.ones
        scale = self.param("scale", start, (width,))
        scale = scale + self.offset if self.offset else scale
        if self.kind == "rmsnorm":
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon) * scale
        else:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon) * scale
            x = x + self.param("bias", nn.initializers.zeros, (width,))
        return x.astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention with grouped queries over a row, or over a cache that it extends."""

    config: ModelConfig

    def _project(self, name: str, x: jax.Array, heads: int, key: jax.Array | None) -> jax.Array:
        c = self.config
        shape, init = (c.width, heads, c.head_width), nn.initializers.normal(INIT_STD)
        module = nn.Einsum(shape, "btd,dnh->btnh", c.qkv_bias, dtype=c.dtype, kernel_init=init, name=name)
        return adapters.apply(self, module, x, key)

    @nn.compact
    def __call__(self, x, layer: "LayerInputs", cache=None) -> tuple[jax.Array, "tuple | None"]:
        c = self.config
        query = self._project("query", x, c.num_heads, layer.dropout_key)
        key = self._project("key", x, c.num_kv_heads, layer.dropout_key)
        value = self._project("value", x, c.num_kv_heads, layer.dropout_key)
        if c.qk_norm:
            query = Norm("rmsnorm", c.norm_eps, c.dtype, c.norm_offset, name="query_norm")(query)
            key = Norm("rmsnorm", c.norm_eps, c.dtype, c.norm_offset, name="key_norm")(key)
        if c.positions == "rotary":
            query = attention.rotate(query, *layer.rotary, c.rotary_interleaved)
            key = attention.rotate(key, *layer.rotary, c.rotary_interleaved)
        query, key, value = (y.swapaxes(1, 2) for y in (query, key, value))  # (B, heads, T, H)
        query, key, value = checkpoint_name((query, key, value), "light")
        if cache is not None:
            keys, values, index, column = cache
            write = functools.partial(stores.write, layer=index, column=column)
            cache = key, value = write(keys, key), write(values, value)
        scale = c.head_width**-0.5 if c.attention_scale is None else c.attention_scale
        drop = layer.dropout_key if layer.dropout_key is None else jax.random.fold_in(layer.dropout_key, 0)
        if layer.fused is None:
            y = attention.attend(query, key, value, layer.mask, scale, c.attention_dropout, drop)
            y = checkpoint_name(y, "light")
        else:
            y = layer.fused(query, key, value)
        y = y.swapaxes(1, 2)
        init = nn.initializers.normal(INIT_STD / (2 * c.num_layers) ** 0.5)
        shape = (c.num_heads, c.head_width, c.width)
        out = nn.Einsum(shape, "btnh,nhd->btd", c.out_bias, dtype=c.dtype, kernel_init=init, name="out")
        return adapters.apply(self, out, y, layer.dropout_key), cache


class Mlp(nn.Module):
    """The feed-forward half of a block, gated or not."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        c = self.config
        shape, x = x.shape, x.reshape(-1, c.width)  # of three axes, XLA's CPU compiler makes slow weight gradients

        def dense(x, name, width, std):
            init = nn.initializers.normal(std)
            module = nn.Dense(width, use_bias=c.mlp_bias, dtype=c.dtype, kernel_init=init, name=name)
            return adapters.apply(self, module, x, key)

        y = checkpoint_name(dense(x, "up", c.mlp_width, INIT_STD), "light")
        if c.gated_mlp:
            gate = checkpoint_name(dense(x, "gate", c.mlp_width, INIT_STD), "light")
            y = y * ACTIVATIONS[c.activation](gate)
        else:
            y = ACTIVATIONS[c.activation](y)
        return dense(y, "down", c.width, INIT_STD / (2 * c.num_layers) ** 0.5).reshape(shape)


class LayerInputs(NamedTuple):
    """What a block needs beside the residual stream and its parameters."""

    mask: jax.Array | None  # (B, T, S) bool; None where `fused` attends
    rotary: tuple[jax.Array, jax.Array] | None  # cos, sin
    dropout_key: jax.Array | None
    fused: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None  # of queries, keys and values


class Block(nn.Module):
    """One layer: attention and MLP around the residual stream x (B, T, D)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, cache=None):
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, c.dtype, c.norm_offset)
        sequential = c.residual in ("sequential", "sandwich")

        def drop(y, part):
            key = layer.dropout_key
            return y if key is None else dropout(y, c.residual_dropout, jax.random.fold_in(key, part))

        normed = x if c.residual == "post_norm" else norm(name="norm1")(x)
        with jax.named_scope("attention"):
            y, cache = Attention(c, name="attention")(normed, layer, cache)
        if c.residual == "sandwich":
            y = norm(name="norm1_after")(y)
        if sequential:
            x = x + drop(y, 1)
            normed = norm(name="norm2")(x)
        elif c.residual == "post_norm":
            x = normed = norm(name="norm1")(x + drop(y, 1))
        elif c.residual == "parallel":
            normed = norm(name="norm2")(x)
        with jax.named_scope("mlp"):
            z = Mlp(c, name="mlp")(normed, layer.dropout_key)
        if c.residual == "sandwich":
            z = norm(name="norm2_after")(z)
        if sequential:
            x = x + drop(z, 2)
        elif c.residual == "post_norm":
            x = norm(name="norm2")(x + drop(z, 2))
        else:
            x = x + drop(y, 1) + drop(z, 2)
        return constrain(x, BATCH, None, None), cache


@functools.partial(jax.jit, static_argnums=0)  # a hundred small programs otherwise, for whoever asks outside of one
def init(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters: a plain nested dict, `blocks/…` stacked over the layers.

    Weights as in GPT-2; the scalar head as in Stiennon et al. 2020: N(0, 1/(D+1)), bias 0.
    """
    c = config
    keys = jax.random.split(key, 4)
    real_row = jnp.arange(c.padded_vocab_size)[:, None] < c.vocab_size

    def vocabulary(key):
        return INIT_STD * jnp.where(real_row, jax.random.normal(key, (c.padded_vocab_size, c.embedding_width)), 0)

    def block(key):
        mesh = jax.sharding.get_abstract_mesh()
        rows = 1 if mesh.empty else batch_shards(mesh)  # any number that the mesh in use can split
        x = jnp.zeros((rows, 1, c.width))
        positions = jnp.zeros((rows, 1), jnp.int32)
        return Block(c).init(key, x, layer_inputs(c, Layout(positions), Layout(positions)))["params"]

    params = {"embed": {"tokens": vocabulary(keys[0])}}
    if c.positions == "learned":
        rows = c.max_length + c.position_offset
        params["embed"]["positions"] = POSITIONS_INIT_STD * jax.random.normal(keys[1], (rows, c.width))
    if c.embedding_width != c.width:
        into, out = jax.random.split(jax.random.fold_in(keys[0], 1))
        params["embed"]["project_in"] = INIT_STD * jax.random.normal(into, (c.embedding_width, c.width))
        params["embed"]["project_out"] = INIT_STD * jax.random.normal(out, (c.width, c.embedding_width))
    params["blocks"] = jax.vmap(block)(jax.random.split(keys[2], c.num_layers))
    if c.residual != "post_norm":
        params["final_norm"] = {"scale": jnp.full(c.width, 1 - c.norm_offset, jnp.float32)}
        if c.norm == "layernorm":
            params["final_norm"]["bias"] = jnp.zeros(c.width)
    if c.head == "scalar":
        params["scalar_head"] = heads.scalar_head(c, keys[3])
    elif not c.tied_embeddings:
        params["head"] = {"kernel": vocabulary(keys[3])}
        if c.head_bias:
            params["head"]["bias"] = jnp.zeros(c.padded_vocab_size)
    elif c.head_bias:
        params["head"] = {"bias": jnp.zeros(c.padded_vocab_size)}
    return params


def cast(params: dict, dtype: str) -> dict:
    """The parameters in the compute dtype; norms, the scalar head and the bias of the logits, which compute in float32,
    stay in it; codes and scales of quantised kernels stay as they are.

    Done once, on the sharded tree: what is gathered afterwards is already half as large.
    """
    if dtype == "float32":
        return params

    def one(path, x):
        name = path_name(path)
        kept = "norm" in name or "scalar_head" in name or name == "head/bias" or "/kernel/" in name
        return x if kept else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def hidden(
    config: ModelConfig,
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None,
    branches: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The last layer's output after the final norm, for packed rows.

    Args:
      tokens, positions, segments, branches: (B, T) int32, see attention.Layout.
      dropout_key: turns on the configuration's dropout.

    Returns:
      (B, T, D) in the compute dtype; unspecified (finite) where segments is 0. (B, T, E) where embedding_width is not
      width, as in every function that takes these states.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_equal_shape([x for x in (tokens, positions, segments, branches) if x is not None])
    params = cast(params, config.dtype)
    if segments is not None:  # whatever stands in padding, what it leads to must be finite
        tokens, positions = (jnp.where(segments > 0, x, 0) for x in (tokens, positions))
    x = embed(config, params, tokens, positions)
    if dropout_key is not None:
        x = dropout(x, config.embedding_dropout, jax.random.fold_in(dropout_key, config.num_layers))
    layout = Layout(positions, segments, branches)
    backend = flash.choose(config, layout, dropout_key is not None and config.attention_dropout > 0)
    fused = None if backend == "xla" else flash.row_attention(backend, config, layout)
    shared = layer_inputs(config, layout, layout)
    local = local_rotary(config, layout, shared)

    def layer(x, scanned):
        blocks, window, index = scanned
        inputs = shared
        if local is not shared.rotary:
            which = functools.partial(jnp.where, window > 0)
            inputs = inputs._replace(rotary=jax.tree.map(which, local, shared.rotary))
        if fused is not None:
            which = (jnp.array(flash.distinct_windows(config)) == window).argmax()
            inputs = inputs._replace(mask=None, fused=functools.partial(fused, window=which))
        elif any(config.windows):
            inputs = inputs._replace(mask=shared.mask & attention.within_window(layout, layout, window))
        if dropout_key is not None:
            inputs = inputs._replace(dropout_key=jax.random.fold_in(dropout_key, index))
        blocks = quantised.plain(blocks, config.dtype)
        return Block(config).apply({"params": blocks}, x, inputs)[0], None

    layer = jax.checkpoint(layer, policy=SAVED[config.remat], prevent_cse=False)  # a scan needs no barrier
    windows = jnp.array(config.layer_windows, jnp.int32)
    x, _ = jax.lax.scan(layer, x, (params["blocks"], windows, jnp.arange(config.num_layers)))
    return final_norm(config, params, x)


def logits(config: ModelConfig, params: dict, tokens, positions=None, segments=None) -> jax.Array:
    """(B, T, V) float32 next-token logits of whole rows: for checks, not for training (see losses.token_logprobs).

    Without positions every row is one sequence from position 0; without segments no token is padding.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return heads.project(config, params, hidden(config, params, tokens, positions, segments))


def embed(config: ModelConfig, params: dict, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """The residual stream (B, T, D) before the first layer."""
    # Tables are gathered over fsdp before they are read: a look-up by rows of the batch in a table that is cut along
    # its channels has no layout that XLA can pass on.
    x = jnp.take(constrain(params["embed"]["tokens"], "tensor", None), tokens, axis=0)
    if config.scaled_embeddings:
        x = x * jnp.asarray(config.embedding_width**0.5, x.dtype)
    if config.embedding_width != config.width:
        x = x @ params["embed"]["project_in"]
    if config.positions == "learned":
        table = constrain(params["embed"]["positions"], None, None)
        x = x + jnp.take(table, positions + config.position_offset, axis=0)
    return constrain(x.astype(config.dtype), BATCH, None, None)


def final_norm(config: ModelConfig, params: dict, x: jax.Array) -> jax.Array:
    if config.residual != "post_norm":
        norm = Norm(config.norm, config.norm_eps, config.dtype, config.norm_offset)
        x = norm.apply({"params": params["final_norm"]}, x)
    if config.embedding_width != config.width:
        x = x @ params["embed"]["project_out"]
    return x


def layer_inputs(config: ModelConfig, query: Layout, key: Layout) -> LayerInputs:
    """Mask and rotary angles, the same in every layer (but for windows, and what `local_rotary` says)."""
    rotary = None
    if config.positions == "rotary":
        frequencies = attention.rotary_frequencies(config.rotary_width, config.rotary_theta, config.rotary_scaling)
        rotary = attention.rotary_angles(query.positions, frequencies, attention.rotary_scale(config.rotary_scaling))
    return LayerInputs(attention.visible(query, key), rotary, None)


def local_rotary(config: ModelConfig, query: Layout, shared: LayerInputs) -> tuple[jax.Array, jax.Array] | None:
    """The rotary angles in layers with a window: those of the other layers, unless they have a base of their own."""
    if config.local_rotary_theta is None or config.positions != "rotary":
        return shared.rotary
    frequencies = attention.rotary_frequencies(config.rotary_width, config.local_rotary_theta, ())
    return attention.rotary_angles(query.positions, frequencies)
