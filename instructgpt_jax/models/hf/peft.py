"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, which name the base they change.

A directory in this format is read as a checkpoint whose tensors are the base's, each with its change added; so it can
stand wherever a checkpoint can. PEFT writes `….lora_A.weight` (r, in) and `….lora_B.weight` (out, r) for every changed
matrix of the file, whose change is alpha / r · B A (its documentation, "PEFT checkpoint format"). Where a file keeps
queries, keys and values in one matrix, an adapter of ours for k of them is one of rank k · r and alpha k · alpha there,
each in its own columns: the same function.
"""

import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from instructgpt_jax.models import adapters
from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.models.hf import layout, storage
from instructgpt_jax.models.hf.fields import Family
from instructgpt_jax.models.hf.storage import Stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."
TASKS = {"lm": "CAUSAL_LM", "scalar": "SEQ_CLS"}  # by the head
SCORE = "score.weight"
DIGEST, BIAS = "base_digest", "reward_bias"  # ours in the file's metadata, which PEFT does not read
PLAIN = {  # what changes the function and is not computed here: its only value
    "bias": "none", "use_dora": False, "lora_bias": False, "megatron_config": None,
    "trainable_token_indices": None, "use_qalora": False, "alora_invocation_tokens": None, "target_parameters": None,
    "layer_replication": None, "use_bdlora": None, "arrow_config": None, "monteclora_config": None, "kasa_config": None,
    "revision": None,
}  # fmt: skip
# Beginnings that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take from it what they begin with, so
# that the adapter is one of other weights (peft 0.21.2, tuners/lora/layer.py).
INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class Read(NamedTuple):
    """An adapter in PEFT's format.

    file: its adapter_config.json.
    base: the directory or Hub id of what it changes.
    head: 'lm' or 'scalar'.
    raw: adapter_config.json.
    """

    file: pathlib.Path
    base: str
    head: str
    raw: dict[str, Any]


def read(directory: pathlib.Path) -> Read | None:
    """What adapter_config.json says; None where there is none.

    Raises:
      ValueError: another kind of adapter than LoRA, one without a base, or with an option that is not computed here.
    """
    file = directory / CONFIG
    if not file.is_file() or (directory / "config.json").is_file():
        return None
    raw = storage.read_json(file)
    wanted_of = {"peft_type": "LORA"} | {key: value for key, value in PLAIN.items() if raw.get(key)}
    for key, wanted in wanted_of.items():
        if raw.get(key) != wanted:
            raise ValueError(f"{file}: {key} must be {wanted!r}, got {raw.get(key)!r}")
    init = raw.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in (None, *INITS):
        raise ValueError(
            f"{file}: init_lora_weights must be one of {INITS}, got {init!r}, which changes the base: peft "
            "saves all but LoftQ for the base as it is by path_initial_model_for_weight_conversion"
        )
    heads = {task: head for head, task in TASKS.items()}
    if raw.get("task_type") not in (*heads, None):
        raise ValueError(f"{file}: task_type must be one of {sorted(heads)}, got {raw.get('task_type')!r}")
    head = heads.get(raw.get("task_type"), "lm")
    saved = sorted(set(raw.get("modules_to_save") or ()))
    if saved not in ([], ["score"], ["classifier", "score"]):  # PEFT names both for every classifier
        raise ValueError(f"{file}: modules_to_save must be ['score'] or none, got {saved}")
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path must name the base, a directory or Hub id, got {base!r}")
    return Read(file, base, head, raw)


def changed(adapter: Read, family: Family, config: ModelConfig, found: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of the base with the adapter's changes added as they are opened.

    Args:
      config: of the base, with the adapter's head.
      found: the tensors of the base.

    Raises:
      ValueError: a tensor that the base does not have, or of another shape, or one of the two of a pair alone; an
        adapter of ours that was made for another base.
    """
    folder, result = adapter.file.parent, dict(found)
    stored, metadata = storage.adapter_tensors(folder, WEIGHTS)
    if metadata.get(DIGEST, config.digest()) != config.digest():
        raise ValueError(f"{adapter.file}: was made for another base than {adapter.base} (the digest of its shape)")
    layouts = {name: part for kernel, (name, part) in family.tensors.items() if kernel.startswith("blocks/")}
    if config.head == "scalar":
        result.pop(family.tensors["head/kernel"][0], None)
    pairs: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        if tensor.fault:
            raise ValueError(f"{tensor.file}: tensor {name!r} {tensor.fault}")
        module, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if name.removeprefix(PREFIX) == SCORE and config.head == "scalar":
            result[SCORE] = tensor
        elif kind in ("A.weight", "B.weight"):
            pairs.setdefault(f"{module}.weight", {})[kind[0]] = tensor
        else:
            raise ValueError(f"{tensor.file}: tensor {name!r} is no part of a LoRA adapter of a {family.model_type}")
    for whole, pair in pairs.items():
        name = whole if whole in found else whole.removeprefix(family.prefix)  # of a base without its head
        if name not in found or set(pair) != {"A", "B"}:
            raise ValueError(
                f"{adapter.file}: {name!r} must be a tensor of the base with a lora_A and a lora_B, got {sorted(pair)} "
                f"and {'that tensor' if name in found else 'no such tensor'}"
            )
        pattern = re.sub(r"\.\d+\.", ".{}.", whole, count=1)
        (r, inputs), (outputs, _) = pair["A"].shape, pair["B"].shape
        first = pattern in layouts and _inputs_first(_kernel(family, pattern), layouts[pattern])
        shape = (inputs, outputs) if first else (outputs, inputs)
        if shape != found[name].shape or pair["B"].shape[1] != r:
            raise ValueError(
                f"{adapter.file}: the adapter of {name!r} must fit {found[name].shape}, got A {pair['A'].shape} and "
                f"B {pair['B'].shape}"
            )
        result[name] = found[name]._replace(open=_adding(found[name], pair, _scale(adapter, name, r), first))
    return result


