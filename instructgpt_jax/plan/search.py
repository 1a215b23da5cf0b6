"""Where a plan does not fit: the nearest setting that does.

Each try mends what takes the most in the largest program. Activations: fewer rows of a microbatch, then more remat.
A cache: fewer slots, and last 8 bits, which change what is sampled. Arrays of the state: parameters over more devices
(`data` to `fsdp`), then over `tensor`. After a mend what did not fit is compiled again, after one of the mesh all
programs are.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from instructgpt_jax import process, sharding
from instructgpt_jax.models.config import REMAT
from instructgpt_jax.plan import answer, flags, programs, shapes
from instructgpt_jax.plan.answer import REST, Answer
from instructgpt_jax.plan.topology import Topology
from instructgpt_jax.validate import validate

TRIES = 12  # mends, each a compilation
MOST_REMAT = ("light", "full")


def nearest(
    config: ConfigDict, answers: dict[str, Answer], found: Topology, known: shapes.Known, asked: flags.Asked
) -> dict[str, Any]:
    """`settings`, key -> value, that make every program fit, and `total_bytes` of the largest; {} = none was found."""
    config, settings, answers = ConfigDict(config.to_dict()), {}, dict(answers)
    for _ in range(TRIES):
        over = {name: one for name, one in answers.items() if not one.fits}
        if not over:
            return {"settings": settings, "total_bytes": round(max(one.total for one in answers.values()))}
        name = max(over, key=lambda name: over[name].total)
        for mend in mends(config, over[name], name, len(found.devices)):
            changed = ConfigDict(config.to_dict())
            changed.update_from_flattened_dict(mend)
            try:
                mesh = sharding.make_mesh(changed.mesh, found.devices)
                validate(changed, mesh)
                planned = programs.plan(changed, mesh, known, found.kind == "cpu")
            except ValueError:  # it does not divide
                continue
            process.say(f"plan: {name} takes {over[name].total / 1e9:.1f} GB, trying {mend}")
            config, settings = changed, settings | mend
            again = {name} if set(answers) - {name} and not any("mesh" in key for key in mend) else set(answers)
            again |= {other for other, one in answers.items() if not one.fits}
            with jax.set_mesh(mesh):
                for other in again:
                    answers[other] = answer.of(planned.programs[other], other, found, mesh, asked.options)
            break
        else:
            return {}
    return {}


def mends(config: ConfigDict, one: Answer, name: str, devices: int) -> list[dict[str, Any]]:
    """Changes of the configuration that take from what takes the most, the nearest first.

    Args:
      one: of the program `name`, which does not fit.
    """
    mesh, slices = sharding_sizes(config, devices), config.mesh.get("slices", 1)
    shards = mesh["data"] * mesh["fsdp"]
    sharded = []  # more ways to split the state
    if mesh["data"] > slices:
        sharded.append({"mesh.data": slices, "mesh.fsdp": shards // slices, "mesh.tensor": mesh["tensor"]})
    if mesh["fsdp"] % 2 == 0:
        halved = mesh["fsdp"] // 2
        sharded.append({"mesh.data": mesh["data"], "mesh.fsdp": halved, "mesh.tensor": 2 * mesh["tensor"]})
    section, stage = config[config.stage], config.stage
    fewer = []
    for key in ("microbatch_rows", "ptx_microbatch_rows"):
        rows = section.get(key, 0)
        if rows > shards and rows // 2 % shards == 0 and (key == "microbatch_rows" or section.ptx_coef):
            fewer.append({f"{stage}.{key}": rows // 2})
    trained = "policy" if stage == "ppo" else "model"
    remat = config.models[trained].get("remat", "none") if trained in config.models else "full"
    more = []
    if "update" in name or name == "learn":
        kinds = [kind for kind in MOST_REMAT if REMAT.index(kind) > REMAT.index(remat)]
        more = [{f"models.{trained}.remat": kind} for kind in kinds]
    slots = []
    wave = config.get("rollout", {}).get("wave", 0) or section.batch_size
    if "rollout" in config and wave > shards and wave // 2 % shards == 0:
        slots = [{"rollout.wave": wave // 2}]
    smaller = []
    if config.get("rollout", {}).get("cache", "int8") == "full" and section.get("old_logprobs", "") != "sampling":
        smaller = [{"rollout.cache": "int8"}]
    blame = max(one.memory, key=one.memory.get)
    if blame == "cache":
        return [*slots, *sharded, *smaller]
    if blame == REST:
        return [*fewer, *more, *(slots if name in ("rollout",) else []), *sharded]
    return [*sharded, *fewer, *more, *slots]


def sharding_sizes(config: ConfigDict, devices: int) -> dict[str, int]:
    """The sizes of the mesh, with the rest of the devices for -1."""
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    known = 1
    for size in sizes.values():
        known *= size if size != -1 else 1
    return {axis: size if size != -1 else devices // known for axis, size in sizes.items()}
