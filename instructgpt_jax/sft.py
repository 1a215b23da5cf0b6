"""Step 1: supervised fine-tuning on demonstrations (Ouyang et al. 2022, section 3.5 and appendices C.1, C.3).

The loss is the token mean over completions. Two uses, two configurations: the SFT baseline (16 epochs, residual dropout
0.2, its epoch chosen by the reward model's score of its answers) and the policy that starts RLHF (2 epochs, one example
in ten from the pretraining data). The paper does not say whether prompts carry loss: they do not, unless
`config.sft.loss_on_prompt`.
"""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax.pretrain import language_model_stage
from instructgpt_jax.training.loop import Stage


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The fine-tuning stage: trains `config.models.model` on `config.data.demonstrations`."""
    return language_model_stage(config, mesh, "sft", "demonstrations")
