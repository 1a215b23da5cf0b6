"""Files of a checkpoint: safetensors read through memory maps and written as a stream, torch's `.bin`, and the Hub.

safetensors is 8 bytes (the header's length), a JSON header {name: dtype, shape, data_offsets}, then the data. Reading
through a map gives a view of each tensor (bfloat16 too, which numpy itself does not have) of which only what is used is
ever in memory, and checks a file's length against its header before anything is read; writing tensor by tensor holds
one at a time.
"""

import functools
import hashlib
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
import safetensors
from etils import epath

from instructgpt_jax import errors, paths

DTYPES = {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(jnp.bfloat16)}
WRITTEN = {"float32": "F32", "bfloat16": "BF16"}  # dtypes of an export, and their names in DTYPES
SAFETENSORS, BIN, GENERATION = "model.safetensors", "pytorch_model.bin", "generation_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SAMPLES, SAMPLE_BYTES = 64, 4096  # of every file, see `digest`
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "adapter_config.json")
_CONFIG_FILES = ("*.json", "*.model", "*.txt")


class Stored(NamedTuple):
    """One tensor of a checkpoint.

    file: where it is.
    shape: its shape.
    open: () -> the tensor as an array.
    fault: what is wrong with it, '' = nothing. Of no concern unless it is a parameter: a causal mask may be anything.
    """

    file: str
    shape: tuple[int, ...]
    open: Callable[[], np.ndarray]
    fault: str = ""


def find(name: str | os.PathLike, weights: bool) -> pathlib.Path:
    """The local directory of a checkpoint: itself, or the download of a Hub id `owner/model`.

    Args:
      name: a directory or a Hub id, whose newest commit is taken; that of `owner/model@commit` is the one named.
      weights: fetch the weights too, not only configuration and tokenizer.

    Raises:
      ValueError: no such directory, and nothing of that name can be fetched.
    """
    directory = pathlib.Path(paths.expand(name))
    if directory.is_dir():
        return directory
    repo, _, commit = str(name).partition("@")
    if not HUB_ID.fullmatch(repo):
        raise ValueError(
            f"{str(name)!r} must be a directory in Hugging Face format or a Hub id `owner/model`{hint(directory)}"
        )
    try:
        fetch = functools.partial(huggingface_hub.snapshot_download, repo, revision=commit or None)
        fetched = pathlib.Path(fetch(allow_patterns=list(_CONFIG_FILES)))
        if weights:
            fetch(allow_patterns=["*.safetensors"])
            if not list(fetched.glob("*.safetensors")):
                fetch(allow_patterns=["pytorch_model*.bin"])
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are one or the other
        raise ValueError(
            f"{str(name)!r} must be a directory, or a Hub id that can be fetched from here; where there is a network, "
            f"`hf download {name} --local-dir DIR` makes a directory of it; got: {' '.join(str(error).split())}"
        ) from error
    return fetched


