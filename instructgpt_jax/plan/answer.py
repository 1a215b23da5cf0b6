"""What a stage takes on some devices: memory by what holds it, seconds by what they go to, for each program.

Memory is the compiler's own account of a program, and beside it what else the stage keeps on the devices meanwhile.
Where nothing compiles, it is arithmetic: the arrays of the stage, gradients, and the activations that the remat policy
keeps. Seconds are `cost.py`'s.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from instructgpt_jax import losses, process
from instructgpt_jax.plan import cost, programs, rings, sampling, shapes
from instructgpt_jax.plan.programs import Program
from instructgpt_jax.plan.topology import Topology

REST = "activations and temporaries"
# Rows of the width that a remat policy keeps of a token and layer. `none`: Korthikanti et al. 2022, section 4.1, 34
# bytes in 16-bit numbers; `full`: a layer's input; the others by what models/transformer.py saves.
# Machine code is not looked at: buffers are laid out before it is made.
WITHOUT_CODE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# What the TPU compiler says that it would have needed, in all or beside the arguments.
REFUSED = re.compile(r"((?P<all>Used )|temporaries \()(?P<size>[\d.]+)(?P<unit>[KMGT])")
KERNEL = re.compile(r"splash_m[hq]a_\w+?(?=_no_residuals|_residuals)|__cudnn\$\w+")
KEPT = {"none": 17, "dots": 10, "light": 6, "full": 1}


@dataclasses.dataclass
class Answer:
    """A program on the devices.

    memory: bytes of a device by what takes them.
    capacity: bytes that there are.
    compiled: seconds that the compiler took; 0 = arithmetic.
    flops: model FLOPs of a call, all devices.
    repeats: calls a step.
    seconds, hidden: of a call, collectives exposed, and hidden as far as they can be; 0 = not known.
    collectives: {kind, axes, overlapped, count, bytes, seconds} each, the longest first.
    decode: milliseconds of a token of every slot, and what bandwidth allows; {} = nothing is sampled.
    notes: what a reader must know of the numbers.
    kernels: of attention, that stand in the program.
    """

    memory: dict[str, float]
    capacity: float
    compiled: float
    flops: float
    repeats: float
    seconds: float
    hidden: float
    collectives: list[dict]
    decode: dict[str, float]
    notes: list[str]
    kernels: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    def mfu(self, topology: Topology) -> float:
        """Share of the devices' peak that goes into model FLOPs, collectives exposed; 0 = not known."""
        peak = topology.chip.flops * len(topology.devices)
        return self.flops / (self.seconds * peak) if self.seconds and peak else 0.0


def of(
    program: Program,
    name: str,
    topology: Topology,
    mesh: Mesh,
    options: dict[str, str],
    texts: epath.Path | None = None,
) -> Answer:
    """The answer for one program; the mesh is in use.

    Args:
      options: of the TPU compiler.
      texts: a folder for the compiled program; None = it is not written.
    """
    notes: list[str] = []
    resident = {label: device_bytes(tree) for label, tree in program.resident.items()}
    resident = {label: size for label, size in resident.items() if size}
    decode = _decode_limit(program, topology, mesh)
    known = topology.chip.capacity, 0.0, program.flops, program.repeats, 0.0, 0.0, [], decode, notes
    if program.gradients is not None:
        resident["gradients"] = device_bytes(program.gradients)
    if program.sampled:
        resident["cache"] = sampling.cache_bytes(program.sampled, mesh)
    if not topology.compiles:
        resident[REST] = _arithmetic(program, mesh)
        notes.append("memory by arithmetic from shapes, without a compiler")
        return Answer(resident, *known)
    found, depth = _compile(program, name, topology, mesh, options, texts, notes)
    if isinstance(found, float):  # the compiler refused: what it would have needed
        resident[REST] = max(found - sum(resident.values()), 0.0)
        return Answer(resident, *known)
    needed, spent, estimated = (_extrapolated(*column, depth) for column in found)
    own = device_bytes(program.make(None)[1])
    # Gradients and cache are among the program's temporaries: the rest of these is what is not known by name.
    inside = sum(resident.get(label, 0.0) for label in ("gradients", "cache"))
    resident[REST] = max(needed - own - inside, 0.0)
    if needed - own < inside:  # not all of them are alive at the peak
        for label in ("gradients", "cache"):
            if label in resident:
                resident[label] = max(needed - own, 0.0) * resident[label] / inside
    return Answer(
        memory=resident,
        capacity=topology.chip.capacity,
        compiled=spent,
        flops=program.flops,
        repeats=program.repeats,
        seconds=estimated["seconds"],
        hidden=estimated["hidden"],
        collectives=estimated["collectives"],
        decode=decode | ({"milliseconds": 1e3 * estimated["decode"]} if decode and estimated["decode"] else {}),
        notes=notes,
        kernels=estimated["kernels"],
    )


def device_bytes(tree: Any) -> float:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""

    def one(leaf) -> float:
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
        return math.prod(shape) * shapes.item_bytes(leaf.dtype)

    return float(sum(map(one, jax.tree.leaves(tree))))


