"""What the paper found beside what this run found, and the headline: sentences computed from the report's numbers.

The paper's numbers are those of Ouyang et al. 2022: sections 1 and 4, figures 1, 3 and 4, appendix E.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from instructgpt_jax.report import words

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "too close to tell"
NEAR = 0.05  # of a win rate or an accuracy: what counts as the same
KEPT = 0.02  # of the pretraining loss: what counts as no tax


class Finding(NamedTuple):
    """One line of the table."""

    claim: str
    paper: str
    here: str
    verdict: str


def headline(report: dict) -> str:
    """The main result in one sentence, with its number."""
    found = _View(report)
    for method in ("ppo_ptx", "ppo", "sft"):
        name = found.best_size(method)
        rate = found.win_rate(name)
        if rate is not None and name != report.get("baseline"):
            first, second = found.named(name, report["baseline"])
            return f"{first} is preferred to {second} in {words.percent(rate)} of cases."
    for method in ("ppo_ptx", "ppo"):
        row, start = found.row(found.best_size(method)), found.row(report.get("baseline", ""))
        for key, what in (("gold", "gold"), ("judge", "judge's"), ("score", "reward model's")):
            if key in row and key in start:
                before, after = (words.mean(r[key]) for r in (start, row))
                first, second = found.named(report["baseline"], found.best_size(method))
                verb = "raises" if after > before else "lowers"
                change = f"from {words.number(before)} to {words.number(after)}"
                return f"{second} {verb} the {what} score of {first} {change}."
    return ""


def findings(report: dict) -> list[Finding]:
    """The paper's findings that the report has numbers for, in the paper's order."""
    found = _View(report)
    makers = (_preferences, _small_beats_large, _pretraining_mix, _heldout, _metadata, _tax, _reward_model, _control)
    return [finding for maker in makers for finding in maker(found)]


class _View:
    """The report as the findings look at it: the first distribution, and its first labeler group."""

    def __init__(self, report: dict):
        self.report = report
        self.models = report["models"]
        self.names = words.model_names(report)
        order, results = words.distributions(report), report.get("results", {})
        judged = [name for name in order if any(row.get("win_rate") for row in results[name].values())]
        self.rows = results[(judged or order)[0]] if order else {}
        groups = [
            g for g in words.group_names(report) if any(g in row.get("win_rate", {}) for row in self.rows.values())
        ]
        self.group = groups[0] if groups else ""
        self.sizes = words.sizes(report, list(self.models))

    def row(self, name: str) -> dict:
        return self.rows.get(name, {})

    def win_rate(self, name: str) -> dict | None:
        return self.row(name).get("win_rate", {}).get(self.group)

    def model(self, method: str, size: str) -> str:
        """The last model of this method and size (a later round replaces an earlier one), or ''."""
        wanted = (method, size)
        return next((n for n, m in reversed(self.models.items()) if (m["method"], m["size"]) == wanted), "")

    def named(self, *names: str) -> list[str]:
        """Their labels, with sizes if they differ in size."""
        if len({self.models[name]["size"] for name in names}) == 1:
            return [self.models[name]["label"] for name in names]
        return [self.names[name] for name in names]

    def sized(self, size: str, text: str) -> str:
        """What is found at one size, as a line."""
        return f"{size}: {text}" if len(self.sizes) > 1 else text

    def best_size(self, method: str) -> str:
        """The model of the method at the baseline's size, else at the largest."""
        baseline = self.models.get(self.report.get("baseline"), {}).get("size", "")
        return next((n for size in (baseline, *reversed(self.sizes)) if (n := self.model(method, size))), "")

    def pairs(self, first: str, second: str, value: Callable) -> Iterator[tuple[str, dict, dict]]:
        """(size, value, value) of two methods at each size that has both."""
        for size in self.sizes:
            a, b = value(self.model(first, size)), value(self.model(second, size))
            if a is not None and b is not None:
                yield size, a, b

    def compare(self, first: str, second: str, value: Callable, write: Callable, up: bool = True) -> tuple[str, str]:
        """What is found of `first` and `second`, and whether the second is higher (or lower) at every size."""
        texts, verdicts = [], []
        for size, a, b in self.pairs(first, second, value):
            verdicts.append(_order(a, b) if up else _order(b, a))
            texts.append(self.sized(size, f"{write(a)} → {write(b)}"))
        return "\n".join(texts), _all(verdicts)


