"""What earlier stages of a pipeline have found out, for the report: tables of the prompt sets, folds, sweeps."""

import json

from etils import epath

FOLDS = "generalisation.json"  # of stage `reward` with folds
PROMPT_SETS = "report.json"  # of stage `prompts`
SWEEPS = "report/report.json"  # of stage `evaluate` with sweeps
SHOWN = ("read", "users", "steps", "splits", "languages", "few_shot", "tables")


def read(prompt_sets: str, folds: str, sweeps: str) -> dict[str, dict]:
    """The sections `prompt_sets`, `folds` and `sweeps` of a report; one whose workdir is '' is left out.

    Args:
      prompt_sets: workdir of a finished stage `prompts`.
      folds: workdir of a finished stage `reward` with folds of labelers.
      sweeps: workdir of a finished stage `evaluate` with sweeps.

    Raises:
      ValueError: a workdir without such a file, or with a damaged one.
    """
    found = {}
    if prompt_sets:
        report = _json("config.evaluate.prompt_sets", prompt_sets, PROMPT_SETS, "tables")
        found["prompt_sets"] = {key: report[key] for key in SHOWN if key in report}
    if folds:
        found["folds"] = _folds(_json("config.evaluate.folds", folds, FOLDS, "difference"))
    if sweeps:
        found["sweeps"] = _json("config.evaluate.sweep_report", sweeps, SWEEPS, "sweeps")["sweeps"]
    return found


def _folds(report: dict) -> dict:
    """The means over folds with Student's intervals, and the rows of the folds."""
    count = len(report["difference"]["values"])
    about = {"folds": count, "seeds": len(report["folds"]) // count, "rows": report["folds"]}
    for name in ("training_groups", "held_out_groups", "difference"):
        mean, half = report[name]["mean"], report[name]["interval95"]
        about[name] = {"mean": mean, "low": mean - half, "high": mean + half, "n": count}
    return about


def _json(key: str, workdir: str, file: str, has: str) -> dict:
    path = epath.Path(workdir) / file
    try:
        found = json.loads(path.read_text()) if path.exists() else None
    except ValueError:  # also what is no UTF-8
        found = None
    if not isinstance(found, dict) or has not in found:
        raise ValueError(f"{key} must be the workdir of a finished stage with {file} that has {has!r}, got {workdir!r}")
    return found
