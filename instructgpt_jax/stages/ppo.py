"""PPO as a stage of the training loop: its four networks, its prompts, the text of the ptx term, its programs.

The algorithm itself is in ppo.py.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from instructgpt_jax import episodes as ep
from instructgpt_jax import networks, ppo, responses, run_tokenizer
from instructgpt_jax.data import datasets, feeding
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.batches import Batches
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.models import RUNTIME_FIELDS
from instructgpt_jax.networks import Base, Network
from instructgpt_jax.sharding import replicated
from instructgpt_jax.training import memory, optimizer, supervised
from instructgpt_jax.training.loop import Stage

HEADS = {"policy": "lm", "ref_policy": "lm", "reward": "scalar", "value": "scalar"}  # what each network must be


def build_networks(config: ConfigDict, mesh: Mesh, tokenizer: Tokenizer) -> dict[str, Network]:
    """`policy`, `ref_policy`, `reward` and `value`.

    Each holds all ids of the tokenizer. Any may have more, as published models do: they are never sampled.

    Raises:
      ValueError: a network with fewer ids than the tokenizer, a reference or value model that cannot stand beside the
        policy or start from the reward model.
    """
    stood_in = networks.stand_ins(config)
    entries, nets = config.models.to_dict() | stood_in, {}
    for name, head in HEADS.items():
        try:
            nets[name] = networks.build(f"config.models.{name}", entries[name], head, mesh, tokenizer, config.seed)
        except ValueError as error:
            if name not in stood_in:
                raise
            other = networks.STAND_INS[name]
            raise ValueError(f"{error} (it is empty: that of config.models.{other})") from error
    for name in ("ref_policy", "reward", "value"):
        # Where a model has a tokenizer of its own, its tokens were compared: it may have more than the policy.
        init_from = entries[name].get("init_from", "")
        own_tokenizer = init_from and run_tokenizer.beside(init_from)
        if nets[name].config.vocab_size != nets["policy"].config.vocab_size and not own_tokenizer:
            raise ValueError(
                f"config.models.{name} must share the policy's vocabulary of {nets['policy'].config.vocab_size}, "
                f"got {nets[name].config.vocab_size}"
            )
    if nets["reward"].grown:
        raise ValueError(
            f"config.models.reward must be a reward model, got a language model from {config.models.reward.init_from!r}"
        )
    _check_same("ref_policy", "policy", nets)
    if not config.models.value.get("init_from", ""):  # it starts from the reward model
        _check_same("value", "reward", nets)
    return nets


def _check_same(name: str, other: str, nets: dict[str, Network]) -> None:
    """Refuses a network whose parameters could not stand in the place of another's."""
    mine, theirs = (dataclasses.asdict(nets[key].config) for key in (name, other))
    own = ("adapter", *RUNTIME_FIELDS)
    differ = [field for field in mine if mine[field] != theirs[field] and field not in own]
    if differ:
        wanted, got = ({field: network[field] for field in differ} for network in (theirs, mine))
        raise ValueError(
            f"config.models.{name} must have the architecture of config.models.{other}, {wanted}, got {got}"
        )


def frozen_networks(nets: dict[str, Network]) -> dict[str, Base]:
    """What does not train: reference, reward model, and under its own name the base of an adapter that is neither.

    An adapter that starts from the same weights as the reference or the reward model, and computes in the same dtype,
    stands on that: one network in memory, not two. Over a quantised base that is the quantised one.
    """
    found = {}
    for name, other in ppo.BASES.items():
        net, start = nets[name], nets[other]
        same = all(net.entry.get(field) == start.entry.get(field) for field in ("init_from", "weights", "version"))
        shared = net.base is not None and same and net.config.dtype == start.config.dtype
        found[other] = networks.frozen(start, net.config.adapter.base if shared else "")
        if net.base is not None and not shared:
            found[name] = net.base
    return found


class Iterations(NamedTuple):
    """Batches of PPO iterations: prompts, and the pretraining rows of each of their `updates` policy updates.

    prompts: Batches of prompts.
    pretraining: Batches of rows, one batch an update, or None without the ptx term.
    updates: policy updates of an iteration.
    """

    prompts: Batches
    pretraining: Batches | None
    updates: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        batch = dict(self.prompts[index])
        if self.pretraining is not None:
            rows = [self.pretraining[index * self.updates + update] for update in range(self.updates)]
            batch["pretraining"] = jax.tree.map(lambda *x: np.stack(x), *rows)
        return batch

    @property
    def spec(self):
        """PartitionSpecs of a batch, a prefix tree."""
        spec = dict.fromkeys(("prompts", "prompt_lengths", "index"), self.prompts.spec)
        return spec if self.pretraining is None else spec | {"pretraining": P(None, *self.pretraining.spec)}


