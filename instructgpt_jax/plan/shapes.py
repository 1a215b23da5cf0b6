"""Shapes of networks and batches from a configuration alone: nothing is read but a config.json, nothing allocated.

A network is found by its `init_from`: a workdir or directory that is there, another stage of the same pipeline,
`runs/NAME` by what configs/NAME.py would train there, a Hub id by its config.json. What none of these knows,
`--plan_size` says. The batches are the worst case that the configuration allows: prompts, responses and rows as long as
they may be.
"""

import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from instructgpt_jax import models, networks
from instructgpt_jax.data import packing
from instructgpt_jax.data.batches import EXAMPLES, ROWS
from instructgpt_jax.models import RUNTIME_FIELDS, ModelConfig
from instructgpt_jax.networks import Network


class Ids(NamedTuple):
    """What programs ask of a tokenizer: its number of ids and those that end a response."""

    vocab_size: int
    end_ids: tuple[int, ...] = (0,)

    def allowed(self, size: int) -> np.ndarray | None:
        """As Tokenizer.allowed."""
        return None if size <= self.vocab_size else np.arange(size) < self.vocab_size


class Known(NamedTuple):
    """What the shape of a network may follow from.

    sizes: entry of config.models, or '' for any that nothing else knows -> a named size.
    stages: workdir -> configuration, of a pipeline.
    """

    sizes: Mapping[str, str]
    stages: Mapping[str, ConfigDict]


