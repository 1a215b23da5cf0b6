"""Step 3: PPO and PPO-ptx (Ouyang et al. 2022, section 3.5 and appendix C.4).

One iteration, `update`, is the paper's, from top to bottom:

  rollout      1. the policy answers a batch of prompts (512 episodes), sampled at temperature 1
  experience   2. the reward model scores each answer; the frozen reference gives its log-probabilities, the value
                  model its values
               3. rewards = -kl_coef · (logprobs - ref_logprobs) at each token, plus the score at the last
               4. advantages by GAE, whitened
  learn        5. for each of 8 random minibatches: the gradient of the clipped policy loss, plus ptx_coef times the
                  gradient of the pretraining loss on 8 times as many examples, in one buffer: one policy update; one
                  value update

`rollout`, `experience` and `learn` are pure functions of arrays. stages/ppo.py jits them one by one and gives them
networks and data; `update` may be jitted whole.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from instructgpt_jax import episodes as ep
from instructgpt_jax import responses, rl
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.models import ModelConfig, adapters
from instructgpt_jax.rollout import generate
from instructgpt_jax.training import supervised
from instructgpt_jax.training.state import TrainState, accumulate_gradients, apply_gradients, count_nonempty, create
from instructgpt_jax.training.supervised import language_model_loss

BASES = {"policy": "ref_policy", "value": "reward"}  # whose start a network is, and where its adapter stands
# Streams of random numbers beside those of the iterations, which sampling uses.
SHUFFLE = 2**31 - 1  # that of the minibatches
VALIDATION = 2**31 - 2  # that of answers to validation prompts: only the policy changes between evaluations


class PPOState(flax.struct.PyTreeNode):
    """What PPO trains: two networks, or adapters on them, see `whole`.

    Attributes:
      step: () int32, iterations done.
      policy: optimiser updates, parameters, moments and average of the policy.
      value: the same of the value model.
      kl_coef: () float32, beta; constant unless the adaptive controller is on.
    """

    step: jax.Array
    policy: TrainState
    value: TrainState
    kl_coef: jax.Array


class Algorithm(NamedTuple):
    """What is fixed over a run.

    config: config.ppo.
    policy, value, reward: shapes of the networks; the reference has the policy's.
    policy_tx, value_tx: optimisers.
    eos_id: the token that ends a response, or several, any of which does; None = none does.
    seed: of sampling and of the minibatches.
    wave: sequences decoded at once.
    cache: how sampling keeps keys and values, see rollout.generate.
    allowed: (V,) bool, the ids that may be sampled, see rollout.generate; None = all. Policy and reference are
      distributions over these in sampling, KL and policy loss alike; the pretraining term, as pretraining, over all.
    """

    config: ConfigDict
    policy: ModelConfig
    value: ModelConfig
    reward: ModelConfig
    policy_tx: optax.GradientTransformation
    value_tx: optax.GradientTransformation
    eos_id: int | tuple[int, ...] | None
    seed: int
    wave: int | None
    allowed: np.ndarray | None = None
    cache: str = "full"


class Experience(NamedTuple):
    """A batch of episodes ready to learn from; per-token arrays are (B, R) float32, 0 outside the response."""

    episodes: Episodes
    old_logprobs: jax.Array
    old_values: jax.Array
    advantages: jax.Array
    returns: jax.Array


Metrics = dict[str, jax.Array]


def update(ppo: Algorithm, state: PPOState, frozen: dict, batch: dict) -> tuple[PPOState, Metrics]:
    """One iteration of PPO.

    Args:
      frozen: `ref_policy` and `reward`, parameters; perhaps `policy` and `value`, see `whole`.
      batch: `prompts` (B, Q) and `prompt_lengths` (B,) int32, and with ptx_coef > 0 `pretraining`: rows of
        (N, M, b, T), one entry for each of the N minibatches.

    Returns:
      The state after one more step, and the iteration's metrics.
    """
    episodes, logprobs = rollout(ppo, state.policy.params, batch, state.step, frozen)
    prepared, metrics = experience(ppo, state, frozen, episodes, logprobs)
    return learn(ppo, state, prepared, batch.get("pretraining"), metrics, frozen)


def whole(config: ModelConfig, params: Any, frozen: dict | None, name: str) -> Any:
    """The parameters of the policy or of the value model around what trains of it, see adapters.join.

    An adapter of the policy stands on the reference, one of the value model on the reward model, in their own buffers;
    where it does not start from there, `frozen` has its base by its name.

    Args:
      name: 'policy' or 'value'.
      frozen: not read without an adapter.
    """
    if config.adapter is None:
        return params
    return adapters.join(config, frozen[name if name in frozen else BASES[name]], params)


def rollout(
    ppo: Algorithm, params: Any, batch: dict, iteration: jax.Array, frozen: dict | None = None
) -> tuple[Episodes, jax.Array]:
    """Step 1. Returns the episodes and the (B, R) log-probabilities their tokens were sampled with.

    `iteration` and the place of a prompt in the batch say which random numbers are used. `params` are what trains of
    the policy, and `frozen` has the base where that is an adapter.
    """
    params = whole(ppo.policy, params, frozen, "policy")
    prompts, lengths = batch["prompts"], batch["prompt_lengths"]
    tokens, logprobs, mask = generate(
        ppo.policy,
        params,
        prompts,
        lengths,
        ppo.config.response_length,
        ppo.seed,
        ppo.config.temperature,
        eos_id=ppo.eos_id,
        iteration=iteration,
        wave=ppo.wave,
        allowed=ppo.allowed,
        cache=ppo.cache,
    )
    return Episodes(prompts, lengths, tokens, mask), logprobs


def experience(
    ppo: Algorithm, state: PPOState, frozen: dict, episodes: Episodes, logprobs: jax.Array
) -> tuple[Experience, Metrics]:
    """Steps 2 to 4: scores, KL, rewards, values, advantages."""
    c = ppo.config
    ep.check(episodes)
    mask = episodes.response_mask
    packed = ep.pack(episodes, c.row_length, c.microbatch_rows)

    # 2. What the four networks say of the batch.
    ref_logprobs = policy_logprobs(ppo, frozen["ref_policy"], episodes, packed)
    old_logprobs = logprobs
    if not samples_are_old(ppo):
        old_logprobs = policy_logprobs(ppo, whole(ppo.policy, state.policy.params, frozen, "policy"), episodes, packed)
    value = whole(ppo.value, state.value.params, frozen, "value")
    old_values = ep.forward_episodes(lambda rows: ep.row_scalars(ppo.value, value, rows), episodes, packed)
    raw_score = ep.scores(ppo.reward, frozen["reward"], episodes, packed)

    # 3. Rewards.
    score = raw_score if not c.score_clip else rl.clip_score(raw_score, c.score_clip)
    ends = jnp.isin(episodes.responses, jnp.array(-1 if ppo.eos_id is None else ppo.eos_id))
    ended = jnp.any(ends & mask, axis=1)
    if c.missing_eos_score is not None:
        score = rl.replace_score_without_eos(score, ended, c.missing_eos_score)
    rewards = rl.kl_rewards(score, old_logprobs, ref_logprobs, mask, state.kl_coef)
    if c.whiten_rewards:
        rewards = rl.whiten(rewards, mask, keep_mean=True)

    # 4. Advantages, whitened over the batch.
    advantages, returns = rl.gae(rewards, old_values, mask, c.gamma, c.lam)
    if c.whiten_advantages == "batch":
        advantages = rl.whiten(advantages, mask)

    k1, _, k3 = rl.kl_estimates(old_logprobs, ref_logprobs, mask)
    residual = rl.masked_variance(returns - old_values, mask)
    metrics = {
        "objective/score": raw_score.mean(),
        "objective/score_std": raw_score.std(),
        "objective/kl": k1.sum(axis=1).mean(),
        "objective/kl_k3": k3.sum(axis=1).mean(),
        "objective/kl_coef": state.kl_coef,
        "objective/reward": rewards.sum(axis=1).mean(),
        "objective/logprob": rl.masked_mean(old_logprobs, mask),
        "response/length": mask.sum(axis=1).mean(),
        "response/ended": ended.mean(),
        "rollout/logprob_gap": jnp.abs(jnp.where(mask, logprobs - old_logprobs, 0.0)).max(),
        "value/mean": rl.masked_mean(old_values, mask),
        "value/explained_variance": 1.0 - residual / jnp.maximum(rl.masked_variance(returns, mask), 1e-8),
    }
    metrics |= experience_work(ppo, packed)
    return Experience(episodes, old_logprobs, old_values, advantages, returns), metrics


def learn(
    ppo: Algorithm, state: PPOState, experience: Experience, pretraining: dict | None, metrics: Metrics, frozen=None
) -> tuple[PPOState, Metrics]:
    """Step 5: `num_minibatches` updates of the policy and of the value model in each inner epoch.

    Args:
      pretraining: rows for the ptx term, leading axis one entry a minibatch; None without it.
      metrics: of the experience, handed on.
      frozen: as in `update`; only read where adapters train.
    """
    c = ppo.config
    B = experience.episodes.prompts.shape[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(ppo.seed), SHUFFLE), state.step)
    order = jnp.stack(
        [jax.random.permutation(jax.random.fold_in(key, epoch), B) for epoch in range(c.inner_epochs)]
    ).reshape(c.inner_epochs * c.num_minibatches, B // c.num_minibatches)

    def step(carry, scanned):
        policy, value = carry
        indices, rows = scanned
        minibatch = jax.tree.map(lambda x: x[indices], experience)
        if c.whiten_advantages == "minibatch":
            mask = minibatch.episodes.response_mask
            minibatch = minibatch._replace(advantages=rl.whiten(minibatch.advantages, mask))
        packed = ep.pack(minibatch.episodes, c.row_length, c.microbatch_rows)
        policy, policy_metrics = policy_step(ppo, policy, minibatch, packed, rows, frozen)
        value, value_metrics = value_step(ppo, value, minibatch, packed, frozen)
        flops = policy_metrics["perf/flops"] + value_metrics["perf/flops"]
        return (policy, value), policy_metrics | value_metrics | {"perf/flops": flops}

    (policy, value), steps = jax.lax.scan(step, (state.policy, state.value), (order, pretraining))

    summed = {name: x.sum() for name, x in steps.items() if name.startswith("perf/")}
    learning = {name: x.mean() for name, x in steps.items() if not name.startswith("perf/")}
    learning["policy/ratio_first"] = steps["policy/ratio_deviation"][0]
    learning["policy/ratio_deviation"] = steps["policy/ratio_deviation"].max()
    if samples_are_old(ppo):  # the first minibatch repeats what was sampled with the same weights, in another program
        learning["rollout/logprob_gap"] = steps["policy/logprob_deviation"][0]
    del learning["policy/logprob_deviation"]
    summed["perf/flops"] += metrics["perf/flops"]
    kl_coef = state.kl_coef
    if c.adaptive_kl.target:
        kl_coef = rl.adapt_kl_coef(kl_coef, metrics["objective/kl"], c.adaptive_kl.target, c.adaptive_kl.horizon, B)
    state = state.replace(step=state.step + 1, policy=policy, value=value, kl_coef=kl_coef)
    return state, metrics | learning | summed


def policy_step(
    ppo: Algorithm, state: TrainState, minibatch: Experience, packed: ep.Packed, pretraining: dict | None, frozen=None
) -> tuple[TrainState, Metrics]:
    """One policy update: PPO's gradient, then the pretraining gradient times ptx_coef added to it (appendix C.4)."""
    c = ppo.config
    response_mask = minibatch.episodes.response_mask
    count = jnp.maximum(response_mask.sum(dtype=jnp.float32), 1.0)

    def ppo_loss(params, rows, index):
        tree = whole(ppo.policy, params, frozen, "policy")
        by_row, entropy = ep.row_logprobs(
            ppo.policy, tree, rows, c.temperature, response_mask.size, with_entropy=True, allowed=ppo.allowed
        )
        logprobs, mask = ep.unpack(packed, by_row[None], minibatch.episodes, index)
        total, _, _ = rl.policy_loss(logprobs, minibatch.old_logprobs, minibatch.advantages, mask, c.clip_range)
        work = supervised.work(ppo.policy, rows["segments"], rows["positions"], ppo.policy.training_passes)
        return total / count, {"logprobs": logprobs, "entropy": entropy.sum(), "flops": work["flops"]}

    trips = count_nonempty(packed.segments)
    grads, sums = accumulate_gradients(ppo_loss, state.params, packed.rows, trips)
    loss, _, stats = rl.policy_loss(
        sums["logprobs"], minibatch.old_logprobs, minibatch.advantages, response_mask, c.clip_range
    )
    deviation = jnp.abs(jnp.where(response_mask, sums["logprobs"] - minibatch.old_logprobs, 0.0)).max()
    metrics = {
        "policy/loss": loss / count,
        "policy/approxkl": stats["approxkl"] / count,
        "policy/clipfrac": stats["clipfrac"] / count,
        "policy/ratio_deviation": stats["ratio_deviation"],
        "policy/logprob_deviation": deviation,
        "policy/entropy": sums["entropy"] / count,
        "perf/flops": sums["flops"],
    }
    if pretraining is not None:
        ptx_count = jnp.maximum(pretraining["loss_mask"].sum(dtype=jnp.float32), 1.0)

        def ptx_loss(params, rows, index):
            total, ptx_sums = language_model_loss(ppo.policy, whole(ppo.policy, params, frozen, "policy"), rows, None)
            return c.ptx_coef * total / ptx_count, ptx_sums

        trips = count_nonempty(pretraining["segments"])
        grads, sums = accumulate_gradients(ptx_loss, state.params, pretraining, trips, start=grads)
        metrics["ptx/loss"] = sums["loss"] / ptx_count
        metrics["perf/flops"] += sums["flops"]
    state, norms = apply_gradients(state, grads, ppo.policy_tx, c.ema_decay)
    return state, metrics | {f"policy/{name}": norm for name, norm in norms.items()}


