"""One iteration of PPO against plain Python, and what must hold in every iteration.

The published implementation details of RLHF, and where each is tested:
  policy and value read prompt + response as one sequence        test_iteration_equals_plain_python
  padding is not EOS; what padding holds never matters           test_episodes.py, test_tokenizer.py
  position ids count from 0 in each episode                      test_episodes.py: test_rows_hold_every_token_once
  the full distribution is sampled, EOS ends a response          test_rollout.py; here test_samples_are_the_policys
  score at the last token                                        test_episodes.py: test_packed_equals_one_by_one
  one temperature in rollout, reference and update               test_iteration_equals_plain_python[temperature]
  KL at every token, score at the last; adaptive KL              test_rl.py; here [every option]
  GAE, returns from advantages before whitening, clipped losses  test_rl.py; here all three
  entropy is logged, not optimised                               test_iteration_equals_plain_python (the gradient)
  inner epochs, a fresh shuffle each                             test_minibatches; here [every option]
  a value model of its own, started from the reward model        test_ppo_learning.py: test_networks_of_the_stage
  a response without EOS gets a fixed score (replaces it)        here [every option], by hand in test_rl.py
  ratio 1 on the first minibatch                                 test_first_minibatch_in_float32, …_in_bfloat16
  KL is the sum over tokens, k1                                  test_iteration_equals_plain_python
  EMA of the policy, ptx gradient in the same buffer             test_iteration_equals_plain_python[ptx]
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_ppo
from tiny_ppo import EOS, POLICY, SCALAR

from instructgpt_jax import models, ppo, responses
from instructgpt_jax.data.batches import ROWS
from instructgpt_jax.sharding import BATCH, make_mesh, param_shardings
from instructgpt_jax.stages import ppo as ppo_stage
from instructgpt_jax.training import supervised

CASES = {
    "temperature": dict(temperature=0.7, whiten_advantages="none", microbatch_rows=2),
    "ptx": dict(
        batch_size=16, microbatch_rows=8, ptx_coef=3.0, ptx_microbatch_rows=8, ema_decay=0.0, max_prompt_length=5
    ),
    "every option": {
        "inner_epochs": 2, "whiten_advantages": "minibatch", "whiten_rewards": True, "missing_eos_score": -1.0,
        "score_clip": 0.9, "adaptive_kl.target": 0.05, "old_logprobs": "forward", "microbatch_rows": 1, "gamma": 0.9,
        "clip_range": 0.01, "clip_range_value": 0.01, "policy_optimizer.max_grad_norm": 0.5,
        "policy_optimizer.eps_form": "tensorflow", "value_optimizer.eps_form": "tensorflow",
    },
    "more ids than tokens": dict(
        temperature=0.7, batch_size=16, microbatch_rows=8, ptx_coef=3.0, ptx_microbatch_rows=8, max_prompt_length=5
    ),
}  # fmt: skip
ENDS = {"every option": (EOS, 4)}  # tokens any of which ends a response
ALLOWED = {"more ids than tokens": np.array([i < 21 and i != 7 for i in range(tiny_ppo.VOCAB)])}


@functools.cache
def case(name):
    """(algorithm, its three programs, state, frozen networks, batch); the policy has moved off the reference."""
    algorithm = tiny_ppo.algorithm(tiny_ppo.settings(**CASES[name]))
    algorithm = algorithm._replace(allowed=ALLOWED.get(name), eos_id=ENDS.get(name, EOS))
    return algorithm, tiny_ppo.phases(algorithm), *tiny_ppo.start(algorithm, 0.5), tiny_ppo.batch(algorithm.config)


@functools.cache
def after(name):
    """The iteration's episodes, and the state and metrics after it."""
    _, phases, state, frozen, batch = case(name)
    episodes, _ = phases[0](state.policy.params, batch, state.step)
    return episodes, *tiny_ppo.iterate(phases, state, frozen, batch)


# ------------------------------------------------------------------------------------------------- in plain Python