def parse_sizes(text: str) -> dict[str, str]:
    """`--plan_size`: SIZE, or policy=SIZE,reward=SIZE,…

    Raises:
      ValueError: a size without a name among models.SIZES.
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.rpartition("=")
        if size not in models.SIZES:
            sizes = sorted(models.SIZES)
            raise ValueError(f"--plan_size must be SIZE or ENTRY=SIZE,… with SIZE of {sizes}, got {part!r}")
        found[name] = size
    return found


def network(config: ConfigDict, name: str, head: str, mesh: Mesh, known: Known) -> Network:
    """The network of an entry of config.models, without parameters."""
    shape = architecture(config, name, known).replace(head=head, adapter=None)
    entry = (config.models.to_dict() | networks.stand_ins(config))[name]
    whole = Network(shape, dict, networks.abstract(shape, mesh), dict(entry))
    adapter = networks.adapter_of(f"config.models.{name}", entry, shape)
    return whole if adapter is None else networks.with_adapter(whole, adapter, mesh, config.seed)


def architecture(config: ConfigDict, name: str, known: Known, seen: tuple[str, ...] = ()) -> ModelConfig:
    """The architecture of an entry of config.models.

    Args:
      seen: workdirs that have been followed, so that a circle ends.

    Raises:
      ValueError: a shape that cannot be known; names the flag that says it.
    """
    entries = config.models.to_dict() | networks.stand_ins(config)
    key, entry = f"config.models.{name}", dict(entries[name])
    init_from = entry.get("init_from", "")
    runtime = {field: value for field, value in entry.items() if field in RUNTIME_FIELDS}
    asked = known.sizes.get(name) or known.sizes.get(networks.STAND_INS.get(name, name))
    if asked:
        return models.SIZES[asked].replace(**runtime)
    if not init_from:
        return networks.shape(key, entry).replace(vocab_size=_vocabulary(config, name, known, entry))
    earlier = None if init_from in seen else known.stages.get(init_from) or _config_of(init_from)
    if epath.Path(init_from).exists() or earlier is None and networks.is_hub_id(init_from) and "" not in known.sizes:
        try:
            return networks.shape(key, entry)
        except (ValueError, OSError) as error:
            if epath.Path(init_from).exists():
                raise
            raise ValueError(_unknown(key, name, init_from) + f" ({str(error).splitlines()[0]})") from None
    if earlier is not None:
        trained = "policy" if "policy" in earlier.models else "model"
        inner = known._replace(sizes={size: value for size, value in known.sizes.items() if not size})
        return architecture(earlier, trained, inner, (*seen, init_from)).without_dropout().replace(**runtime)
    if "" in known.sizes:
        return models.SIZES[known.sizes[""]].replace(**runtime)
    raise ValueError(_unknown(key, name, init_from))


def _unknown(key: str, name: str, init_from: str) -> str:
    return (
        f"{key}.init_from must have a shape that can be known, got {init_from!r}, which is not there; "
        f"--plan_size={name}=SIZE says it, with SIZE of {', '.join(sorted(models.SIZES))}"
    )


def ids(config: ConfigDict, networks_of_stage: Mapping[str, Network]) -> Ids:
    """The tokenizer of a stage: `train:N` has N ids, a directory those of its file, else those of its first network."""
    counted = _count(config.data.tokenizer) if "data" in config else 0
    return Ids(counted or next(iter(networks_of_stage.values())).config.vocab_size)


def _vocabulary(config: ConfigDict, name: str, known: Known, entry: dict) -> int:
    """Ids of a fresh network: what it says itself, else its tokenizer, else its named size."""
    tokenizer = config.data.tokenizer
    made = {f"{workdir}/tokenizer": stage for workdir, stage in known.stages.items()}.get(tokenizer)
    counted = _count(made.data.tokenizer if made else tokenizer)
    return entry.get("vocab_size") or counted or models.SIZES[entry["size"]].vocab_size


def _count(tokenizer: str) -> int:
    """Ids of a tokenizer that says so without being loaded; 0 = it does not."""
    if tokenizer.startswith("train:"):
        return int(tokenizer.removeprefix("train:"))
    file = pathlib.Path(tokenizer) / "tokenizer.json"
    if not tokenizer or not file.is_file():
        return 0
    found = json.loads(file.read_text(encoding="utf-8"))
    return 1 + max([*found["model"]["vocab"].values(), *(token["id"] for token in found["added_tokens"])])


def _config_of(init_from: str) -> ConfigDict | None:
    """The configuration that would make the workdir `runs/NAME[_ARGUMENT][/STAGE]`; None = there is none."""
    parts = pathlib.PurePosixPath(init_from).parts
    if len(parts) < 2 or parts[0] != "runs":
        return None
    name, argument = parts[1], ""
    if importlib.util.find_spec(f"configs.{name}") is None:
        name, _, argument = name.rpartition("_")
        if not name or importlib.util.find_spec(f"configs.{name}") is None:
            return None
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    if len(parts) > 2:
        return config.get("stages", {}).get("/".join(parts[2:]))
    return config if "models" in config else None


def item_bytes(dtype) -> float:
    """Bytes of a number on a device: two of 4 bits share one, whatever numpy says."""
    return 0.5 if jnp.dtype(dtype) in (jnp.int4, jnp.uint4) else jnp.dtype(dtype).itemsize


# Batches --------------------------------------------------------------------------------------------------------------


def laid(batch: dict, spec: PartitionSpec, mesh: Mesh) -> dict:
    """Arrays as ShapeDtypeStructs that lie on the mesh by one spec."""
    where = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch)


def rows(options: ConfigDict, mesh: Mesh) -> dict:
    """A batch of packed rows, see packing.pack_examples."""
    count = packing.num_microbatches(options.batch_size, options.microbatch_rows)
    return laid(packing.pack_examples([], options.row_length, count, options.microbatch_rows), ROWS, mesh)


def comparisons(options: ConfigDict, mesh: Mesh) -> dict:
    """A batch of comparisons, see packing.pack_comparisons."""
    c = options
    count = packing.num_comparison_microbatches(c.batch_size, c.microbatch_rows, c.max_completions)
    slots = -(-c.batch_size // c.microbatch_rows) * c.microbatch_rows
    of = c.row_length, count, c.microbatch_rows, slots, c.max_completions, c.shared_prompt, 0
    return laid(packing.pack_comparisons([], *of), ROWS, mesh)


def prompts(batch_size: int, length: int, mesh: Mesh) -> dict:
    """A batch of prompts, see data.batches.prompts."""
    arrays = {
        "prompts": jax.ShapeDtypeStruct((batch_size, length), np.int32),
        "prompt_lengths": jax.ShapeDtypeStruct((batch_size,), np.int32),
        "index": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    return laid(arrays, EXAMPLES, mesh)
