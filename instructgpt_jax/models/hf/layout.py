"""How a tensor of a checkpoint file becomes one of our parameters, written as axis letters.

Every parameter has one layout of ours (`OURS`), the same for all families; a family's table says how the file lays the
same axes out. `(N H) D` is a matrix whose rows are heads times head width; `D (1/3 N H)` is three matrices side by
side, of which this parameter is the second; `1 E` has an axis of size one. From the two follows the way in (a view,
nothing is copied until the slice a device needs is known) and the way back.

Letters: V vocabulary, E embedding width, P rows of learned positions, D width, N heads, M key/value heads, H head
width, F feed-forward.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from instructgpt_jax.models.config import ModelConfig

# Path of a parameter -> its axes, for `blocks/…` those of one layer.
OURS = {
    "embed/tokens": "V E",
    "embed/positions": "P D",
    "embed/project_in": "E D",
    "embed/project_out": "D E",
    "blocks/norm1/scale": "D",
    "blocks/norm1/bias": "D",
    "blocks/attention/query/kernel": "D N H",
    "blocks/attention/query/bias": "N H",
    "blocks/attention/key/kernel": "D M H",
    "blocks/attention/key/bias": "M H",
    "blocks/attention/value/kernel": "D M H",
    "blocks/attention/value/bias": "M H",
    "blocks/attention/query_norm/scale": "H",
    "blocks/attention/key_norm/scale": "H",
    "blocks/attention/out/kernel": "N H D",
    "blocks/attention/out/bias": "D",
    "blocks/norm1_after/scale": "D",
    "blocks/norm2/scale": "D",
    "blocks/norm2/bias": "D",
    "blocks/norm2_after/scale": "D",
    "blocks/mlp/up/kernel": "D F",
    "blocks/mlp/up/bias": "F",
    "blocks/mlp/gate/kernel": "D F",
    "blocks/mlp/gate/bias": "F",
    "blocks/mlp/down/kernel": "F D",
    "blocks/mlp/down/bias": "D",
    "final_norm/scale": "D",
    "final_norm/bias": "D",
    "head/kernel": "V E",
    "head/bias": "V",
    "scalar_head/kernel": "E",
}


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every axis letter; V is the vocabulary of the file, not padded."""
    return {
        "V": config.vocab_size,
        "E": config.embedding_width,
        "P": config.max_length + config.position_offset,
        "D": config.width,
        "N": config.num_heads,
        "M": config.num_kv_heads,
        "H": config.head_width,
        "F": config.mlp_width,
    }


def _axes(layout: str) -> list[list[str]]:
    """The dimensions of a file's tensor, each a list of axes: letters, `1`, or a part `i/n`."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", layout)]


def _size(axis: str, axis_sizes: Mapping[str, int]) -> int:
    return axis_sizes[axis] if axis in axis_sizes else int(axis.split("/")[-1])


def part(layout: str) -> int:
    """Which of the parts of a fused tensor this is; 0 for a tensor of its own."""
    fused = re.search(r"(\d+)/\d+", layout)
    return int(fused[1]) if fused else 0


def shape(layout: str, axis_sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the file's tensor.

    >>> shape("D (1/3 N H)", {"D": 8, "N": 2, "H": 4})
    (8, 24)
    """
    return tuple(math.prod(_size(axis, axis_sizes) for axis in group) for group in _axes(layout))


def view(tensor: np.ndarray, layout: str, ours: str, axis_sizes: Mapping[str, int]) -> np.ndarray:
    """The file's tensor (or the part of it that `layout` names) seen in our axes; no copy."""
    axes = [axis for group in _axes(layout) for axis in group]
    tensor = tensor.reshape([_size(axis, axis_sizes) for axis in axes])
    tensor = tensor[tuple(slice(None) if axis in axis_sizes else int(axis.split("/")[0]) % _size(axis, axis_sizes)
                          for axis in axes)]  # fmt: skip
    letters = [axis for axis in axes if axis in axis_sizes]
    return tensor.transpose([letters.index(axis) for axis in ours.split()])


def assemble(parts: Sequence[np.ndarray], layout: str, ours: str, axis_sizes: Mapping[str, int]) -> np.ndarray:
    """The way back: our arrays, one for each part of the fused tensor in order, as the tensor of the file."""
    axes = [axis for group in _axes(layout) for axis in group]
    letters = [axis for axis in axes if axis in axis_sizes]
    parts = [x.transpose([ours.split().index(axis) for axis in letters]) for x in parts]
    fused = next((position for position, axis in enumerate(axes) if axis not in axis_sizes), None)
    tensor = parts[0] if fused is None else np.stack(parts, axis=fused)
    return np.ascontiguousarray(tensor.reshape(shape(layout, axis_sizes)))
