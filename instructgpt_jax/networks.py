"""From an entry of `config.models` to a network on the mesh: fresh, from an earlier stage, or from Hugging Face.

An entry is `dict(size=…, init_from=…, weights=…, …)`; its other keys are fields of ModelConfig. `init_from` is the
workdir of an earlier stage (or one of its checkpoints or snapshots), a directory in Hugging Face format, a Hub id, or
empty for a fresh model of the named size. `weights` chooses between the averaged ('ema') and the raw ('params') weights
of a stage that keeps both.

Dropout is the setting of a stage: a network comes without it, wherever from, and has what its entry says.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import models, process, run_tokenizer
from instructgpt_jax.data import datasets, sources
from instructgpt_jax.models import ModelConfig, hf
from instructgpt_jax.sharding import param_shardings
from instructgpt_jax.training import checkpoint

# What may be set on a network that comes with its architecture: it changes the work or the noise, not the function.
RUNTIME_FIELDS = ("dtype", "remat", "attention", "residual_dropout", "embedding_dropout", "attention_dropout")
ENTRY_FIELDS = ("size", "init_from", "weights", "architecture", "recalled")


class Network(NamedTuple):
    """A network of known shape whose parameters can be put on the mesh.

    config: its shape.
    load: () -> parameters, float32, sharded by the training rules.
    abstract: the same tree as ShapeDtypeStructs with shardings.
    grown: whether its scalar head is a fresh one, on the body of a language model.
    """

    config: ModelConfig
    load: Callable[[], dict]
    abstract: dict
    grown: bool = False


class Source(NamedTuple):
    """Where parameters come from.

    kind: 'fresh', 'stage', 'hf', or 'recalled': from the workdir's own checkpoint, by the loop.
    config: the architecture found there.
    which: the subtree of a stage's state.
    """

    kind: str
    config: ModelConfig
    which: str = ""


def build(name: str, config: ConfigDict, head: str, mesh: Mesh, vocab_size: int, seed: int) -> Network:
    """Resolves `config.models[name]` without reading a weight, and records its architecture there.

    Args:
      name: entry of config.models.
      config: the whole configuration; `config.models[name].architecture` is set. Where `resume.recall` has left a
        note, which is taken away, the network goes on from a checkpoint, and its `init_from` is not looked at.
      head: 'lm' or 'scalar', what the stage needs, or '' for the one found there. A scalar head is grown on a language
        model where necessary.
      mesh: where the parameters go.
      vocab_size: of the tokenizer: the size of a fresh model, the least of a given one. No id at or above it stands in
        a text or is sampled (see Tokenizer.allowed), so that networks of different sizes read each other's texts.
      seed: of fresh parameters.

    Raises:
      ValueError: an unknown size or field, a missing init_from (names the command that makes it), a reward model given
        as a language model, a vocabulary too small for the tokenizer, or another tokenizer.
    """
    key = f"config.models.{name}"
    entry = config.models[name].to_dict()
    fields = {field: value for field, value in entry.items() if field not in ENTRY_FIELDS}
    source = _find(key, entry, fields, vocab_size)
    if source.kind in ("stage", "hf") and config.data.tokenizer:
        run_tokenizer.check_shared(key, entry["init_from"], config.data.tokenizer)
    if source.config.vocab_size < vocab_size:
        raise ValueError(
            f"{key} must have a vocabulary of at least the tokenizer's {vocab_size}, got {source.config.vocab_size}"
        )
    if source.config.head == "scalar" and head == "lm":
        raise ValueError(f"{key} must be a language model, got a reward or value model from {entry['init_from']!r}")
    source_network = source.config.replace(**{f: v for f, v in fields.items() if f in RUNTIME_FIELDS})
    grow = head == "scalar" and source_network.head == "lm"
    network = source_network.replace(head=head or source_network.head)
    with config.unlocked():
        config.models[name].architecture = dataclasses.asdict(network)
        if "recalled" in entry:
            del config.models[name].recalled

    fresh_key = jax.random.key(seed)
    source_abstract = _abstract(source_network, mesh)
    abstract = _abstract(network, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def load() -> dict:
        if source.kind == "recalled":
            raise ValueError(f"{key} must go on from a checkpoint of the workdir, got one that has gone meanwhile")
        if source.kind == "fresh":
            return jax.jit(lambda key: models.init(network, key), out_shardings=shardings)(fresh_key)
        if source.kind == "hf":
            _, params = hf.load(entry["init_from"], mesh)
        else:
            params = checkpoint.load_params(entry["init_from"], source_abstract, source.which)
        if not grow:
            return params
        grown = lambda params, key: models.with_scalar_head(source_network, params, key)[1]  # noqa: E731
        return jax.jit(grown, out_shardings=shardings)(params, fresh_key)

    return Network(network, load, abstract, grown=grow and source.kind != "fresh")


def shape(name: str, config: ConfigDict) -> ModelConfig:
    """The architecture of `config.models[name]` where its tokenizer is not known yet; a fresh one has no vocabulary.

    Raises:
      ValueError: an unknown size or field, or an init_from that is missing.
    """
    key, entry = f"config.models.{name}", config.models[name].to_dict()
    fields = {field: value for field, value in entry.items() if field not in ENTRY_FIELDS}
    try:
        found = _find(key, entry, fields, 1).config
        return found.replace(**{field: value for field, value in fields.items() if field in RUNTIME_FIELDS})
    except ValueError as error:
        raise ValueError(f"{error}" if str(error).startswith(key) else f"{key}: {error}") from None


def freeze(network: Network) -> dict:
    """Parameters that will not train, in the dtype they compute in; never the buffers of a network that trains."""
    cast = jax.jit(lambda params: models.cast(params, network.config.dtype), donate_argnums=0)
    return cast(network.load())


def abstract_frozen(network: Network) -> dict:
    """Shapes and shardings of `freeze`."""
    shapes = jax.eval_shape(lambda params: models.cast(params, network.config.dtype), network.abstract)
    return jax.tree.map(
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding), shapes, network.abstract
    )


def check_context(key: str, length: int, *nets: ModelConfig) -> None:
    """Refuses rows that are longer than the context of a network that reads them."""
    for net in nets:
        if length > net.max_length:
            raise ValueError(f"{key} must be at most the model's context of {net.max_length} tokens, got {length}")


def _abstract(network: ModelConfig, mesh: Mesh) -> dict:
    """Shapes and shardings of a network's parameters."""
    shapes = jax.eval_shape(lambda key: models.init(network, key), jax.random.key(0))
    describe = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(describe, shapes, param_shardings(mesh, shapes))


