"""From an entry of `config.models` to a network on the mesh: fresh, from an earlier stage, or from Hugging Face.

An entry is `dict(size=…, init_from=…, weights=…, …)`; its other keys are fields of ModelConfig. `init_from` is the
workdir of an earlier stage (or one of its checkpoints or snapshots), a directory in Hugging Face format, a Hub id, or
empty for a fresh model of the named size. `weights` chooses between the averaged ('ema') and the raw ('params') weights
of a stage that keeps both. An entry with an `architecture` is one that a run goes on with: its own checkpoint has the
weights, and `init_from` is not looked at. `version` says which weights were in `init_from` when a run began:
`build` notes it, and a run that goes on, and whoever reads an adapter on it, reads those and no others.

Dropout is the setting of a stage: a network comes without it, wherever from, and has what its entry says.

An entry whose `adapter` has targets trains that adapter alone, on a frozen base: what `init_from` names. What such a
stage leaves in its workdir is the adapter; whoever starts from there gets base and adapter, merged. Where
`adapter.base` names a format, the base is quantised (models/quantised.py), and adapters that it had before stay beside
it, frozen.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import models, process, run_tokenizer
from instructgpt_jax.data import datasets, sources
from instructgpt_jax.data.tokenizer import Tokenizer
from instructgpt_jax.models import Adapter, ModelConfig, adapters, quantised
from instructgpt_jax.training import checkpoint, origins
from instructgpt_jax.training.origins import abstract, is_hub_id

__all__ = [  # what origins.py has is for all who ask for networks
    "Base", "Network", "abstract", "abstract_frozen", "adapter_of", "build", "check_context", "freeze", "is_hub_id",
    "join", "shape", "stand_ins", "tell_trained_on", "trained_adapter", "with_adapter",
]  # fmt: skip

# Whose entry stands in for an empty one of PPO: the reference is the policy that it starts from, the value model starts
# from the reward model (Ouyang et al. 2022, section 3.5).
STAND_INS = {"ref_policy": "policy", "value": "reward"}


class Base(NamedTuple):
    """What an adapter stands on, frozen and whole, in the dtype that it computes in or in a format of quantised.py;
    `abstract` as in Network."""

    load: Callable[[], dict]
    abstract: dict


class Network(NamedTuple):
    """A network of known shape whose parameters can be put on the mesh.

    config: its shape.
    load: () -> parameters, float32, sharded by the training rules; of one with an adapter those that train.
    abstract: the same tree as ShapeDtypeStructs with shardings.
    entry: that it was built from, with its `architecture` and the `version` of its init_from.
    grown: whether its scalar head is a fresh one, on the body of a language model.
    base: of the adapter; None where everything trains.
    source: where the parameters come from; None of one that is planned and never loaded.
    """

    config: ModelConfig
    load: Callable[[], dict]
    abstract: dict
    entry: dict
    grown: bool = False
    base: Base | None = None
    source: origins.Source | None = None


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
        as a language model, a vocabulary too small for the tokenizer, another tokenizer, an adapter for projections
        that the network does not have, or one that was made for another base, a quantised base that cannot be had here.
    """
    source, vocab_size = origins.find(key, entry, tokenizer.vocab_size), tokenizer.vocab_size
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
    own = abstract(network, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, own)

    def load() -> dict:
        if source.kind == "checkpoint":
            raise ValueError(f"{key} must go on from a checkpoint of the workdir, got one that has gone meanwhile")
        if source.kind == "fresh":
            return jax.jit(lambda key: models.init(network, key), out_shardings=shardings)(fresh_key)
        params = origins.load(source, mesh)
        if not grow:
            return params
        grown = lambda params, key: models.with_scalar_head(source.config, params, key)[1]  # noqa: E731
        return jax.jit(grown, out_shardings=shardings)(params, fresh_key)

    found = dict(ConfigDict(dict(entry)).to_dict()) | {"architecture": dataclasses.asdict(network)}
    found |= {"version": source.version} if source.version else {}
    whole = Network(network, load, own, found, grown=grow and source.kind != "fresh", source=source)
    adapter = adapter_of(key, entry, network)
    if adapter is not None and adapter.base:
        quantised.check(f"{key}.adapter.base", adapter.base)
    return whole if adapter is None else with_adapter(whole, adapter, mesh, seed)


