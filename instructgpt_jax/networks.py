"""From an entry of `config.models` to a network on the mesh: fresh, from an earlier stage, or from Hugging Face.

An entry is `dict(size=…, init_from=…, weights=…, …)`; its other keys are fields of ModelConfig. `init_from` is the
workdir of an earlier stage (or one of its checkpoints or snapshots), a directory in Hugging Face format, a Hub id, or
empty for a fresh model of the named size. `weights` chooses between the averaged ('ema') and the raw ('params') weights
of a stage that keeps both. An entry with an `architecture` is one that a run goes on with: its own checkpoint has the
weights, and `init_from` is not looked at.

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
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.models import RUNTIME_FIELDS, ModelConfig, hf
from instructgpt_jax.models.hf import storage
from instructgpt_jax.sharding import param_shardings
from instructgpt_jax.training import checkpoint

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
ENTRY_FIELDS = ("size", "init_from", "weights", "architecture")
# Whose entry stands in for an empty one of PPO: the reference is the policy that it starts from, the value model starts
# from the reward model (Ouyang et al. 2022, section 3.5).
STAND_INS = {"ref_policy": "policy", "value": "reward"}


class Network(NamedTuple):
    """A network of known shape whose parameters can be put on the mesh.

    config: its shape.
    load: () -> parameters, float32, sharded by the training rules.
    abstract: the same tree as ShapeDtypeStructs with shardings.
    entry: that it was built from, with its `architecture`.
    grown: whether its scalar head is a fresh one, on the body of a language model.
    """

    config: ModelConfig
    load: Callable[[], dict]
    abstract: dict
    entry: dict
    grown: bool = False


class Source(NamedTuple):
    """Where parameters come from.

    kind: 'fresh', 'stage', 'hf', or 'checkpoint': of the workdir itself, which the loop restores.
    config: the architecture.
    which: the subtree of a stage's state.
    """

    kind: str
    config: ModelConfig
    which: str = ""


def build(key: str, entry: ConfigDict | dict, head: str, mesh: Mesh, tokenizer: Tokenizer, seed: int) -> Network:
    """The network of an entry, without reading a weight.

    Args:
      key: of the entry, for errors: `config.models.policy`.
      entry: see the top of this file.
      head: 'lm' or 'scalar', what the stage needs, or '' for the one found there. A scalar head is grown on a language
        model where necessary.
      mesh: where the parameters go.
      tokenizer: of the run. Its `vocab_size` is the size of a fresh model, the least of a given one. No id at or above
        it stands in a text or is sampled (see Tokenizer.allowed), so that networks of different sizes read each
        other's texts.
      seed: of fresh parameters.

    Raises:
      ValueError: an unknown size or field, a missing init_from (names the command that makes it), a reward model given
        as a language model, a vocabulary too small for the tokenizer, or another tokenizer.
    """
    source, vocab_size = _find(key, entry, tokenizer.vocab_size), tokenizer.vocab_size
    if source.kind in ("stage", "hf"):
        run_tokenizer.check_shared(key, entry["init_from"], tokenizer)
    if source.config.vocab_size < vocab_size:
        raise ValueError(
            f"{key} must have a vocabulary of at least the tokenizer's {vocab_size}, got {source.config.vocab_size}"
        )
    if source.config.head == "scalar" and head == "lm":
        raise ValueError(f"{key} must be a language model, got a reward or value model from {entry['init_from']!r}")
    grow = head == "scalar" and source.config.head == "lm"
    network = source.config.replace(head=head or source.config.head)

    fresh_key = jax.random.key(seed)
    source_abstract = _abstract(source.config, mesh)
    abstract = _abstract(network, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def load() -> dict:
        if source.kind == "checkpoint":
            raise ValueError(f"{key} must go on from a checkpoint of the workdir, got one that has gone meanwhile")
        if source.kind == "fresh":
            return jax.jit(lambda key: models.init(network, key), out_shardings=shardings)(fresh_key)
        if source.kind == "hf":
            _, params = hf.load(entry["init_from"], mesh)
        else:
            params = checkpoint.load_params(entry["init_from"], source_abstract, source.which)
        if not grow:
            return params
        grown = lambda params, key: models.with_scalar_head(source.config, params, key)[1]  # noqa: E731
        return jax.jit(grown, out_shardings=shardings)(params, fresh_key)

    found = {**entry, "architecture": dataclasses.asdict(network)}
    return Network(network, load, abstract, found, grown=grow and source.kind != "fresh")


def shape(key: str, entry: ConfigDict | dict) -> ModelConfig:
    """The architecture of an entry where its tokenizer is not known yet; a fresh one has no vocabulary.

    Raises:
      ValueError: an unknown size or field, or an init_from that is missing.
    """
    try:
        return _find(key, entry, 1).config
    except ValueError as error:
        raise ValueError(f"{error}" if str(error).startswith(key) else f"{key}: {error}") from None


def stand_ins(config: ConfigDict) -> dict[str, dict]:
    """The entries that PPO's empty ones are taken for, by their names; what an empty one does set is kept."""
    found = {}
    for name, other in STAND_INS.items() if config.stage == "ppo" else ():
        entry = config.models[name]
        if not entry.get("init_from", "") and not entry.get("size", ""):
            # The other one may go on from a checkpoint, in which a reference is not.
            theirs = {field: value for field, value in config.models[other].items() if field != "architecture"}
            found[name] = theirs | {field: value for field, value in entry.items() if value != ""}
    return found


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


def _find(key: str, entry: ConfigDict | dict, vocab_size: int) -> Source:
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
            + (storage.hint(path) or _how_to_make(init_from))
        ) from None
    except ValueError as error:
        raise ValueError(f"{key}.init_from must be whole, got {init_from!r}: {error}") from error
    name, prefix = ("policy", "policy/") if "policy" in saved["models"] else ("model", "")
    weights = entry.get("weights", "") or ("ema" if "ema" in _parts(init_from, prefix) else "params")
    if weights not in _parts(init_from, prefix):
        raise ValueError(f"{key}.weights must be one of {_parts(init_from, prefix)} of {init_from!r}, got {weights!r}")
    return Source("stage", ModelConfig(**_tuples(saved["models"][name]["architecture"])), prefix + weights)


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
    if len(parts) >= 2 and parts[0] == "runs" and (CONFIGS / f"{parts[1]}.py").exists():
        return f"; make it with: python -m instructgpt_jax.main --config=configs/{parts[1]}.py"
    return ""


def _tuples(architecture: dict) -> dict:
    """JSON's lists as the tuples they were."""
    freeze = lambda value: tuple(map(freeze, value)) if isinstance(value, list | tuple) else value  # noqa: E731
    return {field: freeze(value) for field, value in architecture.items()}
