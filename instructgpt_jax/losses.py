"""Losses over the vocabulary without full logits, and the ranking loss of the reward model.

A (B, T, V) float32 array is the largest thing in training, many times the rest of the model's activations, so it never
exists here: logits are formed for `chunk` tokens at a time and dropped again, in the forward pass and in the backward.

How the chunks are cut. Rows are sharded over data × fsdp. Tokens are laid out as (S, N, D): S shards of the batch, each
with the N tokens of its own rows, and chunks are cut along N. So each device works on its own tokens, no row moves, and
the chunk size bounds the memory of one device. (Chunks of the T axis would keep the batch sharded too, but their size
would hang on the rows a device holds; chunks of a flattened B × T would leave all shards but one idle.) The gradient of
the unembedding is accumulated as (S, V, D), so that each device adds up its own chunks, and is summed over S once after
the loop: one reduction a call instead of one a chunk.

Tokens of weight 0 (prompts, padding) cost nothing: each shard sorts its wanted tokens to the front, and the loop stops
after the last chunk that holds one on any shard.

Letters: B rows, T tokens of a row, D width, V vocabulary (padded), S batch shards, N tokens of a shard, c of a chunk.
"""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from instructgpt_jax.models import flash
from instructgpt_jax.sharding import BATCH, constrain