def value_step(
    ppo: Algorithm, state: TrainState, minibatch: Experience, packed: ep.Packed, frozen=None
) -> tuple[TrainState, Metrics]:
    """One update of the value model on the clipped squared error."""
    c = ppo.config
    response_mask = minibatch.episodes.response_mask
    count = jnp.maximum(response_mask.sum(dtype=jnp.float32), 1.0)
    targets = (minibatch.old_values, minibatch.returns)

    def loss(params, rows, index):
        by_row = ep.row_scalars(ppo.value, whole(ppo.value, params, frozen, "value"), rows)
        values, mask = ep.unpack(packed, by_row[None], minibatch.episodes, index)
        total, _, _ = rl.value_loss(values, *targets, mask, c.clip_range_value)
        work = supervised.work(ppo.value, rows["segments"], rows["positions"], ppo.value.training_passes)
        return total / count, {"values": values, "flops": work["flops"]}

    grads, sums = accumulate_gradients(loss, state.params, packed.rows, count_nonempty(packed.segments))
    total, _, stats = rl.value_loss(sums["values"], *targets, response_mask, c.clip_range_value)
    state, norms = apply_gradients(state, grads, ppo.value_tx, 0.0)
    metrics = {
        "value/loss": total / count,
        "value/clipfrac": stats["clipfrac"] / count,
        "perf/flops": sums["flops"],
    }
    return state, metrics | {f"value/{name}": norm for name, norm in norms.items()}


