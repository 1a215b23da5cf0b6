"""A trained policy or reward model as a directory in Hugging Face format, with its model card: this stage's workdir."""

import os

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import networks, paths, process, run_tokenizer
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.models import hf
from instructgpt_jax.report import card


def run(config: ConfigDict, mesh: Mesh, workdir: str) -> None:
    """Writes `config.models.model` with its tokenizer; `config.models.model.weights` chooses 'ema' or 'params'.

    The chat template is part of the tokenizer, and with it travels the generation_config.json of the checkpoint that
    training began with, from workdir to workdir; its end tokens are those of the run. `model_card.md` says what the
    workdirs know of the model, see `report/card.py`.

    Raises:
      ValueError: the workdir holds anything but an earlier export, or the model itself, or no family of Hugging Face
        has this architecture.
    """
    source = config.models.model.init_from
    hf.check_directory(workdir, "workdir")
    if source and os.path.realpath(source) == os.path.realpath(workdir):
        raise ValueError(
            f"workdir must be another folder than config.models.model.init_from, which the export would replace, got "
            f"{workdir} twice"
        )
    paths.make_folder("workdir", workdir)
    tokenizer = run_tokenizer.load_for(config)
    network = networks.build("config.models.model", config.models.model, "", mesh, tokenizer, config.seed)
    # A classifier needs a PAD of its own; for a language model it would be one more id to sample.
    made = tokenizer.pretrained(pad=network.config.head == "scalar")
    beside = run_tokenizer.beside(source)
    generation = hf.read_generation(beside) if beside else {}
    if generation or tokenizer.end_ids != (tokenizer.eos_id,):
        generation["eos_token_id"] = tokenizer.ends
    hf.save(workdir, network.config, network.load(), made, config.export.dtype, generation)
    if jax.process_index() == 0:
        workdirs.write_atomically(epath.Path(workdir) / card.FILE, card.of_network(source, network.config.head))
        kind = "reward model" if network.config.head == "scalar" else "language model"
        process.say(f"export: {kind} of {source} is now in {workdir}")