def _find(key: str, entry: dict, fields: dict, vocab_size: int) -> Source:
    """Where the parameters of an entry come from, and their architecture."""
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
    if "recalled" in entry:
        return Source("recalled", ModelConfig(**_tuples(entry["recalled"])))
    path = epath.Path(init_from)
    if not path.exists():
        if is_hub_id(init_from):
            try:
                return Source("hf", hf.read_config(init_from))
            except ValueError as error:
                raise ValueError(f"{key}.init_from: {error}") from error
        raise ValueError(f"{key}.init_from must exist, got {init_from!r}{_how_to_make(init_from)}")
    try:
        if _is_hugging_face(path):
            return Source("hf", hf.read_config(init_from))
        saved = checkpoint.read_metadata(init_from)["config"]
    except FileNotFoundError:
        raise ValueError(
            f"{key}.init_from must hold a checkpoint or a Hugging Face model, got {init_from!r}"
            + _how_to_make(init_from)
        ) from None
    except ValueError as error:
        raise ValueError(f"{key}.init_from must be whole, got {init_from!r}: {error}") from error
    name, prefix = ("policy", "policy/") if "policy" in saved["models"] else ("model", "")
    weights = entry.get("weights", "") or ("ema" if "ema" in _parts(init_from, prefix) else "params")
    if weights not in _parts(init_from, prefix):
        raise ValueError(f"{key}.weights must be one of {_parts(init_from, prefix)} of {init_from!r}, got {weights!r}")
    architecture = ModelConfig(**_tuples(saved["models"][name]["architecture"]))
    return Source("stage", architecture.without_dropout(), prefix + weights)


def _is_hugging_face(path: epath.Path) -> bool:
    """Whether a folder's config.json is that of a Hugging Face model; a run's has no `model_type`."""
    file = path / "config.json"
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:  # also what is no UTF-8
        raise ValueError(f"{file} must be JSON, got an error: {error}") from None
    return isinstance(found, dict) and "model_type" in found


def tell_trained_on(stage: str, init_from: str, valid: sources.Records) -> None:
    """Says in a line where a policy was fine-tuned on prompts that are validation prompts here.

    Args:
      stage: whose validation prompts they are.
      init_from: of the policy; the stages that it went through are looked at, as far as they are still there.
      valid: records of the validation prompts.
    """
    while init_from and epath.Path(init_from).exists():
        try:
            saved = checkpoint.read_metadata(init_from)["config"]
            count = datasets.count_trained_on(valid, saved["data"]) if saved["stage"] == "sft" else 0
        except (FileNotFoundError, ValueError):  # a Hugging Face model, or records that are gone
            return
        if count:
            process.say(
                f"{stage}: {count} of {len(valid)} validation prompts are training prompts of {init_from}, whose "
                "records name other users or none"
            )
        init_from = saved["models"].get("model", {}).get("init_from", "")


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
    if len(parts) >= 2 and parts[0] == "runs":
        return f"; make it with: python -m instructgpt_jax.main --config=configs/{parts[1]}.py"
    return ""


def _tuples(architecture: dict) -> dict:
    """JSON's lists as the tuples they were."""
    freeze = lambda value: tuple(map(freeze, value)) if isinstance(value, list | tuple) else value  # noqa: E731
    return {field: freeze(value) for field, value in architecture.items()}