def pretraining_data(config: ConfigDict, mesh: Mesh) -> datasets.StageData:
    """`ptx_ratio` pretraining sequences for each episode of a minibatch, without end."""
    return datasets.load(config, pretraining_options(config.ppo), "pretraining", mesh)


def pretraining_options(c: ConfigDict) -> ConfigDict:
    """The rows of one update's pretraining term, as `datasets.load` takes them."""
    return ConfigDict(
        {
            "batch_size": c.ptx_ratio * c.batch_size // c.num_minibatches,
            "row_length": c.ptx_row_length,
            "microbatch_rows": c.ptx_microbatch_rows,
            "num_epochs": 0,
        }
    )


class Phases(NamedTuple):
    """`rollout`, `experience` and `learn` of one algorithm, jitted one by one; learn donates the state."""

    rollout: Callable
    experience: Callable
    learn: Callable


def compile_phases(algorithm: ppo.Algorithm, shardings: ppo.PPOState | None = None) -> Phases:
    """The programs of an iteration; `shardings` are the state's after it."""
    return Phases(
        jax.jit(functools.partial(ppo.rollout, algorithm)),
        jax.jit(functools.partial(ppo.experience, algorithm)),
        jax.jit(functools.partial(ppo.learn, algorithm), donate_argnums=0, out_shardings=(shardings, None)),
    )


def distribution_gap(algorithm: ppo.Algorithm, params: Any, frozen: dict | None, episodes: ep.Episodes) -> jax.Array:
    """() float32 of the first episodes, as many as a microbatch has rows, see episodes.distribution_gap.

    Args:
      params, frozen: see ppo.rollout.
    """
    c, some = algorithm.config, jax.tree.map(lambda x: x[: algorithm.config.microbatch_rows], episodes)
    params = ppo.whole(algorithm.policy, params, frozen, "policy")
    given = c.row_length, c.temperature, algorithm.allowed, algorithm.cache
    return ep.distribution_gap(algorithm.policy, params, some, *given)


def algorithm_of(
    config: ConfigDict, nets: dict[str, Network], end_ids: tuple[int, ...], allowed: np.ndarray | None
) -> ppo.Algorithm:
    """What is fixed over a run.

    Args:
      nets: see `build_networks`.
      end_ids, allowed: of the tokenizer, see ppo.Algorithm.
    """
    c = config.ppo
    updates = c.iterations * c.num_minibatches * c.inner_epochs
    return ppo.Algorithm(
        c,
        policy=nets["policy"].config,
        value=nets["value"].config,
        reward=nets["reward"].config,
        policy_tx=optimizer.make_optimizer(c.policy_optimizer, updates),
        value_tx=optimizer.make_optimizer(c.value_optimizer, updates),
        eos_id=end_ids,
        allowed=allowed,
        seed=config.seed,
        wave=config.rollout.wave or None,
        cache=config.rollout.cache,
    )


def state_shardings(algorithm: ppo.Algorithm, nets: dict[str, Network], mesh: Mesh) -> ppo.PPOState:
    """Where each array of the state lies."""
    with_ema = bool(algorithm.config.ema_decay)
    return ppo.PPOState(
        step=replicated(mesh),
        policy=supervised.state_shardings(algorithm.policy_tx, nets["policy"].abstract, mesh, with_ema),
        value=supervised.state_shardings(algorithm.value_tx, nets["value"].abstract, mesh),
        kl_coef=replicated(mesh),
    )


