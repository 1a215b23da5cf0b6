"""Files of a checkpoint: safetensors read through memory maps and written as a stream, torch's `.bin`, and the Hub.

safetensors is 8 bytes (the header's length), a JSON header {name: dtype, shape, data_offsets}, then the data. Reading
through a map gives a view of each tensor (bfloat16 too, which numpy itself does not have) of which only what is used is
ever in memory, and checks a file's length against its header before anything is read; writing tensor by tensor holds
one at a time.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import huggingface_hub
import jax.numpy as jnp
import numpy as np

from instructgpt_jax import errors, paths

DTYPES = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(jnp.bfloat16)}
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
_CONFIG_FILES = ("*.json", "*.model", "*.txt")


class Stored(NamedTuple):
    """One tensor of a checkpoint: where it is, its shape, and a function that opens it as an array."""

    file: str
    shape: tuple[int, ...]
    open: Callable[[], np.ndarray]


def find(name: str | os.PathLike, weights: bool) -> pathlib.Path:
    """The local directory of a checkpoint: itself, or the download of a Hub id `owner/model`.

    Args:
      name: a directory or a Hub id.
      weights: fetch the weights too, not only configuration and tokenizer.

    Raises:
      ValueError: no such directory, and nothing of that name can be fetched.
    """
    directory = pathlib.Path(paths.expand(name))
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ValueError(f"{str(name)!r} must be a directory in Hugging Face format or a Hub id `owner/model`")
    try:
        fetched = pathlib.Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(_CONFIG_FILES)))
        if weights:
            huggingface_hub.snapshot_download(str(name), allow_patterns=["*.safetensors"])
            if not list(fetched.glob("*.safetensors")):
                huggingface_hub.snapshot_download(str(name), allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are one or the other
        raise ValueError(
            f"{str(name)!r} must be a directory, or a Hub id that can be fetched from here; fetching it failed: "
            + " ".join(str(error).split())
        ) from error
    return fetched


def read_json(file: pathlib.Path) -> dict:
    """A JSON object from a file that must be there."""
    if not file.is_file():
        raise ValueError(f"{file} must exist: {file.parent} is no checkpoint in Hugging Face format without it")
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got an error: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def tensors(directory: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name: one safetensors file, several with an index, or the same of `.bin`.

    Raises:
      ValueError: no weights, a missing file of several, a file that is not whole, or `.bin` without torch.
    """
    for single, read in ((SAFETENSORS, _read_safetensors), (BIN, _read_bin)):
        index = directory / f"{single}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map", {})
            missing = sorted({file for file in places.values() if not (directory / file).is_file()})
            if missing:
                raise ValueError(f"{index} names {len(missing)} files that must stand beside it, got none of {missing}")
            found: dict[str, Stored] = {}
            for file in sorted(set(places.values())):
                found |= read(directory / file)
            absent = sorted(set(places) - set(found))
            if absent:
                raise ValueError(f"{index}: {places[absent[0]]} must hold the tensor {absent[0]!r}, got none")
            return found
        if (directory / single).is_file():
            return read(directory / single)
    raise ValueError(f"{directory} must hold {SAFETENSORS}, {SAFETENSORS}.index.json, or {BIN}; got none of them")


def _read_safetensors(file: pathlib.Path) -> dict[str, Stored]:
    length = file.stat().st_size
    with open(file, "rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        if length < 8 or 8 + header_length > length:
            raise ValueError(
                f"{file} must have a header of {header_length} bytes, got {length} bytes in all: truncated"
            )
        try:
            header = json.loads(stream.read(header_length))
        except ValueError:
            raise ValueError(f"{file} must start with a JSON header, got something else: no safetensors file") from None
    header.pop("__metadata__", None)
    start = 8 + header_length
    expected = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if length != expected:
        raise ValueError(f"{file} must have {expected} bytes by its header, got {length}: truncated or damaged")
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} must be of dtype {sorted(DTYPES)}, got {entry['dtype']!r}")
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{file}: tensor {name!r} of shape {shape} must have {math.prod(shape) * dtype.itemsize} bytes, "
                f"got {end - begin}"
            )
        found[name] = Stored(str(file), shape, _mapped(file, start + begin, end - begin, dtype, shape))
    return found


def _mapped(file: pathlib.Path, offset: int, length: int, dtype: np.dtype, shape: tuple[int, ...]):
    return lambda: np.memmap(file, np.uint8, "r", offset, (length,)).view(np.ndarray).view(dtype).reshape(shape)


def _read_bin(file: pathlib.Path) -> dict[str, Stored]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{file} can only be read with torch; without it convert the directory once, where torch is installed: "
            f"transformers.AutoModelForCausalLM.from_pretrained(d).save_pretrained(d)"
        ) from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{file} must be a state dict that torch can load with weights_only, got {error!r}") from error

    def opened(tensor):
        if tensor.dtype == torch.bfloat16:
            return lambda: tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
        return lambda: tensor.contiguous().numpy()

    return {name: Stored(str(file), tuple(x.shape), opened(x)) for name, x in state.items() if hasattr(x, "shape")}


def write_safetensors(
    directory: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[np.ndarray], shard_bytes: int
) -> None:
    """Writes float32 tensors as one file, or as several of at most `shard_bytes` with an index.

    Args:
      directory: exists.
      shapes: name -> shape, in the order of `arrays`.
      arrays: the tensors; drawn one at a time.
      shard_bytes: a file ends before the tensor that would make it longer.
    """
    size = lambda name: 4 * math.prod(shapes[name])  # noqa: E731
    groups: list[list[str]] = [[]]
    for name in shapes:
        if groups[-1] and sum(map(size, groups[-1])) + size(name) > shard_bytes:
            groups.append([])
        groups[-1].append(name)
    stem = SAFETENSORS.removesuffix(".safetensors")
    files = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = [SAFETENSORS] if len(groups) == 1 else files
    arrays = iter(arrays)
    for file, names in zip(files, groups, strict=True):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [offset, offset + size(name)]}
            offset += size(name)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as readers like it
        with errors.naming(directory / file), open(directory / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array = next(arrays)
                if array.shape != tuple(shapes[name]) or array.dtype != np.float32:
                    raise ValueError(f"{name} must be float32 {shapes[name]}, got {array.dtype} {array.shape}")
                stream.write(np.ascontiguousarray(array).data)
            stream.flush()
            os.fsync(stream.fileno())
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(map(size, shapes))},
            "weight_map": {name: file for file, names in zip(files, groups, strict=True) for name in names},
        }
        (directory / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2))