def reward_bias(adapter: Read) -> float:
    """What is added to the score, of an adapter of ours; 0 of others."""
    try:
        return float(storage.adapter_tensors(adapter.file.parent, WEIGHTS)[1].get(BIAS, 0.0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{adapter.file.parent}: {BIAS} in the metadata must be a number: {error}") from None


def _adding(base: Stored, pair: dict[str, Stored], scale: float, inputs_first: bool):
    def opened():
        a, b = (np.asarray(pair[part].open(), np.float32) for part in "AB")
        change = scale * (b @ a)
        return np.asarray(base.open(), np.float32) + (change.T if inputs_first else change)

    return opened


def _scale(adapter: Read, name: str, rank: int) -> float:
    """alpha / r of one tensor; patterns are ends of its name, as in PEFT."""
    alpha = adapter.raw.get("lora_alpha", rank)
    for pattern, value in (adapter.raw.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name.removesuffix(".weight")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{adapter.file}: lora_alpha must be a number, got {alpha!r}")
    return alpha / (math.sqrt(rank) if adapter.raw.get("use_rslora") else rank)


def _kernel(family: Family, tensor: str) -> str:
    """One of our parameters in a tensor of the file."""
    return next(name for name, (held, _) in family.tensors.items() if held == tensor)


def _inputs_first(name: str, file_layout: str) -> bool:
    """Whether the file keeps a kernel as (in, out), as GPT-2 does."""
    return layout.OURS[name].split()[0] in file_layout.split(")")[0].strip("(").split()[:1]


def config_of(config: ModelConfig, base: str, modules: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json.

    Args:
      config: with the adapter.
      base: its base, as a directory or Hub id.
      modules: names of the changed modules, ends of their paths -> how many adapters of ours each has.
    """
    own = config.adapter
    several = {name: count for name, count in modules.items() if count > 1}
    alpha = lambda count: int(own.alpha * count) if float(own.alpha * count).is_integer() else own.alpha * count  # noqa: E731
    return {
        "peft_type": "LORA",
        "task_type": TASKS[config.head],
        "base_model_name_or_path": os.fspath(base),
        "r": own.rank,
        "lora_alpha": alpha(1),
        "lora_dropout": own.dropout,
        "target_modules": sorted(modules),
        "rank_pattern": {name: own.rank * count for name, count in several.items()},
        "alpha_pattern": {name: alpha(count) for name, count in several.items()},
        "modules_to_save": ["score"] if config.head == "scalar" else None,
        "bias": "none",
        "inference_mode": True,
    }


def tensors(
    family: Family, config: ModelConfig, params: Mapping[str, np.ndarray], held: Mapping[str, list]
) -> Iterator[tuple[str, np.ndarray, int]]:
    """What an adapter of ours is in the file: (name, array, how many of our adapters are in it).

    Args:
      params: of the adapter by path, float32 on the host.
      held: tensors of the file and the parameters in them, see loading.file_tensors.
    """
    own, letters = config.adapter, layout.sizes(config) | {"R": config.adapter.rank}
    for tensor, parts in held.items():
        if tensor == SCORE and config.head == "scalar":
            yield f"{PREFIX}{SCORE}", params["scalar_head/kernel"][None], 1
        trees = [name.removesuffix("kernel") + adapters.TREE for name, _, _ in parts]
        if not any(f"{tree}/a" in params for tree in trees):
            continue
        first = _inputs_first(parts[0][0], parts[0][2])
        a, b = [], []
        for number, ((_, layer, _), tree) in enumerate(zip(parts, trees, strict=True)):
            if f"{tree}/a" not in params:
                continue
            a.append(params[f"{tree}/a"][layer].reshape(-1, own.rank).T)
            # Its outputs where the file has them, zeros for the other parts of a fused tensor.
            shapes = [(own.rank, *(letters[x] for x in _outputs(name))) for name, _, _ in parts]
            columns = [np.zeros(shape, np.float32) for shape in shapes]
            columns[number] = params[f"{tree}/b"][layer]
            groups = re.findall(r"\([^)]*\)|\S+", parts[0][2])
            ours = ["R", *_outputs(parts[0][0])]
            b.append(layout.assemble(columns, f"{groups[-1] if first else groups[0]} R", " ".join(ours), letters))
        module = PREFIX + tensor.removesuffix(".weight")
        yield f"{module}.lora_A.weight", np.ascontiguousarray(np.concatenate(a)), len(a)
        yield f"{module}.lora_B.weight", np.ascontiguousarray(np.concatenate(b, axis=1)), len(b)


def _outputs(name: str) -> list[str]:
    """The axes that a kernel of ours writes."""
    axes = layout.OURS[name].split()
    return axes[2:] if name.endswith("out/kernel") else axes[1:]
