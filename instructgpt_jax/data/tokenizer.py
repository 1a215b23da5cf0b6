"""Tokenizers: loading one that can be trusted, training one, and encoding many texts at once.

Everything downstream sees ids only. Three conventions hold everywhere:

* EOS ends a demonstration, a completion and a pretraining document, and is a token the models learn to write.
* PAD is a token of its own, never EOS, so that no tool that masks PAD can hide an EOS. Our own models never read it:
  the empty part of a row is `segments == 0`, with token 0.
* The text of a special token inside a record (a literal "<|endoftext|>" in a crawled page) is ordinary text: it is
  encoded byte by byte and cannot end a sequence.
"""

import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
import transformers
from etils import epath

from instructgpt_jax import paths
from instructgpt_jax.data import sources

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_SENTENCE = "The quick brown fox jumps over the lazy dog."
_SMALLEST = 32  # ids; no alphabet worth training on is smaller, an unfilled vocabulary is


def load(name_or_directory: str | os.PathLike) -> transformers.PreTrainedTokenizerFast:
    """A fast tokenizer from a directory or a Hugging Face Hub id.

    A directory needs `tokenizer.json`, or the `vocab.json` and `merges.txt` of GPT-2's byte-level BPE. A PAD token is
    added where there is none of its own (see `vocab_size`, which does not count it).

    Raises:
      ValueError: the tokenizer cannot be read or fetched, is slow, nearly empty, has no EOS, or gives a sentence fewer
        than two different tokens, as some releases do silently when they find no vocabulary.
    """
    name = paths.expand(name_or_directory)
    if "://" in name:  # transformers reads local files only
        with tempfile.TemporaryDirectory() as copy:
            for path in epath.Path(name).iterdir():
                path.copy(f"{copy}/{path.name}")
            return load(copy)
    directory = pathlib.Path(name)
    bare = (directory / "vocab.json").is_file() and not (directory / "tokenizer.json").is_file()
    try:
        if bare and not (directory / "tokenizer_config.json").is_file():
            # AutoTokenizer asks a model's config.json for the class, which a bare vocabulary does not have.
            tokenizer = transformers.GPT2TokenizerFast.from_pretrained(name)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, use_fast=True)
    except Exception as error:  # OSError, ValueError, and of a damaged file whatever the reader in Rust says
        raise ValueError(
            "config.data.tokenizer must be a directory with a fast tokenizer, or a Hub id that can be fetched from "
            f"here, got {name!r}: {' '.join(str(error).split())}"
        ) from error
    _check(tokenizer, name)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer


