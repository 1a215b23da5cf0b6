"""One check of a report before anything is drawn or written."""

import math
from typing import Any

INTERVAL = ("mean", "low", "high", "n")
GROUPED = ("win_rate", "likert", "metadata")  # {name: interval}; everything else of a row is an interval or a number


def check(report: dict) -> None:
    """Whether a report has the form that `write` needs; sections may be missing.

    Raises:
      ValueError: names the first place that is wrong, and what belongs there.
    """
    _need(isinstance(report, dict), "report", "be a dict", report)
    _finite(report, "report")
    _need(isinstance(report.get("title"), str), "report['title']", "be a string", report.get("title"))
    models = _dict(report, "models", "report", needed=True)
    _need(bool(models), "report['models']", "have at least one model", models)
    for name, model in models.items():
        where = f"report['models'][{name!r}]"
        _need(isinstance(model, dict), where, "be a dict", model)
        for key in ("label", "method", "size"):
            _need(isinstance(model.get(key), str), f"{where}[{key!r}]", "be a string", model.get(key))
        count = model.get("parameters", 0)
        _need(_number(count), f"{where}['parameters']", "be a number", count)
    for distribution, rows in _dict(report, "results", "report").items():
        where = f"report['results'][{distribution!r}]"
        for name in _dict(report["results"], distribution, "report['results']"):
            _need(name in models, f"{where} has the model {name!r}: it", f"be one of {list(models)}", name)
            _row(rows[name], f"{where}[{name!r}]")
    if any("win_rate" in row for rows in report.get("results", {}).values() for row in rows.values()):
        baseline = report.get("baseline")
        _need(baseline in models, "report['baseline']", f"be one of {list(models)}", baseline)
    for name, row in _dict(report, "language", "report").items():
        where = f"report['language'][{name!r}]"
        _need(isinstance(row, dict), where, "be a dict", row)
        if "pretraining_loss" in row:
            _interval(row["pretraining_loss"], f"{where}['pretraining_loss']")
        for task, value in _dict(row, "tasks", where).items():
            _interval(value, f"{where}['tasks'][{task!r}]")
    model, where = _dict(report, "reward_model", "report"), "report['reward_model']"
    for group, value in _dict(model, "accuracy", where).items():
        _interval(value, f"{where}['accuracy'][{group!r}]")
    _numbers(_dict(model, "agreement", where), f"{where}['agreement']")
    _rows(model.get("calibration", []), f"{where}['calibration']", ("predicted", "observed", "pairs"))
    _numbers(_dict(report, "chance", "report"), "report['chance']")
    _numbers(_dict(_dict(report, "perf", "report"), "seconds", "report['perf']"), "report['perf']['seconds']")
    candidates = _dict(report, "prefix", "report").get("candidates", [])
    _rows(candidates, "report['prefix']['candidates']", ("text", "score"))
    for n, sample in enumerate(_list(report, "samples")):
        where = f"report['samples'][{n}]"
        _need(isinstance(sample, dict) and isinstance(sample.get("prompt"), str), where, "have a prompt", sample)
        for name, response in _dict(sample, "responses", where, needed=True).items():
            _need(name in models, f"{where} has the model {name!r}: it", f"be one of {list(models)}", name)
            text = response.get("text") if isinstance(response, dict) else None
            _need(isinstance(text, str), f"{where}['responses'][{name!r}]['text']", "be a string", text)
            _numbers({k: response[k] for k in ("score", "gold") if k in response}, f"{where}['responses'][{name!r}]")
    for stage, found in _dict(report, "curves", "report").items():
        for metric, points in _dict(report["curves"], stage, "report['curves']").items():
            pairs = isinstance(points, list) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in points)
            _need(pairs, f"report['curves'][{stage!r}][{metric!r}]", "be a list of [step, value]", found[metric])
    for name, rows in _dict(report, "overoptimisation", "report").items():
        _rows(rows, f"report['overoptimisation'][{name!r}]", ("step", "kl"))


def _row(row: Any, where: str) -> None:
    _need(isinstance(row, dict), where, "be a dict", row)
    for key, value in row.items():
        if key in GROUPED:
            for name, interval in _dict(row, key, where).items():
                _interval(interval, f"{where}[{key!r}][{name!r}]")
        elif not _number(value):
            _interval(value, f"{where}[{key!r}]")


def _rows(rows: Any, where: str, keys: tuple[str, ...]) -> None:
    whole = isinstance(rows, list) and all(isinstance(row, dict) and set(keys) <= row.keys() for row in rows)
    _need(whole, where, f"be a list of dicts with {' and '.join(keys)}", rows)


def _numbers(values: dict, where: str) -> None:
    for name, value in values.items():
        _need(_number(value), f"{where}[{name!r}]", "be a number", value)


def _interval(value: Any, where: str) -> None:
    whole = isinstance(value, dict) and all(_number(value.get(key)) for key in INTERVAL)
    _need(whole, where, "be an interval with mean, low, high and n", value)
    slack = 1e-6 * max(1.0, abs(value["mean"]))
    _need(value["low"] - slack <= value["mean"] <= value["high"] + slack, where, "have low <= mean <= high", value)


def _finite(value: Any, where: str) -> None:
    """Everything can be written as JSON: no NaN, no infinity, no arrays."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _need(isinstance(key, str), where, "have only strings as keys", key)
            _finite(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for n, inner in enumerate(value):
            _finite(inner, f"{where}[{n}]")
    elif not isinstance(value, (str, bool, int)) and value is not None:
        _need(isinstance(value, float) and math.isfinite(value), where, "be a finite number, a string or None", value)


def _dict(parent: dict, key: str, where: str, needed: bool = False) -> dict:
    value = parent.get(key, None if needed else {})
    _need(isinstance(value, dict), f"{where}[{key!r}]", "be a dict", value)
    return value


def _list(parent: dict, key: str) -> list:
    value = parent.get(key, [])
    _need(isinstance(value, list), f"report[{key!r}]", "be a list", value)
    return value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _need(condition: bool, where: str, what: str, value: Any) -> None:
    if not condition:
        shown = repr(value)
        raise ValueError(f"{where} must {what}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")
