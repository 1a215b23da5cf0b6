"""Sampling: a prompt goes in by chunks, the response comes out token by token, all in one program.

Responses are sampled from the full softmax at a temperature unless told otherwise, and the log-probability of each
sampled token is kept: for PPO these are `old_logprobs`. The key of a token is (seed, iteration, episode, position) and
nothing else, so that a response does not depend on the slot, wave or mesh that computed it.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from instructgpt_jax import models
from instructgpt_jax.models import Cache, ModelConfig
from instructgpt_jax.sharding import BATCH, ROLLOUT_RULES, constrain, constrain_params

PREFILL_CHUNK = 128  # columns of a prompt that go through the network at once
BLOCK = 128  # tokens of the vocabulary drawn together in the first round of sampling


class Rollout(NamedTuple):
    """Sampled responses, right-padded.

    tokens: (B, R) int32, 0 after the end.
    logprobs: (B, R) float32, of each token under the full distribution at the sampling temperature (at 1 when greedy),
      even where top-k or top-p narrowed the choice; 0 after the end.
    mask: (B, R) bool, True up to the end, the end-of-text token included.
    """

    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array


class Sampling(NamedTuple):
    """The state of the decoding loop for one wave of b sequences.

    length: () int32, response tokens sampled so far.
    cache: keys and values of everything but the last sampled token.
    rollout: the responses so far.
    done: (b,) bool, has ended.
    """

    length: jax.Array
    cache: Cache
    rollout: Rollout
    done: jax.Array


def generate(
    config: ModelConfig,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    max_new_tokens: int,
    seed: int | jax.Array,
    temperature: float = 1.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | tuple[int, ...] | None = None,
    iteration: int | jax.Array = 0,
    episodes: jax.Array | None = None,
    wave: int | None = None,
    allowed: np.ndarray | None = None,
) -> Rollout:
    """Samples a response to each prompt.

    Args:
      config, params: a language model, its parameters as trained (stacked, float32).
      prompts: (B, Q) int32, right-padded with anything.
      lengths: (B,) int32 in [1, Q].
      max_new_tokens: R.
      seed, iteration: with the episode and the position, the key of every token; ints, or () arrays.
      temperature: divides the logits; 0 = greedy.
      top_k: sample among the k likeliest tokens; 0 = all.
      top_p: sample among the likeliest tokens that together hold this much probability; 1 = all.
      eos_id: the token that ends a response, or several, any of which does; None = every response has R tokens.
      episodes: (B,) int32, the identity of each prompt for its keys; 0 … B-1 by default.
      wave: how many sequences are decoded at once, the rest waiting: bounds the cache. Waves take the prompts in order
        of length, so that a short one neither pays for a long one's prompt nor waits for it. None = all at once.
      allowed: (V,) bool, the ids that may be sampled, for a vocabulary with ids that no token has: the distribution,
        log-probabilities included, is over these alone. None = all.

    Raises:
      ValueError: an empty range, a context too short, or a wave that does not divide B.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    if allowed is not None:
        chex.assert_shape(allowed, (config.vocab_size,))
    B, Q = prompts.shape
    wave = B if wave is None else wave
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if wave < 1 or B % wave:
        raise ValueError(f"rollout.wave must divide the number of prompts, {B}, got {wave}")
    if config.positions == "learned" and Q + max_new_tokens > config.max_length:
        raise ValueError(
            f"prompt and response must fit the context of {config.max_length}, got {Q} + {max_new_tokens} tokens"
        )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "temperature, top_k and top_p must be at least 0, at least 0 and in (0, 1], "
            f"got {temperature}, {top_k} and {top_p}"
        )
    key = jax.random.fold_in(jax.random.key(seed), iteration)
    episodes = jnp.arange(B) if episodes is None else episodes
    params = models.unstack(config, constrain_params(models.cast(params, config.dtype), ROLLOUT_RULES))

    def choose(logits, episodes, positions):
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        keys = jax.vmap(lambda episode, position: jax.random.fold_in(jax.random.fold_in(key, episode), position))
        return sample(logits, keys(episodes, positions), temperature, top_k, top_p)

    def run_wave(arguments):
        prompts, lengths, episodes = arguments
        return _run_wave(config, params, prompts, lengths, episodes, max_new_tokens, eos_id, choose)

    if wave == B:
        return run_wave((prompts, lengths, episodes))
    # Prompts change devices here and responses change back: few numbers, so every device holds them all in between.
    whole = lambda x: constrain(x, *[None] * x.ndim)  # noqa: E731
    order = jnp.argsort(whole(lengths), stable=True)
    waves = jax.tree.map(lambda x: whole(x)[order].reshape(-1, wave, *x.shape[1:]), (prompts, lengths, episodes))
    rollout = jax.lax.map(run_wave, waves)
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: whole(x).reshape(B, -1)[back], rollout)


