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
from instructgpt_jax.training import origins


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
    if config.export.format == "peft":
        _save_adapter(config, mesh, workdir, made)
        return
    beside = run_tokenizer.beside(source)
    generation = hf.read_generation(beside) if beside else {}
    if generation or tokenizer.end_ids != (tokenizer.eos_id,):
        generation["eos_token_id"] = tokenizer.ends
    hf.save(workdir, network.config, network.load(), made, config.export.dtype, generation)
    if jax.process_index() == 0:
        workdirs.write_atomically(epath.Path(workdir) / card.FILE, card.of_network(source, network.config.head))
        kind = "reward model" if network.config.head == "scalar" else "language model"
        process.say(f"export: {kind} of {source} is now in {workdir}")


def _save_adapter(config: ConfigDict, mesh: Mesh, workdir: str, tokenizer) -> None:
    """Writes the adapter that a stage trained, in PEFT's format.

    Raises:
      ValueError: no adapter there, or a base that is not in Hugging Face format.
    """
    key, entry = "config.models.model", config.models.model
    source = origins.find(key, entry, 1)
    if source.adapter is None:
        raise ValueError(f"{key}.init_from must be of a run that trained an adapter, to be exported as 'peft', got "
                         f"{entry.init_from!r}")  # fmt: skip
    if source.adapter.base:
        raise ValueError(
            f"config.export.format must be 'merged', the adapter of {entry.init_from!r} was trained on a base in "
            f"{source.adapter.base} that PEFT's format cannot name, got 'peft'"
        )
    base = config.export.base or source.base.place
    if source.base.kind != "hf" and not config.export.base:
        raise ValueError(
            f"config.export.base must name {base!r} in Hugging Face format, what the adapter was trained from: export "
            "it first, or this one merged; got ''"
        )
    found = hf.read_config(base)
    origins.check_base(key, entry.init_from, base, source.config, found)
    network, params = origins.load_adapter(source, mesh)
    hf.save_adapter(workdir, base, network, params, tokenizer, config.export.dtype)
    if jax.process_index() == 0:
        workdirs.write_atomically(epath.Path(workdir) / card.FILE, card.of_network(entry.init_from, network.head))
        process.say(f"export: the adapter of {entry.init_from} on {base} is now in {workdir}")
