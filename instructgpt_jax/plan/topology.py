"""Devices that are not here: `v5p:4x4x4`, `2xv5e:4x4`, `gpu:h100x8`, `gpu:24GBx1`, `cpu:8`.

A TPU's programs are compiled by the real compiler of the libtpu wheel (extra `plan`), those of a named GPU by XLA's own
through the CUDA plugin (extra `gpu`), and those of CPUs by the local compiler with as many fake devices. Neither needs
the device, and none is asked for. Without the plugin a GPU's memory is arithmetic from shapes.
"""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies
from packaging.requirements import Requirement

FORM = re.compile(r"(?:(\d+)x)?(v4|v5e|v5p|v6e):(\d+(?:x\d+){1,2})|gpu:(\w+?)x(\d+)|cpu:(\d+)")
EXAMPLES = "v5p:4x4x4, 2xv5p:4x4x4, v5e:2x4, gpu:h100x8, gpu:24GBx1, cpu:8"


class Chip(NamedTuple):
    """What a device can do; 0 = not known, and then nothing that depends on it is said.

    flops: of bfloat16 products, a second, at the peak.
    bandwidth: bytes a second of its memory.
    capacity: bytes of memory that programs may take.
    link: bytes a second and direction of one link to a neighbour; of a GPU of all its links together.
    clock: cycles a second in which the TPU compiler counts.
    network: bytes a second from slice to slice, or host to host, for each device.
    closes: a side of a slice that is a multiple of it is a ring of links.
    """

    flops: float
    bandwidth: float
    capacity: float
    link: float = 0.0
    clock: float = 0.0
    network: float = 0.0
    closes: int = 4


# Peaks, bandwidth and capacity: Google Cloud's pages of each generation. One-way bandwidth of a link, and of the
# data-centre network for each chip: Austin et al. 2025, "How to Scale Your Model", chapter 2.
TPUS = {
    "v4": Chip(275e12, 1.228e12, 32e9, 4.5e10, 1.05e9, 6.25e9),
    "v5e": Chip(197e12, 0.819e12, 16e9, 4.5e10, 1.5e9, 3.125e9, 16),
    "v5p": Chip(459e12, 2.765e12, 95e9, 9.0e10, 1.75e9, 6.25e9),
    "v6e": Chip(918e12, 1.64e12, 32e9, 9.0e10, 1.75e9, 12.5e9, 16),
}
# NVIDIA's data sheets (SXM; dense). A process may take MEMORY_FRACTION of the memory.
GPUS = {
    "h100": Chip(989e12, 3.35e12, 85.5e9, 450e9, 0.0, 50e9),
    "h200": Chip(989e12, 4.8e12, 151.4e9, 450e9, 0.0, 50e9),
}
MEMORY_FRACTION = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))  # JAX's own default
# For libtpu: no question to the cloud, more than one at a time, and no word of a TPU that it does not find.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_WORKER_HOSTNAMES": "localhost",
}  # fmt: skip
# What XLA wants to know of a GPU that is not here: of a Hopper, and of any other as of an Ampere.
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: {block} cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""


class Topology(NamedTuple):
    """Devices to plan for.

    name: as it was asked for.
    kind: 'tpu', 'gpu' or 'cpu'.
    chip: each of them.
    devices: descriptions that JAX compiles for; fake ones where `compiles` is False.
    slices: of a TPU, joined by the network.
    compiles: whether programs are compiled, or their memory is arithmetic.
    by: what compiles, with its version.
    """

    name: str
    kind: str
    chip: Chip
    devices: Sequence[jax.Device]
    slices: int
    compiles: bool
    by: str


