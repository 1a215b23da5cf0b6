"""Adapters: a change of low rank to projections whose weights are frozen (LoRA, Hu et al. 2021).

    y = W x + (alpha / r) (x A) B          A (inputs, r), B (r, outputs), B = 0 at the start

What trains is a tree of its own, `blocks/…/query/adapter/{a, b}` stacked over the layers, and where there is one the
scalar head; `join` lays it over the frozen base. In a joined tree b is already multiplied by alpha / r, so that every
function of a network's parameters takes a joined tree as it takes any other: a projection that finds an adapter beside
its kernel adds it. `merged` makes plain parameters of it, W + (alpha / r) A B.

A base may have an adapter already: ranks add up, [A₁ A₂] and [B₁; B₂], and the first part stays as it is.

By our own hand and not by qwix's LoRA provider: it intercepts einsum and dot_general by setting an attribute of the
Linen module that calls them, which Linen refuses of a bound one (qwix 0.1.8: SetAttributeFrozenModuleError at every
nn.Einsum); and it knows neither keys of ours for dropout nor a frozen adapter beside a trained one.

Letters: L layers, r rank; `in` and `out` stand for one or two axes each (D; N, H; F).
"""

import math
import zlib

import jax
import jax.numpy as jnp

from instructgpt_jax.models import quantised
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.sharding import path_name

TREE = "adapter"  # beside `kernel` and `bias` of a projection
PARTS = {"query": "attention", "key": "attention", "value": "attention", "out": "attention"}  # others are in `mlp`


def apply(parent, module, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """What a projection makes of x (…, in), with its adapter where the parameters of the block have one.

    Args:
      parent: the bound Linen module around it, with the ModelConfig as `config`.
      module: the projection, a Linen module with a name.
      key: of dropout in this layer, or None.
    """
    y = module(x)
    found = (parent.get_variable("params", module.name) or {}).get(TREE)
    if found is None:
        return y
    own, a, b = parent.config.adapter, found["a"].astype(y.dtype), found["b"].astype(y.dtype)
    if key is None or own is None or not own.dropout or module.name not in own.targets:
        return y + low_rank(x, a, b)
    dropped = dropout(x, own.dropout, jax.random.fold_in(key, zlib.crc32(module.name.encode())))
    frozen = a.shape[-1] - own.rank  # of the adapter that the base has, whose inputs stay
    if frozen:
        y += low_rank(x, a[..., :frozen], b[:frozen])
    return y + low_rank(dropped, a[..., frozen:], b[frozen:])


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x A) B: x (…, in), a (in, r), b (r, out) -> (…, out)."""
    return jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest to keep the mean."""
    if rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def init(config: ModelConfig, key: jax.Array) -> dict:
    """A fresh adapter of `config.adapter`, float32: a uniform in ±1/sqrt(inputs) as in PEFT, b zero.

    So it changes nothing yet. The scalar head of a network that has one is no part of it.
    """
    blocks: dict = {}
    for target, (inputs, outputs) in shapes(config).items():
        own = jax.random.fold_in(key, zlib.crc32(target.encode()))
        a = jax.random.uniform(own, (config.num_layers, *inputs, config.adapter.rank), minval=-1.0, maxval=1.0)
        b = jnp.zeros((config.num_layers, config.adapter.rank, *outputs))
        part = blocks.setdefault(PARTS.get(target, "mlp"), {})
        part[target] = {TREE: {"a": a / math.prod(inputs) ** 0.5, "b": b}}
    return {"blocks": blocks}


def shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The inputs and outputs of each projection that the adapter changes."""
    c = config
    width, heads, kv_heads = (c.width,), (c.num_heads, c.head_width), (c.num_kv_heads, c.head_width)
    known = {
        "query": (width, heads), "key": (width, kv_heads), "value": (width, kv_heads), "out": (heads, width),
        "up": (width, (c.mlp_width,)), "gate": (width, (c.mlp_width,)), "down": ((c.mlp_width,), width),
    }  # fmt: skip
    return {name: known[name] for name in c.projections if name in c.adapter.targets}


def trained_part(config: ModelConfig, params: dict, key: jax.Array) -> dict:
    """What trains on the base `params`: a fresh adapter, and the scalar head where there is one."""
    head = {"scalar_head": params["scalar_head"]} if config.head == "scalar" else {}
    return init(config, key) | head


def join(config: ModelConfig, base: dict | None, params: dict) -> dict:
    """The parameters of the whole network, for every function that takes some.

    Args:
      config: of the whole; without an adapter the result is `params`.
      base: frozen, in any dtype; perhaps with an adapter, which comes before the other, and with a scalar head, which
        gives way to the one that trains.
      params: what trains, float32, see `trained_part`.
    """
    if config.adapter is None:
        return params
    head = {name: tree for name, tree in params.items() if name != "blocks"}
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * config.adapter.scale if path_name(path).endswith("/b") else x, params["blocks"]
    )
    return base | head | {"blocks": _laid_over(base["blocks"], scaled)}


def _laid_over(base: dict, new: dict) -> dict:
    """`base` with the adapters of `new`: where it has one already, of the sum of their ranks."""
    found = dict(base)
    for name, tree in new.items():
        if name == TREE and TREE in base:
            old = base[TREE]
            a, b = (jnp.concatenate([old[x].astype(tree[x].dtype), tree[x]], axis) for x, axis in (("a", -1), ("b", 1)))
            found[name] = {"a": a, "b": b}
        elif name == TREE:
            found[name] = tree
        else:
            found[name] = _laid_over(base[name], tree)
    return found


def merged(params: dict) -> dict:
    """Plain parameters of a joined tree: every kernel W + (alpha / r) A B, added in float32, in the dtype of W.

    Of a quantised W it is float32.
    """

    def one(tree):
        if not isinstance(tree, dict):
            return tree
        if TREE not in tree:
            return {name: quantised.plain(part, "float32") if name == "kernel" else one(part)
                    for name, part in tree.items()}  # fmt: skip
        kernel, a, b = quantised.plain(tree["kernel"], "float32"), tree[TREE]["a"], tree[TREE]["b"]
        added = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1, precision="highest"))(
            a.astype(jnp.float32), b.astype(jnp.float32)
        )
        rest = {name: x for name, x in tree.items() if name != TREE}
        return rest | {"kernel": (kernel.astype(jnp.float32) + added).astype(kernel.dtype)}

    return params | {"blocks": one(params["blocks"])}


def has_adapter(params: dict) -> bool:
    """Whether a tree of parameters is a joined one."""
    return any(path_name(path).endswith(f"/{TREE}/a") for path, _ in jax.tree_util.tree_leaves_with_path(params))
