"""From a directory in Hugging Face format to parameters on the devices, tensor by tensor.

Everything that can be wrong is looked for in the headers first; then each device's shard of each tensor is cut out of
the memory-mapped file, so that the host never holds more than one tensor. Layers are written into their stacked array
one at a time, on the devices.
"""

import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax import paths
from instructgpt_jax.models import transformer
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.models.hf import fields, layout, peft, storage
from instructgpt_jax.models.hf.families import FAMILIES, Family
from instructgpt_jax.models.hf.storage import Stored
from instructgpt_jax.sharding import param_shardings, path_name

REWARD_BIAS_KEY = peft.BIAS
REWARD_BIAS = "scalar_head/bias"  # lives in config.json, key `reward_bias`: HF's classes have no place for it


def load(directory: str | os.PathLike, mesh: Mesh | None = None) -> tuple[ModelConfig, dict]:
    """Reads a checkpoint of any family of families.py.

    Args:
      directory: holds config.json and safetensors (or, with torch installed, `.bin`), in one file or in several with an
        index, of which the first of this order counts, as in transformers; or an adapter in PEFT's format, which is
        added to its base; or it is a Hub id `owner/model`, perhaps with `@commit`.
      mesh: where the parameters go, by the training rules; None = the default device.

    Returns:
      The configuration, and float32 parameters whatever the files' dtype. Embeddings have `padded_vocab_size` rows,
      those beyond the vocabulary zero. A checkpoint for sequence classification with one label has a scalar head.

    Raises:
      ValueError: an unsupported architecture or option, a parameter that is missing, of the wrong shape or of integers,
        an unexpected tensor, a file that is missing or not whole, a mesh that does not divide the parameters. Raised
        before any device memory is taken.
    """
    path, adapter = _located(directory, weights=True)
    family, config, raw = _configuration(path, adapter)
    shapes = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    shardings = None if mesh is None else flatten(param_shardings(mesh, shapes))
    shapes = {name: x.shape for name, x in flatten(shapes).items()}
    found = storage.tensors(path)
    if adapter is not None:
        found = peft.changed(adapter, family, config, found)
        raw = raw | ({REWARD_BIAS_KEY: peft.reward_bias(adapter)} if config.head == "scalar" else {})
    stored = _match(family, config, list(shapes), found, path)
    bias = raw.get(REWARD_BIAS_KEY, 0.0)
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise ValueError(f"{path / 'config.json'}: reward_bias must be a finite number, got {bias!r}")

    axis_sizes = layout.sizes(config)

    def put(name: str, layer: int | None = None) -> jax.Array:
        """One parameter, or one layer of it, on the devices."""
        sharding = None if shardings is None else shardings[name]
        shape = shapes[name]
        if layer is not None:
            shape = shape[1:]
            sharding = sharding and NamedSharding(mesh, P(*sharding.spec[1:]))
        if name == REWARD_BIAS:
            read = lambda index: np.array(bias, np.float32)  # noqa: E731
        else:
            tensor, file_layout = stored[name if layer is None else f"{name}:{layer}"]
            read = functools.partial(_read, tensor, file_layout, layout.OURS[name], axis_sizes, shape)
        return jax.block_until_ready(_put(shape, sharding, read))

    flat = {name: put(name) for name in shapes if not name.startswith("blocks/")}
    blocks = {
        name: jnp.zeros(shape, jnp.float32, device=None if shardings is None else shardings[name])
        for name, shape in shapes.items()
        if name.startswith("blocks/")
    }
    for layer in range(config.num_layers):
        # Waited for, so that at most one layer is on its way and the host's copies of it are gone.
        blocks = jax.block_until_ready(_place(blocks, {name: put(name, layer) for name in blocks}, np.int32(layer)))
    return config, unflatten(flat | blocks)


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """The configuration alone, from config.json of a directory or Hub id; no weight is read.

    Raises:
      ValueError: as `load`, for what config.json says.
    """
    return _configuration(*_located(directory, weights=False))[1]


def version(directory: str | os.PathLike) -> str:
    """What tells the weights of a directory or Hub id from others that it may hold later: 'commit …' or 'files …'.

    Of an adapter in PEFT's format the files are its own and those of its base, where that is a directory.
    """
    path = storage.find(directory, weights=False)
    if not pathlib.Path(paths.expand(directory)).is_dir():
        return f"commit {path.name}"  # by which the Hub's cache names its folders
    adapter = peft.read(path)
    base = pathlib.Path(paths.expand(adapter.base)) if adapter else path
    return f"files {storage.digest(*(folder for folder in dict.fromkeys((path, base)) if folder.is_dir()))}"


def read_generation(directory: str | os.PathLike) -> dict[str, Any]:
    """generation_config.json of a directory or Hub id, without what transformers notes of itself in it; {} = none.

    Raises:
      ValueError: the file is no JSON object, or ids in it are no numbers.
    """
    path = epath.Path(paths.expand(directory))
    if not path.is_dir() and storage.HUB_ID.fullmatch(str(directory)):
        path = storage.find(directory, weights=False)
    adapter = peft.read(path) if path.is_dir() else None
    if adapter is not None:
        return read_generation(adapter.base)
    file = path / storage.GENERATION
    if not file.is_file():
        return {}
    found = storage.read_json(file)
    ends = found.get("eos_token_id")
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and type(token) is not int:
            raise ValueError(f"{file}: eos_token_id must be an id or a list of ids, got {ends!r}")
    return {key: value for key, value in found.items() if not key.startswith("_") and key != "transformers_version"}