def abstract_state(algorithm: ppo.Algorithm, nets: dict[str, Network], shardings: ppo.PPOState) -> ppo.PPOState:
    """The state as ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(functools.partial(ppo.start, algorithm), nets["policy"].abstract, nets["value"].abstract)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The PPO stage: trains `config.models.policy` on `config.data.prompts` against `config.models.reward`."""
    c = config.ppo
    nets = build_networks(config, mesh, tokenizers.load(config.data.tokenizer))
    networks.check_context("config.ppo.row_length", c.row_length, *(net.config for net in nets.values()))
    if c.ptx_coef:
        networks.check_context("config.ppo.ptx_row_length", c.ptx_row_length, nets["policy"].config)
    data = datasets.load(config, c, "prompts", mesh)
    networks.tell_trained_on("ppo", config.models.policy.init_from, data.valid_records)
    updates = c.num_minibatches * c.inner_epochs
    algorithm = algorithm_of(
        config, nets, data.tokenizer.end_ids, data.tokenizer.allowed(nets["policy"].config.vocab_size)
    )
    text = pretraining_data(config, mesh) if c.ptx_coef else None
    batches = Iterations(data.train_batches, text.train_batches if text else None, updates)
    shardings, bases = state_shardings(algorithm, nets, mesh), frozen_networks(nets)

    start = functools.partial(ppo.start, algorithm)
    phases = compile_phases(algorithm, shardings)
    sampling = config.rollout.wave, config.rollout.cache
    sampler = responses.sampler_of(algorithm.policy, data.tokenizer, c, config.seed, *sampling)
    # Whole on every device, so that every process can read them.
    measure = jax.jit(functools.partial(ppo.measure, algorithm), out_shardings=replicated(mesh))
    check = jax.jit(functools.partial(distribution_gap, algorithm), out_shardings=replicated(mesh))

    def init():
        parameters = nets["policy"].load(), nets["value"].load()
        return jax.jit(start, out_shardings=shardings, donate_argnums=(0, 1))(*parameters)

    @functools.cache
    def rollout_with(wave):
        return jax.jit(functools.partial(ppo.rollout, algorithm._replace(wave=wave)))

    waves = []  # the one that fits, once it is known

    def rollout(*given):
        if not waves:
            compiled = lambda wave: rollout_with(wave).lower(*given).compile()  # noqa: E731
            waves.append(memory.plan_slots(compiled, config.rollout.wave, c.batch_size))
        return rollout_with(waves[0])(*given)

    def step(state, frozen, batch):
        """`ppo.update`, in three programs: the sampling copy of the policy is gone before learning begins."""
        adapted = frozen if nets["policy"].base or nets["value"].base else None  # else it is not asked for
        episodes, logprobs = rollout(state.policy.params, batch, state.step, adapted)
        experience, metrics = phases.experience(state, frozen, episodes, logprobs)
        checked = {}
        if c.distribution_every and (int(state.step) + 1) % c.distribution_every == 0:
            checked = {"rollout/distribution_gap": check(state.policy.params, adapted, episodes)}
        state, metrics = phases.learn(state, experience, batch.get("pretraining"), metrics, adapted)
        return state, metrics | checked

    def evaluate(state, frozen):
        if not data.valid or not c.eval_batches:
            return {}, []
        params = state.policy.params if state.policy.ema is None else state.policy.ema
        params = ppo.whole(algorithm.policy, params, frozen, "policy")
        with contextlib.closing(data.valid["valid"]()) as batches:
            prompts = itertools.islice(batches, c.eval_batches)
            of = functools.partial(measure, params, frozen)
            found, samples = responses.answer_and_measure(sampler, params, prompts, of, c.num_samples, ppo.VALIDATION)
        return {f"valid/{name}": found[name].mean() for name in ("score", "kl", "length")}, samples

    def rates(iterations, step):
        optimizers = {"policy": c.policy_optimizer, "value": c.value_optimizer}
        return {
            f"{name}/learning_rate": float(optimizer.make_schedule(o, iterations * updates)(step * updates))
            for name, o in optimizers.items()
        }

    def programs():
        state = abstract_state(algorithm, nets, shardings)
        frozen = {name: base.abstract for name, base in bases.items()}
        whole = jax.jit(functools.partial(ppo.update, algorithm), donate_argnums=0, out_shardings=(shardings, None))
        return {"update": (whole, (state, frozen, datasets.abstract(batches, mesh)))}

    return Stage(
        init=init,
        frozen=lambda: {name: base.load() for name, base in bases.items()},
        update=step,
        data=lambda index: feeding.iterate(batches, mesh, index),
        evaluate=evaluate,
        programs=programs,
        num_steps=c.iterations,
        models={name: net.entry for name, net in nets.items()},
        read=data.read | (text.read if text else {}),
        rates=rates,
    )