def _compile(program: Program, name: str, topology: Topology, mesh: Mesh, options: dict, texts, notes: list[str]):
    """Columns of (bytes needed, seconds of compiling, estimates) for the depths that were compiled, and these.

    A float in their place is what the compiler would have needed, where it refuses the program for its memory.
    """
    depth, rows = (), []
    of_compiler = {"tpu": options, "cpu": WITHOUT_CODE}.get(topology.kind, {})
    if topology.kind != "tpu" and program.sampled and program.sampled.network.num_layers > max(programs.SHALLOW):
        depth = (*programs.SHALLOW, program.sampled.network.num_layers)
        notes.append(f"{depth[0]} and {depth[1]} layers compiled, {depth[2]} extrapolated")
    for layers in depth[:2] or (None,):
        function, arguments = program.make(layers)
        process.say(f"compiling {name}" + (f" of {layers} layers" if layers else ""))
        start = time.perf_counter()
        try:
            compiled = function.lower(*arguments).compile(of_compiler)
        except jax.errors.JaxRuntimeError as error:
            refused = REFUSED.search(str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or not refused:
                raise
            notes.append("the compiler refuses it for its memory")
            needed = float(refused["size"]) * 1024.0 ** "_KMGT".index(refused["unit"])
            return needed + (0 if refused["all"] else device_bytes(arguments)), ()
        spent = time.perf_counter() - start
        text = compiled.as_text() if topology.chip.flops or texts else ""
        if texts is not None:
            texts.mkdir(parents=True, exist_ok=True)
            (texts / f"{name.replace(' ', '_')}{f'_{layers}_layers' if layers else ''}.hlo").write_text(text)
        estimated = _estimate(text, program, topology, mesh, notes)
        rows.append((needed_bytes(compiled.memory_analysis()), spent, estimated))
    return tuple(zip(*rows, strict=True)), depth


def needed_bytes(account) -> float:
    """Bytes of a device while a program runs, its arguments with it.

    The sum of arguments, results and temporaries; what is donated counts once.
    """
    held = account.argument_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    return float(held + account.temp_size_in_bytes + account.generated_code_size_in_bytes)


def _estimate(text: str, program: Program, topology: Topology, mesh: Mesh, notes: list[str]) -> dict:
    """`seconds`, `hidden`, `decode` (seconds of a token), `collectives` and `kernels` of a compiled program's text."""
    kernels = tuple(sorted(set(KERNEL.findall(text))))
    if not topology.chip.flops:
        return {"seconds": 0.0, "hidden": 0.0, "decode": 0.0, "collectives": [], "kernels": kernels}
    groups = rings.groups_on(mesh.devices, mesh.axis_names, topology.chip.closes)
    products = cost.GPU_PRODUCTS if topology.kind == "gpu" else cost.PRODUCTS
    found = cost.estimate(text, topology.chip, groups, program.laps, products)
    decoding = [loop for loop in found.loops if loop.function.endswith("/_decode")]
    guessed = sorted({loop.function for loop in found.loops if loop.guessed and loop.seconds > 0.01 * found.seconds})
    if guessed and not program.sampled:
        notes.append(f"loops taken to run once: {', '.join(guessed)}")
    if program.sampled and not decoding:
        notes.append("no loop of the program was known to decode: its seconds are not known")
    whole = not program.sampled or decoding
    listed = [
        {"kind": kind, "axes": axes, "overlapped": apart} | some._asdict()
        for (kind, axes, apart), some in found.collectives.items()
    ]
    return {
        "seconds": found.seconds if whole else 0.0,
        "hidden": found.seconds_hidden if whole else 0.0,
        "decode": sum(loop.laps * loop.seconds for loop in decoding) / max(sum(loop.laps for loop in decoding), 1),
        "collectives": sorted(listed, key=lambda one: -one["seconds"]),
        "kernels": kernels,
    }


def _extrapolated(*values):
    """A value that grows linearly with depth, from two depths to a third; the last argument are these, () = one value.

    >>> _extrapolated(10.0, 14.0, (2, 4, 24))
    54.0
    """
    *found, depth = values
    if not depth:
        return found[0]
    low, high, wanted = depth
    if isinstance(found[0], dict):
        merged = {key: _extrapolated(found[0][key], found[1][key], depth) for key in ("seconds", "hidden", "decode")}
        kinds = {(one["kind"], one["axes"], one["overlapped"]): one for one in found[0]["collectives"]}
        listed = []
        for one in found[1]["collectives"]:
            less = kinds.get((one["kind"], one["axes"], one["overlapped"]), {})
            grown = {key: _extrapolated(less.get(key, 0.0), one[key], depth) for key in ("count", "bytes", "seconds")}
            listed.append(one | grown)
        return merged | {"collectives": listed, "kernels": found[1]["kernels"]}
    return found[0] + (found[1] - found[0]) * (wanted - low) / (high - low)


def _decode_limit(program: Program, topology: Topology, mesh: Mesh) -> dict[str, float]:
    """`limit_milliseconds` of a token of every slot: weights and the filled columns, read at the bandwidth."""
    if not program.sampled or not topology.chip.bandwidth:
        return {}
    sampled = program.sampled
    filled = sampled.filled / sampled.columns * sampling.cache_bytes(sampled, mesh)
    read = sampling.weight_bytes(sampled, mesh) + filled
    return {"limit_milliseconds": 1e3 * read / topology.chip.bandwidth}


def _arithmetic(program: Program, mesh: Mesh) -> float:
    """Bytes of activations and temporaries of a device where nothing was compiled."""
    if program.packed is None:
        return 0.0
    network, rows, length = program.packed
    size = jnp.dtype(network.dtype).itemsize
    kept, width = KEPT[network.remat] * network.num_layers, network.width
    whole = KEPT["none"]  # of the layer that is being computed
    activations = rows * length * width * size * ((kept + whole) if program.gradients is not None else whole)
    chunk = min(losses.chunk_of(network.padded_vocab_size, mesh.devices.flat[0].device_kind), rows * length)
    logits = 3 * 4 * chunk * network.padded_vocab_size / mesh.shape["tensor"]
    copies = device_bytes(program.gradients) / 4 * size if program.gradients is not None else 0.0
    return activations + logits + copies  # the weights are cast before they are gathered
