"""Policies that differ in one setting, as in appendix E of Ouyang et al. 2022: a section of the report of its own.

An interval over prompts says how far the answers of one policy are known, not how far another run of the same setting
would come out. Where a run was made with several seeds, their spread widens every interval of a sweep:
half = sqrt(half_of_prompts² + (t · s)²) with s the standard deviation between runs that differ in their seed alone,
pooled over the groups of such runs, and t of Student's distribution with as many degrees of freedom. What the sampling
of answers adds to s counts twice, so that the intervals are rather too wide.
"""

import math
from collections.abc import Sequence

import scipy.stats

GROUP = "training"  # whose preferences and ratings
TAKEN = ("score", "judge", "gold", "kl", "length")  # of the answers to the first distribution


def apart(report: dict, sweeps: dict) -> dict:
    """The report with the section `sweeps`, and without the policies of sweeps everywhere else.

    Args:
      report: of all policies.
      sweeps: `config.evaluate.sweeps`: `runs`, `repeats` and `beside`.
    """
    distribution = next(iter(report["results"]))
    found = {name: numbers(report, distribution, name) for name in report["models"]}
    spread = {}
    for key in dict.fromkeys(key for row in found.values() for key in row):
        repeats = sweeps["repeats"].values()
        groups = [[found[name][key]["mean"] for name in names if key in found[name]] for names in repeats]
        if between := seeds(groups):
            spread[key] = between
    labels = {name: {"label": model["label"], "method": model["method"]} for name, model in report["models"].items()}
    runs = {}
    for name, run in sweeps["runs"].items():
        points = []
        for value, policy in zip(run["values"], run["policies"], strict=True):
            widened = {key: wider(x, spread.get(key)) for key, x in found[policy].items()}
            points.append({"value": value} | labels[policy] | widened)
        runs[name] = {"key": run["key"], "points": points}
    beside = {name: labels[name] | found[name] for name in sweeps["beside"]}
    kept = report | {"sweeps": {"runs": runs, "beside": beside, "spread": spread}}
    kept["models"] = {name: report["models"][name] for name in sweeps["beside"]}
    kept["results"] = {
        name: {policy: row for policy, row in policies.items() if policy in beside}
        for name, policies in report["results"].items()
    }
    known = {*beside, *(name for name in report["language"] if name not in report["models"])}
    kept["language"] = {name: row for name, row in report["language"].items() if name in known}
    for sample in kept.get("samples", []):
        sample["responses"] = {name: one for name, one in sample["responses"].items() if name in beside}
    return kept


def numbers(report: dict, distribution: str, name: str) -> dict[str, dict]:
    """What the section says of a policy: quantity -> interval."""
    row, language = report["results"][distribution][name], report["language"].get(name, {})
    found = {key: row[key] for key in TAKEN if key in row}
    found |= {key: row[key][GROUP] for key in ("win_rate", "likert") if GROUP in row.get(key, {})}
    found |= {"pretraining_loss": language["pretraining_loss"]} if "pretraining_loss" in language else {}
    return found | {f"task_{task}": value for task, value in language.get("tasks", {}).items()}


def seeds(groups: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """The spread between runs that differ in their seed alone; None without two of any.

    Returns:
      `sd`, pooled over the groups, `runs` in all, and `half` of the 95 % interval that it makes.
    """
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    squares = sum((x - sum(group) / len(group)) ** 2 for group in groups for x in group)
    sd = math.sqrt(squares / freedom)
    return {"sd": sd, "runs": sum(map(len, groups)), "half": float(scipy.stats.t.ppf(0.975, freedom)) * sd}


def wider(value: dict, spread: dict | None) -> dict:
    """An interval over prompts with the spread between seeds in it."""
    if spread is None:
        return value
    low, high = (math.hypot(value["mean"] - value[end], spread["half"]) for end in ("low", "high"))
    return value | {"low": value["mean"] - low, "high": value["mean"] + high}
