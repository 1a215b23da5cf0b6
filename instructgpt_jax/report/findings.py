"""What the paper found beside what this run found, and the headline: sentences computed from the report's numbers.

The paper's numbers are those of Ouyang et al. 2022: sections 1 and 4, figures 1, 3, 4 and 5, appendix E.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from instructgpt_jax.report import ablations, toxicity, words
from instructgpt_jax.report.verdicts import KEPT, above, near, not_above

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "too close to tell"
HALF = {"mean": 0.5, "low": 0.5, "high": 0.5}  # as often preferred as not


class Finding(NamedTuple):
    """One line of the table."""

    claim: str
    paper: str
    here: str
    verdict: str


def headline(report: dict) -> str:
    """The main result in one sentence, with its number; '' if there is none."""
    found = _View(report)
    start = report.get("baseline", "")
    for method in ("ppo_ptx", "ppo", "sft"):
        name = found.best_size(method)
        if name in found.rates and name != start:
            first, second = found.named(name, start)
            by = words.by(found.group)
            return f"{first} is preferred to {second}{by} in {words.percent(found.rates[name])} of cases."
    for name in (found.best_size("ppo_ptx"), found.best_size("ppo")):
        for key, what in (("gold", "gold"), ("judge", "judge's"), ("score", "reward model's")):
            if all(key in found.rows.get(one, {}) for one in (start, name)):
                before, after = (words.mean(found.rows[one][key]) for one in (start, name))
                first, second = found.named(start, name)
                change = f"from {words.number(before)} to {words.number(after)}"
                return f"{second} {'raises' if after > before else 'lowers'} the {what} score of {first} {change}."
    return ""


def findings(report: dict) -> list[Finding]:
    """The paper's findings that the report has numbers for, in the paper's order."""
    found, lines = _View(report), []
    for claim, paper, pairs, judge, write in itertools.chain(
        _claims(found), ablations.claims(report), toxicity.claims(report)
    ):
        verdicts = [judge(a, b) for _, a, b in pairs]
        texts = [f"{where}: {write(a, b)}" if where else write(a, b) for where, a, b in pairs]
        if pairs:
            verdict = FAILS if False in verdicts else UNCLEAR if None in verdicts else HOLDS
            lines.append(Finding(claim, paper, "\n".join(texts), verdict))
    return lines


class _View:
    """The report as the findings look at it: the first distribution, and its first labeler group.

    Pairs are what is compared: (where or '', interval, interval).
    """

    def __init__(self, report: dict):
        self.models, self.names = report["models"], words.model_names(report)
        self.baseline = report.get("baseline", "")
        self.sizes = list(words.sizes(report, self.models))
        plain = [(name, "") for name in words.distributions(report)] or [("", "")]
        distribution, self.group = (words.measured(report, "win_rate") or plain)[0]
        self.rows = report.get("results", {}).get(distribution, {})
        self.rates = self.values("win_rate", self.group)
        self.table = report.get("head_to_head", {}).get(distribution, {}).get(self.group, {})
        language = report.get("language", {})
        self.losses = {name: row["pretraining_loss"] for name, row in language.items() if "pretraining_loss" in row}
        self.reward, self.folds = report.get("reward_model", {}), report.get("folds", {})

    def values(self, quantity: str, key: str) -> dict[str, dict]:
        """The intervals of the models that have this one."""
        return {name: row[quantity][key] for name, row in self.rows.items() if key in row.get(quantity, {})}

    def model(self, method: str, sizes: Iterable[str]) -> str:
        """The last model of a method (a later round replaces an earlier one) at the first size that has one, or ''."""
        known = {(model["method"], model["size"]): name for name, model in self.models.items()}
        return next((known[method, size] for size in sizes if (method, size) in known), "")

    def best_size(self, method: str) -> str:
        """The model of the method at the baseline's size, else at the largest."""
        return self.model(method, [self.models.get(self.baseline, {}).get("size", ""), *reversed(self.sizes)])

    def named(self, *names: str) -> list[str]:
        """Their labels, with sizes if they differ in size."""
        one = len({self.models[name]["size"] for name in names}) == 1
        return [self.models[name]["label"] if one else self.names[name] for name in names]

    def where(self, size: str) -> str:
        """The size, if there are several."""
        return size if len(self.sizes) > 1 else ""

    def pairs(self, first: str, second: str, values: dict[str, dict]) -> list[tuple[str, dict, dict]]:
        """Two methods at each size that has both."""
        names = [(self.where(size), self.model(first, [size]), self.model(second, [size])) for size in self.sizes]
        return [(size, values[a], values[b]) for size, a, b in names if a in values and b in values]

    def head_to_head(self, first: str, second: str) -> list[tuple[str, dict, dict]]:
        """One half, and how often the first method is preferred to the second, at each size that has both."""
        names = [(self.where(size), self.model(first, [size]), self.model(second, [size])) for size in self.sizes]
        return [(size, HALF, self.table[a][b]) for size, a, b in names if b in self.table.get(a, {})]

    def small_and_large(self, method: str) -> list[tuple[str, dict, dict]]:
        """The largest model of the method and the smallest PPO-ptx."""
        large, small = self.model(method, reversed(self.sizes)), self.model("ppo_ptx", self.sizes)
        known = large in self.rates and small in self.rates
        differ = known and self.models[large]["size"] != self.models[small]["size"]
        return [(f"{self.names[large]} → {self.names[small]}", self.rates[large], self.rates[small])] if differ else []

    def labelers(self) -> list[tuple[str, dict, dict]]:
        """Training and held-out labelers, where they differ most."""
        a, b = self.values("win_rate", "training"), self.values("win_rate", "heldout")
        names = [name for name in self.models if name in a and name in b and name != self.baseline]
        names.sort(key=lambda name: -abs(b[name]["mean"] - a[name]["mean"]))
        return [(self.names[name], a[name], b[name]) for name in names[:1]]

    def tax(self, method: str) -> list[tuple[str, dict, dict]]:
        """Pretraining losses of PPO's start, if the report has it, else of GPT at each size, and of a method."""
        name = self.best_size(method)
        if "ref_policy" in self.losses and name in self.losses:
            return [(self.where(self.models[name]["size"]), self.losses["ref_policy"], self.losses[name])]
        return self.pairs("base", method, self.losses)

    def control(self) -> list[tuple[str, dict, dict]]:
        """The baseline and what learned from shuffled rankings."""
        names = [name for name, model in self.models.items() if model["method"] == "control" and name in self.rates]
        return [("", self.rates[self.baseline], self.rates[name]) for name in names if self.baseline in self.rates]


