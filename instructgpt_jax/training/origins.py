"""Where the parameters of an entry of `config.models` come from: fresh, an earlier stage, or Hugging Face.

networks.py makes networks of it.
"""

import dataclasses
import json
import pathlib
import re
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import models
from instructgpt_jax.models import RUNTIME_FIELDS, Adapter, ModelConfig, adapters, hf, quantised
from instructgpt_jax.models.hf import peft, storage
from instructgpt_jax.sharding import param_shardings
from instructgpt_jax.training import checkpoint

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
ENTRY_FIELDS = ("size", "init_from", "weights", "version", "architecture", "adapter")


class Source(NamedTuple):
    """Where parameters come from.

    kind: 'fresh', 'stage', 'hf', or 'checkpoint': of the workdir itself, which the loop restores.
    config: the architecture.
    place: directory or Hub id.
    version: of that place, which may hold other weights later: 'step N' of a stage, else what hf.version says.
    path: where that version is read: a checkpoint's folder, a directory, or `owner/model@commit`.
    which: the subtree of a stage's state.
    adapter, base: of a stage that trained an adapter: that adapter, and where what it stands on comes from.
    """

    kind: str
    config: ModelConfig
    place: str = ""
    version: str = ""
    path: str = ""
    which: str = ""
    adapter: Adapter | None = None
    base: "Source | None" = None


def load_adapter(source: Source, mesh: Mesh) -> tuple[ModelConfig, dict]:
    """The network of a source with its adapter, and what a stage trained of it."""
    config = source.config.replace(adapter=source.adapter)
    return config, checkpoint.load_params(source.path, abstract_trained(config, mesh), source.which)


def find(key: str, entry: ConfigDict | dict, vocab_size: int) -> Source:
    """Where the parameters of an entry come from, and their architecture with what the entry sets."""
    fields = {field: value for field, value in entry.items() if field not in ENTRY_FIELDS}
    source = _locate(key, entry, fields, vocab_size)
    shape = source.config.without_dropout().replace(**{f: v for f, v in fields.items() if f in RUNTIME_FIELDS})
    return source._replace(config=shape)


def _locate(key: str, entry: ConfigDict | dict, fields: dict, vocab_size: int) -> Source:
    """Where the parameters of an entry come from, and the architecture found there."""
    init_from = entry.get("init_from", "")
    if not init_from:
        size = entry.get("size", "")
        if size not in models.SIZES:
            raise ValueError(f"{key}.size must be one of {sorted(models.SIZES)}, got {size!r}")
        return Source("fresh", models.SIZES[size].replace(**{"vocab_size": vocab_size} | fields))
    foreign = sorted(set(fields) - set(RUNTIME_FIELDS))
    if foreign:
        raise ValueError(
            f"{key} takes its architecture from init_from={init_from!r}: only {RUNTIME_FIELDS} may be set beside it, "
            f"got {foreign}"
        )
    if entry.get("architecture"):
        return Source("checkpoint", ModelConfig(**_tuples(entry["architecture"])))
    path, version = epath.Path(init_from), entry.get("version", "")
    kind, _, number = version.partition(" ")
    if not path.exists():
        if is_hub_id(init_from):
            try:
                version = version if kind == "commit" else hf.version(init_from)
                pinned = f"{init_from}@{version.removeprefix('commit ')}"
                return Source("hf", hf.read_config(pinned), init_from, version, pinned)
            except ValueError as error:
                raise ValueError(f"{key}.init_from: {error}") from error
        raise ValueError(f"{key}.init_from must exist, got {init_from!r}{_how_to_make(init_from)}")
    try:
        if _is_hugging_face(path):
            found = Source("hf", hf.read_config(init_from), init_from, hf.version(init_from), init_from)
        else:
            step = int(number) if kind == "step" and not path.name.isdigit() else None
            folder = str(checkpoint.find(init_from, step))
            saved, found = checkpoint.read_metadata(folder)["config"], None
    except FileNotFoundError:
        if version:
            _check_version(key, init_from, version, f"steps {checkpoint.steps(init_from)}")
        raise ValueError(
            f"{key}.init_from must hold a checkpoint or a Hugging Face model, got {init_from!r}"
            + (storage.hint(path) or _how_to_make(init_from))
        ) from None
    except ValueError as error:
        raise ValueError(f"{key}.init_from must be whole, got {init_from!r}: {error}") from error
    now = found.version if found else f"step {epath.Path(folder).name}"
    _check_version(key, init_from, version, now)
    if found:
        return found
    name, prefix = ("policy", "policy/") if "policy" in saved["models"] else ("model", "")
    parts = _parts(folder, prefix)
    weights = entry.get("weights", "") or ("ema" if "ema" in parts else "params")
    if weights not in parts:
        raise ValueError(f"{key}.weights must be one of {parts} of {init_from!r}, got {weights!r}")
    config = ModelConfig(**_tuples(saved["models"][name]["architecture"]))
    whole = config.replace(adapter=None)
    found = Source("stage", whole, init_from, now, folder, prefix + weights, config.adapter)
    if config.adapter is None:
        return found
    theirs = {field: saved["models"][name].get(field, "") for field in ("init_from", "weights", "version")}
    base = _locate(f"{key}: in {init_from}, config.models.{name}", theirs, {}, vocab_size)
    check_base(key, init_from, theirs["init_from"], config, base.config)
    return found._replace(base=base)


def _check_version(key: str, init_from: str, version: str, now: str) -> None:
    """Refuses other weights than those that were read at first, where it is known which those were."""
    if version not in ("", now):
        raise ValueError(
            f"{key}.init_from must still hold what was read at first, {version}, got {now} in {init_from!r}: put it "
            "back, or train anew in a new --workdir"
        )


