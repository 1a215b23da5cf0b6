"""Step 0: next-token training on packed text, the base model of small runs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import losses, models, networks
from instructgpt_jax.data import datasets
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.training import optimizer, supervised
from instructgpt_jax.training.loop import Stage


def language_model_loss(config: ModelConfig, params: dict, rows: dict, key: jax.Array | None):
    """Summed negative log-likelihood of the loss tokens of some rows: of SFT, of pretraining and of the ptx term.

    Args:
      rows: tokens, positions, segments, loss_mask, each (B, T) int32; loss_mask is 1 on the tokens to be predicted.
      key: of dropout, or None.

    Returns:
      The sum, and float32 sums `loss` (the same), `loss_tokens` (its divisor), `tokens` and `flops` (forward and
      backward).
    """
    hidden = models.hidden(config, params, rows["tokens"], rows["positions"], rows["segments"], dropout_key=key)
    kernel, bias = models.unembedding(config, params)
    ahead = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731  column t predicts token t + 1
    weights = ahead(rows["loss_mask"]).astype(jnp.float32)
    total = losses.cross_entropy(
        hidden, kernel, ahead(rows["tokens"]), weights, vocab_size=config.vocab_size, bias=bias
    )
    work = supervised.work(config, rows["segments"], rows["positions"], passes=3)
    return total, {"loss": total, "loss_tokens": weights.sum(), **work}


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The pretraining stage: trains `config.models.model` on `config.data.pretraining`."""
    return language_model_stage(config, mesh, "pretrain", "pretraining")


def language_model_stage(config: ConfigDict, mesh: Mesh, name: str, kind: str) -> Stage:
    """A stage that trains `config.models.model` on rows with a loss mask.

    Args:
      name: of its section of the config, and the prefix of its metrics.
      kind: of its data.
    """
    section = config[name]
    data = datasets.load(config, section, kind, mesh)
    supervised.per_epoch(config, data)
    num_steps = supervised.num_steps(section, data)
    network = networks.build("model", config, "lm", mesh, data.vocab_size, config.seed)
    networks.check_context(f"config.{name}.row_length", section.row_length, network.config)
    tx = optimizer.make_optimizer(section.optimizer, num_steps)
    schedule = optimizer.make_schedule(section.optimizer, num_steps)
    shardings = supervised.state_shardings(tx, network.abstract, mesh)
    loss = functools.partial(language_model_loss, network.config)

    def update(state, frozen, batch):
        learning_rate = schedule(state.step)
        state, sums = supervised.update(state, frozen, batch, loss=loss, count="loss_tokens", tx=tx, seed=config.seed)
        metrics = {
            f"{name}/loss": sums["loss"] / jnp.maximum(sums["loss_tokens"], 1.0),
            f"{name}/loss_tokens": sums["loss_tokens"],
            f"{name}/learning_rate": learning_rate,
            **{f"{name}/{norm}": sums[norm] for norm in supervised.NORMS},
            "perf/tokens": sums["tokens"],
            "perf/flops": sums["flops"],
        }
        return state, metrics

    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    evaluate_batch = jax.jit(functools.partial(supervised.evaluate, loss=loss))

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
        init=lambda: supervised.init_state(network.load(), tx, shardings),
        frozen=dict,
        update=update,
        data=data.train,
        evaluate=evaluate,
        programs=programs,
        num_steps=num_steps,
        read=data.read,
        rates=supervised.rates(name, section),
    )
