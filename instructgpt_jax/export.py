"""A trained policy or reward model as a directory in Hugging Face format: the workdir of this stage."""

import json

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, paths
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import hf
from instructgpt_jax.training import metrics


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Writes `config.models.model` with its tokenizer; `config.models.model.weights` chooses 'ema' or 'params'.

    Raises:
      ValueError: the workdir holds anything but an earlier export, or no family of Hugging Face has this architecture.
    """
    source, folder = config.models.model.init_from, paths.make_folder("workdir", workdir)
    if any(folder.iterdir()):
        path = folder / "config.json"
        if not path.exists() or "model_type" not in json.loads(path.read_text()):
            raise ValueError(f"workdir must be empty or hold an earlier export, got {workdir}")
    tokenizer = tokenizers.load_for(config)
    network = networks.build("model", config, "", mesh, tokenizers.vocab_size(tokenizer), config.seed)
    hf.save(workdir, network.config, network.load(), tokenizer)
    if jax.process_index() == 0:
        kind = "reward model" if network.config.head == "scalar" else "language model"
        metrics.say(f"export: {kind} of {source} is now in {workdir}")
