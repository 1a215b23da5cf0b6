"""RealToxicityPrompts: how toxic continuations are by how toxic their prompts are, figure 39 of Ouyang et al. 2022."""

from collections.abc import Callable, Iterator
from functools import partial

from instructgpt_jax.report import drawing, words
from instructgpt_jax.report.drawing import Scale
from instructgpt_jax.report.style import Figure, Panel
from instructgpt_jax.report.verdicts import above

NAME = "figure39_toxicity_by_prompt"
TASK = "instructgpt_realtoxicity_"  # and the kind of prompt


def figures(report: dict) -> Iterator[Figure]:
    """A panel for each kind of prompt, a line for each model."""
    found = report.get("toxicity_by_prompt", {})
    if not found:
        return
    names, tints = words.model_names(report), words.colors(report)
    order, used, looks = [name for name in names if any(name in one["models"] for one in found.values())], {}, {}
    for name in order:
        used[tints[name]] = used.get(tints[name], -1) + 1
        looks[name] = words.Line(names[name], tints[name], used[tints[name]])
    panels = []
    for one in found.values():
        values, lines, labels = {}, [], {}
        for name in (name for name in order if name in one["models"]):
            bins = {f"{100 * part['low']:.0f} to {100 * part['high']:.0f} %": part for part in one["models"][name]}
            values |= {f"{name}, {label}": part["toxicity"] for label, part in bins.items()}
            labels |= {label: part["low"] for label, part in bins.items()}
            lines.append(looks[name]._replace(models={label: f"{name}, {label}" for label in bins}))
        sizes = {label: label.replace(" to ", "\nto ") for label in sorted(labels, key=labels.get)}
        scale = Scale("mean toxicity of the continuation", share=True)
        panels.append(
            Panel(one["label"], partial(drawing.by_size, lines=lines, sizes=sizes, values=values, scale=scale))
        )
    caption = (
        "Mean probability that a continuation is toxic, as the grader has it, by that of its prompt, as the set has "
        "it: the form of the paper's figure 39. Bars are 95 % intervals."
    )
    yield Figure(NAME, "Toxicity by the toxicity of the prompt", caption, panels, [looks[name] for name in order], 3)


def claims(report: dict) -> Iterator[tuple[str, str, list[tuple[str, dict, dict]], Callable, Callable]]:
    """(claim, paper, pairs, what judges a pair, what writes it); see findings.py. The paper's are table 14's, 175B."""
    names = words.model_names(report)
    basic = report.get("toxicity_by_prompt", {}).get(f"{TASK}basic", {}).get("models", {})
    pairs = [(names[name], basic[name][0]["toxicity"], basic[name][-1]["toxicity"]) for name in names if name in basic]
    yield "The more toxic the prompt, the more toxic the continuation", "0.12 → 0.38; SFT: 0.26", pairs, above, _both
    found, models = report.get("benchmarks", {}), report["models"]

    def mean(kind: str, name: str) -> dict | None:
        value = found.get(f"{TASK}{kind}", {}).get(name, {}).get("toxicity")
        return value if isinstance(value, dict) else None

    ptx = [name for name, model in models.items() if model["method"] == "ppo_ptx"]
    claim, paper = "Asked to be respectful, PPO-ptx is less toxic", "0.234 → 0.196"
    pairs = [(names[name], mean("respectful", name), mean("basic", name)) for name in ptx]
    yield claim, paper, _whole(pairs), above, lambda a, b: _both(b, a)
    claim, paper = "Asked to be biased, PPO-ptx is more toxic than GPT", "0.285 → 0.400"
    bases = {model["size"]: name for name, model in models.items() if model["method"] == "base"}
    pairs = [(names[name], mean("biased", bases.get(models[name]["size"], "")), mean("biased", name)) for name in ptx]
    yield claim, paper, _whole(pairs), above, _both


def _whole(pairs: list[tuple]) -> list[tuple]:
    """Those with both numbers."""
    return [pair for pair in pairs if pair[1] and pair[2]]


def _both(a: dict, b: dict) -> str:
    halves = [(one["high"] - one["low"]) / 2 for one in (a, b)]
    return f"{a['mean']:.3f} ± {halves[0]:.3f} → {b['mean']:.3f} ± {halves[1]:.3f}"
