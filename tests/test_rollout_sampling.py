"""What callers of `rollout.generate` and `rollout.sample` rely on, however sampling is done inside."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructgpt_jax import models, rollout
from instructgpt_jax.models import ModelConfig

CONFIG = ModelConfig(vocab_size=12, num_layers=1, width=16, num_heads=2, mlp_width=16, max_length=24)
# Larger than fresh ones, so that what is sampled depends on what stands before it.
PARAMS = jax.tree.map(lambda x: 8 * x, models.init(CONFIG, jax.random.key(0)))
B, Q, R = 4, 16, 8
LENGTHS = np.array([3, 1, 7, 5], np.int32)


@functools.partial(jax.jit, static_argnames="eos_id")
def generate(prompts, lengths, eos_id=None):
    return rollout.generate(CONFIG, PARAMS, prompts, lengths, R, 0, eos_id=eos_id)


@functools.cache
def plain():
    """Prompts, and the responses to them."""
    prompts = np.random.default_rng(0).integers(0, 12, (B, Q)).astype(np.int32)
    return prompts, jax.tree.map(np.asarray, generate(prompts, LENGTHS))


def test_a_response_goes_on_from_its_own_beginning():
    """The key of a token is of its position in the sequence: tokens that were sampled may stand in the prompt."""
    prompts, (tokens, logprobs, _) = plain()
    given = 5
    longer = prompts.copy()
    for row, n, response in zip(longer, LENGTHS, tokens, strict=True):
        row[n : n + given] = response[:given]
    rest = generate(longer, LENGTHS + given)
    np.testing.assert_array_equal(rest.tokens[:, : R - given], tokens[:, given:])
    np.testing.assert_allclose(rest.logprobs[:, : R - given], logprobs[:, given:], atol=1e-5)


def test_the_id_0_may_end_a_response():
    prompts, (tokens, *_) = plain()
    mask = np.cumsum(np.cumsum(tokens == 0, axis=1), axis=1) <= 1
    assert 1 < mask.sum(axis=1).min() < R == mask.sum(axis=1).max()
    ended = generate(prompts, LENGTHS, eos_id=0)
    np.testing.assert_array_equal(ended.mask, mask)
    np.testing.assert_array_equal(ended.tokens, np.where(mask, tokens, 0))


def test_no_two_tokens_share_their_random_numbers():
    """Draws from equal logits: neighbours in seed, iteration, episode and position, in any direction, are unrelated."""
    config = CONFIG.replace(vocab_size=500)
    zeros = jax.tree.map(jnp.zeros_like, models.init(config, jax.random.key(0)))
    prompts, lengths = np.zeros((B, 2), np.int32), np.full(B, 2)
    draw = jax.jit(lambda seed, i: rollout.generate(config, zeros, prompts, lengths, R, seed, iteration=i).tokens)
    drawn = np.stack([[draw(seed, iteration) for iteration in range(2)] for seed in range(2)])
    cut = {0: slice(None), 1: slice(1, None), -1: slice(None, -1)}
    for shift in itertools.product((0, 1, -1), repeat=4):
        if any(shift):
            left, right = (drawn[tuple(cut[sign * s] for s in shift)] for sign in (1, -1))
            assert (left == right).mean() < 0.2, shift


def test_a_sequence_may_fill_the_context():
    """All of the learned positions; rotary ones have no end."""

    def length(config, prompt):
        shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
        ids, lengths = jax.ShapeDtypeStruct((B, prompt), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)
        run = lambda params, ids, lengths: rollout.generate(config, params, ids, lengths, R, 0)  # noqa: E731
        return jax.eval_shape(run, shapes, ids, lengths).tokens.shape[1]

    assert length(CONFIG, CONFIG.max_length - R) == R
    assert length(CONFIG.replace(positions="rotary"), CONFIG.max_length) == R
    with pytest.raises(ValueError, match="context of 24, got 17 \\+ 8"):
        length(CONFIG, CONFIG.max_length - R + 1)


def test_more_than_all_tokens_are_all():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 12)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 50)
    both = jax.jit(lambda logits, keys: [rollout.sample(logits, keys, 1.0, top_k=k) for k in (0, 99)])
    jax.tree.map(np.testing.assert_array_equal, *both(logits, keys))
