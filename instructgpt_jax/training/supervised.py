"""What pretraining, supervised fine-tuning and the reward model share: one network, one loss, one update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import losses, models
from instructgpt_jax.data.datasets import StageData
from instructgpt_jax.models import ModelConfig, adapters
from instructgpt_jax.sharding import replicated
from instructgpt_jax.training import optimizer
from instructgpt_jax.training.loop import Stage
from instructgpt_jax.training.state import (
    TrainState,
    accumulate_gradients,
    apply_gradients,
    count_nonempty,
    create,
)

NORMS = ("gradient_norm", "update_norm", "parameter_norm")  # what every update reports

# (params, microbatch, dropout key or None) -> (total to differentiate, sums that add up over microbatches)
Loss = Callable[[Any, dict, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


class Objective(NamedTuple):
    """What one stage trains for.

    Attributes:
      loss: summed over a microbatch.
      count: the name among its sums of what the total is divided by.
      metrics: sums of a batch -> metrics of the stage, without its name before them.
      weigh: the batch as the update trains on it.
    """

    loss: Loss
    count: str
    metrics: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
    weigh: Callable[[dict], dict] = lambda batch: batch


def language_model_loss(config: ModelConfig, params: dict, rows: dict, key: jax.Array | None):
    """Summed negative log-likelihood of the loss tokens of some rows: of SFT, of pretraining and of the ptx term.

    Args:
      rows: tokens, positions, segments, loss_mask, each (B, T) int32; loss_mask is above 0 on the tokens to be
        predicted. Perhaps `loss_weights` (B, T) float32: what each of them counts in the sum, 1 otherwise.
      key: of dropout, or None.

    Returns:
      The sum, and float32 sums `loss` (the same), `loss_tokens` (their number, its divisor), `tokens` and `flops`
      (forward and backward).
    """
    hidden = models.hidden(config, params, rows["tokens"], rows["positions"], rows["segments"], dropout_key=key)
    kernel, bias = models.unembedding(config, params)
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731  column t predicts token t + 1
    wanted = ahead(rows["loss_mask"] > 0).astype(jnp.float32)
    weights = ahead(rows["loss_weights"]) if "loss_weights" in rows else wanted
    total = losses.cross_entropy(
        hidden, kernel, ahead(rows["tokens"]), weights, vocab_size=config.vocab_size, bias=bias
    )
    spent = work(config, rows["segments"], rows["positions"], config.training_passes)
    return total, {"loss": total, "loss_tokens": wanted.sum(), **spent}


def stage(
    config: ConfigDict,
    mesh: Mesh,
    network,
    data: StageData,
    objective: Objective,
    params: Callable[[], dict],
    evaluate: Callable[[TrainState, dict], tuple[dict[str, float], list[dict]]],
) -> Stage:
    """A stage that trains one network, `config.models.model`, on its data.

    Args:
      config: its section named like the stage has `num_steps` and `optimizer`.
      network: see networks.Network; where it has an adapter, that is the state, and its base is `frozen`.
      params: () -> what trains, before the first update, on the mesh; its buffers are reused.
      evaluate: see loop.Stage.

    Raises:
      ValueError: more updates than the data have batches.
    """
    name, section = config.stage, config[config.stage]
    if section.num_steps > data.num_steps:
        raise ValueError(
            f"config.{name}.num_steps must be at most the {data.num_steps} batches of the data, got {section.num_steps}"
        )
    num_steps = section.num_steps or data.num_steps  # with 0 as many as its epochs have
    tx = optimizer.make_optimizer(section.optimizer, num_steps)
    schedule = optimizer.make_schedule(section.optimizer, num_steps)
    shardings = state_shardings(tx, network.abstract, mesh)

    def step(state, frozen, batch):
        learning_rate = schedule(state.step)
        loss, count = functools.partial(whole_loss, network.config, objective.loss, frozen), objective.count
        state, sums = update(state, frozen, objective.weigh(batch), loss=loss, count=count, tx=tx, seed=config.seed)
        own = objective.metrics(sums) | {"learning_rate": learning_rate} | {norm: sums[norm] for norm in NORMS}
        spent = {"perf/tokens": sums["tokens"], "perf/flops": sums["flops"]}
        return state, {f"{name}/{key}": value for key, value in own.items()} | spent

    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    def programs():
        frozen = {} if network.base is None else {"base": network.base.abstract}
        return {"update": (step, (abstract_state(network.abstract, tx, shardings), frozen, data.abstract_batch()))}

    def rates(length, step):
        return {f"{name}/learning_rate": float(optimizer.make_schedule(section.optimizer, length)(step))}

    return Stage(
        init=lambda: init_state(params(), tx, shardings),
        frozen=dict if network.base is None else lambda: {"base": network.base.load()},
        update=step,
        data=data.train,
        evaluate=evaluate,
        programs=programs,
        num_steps=num_steps,
        models={"model": network.entry},
        read=data.read,
        rates=rates,
        steps_per_epoch=data.steps_per_epoch,
    )


def whole(config: ModelConfig, params: Any, frozen: dict) -> Any:
    """The parameters of the whole network around what trains of it, see adapters.join; `frozen` as in `stage`."""
    return adapters.join(config, frozen.get("base"), params)


def whole_loss(config: ModelConfig, loss: Loss, frozen: dict, params: Any, rows: dict, key: jax.Array | None):
    """`loss` of the whole network, as a function of what trains."""
    return loss(whole(config, params, frozen), rows, key)


def update(
    state: TrainState, frozen: Any, batch: dict, *, loss: Loss, count: str, tx, seed: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update on the mean of `loss` over a batch of microbatches.

    Args:
      state: donated by the caller's jit; it keeps no average of the weights.
      frozen: not used; every stage's update has this signature.
      batch: (M, …) arrays, see data.packing.
      loss: summed over a microbatch.
      count: the name among its sums of what the total is divided by.
      tx: the optimiser.
      seed: of dropout: the key of a microbatch is (seed, step, microbatch).

    Returns:
      The new state and the summed `sums`, with the norms of apply_gradients.
    """
    del frozen
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def microbatch_loss(params, microbatch, index):
        return loss(params, microbatch, jax.random.fold_in(key, index))

    trips = count_nonempty(batch["segments"])
    grads, sums = accumulate_gradients(microbatch_loss, state.params, batch, trips)
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums[count], 1.0), grads)
    state, norms = apply_gradients(state, grads, tx, ema_decay=0.0)
    return state, sums | norms


