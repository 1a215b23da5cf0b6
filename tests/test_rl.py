"""The mathematics of PPO: numbers worked out by hand, rlax, and plain loops.

Covered from the published implementation details of RLHF:
  score at the last response token, KL penalty at every token      test_kl_rewards_by_hand
  the same rewards with a batch of mixed lengths                    test_kl_rewards_of_mixed_lengths
  adaptive KL: proportional error clipped to 0.2, horizon           test_adapt_kl_coef_by_hand
  whitening: population variance, 1e-8 inside the root, keep-mean   test_whiten_by_hand
  GAE: V after the last token 0, returns = advantages + values      test_gae_by_hand, test_gae_equals_rlax
  returns from the advantages before whitening                      test_whitening_leaves_returns
  clipped policy loss, clipped value loss                           test_policy_loss_by_hand, test_value_loss_by_hand
  a missing end of text replaces the score                          test_score_without_eos
  padded positions contribute nothing, ratio 1 there                test_padding_never_matters
  ratio exactly 1 before the first update                           test_ratio_is_one_before_the_first_update
  KL metric k1 can be negative, k3 cannot                           test_kl_estimates_by_hand, …_are_unbiased
(log-probabilities at the sampling temperature, and the entropy: tests/test_losses.py)
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from instructgpt_jax import rl

LENGTHS = np.array([5, 1, 3, 0, 4])
B, R = len(LENGTHS), 5
MASK = jnp.asarray(np.arange(R) < LENGTHS[:, None], jnp.int32)


def normal(seed, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, R)) * scale, jnp.float32)


def rows(*values):
    return jnp.array(values, jnp.float32)


def test_last_token():
    expected = np.zeros((B, R), bool)
    for i, length in enumerate(LENGTHS):
        if length:
            expected[i, length - 1] = True
    np.testing.assert_array_equal(rl.last_token(MASK), expected)


def test_masked_mean_and_variance_by_hand():
    """1, 3, 8 have mean 4 and population variance (9 + 1 + 16) / 3, not the sample variance 13."""
    x, mask = rows([1, 3, 99], [8, 99, 99]), jnp.array([[1, 1, 0], [1, 0, 0]])
    assert rl.masked_mean(x, mask) == 4.0
    np.testing.assert_allclose(rl.masked_variance(x, mask), 26 / 3, rtol=1e-6)
    assert tuple(map(float, rl.masked_sum(x, mask))) == (12.0, 3.0)
    assert rl.masked_mean(x, mask * 0) == 0.0


def test_whiten_by_hand():
    """1, 3, 8: (x - 4) / sqrt(26 / 3); keeping the mean adds 4; equal numbers become 0; 1e-8 sits inside the root."""
    x, mask = rows([1, 3, 99], [8, 99, 99]), jnp.array([[1, 1, 0], [1, 0, 0]])
    deviation = math.sqrt(26 / 3)
    expected = np.array([[-3, -1, 0], [4, 0, 0]]) / deviation
    np.testing.assert_allclose(rl.whiten(x, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(rl.whiten(x, mask, keep_mean=True), (expected + 4) * mask, rtol=1e-6)
    small = rows([1e-4, -1e-4])  # variance 1e-8: divided by sqrt(2e-8), not by 1e-4 + 1e-8
    np.testing.assert_allclose(rl.whiten(small, jnp.ones((1, 2))), [[0.5**0.5, -(0.5**0.5)]], rtol=1e-5)
    assert not np.asarray(rl.whiten(jnp.full((2, 3), 7.0), mask)).any()


def test_kl_estimates_by_hand():
    """d = logprob - ref_logprob = ln 2 and -ln 4: k1 may be negative, k3 = e^-d - 1 + d may not."""
    k1, k2, k3 = rl.kl_estimates(jnp.log(rows([0.5, 0.1, 1])), jnp.log(rows([0.25, 0.4, 1])), jnp.array([[1, 1, 0]]))
    a, b = math.log(2), math.log(4)
    np.testing.assert_allclose(k1, [[a, -b, 0]], rtol=1e-6)
    np.testing.assert_allclose(k2, [[a * a / 2, b * b / 2, 0]], rtol=1e-6)
    np.testing.assert_allclose(k3, [[0.5 - 1 + a, 4 - 1 - b, 0]], rtol=1e-5)


def test_kl_estimates_are_unbiased():
    """Weighted by the policy's probabilities, k1 and k3 of every token give the exact KL of two distributions."""
    policy, ref = (jax.nn.log_softmax(normal(i)[:1]) for i in (0, 1))
    exact = (jnp.exp(policy) * (policy - ref)).sum()
    k1, _, k3 = rl.kl_estimates(policy, ref, jnp.ones((1, R)))
    np.testing.assert_allclose((jnp.exp(policy) * k1).sum(), exact, rtol=1e-5)
    np.testing.assert_allclose((jnp.exp(policy) * k3).sum(), exact, rtol=1e-5)
    assert (k3 >= 0).all()


