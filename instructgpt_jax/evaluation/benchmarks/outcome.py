"""What a policy made of a task: the harness is run, and its answers become numbers with intervals."""

import hashlib
import itertools
import json
import logging
import numbers
import random
from collections.abc import Sequence

import numpy as np
from lm_eval.evaluator import evaluate

from instructgpt_jax.evaluation import statistics
from instructgpt_jax.evaluation.benchmarks import catalog, metrics, results
from instructgpt_jax.evaluation.benchmarks.adapter import PolicyLM

SEED = 1234  # of few-shot examples, and the other numbers below: the harness's own, so that its figures are had again
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every file that stands in for the Hub
PARTS = 5  # of the toxicity of prompts
GRADED = {"true": ("true", "info"), "true_informative": ("true", "info"), "toxicity": ("toxicity",)}


def documents(task, limit: int) -> list[dict]:
    """The first `limit` documents of a task, all if 0."""
    return [dict(one) for one in itertools.islice(task.eval_docs, limit or None)]


def fingerprint(found: Sequence[dict]) -> str:
    """Hexadecimal digest of documents."""
    digest = hashlib.sha256()
    for one in found:
        digest.update(json.dumps(one, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()[:16]


def answer(lm: PolicyLM, task, limit: int, num_fewshot: int, chat: bool) -> dict:
    """One task through the harness.

    Args:
      task: of catalog.load.
      limit: documents; 0 = all.
      num_fewshot: examples; -1 = as the task says. A task that says 0 itself keeps it, as in the harness.
      chat: whether prompts are written as chats, examples as turns.

    Returns:
      `documents`: their fingerprint. `n`: how many. `cut`: contexts that were cut from the left. `numbers`: metric ->
      interval, or the number of a whole set. `values`: metric -> one number for each document, where there is.
      `answers`: texts, of a task that generates.
    """
    given, own = documents(task, limit), task.get_config("num_fewshot")
    if own is None or own and num_fewshot >= 0:
        task.set_config(key="num_fewshot", value=max(num_fewshot, 0))
    task.set_fewshot_seed(seed=SEED)
    random.seed(0)
    np.random.seed(SEED)
    before, name = lm.cut, task.config.task
    found = evaluate(
        lm,
        {"tasks": {name: task}, "groups": {}},
        limit=limit or None,
        bootstrap_iters=1000,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return {
        "documents": fingerprint(given),
        "n": len(given),
        "cut": lm.cut - before,
        **_numbers(found["results"][name], found["samples"][name], given),
        "answers": _texts(task, found["samples"][name]),
    }


def _numbers(whole: dict, samples: list[dict], given: Sequence[dict]) -> dict[str, dict]:
    """`numbers` and `values` of the harness's results; those of a filter other than `none` are named with it."""
    groups = [str(one["group"]) for one in given] if all("group" in one for one in given) else []
    found, values = {}, {}
    for key, mean in whole.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not _is_number(mean):
            continue
        name = metric if chosen == "none" else f"{metric}, {chosen}"
        each = [one[metric] for one in samples if one["filter"] == chosen and metric in one]
        if each and all(map(_is_number, each)) and np.isclose(np.mean(each), mean, rtol=1e-9, atol=1e-12):
            values[name] = [float(one) for one in each]
            found[name] = statistics.interval(values[name], groups if len(groups) == len(each) else ())
        else:  # of the whole set, such as BLEU: by the harness's bootstrap
            error = whole.get(f"{metric}_stderr,{chosen}")
            half = statistics.Z * float(error) if _is_number(error) else 0.0
            ends = {"low": float(mean) - half, "high": float(mean) + half}
            found[name] = {"mean": float(mean), **ends, "n": len(each)} if half else float(mean)
    return {"numbers": found, "values": values}


def _texts(task, samples: list[dict]) -> list[str]:
    """Answers as they count; [] of a task that generates none."""
    if task.OUTPUT_TYPE != "generate_until":
        return []
    first = samples[0]["filter"] if samples else ""
    return [results.cut(one["filtered_resps"][0]) for one in samples if one["filter"] == first]


def wanted(task: str) -> tuple[str, ...]:
    """What a task's answers are graded for, of `true`, `info` and `toxicity`."""
    asked = [bar.metric for bars in catalog.groups().values() for bar in bars if bar.task == task]
    return tuple(dict.fromkeys(what for metric in asked for what in GRADED.get(metric, ())))


def graded(scores: dict[str, Sequence[float | None]]) -> dict[str, dict]:
    """The numbers of graders' probabilities, each by the graders it needs; answers that none can judge are left out."""
    found = {}
    if "true" in scores:
        found["true"] = statistics.interval(metrics.true(scores["true"]))
    if {"true", "info"} <= scores.keys():
        found["true_informative"] = statistics.interval(metrics.true_informative(scores["true"], scores["info"]))
    if "toxicity" in scores:
        found["toxicity"] = statistics.interval([one for one in scores["toxicity"] if one is not None])
    return {name: value for name, value in found.items() if value}


def toxicity_by_prompt(prompts: Sequence[float | None], scores: Sequence[float | None]) -> list[dict]:
    """The paper's figure 39: mean toxicity of answers by that of their prompts, in parts of equal width.

    Args:
      prompts: toxicity of each prompt, None where the set has none.
      scores: of its answer, None where nobody can judge.

    Returns:
      `low`, `high` and `toxicity`, an interval, of each part that has an answer.
    """
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    for prompt, score in zip(prompts, scores, strict=True):
        if prompt is not None and score is not None:
            parts[min(int(prompt * PARTS), PARTS - 1)].append(score)
    return [
        {"low": n / PARTS, "high": (n + 1) / PARTS, "toxicity": statistics.interval(some)}
        for n, some in enumerate(parts)
        if some
    ]


def by_prompt(given: dict[str, list[dict]], scores: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Task -> `label` and policy -> toxicity_by_prompt, of the tasks whose prompts have a toxicity.

    Args:
      given: task -> its documents.
      scores: task -> policy -> graders' probabilities.
    """
    labels = {bar.task: bar.label for bar in catalog.groups()["toxicity"]}
    found = {}
    for task, label in labels.items():
        prompts = [one["prompt_toxicity"] for one in given.get(task, [])]
        judged = {name: one["toxicity"] for name, one in scores.get(task, {}).items() if "toxicity" in one}
        models = {name: toxicity_by_prompt(prompts, values) for name, values in judged.items()}
        models = {name: parts for name, parts in models.items() if parts}
        if models:
            found[task] = {"label": label, "models": models}
    return found


def figures(found: dict[str, dict[str, dict]]) -> dict[str, list[dict]]:
    """The bars of the paper's figures that there are numbers for, see catalog.Bar."""
    have = {task: {key for one in models.values() for key in one["numbers"]} for task, models in found.items()}
    shown = {
        figure: [bar._asdict() for bar in bars if bar.metric in have.get(bar.task, ())]
        for figure, bars in catalog.groups().items()
    }
    return {figure: bars for figure, bars in shown.items() if bars}


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and np.isfinite(value)
