"""How many slots of sampling fit into the memory of a device, by the compiled program's own account."""

import math
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructgpt_jax import process
from instructgpt_jax.sharding import batch_shards

GIB = 2**30


def free_bytes() -> int:
    """What a program may still take on each device, the same on every process.

    A CPU does not say: half of the machine's memory, which its devices share.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // len(jax.local_devices())
    if jax.process_count() > 1:
        free = int(multihost_utils.process_allgather(np.int32(free >> 20)).min()) << 20
    return free


def needed_bytes(compile_with: Callable[[int], jax.stages.Compiled], slots: int) -> float:
    """What the program takes on a device beside its arguments; inf where the compiler refuses it for that."""
    try:
        account = compile_with(slots).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    return account.temp_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes


def plan_slots(compile_with: Callable[[int], jax.stages.Compiled], wanted: int, most: int) -> int:
    """The slots of a sampling program, and says so.

    Args:
      compile_with: slots -> the program; jax keeps it, so that calling it later compiles nothing again.
      wanted: config.rollout.wave; 0 = as many as fit, to an eighth.
      most: prompts.

    Raises:
      ValueError: more are wanted than fit, or not even one fits on each shard of the mesh.
    """
    mesh, free, found = jax.sharding.get_abstract_mesh(), free_bytes(), {}
    unit = 1 if mesh.empty else batch_shards(mesh)

    def need(slots: int) -> float:
        if slots not in found:
            found[slots] = needed_bytes(compile_with, slots)
        return found[slots]

    slots = min(wanted or most, most)
    if need(slots) > free:
        slots = _largest(need, unit, slots, free)
        if not slots:
            raise ValueError(
                f"config.rollout.wave must fit into the memory of a device: {unit} slots already take "
                f"{need(unit) / GIB:.2f} GiB, {free / GIB:.2f} are free"
            )
        if wanted:
            raise ValueError(
                f"config.rollout.wave must be at most {slots}, so many slots fit into the {free / GIB:.2f} GiB that "
                f"are free on a device, got {wanted}"
            )
    if not wanted:
        process.say(
            f"sampling: {slots} slots for {most} prompts, {need(slots) / GIB:.2f} of {free / GIB:.2f} GiB of a device"
        )
    return slots


def _largest(need: Callable[[int], float], unit: int, most: int, free: int) -> int:
    """The most slots, a multiple of unit, that fit, to an eighth; 0 = none. `most` do not."""
    low, high = unit, most
    if need(low) > free:
        return 0
    while high - low > max(unit, low // 8):
        slope = (need(high) - need(low)) / (high - low)  # memory grows by slots
        guess = low + (free - need(low)) / slope if math.isfinite(slope) and slope > 0 else (low + high) / 2
        guess = min(max(int(guess) // unit * unit, low + unit), (high - 1) // unit * unit)
        low, high = (guess, high) if need(guess) <= free else (low, guess)
    return low
