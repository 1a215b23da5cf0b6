"""The words of the report: labels of methods, distributions, labelers and metrics; how numbers are written."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# The paper's order and names.
METHODS = {
    "base": "GPT",
    "prefix": "GPT (prompted)",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "flan": "FLAN",
    "t0": "T0",
    "control": "PPO, shuffled rankings",
}
DISTRIBUTIONS = {"instruct": "Instruct prompts", "gpt": "GPT prompts", "other": "other prompts"}
GROUPS = {
    "training": "training labelers",
    "heldout": "held-out labelers",
    "researcher": "researchers",
    "all": "all labelers",
    "reward": "the reward model",
    "judge": "the judge",
    "grader": "the grader",
}
MACHINES = ("reward", "judge", "grader")  # groups that are no people
STAGES = {  # in the order in which they train
    "pretrain": "pretraining",
    "sft": "SFT",
    "rlhf_init": "start of PPO",
    "ref_policy": "start of PPO",
    "reward": "reward model",
}
METADATA = {  # table 3, those of figure 4 first; `toxic` is of the simulated world alone
    "fails_instruction": "Fails to follow the correct instruction",
    "satisfies_constraint": "Follows explicit constraints",
    "hallucination": "Hallucinations (closed domain)",
    "inappropriate": "Inappropriate for customer assistant",
    "sexual": "Sexual content",
    "violent": "Violent content",
    "encourages_harm": "Encourages violence, abuse or self-harm",
    "denigrates": "Denigrates a protected class",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Expresses an opinion",
    "moral_judgment": "Expresses a moral judgment",
    "toxic": "Toxic",
}
OPPOSITES = {  # figure 4 counts the answers without these
    "fails_instruction": "Attempts the correct instruction",
    "inappropriate": "Appropriate for customer assistant",
}
METRICS = {  # key -> (name, form, what it is)
    "win_rate": ("Win rate against the baseline, %", "share", ""),
    "likert": ("Rating, 1 to 7", "number", ""),
    "metadata": ("Properties, % of responses", "share", ""),
    "toxicity": ("Toxicity, 0 to 2", "number", ""),
    "relative_toxicity": ("Toxicity beside the prompt's, −1 to 1", "number", ""),
    "continuity": ("Continuity, 1 to 7", "number", ""),
    "score": ("Score", "number", "of the reward model that PPO trained on"),
    "judge": ("Judge", "number", "score of another reward model, which PPO never saw"),
    "gold": ("Gold score", "number", "what the labelers' judgements are made from"),
    "kl": ("KL, nats", "number", "from the reference policy, sum over the tokens of a response"),
    "length": ("Length, tokens", "number", ""),
    "ended": ("Ended by itself, %", "share", "responses that end before the limit"),
    "bleu": ("BLEU", "number", "of the corpus, against the human references"),
    "rouge_l": ("ROUGE-L", "fine", "against the human references"),
    "slot_coverage": ("Slot coverage, %", "share", "facts of the prompt that the response states"),
    "pretraining_loss": ("Pretraining loss, nats a token", "fine", ""),
    "tasks": ("Closed tasks, % right", "share", ""),
    "tasks_per_token": ("Closed tasks, % right by the mean per token", "share", "the paper's rule, appendix D"),
    "accuracy": ("Accuracy, % of pairs", "share", ""),
    "agreement": ("Agreement of labelers, % of pairs", "share", ""),
}
BENCHMARKS = {  # metrics of public tasks
    "acc": "accuracy by the sum",
    "acc_norm": "accuracy by the mean per character",
    "acc_token": "accuracy by the mean per token",
    "f1": "F1",
    "exact": "exact match",
    "bleu": "BLEU, 0 to 100",
    "rougeL": "ROUGE-L",
    "true": "true",
    "true_informative": "true and informative",
    "toxicity": "mean toxicity",
    "entropy": "entropy, bits",
    "pct_stereotype": "stereotype is likelier",
    "pct_male": "male sentence is likelier",
    "words": "words of an answer",
}
SHARES = ("acc", "f1", "exact", "em", "true", "pct", "rouge")  # metrics of public tasks that begin so are shares
PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


class Line(NamedTuple):
    """What is drawn as one line, and its entry in a legend: a method through the model sizes, or a stage."""

    label: str
    color: str  # its name in style.PALETTE
    dashes: int = 0
    models: dict[str, str] = {}  # of a method: size -> name of the model


def visible(value: Any) -> Any:
    """The report as it can be shown: control characters, which HTML has no place for, as their pictures."""
    if isinstance(value, dict):
        return {visible(key): visible(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [visible(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().translate(PICTURES)  # half a surrogate pair: '?'
    return value


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


def sizes(report: dict, names: Iterable[str]) -> dict[str, float]:
    """The sizes of the models `names` and their numbers of parameters, smallest first."""
    found = {report["models"][name]["size"]: report["models"][name].get("parameters", 0) for name in names}
    return dict(sorted(found.items(), key=lambda size: size[1]))


def model_names(report: dict) -> dict[str, str]:
    """What each model is called where sizes stand side by side: with its size if its label is not enough."""
    models = report["models"]
    labels = [model["label"] for model in models.values()]
    several = len({model["size"] for model in models.values()}) > 1 or len(set(labels)) < len(labels)
    return {name: f"{m['label']}, {m['size']}" if several else m["label"] for name, m in models.items()}


def distributions(report: dict) -> list[str]:
    """The distributions with results, the paper's main one first."""
    return ordered(report.get("results", {}), DISTRIBUTIONS)


