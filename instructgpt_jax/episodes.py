"""Episodes in packed rows: the one seam between (B, R) arrays of responses and the rows that networks read.

An episode is a prompt with its response. Episodes are packed into rows on the device, inside the jitted step, because
their lengths are only known there; everything outside this module sees (B, R) and (B,).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from instructgpt_jax import losses, models
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.sharding import BATCH, constrain


class Episodes(NamedTuple):
    """Prompts and their responses, each right-padded.

    prompts: (B, Q) int32.     prompt_lengths: (B,) int32, at least 1.
    responses: (B, R) int32.   response_mask: (B, R) bool, a prefix of each row, at least one token.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    responses: jax.Array
    response_mask: jax.Array


class Packed(NamedTuple):
    """Episodes in M microbatches of b rows of T tokens, the rows that hold tokens first.

    tokens, positions, segments: (M, b, T) int32.
    predicts: (M, b, T) int32, 1 where the next token is a response token.
    targets: (M, b, T) int32, that next token.
    row, column: (B,) int32, where each episode begins; rows count through the microbatches.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    predicts: jax.Array
    targets: jax.Array
    row: jax.Array
    column: jax.Array

    @property
    def rows(self) -> dict[str, jax.Array]:
        """The arrays with a microbatch axis."""
        return {name: getattr(self, name) for name in ("tokens", "positions", "segments", "predicts", "targets")}


def first_fit_decreasing(lengths: jax.Array, row_length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Places sequences, the longest first, each into the first row with room.

    Args:
      lengths: (B,) int32, each at most row_length.
      row_length: T.

    Returns:
      row, column, segment: each (B,) int32; segments count from 1 within a row. At most B rows are used, the first.
    """
    (B,) = lengths.shape

    def place(state, length):
        free, count = state
        row = jnp.argmax(free >= length)
        placed = (row, row_length - free[row], count[row] + 1)
        return (free.at[row].add(-length), count.at[row].add(1)), placed

    order = jnp.argsort(-lengths, stable=True)
    empty = (jnp.full(B, row_length, jnp.int32), jnp.zeros(B, jnp.int32))
    _, placed = jax.lax.scan(place, empty, lengths[order])
    back = jnp.argsort(order)
    return tuple(x[back].astype(jnp.int32) for x in placed)


