"""Step 0: next-token training on packed text, the base model of small runs."""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, process
from instructgpt_jax.data import datasets, tokenizer
from instructgpt_jax.training import optimizer, supervised
from instructgpt_jax.training.loop import Stage


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The pretraining stage: trains `config.models.model` on `config.data.pretraining`."""
    return language_model_stage(config, mesh, "pretrain", "pretraining")


def language_model_stage(
    config: ConfigDict, mesh: Mesh, name: str, kind: str, weigh: Callable[[dict], dict] = lambda batch: batch
) -> Stage:
    """A stage that trains `config.models.model` on rows with a loss mask.

    Args:
      name: of its section of the config, and the prefix of its metrics.
      kind: of its data.
      weigh: the batch as the update trains on it, perhaps with `loss_weights`.
    """
    section = config[name]
    vocab_size = tokenizer.load(config.data.tokenizer).vocab_size
    network = networks.build("model", config, "lm", mesh, vocab_size, config.seed)
    networks.check_context(f"config.{name}.row_length", section.row_length, network.config)
    data = datasets.load(config, section, kind, mesh)  # last: it takes the longest
    supervised.per_epoch(config, data)
    num_steps = supervised.num_steps(section, data)
    tx = optimizer.make_optimizer(section.optimizer, num_steps)
    schedule = optimizer.make_schedule(section.optimizer, num_steps)
    shardings = supervised.state_shardings(tx, network.abstract, mesh)
    loss = functools.partial(supervised.language_model_loss, network.config)

    def update(state, frozen, batch):
        learning_rate = schedule(state.step)
        state, sums = supervised.update(
            state, frozen, weigh(batch), loss=loss, count="loss_tokens", tx=tx, seed=config.seed
        )
        values = {
            f"{name}/loss": sums["loss"] / jnp.maximum(sums["loss_tokens"], 1.0),
            f"{name}/loss_tokens": sums["loss_tokens"],
            f"{name}/learning_rate": learning_rate,
            **{f"{name}/{norm}": sums[norm] for norm in supervised.NORMS},
            "perf/tokens": sums["tokens"],
            "perf/flops": sums["flops"],
        }
        return state, values

    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    evaluate_batch = jax.jit(functools.partial(supervised.evaluate, loss=loss))

    def init():
        params = network.load()
        if network.config.has_dropout:
            with contextlib.closing(data.train(0)) as batches:
                report_dropout(config, evaluate_batch, params, next(batches))
        return supervised.init_state(params, tx, shardings)

    def evaluate(state, frozen):
        if not data.valid:
            return {}, []
        total = count = 0.0
        for batch in data.valid["valid"]():
            sums = evaluate_batch(state.params, batch)
            total, count = total + float(sums["loss"]), count + float(sums["loss_tokens"])
        return {f"{name}/valid_loss": total / max(count, 1.0)}, []

    def programs():
        state = supervised.abstract_state(network.abstract, tx, shardings)
        return {"update": (update, (state, {}, data.abstract_batch()))}

    return Stage(
        init=init,
        frozen=dict,
        update=update,
        data=data.train,
        evaluate=evaluate,
        programs=programs,
        num_steps=num_steps,
        read=data.read,
        rates=supervised.rates(name, section),
    )


def report_dropout(config: ConfigDict, evaluate: Callable, params: dict, batch: dict) -> None:
    """Says so where dropout raises the first batch's loss by more than half.

    A network that was trained without dropout, as most public ones are, may need its whole residual stream.

    Args:
      evaluate: (params, batch, key=None) -> the sums of `supervised.language_model_loss`.
    """
    plain, noisy = (
        float(sums["loss"]) / max(float(sums["loss_tokens"]), 1.0)
        for sums in (evaluate(params, batch), evaluate(params, batch, key=jax.random.key(config.seed)))
    )
    if noisy > 1.5 * plain:
        process.say(
            f"{config.stage}: the loss begins at {noisy:.2f} with dropout and {plain:.2f} without: this model hardly "
            "bears it; --config.models.model.residual_dropout=0 turns it off"
        )
