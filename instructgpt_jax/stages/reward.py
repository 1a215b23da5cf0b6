"""Step 2: the reward model, trained on K-wise rankings (Ouyang et al. 2022, section 3.5, eq. 1 and appendix C.2).

The loss is in reward.py. After training, a bias is stored that gives demonstrations the mean score 0. `reward_folds`
runs this stage once for each fold of labelers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, process
from instructgpt_jax.data import datasets, feeding
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.batches import Batches
from instructgpt_jax.evaluation import rewards
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.reward import batch_scores, comparison_loss, sum_of_scores
from instructgpt_jax.sharding import replicated
from instructgpt_jax.stages import reward_start
from instructgpt_jax.training import supervised
from instructgpt_jax.training.loop import Stage


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """The reward stage: trains `config.models.model` with a scalar head on `config.data.comparisons`."""
    section, tokenizer = config.reward, tokenizers.load(config.data.tokenizer)
    reward_start.eos_twin(section, tokenizer)  # refuses now what it could not find later
    network = networks.build("config.models.model", config.models.model, "scalar", mesh, tokenizer, config.seed)
    if section.shared_prompt and any(network.config.windows):
        raise ValueError(
            "config.reward.shared_prompt must be False for a model with local attention windows, got windows "
            f"{network.config.windows}"
        )
    networks.check_context("config.reward.row_length", section.row_length, network.config)
    data = datasets.load(config, section, "comparisons", mesh)  # last: it takes the longest
    if config.data.valid_fraction and "valid" not in data.valid:
        raise ValueError(
            f"config.data.comparisons must leave validation comparisons with config.data.valid_fraction="
            f"{config.data.valid_fraction} (0: without), got none of {data.read['comparisons']['records']} records"
        )
    demonstrations = _demonstrations(config, data.tokenizer, mesh)

    # Whole on every device, so that every process can read them.
    score_batch = jax.jit(functools.partial(batch_scores, network.config), out_shardings=replicated(mesh))
    score_demonstrations = jax.jit(functools.partial(sum_of_scores, network.config), out_shardings=replicated(mesh))

    whole = functools.partial(supervised.whole, network.config)

    def evaluate(state, frozen):
        params = whole(state.params, frozen)
        found, samples = {"reward/bias": float(state.params["scalar_head"]["bias"])}, []
        for split, batches in data.valid.items():
            scored = [jax.tree.map(np.asarray, score_batch(params, batch)) for batch in batches()]
            values, curve = rewards.summarise(*rewards.collect(scored), data.groups[split])
            found |= {f"reward/{split}_{name}": value for name, value in values.items()}
            samples.append({"split": split, "calibration": curve})
        return found, samples

    def finish(state, frozen):
        if demonstrations is None:
            process.say("reward: no config.data.demonstrations to normalise by, the bias stays as it is")
            return state
        params = whole(state.params, frozen)
        sums = [score_demonstrations(params, batch) for batch in feeding.iterate(demonstrations, mesh, 0)]
        mean = sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)
        bias = state.params["scalar_head"]["bias"]
        centred = jax.device_put(bias - np.float32(mean), bias.sharding)
        return state.replace(params=state.params | {"scalar_head": state.params["scalar_head"] | {"bias": centred}})

    params = functools.partial(reward_start.params, config, network, data, mesh)
    stage = supervised.stage(config, mesh, network, data, objective(network.config), params, evaluate)
    also = datasets.described([demonstrations.read]) if demonstrations else {}
    return stage._replace(finish=finish, read=stage.read | also)


def objective(network: ModelConfig) -> supervised.Objective:
    """Eq. 1, a mean over prompts."""

    def measured(sums):
        return {
            "loss": sums["sum"] / jnp.maximum(sums["prompts"], 1.0),
            "accuracy": sums["correct"] / jnp.maximum(sums["pairs"], 1.0),
            "pairs": sums["pairs"],
        }

    return supervised.Objective(functools.partial(comparison_loss, network), "prompts", measured)


def _demonstrations(config: ConfigDict, tokenizer, mesh: Mesh) -> Batches | None:
    """Up to `config.reward.bias_examples` training demonstrations, drawn by the seed; None where the data name none.

    Read before training, so that a bad record stops the run then and not after it.
    """
    section, data = config.reward, config.data
    if not data.demonstrations:
        return None
    train, _ = datasets.split(datasets.read(data, "demonstrations"), data.valid_fraction)
    drawn = datasets.draw(train, section.bias_examples, config.seed)
    options = ConfigDict({**section, "loss_on_prompt": False, "pretraining_fraction": 0.0})
    return datasets.demonstrations(drawn, tokenizer, datasets.in_order(section, mesh), data, options)