def policy_logprobs(ppo: Algorithm, params: Any, episodes: Episodes, packed: ep.Packed) -> jax.Array:
    """(B, R) log-probabilities of the responses under a policy, at the temperature they were sampled at."""
    temperature, allowed = ppo.config.temperature, ppo.allowed
    head = functools.partial(ep.row_logprobs, ppo.policy, params, temperature=temperature, allowed=allowed)
    return ep.forward_episodes(head, episodes, packed)


def samples_are_old(ppo: Algorithm) -> bool:
    """Whether `old_logprobs` are those the tokens were sampled with, or come from the training forward pass.

    In float32 decoding and training agree to rounding, and a forward pass is saved. In bfloat16 they do not, nor where
    the products of float32 numbers are rounded (GPUs and TPUs, unless jax_default_matmul_precision says otherwise):
    PPO's ratio must be 1 before the first update, so the old log-probabilities come from the program that computes
    the new. With keys and values in 8 bits they always do.
    """
    if ppo.cache != "full":
        return False
    if ppo.config.old_logprobs == "auto":
        exact = jax.default_backend() == "cpu" or jax.config.jax_default_matmul_precision in ("float32", "highest")
        return exact and ppo.policy.dtype == "float32"
    return ppo.config.old_logprobs == "sampling"