def check_base(key: str, adapter: str, base: str, made_for: ModelConfig, found: ModelConfig) -> None:
    """Refuses an adapter whose base is another network than the one that it was trained on.

    Args:
      adapter, base: where they are.
      made_for: of the base that it was trained on; head, dropout and precision are the adapter's own.
    """
    if made_for.digest() != found.digest():
        mine, theirs = (dataclasses.asdict(config) for config in (made_for, found))
        differ = {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
        own = {"head", "adapter", *RUNTIME_FIELDS}
        listed = ", ".join(f"{name} {old} and now {new}" for name, (old, new) in differ.items() if name not in own)
        raise ValueError(f"{key}: the adapter in {adapter} was made for another base than {base}: {listed}")


def _is_hugging_face(path: epath.Path) -> bool:
    """Whether a folder's config.json is that of a Hugging Face model, or it is PEFT's; a run's has no `model_type`."""
    file = path / "config.json"
    if (path / peft.CONFIG).exists() and not file.exists():
        return True
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:  # also what is no UTF-8
        raise ValueError(f"{file} must be JSON, got an error: {error}") from None
    return isinstance(found, dict) and "model_type" in found


def load(source: Source, mesh: Mesh) -> dict:
    """The float32 parameters of a source that is not fresh; an adapter is merged into its base."""
    if source.kind == "hf":
        return hf.load(source.path, mesh)[1]
    if source.adapter is None:
        return checkpoint.load_params(source.path, abstract(source.config, mesh), source.which)
    config, base, trained = _taken_apart(source, mesh)
    merge = jax.jit(
        lambda base, params: adapters.merged(adapters.join(config, base, params)),
        out_shardings=jax.tree.map(lambda x: x.sharding, abstract(config, mesh)),
        donate_argnums=() if source.adapter.base else 0,
    )
    return merge(base, trained)


def _taken_apart(source: Source, mesh: Mesh) -> tuple[ModelConfig, dict, dict]:
    """The network of a source with an adapter, the base that it was trained on, stored as it was then, and itself."""
    config, trained = load_adapter(source, mesh)
    form = source.adapter.base
    base = load_quantised(source.base, mesh, form) if form else load(source.base, mesh)
    return config, {name: tree for name, tree in base.items() if name != "head" or config.head == "lm"}, trained


def load_quantised(source: Source, mesh: Mesh, form: str) -> dict:
    """As `load`, with quantised kernels, see quantised.store; adapters stay beside them and are not merged.

    For a sum of both would be rounded to the levels of the kernel, which lie further apart than what SFT changes.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_quantised(source, mesh, form))
    if source.adapter is None:
        store = jax.jit(lambda params: quantised.store(params, form), out_shardings=shardings, donate_argnums=0)
        return store(load(source, mesh))
    config, base, trained = _taken_apart(source, mesh)
    join = lambda base, params: quantised.store(adapters.join(config, base, params), form)  # noqa: E731
    return jax.jit(join, out_shardings=shardings)(base, trained)


def abstract_quantised(source: Source, mesh: Mesh, form: str) -> dict:
    """Shapes and shardings of `load_quantised`."""

    def shapes(source, form):
        if source.adapter is None:
            return quantised.abstract(abstract(source.config, mesh), form)
        config, theirs = source.config.replace(adapter=source.adapter), source.adapter.base
        base = shapes(source.base, theirs) if theirs else abstract(source.base.config, mesh)
        base = {name: tree for name, tree in base.items() if name != "head" or config.head == "lm"}
        joined = lambda base, params: adapters.join(config, base, params)  # noqa: E731
        return quantised.abstract(jax.eval_shape(joined, base, abstract_trained(config, mesh)), form)

    return laid_out(shapes(source, form), mesh)


def abstract(network: ModelConfig, mesh: Mesh) -> dict:
    """Shapes and shardings of a network's parameters."""
    return laid_out(jax.eval_shape(lambda: models.init(network, jax.random.key(0))), mesh)


def laid_out(shapes: dict, mesh: Mesh) -> dict:
    """Shapes of parameters with their shardings."""
    describe = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(describe, shapes, param_shardings(mesh, shapes))


def abstract_trained(network: ModelConfig, mesh: Mesh) -> dict:
    """Shapes and shardings of what trains of a network with an adapter."""

    def trained():
        params = models.init(network, jax.random.key(0))
        return adapters.trained_part(network, params, jax.random.key(0))

    return laid_out(jax.eval_shape(trained), mesh)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no directory can be a Hugging Face Hub id, `owner/model`; `runs/…` are our workdirs."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(("runs/", ".", "~"))


def _parts(directory: str, prefix: str) -> list[str]:
    """Which of a stage's weights were saved."""
    saved = checkpoint.read_shapes(directory, prefix.rstrip("/"))
    return sorted(name for name in ("ema", "params") if jax.tree.leaves(saved.get(name)))


def _how_to_make(init_from: str) -> str:
    """The command that makes `runs/<name>`, where there is a configuration of that name."""
    parts = pathlib.PurePosixPath(init_from).parts
    if len(parts) >= 2 and parts[0] == "runs" and (CONFIGS / f"{parts[1]}.py").exists():
        return f"; make it with: python -m instructgpt_jax.main --config=configs/{parts[1]}.py"
    return ""


def _tuples(architecture: dict) -> dict:
    """JSON's lists as the tuples they were."""
    freeze = lambda value: tuple(map(freeze, value)) if isinstance(value, list | tuple) else value  # noqa: E731
    return {field: freeze(value) for field, value in architecture.items()}
