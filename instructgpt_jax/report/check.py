"""One check of a report before anything is drawn or written."""

import math
from collections.abc import Callable
from typing import Any


def _need(condition: bool, where: str, what: str, value: Any) -> None:
    if not condition:
        shown = repr(value)
        raise ValueError(f"{where} must {what}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def _text(value: Any, where: str) -> None:
    _need(isinstance(value, str), where, "be a string", value)


def _number(value: Any, where: str) -> None:
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _need(finite, where, "be a finite number", value)


def _interval(value: Any, where: str) -> None:
    whole = isinstance(value, dict) and {"mean", "low", "high", "n"} <= value.keys()
    _need(whole, where, "be an interval with mean, low, high and n", value)
    for key in ("mean", "low", "high", "n"):
        _number(value[key], f"{where}[{key!r}]")
    slack = 1e-6 * max(1.0, abs(value["mean"]))
    _need(value["low"] - slack <= value["mean"] <= value["high"] + slack, where, "have low <= mean <= high", value)


def _mean(value: Any, where: str) -> None:
    (_interval if isinstance(value, dict) else _number)(value, where)


def _point(value: Any, where: str) -> None:
    _need(isinstance(value, (list, tuple)) and len(value) == 2, where, "be [step, value]", value)
    _number(value[0], f"{where}[0]")
    if value[1] is not None:
        _number(value[1], f"{where}[1]")


# A dict has these keys, those with '?' if it likes, all others like '*'; a list has elements of one form; a function
# checks the value itself. What is not named here is free.
MODEL = {"label": _text, "method": _text, "size": _text, "parameters?": _number}
BY_GROUP = ("win_rate?", "likert?", "metadata?", "toxicity?", "relative_toxicity?", "continuity?")
ROW = dict.fromkeys(BY_GROUP, {"*": _interval}) | {"*": _mean}
LENGTHS = dict.fromkeys(("count", "mean", "std", "min", "25%", "50%", "75%", "max"), _number)  # of tables 9 to 11
POINT = {"label": _text, "method": _text, "*": _interval}  # a policy of a sweep: quantity -> interval
FORM = {
    "title": _text,
    "models": {"*": MODEL},
    "distributions?": {"*": {"n": _number}},
    "results?": {"*": {"*": ROW}},
    "head_to_head?": {"*": {"*": {"*": {"*": _interval}}}},
    "prompt_sets?": {
        "read": _number,
        "users": _number,
        "steps": [{"step": _text, "dropped": _number, "left": _number}],
        "tables": {
            "sizes": {"*": {"*": _number}},
            "prompts_per_user": {"*": _number},
            "lengths": {"*": LENGTHS},
            "lengths_by_use_case": {"*": LENGTHS},
            "lengths_of_demonstrations": {"prompt": {"*": LENGTHS}, "demonstration": {"*": LENGTHS}},
        },
    },
    "folds?": dict.fromkeys(("training_groups", "held_out_groups", "difference"), _interval)
    | {"folds": _number, "seeds": _number},
    "sweeps?": {
        "runs": {"*": {"key": _text, "points": [POINT | {"value": _text}]}},
        "beside": {"*": POINT},
        "spread": {"*": {"sd": _number, "runs": _number, "half": _number}},
    },
    "people?": {
        "rankings": _number,
        "ratings": _number,
        "prompts": _number,
        "labelers": {"*": _number},
        "agreement": {"*": _interval},
    },
    "language?": {
        "*": {"pretraining_loss?": _interval, "tasks?": {"*": _interval}, "tasks_per_token?": {"*": _interval}}
    },
    "chance?": {"*": _number},
    "benchmarks?": {"*": {"*": {"*": _mean}}},
    "benchmark_tasks?": {"*": {"n": _number, "cut": {"*": _number}}},
    "toxicity_by_prompt?": {
        "*": {"label": _text, "models": {"*": [{"low": _number, "high": _number, "toxicity": _interval}]}}
    },
    "benchmark_figures?": {"*": [{"task": _text, "metric": _text, "title": _text, "label": _text}]},
    "reward_model?": {
        "accuracy?": {"*": _interval},
        "agreement?": {"*": _mean},
        "calibration?": [{"predicted": _number, "observed": _number, "pairs": _number}],
    },
    "curves?": {"*": {"*": [_point]}},
    "overoptimisation?": {"*": [{"step": _number, "kl": _mean, "score?": _mean, "judge?": _mean, "gold?": _mean}]},
    "prefix?": {"candidates?": [{"text": _text, "score": _mean}]},
    "samples?": [{"prompt": _text, "responses": {"*": {"text": _text, "score?": _number, "gold?": _number}}}],
    "perf?": {"seconds?": {"*": _number}},
}


def check(report: dict) -> None:
    """Whether a report has the form that `write` needs; sections may be missing.

    Raises:
      ValueError: names the first place that is wrong, and what belongs there.
    """
    _match(report, FORM, "report")
    models = report["models"]
    _need(bool(models), "report['models']", "have at least one model", models)
    rows = [(f"report['results'][{name!r}]", row) for name, row in report.get("results", {}).items()]
    rows += [(f"report['samples'][{n}]", sample["responses"]) for n, sample in enumerate(report.get("samples", []))]
    rows += [(f"report['benchmarks'][{task!r}]", row) for task, row in report.get("benchmarks", {}).items()]
    for task, one in report.get("toxicity_by_prompt", {}).items():
        rows.append((f"report['toxicity_by_prompt'][{task!r}]['models']", one["models"]))
    for name, groups in report.get("head_to_head", {}).items():
        for group, table in groups.items():
            where = f"report['head_to_head'][{name!r}][{group!r}]"
            rows += [(where, table)] + [(f"{where}[{first!r}]", others) for first, others in table.items()]
    for where, row in rows:
        for name in row:
            _need(name in models, f"{where} has the model {name!r}: it", f"be one of {list(models)}", name)
    if any("win_rate" in row for rows in report.get("results", {}).values() for row in rows.values()):
        baseline = report.get("baseline")
        _need(baseline in models, "report['baseline']", f"be one of {list(models)}", baseline)


def _match(value: Any, form: Callable | list | dict, where: str) -> None:
    if callable(form):
        form(value, where)
    elif isinstance(form, list):
        _need(isinstance(value, list), where, "be a list", value)
        for n, inner in enumerate(value):
            _match(inner, form[0], f"{where}[{n}]")
    else:
        _need(isinstance(value, dict), where, "be a dict", value)
        for key in form:
            _need(key in value or key[-1] in "?*", where, f"have {key!r}", value)
        for key, inner in value.items():
            _need(isinstance(key, str), where, "have only strings as keys", key)
            one = form.get(key, form.get(f"{key}?", form.get("*", _free)))
            _match(inner, one, f"{where}[{key!r}]")


def _free(value: Any, where: str) -> None:
    """Anything that can be written as JSON: no NaN, no infinity, no arrays."""
    if isinstance(value, dict):
        _match(value, {"*": _free}, where)
    elif isinstance(value, (list, tuple)):
        _match(list(value), [_free], where)
    elif value is not None and not isinstance(value, (str, bool)):
        _number(value, where)
