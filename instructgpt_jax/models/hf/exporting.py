"""From parameters to a directory in Hugging Face format that `transformers` loads without a word."""

import copy
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructgpt_jax import errors, paths
from instructgpt_jax.models import transformer
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.models.hf import fields, layout, storage
from instructgpt_jax.models.hf.families import Family, family_of
from instructgpt_jax.models.hf.loading import file_tensors, flatten

SHARD_BYTES = 5_000_000_000
PARTIAL = ".partial"  # folder of an export that is being written, in the folder of the export
COMPILED = ".compiled"  # where the command line keeps compiled programs; no part of an export
# What an export consists of: what `save` writes, what transformers writes of a tokenizer, now or in older versions, and
# the model card that the stage adds.
OURS = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|tokenizer(_config)?\.json|"
    r"chat_template\.jinja|additional_chat_templates|(special_tokens_map|added_tokens)\.json|model_card\.md|"
    + re.escape(PARTIAL)
)


def save(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    tokenizer=None,
    dtype: str = "float32",
    generation: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, safetensors, and where they are given the tokenizer and generation_config.json.

    The family is the first that computes exactly this network (gpt2 for GPT-3's shapes, gpt_neo with unscaled scores
    and local windows, …). A language model opens with `AutoModelForCausalLM`; a scalar head with
    `AutoModelForSequenceClassification`, whose logit at the last token that is not PAD, plus `reward_bias` of
    config.json, is the score.

    A PAD id beyond the vocabulary: a scalar head gets embedding rows of zeros up to it, since HF's classifiers feed it;
    a language model must not (each row would be one more token to sample), so its tokenizer pads with EOS instead and
    forgets its PAD: no id of an export lies beyond the rows of its embedding.

    Args:
      directory: made if it is not there; an earlier export in it is replaced whole, in one go at the end, and nothing
        of it stays.
      params: as trained (stacked, vocabulary padded), on any mesh. With several processes all of them call this with
        the same arguments, and the first one writes.
      tokenizer: of transformers; its EOS, BOS and PAD ids go into config.json, which without one has none. A scalar
        head needs a PAD of its own; without, HF's classifiers score single sequences only.
      dtype: of the tensors, 'float32' or 'bfloat16'.
      generation: of the checkpoint that training began with (see `read_generation`): how a language model is sampled.
        Of its end tokens those stay that the model has, or the tokenizer's EOS where there are none; BOS and PAD are
        the tokenizer's.
      shard_bytes: a file's size above which there are several, with an index.

    Raises:
      ValueError: no family computes this network, parameters of other shapes than `config` has, a tokenizer that does
        not fit, another dtype, or a directory that `check_directory` refuses.
    """
    check_directory(directory)
    if dtype not in storage.WRITTEN:
        raise ValueError(f"dtype must be one of {sorted(storage.WRITTEN)}, got {dtype!r}")
    family = family_of(config)
    flat = flatten(params)
    abstract = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    wanted = {name: x.shape for name, x in flatten(abstract).items()}
    got = {name: np.shape(x) for name, x in flat.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ValueError(f"params must have {name} of shape {wanted.get(name)}, got {got.get(name)}")

    raw = fields.write(family, config) | {"dtype": dtype}
    rows = config.vocab_size
    if tokenizer is not None:
        tokenizer, ids = _special_tokens(config, tokenizer)
        raw |= ids
        if config.head == "scalar":
            rows = raw["vocab_size"] = max(rows, ids["pad_token_id"] + 1)
    else:  # not what the class takes for them: GPT-2's are beyond most vocabularies
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if config.head == "scalar":
        raw["reward_bias"] = float(_fetch(flat["scalar_head/bias"]))

    axis_sizes = layout.sizes(config)
    held = file_tensors(family, config, list(wanted))
    file_sizes = axis_sizes | {"V": rows}
    shapes = {tensor: layout.shape(parts[0][2], file_sizes) for tensor, parts in held.items()}
    arrays = _arrays(family, flat, held, axis_sizes, rows)
    if jax.process_index() == 0:
        texts = {"config.json": raw}
        if generation and config.head == "lm":
            texts[storage.GENERATION] = _generation(generation, raw, rows)
        write_tensors = functools.partial(
            storage.write_safetensors, shapes=shapes, arrays=arrays, dtype=dtype, shard_bytes=shard_bytes
        )
        _write(pathlib.Path(paths.expand(directory)), texts, write_tensors, tokenizer)
    else:
        for _ in arrays:  # gathering an array is the work of all processes
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {directory}")


def check_directory(directory: str | os.PathLike, key: str = "directory") -> None:
    """Refuses a directory that `save` must not replace.

    Args:
      directory: where an export is to go; it need not be there.
      key: its name in errors.

    Raises:
      ValueError: it is not local, no directory, or holds anything but an export: a file that no export writes, or a
        model that transformers saved.
    """
    if "://" in os.fspath(directory):
        raise ValueError(f"{key} must be a local one, got {os.fspath(directory)!r}")
    path = pathlib.Path(paths.expand(directory))
    if path.exists() and not path.is_dir():
        raise ValueError(f"{key} must be a directory, got the file {path}")
    names = sorted(file.name for file in path.iterdir() if file.name != COMPILED) if path.exists() else []
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if foreign:
        found = ", ".join(map(repr, foreign[:5])) + (" and others" if foreign[5:] else "")
        raise ValueError(
            f"{key} must be empty or hold an earlier export, got {path} with {found}, which no export writes"
        )
    if names and PARTIAL not in names:  # which an export that was broken off leaves
        raw = storage.read_json(path / "config.json") if "config.json" in names else {}
        if "model_type" not in raw:
            raise ValueError(f"{key} must be empty or hold an earlier export, got {path} without a model's config.json")
        if "transformers_version" in raw:
            raise ValueError(f"{key} must be empty or hold an earlier export, got {path}, which transformers wrote")


def _special_tokens(config: ModelConfig, tokenizer) -> tuple[Any, dict[str, int | None]]:
    """The tokenizer to save and its ids for config.json, checked against the model's vocabulary."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():
        if name != "pad_token" and isinstance(token, str) and ids.get(token, 0) >= config.vocab_size:
            raise ValueError(f"tokenizer.{name}_id must be below vocab_size={config.vocab_size}, got {ids[token]}")
    if config.head == "scalar" and (pad is None or pad == eos):
        raise ValueError(
            f"tokenizer.pad_token_id must be an id of its own, or a classifier cannot tell EOS from padding; got {pad} "
            f"with eos_token_id {eos}"
        )
    token = max(ids, key=lambda token: -1 if token == tokenizer.pad_token else ids[token])
    if ids[token] >= config.vocab_size:
        raise ValueError(
            f"tokenizer must have ids below vocab_size={config.vocab_size} only, got {ids[token]} for {token!r}"
        )
    if config.head == "lm" and pad is not None and pad >= config.vocab_size:
        if eos is None:
            raise ValueError(f"tokenizer.pad_token_id must be below vocab_size={config.vocab_size}, got {pad}")
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token, pad = tokenizer.eos_token, eos
    return tokenizer, {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": pad}


def _generation(generation: Mapping[str, Any], raw: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """generation_config.json: ids are of this model and its tokenizer."""
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    ends = [token for token in ends if token is not None and token < rows] or [raw["eos_token_id"]]
    made = dict(generation) | {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    return made | {key: raw[key] for key in ("bos_token_id", "pad_token_id") if key in raw}


def _arrays(family: Family, flat: dict, held: dict, axis_sizes: dict[str, int], rows: int) -> Iterator[np.ndarray]:
    """The file's tensors in order, one at a time on the host."""
    for parts in held.values():
        ours = []
        for name, layer, _ in parts:
            x = flat[name]
            x = _fetch(x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False))
            if layout.OURS[name].startswith("V"):
                x = x[: axis_sizes["V"]]
                x = np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), np.float32)]) if rows > len(x) else x
            ours.append(x)
        name, _, file_layout = parts[0]
        sizes = axis_sizes | {"V": len(ours[0])} if layout.OURS[name].startswith("V") else axis_sizes
        yield layout.assemble(ours, file_layout, layout.OURS[name], sizes)