def digest(*directories: pathlib.Path) -> str:
    """What tells the weights in directories from others of the same shapes: 16 digits.

    Of the names, the sizes and some bytes of their files, evenly spread: training changes nearly every weight, and to
    read them all would take as long as to load them.
    """
    found = hashlib.sha256()
    for directory in directories:
        for file in sorted({file for pattern in _WEIGHTS for file in directory.glob(pattern)}):
            size = file.stat().st_size
            found.update(f"{file.name} {size} ".encode())
            with open(file, "rb") as stream:
                for number in range(SAMPLES):
                    stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    found.update(stream.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def hint(path: pathlib.Path | epath.Path) -> str:
    """What to do with a GGUF file, or a folder of them, in a place where a checkpoint is wanted; '' for others."""
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or not files[0].is_file():
        return ""
    return f"; of {files[0]} make one with: python benchmarks/gguf_to_hf.py --gguf={files[0]} --out=DIR"


def read_json(file: pathlib.Path | epath.Path) -> dict:
    """A JSON object from a file that must be there."""
    if not file.is_file():
        raise ValueError(
            f"{file} must exist: {file.parent} is no checkpoint in Hugging Face format without it{hint(file.parent)}"
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got an error: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def tensors(directory: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name: one safetensors file, else several with an index, else the same of `.bin`.

    This order is that of transformers: where two of them lie in one folder, both read the same weights. Of an index,
    too, both read the files that it names, wherever in them a tensor is.

    Raises:
      ValueError: no weights, a missing file of several, a file that is not whole, or `.bin` without torch.
    """
    for single, read in ((SAFETENSORS, _read_safetensors), (BIN, _read_bin)):
        if (directory / single).is_file():
            return read(directory / single)
        index = directory / f"{single}.index.json"
        if not index.is_file():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: weight_map must be an object of tensors and their files, got {places!r:.80}")
        files = sorted(set(places.values()))
        missing = [file for file in files if not (directory / file).is_file()]
        if missing:
            raise ValueError(f"{index} names {len(missing)} files that must stand beside it, got none of {missing}")
        found: dict[str, Stored] = {}
        for file in files:
            for name, tensor in read(directory / file).items():
                if name in found:
                    other = found[name].file
                    tensor = tensor._replace(fault=f"must stand in one file that {index} names, got {other} too")
                found[name] = tensor
        return found
    raise ValueError(
        f"{directory} must hold {SAFETENSORS}, {SAFETENSORS}.index.json, or {BIN}; got none of them{hint(directory)}"
    )


def adapter_tensors(directory: pathlib.Path, stem: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of an adapter in PEFT's format, and the metadata of their file.

    Raises:
      ValueError: none is there, one that is not whole, or `.bin` without torch.
    """
    file = directory / f"{stem}.safetensors"
    if file.is_file():
        found = _read_safetensors(file)
        with safetensors.safe_open(file, "np") as opened:
            return found, dict(opened.metadata() or {})
    if not file.with_suffix(".bin").is_file():
        raise ValueError(f"{directory} must hold {file.name} or {stem}.bin beside its adapter_config.json, got neither")
    return _read_bin(file.with_suffix(".bin")), {}


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
            header.pop("__metadata__", None)
            entries = {name: (x["dtype"], tuple(x["shape"]), *x["data_offsets"]) for name, x in header.items()}
            start = 8 + header_length
            expected = start + max((end for *_, end in entries.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{file} must start with a JSON header, got something else: no safetensors file") from None
    if length != expected:
        raise ValueError(f"{file} must have {expected} bytes by its header, got {length}: truncated or damaged")
    found = {}
    for name, (kind, shape, begin, end) in entries.items():
        dtype = DTYPES.get(kind)
        fault = "" if dtype else _wrong_dtype(kind)
        if dtype and end - begin != math.prod(shape) * dtype.itemsize:
            fault = f"of shape {shape} must have {math.prod(shape) * dtype.itemsize} bytes, got {end - begin}"
        found[name] = Stored(str(file), shape, _mapped(file, start + begin, end - begin, dtype, shape), fault)
    return found


def _wrong_dtype(dtype) -> str:
    return f"must be of dtype {sorted(DTYPES)}, got {str(dtype)!r}"


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

    def stored(tensor):
        def opened():
            if tensor.dtype == torch.bfloat16:
                return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
            return tensor.contiguous().numpy()

        readable = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        return Stored(str(file), tuple(tensor.shape), opened, "" if readable else _wrong_dtype(tensor.dtype))

    return {name: stored(x) for name, x in state.items() if hasattr(x, "shape")}


def write_safetensors(
    directory: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
    dtype: str,
    shard_bytes: int,
    stem: str = SAFETENSORS.removesuffix(".safetensors"),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as one file, or as several of at most `shard_bytes` with an index.

    Args:
      directory: exists.
      shapes: name -> shape, in the order of `arrays`.
      arrays: the tensors in float32; drawn one at a time.
      dtype: one of WRITTEN, that they are rounded to (to the nearest, halves to even).
      shard_bytes: a file ends before the tensor that would make it longer.
      stem: of the files' names.
      metadata: of each file, beside its format.
    """
    kind = DTYPES[WRITTEN[dtype]]
    size = lambda name: kind.itemsize * math.prod(shapes[name])  # noqa: E731
    groups: list[list[str]] = [[]]
    for name in shapes:
        if groups[-1] and sum(map(size, groups[-1])) + size(name) > shard_bytes:
            groups.append([])
        groups[-1].append(name)
    files = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = [f"{stem}.safetensors"] if len(groups) == 1 else files
    arrays = iter(arrays)
    for file, names in zip(files, groups, strict=True):
        header, offset = {"__metadata__": {"format": "pt"} | dict(metadata or {})}, 0
        for name in names:
            offsets = [offset, offset + size(name)]
            header[name] = {"dtype": WRITTEN[dtype], "shape": shapes[name], "data_offsets": offsets}
            offset += size(name)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as readers like it
        with errors.naming(directory / file), open(directory / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array = next(arrays)
                if array.shape != tuple(shapes[name]) or array.dtype != np.float32:
                    raise ValueError(f"{name} must be float32 {shapes[name]}, got {array.dtype} {array.shape}")
                stream.write(np.ascontiguousarray(array.astype(kind, copy=False)).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(map(size, shapes))},
            "weight_map": {name: file for file, names in zip(files, groups, strict=True) for name in names},
        }
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