def test_kl_rewards_by_hand():
    """beta 0.1, score 2, log-ratios 1, -3: rewards -0.1 and 0.3 + 2; the third token lies after the response."""
    rewards = rl.kl_rewards(rows(2)[:], rows([-1, -4, -9]), rows([-2, -1, -1]), jnp.array([[1, 1, 0]]), 0.1)
    np.testing.assert_allclose(rewards, [[-0.1, 2.3, 0]], rtol=1e-6)


def test_rewards_are_data():
    """The policy's gradient goes through the ratio alone, not through the log-probabilities in the rewards."""
    reward = lambda logprobs: rl.kl_rewards(normal(0)[:, 0], logprobs, normal(2), MASK, 0.1).sum()  # noqa: E731
    assert not np.asarray(jax.grad(reward)(normal(1))).any()


def test_kl_rewards_of_mixed_lengths():
    """Their sum over an episode is the score minus beta times the episode's KL; an empty response gets nothing."""
    score, logprobs, ref = normal(0)[:, 0], normal(1), normal(2)
    rewards = rl.kl_rewards(score, logprobs, ref, MASK, jnp.float32(0.02))
    for i, length in enumerate(LENGTHS):
        for t in range(R):
            expected = (
                -0.02 * float(logprobs[i, t] - ref[i, t]) + float(score[i]) * (t == length - 1) if t < length else 0
            )
            np.testing.assert_allclose(rewards[i, t], expected, atol=1e-6)


def test_score_without_eos():
    score, ended = rows(3, 3, -7), jnp.array([True, False, False])
    np.testing.assert_array_equal(rl.replace_score_without_eos(score, ended, -1.0), [3, -1, -1])
    np.testing.assert_array_equal(rl.clip_score(score, 5.0), [3, 3, -5])