def pack(episodes: Episodes, row_length: int, microbatch_rows: int) -> Packed:
    """Packs episodes into rows. There is room for the worst case, one episode a row.

    Args:
      episodes: B episodes of at most row_length tokens: Q + R must not exceed it.
      row_length: T.
      microbatch_rows: b; more than B is cut to B.
    """
    prompts, prompt_lengths, responses, mask = episodes
    (B, Q), R = prompts.shape, responses.shape[1]
    if Q + R > row_length:
        raise ValueError(f"row_length must hold a prompt and a response, {Q} + {R} tokens, got {row_length}")
    b = min(microbatch_rows, B)
    M = -(-B // b)
    lengths = prompt_lengths + mask.sum(axis=1)
    row, column, segment = first_fit_decreasing(lengths, row_length)

    offsets = jnp.arange(Q + R)[None]  # (1, Q + R), along each episode
    behind = jnp.clip(offsets - prompt_lengths[:, None], 0, R - 1)
    before = jnp.take_along_axis(prompts, jnp.minimum(offsets, Q - 1) + jnp.zeros_like(behind), axis=1)
    sequence = jnp.where(offsets < prompt_lengths[:, None], before, jnp.take_along_axis(responses, behind, axis=1))
    following = jnp.roll(sequence, -1, axis=1)
    predicts = (offsets >= prompt_lengths[:, None] - 1) & (offsets < lengths[:, None] - 1)

    # One scatter an array; what lies behind an episode's end is sent out of bounds and dropped.
    size = M * b * row_length
    index = jnp.where(offsets < lengths[:, None], (row * row_length + column)[:, None] + offsets, size)

    def lay(values):
        values = jnp.broadcast_to(values, index.shape).astype(jnp.int32)
        rows = jnp.zeros(size, jnp.int32).at[index].set(values, mode="drop", unique_indices=True)
        return constrain(rows.reshape(M, b, row_length), None, BATCH, None)

    columns = (sequence, offsets, segment[:, None], predicts, jnp.where(predicts, following, 0))
    return Packed(*map(lay, columns), row, column)


def unpack(packed: Packed, values: jax.Array, episodes: Episodes, microbatch: jax.Array | int = 0):
    """Gathers per-token results of some rows back to responses.

    Args:
      values: (m, b, T, …), one value or array a token for m microbatches, `microbatch` the first.

    Returns:
      (B, R, …) the value at the column that predicts each response token, and a (B, R) bool mask: response tokens of
      the episodes that lie in these rows. Values outside the mask are 0.
    """
    m, b, T, *rest = values.shape
    R = episodes.responses.shape[1]
    row = packed.row - microbatch * b
    here = (row >= 0) & (row < m * b)
    column = (packed.column + episodes.prompt_lengths - 1)[:, None] + jnp.arange(R)
    mask = here[:, None] & episodes.response_mask
    # Whole on every device, for rows and episodes lie on different ones: few numbers, or states of one microbatch.
    flat = constrain(values.reshape(m * b, T, *rest), None, None, *[None] * len(rest))
    gathered = flat[jnp.clip(row, 0, m * b - 1)[:, None], jnp.minimum(column, T - 1)]
    return jnp.where(mask.reshape(*mask.shape, *[1] * len(rest)), gathered, 0), mask


def forward(function: Callable[[dict], Any], packed: Packed, trip_count: jax.Array):
    """Runs `function` over the microbatches that hold tokens and stacks its results, each (b, T) to (M, b, T)."""
    shapes = jax.eval_shape(function, {name: x[0] for name, x in packed.rows.items()})
    results = jax.tree.map(lambda x: jnp.zeros((packed.tokens.shape[0], *x.shape), x.dtype), shapes)

    def one(i, results):
        microbatch = {name: jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for name, x in packed.rows.items()}
        update = lambda all, new: jax.lax.dynamic_update_index_in_dim(all, new, i, 0)  # noqa: E731
        return jax.tree.map(update, results, function(microbatch))

    return jax.lax.fori_loop(0, trip_count, one, results)


def row_logprobs(
    config: ModelConfig,
    params: dict,
    rows: dict,
    temperature: float,
    limit: int | None = None,
    with_entropy: bool = False,
    allowed: np.ndarray | None = None,
):
    """(b, T) float32: at each column that predicts a response token, the log-probability of that token; 0 elsewhere.

    `limit`, the most response tokens that there can be, keeps the others from costing a matrix product; None = any.
    `allowed` (V,) bool are the ids that could be sampled: the distribution is over these; None = all.
    """
    hidden = models.hidden(config, params, rows["tokens"], rows["positions"], rows["segments"])
    kernel, bias = models.unembedding(config, params)
    if allowed is not None:
        real = np.pad(allowed, (0, kernel.shape[0] - len(allowed)))
        bias = jnp.where(real, 0.0 if bias is None else bias, -jnp.inf)
    return losses.token_logprobs(
        hidden,
        kernel,
        rows["targets"],
        vocab_size=config.vocab_size,
        bias=bias,
        mask=rows["predicts"],
        temperature=temperature,
        limit=limit,
        with_entropy=with_entropy,
    )


def row_scalars(config: ModelConfig, params: dict, rows: dict) -> jax.Array:
    """(b, T) float32: the scalar head at every token."""
    hidden = models.hidden(config, params, rows["tokens"], rows["positions"], rows["segments"])
    return models.scalar(config, params, hidden)


def forward_episodes(head: Callable[[dict], jax.Array], episodes: Episodes, packed: Packed) -> jax.Array:
    """Packed forward pass of every episode; `head` maps rows to (b, T), the result is (B, R), 0 outside the mask.

    Column t of the result is of the state before response token t: its log-probability, or the value of that state.
    """
    values = forward(head, packed, _trips(packed))
    return unpack(packed, values, episodes)[0]


def distribution_gap(
    config: ModelConfig,
    params: dict,
    episodes: Episodes,
    row_length: int,
    temperature: float,
    allowed: np.ndarray | None,
    cache: str,
) -> jax.Array:
    """() float32: the largest total variation between the distributions of sampling and of scoring.

    max over response tokens of 1/2 sum over v of |p(v) - q(v)|: p by decoding with keys and values, one token after the
    other, q by the pass over packed rows from which a policy is trained. 0 = the same, 1 = nothing in common.

    Args:
      params: as trained.
      episodes: B, which are one microbatch of B rows.
      temperature, allowed: of both distributions, see `row_logprobs`.
      cache: of sampling, see rollout.generate.
    """
    prompts, lengths, responses, mask = episodes
    packed = pack(episodes, row_length, len(prompts))
    states = lambda rows: models.hidden(config, params, rows["tokens"], rows["positions"], rows["segments"])  # noqa: E731
    scored = forward_episodes(states, episodes, packed)  # (B, R, D)
    decoding = models.sampling_params(config, params)

    def probabilities(params, hidden):
        logits = models.project(config, params, hidden) / temperature
        return jax.nn.softmax(logits if allowed is None else jnp.where(allowed, logits, -jnp.inf))

    def each(t, hidden, largest):
        variation = jnp.abs(probabilities(decoding, hidden) - probabilities(params, scored[:, t])).sum(axis=-1) / 2
        return jnp.maximum(largest, jnp.where(mask[:, t], variation, 0.0).max())

    return models.replay(config, decoding, prompts, lengths, responses, cache, each, jnp.float32(0))


def scores(config: ModelConfig, params: dict, episodes: Episodes, packed: Packed) -> jax.Array:
    """(B,) float32: the reward model's scalar, bias included, at the last token of each episode."""
    values = forward(lambda rows: row_scalars(config, params, rows), packed, _trips(packed))
    last = packed.column + episodes.prompt_lengths + episodes.response_mask.sum(axis=1) - 1
    flat = constrain(values.reshape(-1, values.shape[-1]), None, None)
    return flat[packed.row, last]


def _trips(packed: Packed) -> jax.Array:
    """Microbatches that hold a token."""
    return jnp.max(packed.row) // packed.tokens.shape[1] + 1


def check(episodes: Episodes) -> None:
    """Asserts the shapes of episodes."""
    B = episodes.prompts.shape[0]
    chex.assert_rank(episodes.prompts, 2)
    chex.assert_shape([episodes.prompt_lengths], (B,))
    chex.assert_equal_shape([episodes.responses, episodes.response_mask])