def adapter_of(key: str, entry: ConfigDict | dict, network: ModelConfig) -> Adapter | None:
    """The adapter that trains in place of the network of an entry; None without targets.

    Raises:
      ValueError: targets that the network does not have.
    """
    found = dict(entry.get("adapter") or {})
    if not found.get("targets"):
        return None
    if tuple(found["targets"]) == ("all",):
        found["targets"] = network.projections
    missing = [name for name in found["targets"] if name not in network.projections]
    if missing:
        raise ValueError(
            f"{key}.adapter.targets must be among {network.projections}, the projections of its layers, or ('all',), "
            f"got {missing}"
        )
    return Adapter(**found)


def with_adapter(whole: Network, adapter: Adapter, mesh: Mesh, seed: int) -> Network:
    """The network as what trains of it, an adapter and the scalar head, on itself as the frozen base.

    Args:
      seed: as in `build`, of the adapter and of a head that is grown.
    """
    config = whole.config.replace(adapter=adapter)
    own = origins.abstract_trained(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, own)

    def load() -> dict:
        key = jax.random.key(seed)
        adapter = jax.jit(lambda key: adapters.init(config, key), out_shardings={"blocks": shardings["blocks"]})(key)
        if config.head != "scalar":
            return adapter
        if whole.grown:  # the same as in the base
            made = jax.jit(lambda key: models.scalar_head(config, key), out_shardings=shardings["scalar_head"])(key)
            return adapter | {"scalar_head": made}
        return adapter | {"scalar_head": whole.load()["scalar_head"]}

    entry = whole.entry | {"architecture": dataclasses.asdict(config)}
    return Network(config, load, own, entry, whole.grown, frozen(whole, adapter.base), whole.source)


def join(network: Network, params: dict) -> dict:
    """The parameters of the whole network around those that train, where its base is not at hand."""
    return params if network.base is None else adapters.join(network.config, network.base.load(), params)


def shape(key: str, entry: ConfigDict | dict) -> ModelConfig:
    """The architecture of an entry where its tokenizer is not known yet; a fresh one has no vocabulary.

    Raises:
      ValueError: an unknown size or field, or an init_from that is missing.
    """
    try:
        found = origins.find(key, entry, 1).config
        return found.replace(adapter=adapter_of(key, entry, found))
    except ValueError as error:
        raise ValueError(f"{error}" if str(error).startswith(key) else f"{key}: {error}") from None


def trained_adapter(directory: str) -> bool:
    """Whether the policy or model of a workdir, checkpoint or snapshot is an adapter alone."""
    saved = checkpoint.read_metadata(directory)["config"]["models"]
    return bool(saved["policy" if "policy" in saved else "model"]["architecture"].get("adapter"))


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


def frozen(network: Network, form: str = "") -> Base:
    """A network that will not train, its kernels in a format of quantised.py, or in the dtype that it computes in."""
    if not form:
        return Base(lambda: freeze(network), abstract_frozen(network))
    dtype, source, mesh = network.config.dtype, network.source, jax.tree.leaves(network.abstract)[0].sharding.mesh
    # A head that is grown on a language model is the adapter's.
    headless = lambda params: params if not network.grown else {k: v for k, v in params.items() if k != "head"}  # noqa: E731
    if source is None:
        shapes = quantised.abstract(network.abstract, form)
    else:
        shapes = headless(origins.abstract_quantised(source, mesh, form))
    abstract = origins.laid_out(jax.eval_shape(lambda params: models.cast(params, dtype), shapes), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    cast = jax.jit(lambda params: models.cast(params, dtype), out_shardings=shardings, donate_argnums=0)
    return Base(lambda: cast(headless(origins.load_quantised(source, mesh, form))), abstract)


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
