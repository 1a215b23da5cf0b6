"""The mathematics of PPO on responses, as pure functions of arrays (B, R).

B responses of at most R tokens; `mask` is 1 on the response tokens (a prefix of each row, the token that ends the
response included) and 0 after them. Nothing outside the mask reaches a result or a gradient, not even a NaN: every
input is passed through `where` before it is used. Averages over tokens come as (sum, count), so that microbatches
and devices add up to exactly the mean over all tokens.

Sources: Schulman et al. 2015 (GAE) and 2017 (PPO); Ziegler et al. 2019 and its public code
(openai/lm-human-preferences: whitening, KL rewards, value clipping, adaptive KL); Ouyang et al. 2022, eq. 2.
"""

import chex
import jax
import jax.numpy as jnp


def _inside(mask: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The mask as bool, and each array in float32 with zeros outside the mask."""
    chex.assert_equal_shape((mask, *arrays))
    mask = mask != 0
    return mask, *(jnp.where(mask, x.astype(jnp.float32), 0.0) for x in arrays)


def last_token(mask: jax.Array) -> jax.Array:
    """True at the last token of each response, (B, R) bool; an empty response has none."""
    chex.assert_rank(mask, 2)
    mask = mask != 0
    remaining = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask & (remaining == 1)


def masked_sum(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of x over the mask, and the number of its entries: float32 scalars."""
    mask, x = _inside(mask, x)
    return x.sum(), mask.sum(dtype=jnp.float32)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """mean(x) over the mask; 0 of an empty mask."""
    total, count = masked_sum(x, mask)
    return total / jnp.maximum(count, 1.0)


def masked_variance(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Population variance over the mask, mean((x - mean(x))^2), as TensorFlow's `moments`; not the sample variance."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def whiten(x: jax.Array, mask: jax.Array, keep_mean: bool = False) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-8), with mean and population variance over the whole masked batch.

    Args:
      x: (B, R).
      mask: (B, R).
      keep_mean: adds the mean back, so that only the scale changes. For rewards, whose sign carries meaning.

    Returns:
      (B, R) float32, zeros outside the mask.
    """
    mean = masked_mean(x, mask)
    mask, x = _inside(mask, (x - mean) * jax.lax.rsqrt(masked_variance(x, mask) + 1e-8))
    return jnp.where(mask, x + mean, 0.0) if keep_mean else x


def kl_estimates(
    logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per-token estimates of KL(policy || ref_policy) from tokens the policy sampled; with d = logprob - ref_logprob

        k1 = d                     unbiased, can be negative (the one in the rewards and in `objective/kl`)
        k2 = d^2 / 2               biased, low variance
        k3 = exp(-d) - 1 + d       unbiased, never negative

    The KL of an episode is the sum over its tokens. Source: Schulman, "Approximating KL divergence" (2020).

    Returns:
      (k1, k2, k3), each (B, R) float32, zeros outside the mask.
    """
    mask, logprobs, ref_logprobs = _inside(mask, logprobs, ref_logprobs)
    d = logprobs - ref_logprobs
    return d, 0.5 * jnp.square(d), jnp.expm1(-d) + d


def replace_score_without_eos(score: jax.Array, ended: jax.Array, penalty: float) -> jax.Array:
    """The score where the response ended by itself, else `penalty` in its place (-1 in Ziegler et al.): (B,)."""
    chex.assert_equal_shape((score, ended))
    return jnp.where(ended, score, penalty)


def clip_score(score: jax.Array, limit: float) -> jax.Array:
    """The score limited to [-limit, limit]: (B,). Off in the paper."""
    return jnp.clip(score, -limit, limit)


def kl_rewards(
    score: jax.Array, logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array, kl_coef: float | jax.Array
) -> jax.Array:
    """r_t = -kl_coef (logprob_t - ref_logprob_t) + [t = last token] score. Ouyang et al. eq. 2, spread over tokens.

    Args:
      score: (B,) of the reward model, bias included.
      logprobs: (B, R) of the sampled tokens under the policy that sampled them.
      ref_logprobs: (B, R) of the same tokens under the reference policy, at the same temperature.
      mask: (B, R).
      kl_coef: beta, scalar.

    Returns:
      rewards, (B, R) float32, zeros outside the mask. They are data: no gradient passes.
    """
    chex.assert_shape(score, (mask.shape[0],))
    k1, _, _ = kl_estimates(logprobs, ref_logprobs, mask)
    rewards = -kl_coef * k1 + jnp.where(last_token(mask), score[:, None].astype(jnp.float32), 0.0)
    return jax.lax.stop_gradient(rewards)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates, Schulman et al. 2015 eq. 16, in one reverse scan.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

    The state after the last response token has value 0, whether the response ended or was cut: the score is all there
    is to come.

    Args:
      rewards: (B, R), each for the token of its column.
      values: (B, R), each of the state before the token of its column.
      mask: (B, R).
      gamma: discount; the paper has none (1).
      lam: lambda of GAE.

    Returns:
      (advantages, returns), each (B, R) float32, zeros outside the mask, without gradient.

    >>> mask = jnp.ones((1, 2), jnp.int32)
    >>> advantages, returns = gae(jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]]), mask, gamma=1.0, lam=0.5)
    >>> print(advantages, returns)
    [[0.125 0.75 ]] [[0.625 1.   ]]
    """
    chex.assert_rank(mask, 2)
    mask, rewards, values = _inside(mask, rewards, values)
    deltas = rewards + gamma * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values

    def backwards(later: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = column + gamma * lam * later
        return advantage, advantage

    _, advantages = jax.lax.scan(backwards, jnp.zeros(mask.shape[0]), deltas.T, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return jax.lax.stop_gradient((advantages, advantages + values))


def policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, clip_range: float
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """sum_t max(-A_t ratio_t, -A_t clip(ratio_t, 1 - c, 1 + c)), ratio = exp(logprob - old_logprob). PPO eq. 7.

    Args:
      logprobs: (B, R) under the policy in training; the only input with a gradient.
      old_logprobs: (B, R) under the policy that sampled, at the same temperature.
      advantages: (B, R).
      mask: (B, R).
      clip_range: c.

    Returns:
      (sum, count, stats): float32 scalars. stats holds the sums `approxkl` (half the squared log-ratio, as in
      lm-human-preferences) and `clipfrac` (tokens whose clipped loss is the larger), both to be divided by count, and
      the maximum `ratio_deviation` = max |ratio - 1|.
    """
    mask, logprobs, old_logprobs, advantages = _inside(mask, logprobs, old_logprobs, advantages)
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    advantages = jax.lax.stop_gradient(advantages)
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    stats = {
        "approxkl": 0.5 * jnp.square(log_ratio).sum(),
        "clipfrac": (clipped > unclipped).sum(dtype=jnp.float32),
        "ratio_deviation": jnp.abs(ratio - 1.0).max(),
    }
    return jnp.maximum(unclipped, clipped).sum(), mask.sum(dtype=jnp.float32), jax.lax.stop_gradient(stats)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip_range_value: float
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """sum_t 1/2 max((V_t - R_t)^2, (clip(V_t, Vold_t - c, Vold_t + c) - R_t)^2). lm-human-preferences.

    Args:
      values: (B, R) of the value model in training; the only input with a gradient.
      old_values: (B, R) at the time of the rollout.
      returns: (B, R).
      mask: (B, R).
      clip_range_value: c.

    Returns:
      (sum, count, stats): float32 scalars; stats holds the sum `clipfrac`, to be divided by count.
    """
    mask, values, old_values, returns = _inside(mask, values, old_values, returns)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    unclipped = jnp.square(values - returns)
    near = jnp.clip(values, old_values - clip_range_value, old_values + clip_range_value)
    clipped = jnp.square(near - returns)
    stats = {"clipfrac": (clipped > unclipped).sum(dtype=jnp.float32)}
    return 0.5 * jnp.maximum(unclipped, clipped).sum(), mask.sum(dtype=jnp.float32), jax.lax.stop_gradient(stats)


def adapt_kl_coef(kl_coef: jax.Array, kl: jax.Array, target: float, horizon: float, episodes: int) -> jax.Array:
    """beta (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon). Ziegler et al. 2019, section 2.2.

    Args:
      kl_coef: beta of the iteration just done.
      kl: its mean KL of an episode (sum over tokens), in nats.
      target: wanted KL, in nats.
      horizon: episodes over which beta may change by a fifth.
      episodes: episodes of the iteration.

    Returns:
      beta of the next iteration. The paper keeps beta fixed at 0.02: it does not call this.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