def describe(name: str) -> Topology:
    """The topology of a name. Nothing may have asked JAX for its devices before.

    Raises:
      ValueError: an unknown name, a shape that the generation does not have, a compiler that is missing or too new.
    """
    form = FORM.fullmatch(name)
    if form is None:
        known = f"{', '.join(TPUS)} with a shape, gpu:{{{','.join(GPUS)},NNGB}}xN or cpu:N"
        raise ValueError(f"--plan must be a topology ({known}), for example {EXAMPLES}; got {name!r}")
    slices, tpu, shape, gpu, gpus, cpus = form.groups()
    if min(map(int, re.findall(r"\d+", shape or gpus or cpus))) < 1 or slices == "0":
        raise ValueError(f"--plan must have at least one device, for example {EXAMPLES}; got {name!r}")
    jax.config.update("jax_platforms", None if gpu and _has_plugin() else "cpu")  # no TPU is touched
    if tpu:
        return _tpu(name, tpu, shape, int(slices or 1))
    if gpu:
        return _gpu(name, gpu, int(gpus))
    return Topology(name, "cpu", Chip(0, 0, _memory() / int(cpus)), _fakes(int(cpus)), 1, True, f"XLA {_jaxlib()}, CPU")


def _tpu(name: str, generation: str, shape: str, slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--plan={name} needs libtpu, the compiler of TPUs: pip install instructgpt-jax[plan]")
    installed, wanted = importlib.metadata.version("libtpu"), _wanted_libtpu()
    if wanted and not wanted.specifier.contains(installed, prereleases=True):
        raise ValueError(
            f"--plan={name} needs the libtpu of jax {jax.__version__}: pip install 'libtpu{wanted.specifier}', got "
            f"libtpu {installed}"
        )
    os.environ.update(QUIET)
    sides = [int(side) for side in shape.split("x")]
    flat = generation in ("v5e", "v6e")
    if flat and len(sides) != 2:
        raise ValueError(f"--plan must have two sides for {generation}, for example {generation}:2x4, got {name!r}")
    options = {}
    if flat and all(side == 1 for side in sides):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if generation == "v4":  # without these a chip would be two devices
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": slices}
        options["wrap"] = (all(side % 4 == 0 for side in sides) and len(sides) == 3,) * 3
        sides += [1] * (3 - len(sides))
    elif slices > 1:
        options["num_slices"] = slices
    layout = f"{generation}:{'x'.join(map(str, sides))}"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=layout, **options).devices
    except Exception as error:
        told = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(f"--plan must be a shape that {generation} has, got {name!r}: {told}") from None
    return Topology(name, "tpu", TPUS[generation], devices, slices, True, f"libtpu {installed}")


def _gpu(name: str, model: str, count: int) -> Topology:
    size = re.fullmatch(r"(\d+)GB", model)
    if model not in GPUS and not size:
        raise ValueError(f"--plan must name a GPU of {tuple(GPUS)} or its memory, such as gpu:24GBx1, got {name!r}")
    whole = GPUS[model] if model in GPUS else Chip(0, 0, float(size[1]) * 1e9)
    chip = whole._replace(capacity=whole.capacity * MEMORY_FRACTION)
    if not _has_plugin():
        by = "arithmetic from shapes (no CUDA plugin: extra gpu)"
        return Topology(name, "gpu", chip, _fakes(count), 1, False, by)
    os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", CUDA_VISIBLE_DEVICES="")
    jax.devices()  # makes JAX register the plugin
    hopper = model in GPUS
    described = DESCRIPTION.format(
        name=f"NVIDIA {model.upper()}",
        memory=int(whole.capacity),
        bandwidth=int(whole.bandwidth) or 900_000_000_000,
        shared=233_472 if hopper else 102_400,
        block=232_448 if hopper else 101_376,
        cores=132 if hopper else 82,
        major="9" if hopper else "8 minor: 6",
    )
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=model, topology=f"1x1x{count}", target_config=described
    )
    return Topology(name, "gpu", chip, found.devices, 1, True, f"XLA {_jaxlib()} with the CUDA plugin, without a GPU")


def _has_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def _fakes(count: int) -> Sequence[jax.Device]:
    """So many devices of this CPU.

    Raises:
      ValueError: JAX has been asked for its devices before, and has another number of them.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # a test, or a notebook
        pass
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(f"--plan needs {count} CPU devices, and this process has started with {len(found)}")
    return found[:count]


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _jaxlib() -> str:
    return importlib.metadata.version("jaxlib")


def _wanted_libtpu() -> Requirement | None:
    """What the installed jax says of libtpu; None where it says nothing."""
    asked = (Requirement(line) for line in importlib.metadata.requires("jax") or ())
    return next((one for one in asked if one.name == "libtpu"), None)