def _order(low: dict, high: dict) -> str:
    """Whether the second is above the first, by more than their intervals."""
    if high["low"] > low["high"]:
        return HOLDS
    return UNCLEAR if high["mean"] > low["mean"] else FAILS


def _all(verdicts: list[str]) -> str:
    """The worst of them; '' of none."""
    return next((v for v in (FAILS, UNCLEAR, HOLDS) if v in verdicts), "")


def _preferences(found: _View) -> Iterator[Finding]:
    """Figure 1 from left to right: prompting, SFT, PPO."""
    lines = (
        ("base", "prefix", "A few-shot prefix makes GPT better", "175B: 24 % → 41 %"),
        ("prefix", "sft", "SFT is preferred to prompted GPT", "175B: 41 % → 50 %"),
        ("base", "sft", "SFT is preferred to GPT", "175B: 24 % → 50 %"),
        ("sft", "ppo", "PPO is preferred to SFT", "175B: 50 % → 62 %"),
        ("sft", "ppo_ptx", "PPO-ptx (InstructGPT) is preferred to SFT", "1.3B: 35 % → 52 %\n175B: 50 % → 65 %"),
    )
    prompted = any(True for _ in found.pairs("prefix", "sft", found.win_rate))
    for first, second, claim, paper in lines:
        here, verdict = found.compare(first, second, found.win_rate, words.percent)
        if verdict and not (prompted and (first, second) == ("base", "sft")):
            yield Finding(claim, paper, here, verdict)


def _small_beats_large(found: _View) -> Iterator[Finding]:
    """1.3B InstructGPT is preferred to 175B GPT-3, with the few-shot prefix and without it."""
    for method, what, paper in (("base", "GPT", "24 %"), ("prefix", "prompted GPT", "41 %")):
        small = next((n for size in found.sizes if (n := found.model("ppo_ptx", size))), "")
        large = next((n for size in reversed(found.sizes) if (n := found.model(method, size))), "")
        if not small or not large or found.models[small]["size"] == found.models[large]["size"]:
            continue
        a, b = found.win_rate(large), found.win_rate(small)
        if a is not None and b is not None:
            here = f"{found.names[large]}: {words.percent(a)}\n{found.names[small]}: {words.percent(b)}"
            claim = f"The smallest PPO-ptx beats the largest {what}"
            yield Finding(claim, f"175B {what}: {paper}\n1.3B PPO-ptx: 52 %", here, _order(a, b))


def _pretraining_mix(found: _View) -> Iterator[Finding]:
    pairs = list(found.pairs("ppo", "ppo_ptx", found.win_rate))
    if pairs:
        gaps = [b["mean"] - a["mean"] for _, a, b in pairs]
        here = "\n".join(found.sized(size, f"{words.percent(a)} and {words.percent(b)}") for size, a, b in pairs)
        claim = "The pretraining mix costs no preference: PPO and PPO-ptx within 5 points"
        verdict = HOLDS if max(map(abs, gaps)) <= NEAR else FAILS
        yield Finding(claim, "1.3B: 51 % and 52 %\n175B: 62 % and 65 %", here, verdict)


def _heldout(found: _View) -> Iterator[Finding]:
    """Held-out labelers prefer as the training labelers do."""
    gaps = []
    for name in found.models:
        rates = found.row(name).get("win_rate", {})
        if "training" in rates and "heldout" in rates and name != found.report["baseline"]:
            gaps.append((abs(rates["heldout"]["mean"] - rates["training"]["mean"]), name, rates))
    if gaps:
        gap, name, rates = max(gaps, key=lambda at: at[0])
        here = (
            f"at most {100 * gap:.1f} points apart\n{found.names[name]}: {words.percent(rates['training'])} and "
            f"{words.percent(rates['heldout'])}"
        )
        claim = "Held-out labelers judge as training labelers do, within 5 points"
        paper = "about the same\n175B PPO-ptx: 65 % and 70 %"
        yield Finding(claim, paper, here, HOLDS if gap <= NEAR else FAILS)


