"""The tokenizer of a run: where it comes from, where it is kept, which networks share it."""

import json
import os
import pathlib
import tempfile

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, FrozenConfigDict

from instructgpt_jax import paths, process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import chats, sources
from instructgpt_jax.data.tokenizer import Tokenizer, load, train
from instructgpt_jax.models import hf
from instructgpt_jax.models.hf import peft, storage


def beside(init_from: str | os.PathLike) -> str:
    """Where a model's tokenizer is: in the workdir of its checkpoint, with the Hugging Face model; '' = nowhere."""
    directory = epath.Path(init_from)
    for workdir in (directory, directory.parent.parent):
        if (workdir / "tokenizer" / "tokenizer.json").exists():
            return str(workdir / "tokenizer")
    adapter = peft.read(pathlib.Path(directory)) if directory.exists() and "://" not in str(directory) else None
    if adapter is not None and not (directory / "tokenizer.json").exists():
        return beside(adapter.base)
    if directory.exists() and not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return ""
    return os.fspath(init_from)


def chat_of(config: ConfigDict, name: str) -> chats.Chat:
    """How `config.data` has dialogues written and responses ended, with a tokenizer that perhaps is of a run."""
    before = chats.kept(name)
    if before and not config.data.template and config.stage != "export":
        process.say(f"{config.stage}: config.data.template is '', and {name} is of a run with {before.template!r}")
    day = before.day if before else chats.today()
    return chats.Chat(config.data.template, tuple(config.data.end_tokens), day)


def load_for(config: ConfigDict) -> Tokenizer:
    """The tokenizer of a stage that only uses a model: `config.data.tokenizer`, or the one of `config.models.model`."""
    init_from = config.models.model.init_from
    name = config.data.tokenizer or beside(init_from)
    if not name:
        raise ValueError(f"config.data.tokenizer must be set, config.models.model.init_from={init_from!r} has none")
    return load(name, chat_of(config, name))


def check_shared(key: str, init_from: str, ours: Tokenizer) -> None:
    """Refuses a model that was made for other ids than the run's tokenizer gives; more tokens at the end are fine.

    Args:
      key: of the model in the config, for the error.
      init_from: where the model comes from; without a tokenizer of its own there is nothing to compare.
      ours: the run's tokenizer.
    """
    theirs = beside(init_from)
    if not theirs:
        return
    own = load(theirs)
    known, pads = own.vocabulary(), (ours.pad, own.pad)  # which the models never read
    for token, index in sorted(ours.vocabulary().items(), key=lambda item: item[1]):
        if token not in pads and known.get(token) != index:
            raise ValueError(
                f"{key} must share the run's tokenizer of {ours.vocab_size} ids, got one of {own.vocab_size} with "
                f"{init_from!r}, where {token!r} is {known.get(token, 'unknown')} and not {index}"
            )


def name_for(config: ConfigDict) -> str:
    """Where the tokenizer of a run comes from: `config.data.tokenizer`, or what its `init_from` brings.

    Raises:
      ValueError: neither has one.
    """
    if config.data.tokenizer:
        return config.data.tokenizer
    own = [name for name in ("policy", "model", "reward") if name in config.models] or sorted(config.models)
    network = own[0]  # of an evaluation, whose policies have names of their own: the reward model
    init_from = config.models[network].get("init_from", "")
    if not init_from:
        raise ValueError(
            f"config.data.tokenizer must be set, or config.models.{network}.init_from bring one, got neither"
        )
    found = beside(init_from)
    if not found:
        raise ValueError(f"config.data.tokenizer must be set, config.models.{network}.init_from={init_from!r} has none")
    return found


def settled(config: ConfigDict, workdir: str | os.PathLike) -> FrozenConfigDict:
    """The configuration with the tokenizer of its run, a copy in `workdir/tokenizer` for later stages and for export.

    The copy has the end tokens and the chat template of the run with it, and the day on which the first of several runs
    began, which some templates write.

    `config.data.tokenizer` is a directory or Hub id, `train:SIZE` for a byte-level BPE of that size trained on
    `config.data.pretraining`, or empty for the one that comes with `init_from` of the stage's model or policy
    (of an evaluation: of the reward model). The first process of a job makes the copy, the others find it.
    """
    kept = epath.Path(workdir) / "tokenizer"
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("tokenizer")
    wanted = name_for(config)
    if not (kept / "tokenizer.json").exists():
        with tempfile.TemporaryDirectory() as made:
            if wanted.startswith("train:"):
                data = config.data
                records = sources.load(tuple(data.pretraining), "pretraining", data.skip_bad, data.data_dir)
                train((record["text"] for record in records), int(wanted.removeprefix("train:")), made)
                wanted = made
            chat = chat_of(config, wanted)
            tokenizer = load(wanted, chat)
            tokenizer.save(made)
            if chat.template:
                chats.keep(chat, made)
            generation = hf.read_generation(wanted)  # how its model is sampled: for the export at the end
            if generation:
                generation["eos_token_id"] = tokenizer.ends
                (pathlib.Path(made) / storage.GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
            paths.copy_folder(made, kept, last="tokenizer.json")
    if jax.process_index() == 0 and jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizer")
    tree = config.to_dict()
    tree["data"]["tokenizer"] = str(kept)
    return workdirs.frozen(tree)