def _fetch(x) -> np.ndarray:
    """An array of any mesh, whole and float32 on the host."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, np.float32)


def _write(directory: pathlib.Path, texts: dict[str, dict], write_tensors: Callable, tokenizer) -> None:
    """Writes everything beside its place, and moves it there when it is whole.

    Without a config.json nothing opens the directory: it goes first and comes last, so that a process killed in between
    leaves no mixture of two exports that loads.

    Args:
      texts: name of a JSON file -> what it holds; config.json is one of them.
      write_tensors: writes the tensors into a folder.
    """
    partial = directory / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial)
    if tokenizer is not None:
        with errors.naming(partial):
            _write_tokenizer(partial, tokenizer, texts["config.json"]["vocab_size"])
    for name, content in texts.items():
        with errors.naming(partial / name):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    (directory / "config.json").unlink(missing_ok=True)
    for old in directory.iterdir():
        if old == partial or not (OURS.fullmatch(old.name) or old.name == COMPILED):
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, directory / file.name)
    partial.rmdir()


def _write_tokenizer(directory: pathlib.Path, tokenizer, rows: int) -> None:
    """The tokenizer, without the tokens that the embedding has no row for (a PAD that EOS stands in for)."""
    tokenizer.save_pretrained(directory)
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    file, config_file = directory / "tokenizer.json", directory / "tokenizer_config.json"
    raw, config = storage.read_json(file), storage.read_json(config_file)
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in beyond]
    words = raw["model"]["vocab"]  # a list by id of Unigram, else ids by word
    raw["model"]["vocab"] = words[:rows] if isinstance(words, list) else {w: i for w, i in words.items() if i < rows}
    raw["padding"] = None  # which names the id that an earlier call padded with
    extra = config.get("extra_special_tokens", [])
    config["extra_special_tokens"] = [token for token in extra if token not in beyond]
    for path, value in ((file, raw), (config_file, config)):
        path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