def _claims(found: _View) -> Iterator[tuple[str, str, list[tuple[str, dict, dict]], Callable, Callable]]:
    """(claim, paper, pairs, what judges a pair, what writes it)."""
    pairs, rates = found.pairs, found.rates
    # Figure 1 from left to right: prompting, SFT, PPO.
    yield "A few-shot prefix makes GPT better", "175B: 24 % → 41 %", pairs("base", "prefix", rates), above, _arrow
    prompted = pairs("prefix", "sft", rates)
    yield "SFT is preferred to prompted GPT", "175B: 41 % → 50 %", prompted, above, _arrow
    if not prompted:
        yield "SFT is preferred to GPT", "175B: 24 % → 50 %", pairs("base", "sft", rates), above, _arrow
    yield "PPO is preferred to SFT", "175B: 50 % → 62 %", pairs("sft", "ppo", rates), above, _arrow
    claim, paper = "PPO-ptx (InstructGPT) is preferred to SFT", "1.3B: 35 % → 52 %\n175B: 50 % → 65 %"
    yield claim, paper, pairs("sft", "ppo_ptx", rates), above, _arrow
    for method, what, rate in (("base", "GPT", "24 %"), ("prefix", "prompted GPT", "41 %")):
        claim, paper = f"The smallest PPO-ptx beats the largest {what}", f"175B {what} → 1.3B PPO-ptx: {rate} → 52 %"
        yield claim, paper, found.small_and_large(method), above, _arrow
    likert = found.values("likert", found.group)  # figure 5
    for method, what, rate, rating in (("flan", "FLAN", "29.8 ± 2 %", "3.4"), ("t0", "T0", "26.8 ± 2 %", "3.3")):
        yield f"SFT is preferred to {what}", f"175B: {rate} → 50 %", pairs(method, "sft", rates), above, _arrow
        claim, paper = f"{what} is rated above GPT", f"175B: 2.6 → {rating}"
        yield claim, paper, pairs("base", method, likert), above, _ratings
        claim, paper = f"{what} is rated no higher than prompted GPT", f"175B: 3.5 → {rating}"
        yield claim, paper, pairs("prefix", method, likert), not_above, _ratings
    for method, what, rate in (  # sections 1 and 4.1
        ("base", "GPT", "85 ± 3 %"), ("prefix", "prompted GPT", "71 ± 4 %"),
        ("flan", "FLAN", "78 ± 4 %"), ("t0", "T0", "79 ± 4 %"),
    ):  # fmt: skip
        claim = f"Head to head, PPO-ptx is preferred to {what}"
        yield claim, f"175B: {rate}", found.head_to_head("ppo_ptx", method), above, lambda a, b: words.percent(b)
    claim = "The pretraining mix costs no preference: PPO and PPO-ptx within 5 points"
    yield claim, "1.3B: 51 % and 52 %\n175B: 62 % and 65 %", pairs("ppo", "ppo_ptx", rates), near, _both
    claim = "Held-out labelers judge as training labelers do, within 5 points"
    yield claim, "about the same\n175B PPO-ptx: 65 % and 70 %", found.labelers(), near, _both
    for key, claim, paper in (  # figure 4
        ("hallucination", "PPO-ptx hallucinates at most half as often as GPT", "41 % → 17 %"),
        ("fails_instruction", "PPO-ptx attempts the correct instruction more often", "70 % → 90 %"),
        ("satisfies_constraint", "PPO-ptx follows explicit constraints more often", "22 % → 43 %"),
        ("inappropriate", "PPO-ptx is more appropriate for a customer assistant", "81 % → 90 %"),
    ):
        judge = (lambda a, b: b["mean"] <= a["mean"] / 2) if key == "hallucination" else above
        values = found.values("metadata", key)
        values = {name: words.opposite(x) for name, x in values.items()} if key in words.OPPOSITES else values
        yield claim, paper, pairs("base", "ppo_ptx", values), judge, _arrow
    # Section 4.2: PPO loses on public tasks, PPO-ptx much less; here measured as loss on pretraining text.
    owner, limit = "its start's" if "ref_policy" in found.losses else "GPT's", f"{100 * KEPT:.0f} %"
    claim = f"PPO pays an alignment tax: its pretraining loss is more than {limit} above {owner}"
    yield claim, "175B, F1 on SQuADv2: 69.8 → 52.0", found.tax("ppo"), lambda a, b: _rise(a, b) > KEPT, _loss
    claim = f"The pretraining mix keeps the loss within {limit} of {owner}"
    yield claim, "175B, F1 on SQuADv2: 69.8 → 69.9", found.tax("ppo_ptx"), lambda a, b: _rise(a, b) <= KEPT, _loss
    # Section 4.1 and appendix E.2: near the labelers' own agreement, a little lower for labelers it never saw.
    accuracy, agreement = found.reward.get("accuracy", {}), found.reward.get("agreement", {})
    if "training" in accuracy and "training" in agreement:
        shared = agreement["training"]
        shared = shared if isinstance(shared, dict) else {"mean": shared, "low": shared, "high": shared}
        both = [("", accuracy["training"], shared)]
        claim = "The reward model is as accurate as labelers agree, within 5 points"
        yield claim, "72.4 ± 0.4 % and 72.6 ± 1.5 %", both, near, _both
    folds = found.folds
    seen = ("training_groups", "held_out_groups") if folds else ("training", "heldout")
    if all(name in (folds or accuracy) for name in seen):
        both = [("", *((folds or accuracy)[name] for name in seen))]
        claim, paper = "It is no more accurate on labelers it never saw", "72.4 ± 0.4 % → 69.6 ± 0.9 %"
        yield claim, paper, both, not_above, _arrow
    claim = "With shuffled rankings nothing is gained over SFT"
    yield claim, "not in the paper", found.control(), lambda a, b: b["low"] <= a["mean"], _arrow


def _rise(a: dict, b: dict) -> float:
    return b["mean"] / a["mean"] - 1


def _arrow(a: dict, b: dict) -> str:
    return f"{words.percent(a)} → {words.percent(b)}"


def _both(a: dict, b: dict) -> str:
    return f"{words.percent(a)} and {words.percent(b)}"


def _ratings(a: dict, b: dict) -> str:
    return f"{a['mean']:.2f} → {b['mean']:.2f}"


def _loss(a: dict, b: dict) -> str:
    return f"{a['mean']:.3f} → {b['mean']:.3f} nats ({100 * _rise(a, b):+.1f} %)".replace("-", "−")