def _metadata(found: _View) -> Iterator[Finding]:
    """Figure 4, GPT against PPO-ptx."""
    lines = (
        ("hallucination", "PPO-ptx hallucinates at most half as often as GPT", "41 % → 17 %", False),
        ("follows_instruction", "PPO-ptx attempts the correct instruction more often", "70 % → 90 %", True),
        ("satisfies_constraint", "PPO-ptx follows explicit constraints more often", "22 % → 43 %", True),
        ("appropriate", "PPO-ptx is more appropriate for a customer assistant", "81 % → 90 %", True),
    )
    for key, claim, paper, up in lines:
        value = lambda name, key=key: found.row(name).get("metadata", {}).get(key)  # noqa: E731
        here, verdict = found.compare("base", "ppo_ptx", value, words.percent, up)
        if verdict and key == "hallucination":
            ratios = [b["mean"] <= a["mean"] / 2 for _, a, b in found.pairs("base", "ppo_ptx", value)]
            verdict = HOLDS if all(ratios) else FAILS
        if verdict:
            yield Finding(claim, paper, here, verdict)


def _tax(found: _View) -> Iterator[Finding]:
    """Section 4.2: PPO loses on public tasks, PPO-ptx much less; here measured as loss on pretraining text.

    It is compared with the policy that PPO started from, where the report has its loss, else with the base model.
    """
    language = found.report.get("language", {})
    start = language.get("ref_policy", {}).get("pretraining_loss")
    owner = "GPT's" if start is None else "its start's"

    def loss(name: str) -> dict | None:
        return language.get(name, {}).get("pretraining_loss")

    limit = f"{100 * KEPT:.0f} %"
    for method, claim, paper in (
        ("ppo", f"PPO pays an alignment tax: its pretraining loss is more than {limit} above {owner}", "69.8 → 52.0"),
        ("ppo_ptx", f"The pretraining mix keeps the loss within {limit} of {owner}", "69.8 → 69.9"),
    ):
        pairs = list(found.pairs("base", method, loss))
        if start is not None and loss(name := found.best_size(method)) is not None:
            pairs = [(found.models[name]["size"], start, loss(name))]
        rises = [b["mean"] / a["mean"] - 1 for _, a, b in pairs]
        if rises:
            texts = [
                found.sized(size, f"{a['mean']:.3f} → {b['mean']:.3f} nats ({100 * rise:+.1f} %)".replace("-", "−"))
                for (size, a, b), rise in zip(pairs, rises, strict=True)
            ]
            here, paper = "\n".join(texts), f"175B, F1 on SQuADv2: {paper}"
            ok = all(rise > KEPT for rise in rises) if method == "ppo" else all(rise <= KEPT for rise in rises)
            yield Finding(claim, paper, here, HOLDS if ok else FAILS)


def _reward_model(found: _View) -> Iterator[Finding]:
    """Section 4.1 and appendix E.2: near the labelers' own agreement, a little lower for labelers it never saw."""
    model = found.report.get("reward_model", {})
    accuracy, agreement = model.get("accuracy", {}), model.get("agreement", {})
    if "training" in accuracy and "training" in agreement:
        here = f"{words.percent(accuracy['training'])}\nlabelers: {100 * agreement['training']:.1f} %"
        near = abs(accuracy["training"]["mean"] - agreement["training"]) <= NEAR
        claim = "The reward model is as accurate as labelers agree, within 5 points"
        yield Finding(claim, "72.4 ± 0.4 %\nlabelers: 72.6 ± 1.5 %", here, HOLDS if near else FAILS)
    if "training" in accuracy and "heldout" in accuracy:
        a, b = accuracy["training"], accuracy["heldout"]
        here = f"{words.percent(a)} → {words.percent(b)}"
        higher = b["mean"] > a["mean"]
        verdict = HOLDS if not higher else UNCLEAR if b["low"] <= a["high"] else FAILS
        yield Finding("It is no more accurate on labelers it never saw", "72.4 ± 0.4 % → 69.6 ± 0.9 %", here, verdict)


def _control(found: _View) -> Iterator[Finding]:
    """Not in the paper: with shuffled rankings there must be nothing to gain."""
    for name in (n for n, model in found.models.items() if model["method"] == "control"):
        start, rate = found.win_rate(found.report["baseline"]), found.win_rate(name)
        if start is not None and rate is not None:
            verdict = HOLDS if rate["low"] <= start["mean"] else FAILS
            claim = "With shuffled rankings nothing is gained over SFT"
            yield Finding(claim, "not in the paper", words.percent(rate), verdict)