def measured(report: dict, quantity: str) -> list[tuple[str, str]]:
    """The (distribution, labeler group) that have a `win_rate` or `likert` of any model, the paper's main one first."""
    found = []
    for name in distributions(report):
        groups = {group: None for row in report["results"][name].values() for group in row.get(quantity, {})}
        found += [(name, group) for group in ordered(groups, GROUPS)]
    return found


def name(key: str, known: dict[str, str] | None = None) -> str:
    """What a key is called: as the known names say, else the key as words."""
    return (known or {}).get(key, key.replace("_", " "))


def benchmark(metric: str) -> str:
    """The form of a metric of public tasks, see `cell`."""
    return "share" if metric.startswith(SHARES) else "number"


def by(group: str) -> str:
    """' by the judge' where the preferences of a group are no people's, '' where they are."""
    return f" by {name(group, GROUPS)}" if group in MACHINES else ""


def opposite(value: dict) -> dict:
    """The share of those that do not, with its interval."""
    return value | {"mean": 1 - value["mean"], "low": 1 - value["high"], "high": 1 - value["low"]}


def parameters(count: float) -> str:
    """1.3B, 170M, 84k."""
    for divisor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= divisor:
            return f"{count / divisor:.3g}{unit}"
    return f"{count:.0f}"


def mean(value: dict | float) -> float:
    """The mean of an interval; a number is its own."""
    return value["mean"] if isinstance(value, dict) else value


def percent(value: dict) -> str:
    """`71 ± 3 %`; with a decimal if narrow; `50 %` if there is no interval, `2 % (0 to 9)` if it is lopsided."""
    half = (value["high"] - value["low"]) / 2
    if half == 0:
        return f"{100 * value['mean']:.3g} %"
    digits = 0 if half >= 0.01 else 1
    if abs(value["mean"] - value["low"] - half) > 0.2 * half:
        mean, low, high = (f"{100 * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} % ({low} to {high})"
    return f"{100 * value['mean']:.{digits}f} ± {100 * half:.{digits}f} %"


def number(value: float, size: float | None = None) -> str:
    """Enough digits to tell values apart, with a true minus sign: 0.0012, −0.12, 1.23, 12.3, 1234.

    `size` is the largest number beside it, for numbers that are to have the same decimals.
    """
    size = abs(value) if size is None else size
    digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 0.01 or size == 0 else 4
    text = f"{value:.{digits}f}"
    return (text if float(text) or size != abs(value) or not value else f"{value:.1e}").replace("-", "−")


def cell(value: dict | float | None, form: str = "number") -> tuple[str, str]:
    """Mean and 95 % interval as they stand in a table; `form` share is in per cent, fine has three decimals,
    whole none."""
    if value is None:
        return "–", ""
    size = max(abs(value["low"]), abs(value["high"])) if isinstance(value, dict) else abs(value)
    write = {
        "share": lambda x: f"{100 * x:.1f}",
        "fine": lambda x: f"{x:.3f}",
        "number": lambda x: number(x, size),
        "whole": lambda x: f"{x:,.0f}",
    }[form]
    return write(mean(value)), f"{write(value['low'])} to {write(value['high'])}" if isinstance(value, dict) else ""


def seconds(value: float) -> str:
    """`3 min 20 s`."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
