"""Who sees whom, rotary positions, and attention itself; all as pure functions of arrays.

Axis letters as in transformer.py; S counts keys (T of a packed row, or the length of a cache), M key/value heads.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from instructgpt_jax.models import stores
from instructgpt_jax.models.stores import Quantised, Store

FEWEST, ALIGNED = 128, 16  # columns of a cache that are read at least, and a divisor
EMPTY = 2**30  # the position of a cache slot without a token: after every query, hence never seen


class Layout(NamedTuple):
    """Where each token of some rows stands; all (B, T) int32.

    positions: within its own sequence, from 0; also what windows and rotary angles count.
    segments: which sequence of the row it belongs to; 0 = padding; None = one sequence a row.
    branches: 0 = seen by its whole segment (a shared prompt), k > 0 = seen by branch k of its segment only (one of
      several completions of that prompt), k < 2^16; None = no branches.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    branches: jax.Array | None = None


def visible(query: Layout, key: Layout) -> jax.Array:
    """(B, T, S) bool: causal by position, within a segment, on the same branch or the shared trunk."""
    mask = key.positions[:, None, :] <= query.positions[:, :, None]
    if query.segments is not None:
        mask &= (key.segments[:, None, :] == query.segments[:, :, None]) & (key.segments[:, None, :] > 0)
    if query.branches is not None:
        mask &= (key.branches[:, None, :] == 0) | (key.branches[:, None, :] == query.branches[:, :, None])
    return mask


def within_window(query: Layout, key: Layout, window: jax.Array) -> jax.Array:
    """(B, T, S) bool: fewer than `window` positions back; everything where window is 0."""
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    return (distance < window) | (window == 0)


def rotary_frequencies(width: int, theta: float, scaling: tuple[tuple[str, float | str], ...]) -> jax.Array:
    """(width/2,) float32 angles per position: theta^(-2i/width), stretched for a longer context by `scaling`.

    Su et al. 2021, eq. 15. Scaling kinds: `linear` (all angles divided by `factor`), `llama3` (Llama 3.1:
    wavelengths beyond original_max_position / low_freq_factor are divided by `factor`, those below
    original_max_position / high_freq_factor stay, and between the two the change is interpolated) and `yarn`
    (Peng et al. 2023, section 3.2: channels that turn more than beta_fast times in the original context stay, those
    that turn less than beta_slow times are divided by `factor`, and between the two the change is linear in the
    channel; with `truncate` both ends are whole channels). YaRN's other half is `rotary_scale`.
    """
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    options = dict(scaling)
    kind = options.get("kind", "none")
    if kind == "none":
        return frequencies
    if kind == "linear":
        return frequencies / options["factor"]
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        wavelengths_in_context = options["original_max_position"] * frequencies / (2 * math.pi)
        keep = jnp.clip((wavelengths_in_context - low) / (high - low), 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / options["factor"]
    if kind == "yarn":
        turning = lambda turns: (  # noqa: E731 - the channel that turns so often in the original context
            width * math.log(options["original_max_position"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )
        low, high = turning(options["beta_fast"]), turning(options["beta_slow"])
        if options["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0  # as transformers has it
        divided = jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
        return divided * frequencies / options["factor"] + (1 - divided) * frequencies
    raise ValueError(f"rotary_scaling kind must be 'linear', 'llama3' or 'yarn', got {kind!r}")


def rotary_scale(scaling: tuple[tuple[str, float | str], ...]) -> float:
    """What cos and sin are multiplied by: YaRN's attention factor (Peng et al. 2023, section 3.4), else 1."""
    return dict(scaling).get("attention_factor", 1.0)


def rotary_angles(positions: jax.Array, frequencies: jax.Array, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """cos and sin times `scale`, each (B, T, rotary_width/2) float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if scale == 1 else (scale * cos, scale * sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates the first channels of x (B, T, N, H) pairwise; the rest pass through. Computed in float32."""
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def attend(
    query: jax.Array,
    key: jax.Array | Quantised,
    value: jax.Array | Quantised,
    mask: jax.Array,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, the softmax in float32.

    Args:
      query: (B, N, T, H). Heads stand before tokens so that a cache is read in place.
      key, value: (B, M, S, H), or these in 8 bits; head n reads key/value head n // (N/M).
      mask: (B, T, S) bool, who sees whom. A query that sees nothing (padding) returns an unspecified finite value.
      scale: multiplies q·k.

    Returns:
      (B, N, T, H), in the dtype of `value`, or of `query` where that is in 8 bits.
    """
    B, N, T, H = query.shape
    # A scale is one number for a whole key or value, so that it goes beside the product, and 8-bit numbers into it: in
    # 16 bits they are exact.
    (key, key_scales), (value, value_scales) = (_taken_apart(x, query.dtype) for x in (key, value))
    M = key.shape[1]
    query = query.reshape(B, M, N // M, T, H)
    scores = jnp.einsum("bmgth,bmsh->bmgts", query, key, preferred_element_type=jnp.float32) * scale
    scores = scores if key_scales is None else scores * key_scales[:, :, None, None]
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_key is not None and dropout_rate > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
    weights = weights if value_scales is None else weights * value_scales[:, :, None, None]
    return jnp.einsum("bmgts,bmsh->bmgth", weights.astype(value.dtype), value).reshape(B, N, T, H)


def _taken_apart(x: jax.Array | Quantised, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Numbers (B, M, S, H) that go into a product, and their scales (B, M, S)."""
    return (x.numbers.astype(dtype), x.scales) if isinstance(x, Quantised) else (x, None)


def attend_to_cache(
    query: jax.Array,
    key: Store,
    value: Store,
    mask: jax.Array,
    scale: float,
    layer: jax.Array,
    start: jax.Array,
) -> jax.Array:
    """As `attend`, to some columns of one layer of a cache.

    Args:
      key, value: (B, l, M, S, H).
      mask: (B, T, n) bool, of the n columns that are read.
      layer, start: () int32; the first of these columns.
    """
    key, value = (stores.read(x, layer, start, mask.shape[2]) for x in (key, value))
    return attend(query, key, value, mask, scale)


def read_sizes(columns: int, most: int) -> tuple[int, ...]:
    """How much may be read of a cache of so many columns: all, a half, a quarter and so on, at most so many sizes.

    >>> read_sizes(200, 4), read_sizes(300, 4), read_sizes(2048, 4)
    ((200,), (160, 300), (256, 512, 1024, 2048))
    """
    sizes = [columns]
    while len(sizes) < most and sizes[0] >= 2 * FEWEST:
        sizes.insert(0, -(-sizes[0] // (2 * ALIGNED)) * ALIGNED)
    return tuple(sizes)
