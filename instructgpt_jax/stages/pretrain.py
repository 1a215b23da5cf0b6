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
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.training import supervised
from instructgpt_jax.training.loop import Stage


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The pretraining stage: trains `config.models.model` on `config.data.pretraining`."""
    return language_model_stage(config, mesh, "pretraining", objective)


def objective(network: ModelConfig, weigh: Callable[[dict], dict] = lambda batch: batch) -> supervised.Objective:
    """The mean loss of a language model's loss tokens.

    Args:
      weigh: the batch as the update trains on it, perhaps with `loss_weights`.
    """

    def measured(sums):
        return {"loss": sums["loss"] / jnp.maximum(sums["loss_tokens"], 1.0), "loss_tokens": sums["loss_tokens"]}

    loss = functools.partial(supervised.language_model_loss, network)
    return supervised.Objective(loss, "loss_tokens", measured, weigh)


def language_model_stage(
    config: ConfigDict, mesh: Mesh, kind: str, objective_of: Callable[[ModelConfig], supervised.Objective]
) -> Stage:
    """A stage that trains `config.models.model` on rows with a loss mask.

    Args:
      kind: of its data.
      objective_of: see `objective`.
    """
    name, section = config.stage, config[config.stage]
    vocabulary = tokenizer.load(config.data.tokenizer)
    network = networks.build("config.models.model", config.models.model, "lm", mesh, vocabulary, config.seed)
    networks.check_context(f"config.{name}.row_length", section.row_length, network.config)
    data = datasets.load(config, section, kind, mesh)  # last: it takes the longest
    found = objective_of(network.config)
    evaluate_batch = jax.jit(functools.partial(supervised.evaluate, loss=found.loss))
    whole = functools.partial(supervised.whole, network.config)

    def params():
        found = network.load()
        if network.config.has_dropout:
            with contextlib.closing(data.train(0)) as batches:
                report_dropout(config, evaluate_batch, networks.join(network, found), next(batches))
        return found

    def evaluate(state, frozen):
        if not data.valid:
            return {}, []
        params, total, count = whole(state.params, frozen), 0.0, 0.0
        for batch in data.valid["valid"]():
            sums = evaluate_batch(params, batch)
            total, count = total + float(sums["loss"]), count + float(sums["loss_tokens"])
        return {f"{name}/valid_loss": total / max(count, 1.0)}, []

    return supervised.stage(config, mesh, network, data, found, params, evaluate)


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
