"""Seconds of a compiled program, from its text.

The rules:

* An instruction takes the longer of its FLOPs at PRODUCTS of the peak and its bytes at MEMORY of the bandwidth. Where
  the TPU compiler has put down its own cycles, these count for products; it takes two to four times too long for what
  the memory bounds, so that there the lesser of the two counts.
* A fusion reads of an array only what it slices out of it, and writes of one that it updates in place only the update.
* A loop takes a lap times its laps: counted where the text says them, else given by the function that wrote it.
  Branches of a switch over many sizes take their mean, others the longest.
* A collective over a group of n moves (n - 1) / n of the whole array over a ring, an all-reduce twice that. Each axis
  of the chips' torus that the group spans gives a link, two where that axis closes to a ring; across slices the network
  of a device carries its share. A collective that the compiler starts and ends apart, or runs inside a product, is
  overlapped, any other is exposed. A permutation takes one link, and permutations are added up, although two may run in
  opposite directions: their sum is an upper bound. What goes from slice to slice is a transfer to the host, which the
  compiler always starts and ends apart.
* Attention kernels of the TPU, which the text does not open, take the products of the blocks on and below the diagonal
  at KERNELS of the peak.

Nothing is said of launches, the host, or the input. Differences under a tenth are not resolved.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from instructgpt_jax.plan import hlo
from instructgpt_jax.plan.hlo import Computation, Module, Op
from instructgpt_jax.plan.rings import Group, ring_seconds
from instructgpt_jax.plan.topology import Chip
from instructgpt_jax.plan.work import near_bytes, product_flops

# Shares of the peak that are reached. Large bfloat16 products come out at 0.88 to 0.97 of a TPU's peak by its
# compiler's own cycles, and of an H100 at about 0.7 of what its data sheet says.
PRODUCTS, MEMORY, KERNELS = 0.95, 0.85, 0.5
GPU_PRODUCTS = 0.7
COLLECTIVES = {
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
}  # fmt: skip
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "opt-barrier", "add-dependency", "domain", "copy-start", "copy-done", "slice-start", "slice-done", "async-done",
    "async-update", "bitcast-convert", "rng-get-and-update-state", "recv",
}  # fmt: skip
Laps = float | tuple[float, ...]
PRODUCT_CALLS = re.compile(r"gemm|matmul|conv", re.IGNORECASE)


class Collectives(NamedTuple):
    """All collectives of one kind: how many run, bytes of the whole arrays, seconds."""

    count: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


class Loop(NamedTuple):
    """A loop as it was counted: the function that wrote it, its laps, seconds of a lap; guessed where laps were not."""

    function: str
    laps: int
    seconds: float
    guessed: bool


class Cost(NamedTuple):
    """What one device does.

    compute: seconds of products and memory.
    exposed, overlapped: seconds of collectives that wait for nothing else, and of those that run beside computation.
    flops, bytes: of products, and of main memory.
    collectives: (kind, axes of the mesh, whether overlapped) -> Collectives.
    loops: those found, the inner ones first.
    """

    compute: float = 0.0
    exposed: float = 0.0
    overlapped: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[tuple[str, str, bool], Collectives] = {}
    loops: tuple[Loop, ...] = ()

    @property
    def seconds(self) -> float:
        """With every exposed collective waited for, and of the others what is longer than all computation."""
        return self.compute + self.exposed + max(0.0, self.overlapped - self.compute)

    @property
    def seconds_hidden(self) -> float:
        """With every collective behind computation, as far as it reaches: no schedule can do better."""
        return max(self.compute, self.exposed + self.overlapped)

    def times(self, count: float) -> "Cost":
        scaled = {key: Collectives(*(count * x for x in found)) for key, found in self.collectives.items()}
        return Cost(*(count * x for x in self[:5]), scaled, self.loops)

    def plus(self, other: "Cost") -> "Cost":
        found = dict(self.collectives)
        for key, more in other.collectives.items():
            found[key] = Collectives(*map(sum, zip(found.get(key, Collectives()), more, strict=True)))
        return Cost(*map(sum, zip(self[:5], other[:5], strict=True)), found, self.loops + other.loops)


def estimate(
    text: str, chip: Chip, groups: Callable[[Op], Group], laps: Mapping[str, Laps], products: float = PRODUCTS
) -> Cost:
    """The cost of a program on one device.

    Args:
      text: of `compiled.as_text()`.
      groups: of a collective, see rings.groups_on.
      laps: Python function -> laps of the loops that it wrote and that the text does not count; `outer/inner` where
        the function `inner` stands in the body; several numbers for as many loops, in the order of the text. A loop
        that is neither counted nor named, or one more than was given, runs once, and is `guessed`.
      products: share of the peak that products reach where the compiler says nothing.
    """
    module = hlo.parse(text)
    return _Reader(module, chip, groups, laps, products).computation(module.entry, {})


class _Reader:
    """One pass over a module; loops and branches are followed from the computations that hold them."""

    def __init__(self, module: Module, chip: Chip, groups, laps: Mapping[str, Laps], products: float):
        self.module, self.chip, self.groups, self.laps, self.products = module, chip, groups, laps, products
        self.met = collections.Counter()  # loops of a function so far
        self.flops_of = functools.cache(self._flops)

    def computation(self, name: str, given: dict) -> Cost:
        total, seen = Cost(), set()
        computation = self.module.computations[name]
        for op in computation.ops.values():
            if op.code == "while":
                total = total.plus(self.loop(computation, op, given))
            elif op.code == "conditional":
                total = total.plus(self.branches(op))
            elif op.code in ("call", "async-start") or op.code == "custom-call" and op.called("called_computations"):
                inner = self.computation(op.called("to_apply") or op.called("calls"), {})
                total = total.plus(_beside(inner) if op.code == "async-start" else inner)
            elif op.code.removesuffix("-start") in COLLECTIVES:
                apart = op.code.endswith("-start") or "async_collective_name" in op.attributes
                total = total.plus(self.collective(computation, op, op.code.removesuffix("-start"), apart))
            elif op.code == "send":
                total = total.plus(self.between_slices(computation, op))
            elif op.code not in FREE and not op.code.endswith("-done"):
                total = total.plus(self.instruction(computation, op))
                if op.code == "fusion":
                    total = total.plus(self.fused_collectives(op, seen))
        return total

    def loop(self, computation: Computation, op: Op, given: dict) -> Cost:
        counted = hlo.trips(self.module, computation.name, op, given)
        function, count = self.named(op) if counted is None else ("", counted)
        outer = {0: hlo.invariants(self.module, computation.name, op, given)}
        lap = self.computation(op.called("body"), outer).plus(self.computation(op.called("condition"), {}))
        laps = 1 if count is None else count
        found = Loop(function or (self.module.functions(op) or ("",))[0], laps, lap.seconds, count is None)
        total = lap.times(laps)
        return total._replace(loops=(*total.loops, found))

    def named(self, op: Op) -> tuple[str, float | None]:
        """The function that a loop was named by, and its laps."""
        body = self.module.computations[op.called("body")]
        for function in self.module.functions(op):
            if function in self.laps:
                return function, self.given(function)
            inner = [key for key in self.laps if key.startswith(f"{function}/")]
            for key in inner:
                wanted = key.partition("/")[2]
                held = [wanted in self.module.functions(one) for one in body.ops.values() if one.code not in FREE]
                if any(held):
                    return key, self.given(key)
        return "", None

    def given(self, key: str) -> float | None:
        """The laps that were given for the next loop of a function."""
        laps, number = self.laps[key], self.met[key]
        self.met[key] += 1
        if isinstance(laps, tuple):
            return laps[number] if number < len(laps) else None
        return laps

    def branches(self, op: Op) -> Cost:
        listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        names = names or [op.called(f"{which}_computation") for which in ("true", "false")]
        costs = [self.computation(name, {}) for name in names]
        if len(costs) <= 2:
            return max(costs, key=lambda cost: cost.seconds)
        total = Cost()
        for cost in costs:
            total = total.plus(cost.times(1 / len(costs)))
        return total

    # One instruction --------------------------------------------------------------------------------------------------

    def instruction(self, computation: Computation, op: Op) -> Cost:
        share = self.products
        if op.code == "fusion":
            flops, moved = self.flops_of(op.called("calls")), self.fusion_bytes(computation, op)
        elif op.code == "custom-call":
            flops, moved, share = self.custom(computation, op)
        else:
            flops = product_flops(computation, op) if op.code in ("dot", "convolution") else 0.0
            moved = self.plain_bytes(computation, op)
        by_products = flops / (share * self.chip.flops) if self.chip.flops else 0.0
        by_memory = moved / (MEMORY * self.chip.bandwidth) if self.chip.bandwidth else 0.0
        seconds = max(by_products, by_memory)
        told = re.search(r'"estimated_cycles":"(\d+)"', op.attributes)
        if told and self.chip.clock:
            by_compiler = int(told[1]) / self.chip.clock
            bound_by_memory = moved / self.chip.bandwidth > flops / self.chip.flops
            seconds = min(by_compiler, seconds) if bound_by_memory else by_compiler
        return Cost(compute=seconds, flops=flops, bytes=moved)

    def plain_bytes(self, computation: Computation, op: Op) -> float:
        if op.code == "dynamic-update-slice":
            return 2 * near_bytes(computation.ops[op.operands[1]])
        if op.code in ("dynamic-slice", "slice", "gather"):
            return 2 * near_bytes(op)
        operands = (computation.ops[name] for name in op.operands if name in computation.ops)
        return near_bytes(op) + sum(map(near_bytes, operands))

    def fusion_bytes(self, computation: Computation, op: Op) -> float:
        inside = self.module.computations[op.called("calls")]
        parameters = inside.parameters()
        moved = 0.0
        for number, name in enumerate(op.operands):
            if number in parameters and name in computation.ops and near_bytes(computation.ops[name]):
                moved += self.read(inside, parameters[number])
        return moved + (min(near_bytes(op), self.written(inside, inside.root)) if near_bytes(op) else 0.0)

    def read(self, inside: Computation, value: Op) -> float:
        """Bytes that a computation reads of one of its values, all of it at most."""
        whole, read = sum(shape.bytes for shape in value.shapes), 0.0
        for user in inside.ops.values():
            if value.name not in user.operands or user.code == "tuple":
                continue
            if user.code.removesuffix("-start") in COLLECTIVES:
                continue
            if user.code in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
                read += sum(shape.bytes for shape in user.shapes)
            elif user.code == "dynamic-update-slice" and user.operands[0] == value.name:
                continue
            elif user.code in ("bitcast", "reshape"):
                read += self.read(inside, user)
            elif user.code == "fusion":
                deeper = self.module.computations[user.called("calls")]
                parameters = deeper.parameters()
                numbers = [n for n, name in enumerate(user.operands) if name == value.name]
                read += sum(self.read(deeper, parameters[n]) for n in numbers)
            else:
                return whole
        return min(whole, read)

    def written(self, inside: Computation, name: str) -> float:
        """Bytes of a fusion's result that it writes."""
        op = inside.ops[name]
        if op.code == "parameter":
            return 0.0
        if op.code == "dynamic-update-slice":
            return sum(shape.bytes for shape in inside.ops[op.operands[1]].shapes)
        if op.code in ("bitcast", "reshape") and op.operands:
            return min(self.written(inside, op.operands[0]), sum(shape.bytes for shape in op.shapes))
        if op.code == "fusion":
            deeper = self.module.computations[op.called("calls")]
            return self.written(deeper, deeper.root)
        if op.code == "tuple":
            return sum(self.written(inside, part) for part in op.operands)
        return sum(shape.bytes for shape in op.shapes)

    def _flops(self, name: str) -> float:
        computation = self.module.computations[name]
        total = 0.0
        for op in computation.ops.values():
            if op.code in ("dot", "convolution"):
                total += product_flops(computation, op)
            elif op.code == "fusion":
                total += self.flops_of(op.called("calls"))
        return total

    def custom(self, computation: Computation, op: Op) -> tuple[float, float, float]:
        """FLOPs, bytes, and the share of the peak of what the text does not open."""
        target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
        target = target[1] if target else ""
        operands = [computation.ops[name] for name in op.operands if name in computation.ops]
        moved = near_bytes(op) + sum(map(near_bytes, operands))
        arrays = [shape for one in operands for shape in one.shapes[:1]]
        if target == "tpu_custom_call":
            kernel = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", op.name)
            heads = [shape for shape in arrays if shape.dtype in ("bf16", "f32") and len(shape.dims) >= 3]
            if kernel and len(heads) >= 2:
                products = {"fwd": 2, "dq": 3, "dkv": 4}[kernel[1]]
                told = re.search(r"block_kv\\?\W+(\d+)", op.attributes)
                blocks = max(1, heads[1].dims[-2] // (int(told[1]) if told else 512))
                full = 2 * math.prod(heads[0].dims) * heads[1].dims[-2]
                return products * full * (blocks + 1) / (2 * blocks), moved, KERNELS
            return 0.0, moved, self.products
        if "fmha" in target.lower() and arrays:  # cuDNN's attention: 2 products forward, 5 backward, half causal
            query, products = arrays[0], 5 if "backward" in target.lower() else 2
            return products * math.prod(query.dims) * max(query.dims[1:-1]), moved, KERNELS
        if PRODUCT_CALLS.search(target) and len(arrays) >= 2:
            summed = re.search(r'"lhs_contracting_dimensions":\["?([\d",]*)\]', op.attributes)
            axes = [int(axis) for axis in re.findall(r"\d+", summed[1])] if summed else [len(arrays[0].dims) - 1]
            out = math.prod(op.shapes[0].dims)
            return 2.0 * out * math.prod(arrays[0].dims[axis] for axis in axes), moved, self.products
        bookkeeping = {"AllocateBuffer", "Sharding", "ConcatBitcast", "SliceId", "annotate_device_placement"}
        return 0.0, 0.0 if target in bookkeeping else moved, self.products

    # Collectives ------------------------------------------------------------------------------------------------------

    def fused_collectives(self, op: Op, seen: set) -> Cost:
        """Those inside a fusion: steps of one beside a product, or an all-reduce with its slice: a reduce-scatter."""
        inside, total = self.module.computations[op.called("calls")], Cost()
        for one in inside.ops.values():
            kind = one.code.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            if channel and channel[1] in seen:  # its steps lie in several fusions
                continue
            seen.add(channel[1] if channel else one.name)
            scattered = "all-reduce-scatter" in inside.name and kind == "all-reduce"
            total = total.plus(self.collective(inside, one, "reduce-scatter" if scattered else kind, not scattered))
        return total

    def collective(self, computation: Computation, op: Op, kind: str, apart: bool) -> Cost:
        given = sum(shape.bytes for name in op.operands if name in computation.ops
                    for shape in computation.ops[name].shapes)  # fmt: skip
        result = sum(shape.bytes for shape in op.shapes)
        group = self.groups(op)
        whole = max(result - given if op.code.endswith("-start") else result, given) if kind == "all-gather" else given
        seconds = ring_seconds(self.chip, kind, whole, group)
        cost = Cost(overlapped=seconds) if apart else Cost(exposed=seconds)
        return cost._replace(collectives={(kind, group.axes, apart): Collectives(1.0, whole, seconds)})

    def between_slices(self, computation: Computation, op: Op) -> Cost:
        """A collective of the devices that have the same place in their slices; `data` goes over the slices."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
        if kind is None:
            return Cost()
        slices = re.search(r'_xla_megascale_target="\{([^}]*)\}', op.attributes)
        numbers = [int(number) for number in re.findall(r"\d+", slices[1])]
        count = numbers[-1] - numbers[0] + 1 if ":" in slices[1] else len(numbers)
        kind, whole = kind[1].lower().replace("_", "-"), sum(x.bytes for x in computation.ops[op.operands[0]].shapes)
        seconds = ring_seconds(self.chip, kind, whole, Group(count, "data", 1, count))
        return Cost(overlapped=seconds, collectives={(kind, "data", True): Collectives(1.0, whole, seconds)})


def _beside(cost: Cost) -> Cost:
    """What was started apart: its collectives run beside what follows."""
    found = {(kind, axes, True): some for (kind, axes, _), some in cost.collectives.items()}
    return cost._replace(exposed=0.0, overlapped=cost.exposed + cost.overlapped, collectives=found)
