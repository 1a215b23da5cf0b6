"""The words of the report: labels of methods, distributions, labelers and metrics; how numbers are written."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# The paper's order and names.
METHODS = {
    "base": "GPT",
    "prefix": "GPT (prompted)",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "control": "PPO, shuffled rankings",
}
DISTRIBUTIONS = {"instruct": "Instruct prompts", "gpt": "GPT prompts"}
GROUPS = {"training": "training labelers", "heldout": "held-out labelers", "all": "all labelers"}
STAGES = {  # in the order in which they train
    "pretrain": "pretraining",
    "sft": "SFT",
    "rlhf_init": "start of PPO",
    "ref_policy": "start of PPO",
    "reward": "reward model",
}
METADATA = {
    "follows_instruction": "Attempts the correct instruction",
    "satisfies_constraint": "Follows explicit constraints",
    "hallucination": "Hallucinations (closed domain)",
    "appropriate": "Appropriate for customer assistant",
    "toxic": "Toxic",
}
# Of one model on one distribution: key -> (name, form, what it is).
METRICS = {
    "score": ("Score", "number", "of the reward model that PPO trained on"),
    "judge": ("Judge", "number", "score of another reward model, which PPO never saw"),
    "gold": ("Gold score", "number", "what the labelers' judgements are made from"),
    "kl": ("KL, nats", "number", "from the reference policy, sum over the tokens of a response"),
    "length": ("Length, tokens", "number", ""),
    "ended": ("Ended by itself, %", "share", "responses that end before the limit"),
    "bleu": ("BLEU", "number", "of the corpus, against the human references"),
    "rouge_l": ("ROUGE-L", "fine", "against the human references"),
    "slot_coverage": ("Slot coverage, %", "share", "facts of the prompt that the response states"),
}


class Line(NamedTuple):
    """A method's line through the sizes."""

    label: str
    color: str
    dashes: int
    models: dict[str, str]  # size -> name of the model


def lines(report: dict, names: Sequence[str]) -> list[Line]:
    """The models `names` as one line a method; a method with two models of one size has a line for each label."""
    models, methods = report["models"], {}
    for name in names:
        methods.setdefault(models[name]["method"], []).append(name)
    found, spare = [], 0
    for method in ordered(methods, METHODS):
        groups = [methods[method]]
        if len({models[name]["size"] for name in groups[0]}) < len(groups[0]):
            labels = dict.fromkeys(models[name]["label"] for name in groups[0])
            groups = [[name for name in groups[0] if models[name]["label"] == label] for label in labels]
        color = method if method in METHODS else f"extra{1 + spare % 3}"
        spare += method not in METHODS
        for dashes, group in enumerate(groups):
            labels = {models[name]["label"] for name in group}
            label = labels.pop() if len(labels) == 1 else METHODS.get(method, method)
            found.append(Line(label, color, dashes, {models[name]["size"]: name for name in group}))
    return found


def ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names in the order of the known ones; the unknown come last, as they came or, from a set, by name."""
    known, names = list(known), sorted(names) if isinstance(names, set) else list(names)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def colors(report: dict) -> dict[str, str]:
    """The colour of each model."""
    return {name: line.color for line in lines(report, list(report["models"])) for name in line.models.values()}


def sizes(report: dict, names: Sequence[str]) -> list[str]:
    """The sizes of the models `names`, smallest first."""
    found = {}
    for name in names:
        found.setdefault(report["models"][name]["size"], report["models"][name].get("parameters", 0))
    return sorted(found, key=found.get)


def model_names(report: dict) -> dict[str, str]:
    """What each model is called where sizes stand side by side: with its size if its label is not enough."""
    models = report["models"]
    labels = [model["label"] for model in models.values()]
    several = len({model["size"] for model in models.values()}) > 1 or len(set(labels)) < len(labels)
    return {name: f"{m['label']}, {m['size']}" if several else m["label"] for name, m in models.items()}


def group_names(report: dict) -> list[str]:
    """Labeler groups with a win rate or a Likert mean, training first."""
    found = {}
    for models in report.get("results", {}).values():
        for row in models.values():
            for key in ("win_rate", "likert"):
                found |= dict.fromkeys(row.get(key, {}))
    return ordered(found, GROUPS)


def distributions(report: dict) -> list[str]:
    """The distributions with results, the paper's main one first."""
    return ordered(report.get("results", {}), DISTRIBUTIONS)


def language_order(report: dict) -> list[str]:
    """The rows of the section `language`: the models, then others (the start of PPO, say)."""
    return ordered(report.get("language", {}), report["models"])


def distribution(name: str) -> str:
    return DISTRIBUTIONS.get(name, plain(name))


def group(name: str) -> str:
    return GROUPS.get(name, plain(name))


def plain(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ")


def parameters(count: float) -> str:
    """1.3B, 170M, 84k."""
    for divisor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= divisor:
            return f"{count / divisor:.3g}{unit}"
    return f"{count:.0f}"


def mean(value: dict | float) -> float:
    """The mean of an interval; a number is its own."""
    return value["mean"] if isinstance(value, dict) else value


def half(value: dict) -> float:
    """Half the width of an interval."""
    return (value["high"] - value["low"]) / 2


def percent(value: dict) -> str:
    """`71 ± 3 %`; with a decimal if narrow; `50 %` if there is no interval, `2 % (0 to 9)` if it is lopsided."""
    if value["low"] == value["high"]:
        return f"{100 * value['mean']:.3g} %"
    digits = 0 if half(value) >= 0.01 else 1
    if abs(value["mean"] - value["low"] - half(value)) > 0.2 * half(value):
        mean, low, high = (f"{100 * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} % ({low} to {high})"
    return f"{100 * value['mean']:.{digits}f} ± {100 * half(value):.{digits}f} %"


def number(value: float, size: float | None = None) -> str:
    """Enough digits to tell values apart, with a true minus sign: 0.0012, −0.12, 1.23, 12.3, 1234.

    `size` is the largest number beside it, for numbers that are to have the same decimals.
    """
    size = abs(value) if size is None else size
    digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 0.01 or size == 0 else 4
    text = f"{value:.{digits}f}"
    return (text if float(text) or size != abs(value) or not value else f"{value:.1e}").replace("-", "−")


def cell(value: dict | float | None, form: str = "number") -> tuple[str, str]:
    """Mean and 95 % interval as they stand in a table; `form` share is in per cent, fine has three decimals."""
    if value is None:
        return "–", ""
    size = max(abs(value["low"]), abs(value["high"])) if isinstance(value, dict) else abs(value)
    write = {
        "share": lambda x: f"{100 * x:.1f}",
        "fine": lambda x: f"{x:.3f}",
        "number": lambda x: number(x, size),
    }[form]
    if not isinstance(value, dict):
        return write(value), ""
    return write(value["mean"]), f"{write(value['low'])} to {write(value['high'])}"


def seconds(value: float) -> str:
    """`3 min 20 s`."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
