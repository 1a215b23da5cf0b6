"""Collectives: whom they join, and how long a ring of them takes."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from instructgpt_jax.plan.hlo import Op
from instructgpt_jax.plan.topology import Chip

LINKS = 0.85  # share of a link's bandwidth that is reached
LATENCY = 5e-6  # seconds of a collective, whatever its size


class Group(NamedTuple):
    """Whom a collective joins.

    size: devices.
    axes: of the mesh along which they differ, joined by ×.
    links: a device sends over at once.
    slices: of a TPU that it spans.
    """

    size: int
    axes: str
    links: int
    slices: int


def ring_seconds(chip: Chip, kind: str, whole: float, group: Group) -> float:
    """Seconds of a collective on an array of `whole` bytes, counted over the group; see the top of cost.py."""
    if group.size <= 1:
        return 0.0
    share = (group.size - 1) / group.size
    moved = {
        "all-gather": whole * share,
        "reduce-scatter": whole * share,
        "all-reduce": 2 * whole * share,
        "all-to-all": whole * share / 2,
    }.get(kind, whole)
    links = 1 if kind == "collective-permute" and chip.clock else group.links
    speed = LINKS * links * chip.link
    seconds = moved / speed if speed else 0.0
    if group.slices > 1 and chip.network:  # each device carries its share of what goes from slice to slice
        between = moved * group.slices / group.size
        seconds = max(seconds, between / (LINKS * chip.network))
    return seconds + LATENCY


def groups_on(devices: np.ndarray, axes: tuple[str, ...], closes: int) -> Callable[[Op], Group]:
    """Whom the collectives of a program join, for the mesh it was compiled for.

    Args:
      devices: of the mesh, in its shape; a TPU's have `coords`, others hang on a switch.
      axes: their names.
      closes: a side of the torus that is a multiple of it is a ring; others are open lines.
    """
    flat = list(devices.flat)
    on_torus = bool(getattr(flat[0], "coords", None))
    sides = [max(side) + 1 for side in zip(*(device.coords for device in flat), strict=True)] if on_torus else []

    def of(op: Op) -> Group:
        members = members_of(op.attributes, len(flat))
        places = np.array(np.unravel_index(members, devices.shape)).T
        differ = [axis for n, axis in enumerate(axes) if len(set(places[:, n])) > 1]
        spans = [len({flat[member].coords[n] for member in members}) > 1 for n in range(len(sides))]
        links = sum(2 if side % closes == 0 else 1 for side, spanned in zip(sides, spans, strict=True) if spanned)
        slices = len({getattr(flat[member], "slice_index", None) or 0 for member in members})
        return Group(len(members), " × ".join(differ) or "none", max(links, 1), slices)

    return of


def members_of(attributes: str, count: int) -> list[int]:
    """The first group of a collective among `count` devices.

    >>> members_of("replica_groups={{0,2},{1,3}}", 4), members_of("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ([0, 2], [0, 2])
    >>> members_of("replica_groups=mesh['x'=2,'y'=2] {'x'}", 4)
    [0, 2]
    >>> members_of("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", 8)
    [0, 1, 2, 3]
    """
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _order(named[2] or "", math.prod(sizes.values()))
        ids = order.reshape(list(sizes.values()))
        wanted = re.findall(r"'(\w+)'", named[3])
        return ids[tuple(slice(None) if name in wanted else 0 for name in sizes)].ravel().tolist()
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        shape, reshaped = ([int(n) for n in part.split(",")] for part in tiled.groups()[:2])
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        ids = ids.transpose([int(n) for n in tiled[3].split(",")]) if tiled[3] else ids
        return ids.reshape(shape)[0].ravel().tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed and listed[1]:
        return [int(n) for n in listed[1].split(",")]
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    return [int(pair[1]), int(pair[2])] if pair else list(range(count))


def _order(text: str, count: int) -> np.ndarray:
    """Devices in the order of a mesh: `[2,4]T(1,0)` = their numbers in that shape, transposed; or one after another."""
    tiled = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not tiled:
        return np.array([int(n) for n in text.split(",")] if text else range(count))
    ids = np.arange(count).reshape([int(n) for n in tiled[1].split(",")])
    return (ids.transpose([int(n) for n in tiled[2].split(",")]) if tiled[2] else ids).ravel()