def chunk_of(vocabulary: int, kind: str) -> int:
    """Tokens of a chunk, by the vocabulary and the kind of device: those of 1 GiB of float32 logits, 512 to 8,192.

    A chunk moves 12 V D bytes, mostly the gradient of the unembedding, beside 6 c V D FLOPs: c must be many times what
    a device does in the time of a byte, 560 on a v6e. On CPUs, and TPUs before it, 512 is enough (docs/performance.md).
    """
    if kind.startswith(("cpu", "TPU v2", "TPU v3", "TPU v4", "TPU v5")):
        return 512
    return min(max(2**30 // (4 * vocabulary), 512), 8192)


class _Plan(NamedTuple):
    """How the tokens of each shard are cut into n chunks of c, the wanted ones first."""

    wanted: jax.Array  # (S, N) bool
    order: jax.Array  # (S, N') int32, the token at each place; N' = N, or the most that can be wanted
    places: jax.Array  # (S, N) int32, the place of each token: the inverse of `order`
    trips: jax.Array  # () int32, chunks that hold a wanted token on any shard
    n: int
    c: int


def _shards(rows: int) -> int:
    """How many ways the mesh in use splits the rows, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)
    if rows % shards:
        raise ValueError(f"the rows of a batch must be a multiple of its {shards} shards on the mesh, got {rows}")
    return shards


def _plan(mask: jax.Array, chunk: int, limit: int | None = None) -> _Plan:
    """Cuts the tokens of mask (B, T), those that are not 0 wanted, into chunks of at most `chunk` a shard.

    `limit` is a promise that no more are wanted in all: chunks have no room for more.
    """
    shards = _shards(mask.shape[0])
    wanted = constrain((mask != 0).reshape(shards, -1), BATCH)
    count = wanted.shape[1] if limit is None else min(wanted.shape[1], limit)
    n = -(-count // chunk)
    c = -(-count // n)  # as even as they can be
    totals = wanted.sum(axis=1, keepdims=True)
    places = jnp.where(wanted, jnp.cumsum(wanted, axis=1), totals + jnp.cumsum(~wanted, axis=1)) - 1
    trips = (totals.max() + c - 1) // c
    return _Plan(wanted, jnp.argsort(places, axis=1)[:, :count], places, trips, n, c)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x (S, N, ...) at index (S, M), each shard by itself."""
    return constrain(jax.vmap(lambda row, places: row[places])(x, index), BATCH)


def _cut(plan: _Plan, x: jax.Array) -> jax.Array:
    """(B, T, ...) -> (n, S, c, ...), zeros for tokens that are not wanted."""
    shards, count = plan.wanted.shape
    x = constrain(x.reshape(shards, count, *x.shape[2:]), BATCH)
    x = jnp.where(plan.wanted.reshape(shards, count, *(1,) * (x.ndim - 2)), x, 0)
    spare = plan.n * plan.c - plan.order.shape[1]
    x = jnp.pad(_take(x, plan.order), ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))
    return constrain(jnp.moveaxis(x.reshape(shards, plan.n, plan.c, *x.shape[2:]), 1, 0), None, BATCH)


def _restore(plan: _Plan, chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(n, S, c, ...) -> (B, T, ...), zeros for tokens that are not wanted."""
    x = jnp.moveaxis(chunks, 0, 1).reshape(plan.wanted.shape[0], -1, *chunks.shape[3:])
    x = jnp.where(plan.wanted.reshape(*plan.wanted.shape, *(1,) * (x.ndim - 2)), _take(x, plan.places), 0)
    return constrain(x.reshape(shape), BATCH)


def _gather(unembedding: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The unembedding as the loop reads it: cast, then gathered over fsdp, once for all chunks."""
    return constrain(unembedding.astype(dtype), "tensor", None)


def _logits(hidden, unembedding, bias, vocab_size, temperature):
    """(S, c, D), (V, D), (V,) or None -> (S, c, V) float32, -inf in the columns that only pad the vocabulary."""
    logits = jnp.einsum("scd,vd->scv", hidden, unembedding, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    logits = constrain(logits / temperature, BATCH, None, "tensor")
    if unembedding.shape[0] > vocab_size:
        logits = jnp.where(jnp.arange(unembedding.shape[0]) < vocab_size, logits, -jnp.inf)
    return logits


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(S, c, V) bool. A comparison, not an index: it stays local when the vocabulary is sharded."""
    return jnp.arange(logits.shape[-1]) == targets[..., None]


def _logprobs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets and the normaliser log sum exp, both (S, c) float32."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(_is_target(logits, targets), logits, 0.0).sum(axis=-1) - normaliser, normaliser


class _Gradients(NamedTuple):
    """Gradients summed chunk by chunk, all but the first in float32."""

    hidden: jax.Array  # (n, S, c, D), in the dtype of the hidden states
    unembedding: jax.Array  # (S, V, D)
    bias: jax.Array | None  # (S, V)


def _no_gradients(hidden: jax.Array, unembedding: jax.Array, bias: jax.Array | None) -> _Gradients:
    shards = hidden.shape[1]
    return _Gradients(
        hidden=jnp.zeros_like(hidden),
        unembedding=constrain(jnp.zeros((shards, *unembedding.shape), jnp.float32), BATCH, "tensor", None),
        bias=None if bias is None else constrain(jnp.zeros((shards, *bias.shape), jnp.float32), BATCH, "tensor"),
    )


def _add(gradients: _Gradients, i, logits_gradient: jax.Array, hidden: jax.Array, unembedding: jax.Array) -> _Gradients:
    """Adds what chunk i gives: d/dhidden = g U and d/dU = g' hidden, for g = d/d(hidden U) (S, c, V)."""
    g = constrain(logits_gradient.astype(hidden.dtype), BATCH, None, "tensor")
    to_hidden = jnp.einsum("scv,vd->scd", g, unembedding, preferred_element_type=jnp.float32)
    to_unembedding = jnp.einsum("scv,scd->svd", g, hidden, preferred_element_type=jnp.float32)
    return _Gradients(
        hidden=gradients.hidden.at[i].set(to_hidden.astype(hidden.dtype)),
        unembedding=constrain(gradients.unembedding + to_unembedding, BATCH, "tensor", None),
        bias=None if gradients.bias is None else gradients.bias + logits_gradient.sum(axis=1),
    )


def _finish(gradients: _Gradients, plan: _Plan, hidden: jax.Array, unembedding: jax.Array, bias: jax.Array | None):
    """The gradients in the layouts and dtypes of (hidden, unembedding, bias)."""
    to_unembedding = constrain(gradients.unembedding.sum(axis=0), "tensor", "fsdp").astype(unembedding.dtype)
    to_bias = None if bias is None else constrain(gradients.bias.sum(axis=0), "tensor").astype(bias.dtype)
    return _restore(plan, gradients.hidden, hidden.shape), to_unembedding, to_bias


def _check(hidden, unembedding, bias, targets, vocab_size):
    chex.assert_rank(targets, 2)
    chex.assert_shape(hidden, (*targets.shape, unembedding.shape[1]))
    if bias is not None:
        chex.assert_shape(bias, unembedding.shape[:1])
    if not 0 < vocab_size <= unembedding.shape[0]:
        raise ValueError(
            f"vocab_size must be in 1..{unembedding.shape[0]}, the rows of the unembedding, got {vocab_size}"
        )


# token_logprobs: the backward pass forms the logits of a chunk a second time, from the saved normaliser.


def _token_logprobs_forward(
    hidden, unembedding, bias, targets, mask, vocab_size, temperature, chunk, limit, with_entropy
):
    plan = _plan(mask, chunk, limit)
    h, y, table = _cut(plan, hidden), _cut(plan, targets), _gather(unembedding, hidden.dtype)

    def body(i, carry):
        logprobs, normalisers, entropies = carry
        logits = _logits(h[i], table, bias, vocab_size, temperature)
        logprob, normaliser = _logprobs(logits, y[i])
        if with_entropy:
            expected = jnp.where(logits > -jnp.inf, jnp.exp(logits - normaliser[..., None]) * logits, 0.0).sum(axis=-1)
            entropies = entropies.at[i].set(normaliser - expected)
        return logprobs.at[i].set(logprob), normalisers.at[i].set(normaliser), entropies

    zeros = jnp.zeros(y.shape, jnp.float32)
    start = (zeros, zeros, zeros if with_entropy else None)
    logprobs, normalisers, entropies = jax.lax.fori_loop(0, plan.trips, body, start)
    out = _restore(plan, logprobs, mask.shape), _restore(plan, entropies, mask.shape) if with_entropy else None
    return out, (hidden, unembedding, bias, targets, mask, normalisers)


def _token_logprobs_backward(vocab_size, temperature, chunk, limit, with_entropy, residuals, cotangents):
    hidden, unembedding, bias, targets, mask, normalisers = residuals
    plan = _plan(mask, chunk, limit)
    h, y, table = _cut(plan, hidden), _cut(plan, targets), _gather(unembedding, hidden.dtype)
    upstream = _cut(plan, cotangents[0] / temperature)

    def body(i, gradients):
        logits = _logits(h[i], table, bias, vocab_size, temperature)
        step = _is_target(logits, y[i]) - jnp.exp(logits - normalisers[i][..., None])
        return _add(gradients, i, step * upstream[i][..., None], h[i], table)

    gradients = jax.lax.fori_loop(0, plan.trips, body, _no_gradients(h, unembedding, bias))
    return *_finish(gradients, plan, hidden, unembedding, bias), None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _token_logprobs(*args):
    return _token_logprobs_forward(*args)[0]


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    *,
    vocab_size: int,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    limit: int | None = None,
    with_entropy: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """log softmax((hidden . unembedding + bias) / temperature)[target], for every token.

    Products run in the dtype of `hidden` and accumulate in float32; the softmax is float32. Differentiable in hidden,
    unembedding and bias; the backward pass forms each chunk of logits again.

    Args:
      hidden: (B, T, D), after the final norm: column t holds what predicts targets[:, t].
      unembedding: (V, D), V >= vocab_size; the rows past vocab_size have probability 0.
      targets: (B, T) int32.
      vocab_size: columns of the distribution.
      bias: (V,), of the logits.
      mask: (B, T), 0 = not wanted: no work is done for the token, its result is 0. All are wanted by default.
      temperature: divides the logits; > 0.
      chunk: tokens of one batch shard whose logits exist at a time; None = `chunk_of` the vocabulary.
      limit: the most tokens that the mask can hold, where that is known to be fewer than B x T: no room is made for
        more. With more than this the result is wrong.
      with_entropy: also returns the entropy of each distribution in nats, for logging: it passes no gradient.

    Returns:
      logprobs (B, T) float32, or (logprobs, entropy).
    """
    _check(hidden, unembedding, bias, targets, vocab_size)
    if mask is None:
        mask = jnp.ones(targets.shape, jnp.int32)
    chex.assert_equal_shape((targets, mask))
    chunk = chunk or chunk_of(len(unembedding), flash.device_kind())
    logprobs, entropy = _token_logprobs(
        hidden, unembedding, bias, targets, mask, vocab_size, temperature, chunk, limit, with_entropy
    )
    return (logprobs, jax.lax.stop_gradient(entropy)) if with_entropy else logprobs


# cross_entropy: the gradients are formed in the forward pass, while the logits of the chunk are there, because the
# gradient of a weighted sum is known up to one factor. Three products with the vocabulary in all, not four.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _cross_entropy(hidden, unembedding, bias, targets, weights, vocab_size, chunk):
    plan = _plan(weights, chunk)
    h, y, w, table = *(_cut(plan, x) for x in (hidden, targets, weights)), _gather(unembedding, hidden.dtype)

    def body(i, total):
        logits = _logits(h[i], table, bias, vocab_size, 1.0)
        return total - (w[i] * _logprobs(logits, y[i])[0]).sum(axis=1)

    return jax.lax.fori_loop(0, plan.trips, body, jnp.zeros(h.shape[1])).sum()


def _cross_entropy_forward(hidden, unembedding, bias, targets, weights, vocab_size, chunk):
    plan = _plan(weights, chunk)
    h, y, w, table = *(_cut(plan, x) for x in (hidden, targets, weights)), _gather(unembedding, hidden.dtype)

    def body(i, carry):
        total, gradients = carry
        logits = _logits(h[i], table, bias, vocab_size, 1.0)
        logprobs, normalisers = _logprobs(logits, y[i])
        step = jnp.exp(logits - normalisers[..., None]) - _is_target(logits, y[i])
        total = total - (w[i] * logprobs).sum(axis=1)
        return total, _add(gradients, i, step * w[i][..., None], h[i], table)

    start = (jnp.zeros(h.shape[1]), _no_gradients(h, unembedding, bias))
    total, gradients = jax.lax.fori_loop(0, plan.trips, body, start)
    return total.sum(), _finish(gradients, plan, hidden, unembedding, bias)


def _cross_entropy_backward(vocab_size, chunk, gradients, cotangent):
    return *jax.tree.map(lambda x: (x * cotangent).astype(x.dtype), gradients), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_size: int,
    bias: jax.Array | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """- sum over tokens of weight * log softmax(hidden . unembedding + bias)[target], a float32 scalar.

    Divide by the sum of the weights of the whole batch for the mean. Differentiable in hidden, unembedding and bias,
    but not in the weights. Tokens of weight 0 cost nothing.

    Args:
      hidden: (B, T, D), after the final norm: column t holds what predicts targets[:, t].
      unembedding: (V, D), V >= vocab_size; the rows past vocab_size have probability 0.
      targets: (B, T) int32.
      weights: (B, T), e.g. 1 on loss tokens.
      vocab_size: columns of the distribution.
      bias: (V,), of the logits.
      chunk: tokens of one batch shard whose logits exist at a time; None = `chunk_of` the vocabulary.
    """
    _check(hidden, unembedding, bias, targets, vocab_size)
    chex.assert_equal_shape((targets, weights))
    chunk = chunk or chunk_of(len(unembedding), flash.device_kind())
    return _cross_entropy(hidden, unembedding, bias, targets, weights.astype(jnp.float32), vocab_size, chunk)


def ranked_above(ranks: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """(P, K, K) bool, whether completion i ranks above completion j: the untied pairs of each prompt, each once.

    Args:
      ranks: (P, K) int32, 1 = best, equal = tied, 0 = no completion there.
    """
    return (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])


def ranking_loss(scores: jax.Array, ranks: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over the untied pairs of a prompt of -log sigmoid(score_better - score_worse), then over prompts.

    Ouyang et al. eq. 1. Ties are dropped, and the divisor of a prompt is the number of its untied pairs; a prompt
    without one is left out of the mean over prompts.

    Args:
      scores: (P, K) float32, the reward model's scores of K completions of each prompt.
      ranks: (P, K) int32, 1 = best, equal = tied, 0 = no completion there.

    Returns:
      (loss, aux): float32 scalar, and float32 sums from which microbatches add up: `sum` of the prompts' means,
      `prompts` with an untied pair (loss = sum / prompts), `pairs` untied, `correct` pairs whose better completion has
      the higher score.

    >>> loss, aux = ranking_loss(jnp.array([[0.0, 0.0, 9.0]]), jnp.array([[1, 2, 0]]))
    >>> print(loss, aux["pairs"], aux["correct"])
    0.6931472 1.0 0.0
    """
    chex.assert_rank([scores, ranks], 2)
    chex.assert_equal_shape((scores, ranks))
    scores = jnp.where(ranks > 0, scores.astype(jnp.float32), 0.0)
    better = ranked_above(ranks)
    margin = scores[:, :, None] - scores[:, None, :]
    pairs = better.sum(axis=(1, 2), dtype=jnp.float32)  # (P,)
    means = jnp.where(better, jax.nn.softplus(-margin), 0.0).sum(axis=(1, 2)) / jnp.maximum(pairs, 1.0)
    aux = {
        "sum": means.sum(),
        "prompts": (pairs > 0).sum(dtype=jnp.float32),
        "pairs": pairs.sum(),
        "correct": (better & (margin > 0)).sum(dtype=jnp.float32),
    }
    return aux["sum"] / jnp.maximum(aux["prompts"], 1.0), jax.lax.stop_gradient(aux)
