"""A token of each row of logits: at a temperature, of the likeliest alone, or greedily."""

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens of the vocabulary drawn together in the first round


def sample(logits: jax.Array, keys: jax.Array, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """Draws a token a row.

    Args:
      logits: (B, V) float32.
      keys: (B,) random keys.
      temperature, top_k, top_p: see rollout.generate.

    Returns:
      tokens (B,) int32 and their log-probabilities (B,) float32 (see rollout.Rollout).
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
