"""What the workdirs of a model say of it: the stages that led to it, their data and cost, and what was measured."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from instructgpt_jax import process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.report import check
from instructgpt_jax.training import checkpoint

TRAINED = ("pretrain", "sft", "select", "reward", "ppo")  # stages whose workdir is a network
REPORTS = ("evaluate", "benchmark")  # stages that write a report
SCORES = ("evaluate_reward", "rewards.json")  # the stage that measures reward models, and its file
PIPELINE = "seconds.json"  # a file of every pipeline's workdir


class Run(NamedTuple):
    """A stage that trained a network."""

    name: str  # of its folder, with the one above where two have the same: round1/reward
    workdir: epath.Path
    config: dict[str, Any]
    data: dict[str, dict]  # kind -> what was read, see datasets.described
    saved: dict[str, Any]  # beside the newest checkpoint, or beside the one that was asked for, see read_metadata


class Found(NamedTuple):
    """What the workdirs hold of a model."""

    runs: list[Run]  # in the order in which they trained
    bases: list[str]  # networks that were not trained here: directories and Hub ids
    reports: list[dict]
    scores: list[dict]  # what `evaluate_reward` found, see evaluation/scorers.py


def of_network(init_from: str) -> Found:
    """What led to one network, and the evaluations beside it that name it.

    Args:
      init_from: a stage's workdir, a checkpoint in one, or a network that was not trained here.
    """
    runs, bases = _ancestors([init_from])
    if not runs:
        return Found([], bases, [], [])
    workdir = runs[-1].workdir
    around = [folder for folder in (workdir.parent, workdir.parent.parent) if (folder / PIPELINE).exists()]
    return _measured(Found(runs, bases, [], []), (around or [workdir.parent])[0], [workdir])


def of_pipeline(workdir: epath.PathLike, names: Sequence[str]) -> Found:
    """All stages of a pipeline that have been trained, and its evaluations.

    Args:
      names: of its stages, in their order.
    """
    workdir = epath.Path(workdir)
    own = [str(workdir / name) for name in names if _read(workdir / name) is not None]
    runs, bases = _ancestors(own)
    return _measured(Found(runs, bases, [], []), workdir, [run.workdir for run in runs])


def _read(folder: epath.Path) -> dict | None:
    """The configuration of a workdir whose stage trains a network; None for anything else."""
    if "://" not in str(folder) and not folder.exists():
        return None  # a Hub id, say
    config = workdirs.read_config(folder)
    return config if config is not None and config.get("stage") in TRAINED else None


def _ancestors(networks: Iterable[str]) -> tuple[list[Run], list[str]]:
    """The stages behind networks, each before those that start from it, and what none of them trained."""
    runs: dict[str, Run] = {}
    bases: dict[str, None] = {}

    def visit(init_from: str, near: epath.Path | None) -> None:
        for folder in _places(init_from, near):
            config = _read(folder)
            if config is not None:
                break
        else:
            bases[init_from] = None
            return
        key = os.path.realpath(folder)
        if key in runs:
            return
        for entry in config["models"].values():
            if entry.get("init_from"):
                visit(entry["init_from"], folder)
        part = folder / "fold0" if (folder / "fold0").exists() else folder  # of folds the first stands for all
        found = _json(part / "data.json"), _saved(init_from, folder)
        runs[key] = Run(folder.name, folder, _read(part) or config, *found)

    for network in networks:
        visit(network, None)
    names = [run.name for run in runs.values()]
    return [
        run._replace(name=f"{run.workdir.parent.name}/{run.name}") if names.count(run.name) > 1 else run
        for run in runs.values()
    ], list(bases)


def _places(init_from: str, near: epath.Path | None) -> list[epath.Path]:
    """Where the workdir of a network may be: there, above its checkpoint, or moved with the one beside it."""
    path = epath.Path(init_from)
    above = [path.parent.parent] if path.name.isdigit() else []
    return [path, *above, *([near.parent / path.name] if near is not None else [])]


def _saved(init_from: str, folder: epath.Path) -> dict:
    """What was saved beside a network, {} where a stage has none yet; of folds what they took together."""
    if epath.Path(init_from).name.isdigit():
        return checkpoint.read_metadata(init_from)
    parts = [folder, *sorted(folder.glob("fold*"))]
    saved = [checkpoint.read_metadata(part, step) for part in parts if (step := checkpoint.newest(part)[0]) is not None]
    if len(saved) < 2:
        return saved[0] if saved else {}
    steps = {key: sum(one[key] for one in saved) for key in ("step", "num_steps")}
    spent = [one["spent"] for one in saved if one.get("spent")]
    if not spent:
        return steps
    cost = {key: sum(one[key] for one in spent) for key in ("tokens", "flops", "seconds")}
    devices = list(dict.fromkeys(device for one in spent for device in one["devices"]))
    return steps | {"spent": cost | {"from_step": 0, "devices": devices, "versions": spent[-1]["versions"]}}


def _measured(found: Found, folder: epath.Path, networks: Sequence[epath.Path]) -> Found:
    """Adds what the stages in a folder have measured that name one of the networks.

    A report that cannot be read is said and left out: the network is whole without it.
    """
    wanted = {os.path.realpath(network) for network in networks}
    paths, reports, scores = {}, [], []
    for place in sorted(folder.iterdir()) if folder.exists() else []:
        try:
            config = workdirs.read_config(place)
        except ValueError:
            continue  # it may be anybody's
        if config is None or config.get("stage") not in (*REPORTS, SCORES[0]):
            continue
        named = [entry.get("init_from", "") for entry in config["models"].values()]
        if not wanted & {os.path.realpath(path) for name in named if name for path in _places(name, place)}:
            continue
        if config["stage"] == SCORES[0]:
            scores += [table for table in [_json(place / SCORES[1])] if table]
            continue
        report = config[config["stage"]].get("report", "")
        for path in [epath.Path(report), place.parent / epath.Path(report).name] if report else [place / "report"]:
            if (path / "report.json").exists():
                paths[os.path.realpath(path)] = path / "report.json"
                break
    for path in paths.values():
        try:
            report = _json(path)
            check.check(report)
        except ValueError as error:
            process.say(f"card: without the report {path}: {error}")
        else:
            reports.append(report)
    return found._replace(reports=reports, scores=scores)


def _json(path: epath.Path) -> dict:
    """What a JSON file holds; {} where there is none.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, as its stage wrote it, got {error}") from error