def experience_work(ppo: Algorithm, packed: ep.Packed) -> Metrics:
    """Real tokens of the batch, and the FLOPs of sampling and scoring it."""
    forward = functools.partial(supervised.work, segments=packed.segments, positions=packed.positions, passes=1)
    policy = forward(ppo.policy)
    policy_passes = 2 if samples_are_old(ppo) else 3  # sampling and the reference; the old log-probabilities
    flops = policy_passes * policy["flops"] + forward(ppo.value)["flops"] + forward(ppo.reward)["flops"]
    return {"perf/tokens": policy["tokens"], "perf/flops": flops}


def measure(ppo: Algorithm, params: Any, frozen: dict, answers: responses.Answers) -> Metrics:
    """`score` and `kl` of B answers of the whole policy `params`, see responses.measures_of."""
    episodes, logprobs, _ = answers
    packed = ep.pack(episodes, ppo.config.row_length, ppo.config.microbatch_rows)
    if not samples_are_old(ppo):
        logprobs = policy_logprobs(ppo, params, episodes, packed)
    networks = {"ref_policy": ppo.policy, "reward": ppo.reward}
    temperature, allowed = ppo.config.temperature, ppo.allowed
    return responses.measures_of(networks, frozen, episodes, packed, logprobs, temperature, allowed)


def start(ppo: Algorithm, policy: Any, value: Any) -> PPOState:
    """The state before the first iteration, around the parameters of the policy and of the value model."""
    policy = create(policy, ppo.policy_tx, bool(ppo.config.ema_decay))
    value = create(value, ppo.value_tx, False)
    return PPOState(jnp.zeros((), jnp.int32), policy, value, jnp.float32(ppo.config.kl_coef))
