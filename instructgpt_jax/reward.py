"""Step 2: the reward model, trained on K-wise rankings (Ouyang et al. 2022, section 3.5, eq. 1 and appendix C.2).

All pairs of a prompt's K completions are one batch element, and each completion goes through the network once. With
`config.reward.shared_prompt` the prompt does too: its completions follow it in the row, each on a branch of its own that sees the
prompt and itself. After training, a bias is stored that gives demonstrations the mean score 0.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import losses, models, networks
from instructgpt_jax.data import datasets
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.training import optimizer, supervised
from instructgpt_jax.training.loop import Stage
from instructgpt_jax.training.state import TrainState, count_nonempty


def row_scores(config: ModelConfig, params: dict, rows: dict, key: jax.Array | None) -> jax.Array:
    """(G, K) float32 scores of the completions that end at `rows["ends"]`; arbitrary where there is no completion.

    Args:
      rows: one microbatch of comparisons: tokens, positions, segments (B, T), branches (B, T) or absent, ends (G, K, 2).
      key: of dropout, or None.
    """
    hidden = models.hidden(
        config, params, rows["tokens"], rows["positions"], rows["segments"], rows.get("branches"), dropout_key=key
    )
    values = models.scalar(config, params, hidden)  # (B, T)
    return values[rows["ends"][..., 0], rows["ends"][..., 1]]


def comparison_loss(config: ModelConfig, params: dict, rows: dict, key: jax.Array | None):
    """Eq. 1 summed over the prompts of a microbatch.

    Returns:
      The sum over prompts of the mean over their untied pairs, and the sums `sum`, `prompts`, `pairs`, `correct` of
      losses.ranking_loss with `tokens` and `flops` (forward and backward).
    """
    scores = row_scores(config, params, rows, key)
    loss, aux = losses.ranking_loss(scores, rows["ranks"])
    total = loss * jnp.maximum(aux["prompts"], 1.0)
    return total, aux | supervised.work(config, rows["segments"], rows["positions"], passes=3)


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The reward stage: trains `config.models.model` with a scalar head on `config.data.comparisons`."""
    section = config.reward
    data = datasets.load(config, section, "comparisons", mesh)
    supervised.per_epoch(config, data)
    num_steps = supervised.num_steps(section, data)
    network = networks.build("model", config, "scalar", mesh, data.vocab_size, config.seed)
    if section.shared_prompt and any(network.config.windows):
        raise ValueError(
            "config.reward.shared_prompt must be False for a model with local attention windows, got windows "
            f"{network.config.windows}"
        )
    networks.check_context("config.reward.row_length", section.row_length, network.config)
    tx = optimizer.make_optimizer(section.optimizer, num_steps)
    schedule = optimizer.make_schedule(section.optimizer, num_steps)
    shardings = supervised.state_shardings(tx, network.abstract, mesh)
    loss = functools.partial(comparison_loss, network.config)

    def update(state, frozen, batch):
        learning_rate = schedule(state.step)
        state, sums = supervised.update(state, frozen, batch, loss=loss, count="prompts", tx=tx, seed=config.seed)
        metrics = {
            "reward/loss": sums["sum"] / jnp.maximum(sums["prompts"], 1.0),
            "reward/accuracy": sums["correct"] / jnp.maximum(sums["pairs"], 1.0),
            "reward/pairs": sums["pairs"],
            "reward/learning_rate": learning_rate,
            **{f"reward/{norm}": sums[norm] for norm in supervised.NORMS},
            "perf/tokens": sums["tokens"],
            "perf/flops": sums["flops"],
        }
        return state, metrics

    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    score_batch = jax.jit(functools.partial(batch_scores, network.config))

    def evaluate(state, frozen):
        if not data.valid:
            return {}, []
        scored = [(np.asarray(score_batch(state.params, batch)), batch) for batch in data.valid["valid"]()]
        return {"reward/valid_n": float(len(scored))}, []

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
    )


def batch_scores(config: ModelConfig, params: dict, batch: dict) -> jax.Array:
    """(M, G, K) scores of a batch of comparisons."""
    ranks = batch["ranks"]

    def one(i, scores):
        return scores.at[i].set(row_scores(config, params, jax.tree.map(lambda x: x[i], batch), None))

    return jax.lax.fori_loop(0, count_nonempty(batch["segments"]), one, jnp.zeros(ranks.shape, jnp.float32))