@functools.partial(jax.jit, static_argnums=(0, 3))
def all_logprobs(config, params, sequences, temperature, allowed=None):
    """(B, L - 1, V): log-probabilities of what follows each column of whole, unpacked sequences."""
    return sampled_from(models.logits(config, params, sequences)[:, :-1] / temperature, allowed)


def sampled_from(logits, allowed):
    """Log-probabilities of the softmax over the allowed ids."""
    return jax.nn.log_softmax(logits if allowed is None else jnp.where(allowed, logits, -1e30))


@functools.partial(jax.jit, static_argnums=0)
def all_values(config, params, sequences):
    """(B, L): the scalar head at every token."""
    positions = jnp.broadcast_to(jnp.arange(sequences.shape[1]), sequences.shape)
    return models.scalar(config, params, models.hidden(config, params, sequences, positions, None))


def chosen(logprobs, sequences):
    return jnp.take_along_axis(logprobs, sequences[:, 1:, None], axis=2)[..., 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.grad, argnums=2, has_aux=True)
def policy_loss(config, c, params, sequences, old, advantages, inside, text, allowed):
    """The clipped surrogate, plus ptx_coef times the mean negative log-likelihood of `text`."""
    logprobs = sampled_from(models.logits(config, params, sequences)[:, :-1] / c.temperature, allowed)
    entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
    ratio = jnp.exp(jnp.where(inside, chosen(logprobs, sequences) - old, 0.0))
    clipped = jnp.clip(ratio, 1 - c.clip_range, 1 + c.clip_range)
    surrogate = jnp.minimum(ratio * advantages, clipped * advantages)
    mean = lambda x: jnp.where(inside, x, 0.0).sum() / inside.sum()  # noqa: E731
    loss = -mean(surrogate)
    sums = {
        "policy/loss": loss,
        "policy/entropy": mean(entropy),
        "policy/approxkl": mean(jnp.log(ratio) ** 2 / 2),
        "policy/clipfrac": mean((clipped * advantages < ratio * advantages).astype(jnp.float32)),
        "policy/ratio_deviation": jnp.where(inside, jnp.abs(ratio - 1), 0.0).max(),
    }
    if text is not None:
        tokens, loss_mask = (text[name].reshape(-1, text[name].shape[-1]) for name in ("tokens", "loss_mask"))
        nll = -chosen(jax.nn.log_softmax(models.logits(config, params, tokens)[:, :-1]), tokens)
        sums["ptx/loss"] = (nll * loss_mask[:, 1:]).sum() / loss_mask.sum()
        loss += c.ptx_coef * sums["ptx/loss"]
    return loss, sums


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.grad, argnums=2, has_aux=True)
def value_loss(config, c, params, sequences, old, returns, inside):
    values = all_values(config, params, sequences)[:, :-1]
    near = jnp.clip(values, old - c.clip_range_value, old + c.clip_range_value)
    worst = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
    mean = lambda x: jnp.where(inside, x, 0.0).sum() / inside.sum()  # noqa: E731
    clipfrac = mean(((near - returns) ** 2 > (values - returns) ** 2).astype(jnp.float32))
    return mean(worst) / 2, {"value/loss": mean(worst) / 2, "value/clipfrac": clipfrac}


class Settings(NamedTuple):
    """What the losses read of config.ppo, as a static argument."""

    temperature: float
    clip_range: float
    clip_range_value: float
    ptx_coef: float


