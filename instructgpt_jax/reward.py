"""Step 2's mathematics: eq. 1 on K-wise rankings (Ouyang et al. 2022, section 3.5, appendix C.2).

All pairs of a prompt's K completions are one batch element, and each completion goes through the network once. With
`config.reward.shared_prompt` the prompt does too: its completions follow it in the row, each on a branch of its own
that sees the prompt and itself. `score` is all that users of the model need; stages/reward.py trains one, and
responses.py has the texts of a stage scored.
"""

import jax
import jax.numpy as jnp

from instructgpt_jax import episodes, losses, models
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.sharding import constrain
from instructgpt_jax.training import supervised
from instructgpt_jax.training.state import count_nonempty


def row_scores(config: ModelConfig, params: dict, rows: dict, key: jax.Array | None) -> jax.Array:
    """(G, K) float32 scores of the completions that end at `rows["ends"]`; arbitrary where there is no completion.

    Args:
      rows: one microbatch of comparisons: tokens, positions, segments (B, T), branches (B, T) or absent, and
        ends (G, K, 2).
      key: of dropout, or None.
    """
    hidden = models.hidden(
        config, params, rows["tokens"], rows["positions"], rows["segments"], rows.get("branches"), dropout_key=key
    )
    values = constrain(models.scalar(config, params, hidden), None, None)  # (B, T): few numbers, read across devices
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
    return total, aux | supervised.work(config, rows["segments"], rows["positions"], config.training_passes)


def score(
    config: ModelConfig,
    params: dict,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    responses: jax.Array,
    response_mask: jax.Array,
    row_length: int,
    microbatch_rows: int,
) -> jax.Array:
    """(B,) float32: the reward of each response, bias included, read at its last token.

    Args:
      prompts, prompt_lengths: (B, Q) int32 right-padded, (B,) int32.
      responses, response_mask: (B, R) int32, (B, R) bool: a prefix of each row, the EOS with it where there is one.
      row_length, microbatch_rows: of the packed rows it runs in; row_length holds Q + R.
    """
    batch = episodes.Episodes(prompts, prompt_lengths, responses, response_mask)
    episodes.check(batch)
    return episodes.scores(config, params, batch, episodes.pack(batch, row_length, microbatch_rows))


def batch_scores(config: ModelConfig, params: dict, batch: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(M, G, K) scores of a batch of comparisons, with its ranks and its groups (M, G)."""

    def one(i, scores):
        return scores.at[i].set(row_scores(config, params, jax.tree.map(lambda x: x[i], batch), None))

    zeros = jnp.zeros(batch["ranks"].shape, jnp.float32)
    scores = jax.lax.fori_loop(0, count_nonempty(batch["segments"]), one, zeros)
    return scores, batch["ranks"], batch["groups"]


def sum_of_scores(config: ModelConfig, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """The scores at the ends of all sequences of a batch of packed rows, added up, and their number."""

    def one(i, sums):
        rows = jax.tree.map(lambda x: x[i], batch)
        following = jnp.pad(rows["segments"][:, 1:], ((0, 0), (0, 1)))
        ends = (rows["segments"] > 0) & (rows["segments"] != following)
        scores = jnp.where(ends, episodes.row_scalars(config, params, rows), 0.0)
        return sums[0] + scores.sum(), sums[1] + ends.sum()

    return jax.lax.fori_loop(0, count_nonempty(batch["segments"]), one, (jnp.float32(0), jnp.int32(0)))
