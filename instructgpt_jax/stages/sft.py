"""Step 1: supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5 and appendices C.1, C.3).

The loss is the token mean over completions. Two uses, two configurations: the SFT baseline (16 epochs, residual dropout
0.2, its epoch chosen by the reward model's score of its answers) and the policy that starts RLHF (2 epochs, 10 %
pretraining data). The paper does not say whether prompts carry loss: they do not, unless `config.sft.loss_on_prompt`.

Nor does it say what the 10 % are of. A demonstration of the paper has 44 loss tokens on average, a pretraining sequence
2,047: with one example in ten from pretraining, 0.1 · 2047 / (0.1 · 2047 + 0.9 · 44) = 84 % of the loss tokens are
text. `config.sft.pretraining_fraction_of` chooses, f is `config.sft.pretraining_fraction`:

* `loss`: (1 - f) · mean over the demonstrations' loss tokens + f · mean over the texts'. Each batch has the same number
  of texts, about f of its examples.
* `tokens`: f of the loss tokens are the texts', which is one text in about 400 examples of the paper; the mean over all
  loss tokens of a batch.
* `examples`: f of the examples are texts; the mean over all loss tokens of a batch.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax.models import ModelConfig
from instructgpt_jax.stages import pretrain
from instructgpt_jax.stages.pretrain import language_model_stage
from instructgpt_jax.training import supervised
from instructgpt_jax.training.loop import Stage


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The fine-tuning stage: trains `config.models.model` on `config.data.demonstrations`."""
    return language_model_stage(config, mesh, "demonstrations", functools.partial(objective, config.sft))


def objective(c: ConfigDict, network: ModelConfig) -> supervised.Objective:
    """What `config.sft` trains a network for."""
    if not c.pretraining_fraction or c.pretraining_fraction_of != "loss":
        return pretrain.objective(network)
    return pretrain.objective(network, functools.partial(with_weights, fraction=c.pretraining_fraction))


def with_weights(batch: dict, fraction: float) -> dict:
    """The batch with `loss_weights`, of the shape of its `loss_mask`, float32.

    The weights make the mean over all loss tokens equal (1 - fraction) times the mean over those of kind 1
    (demonstrations) plus fraction times the mean over those of kind 2 (texts).
    """
    mask = batch["loss_mask"]
    demonstrations, texts = ((mask == kind).astype(jnp.float32) for kind in (1, 2))
    total = (mask > 0).sum(dtype=jnp.float32)

    def share(tokens: jax.Array, part: float) -> jax.Array:
        return tokens * (part * total / jnp.maximum(tokens.sum(), 1.0))

    return batch | {"loss_weights": share(demonstrations, 1 - fraction) + share(texts, fraction)}