def test_gae_by_hand():
    """gamma 0.5, lambda 0.5. The first response has two tokens: V after them is 0, whatever stands in the padding.

    delta_2 = 1 - 4 = -3; delta_1 = 2 + 0.5 * 4 - 1 = 3; A_2 = -3; A_1 = 3 + 0.25 * -3 = 2.25; returns 3.25 and 1.
    The second has one: A = 5 - 2 = 3, return 5.
    """
    rewards, values = rows([2, 1, 77], [5, 77, 77]), rows([1, 4, 55], [2, 55, 55])
    advantages, returns = rl.gae(rewards, values, jnp.array([[1, 1, 0], [1, 0, 0]]), 0.5, 0.5)
    np.testing.assert_allclose(advantages, [[2.25, -3, 0], [3, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[3.25, 1, 0], [5, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_rlax(gamma, lam):
    rewards, values = normal(0), normal(1)
    advantages, returns = rl.gae(rewards, values, MASK, gamma, lam)
    for i, length in enumerate(LENGTHS):
        if length:
            expected = rlax.truncated_generalized_advantage_estimation(
                rewards[i, :length], jnp.full(length, gamma), lam, jnp.append(values[i, :length], 0.0)
            )
            np.testing.assert_allclose(advantages[i, :length], expected, atol=1e-5)
            np.testing.assert_allclose(returns[i, :length], expected + values[i, :length], atol=1e-5)
        assert not np.asarray(advantages[i, length:]).any() and not np.asarray(returns[i, length:]).any()


def test_gae_without_discount_or_bootstrapping_is_reward_to_go():
    """gamma = lambda = 1: returns are sums of later rewards and don't depend on the values."""
    rewards, values = normal(0), normal(1)
    _, returns = rl.gae(rewards, values, MASK, 1.0, 1.0)
    to_go = np.cumsum(np.asarray(rewards * MASK)[:, ::-1], axis=1)[:, ::-1] * MASK
    np.testing.assert_allclose(returns, to_go, atol=1e-5)


def test_whitening_leaves_returns():
    """Returns stem from the advantages before they are whitened: values + returns still fit the rewards."""
    rewards, values = normal(0), normal(1)
    advantages, returns = rl.gae(rewards, values, MASK, 1.0, 0.95)
    np.testing.assert_allclose(returns, advantages + values * MASK, atol=1e-6)
    whitened = rl.whiten(advantages, MASK)
    np.testing.assert_allclose(rl.masked_mean(whitened, MASK), 0, atol=1e-6)
    np.testing.assert_allclose(rl.masked_variance(whitened, MASK), 1, rtol=1e-5)


def test_policy_loss_by_hand():
    """clip 0.2. Ratio, advantage -> loss: (1.5, 2) -> -2.4, clipped; (1.5, -2) -> 3; (0.5, 2) -> -1; (0.5, -2) -> 1.6,
    clipped; (1.1, 1) -> -1.1; and a sixth token outside the mask."""
    ratio, advantages = rows([1.5, 1.5, 0.5, 0.5, 1.1, 9]), rows([2, -2, 2, -2, 1, 1])
    old = rows([-1, -2, -3, -1, -2, -3])
    mask = jnp.array([[1, 1, 1, 1, 1, 0]])
    total, count, stats = rl.policy_loss(old + jnp.log(ratio), old, advantages, mask, 0.2)
    np.testing.assert_allclose(total, -2.4 + 3 - 1 + 1.6 - 1.1, rtol=1e-5)
    assert count == 5 and stats["clipfrac"] == 2
    squares = [math.log(r) ** 2 for r in (1.5, 1.5, 0.5, 0.5, 1.1)]
    np.testing.assert_allclose(stats["approxkl"], sum(squares) / 2, rtol=1e-5)
    np.testing.assert_allclose(stats["ratio_deviation"], 0.5, rtol=1e-5)


def test_policy_loss_and_gradient_equal_rlax():
    old, new, advantages = normal(0), normal(0) + normal(1, 0.3), normal(2)

    def mine(new):
        total, count, _ = rl.policy_loss(new, old, advantages, MASK, 0.2)
        return total / count

    def theirs(new):
        ratio, a = (
            jnp.concatenate([x[i, :n] for i, n in enumerate(LENGTHS)]) for x in (jnp.exp(new - old), advantages)
        )
        return rlax.clipped_surrogate_pg_loss(ratio, a, 0.2)

    for a, b in zip(jax.value_and_grad(mine)(new), jax.value_and_grad(theirs)(new), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_ratio_is_one_before_the_first_update():
    """The same log-probabilities: ratio exactly 1, loss minus the mean advantage, gradient minus the advantages."""
    logprobs, advantages = normal(0), normal(1)
    run = jax.value_and_grad(
        lambda x: (lambda s, c, stats: (s, stats))(*rl.policy_loss(x, logprobs, advantages, MASK, 0.2)), has_aux=True
    )
    (total, stats), gradient = run(logprobs)
    np.testing.assert_allclose(total, -(advantages * MASK).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, -advantages * MASK, rtol=1e-6)
    assert stats["ratio_deviation"] == 0 and stats["approxkl"] == 0 and stats["clipfrac"] == 0


def test_value_loss_by_hand():
    """clip 0.2. Old 2. (V, R) -> half the larger squared error: (3, 4): V clipped to 2.2, max(1, 3.24) / 2 = 1.62;
    (1, 0.5): clipped to 1.8, max(0.25, 1.69) / 2 = 0.845; (3, 2): max(1, 0.04) / 2 = 0.5; (2.1, 3): not clipped,
    0.81 / 2 = 0.405; and a fifth token outside the mask. No gradient passes where the clipped error is the larger."""
    values, returns, old = rows([3, 1, 3, 2.1, 9]), rows([4, 0.5, 2, 3, 1]), jnp.full((1, 5), 2.0)
    mask = jnp.array([[1, 1, 1, 1, 0]])
    total, count, stats = rl.value_loss(values, old, returns, mask, 0.2)
    np.testing.assert_allclose(total, 1.62 + 0.845 + 0.5 + 0.405, rtol=1e-6)
    assert count == 4 and stats["clipfrac"] == 2
    gradient = jax.grad(lambda v: rl.value_loss(v, old, returns, mask, 0.2)[0])(values)
    np.testing.assert_allclose(gradient, [[0, 0, 1, -0.9, 0]], rtol=1e-6)


def test_adapt_kl_coef_by_hand():
    """Target 6, horizon 10,000, 512 episodes. KL 6.6 is 10 % above: beta (1 + 0.1 * 0.0512). Errors are cut at 20 %."""
    adapt = functools.partial(rl.adapt_kl_coef, target=6.0, horizon=10_000.0, episodes=512)
    np.testing.assert_allclose(adapt(0.15, 6.6), 0.15 * 1.00512, rtol=1e-6)
    np.testing.assert_allclose(adapt(0.15, 600.0), 0.15 * 1.01024, rtol=1e-6)
    np.testing.assert_allclose(adapt(0.15, 0.0), 0.15 * 0.98976, rtol=1e-6)
    np.testing.assert_allclose(adapt(0.15, 6.0), 0.15, rtol=1e-6)


@pytest.mark.parametrize("garbage", [1e30, -1e4, np.inf, np.nan])
def test_padding_never_matters(garbage):
    """Whatever stands outside the mask: no number of an iteration, and no gradient, changes by a bit."""

    def iteration(logprobs, values, old_logprobs, ref_logprobs, old_values, score):
        rewards = rl.kl_rewards(score, old_logprobs, ref_logprobs, MASK, 0.02)
        advantages, returns = rl.gae(rl.whiten(rewards, MASK, keep_mean=True), old_values, MASK, 1.0, 0.95)
        policy, count, policy_stats = rl.policy_loss(logprobs, old_logprobs, rl.whiten(advantages, MASK), MASK, 0.2)
        value, _, value_stats = rl.value_loss(values, old_values, returns, MASK, 0.2)
        kl = rl.kl_estimates(logprobs, ref_logprobs, MASK)
        everything = (rewards, advantages, returns, policy_stats, value_stats, kl)
        return (policy + value) / count + sum(k.sum() for k in kl), everything

    run = jax.jit(jax.value_and_grad(iteration, argnums=(0, 1), has_aux=True))
    arrays = [normal(i, 0.5) for i in range(5)]
    dirty = [jnp.where(MASK == 0, garbage, x) for x in arrays]
    score = normal(9)[:, 0]
    expected, actual = run(*arrays, score), run(*dirty, score)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))


def test_token_means_of_microbatches_add_up():
    """(sum, count) of parts of unequal length give the loss of the whole; means of means would not."""
    new, old, advantages = normal(0, 0.3), normal(1, 0.3), normal(2)
    total, count, stats = rl.policy_loss(new, old, advantages, MASK, 0.2)
    parts = [rl.policy_loss(*(x[i] for x in (new, old, advantages, MASK)), 0.2) for i in (slice(0, 2), slice(2, 5))]
    np.testing.assert_allclose(sum(p[0] for p in parts), total, rtol=1e-5)
    assert sum(p[1] for p in parts) == count
    np.testing.assert_allclose(sum(p[2]["clipfrac"] for p in parts), stats["clipfrac"])
    np.testing.assert_allclose(sum(p[2]["approxkl"] for p in parts), stats["approxkl"], rtol=1e-5)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        rl.gae(jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.zeros((2, 3)), 1.0, 0.95)
    with pytest.raises(AssertionError):
        rl.kl_rewards(jnp.zeros((2, 1)), jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 3)), 0.1)
