"""The programs that a stage runs, made from shapes by the functions that the stage itself jits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from instructgpt_jax import losses, networks, ppo, responses
from instructgpt_jax.data.batches import ROWS, own_of
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.plan import sampling, shapes
from instructgpt_jax.plan.shapes import Known
from instructgpt_jax.sharding import BATCH, batch_shards, replicated
from instructgpt_jax.stages import ppo as ppo_stage
from instructgpt_jax.stages import pretrain, reward, sft
from instructgpt_jax.training import supervised
from instructgpt_jax.training.loop import Stage

SUPERVISED = ("pretrain", "sft", "reward")
STAGES = (*SUPERVISED, "ppo", "select", "collect", "evaluate")  # that run a large program
SHALLOW = (2, 4)  # layers that a deep network's sampling is compiled with where they stand one by one: not on TPUs


class Packed(NamedTuple):
    """The rows that a device works on at once: a network, how many, of how many tokens."""

    network: ModelConfig
    rows: float
    length: int


class Program(NamedTuple):
    """A program of a stage.

    make: layers of the policy, or None for all of them -> (jitted function, its arguments).
    resident: what lies on the devices while it runs, arguments or not: label -> pytree of ShapeDtypeStructs.
    repeats: calls a step.
    flops: model FLOPs of a call, of all devices.
    laps: see cost.estimate.
    gradients: parameters whose gradients it holds, as a tree of ShapeDtypeStructs, or None.
    packed: rows of a microbatch on a device, of a program that reads packed rows.
    sampled: of a sampling program.
    """

    make: Callable[[int | None], tuple[Any, tuple]]
    resident: dict[str, Any]
    repeats: float
    flops: float
    laps: dict[str, float | tuple[float, ...]]
    gradients: Any = None
    packed: Packed | None = None
    sampled: sampling.Sampled | None = None


class Planned(NamedTuple):
    """A stage from shapes.

    programs: by name.
    steps: of the run; 0 = the configuration does not say it without its data.
    records: of a step, for `--plan_records`.
    epochs: that the records are gone through.
    """

    programs: dict[str, Program]
    steps: int
    records: float
    epochs: int


def plan(config: ConfigDict, mesh: Mesh, known: Known, on_cpu: bool) -> Planned:
    """The programs of a stage.

    Args:
      config: of one stage, valid for the mesh.
      on_cpu: that the run will be on CPUs, which repeat float32 numbers exactly.

    Raises:
      ValueError: a stage that runs no large program, a shape that cannot be known.
    """
    if config.stage not in STAGES:
        raise ValueError(f"--plan must have a stage of {STAGES}, got config.stage={config.stage!r}")
    if config.stage == "ppo":
        return _ppo(config, mesh, known, on_cpu)
    return (_supervised if config.stage in SUPERVISED else _answering)(config, mesh, known)


def model_flops(network: ModelConfig, tokens: float, context: float, passes: float) -> float:
    """Of so many tokens that see `context` keys on average; 3 passes with the backward. See ModelConfig."""
    return passes * tokens * network.flops_per_token(context)


def chunks(network: ModelConfig, mesh: Mesh, tokens: float) -> int:
    """Laps of a loop over the vocabulary, for so many tokens of a shard."""
    return max(1, -(-int(tokens) // losses.chunk_of(network.padded_vocab_size, mesh.devices.flat[0].device_kind)))


def _fixed(function, *arguments) -> Callable[[int | None], tuple[Any, tuple]]:
    return lambda layers: (function, arguments)


def _state(state, label: str = "") -> dict[str, Any]:
    """A TrainState by what it holds."""
    kept = {"parameters": state.params, "moments": state.opt_state, "average": state.ema}
    return {f"{label}{name}": tree for name, tree in kept.items() if jax.tree.leaves(tree)}


class _Data(NamedTuple):
    """What supervised.stage asks of its data."""

    num_steps: int
    steps_per_epoch: int
    train: Callable
    abstract_batch: Callable[[], Any]
    read: dict


def _supervised(config: ConfigDict, mesh: Mesh, known: Known) -> Planned:
    """pretrain, sft and reward: the update."""
    c, stage = config[config.stage], config.stage
    net = shapes.network(config, "model", "scalar" if stage == "reward" else "lm", mesh, known)
    networks.check_context(f"config.{stage}.row_length", c.row_length, net.config)
    objective = {
        "pretrain": pretrain.objective,
        "sft": functools.partial(sft.objective, c),
        "reward": reward.objective,
    }[stage](net.config)
    batch = shapes.comparisons(c, mesh) if stage == "reward" else shapes.rows(c, mesh)
    steps = c.num_steps or 1
    data = _Data(steps, steps, dict, lambda: batch, {})
    built: Stage = supervised.stage(config, mesh, net, data, objective, dict, lambda *_: ({}, []))
    function, arguments = built.programs()["update"]
    # A row for each example, and for each prompt with its completions.
    used = -(-c.batch_size // c.microbatch_rows)
    per_shard = c.microbatch_rows * c.row_length / batch_shards(mesh)
    laps = {"accumulate_gradients": used, "_cross_entropy_forward": chunks(net.config, mesh, per_shard)}
    passes, base = net.config.training_passes, {"base": arguments[1]} if net.base else {}
    flops = model_flops(net.config, c.batch_size * c.row_length, (c.row_length + 1) / 2, passes)
    program = Program(
        make=_fixed(function, *arguments),
        resident=_state(arguments[0]) | base | {"batch": batch},
        repeats=1,
        flops=flops,
        laps=laps,
        gradients=net.abstract,
        packed=Packed(net.config, c.microbatch_rows / batch_shards(mesh), c.row_length),
    )
    return Planned({"update": program}, c.num_steps, _records(c), c.num_epochs or 1)


def _records(c: ConfigDict) -> float:
    """The records of a supervised update that are not text mixed in; of rows that are full, as plans have them."""
    fraction = c.get("pretraining_fraction", 0.0)
    if fraction and c.pretraining_fraction_of == "loss":
        return own_of(c.batch_size, fraction)
    return (1 - fraction) * c.batch_size


def _ppo(config: ConfigDict, mesh: Mesh, known: Known, on_cpu: bool) -> Planned:
    """PPO: rollout, experience, learn, and what validation measures."""
    c = config.ppo
    nets = {name: shapes.network(config, name, head, mesh, known) for name, head in ppo_stage.HEADS.items()}
    networks.check_context("config.ppo.row_length", c.row_length, *(net.config for net in nets.values()))
    if c.old_logprobs == "auto" and not on_cpu:  # elsewhere products of float32 numbers are rounded
        c = ConfigDict(c.to_dict() | {"old_logprobs": "forward"})
    ids = shapes.ids(config, nets)
    asked = ConfigDict(config.to_dict() | {"ppo": c.to_dict()})
    algorithm = ppo_stage.algorithm_of(asked, nets, ids.end_ids, ids.allowed(nets["policy"].config.vocab_size))
    shardings = ppo_stage.state_shardings(algorithm, nets, mesh)
    state = ppo_stage.abstract_state(algorithm, nets, shardings)
    frozen = {name: base.abstract for name, base in ppo_stage.frozen_networks(nets).items()}
    adapted = (frozen,) if nets["policy"].base or nets["value"].base else ()
    batch = shapes.prompts(c.batch_size, c.max_prompt_length, mesh)
    phases = ppo_stage.compile_phases(algorithm, shardings)
    text = None
    if c.ptx_coef:
        options = ppo_stage.pretraining_options(c)
        updates = c.num_minibatches * c.inner_epochs
        one = shapes.rows(options, mesh)
        stacked = {name: jax.ShapeDtypeStruct((updates, *x.shape), x.dtype) for name, x in one.items()}
        text = shapes.laid(stacked, P(None, *ROWS), mesh)
    resident = _state(state.policy, "policy ") | _state(state.value, "value ")
    resident |= {"reference": frozen["ref_policy"], "reward model": frozen["reward"], "batch": (batch, text)}
    resident |= {f"base of the {name}": frozen[name] for name in ppo.BASES if name in frozen}

    B, Q, R, shards = c.batch_size, c.max_prompt_length, c.response_length, batch_shards(mesh)
    rows = min(c.microbatch_rows, B)
    tokens, context = B * (Q + R), (Q + R + 1) / 2
    of = lambda name, passes: model_flops(nets[name].config, tokens, context, passes)  # noqa: E731
    with_old = not ppo.samples_are_old(algorithm)
    with jax.set_mesh(mesh):
        episodes, logprobs = jax.eval_shape(phases.rollout, state.policy.params, batch, state.step, *adapted)
        experience, metrics = jax.eval_shape(phases.experience, state, frozen, episodes, logprobs)
    spread = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree
    )
    episodes, logprobs, experience, metrics = map(spread, (episodes, logprobs, experience, metrics))
    waves, slots = sampling.waves_of(B, config.rollout.wave)
    response_chunks = chunks(nets["policy"].config, mesh, rows / shards * R)
    minibatch = B // c.num_minibatches
    passes = {name: nets[name].config.training_passes for name in ppo.BASES}
    flops = sum(of(name, count * c.inner_epochs) for name, count in passes.items())
    microbatches = -(-minibatch // min(rows, minibatch))
    laps = {
        "accumulate_gradients/policy_step.<locals>.ppo_loss": microbatches,
        "accumulate_gradients/value_step.<locals>.loss": microbatches,
        "accumulate_gradients/scalar": microbatches,  # of one device the loss's own operations are fused away
        "_token_logprobs_forward": response_chunks,
        "_token_logprobs_backward": response_chunks,
    }
    if text is not None:
        laps["accumulate_gradients/language_model_loss"] = -(-options.batch_size // c.ptx_microbatch_rows)
        ptx_per_shard = c.ptx_microbatch_rows * c.ptx_row_length / shards
        laps["_cross_entropy_forward"] = chunks(nets["policy"].config, mesh, ptx_per_shard)
        ptx_tokens = options.batch_size * c.ptx_row_length * c.num_minibatches * c.inner_epochs
        flops += model_flops(nets["policy"].config, ptx_tokens, (c.ptx_row_length + 1) / 2, passes["policy"])

    def sample(layers):
        net = nets["policy"].config if layers is None else nets["policy"].config.replace(num_layers=layers)
        function = jax.jit(functools.partial(ppo.rollout, algorithm._replace(policy=net, wave=slots)))
        whole = networks.Network(net, dict, networks.abstract(net, mesh), {})
        if net.adapter is None:
            return function, (whole.abstract, batch, state.step)
        cut = networks.with_adapter(whole, net.adapter, mesh, config.seed)
        return function, (cut.abstract, batch, state.step, {"ref_policy": cut.base.abstract})

    def measure(layers):
        def measured(params, frozen, answers):
            return ppo.measure(algorithm, ppo.whole(algorithm.policy, params, frozen, "policy"), frozen, answers)

        function = jax.jit(measured, out_shardings=replicated(mesh))
        answers = responses.Answers(episodes, logprobs, spread(batch["index"]))
        return function, (state.policy.params, frozen, answers)

    decoded = sampling.laps(nets["policy"].config, B, Q, R, slots, waves, mesh)
    sampled = sampling.Sampled(nets["policy"].config, slots, Q + R, waves * R, Q + R / 2, algorithm.cache)
    scoring = of("ref_policy", 1) + of("reward", 1) + (of("policy", 1) if with_old else 0)
    reading = {"forward": -(-B // rows), "_token_logprobs_forward": response_chunks}
    packed = Packed(nets["policy"].config, rows / shards, c.row_length)
    validations = c.eval_batches / config.eval_every if config.eval_every > 0 else 0
    programs = {
        "rollout": Program(sample, resident, 1, of("policy", 1), decoded, sampled=sampled),
        "experience": Program(_fixed(phases.experience, state, frozen, episodes, logprobs), resident, 1,
                              scoring + of("value", 1), reading, packed=packed),
        "learn": Program(_fixed(phases.learn, state, experience, text, metrics, *adapted), resident, 1, flops, laps,
                         gradients=nets["policy"].abstract, packed=packed),
        "validation": Program(measure, resident, validations, scoring, reading, packed=packed),
    }  # fmt: skip
    return Planned(programs, c.iterations, c.batch_size, 1)


def _answering(config: ConfigDict, mesh: Mesh, known: Known) -> Planned:
    """select, collect, evaluate: prompts answered by each architecture, and texts scored."""
    c, stage = config[config.stage], config.stage
    judges = [name for name in ("reward", "judge", "ref_policy") if name in config.models and stage != "collect"]
    writers = [name for name in config.models if name not in judges]
    if stage == "select":
        writers = ["model"]
        judges = ["reward"] if config.select.by == "score" else []
    if stage == "evaluate":
        writers = list(dict.fromkeys(entry.model for entry in c.models.values()))
    heads = {name: "scalar" if name in ("reward", "judge") else "lm" for name in (*writers, *judges)}
    nets = {name: shapes.network(config, name, head, mesh, known) for name, head in heads.items()}
    ids = shapes.ids(config, {name: nets[name] for name in writers})
    turns = 1 if stage == "select" else responses.TURNS
    rows = -(-c.batch_size // batch_shards(mesh)) * batch_shards(mesh)
    B, Q, R = turns * rows, c.max_prompt_length, c.response_length
    wave, cache = (config.rollout.wave, config.rollout.cache) if stage == "select" else (rows, "full")
    batch = shapes.prompts(B, Q, mesh)
    programs, seen = {}, set()
    waves, slots = sampling.waves_of(B, wave)
    for name in writers:
        net = nets[name]
        if net.config in seen:
            continue
        seen.add(net.config)
        frozen = net.abstract if stage == "select" else networks.abstract_frozen(net)

        def answer(layers, net=net.config):
            cut = net if layers is None else net.replace(num_layers=layers)
            params = networks.abstract(cut, mesh)
            sampler = responses.sampler_of(cut, ids, c, config.seed, slots, cache)
            given = params, batch["prompts"], batch["prompt_lengths"], batch["index"]
            iteration = jax.ShapeDtypeStruct((), np.int32)
            counts = (batch["prompt_lengths"],) if turns > 1 else ()
            function = jax.jit(lambda *arrays: responses.answer_batch(sampler, *arrays))
            return function, (*given, iteration, *counts)

        programs[f"answers of {name}"] = Program(
            answer,
            {"parameters": frozen, "batch": batch},
            1,
            model_flops(net.config, B * (Q + R), (Q + R + 1) / 2, 1),
            sampling.laps(net.config, B, Q, R, slots, waves, mesh),
            sampled=sampling.Sampled(net.config, slots, Q + R, waves * R, Q + R / 2, cache),
        )
    for name in judges:
        if heads[name] != "scalar":
            continue
        net, frozen = nets[name], networks.abstract_frozen(nets[name])
        split = lambda *shape, dtype=np.int32: jax.ShapeDtypeStruct(  # noqa: E731
            shape, dtype, sharding=NamedSharding(mesh, P(BATCH))
        )
        texts = Episodes(split(rows, Q), split(rows), split(rows, R), split(rows, R, dtype=np.bool_))
        length = max(c.row_length, Q + R)
        run = functools.partial(_score, net.config, length, c.microbatch_rows)
        programs[f"scores by {name}"] = Program(
            _fixed(jax.jit(run), frozen, texts),
            {"reward model": frozen, "batch": texts},
            turns,
            model_flops(net.config, rows * (Q + R), (Q + R + 1) / 2, 1),
            {"forward": -(-rows // min(c.microbatch_rows, rows))},
            packed=Packed(net.config, min(c.microbatch_rows, rows) / batch_shards(mesh), length),
        )
    return Planned(programs, 0, B, 1)


def _score(network: ModelConfig, row_length: int, microbatch_rows: int, params, texts: Episodes):
    return responses.score_batch(network, params, texts, row_length, microbatch_rows)