def rounded(params):
    """Float32 copies of float64 parameters."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


class Adam:
    """Kingma & Ba 2015 in float64, with either place of epsilon."""

    def __init__(self, settings, params):
        self.settings, self.t = settings, 0
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.m = jax.tree.map(np.zeros_like, self.params)
        self.v = jax.tree.map(np.zeros_like, self.params)

    def update(self, gradients):
        """Returns the norms of the gradient before clipping and of the update."""
        s = self.settings
        gradients = jax.tree.map(lambda g: np.asarray(g, np.float64), gradients)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
        factor = min(1.0, s.max_grad_norm / norm) if s.max_grad_norm else 1.0
        self.t += 1
        self.m = jax.tree.map(lambda m, g: s.b1 * m + (1 - s.b1) * factor * g, self.m, gradients)
        self.v = jax.tree.map(lambda v, g: s.b2 * v + (1 - s.b2) * (factor * g) ** 2, self.v, gradients)
        a, b = 1 - s.b1**self.t, 1 - s.b2**self.t
        if s.eps_form == "optax":
            step = jax.tree.map(lambda m, v: s.lr * (m / a) / (np.sqrt(v / b) + s.eps), self.m, self.v)
        else:
            step = jax.tree.map(lambda m, v: s.lr * np.sqrt(b) / a * m / (np.sqrt(v) + s.eps), self.m, self.v)
        self.params = jax.tree.map(np.subtract, self.params, step)
        return norm, np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(step)))


def plain_iteration(algorithm, state, frozen, batch, episodes):
    """The algorithm of the paper over one batch of episodes: no packing, no microbatches, loops over episodes.

    Everything about a response token lies at the column of the token before it, in arrays (B, Q + R - 1).
    """
    c = algorithm.config
    prompts, lengths, responses, mask = map(np.asarray, episodes)
    B, (Q, R) = len(prompts), (prompts.shape[1], responses.shape[1])
    sequences, inside, spans = np.zeros((B, Q + R), np.int32), np.zeros((B, Q + R - 1), bool), []
    for i in range(B):
        q, r = lengths[i], mask[i].sum()
        sequences[i, : q + r] = [*prompts[i, :q], *responses[i, :r]]
        spans.append(slice(q - 1, q + r - 1))
        inside[i, spans[i]] = True

    def token_logprobs(params):
        logprobs = all_logprobs(algorithm.policy, params, sequences, c.temperature, algorithm.allowed)
        return np.asarray(chosen(logprobs, sequences), np.float64)

    old, ref = token_logprobs(state.policy.params), token_logprobs(frozen["ref_policy"])
    old_values = np.asarray(all_values(algorithm.value, state.value.params, sequences), np.float64)[:, :-1]
    scalars = np.asarray(all_values(algorithm.reward, frozen["reward"], sequences), np.float64)

    raw, rewards, ended = np.zeros(B), np.zeros(inside.shape), np.zeros(B, bool)
    for i, span in enumerate(spans):
        raw[i] = scalars[i, span.stop]
        ended[i] = sequences[i, span.stop] in np.array(algorithm.eos_id)
        score = float(np.clip(raw[i], -c.score_clip, c.score_clip)) if c.score_clip else raw[i]
        if c.missing_eos_score is not None and not ended[i]:
            score = c.missing_eos_score
        rewards[i, span] = -float(state.kl_coef) * (old - ref)[i, span]
        rewards[i, span.stop - 1] += score
    if c.whiten_rewards:
        every = rewards[inside]
        rewards[inside] = (every - every.mean()) / np.sqrt(every.var() + 1e-8) + every.mean()

    advantages = np.zeros(inside.shape)
    for i, span in enumerate(spans):
        r, v = rewards[i, span], np.append(old_values[i, span], 0.0)
        delta = r + c.gamma * v[1:] - v[:-1]
        for t in range(len(r)):
            advantages[i, span.start + t] = sum((c.gamma * c.lam) ** k * delta[t + k] for k in range(len(r) - t))
    returns = np.where(inside, advantages + old_values, 0.0)

    def whiten(x, where):
        return (x - x[where].mean()) / np.sqrt(x[where].var() + 1e-8)

    if c.whiten_advantages == "batch":
        advantages = whiten(advantages, inside)

    kl = np.where(inside, old - ref, 0.0)
    metrics = {
        "objective/score": raw.mean(),
        "objective/score_std": raw.std(),
        "objective/kl": kl.sum(axis=1).mean(),
        "objective/kl_k3": np.where(inside, np.exp(-kl) - 1 + kl, 0.0).sum(axis=1).mean(),
        "objective/kl_coef": float(state.kl_coef),
        "objective/reward": rewards.sum(axis=1).mean(),
        "objective/logprob": old[inside].mean(),
        "response/length": mask.sum(axis=1).mean(),
        "response/ended": ended.mean(),
        "value/mean": old_values[inside].mean(),
        "value/explained_variance": 1 - (returns - old_values)[inside].var() / returns[inside].var(),
        "perf/tokens": (lengths + mask.sum(axis=1)).sum(),
    }

    policy, value = Adam(c.policy_optimizer, state.policy.params), Adam(c.value_optimizer, state.value.params)
    ema, steps = policy.params, []
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(algorithm.seed), ppo.SHUFFLE), state.step)
    for epoch in range(c.inner_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), B))
        for n in range(c.num_minibatches):
            pick = order[n * B // c.num_minibatches : (n + 1) * B // c.num_minibatches]
            a = whiten(advantages[pick], inside[pick]) if c.whiten_advantages == "minibatch" else advantages[pick]
            text = jax.tree.map(lambda x: x[epoch * c.num_minibatches + n], batch.get("pretraining"))  # noqa: B023
            at = Settings(c.temperature, c.clip_range, c.clip_range_value, c.ptx_coef)
            gradient, sums = policy_loss(
                algorithm.policy,
                at,
                rounded(policy.params),
                sequences[pick],
                old[pick],
                a,
                inside[pick],
                text,
                algorithm.allowed,
            )
            value_gradient, value_sums = value_loss(
                algorithm.value,
                at,
                rounded(value.params),
                sequences[pick],
                old_values[pick],
                returns[pick],
                inside[pick],
            )
            step = {name: float(x) for name, x in (sums | value_sums).items()}
            step["policy/gradient_norm"], step["policy/update_norm"] = policy.update(gradient)
            step["value/gradient_norm"], step["value/update_norm"] = value.update(value_gradient)
            for name, optimizer in (("policy", policy), ("value", value)):
                leaves = jax.tree.leaves(optimizer.params)
                step[f"{name}/parameter_norm"] = np.sqrt(sum((x**2).sum() for x in leaves))
            ema = jax.tree.map(lambda e, p: c.ema_decay * e + (1 - c.ema_decay) * p, ema, policy.params)
            steps.append(step)
    metrics |= {name: np.mean([step[name] for step in steps]) for name in steps[0]}
    metrics["policy/ratio_deviation"] = max(step["policy/ratio_deviation"] for step in steps)
    kl_coef = float(state.kl_coef)
    if c.adaptive_kl.target:
        kl_coef *= (
            1 + np.clip(metrics["objective/kl"] / c.adaptive_kl.target - 1, -0.2, 0.2) * B / c.adaptive_kl.horizon
        )
    return policy.params, value.params, ema, kl_coef, metrics


@pytest.mark.parametrize("name", CASES)
def test_iteration_equals_plain_python(name):
    """New parameters of both networks, the average, the KL coefficient and every metric."""
    algorithm, _, state, frozen, batch = case(name)
    episodes, new, metrics = after(name)
    policy, value, ema, kl_coef, expected = plain_iteration(algorithm, state, frozen, batch, episodes)
    c = algorithm.config
    updates = c.num_minibatches * c.inner_epochs
    for got, wanted, lr in (
        (new.policy.params, policy, c.policy_optimizer.lr),
        (new.value.params, value, c.value_optimizer.lr),
        *([(new.policy.ema, ema, c.policy_optimizer.lr)] if c.ema_decay else []),
    ):  # an update of Adam is at most about lr; agreement to a hundredth of it
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=0.01 * lr * updates)
        jax.tree.map(compare, got, wanted)
    np.testing.assert_allclose(new.kl_coef, kl_coef, rtol=1e-5)
    assert int(new.step) == 1 and int(new.policy.step) == int(new.value.step) == updates
    assert (new.policy.ema is None) == (not c.ema_decay)

    own = {"policy/ratio_first", "rollout/logprob_gap", "perf/flops"}  # their own tests below
    assert expected.keys() == metrics.keys() - own
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-4, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_flops_of_an_iteration(name):
    """Forward passes to sample and score, forward and backward ones to learn, token by token."""
    algorithm, _, _, _, batch = case(name)
    c, (episodes, _, metrics) = algorithm.config, after(name)
    lengths = np.asarray(batch["prompt_lengths"]) + np.asarray(episodes.response_mask).sum(axis=1)

    def forward(network):
        return sum(network.flops_per_token(keys) for length in lengths for keys in range(1, length + 1))

    policy, value, reward = map(forward, (algorithm.policy, algorithm.value, algorithm.reward))
    wanted = (2 if ppo.samples_are_old(algorithm) else 3) * policy + value + reward
    wanted += 3 * c.inner_epochs * (policy + value)
    if c.ptx_coef:
        segments, positions = (np.asarray(batch["pretraining"][key]) for key in ("segments", "positions"))
        keys = positions[segments > 0] + 1
        wanted += 3 * sum(algorithm.policy.flops_per_token(int(n)) for n in keys)
    assert metrics["perf/flops"] == pytest.approx(wanted, rel=1e-5)
    assert metrics["perf/tokens"] == lengths.sum()


def test_the_cases_are_worth_comparing():
    """Responses end early and never, scores are clipped and replaced, ratios and values leave their ranges."""
    episodes, new, metrics = after("every option")
    last = {int(row[mask][-1]) for row, mask in zip(episodes.responses, episodes.response_mask, strict=True)}
    assert last >= {EOS, 4} and len(last) > 2  # both ends, and responses that were cut
    lengths = np.asarray(episodes.response_mask.sum(axis=1))
    assert lengths.min() < 4 and 0 < metrics["response/ended"] < 1
    assert metrics["objective/score"] > 0.9 or metrics["objective/score_std"] > 0.3
    assert metrics["policy/clipfrac"] > 0 and metrics["value/clipfrac"] > 0 and metrics["objective/kl"] > 0
    assert float(new.kl_coef) != pytest.approx(0.1)
    algorithm, _, state, *_ = case("temperature")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after("temperature")[1].policy.params, state.policy.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


# ------------------------------------------------------------------------------------------- what always holds


def test_only_ids_that_a_token_has_are_sampled():
    """The pretraining text may hold the others, and its loss is over all."""
    episodes, _, metrics = after("more ids than tokens")
    allowed, mask = ALLOWED["more ids than tokens"], np.asarray(episodes.response_mask)
    assert allowed[np.asarray(episodes.responses)[mask]].all()
    assert not allowed[np.asarray(after("ptx")[0].responses)[np.asarray(after("ptx")[0].response_mask)]].all()
    assert np.isfinite(metrics["policy/entropy"]) and metrics["policy/entropy"] < np.log(allowed.sum())


@pytest.mark.parametrize("name", ["temperature", "ptx", "more ids than tokens"])
def test_first_minibatch_in_float32(name):
    """Sampled and recomputed log-probabilities agree, so the first ratio is 1; a reference just started has no KL."""
    algorithm, phases, _, frozen, batch = case(name)
    state, _ = tiny_ppo.start(algorithm)
    for iteration in range(3):
        state, metrics = tiny_ppo.iterate(phases, state, frozen, batch)
        assert metrics["policy/ratio_first"] <= 1e-5, iteration
        assert metrics["rollout/logprob_gap"] <= 1e-5, iteration
        assert metrics["policy/ratio_deviation"] > 1e-3, "later minibatches are trained on"
        if iteration == 0:
            assert abs(metrics["objective/kl"]) < 1e-5
    assert metrics["objective/kl_k3"] > 1e-6


def test_first_minibatch_in_bfloat16():
    """The old log-probabilities come from the training forward: ratio 1, no KL at the start, and the gap is told."""
    bf16 = dict(dtype="bfloat16")
    algorithm = tiny_ppo.algorithm(
        tiny_ppo.settings(), POLICY.replace(**bf16), SCALAR.replace(**bf16), SCALAR.replace(**bf16)
    )
    state, frozen = tiny_ppo.start(algorithm)
    batch = tiny_ppo.batch(algorithm.config)
    phases = tiny_ppo.phases(algorithm)
    _, metrics = tiny_ppo.iterate(phases, state, frozen, batch)
    assert metrics["rollout/logprob_gap"] < 0.1
    assert metrics["policy/ratio_first"] <= 1e-5
    assert metrics["objective/kl"] == 0.0 and metrics["objective/kl_k3"] == 0.0
    episodes, logprobs = phases[0](state.policy.params, batch, state.step)
    _, metrics = phases[1](state, frozen, episodes, logprobs + 0.25)  # so small a network may have no gap
    np.testing.assert_allclose(metrics["rollout/logprob_gap"], 0.25, atol=0.1)
    answers = responses.Answers(*phases[0](state.policy.params, batch, state.step), jnp.arange(8))
    measured = jax.jit(functools.partial(ppo.measure, algorithm))(state.policy.params, frozen, answers)
    np.testing.assert_array_equal(measured["kl"], 0.0)


@pytest.mark.parametrize("name", ["temperature", "more ids than tokens"])
def test_answers_are_measured_as_an_iteration_measures_its_episodes(name):
    """By the reward model, and against the reference at the temperature and over the ids of the sampling."""
    algorithm, phases, state, frozen, batch = case(name)
    answers = responses.Answers(*phases[0](state.policy.params, batch, state.step), jnp.arange(len(batch["prompts"])))
    measured = jax.jit(functools.partial(ppo.measure, algorithm))(state.policy.params, frozen, answers)
    metrics = after(name)[2]
    assert abs(metrics["objective/kl"]) > 1e-3
    np.testing.assert_allclose(measured["kl"].mean(), metrics["objective/kl"], rtol=1e-5)
    np.testing.assert_allclose(measured["score"].mean(), metrics["objective/score"], rtol=1e-5)


def test_heads_stay_in_float32_when_frozen():
    """The reward model's bias and the bias of the logits are added in float32, in the frozen copies too."""
    policy, reward = (tiny_ppo.params(config, 0) for config in (POLICY, SCALAR))
    reward["scalar_head"]["bias"] = jnp.float32(3.14159)
    policy["head"]["bias"] = policy["head"]["bias"] + 3.14159
    tokens = jnp.arange(2, 14).reshape(2, 6)
    positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
    for config, params, read in ((SCALAR, reward, models.scalar), (POLICY, policy, models.project)):
        config = config.replace(dtype="bfloat16")
        frozen = models.cast(params, "bfloat16")
        results = [read(config, p, models.hidden(config, p, tokens, positions, None)) for p in (params, frozen)]
        np.testing.assert_array_equal(*results)


