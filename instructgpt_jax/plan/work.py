"""FLOPs of a product and bytes of a value, from an instruction's text."""

import math
import re

import numpy as np

from instructgpt_jax.plan.hlo import Computation, Op


def near_bytes(op: Op) -> float:
    """Bytes of a value that lie in main memory."""
    return sum(shape.bytes for shape in op.shapes if not shape.far)


def product_flops(computation: Computation, op: Op) -> float:
    """Of a `dot` or a `convolution`, which is what the TPU compiler makes of products: 2 a multiplication.

    A convolution counts the taps of its window that meet an input.
    """
    left, right = (computation.ops[name].shapes[0].dims for name in op.operands[:2])
    out = op.shapes[0].dims
    if op.code == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in summed[1].split(",") if axis)
    of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", op.attributes) or ["", ""])[1]))
    taps = 1.0
    for axis in range(sum(label.isdigit() for label in of_left)):
        part = {name: value.split("x")[axis] for name, value in window.items()}
        place = (labels.index(str(axis)) for labels in (of_left, of_right, of_out))
        taps *= _taps(*(dims[n] for dims, n in zip((left, right, out), place, strict=True)), part)
    groups = {name: int(n) for name, n in re.findall(r"(feature|batch)_group_count=(\d+)", op.attributes)}
    rows = left[of_left.index("b")] // groups.get("batch", 1)
    summed = left[of_left.index("f")] // groups.get("feature", 1)
    return 2.0 * taps * rows * summed * out[of_out.index("f")]


def _taps(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of a result and a tap of the kernel that meet an input, along one axis of a convolution."""
    low = int(window.get("pad", "0_0").split("_")[0])
    spread, apart = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    at = np.arange(out)[:, None] * int(window.get("stride", 1)) + np.arange(kernel)[None] * apart - low
    return int(((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum())
