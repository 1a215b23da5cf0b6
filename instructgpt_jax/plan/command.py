"""`--plan=TOPOLOGY`: a configuration's stages planned, told as tables, and written as plan.json."""

import concurrent.futures
import json
import os
import platform
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from instructgpt_jax import pipeline, sharding
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.plan import answer, flags, programs, search, shapes, topology
from instructgpt_jax.plan.answer import Answer
from instructgpt_jax.plan.programs import Planned
from instructgpt_jax.plan.topology import Topology
from instructgpt_jax.validate import validate

PAPER = {"SFT": 4.9, "PPO-ptx": 60.0}  # petaflop/s-days of the 175B models (Ouyang et al. 2022, section 5.1)
AT_ONCE = {"cpu": 2, "gpu": 1, "tpu": 1}  # programs that are compiled: the large ones take gigabytes
PETAFLOP_DAY = 1e15 * 86_400
NUMBERS = ("kl_coef", "ptx_coef", "pretraining_fraction", "ema_decay")  # of which a program has only whether
LENGTHS = ("num_steps", "num_epochs", "iterations", "num_prompts", "num_batches", "models", "order", "curves", "title")


def run(config: ConfigDict, name: str, asked: flags.Asked) -> dict[str, Any]:
    """Plans a configuration, prints the answer and writes it.

    Args:
      config: of a stage or a pipeline, as the user gave it.
      name: of the configuration, for the folder.

    Raises:
      ValueError: a topology, shape or setting that cannot be; nothing has been compiled by then.
    """
    found = topology.describe(asked.topology)
    known = shapes.Known(shapes.parse_sizes(asked.size), {})
    stages = {"": config}
    if config.get("stage", "") == "pipeline":
        stages, known = _stages(config, known)
    prepared = {label: _prepared(stage, found, known, label) for label, stage in stages.items()}
    jobs = {label: job for label, job in prepared.items() if job is not None}
    if not jobs:
        raise ValueError("--plan must have a stage that runs a large program, got none in this configuration")
    told = {
        "topology": found.name,
        "devices": len(found.devices),
        "compiler": found.by,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "stages": {},
    }
    folder = epath.Path(asked.out or f"plans/{name}_{found.name.replace(':', '_')}")
    console = Console()
    console.print(f"{name} on {found.name}: {len(found.devices)} devices, {found.by}", highlight=False)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE[found.kind], "plan") as pool:
        compiling: dict[str, tuple[str, dict[str, concurrent.futures.Future]]] = {}  # by what the programs hang on
        for label, (stage, mesh, planned) in jobs.items():
            key = _same(stage, known)
            if key not in compiling:
                parts = planned.programs.items()
                texts = folder / label if asked.texts else None
                futures = {
                    part: pool.submit(_answer, one, part, found, mesh, asked.options, texts) for part, one in parts
                }
                compiling[key] = label or stage.stage, futures
        for label, (stage, mesh, planned) in jobs.items():
            label, (first, parts) = label or stage.stage, compiling[_same(stage, known)]
            answers = {part: future.result() for part, future in parts.items()}
            told["stages"][label] = plan = _plan(stage, mesh, planned, answers, found, asked)
            if not plan["fits"] and asked.search:
                plan["nearest"] = search.nearest(stage, answers, found, known, asked)
            if first == label:
                _tell(console, label, plan, answers, found)
            else:
                text = f"{label}: the programs of {first}\n  {_sentence(plan, answers)}"
                console.print(text, highlight=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    workdirs.write_atomically(folder / "plan.json", json.dumps(told, indent=2) + "\n")
    console.print(f"written to {folder}/plan.json", highlight=False)
    return told


def _answer(program: programs.Program, name: str, found: Topology, mesh: Any, options: dict, texts) -> Answer:
    with jax.set_mesh(mesh):  # of this thread
        return answer.of(program, name, found, mesh, options, texts)


def _stages(config: ConfigDict, known: shapes.Known) -> tuple[dict[str, ConfigDict], shapes.Known]:
    """The stages of a pipeline, by name, and what is known by their workdirs."""
    given = config.copy_and_resolve_references()
    with given.unlocked():
        for key, value in given.items():  # what the user must still give says nothing of shapes
            if key != "order" and value == ():
                given[key] = (f"jsonl:{key}",)
            elif key not in ("only",) and value == "":
                given[key] = key
    workdir = "{pipeline}"
    names = [config.only] if config.only else list(config.order)
    made = {name: pipeline.stage_config(given, name, workdir) for name in config.order}
    by_workdir = {os.path.join(workdir, name): stage for name, stage in made.items() if "models" in stage}
    return {name: made[name] for name in names}, known._replace(stages=by_workdir)


def _prepared(
    config: ConfigDict, found: Topology, known: shapes.Known, label: str
) -> tuple[ConfigDict, jax.sharding.Mesh, Planned] | None:
    """A stage's mesh and programs; None where a stage of a pipeline runs nothing large."""
    try:
        if label and config.stage not in programs.STAGES:
            return None
        config = without_sources(config)
        mesh = sharding.make_mesh(config.mesh, found.devices)
        validate(config, mesh)
        return config, mesh, programs.plan(config, mesh, known, found.kind == "cpu")
    except ValueError as error:
        if not label:
            raise
        raise ValueError(f"stage {label} of the pipeline: {error}") from error


def without_sources(config: ConfigDict) -> ConfigDict:
    """The configuration with a source of each kind: none is read, and a user need not have any yet."""
    config = ConfigDict(config.to_dict())
    for kind in ("demonstrations", "comparisons", "prompts", "pretraining"):
        if "data" in config and not config.data[kind]:
            config.data[kind] = (f"jsonl:{kind}.jsonl",)
    return config


def _same(config: ConfigDict, known: shapes.Known) -> str:
    """What the programs of a stage hang on: equal for stages whose numbers alone differ, as in sweeps."""
    nets = {}
    for name in config.models:
        try:
            nets[name] = str(shapes.architecture(config, name, known))
        except ValueError:  # one that the stage does not use
            nets[name] = ""
    section = config[config.stage].to_dict()
    for name, value in list(section.items()):
        if name.endswith("optimizer"):
            section[name] = [value["algorithm"], bool(value["weight_decay"]), bool(value["max_grad_norm"])]
        elif name in NUMBERS:
            section[name] = bool(value)
    rest = {key: value for key, value in section.items() if key not in LENGTHS}
    return json.dumps([config.stage, rest, config.mesh.to_dict(), config.get("rollout", {}), nets], default=str)


def _plan(
    config: ConfigDict, mesh: Any, planned: Planned, answers: dict[str, Answer], found: Topology, asked: flags.Asked
) -> dict[str, Any]:
    """A stage's answer as plan.json holds it."""
    steps = planned.steps
    if asked.records:
        steps = max(1, int(asked.records * planned.epochs // planned.records))  # whole batches, as training has them
    known = all(one.seconds for one in answers.values() if one.repeats)
    seconds = sum(one.repeats * one.seconds for one in answers.values()) if known else 0.0
    flops = sum(one.repeats * one.flops for one in answers.values())
    chips = len(found.devices)
    run = {"steps": steps, "petaflop_s_days": flops * steps / PETAFLOP_DAY}
    if seconds and steps:
        hours = seconds * steps / 3600
        run |= {"hours": hours, "chip_hours": hours * chips}
        run |= {"price": hours * chips * asked.price} if asked.price else {}
    largest = max(answers, key=lambda name: answers[name].total)
    worst = answers[largest]
    return {
        "stage": config.stage,
        "mesh": dict(mesh.shape),
        "fits": all(one.fits for one in answers.values()),
        "largest": largest,
        "blame": max(worst.memory, key=worst.memory.get),
        "step": {
            "seconds": seconds,
            "seconds_hidden": sum(one.repeats * one.hidden for one in answers.values()) if known else 0.0,
            "model_flops": flops,
            "mfu": flops / (seconds * chips * found.chip.flops) if seconds else 0.0,
        },
        "run": run,
        "paper_petaflop_s_days": PAPER,
        "programs": {name: _program(one, found) for name, one in answers.items()},
    }


def _program(one: Answer, found: Topology) -> dict[str, Any]:
    return {
        "bytes": {label: round(size) for label, size in one.memory.items()},
        "total_bytes": round(one.total),
        "capacity_bytes": round(one.capacity),
        "fits": one.fits,
        "compile_seconds": round(one.compiled, 1),
        "calls_a_step": one.repeats,
        "model_flops": one.flops,
        "seconds": one.seconds,
        "seconds_hidden": one.hidden,
        "mfu": one.mfu(found),
        "collectives": one.collectives,
        "decode": one.decode,
        "kernels": list(one.kernels),
        "notes": one.notes,
    }


def _tell(console: Console, label: str, plan: dict, answers: dict[str, Answer], found: Topology) -> None:
    """A stage's answer on the terminal: programs side by side, then their collectives."""
    shape = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    most = max(one.total for one in answers.values())
    unit, name = (1e9, "GB") if most >= 1e8 else (1e6, "MB")
    table = Table(title=f"{label}, mesh {shape}: {name} of a device", title_justify="left")
    table.add_column("")
    for program in answers:
        table.add_column(program, justify="right")
    labels = {part: max(one.memory.get(part, 0.0) for one in answers.values()) for one in answers.values()
              for part in one.memory}  # fmt: skip
    for part in sorted(labels, key=labels.get, reverse=True):
        sizes = [one.memory.get(part, 0.0) for one in answers.values()]
        if max(sizes) > 0.002 * most:
            table.add_row(part, *(f"{size / unit:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("in all", *(f"{one.total / unit:.2f}" for one in answers.values()))
    capacity = next(iter(answers.values())).capacity
    table.add_row(f"fits into {capacity / 1e9:.1f} GB", *("yes" if one.fits else "NO" for one in answers.values()))
    table.add_section()
    rows = {
        "seconds of a call": lambda one: f"{one.seconds:.3g}",
        "with collectives hidden": lambda one: f"{one.hidden:.3g}",
        "MFU": lambda one: f"{100 * one.mfu(found):.1f} %",
    }
    for row, shown in rows.items() if found.chip.flops and found.compiles else ():
        table.add_row(row, *(shown(one) if one.seconds else "–" for one in answers.values()))
    decoded = {"ms a decoded token": "milliseconds", "bandwidth allows": "limit_milliseconds"}
    for row, key in decoded.items():
        if any(key in one.decode for one in answers.values()):
            table.add_row(row, *(f"{one.decode[key]:.2f}" if key in one.decode else "" for one in answers.values()))
    console.print(table)
    moved = Table(title="collectives of a call", title_justify="left")
    for column in ("program", "collective", "axes", "GB", "seconds", ""):
        moved.add_column(column, justify="right" if column in ("GB", "seconds") else "left")
    for program, one in answers.items():
        for some in one.collectives[:4]:
            beside = "overlapped" if some["overlapped"] else "exposed"
            numbers = f"{some['bytes'] / 1e9:.3g}", f"{some['seconds']:.2g}"
            moved.add_row(program, some["kind"], some["axes"], *numbers, beside)
    if moved.row_count:
        console.print(moved)
    for program, one in answers.items():
        for note in one.notes:
            console.print(f"  {program}: {note}", highlight=False, soft_wrap=True)
    console.print("  " + _sentence(plan, answers), highlight=False, soft_wrap=True)


def _sentence(plan: dict, answers: dict[str, Answer]) -> str:
    """The run in a line or two."""
    run, step = plan["run"], plan["step"]
    told = f"{step['model_flops']:.3g} model FLOPs a step"
    if step["seconds"]:
        told += f", {step['seconds']:.3g} s ({step['seconds_hidden']:.3g} s with collectives hidden), MFU "
        told += f"{100 * step['mfu']:.1f} %"
    if run["steps"]:
        told += f"; {run['steps']} steps: {run['petaflop_s_days']:.3g} petaflop/s-days (the paper's 175B models: "
        told += ", ".join(f"{name} {days:g}" for name, days in PAPER.items()) + ")"
    else:
        told += "; --plan_records=N says how long the run is"
    if "hours" in run:
        told += f", {run['hours']:.3g} hours, {run['chip_hours']:.3g} chip-hours"
    if "price" in run:
        told += f", {run['price']:,.0f} dollars"
    if not plan["fits"]:
        one = answers[plan["largest"]]
        told += (
            f"\n  does not fit: {plan['largest']} takes {one.total / 1e9:.1f} of {one.capacity / 1e9:.1f} GB of a "
            f"device, most of it {plan['blame']}"
        )
        nearest = plan.get("nearest")
        if nearest:
            told += f"\n  the nearest setting that fits ({nearest['total_bytes'] / 1e9:.1f} GB): "
            told += " ".join(f"--config.{key}={value}" for key, value in nearest["settings"].items())
        elif nearest is None:
            told += "; --plan_search looks for the nearest setting that does"
        else:
            told += "; no setting that was looked at does: take more devices"
    return told