def test_samples_are_the_policys():
    """Each response token was drawn with the log-probability that an unpacked forward gives it, EOS its last."""
    algorithm, phases, state, _, batch = case("temperature")
    episodes, logprobs = phases[0](state.policy.params, batch, state.step)
    again, _ = phases[0](state.policy.params, batch, state.step)
    other, _ = phases[0](state.policy.params, batch, state.step + 1)
    np.testing.assert_array_equal(episodes.responses, again.responses)
    assert (np.asarray(episodes.responses) != np.asarray(other.responses)).any()  # no iteration repeats the noise
    for i, (q, r) in enumerate(zip(episodes.prompt_lengths, episodes.response_mask.sum(axis=1), strict=True)):
        response = np.asarray(episodes.responses[i, :r])
        sequence = jnp.array([*episodes.prompts[i, :q], *response, *[0] * (12 - int(q + r))])[None]
        expected = all_logprobs(POLICY, state.policy.params, sequence, 0.7)[0, q - 1 : q - 1 + r]
        np.testing.assert_allclose(logprobs[i, :r], expected[np.arange(r), response], atol=1e-5)
        assert EOS not in response[:-1] and (r == 6 or response[-1] == EOS)
        assert not np.asarray(logprobs[i, r:]).any()


@pytest.mark.parametrize("wave", [2, 4])
def test_tokens_do_not_depend_on_the_wave(wave):
    algorithm, phases, state, _, batch = case("temperature")
    whole = phases[0](state.policy.params, batch, state.step)
    waves = jax.jit(functools.partial(ppo.rollout, algorithm._replace(wave=wave)))
    split = waves(state.policy.params, batch, state.step)
    jax.tree.map(np.testing.assert_array_equal, split[0], whole[0])
    np.testing.assert_allclose(split[1], whole[1], atol=1e-6)