def evaluate(params: Any, batch: dict, key: jax.Array | None = None, *, loss: Loss) -> dict[str, jax.Array]:
    """The sums of `loss` over a batch, without gradients; without dropout, unless it has a key."""

    def one(index):
        microbatch_key = None if key is None else jax.random.fold_in(key, index)
        return loss(params, jax.tree.map(lambda x: x[index], batch), microbatch_key)[1]

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.int32(0)))
    trips = count_nonempty(batch["segments"])
    return jax.lax.fori_loop(0, trips, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), zeros)


def state_shardings(tx, abstract_params: Any, mesh: Mesh, with_ema: bool = False) -> TrainState:
    """Shardings of a TrainState: moments and average as their parameters."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params)
    return TrainState(
        step=replicated(mesh),
        params=shardings,
        opt_state=optimizer.state_shardings(tx, abstract_params, shardings),
        ema=shardings if with_ema else None,
    )


def init_state(params: Any, tx, shardings: TrainState) -> TrainState:
    """A state at step 0 around parameters that are on the mesh already (their buffers are reused)."""
    with_ema = shardings.ema is not None
    return jax.jit(lambda p: create(p, tx, with_ema), out_shardings=shardings, donate_argnums=0)(params)


def abstract_state(abstract_params: Any, tx, shardings: TrainState) -> TrainState:
    """The state as ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(lambda p: create(p, tx, shardings.ema is not None), abstract_params)
    describe = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(describe, shapes, shardings)


def work(config: ModelConfig, segments: jax.Array, positions: jax.Array, passes: float) -> dict[str, jax.Array]:
    """Real tokens of some rows, and the model FLOPs spent on them.

    Args:
      passes: 1 for a forward pass, 3 with the backward (2 where weights are frozen).
    """
    real = segments > 0
    tokens = real.sum(dtype=jnp.float32)
    context = jnp.where(real, positions + 1, 0).sum(dtype=jnp.float32)  # keys seen, summed over tokens
    per_key = config.flops_per_token(1.0) - config.flops_per_token(0.0)
    flops = passes * (tokens * config.flops_per_token(0.0) + context * per_key)
    return {"tokens": tokens, "flops": flops}
