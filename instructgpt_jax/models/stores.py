"""Keys and values of a cache as they are computed, or in 8 bits with a scale for each token and head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KINDS = ("full", "int8")  # of config.rollout.cache
LARGEST = 127


class Quantised(NamedTuple):
    """x ≈ numbers · scales.

    numbers: (…, S, H) int8 in -127 … 127.
    scales: (…, S) float32, the largest |x| of a head of a token divided by 127; 0 where all of it is 0.
    """

    numbers: jax.Array
    scales: jax.Array


Store = jax.Array | Quantised  # (B, l, M, S, H) of keys or of values


def empty(kind: str, shape: tuple[int, ...], dtype: str) -> Store:
    """Zeros.

    Args:
      kind: one of KINDS.
      dtype: of `full`.

    Raises:
      ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"rollout.cache must be one of {KINDS}, got {kind!r}")
    if kind == "full":
        return jnp.zeros(shape, dtype)
    return Quantised(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))


def quantise(x: jax.Array) -> Quantised:
    """x (…, S, H) in 8 bits: the error of a number is at most half a scale."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    numbers = jnp.round(x / jnp.where(scales > 0, scales, 1.0)[..., None])
    return Quantised(jnp.clip(numbers, -LARGEST, LARGEST).astype(jnp.int8), scales)


def write(store: Store, x: jax.Array, layer: jax.Array, column: jax.Array) -> Store:
    """The store (B, l, M, S, H) with x (B, M, C, H) in columns of one layer, `column` the first."""
    new = quantise(x) if isinstance(store, Quantised) else x.astype(store.dtype)
    start = (0, layer, 0, column, 0)
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new[:, None], start[: old.ndim])  # noqa: E731
    return jax.tree.map(put, store, new)


def read(store: Store, layer: jax.Array, start: jax.Array, count: int) -> Store:
    """Some columns of one layer of a store: (B, M, count, H), and their scales (B, M, count)."""

    def cut(x):
        sizes = (x.shape[0], 1, x.shape[2], count, *x.shape[4:])
        return jax.lax.dynamic_slice(x, (0, layer, 0, start, 0)[: x.ndim], sizes)[:, 0]

    return jax.tree.map(cut, store)
