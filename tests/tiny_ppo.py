"""PPO small enough to test: networks of one layer, episodes of a few tokens, and rewards whose optimum is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instructgpt_jax import models, ppo
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.training import optimizer
from instructgpt_jax.training.state import create

VOCAB = 24
EOS = 1
POLICY = ModelConfig(vocab_size=VOCAB, num_layers=1, width=16, num_heads=4, mlp_width=32, max_length=32, head_bias=True)
SCALAR = POLICY.replace(head="scalar", num_layers=2, width=8)  # a reward model of another shape than the policy


def adam(lr, **changes):
    settings = dict(
        algorithm="adam", lr=lr, schedule="constant", final_fraction=1.0, warmup_steps=0, warmup_start=0.1, b1=0.9,
        b2=0.95, eps=1e-5, eps_form="optax", weight_decay=0.0, max_grad_norm=0.0,
    )  # fmt: skip
    return settings | changes


def settings(**changes) -> ConfigDict:
    """config.ppo: 8 episodes of at most 6 + 6 tokens, 2 minibatches."""
    config = ConfigDict(
        dict(
            iterations=10, batch_size=8, num_epochs=0, max_prompt_length=6, response_length=6, temperature=1.0,
            num_minibatches=2, inner_epochs=1, row_length=14, microbatch_rows=2, kl_coef=0.1,
            adaptive_kl=dict(target=0.0, horizon=100), gamma=1.0, lam=0.95, clip_range=0.2, clip_range_value=0.2,
            whiten_advantages="batch", whiten_rewards=False, score_clip=0.0, missing_eos_score=None, ptx_coef=0.0,
            ptx_ratio=2, ptx_row_length=12, ptx_microbatch_rows=2, ema_decay=0.9, old_logprobs="auto", eval_batches=1,
            num_samples=2, policy_optimizer=adam(1e-3), value_optimizer=adam(1e-3),
        )
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


def algorithm(config, policy=POLICY, value=SCALAR, reward=SCALAR, seed=0, wave=None) -> ppo.Algorithm:
    steps = config.iterations * config.num_minibatches * config.inner_epochs
    transforms = [optimizer.make_optimizer(o, steps) for o in (config.policy_optimizer, config.value_optimizer)]
    return ppo.Algorithm(config, policy, value, reward, *transforms, eos_id=EOS, seed=seed, wave=wave)


def params(config: ModelConfig, seed: int, scale: float = 1.0) -> dict:
    """Fresh parameters with larger embeddings, so that distributions are far from uniform, and a bias for EOS."""
    tree = models.init(config, jax.random.key(seed))
    tree["embed"]["tokens"] = tree["embed"]["tokens"] * scale
    if config.head == "scalar":
        tree["scalar_head"]["bias"] = jnp.float32(0.7)
    else:
        tree["head"]["bias"] = tree["head"]["bias"].at[EOS].set(2.0)
    return tree


def start(algorithm: ppo.Algorithm, moved: float = 0.0):
    """State and frozen networks; `moved` perturbs the policy, so that it is no longer the reference."""
    c = algorithm.config
    policy, noise = params(algorithm.policy, 0, 10.0), models.init(algorithm.policy, jax.random.key(7))
    reward = models.cast(params(algorithm.reward, 1, 10.0), algorithm.reward.dtype)
    frozen = {"ref_policy": models.cast(policy, algorithm.policy.dtype), "reward": reward}
    state = ppo.PPOState(
        step=jnp.int32(0),
        policy=create(jax.tree.map(lambda p, n: p + moved * n, policy, noise), algorithm.policy_tx, bool(c.ema_decay)),
        value=create(params(algorithm.value, 2, 10.0), algorithm.value_tx, False),
        kl_coef=jnp.float32(c.kl_coef),
    )
    return jax.tree.map(jnp.array, (state, frozen))


def batch(config, seed=0, prompt_lengths=None) -> dict:
    """Prompts of mixed length, without EOS, and rows for the ptx term of each update."""
    rng = np.random.default_rng(seed)
    B, Q = config.batch_size, config.max_prompt_length
    lengths = rng.integers(1, Q + 1, B) if prompt_lengths is None else np.asarray(prompt_lengths)
    prompts = rng.integers(2, VOCAB, (B, Q)) * (np.arange(Q) < lengths[:, None])
    batch = {"prompts": jnp.array(prompts, jnp.int32), "prompt_lengths": jnp.array(lengths, jnp.int32)}
    if config.ptx_coef:
        N = config.num_minibatches * config.inner_epochs
        sequences = config.ptx_ratio * B // config.num_minibatches
        shape = (N, -(-sequences // config.ptx_microbatch_rows), config.ptx_microbatch_rows, config.ptx_row_length)
        T = np.arange(shape[-1])
        ends = rng.integers(3, shape[-1] + 1, shape[:3])[..., None]  # documents of mixed length, the rest padding
        real = T < ends
        batch["pretraining"] = {
            "tokens": jnp.array(rng.integers(1, VOCAB, shape) * real, jnp.int32),
            "positions": jnp.array(T * real, jnp.int32),
            "segments": jnp.array(real, jnp.int32),
            "loss_mask": jnp.array(real & (T > 0), jnp.int32),
        }
    return batch


def phases(algorithm: ppo.Algorithm):
    """rollout, experience and learn, jitted each by itself; nothing donated."""
    return [jax.jit(functools.partial(phase, algorithm)) for phase in (ppo.rollout, ppo.experience, ppo.learn)]


def iterate(phases, state, frozen, batch):
    """One iteration in three programs, as the stage runs it."""
    rollout, experience, learn = phases
    episodes, logprobs = rollout(state.policy.params, batch, state.step)
    prepared, metrics = experience(state, frozen, episodes, logprobs)
    return learn(state, prepared, batch.get("pretraining"), metrics)


def counter(config: ModelConfig, token: int, strength: float) -> dict:
    """A reward network whose score is the share of `token` among all tokens of the episode, times `strength`.

    Its one layer attends evenly to everything (queries are 0), a value channel holds 1 at `token`, and the result is
    added to two channels, one with each sign, beside others of size 100 that make the final norm nearly a constant
    factor.
    """
    zero = jax.tree.map(jnp.zeros_like, models.init(config, jax.random.key(0)))
    D = config.width
    assert config.head == "scalar" and config.num_layers == 1 and D >= 8
    # Norm 1 turns (a, -a, 0, ...) into a fixed vector times the sign of a.
    embedding = jnp.zeros_like(zero["embed"]["tokens"]).at[:, 0].set(-1.0).at[:, 1].set(1.0)
    zero["embed"]["tokens"] = embedding.at[token, 0].set(1.0).at[token, 1].set(-1.0)
    zero["blocks"]["norm1"]["scale"] = zero["blocks"]["norm1"]["scale"] + 1.0
    unit = (D / 2) ** 0.5  # (1, -1, 0, ...) has this much at its first channel once normed
    value, out = zero["blocks"]["attention"]["value"], zero["blocks"]["attention"]["out"]
    value["kernel"] = value["kernel"].at[0, 0, 0, 0].set(0.5 / unit)
    value["bias"] = value["bias"].at[0, 0, 0].set(0.5)
    out["kernel"] = out["kernel"].at[0, 0, 0, 2].set(1.0).at[0, 0, 0, 3].set(-1.0)
    out["bias"] = out["bias"].at[0, 4].set(100.0).at[0, 5].set(-100.0)
    zero["final_norm"]["scale"] = zero["final_norm"]["scale"] + 1.0
    deviation = (2 * 100.0**2 / D) ** 0.5
    zero["scalar_head"]["kernel"] = zero["scalar_head"]["kernel"].at[2].set(strength * deviation)
    return zero
