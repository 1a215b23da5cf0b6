"""Two workdirs, file by file: what differs, and by how much."""

import json
import math
import os
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file
from saved_runs import arrays

RELATIVE, ABSOLUTE = 2e-3, 2e-4  # "to rounding", over all stages one after the other
CLOCK = ("perf", "seconds", "command", "config", "versions", "workdir", "hash")  # keys that need not be the same


def numbers(node, path: str = "") -> dict[str, object]:
    """The leaves of JSON by their paths, without what depends on the clock or the place."""
    if isinstance(node, dict):
        parts = [(key, value) for key, value in node.items() if not str(key).startswith(CLOCK)]
    elif isinstance(node, list):
        parts = list(enumerate(node))
    else:
        return {path: node}
    return {name: leaf for key, value in parts for name, leaf in numbers(value, f"{path}/{key}").items()}


def read(path: pathlib.Path, root: pathlib.Path) -> dict[str, object]:
    """A file of a run as numbers and texts."""
    if path.suffix == ".safetensors":
        return load_file(path)
    text = path.read_text().replace(str(root), "WORKDIR")
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return numbers(rows)


def files(root: pathlib.Path) -> set[str]:
    """What a run leaves, by its name under the workdir; checkpoints as a whole."""
    found = set()
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in ("tensorboard", "parts", ".compiled")]
        here = pathlib.Path(folder).relative_to(root)
        if here.name == "checkpoints":
            found.add(str(here))
            inside[:] = []
        elif here.name != "snapshots":
            found |= {str(here / name) for name in names if name not in ("seconds.json", "done.json")}
        else:
            inside[:] = []
    return found


def compare(left: pathlib.Path, right: pathlib.Path, exact: bool, stage: str = "") -> tuple[list[str], float]:
    """What differs between two workdirs or one stage of them, and the largest difference of numbers, relative to 1."""
    names = [files(root / stage) for root in (left, right)]
    found, largest = [f"{name} is in one alone" for name in sorted(names[0] ^ names[1])], 0.0
    for name in sorted(names[0] & names[1]):
        pair = [root / stage / name for root in (left, right)]
        if name.endswith("checkpoints"):
            leaves = [jax.tree_util.tree_leaves_with_path(arrays(path.parent)) for path in pair]
            values = [{jax.tree_util.keystr(path): leaf for path, leaf in each} for each in leaves]
        elif name.endswith((".json", ".jsonl", ".safetensors")) and "tokenizer" not in name and "config" not in name:
            values = [read(path, root) for path, root in zip(pair, (left, right), strict=True)]
        else:
            continue
        keys = values[0].keys() ^ values[1].keys()
        found += [f"{name}: {sorted(keys)[:2]} in one alone"] if keys else []
        for key in values[0].keys() & values[1].keys():
            far, same = _unlike(values[0][key], values[1][key], exact)
            largest = max(largest, far)
            if not same:
                found.append(f"{name}{key}: {str(values[0][key])[:40]!r} is now {str(values[1][key])[:40]!r}")
                break
    return found, largest


def _unlike(left, right, exact: bool) -> tuple[float, bool]:
    """The difference of two leaves, relative to the larger of 1 and the right one, and whether they are the same."""
    if isinstance(left, np.ndarray):
        if exact or left.dtype.kind not in "f" or left.shape != right.shape:
            return 0.0, left.shape == right.shape and left.tobytes() == right.tobytes()
        left, right = left.astype(np.float64), right.astype(np.float64)
        far = np.abs(left - right) / np.maximum(1.0, np.abs(right))
        return float(far.max(initial=0.0)), bool(np.allclose(left, right, rtol=RELATIVE, atol=ABSOLUTE))
    if isinstance(left, float) and isinstance(right, float) and not exact:
        return abs(left - right) / max(1.0, abs(right)), math.isclose(left, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return 0.0, left == right