def _located(directory: str | os.PathLike, weights: bool) -> tuple[pathlib.Path, peft.Read | None]:
    """The folder of a checkpoint, and of an adapter in PEFT's format that of its base and what it says."""
    path = storage.find(directory, weights)
    adapter = peft.read(path)
    if adapter is None:
        return path, None
    try:
        return storage.find(adapter.base, weights), adapter
    except ValueError as error:
        raise ValueError(f"{adapter.file}: base_model_name_or_path: {error}") from None


def _configuration(path: pathlib.Path, adapter: peft.Read | None = None) -> tuple[Family, ModelConfig, dict[str, Any]]:
    file = path / "config.json"
    raw = storage.read_json(file)
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(f"{file}: model_type must be one of {list(FAMILIES)}, got {raw.get('model_type')!r}")
    family = FAMILIES[raw["model_type"]]
    config = fields.read(family, raw, str(file))
    if adapter is not None and (config.head, adapter.head) == ("scalar", "lm"):
        raise ValueError(f"{adapter.file}: task_type must be SEQ_CLS for a base that is a classifier, got CAUSAL_LM")
    return family, config if adapter is None else config.replace(head=adapter.head), raw


def file_tensors(family: Family, config: ModelConfig, names: list[str]) -> dict[str, list[tuple[str, int | None, str]]]:
    """Every tensor of the file, and the parameters in it (name, layer, layout there) in the order of its parts."""
    held: dict[str, list[tuple[str, int | None, str]]] = {}
    for name in names:
        if name == REWARD_BIAS:
            continue
        pattern, file_layout = family.tensors[name]
        for layer in range(config.num_layers) if name.startswith("blocks/") else [None]:
            held.setdefault(pattern.format(layer), []).append((name, layer, file_layout))
    return {tensor: sorted(parts, key=lambda part: layout.part(part[2])) for tensor, parts in held.items()}


def _match(
    family: Family, config: ModelConfig, names: list[str], found: Mapping[str, Stored], path: pathlib.Path
) -> dict[str, tuple[Stored, str]]:
    """Finds every parameter's tensor, and no other, each of the shape that config.json implies.

    Returns:
      parameter, or `parameter:layer` -> its tensor and that tensor's layout.
    """
    expected = file_tensors(family, config, names)
    # A checkpoint of the base model alone has the same names without the prefix.
    stored, found = found, {}
    for name, tensor in stored.items():
        whole = family.prefix + name if family.prefix + name in expected else name
        if whole in found:
            raise ValueError(f"{tensor.file}: tensor {name!r} must not be there beside one under {whole!r}, got both")
        found[whole] = tensor

    def check(tensor: str) -> Stored:
        """A tensor that is going to be read; what is never read may be anything."""
        if found[tensor].fault:
            raise ValueError(f"{found[tensor].file}: tensor {tensor!r} {found[tensor].fault}")
        return found[tensor]

    axis_sizes = layout.sizes(config)
    matched = {}
    for tensor, parts in expected.items():
        shape = layout.shape(parts[0][2], axis_sizes)
        if tensor not in found:
            raise ValueError(f"{path} must hold the tensor {tensor!r} of shape {shape}, got none of that name")
        got = check(tensor)
        if got.shape != shape:
            raise ValueError(f"{got.file}: tensor {tensor!r} must have shape {shape}, got {got.shape}")
        for name, layer, file_layout in parts:
            matched[name if layer is None else f"{name}:{layer}"] = (got, file_layout)
    head = family.tensors["head/kernel"][0]
    for tensor in sorted(set(found) - set(expected)):
        if tensor == head and config.head == "lm":
            # Tied, and stored twice. Where the two differ, config.json is wrong about the network.
            if not np.array_equal(check(head).open(), matched["embed/tokens"][0].open()):
                raise ValueError(
                    f"{found[head].file}: tensor {head!r} must equal the embedding under tie_word_embeddings, got "
                    f"another one; set tie_word_embeddings to false in {path / 'config.json'}"
                )
        elif not re.search(family.buffers, tensor):
            raise ValueError(
                f"{found[tensor].file}: tensor {tensor!r} of shape {found[tensor].shape} is unexpected: no part of the "
                f"{family.model_type} network that config.json describes"
            )
    return matched


def _read(
    tensor: Stored, file_layout: str, ours: str, axis_sizes: Mapping[str, int], shape: tuple[int, ...], index: tuple
) -> np.ndarray:
    """A float32 copy of the region `index` of a parameter of `shape`; zero beyond the tensor (padded vocabulary)."""
    whole = layout.view(tensor.open(), file_layout, ours, axis_sizes)
    ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    inside = whole[tuple(slice(start, stop) for start, stop in ranges)]
    region = tuple(stop - start for start, stop in ranges)
    if inside.shape == region:
        return np.array(inside, np.float32, order="C")
    copy = np.zeros(region, np.float32)
    copy[tuple(slice(size) for size in inside.shape)] = inside
    return copy


def _put(shape: tuple[int, ...], sharding: NamedSharding | None, read: Callable[[tuple], np.ndarray]) -> jax.Array:
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


@functools.partial(jax.jit, donate_argnums=0)
def _place(stacked: dict, layers: dict, index: jax.Array) -> dict:
    """Writes one layer of every stacked parameter, in place."""
    return {name: jax.lax.dynamic_update_index_in_dim(x, layers[name], index, axis=0) for name, x in stacked.items()}


def flatten(params) -> dict[str, Any]:
    """A nested dict as one dict by path, `blocks/mlp/up/kernel`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The nested dict of `flatten`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