def sample(logits: jax.Array, keys: jax.Array, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """Draws a token a row.

    Args:
      logits: (B, V) float32.
      keys: (B,) random keys.
      temperature, top_k, top_p: see generate.

    Returns:
      tokens (B,) int32 and their log-probabilities (B,) float32 (see Rollout).
    """
    logits = logits / (temperature or 1.0)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = jax.vmap(_draw)(_truncate(logits, top_k, top_p), keys)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    """A token () of softmax(logits (V,)), by the Gumbel-max trick: argmax(log p + g), g ~ Gumbel(0, 1).

    In two rounds, first a block of tokens by its total probability and then a token of the block: the same distribution
    from V / 128 + 128 random numbers, where V of them cost as much as the product that made the logits. A rounding
    error in a logit changes the draw with a probability of that size, whatever V is (of an inverted cumulative sum,
    the errors of all tokens before it would add up).
    """
    blocks = jnp.pad(logits, (0, -logits.size % BLOCK), constant_values=-jnp.inf).reshape(-1, BLOCK)
    noise = jax.random.gumbel(key, (blocks.shape[0] + BLOCK,))
    block = jnp.argmax(jax.nn.logsumexp(blocks, axis=-1) + noise[:-BLOCK])
    return block * BLOCK + jnp.argmax(blocks[block] + noise[-BLOCK:])


def _truncate(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """-inf outside the top-k tokens and outside the fewest likeliest tokens whose probabilities reach top_p."""
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)  # at least the likeliest: nothing stands before it
        logits = jnp.where(logits >= jnp.take_along_axis(descending, kept - 1, axis=-1), logits, -jnp.inf)
    return logits


def _prefill(config: ModelConfig, params: dict, cache: Cache, prompts: jax.Array, lengths: jax.Array):
    """Runs the prompts (b, Q) into the cache by chunks, as many as the longest prompt needs.

    Returns:
      hidden state (b, D) of each prompt's last token, the cache, and the first free column.
    """
    b, Q = prompts.shape
    C = min(Q, PREFILL_CHUNK)
    prompts = jnp.pad(prompts, ((0, 0), (0, -Q % C)))

    def chunk(i, carry):
        last, cache = carry
        tokens = jax.lax.dynamic_slice_in_dim(prompts, i * C, C, axis=1)
        columns = jnp.broadcast_to(i * C + jnp.arange(C), (b, C))
        hidden, cache = models.extend(
            config, params, cache, tokens, jnp.where(columns < lengths[:, None], columns, -1), i * C
        )
        ends = lengths - 1 - i * C
        here = jnp.take_along_axis(hidden, jnp.clip(ends, 0, C - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((ends >= 0) & (ends < C))[:, None], here, last), cache

    chunks = (jnp.max(lengths) + C - 1) // C
    empty = jnp.zeros((b, config.embedding_width), config.dtype)
    last, cache = jax.lax.fori_loop(0, chunks, chunk, (empty, cache))
    return last, cache, chunks * C


def _run_wave(config, params, prompts, lengths, episodes, max_new_tokens, eos_id, choose) -> Rollout:
    """Prefills and decodes one wave of b prompts, until all have ended or have R tokens."""
    b, Q = prompts.shape
    prompts = constrain(prompts, BATCH, None)
    room = Q + -Q % min(Q, PREFILL_CHUNK)
    cache = models.init_cache(config, b, room + max_new_tokens)
    hidden, cache, start = _prefill(config, params, cache, prompts, lengths)

    def step(hidden, length, rollout, done):
        """Chooses response token number `length` from the hidden states before it."""
        tokens, logprobs = choose(models.project(config, params, hidden), episodes, lengths + length)
        put = lambda array, column: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            array, jnp.where(done, 0, column).astype(array.dtype)[:, None], length, axis=1
        )
        rollout = Rollout(put(rollout.tokens, tokens), put(rollout.logprobs, logprobs), put(rollout.mask, ~done))
        return rollout, done if eos_id is None else done | jnp.isin(tokens, jnp.array(eos_id))

    def more(state: Sampling):
        return (state.length < max_new_tokens) & ~jnp.all(state.done)

    def decode(state: Sampling):
        t = state.length - 1  # the last sampled token: the cache does not hold it yet
        tokens = jax.lax.dynamic_slice_in_dim(state.rollout.tokens, t, 1, axis=1)
        hidden, cache = models.extend(config, params, state.cache, tokens, (lengths + t)[:, None], start + t)
        rollout, done = step(hidden[:, 0], state.length, state.rollout, state.done)
        return Sampling(state.length + 1, cache, rollout, done)

    shape = (b, max_new_tokens)
    empty = Rollout(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))
    rollout, done = step(hidden, jnp.int32(0), empty, jnp.zeros(b, bool))
    return jax.lax.while_loop(more, decode, Sampling(jnp.int32(1), cache, rollout, done)).rollout