def test_minibatches(monkeypatch):
    """Every epoch visits each episode once, in an order of its own and of its iteration."""
    seen, episodes = [], after("temperature")[0]  # of the real updates, before they are replaced

    def policy_step(ppo, state, minibatch, *_):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), minibatch.old_values[:, 0], ordered=True)
        return state, {"perf/flops": 0.0, "policy/ratio_deviation": 0.0, "policy/logprob_deviation": 0.0}

    monkeypatch.setattr(ppo, "policy_step", policy_step)
    monkeypatch.setattr(ppo, "value_step", lambda ppo, state, *_: (state, {"perf/flops": 0.0}))
    algorithm = tiny_ppo.algorithm(tiny_ppo.settings(inner_epochs=2, num_minibatches=4))
    state, _ = tiny_ppo.start(algorithm)
    number = jnp.arange(8.0)[:, None] * jnp.ones((8, 6))
    experience = ppo.Experience(episodes, number, number, number, number)
    metrics = {"perf/flops": jnp.float32(0), "objective/kl": jnp.float32(0)}
    for step in range(2):
        jax.block_until_ready(ppo.learn(algorithm, state.replace(step=jnp.int32(step)), experience, None, metrics))
    jax.effects_barrier()
    epochs = np.array(seen).reshape(4, 8)  # two of each iteration, 4 minibatches of 2 each
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(8), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