def _check(tokenizer, name: str) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"config.data.tokenizer must be a fast tokenizer, got {type(tokenizer).__name__} from {name!r}"
        )
    if len(tokenizer) < _SMALLEST:
        raise ValueError(
            f"config.data.tokenizer must have at least {_SMALLEST} tokens, got {len(tokenizer)} from {name!r}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"config.data.tokenizer must have an EOS token, got none from {name!r}")
    ids = tokenizer.backend_tokenizer.encode(_SENTENCE, add_special_tokens=False).ids
    if len(set(ids)) < 2:
        raise ValueError(
            f"config.data.tokenizer must tell the words of a sentence apart, got {ids} for {_SENTENCE!r} from {name!r}"
        )


def train(texts: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> transformers.PreTrainedTokenizerFast:
    """Trains a byte-level BPE (Radford et al. 2019, section 2.2) and saves it where `load` and AutoTokenizer find it.

    The same texts in the same order give the same file, whatever the number of threads.

    Args:
      texts: the training text.
      vocab_size: number of ids, with EOS, PAD and the 256 bytes among them.
      directory: where `tokenizer.json` and `tokenizer_config.json` go.

    Raises:
      ValueError: `vocab_size` has no room for the bytes and the two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes, EOS, PAD), got {vocab_size!r}")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    fast.save_pretrained(paths.expand(directory))
    return load(directory)


def vocab_size(tokenizer) -> int:
    """One more than the largest id that text or EOS can have: what a model must hold. PAD may lie above."""
    return 1 + max(index for token, index in tokenizer.get_vocab().items() if token != tokenizer.pad_token)


def start(tokenizer) -> list[int]:
    """The ids that stand before every sequence: BOS for families that were trained with one (Llama), else none."""
    ids = tokenizer(_SENTENCE)["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def encode(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, (length,) int32, without special tokens; the whole list on all cores at once."""
    # The backend is called directly: the wrapper's offsets and masks cost a third of the time and nobody reads them.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def beside(init_from: str | os.PathLike) -> str:
    """Where a model's tokenizer is: in the workdir of its checkpoint, with the Hugging Face model; '' = nowhere."""
    directory = epath.Path(init_from)
    for workdir in (directory, directory.parent.parent):
        if (workdir / "tokenizer" / "tokenizer.json").exists():
            return str(workdir / "tokenizer")
    if directory.exists() and not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return ""
    return os.fspath(init_from)


def load_for(config) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a stage that only uses a model: `config.data.tokenizer`, or the one of `config.models.model`."""
    init_from = config.models.model.init_from
    name = config.data.tokenizer or beside(init_from)
    if not name:
        raise ValueError(f"config.data.tokenizer must be set, config.models.model.init_from={init_from!r} has none")
    return load(name)


def check_shared(key: str, init_from: str, name: str) -> None:
    """Refuses a model that was made for other ids than the run's tokenizer gives; more tokens at the end are fine.

    Args:
      key: of the model in the config, for the error.
      init_from: where the model comes from; without a tokenizer of its own there is nothing to compare.
      name: of the run's tokenizer.
    """
    theirs = beside(init_from)
    if not theirs or theirs == name:
        return
    ours, own = load(name), load(theirs)
    known = own.get_vocab()
    pads = (ours.pad_token, own.pad_token)  # which the models never read
    for token, index in sorted(ours.get_vocab().items(), key=lambda item: item[1]):
        if token not in pads and known.get(token) != index:
            raise ValueError(
                f"{key} must share the tokenizer {name!r} of {vocab_size(ours)} ids, got one of {vocab_size(own)} with "
                f"{init_from!r}, where {token!r} is {known.get(token, 'unknown')} and not {index}"
            )


def prepare(config, workdir: str | os.PathLike) -> None:
    """Settles `config.data.tokenizer` and keeps a copy in `workdir/tokenizer`, for later stages and for export.

    `config.data.tokenizer` is a directory or Hub id, `train:SIZE` for a byte-level BPE of that size trained on
    `config.data.pretraining`, or empty for the one that comes with `init_from` of the stage's model or policy
    (of an evaluation: of the reward model).
    """
    kept = epath.Path(workdir) / "tokenizer"
    wanted = config.data.tokenizer
    if not wanted:
        own = [name for name in ("policy", "model", "reward") if name in config.models] or sorted(config.models)
        network = own[0]  # of an evaluation, whose policies have names of their own: the reward model
        init_from = config.models[network].get("init_from", "")
        if not init_from:
            raise ValueError(
                f"config.data.tokenizer must be set, or config.models.{network}.init_from bring one, got neither"
            )
        wanted = beside(init_from)
        if not wanted:
            key = f"config.models.{network}.init_from"
            raise ValueError(f"config.data.tokenizer must be set, {key}={init_from!r} has none")
    if not (kept / "tokenizer.json").exists():
        with tempfile.TemporaryDirectory() as made:
            if wanted.startswith("train:"):
                data = config.data
                records = sources.load(tuple(data.pretraining), "pretraining", data.skip_bad, data.data_dir)
                train((record["text"] for record in records), int(wanted.removeprefix("train:")), made)
            else:
                load(wanted).save_pretrained(made)
            kept.mkdir(parents=True, exist_ok=True)
            # tokenizer.json comes last: where it is, the others are.
            for path in sorted(epath.Path(made).iterdir(), key=lambda path: path.name == "tokenizer.json"):
                path.copy(kept / path.name, overwrite=True)
    config.data.tokenizer = str(kept)