# ------------------------------------------------------------------------------------- one program, many devices


def assert_same_iteration(name, state, metrics, rtol=1e-4):
    """To rounding: Adam turns a rounding error of a gradient near 0 into a hundredth of its rate."""
    _, expected_state, expected = after(name)
    lr = case(name)[0].config.policy_optimizer.lr
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=0.02 * lr)
    for network in ("policy", "value"):
        got, wanted = (getattr(s, network) for s in (state, expected_state))
        jax.tree.map(compare, got.params, wanted.params)
    assert metrics.keys() == expected.keys()
    for key in expected.keys() - {"policy/ratio_first", "rollout/logprob_gap"}:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=rtol, atol=1e-5, err_msg=key)


def test_update_may_be_jitted_whole():
    algorithm, _, state, frozen, batch = case("temperature")
    state, metrics = jax.jit(functools.partial(ppo.update, algorithm))(state, frozen, batch)
    assert metrics["policy/ratio_first"] <= 1e-5
    assert_same_iteration("temperature", state, metrics)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_eight_devices_equal_one(shape, capfd):
    """The same tokens, parameters and metrics; and XLA never replicates what it cannot reshard."""
    algorithm, _, state, frozen, batch = case("ptx")
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    everywhere, rows = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in ((), (BATCH,)))

    def layout(state, tx):
        where = param_shardings(mesh, state.params)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.params, where)
        return supervised.state_shardings(tx, abstract, mesh, state.ema is not None)

    shardings = ppo.PPOState(
        everywhere, layout(state.policy, algorithm.policy_tx), layout(state.value, algorithm.value_tx), everywhere
    )
    capfd.readouterr()
    with jax.set_mesh(mesh):
        phases = ppo_stage.compile_phases(algorithm, shardings)
        state = jax.device_put(jax.tree.map(np.asarray, state), shardings)  # not the buffers, which learn takes
        frozen = jax.device_put(frozen, {name: param_shardings(mesh, tree) for name, tree in frozen.items()})
        pretraining = jax.device_put(batch["pretraining"], jax.NamedSharding(mesh, jax.P(None, *ROWS)))
        batch = jax.device_put({k: v for k, v in batch.items() if k != "pretraining"}, rows)
        episodes, logprobs = phases[0](state.policy.params, batch, state.step)
        jax.tree.map(np.testing.assert_array_equal, episodes, after("ptx")[0])
        experience, metrics = phases.experience(state, frozen, episodes, logprobs)
        state, metrics = phases.learn(state, experience, pretraining, metrics)
    assert metrics["policy/ratio_first"] <= 1e-5
    assert_same_iteration("ptx", state, metrics)
    assert "rematerialization" not in capfd.readouterr().err
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
