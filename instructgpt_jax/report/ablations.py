"""Figures and findings of sweeps, appendix E.6 to E.11 of Ouyang et al. 2022: the section `sweeps` of a report.

A point is one run of PPO. The verdicts go by the rules of the other findings: where intervals overlap it is too close
to tell. The paper's numbers are read off its figures where its text has none.
"""

from collections.abc import Callable, Iterator
from functools import partial

from instructgpt_jax.report import drawing, words
from instructgpt_jax.report.drawing import Scale
from instructgpt_jax.report.style import Figure, Panel
from instructgpt_jax.report.verdicts import KEPT, NEAR, above, below, near, not_above

NAMES = (
    "figure33_ptx_coef",
    "figure34_kl_coef",
    "figure36_kl_coef_ptx",
    "figure37_start",
    "figure38_learning_rate",
    "appendix_e11",
)
RATING_NEAR = 0.3  # of 7: the starts of figure 37 are 3.8 to 4.0
SCALES = {  # quantity -> (title, scale)
    "likert": ("Rating", Scale("mean rating, 1 to 7")),
    "win_rate": ("Win rate against SFT", Scale("win rate", share=True, mark=0.5)),
    "score": ("Score that PPO raises", Scale("of the reward model")),
    "pretraining_loss": ("Loss on text", Scale("nats a token")),
}
ACROSS = {  # sweep -> what stands below the axis
    "ptx_coef": "ptx_coef",
    "kl_coef": "kl_coef",
    "kl_coef_base": "kl_coef",
    "kl_coef_ptx": "kl_coef",
    "start": "share of text, epochs",
    "lr": "learning rate",
    "lr_ptx": "learning rate",
    "episodes": "iterations",
    "ptx_ratio": "ptx sequences per episode",
    "batch": "episodes a batch",
    "minibatch": "episodes a minibatch",
}
Pair = tuple[str, dict, dict]  # where or '', interval, interval


def figures(report: dict) -> Iterator[Figure]:
    """Those that the sweeps have numbers for."""
    found = report.get("sweeps", {})
    if not found:
        return
    widened = max((one["runs"] for one in found["spread"].values()), default=0)
    bars = "Bars are 95 % intervals over the prompts" + (
        f", widened by the spread of {widened} runs that differ in their seed alone." if widened else "."
    )
    lost = "the form of the paper's figure {}, whose upper panels are public tasks: here the loss on pretraining text."
    made = (
        (NAMES[0], "ptx_coef", ("pretraining_loss", "score"), {"ptx_coef": ("PPO-ptx", "ppo_ptx", 0)},
         f"How much of what PPO forgets the pretraining gradients keep, and what they cost: {lost.format(33)}"),
        (NAMES[1], "kl_coef without ptx", ("pretraining_loss", "score"),
         {"kl_coef": ("PPO, from its start", "ppo", 0), "kl_coef_base": ("PPO, from GPT", "ppo", 1)},
         f"Whether a larger KL penalty does what ptx does: {lost.format(34)} The KL is from the start of PPO, or from "
         "the pretrained model, as in the paper."),
        (NAMES[2], "kl_coef with ptx", ("likert", "win_rate"), {"kl_coef_ptx": ("PPO-ptx", "ppo_ptx", 0)},
         "Ratings and preferences against kl_coef with ptx: the form of the paper's figure 36."),
        (NAMES[3], "The start of PPO", ("likert", "win_rate"), {"start": ("PPO-ptx", "ppo_ptx", 0)},
         "PPO-ptx from starts with other shares of pretraining data, and trained half as long: the form of the paper's "
         "figure 37."),
        (NAMES[4], "The policy's learning rate", ("likert", "win_rate"),
         {"lr": ("PPO", "ppo", 0), "lr_ptx": ("PPO-ptx", "ppo_ptx", 0)},
         "Ratings and preferences against the learning rate, with and without ptx: the form of the paper's figure 38."),
    )  # fmt: skip
    for name, title, quantities, looks, caption in made:
        panels = [panel for key in quantities for panel in _panel(found, key, looks, SCALES[key][0])]
        if panels:
            legend = [words.Line(*looks[one]) for one in looks if one in found["runs"]]
            yield Figure(name, title, f"{caption} {bars}", panels, legend)
    panels = []
    for sweep, key in (("episodes", "likert"), ("ptx_ratio", "likert"), ("batch", "likert"), ("minibatch", "likert"),
                       ("episodes", "pretraining_loss"), ("ptx_ratio", "pretraining_loss")):  # fmt: skip
        panels += _panel(found, key, {sweep: ("PPO-ptx", "ppo_ptx", 0)}, SCALES[key][0])
    if panels:
        caption = f"Longer runs, more text, and other batches: what appendix E.11 of the paper tells. {bars}"
        yield Figure(NAMES[5], "Episodes, text and batches", caption, panels, columns=3)


def _panel(found: dict, quantity: str, looks: dict[str, tuple], title: str) -> Iterator[Panel]:
    """One quantity through the values of the sweeps; none where no run has it."""
    lines, values, labels = [], {}, {}
    for sweep, (label, color, dashes) in looks.items():
        points = found["runs"].get(sweep, {}).get("points", [])
        points = [(f"{sweep} {n}", point) for n, point in enumerate(points) if quantity in point]
        values |= {name: point[quantity] for name, point in points}
        lines.append(words.Line(label, color, dashes, {point["value"]: name for name, point in points}))
        labels |= {point["value"]: point["value"].removesuffix(" epochs").replace(", ", "\n") for _, point in points}
        across = ACROSS[sweep]
    if not values:
        return
    if all(_number(value) is not None for value in labels):  # of sweeps with other values each
        labels = dict(sorted(labels.items(), key=lambda item: _number(item[0])))
    scale = SCALES[quantity][1]
    if quantity == "pretraining_loss" and quantity in found["beside"].get("base", {}):
        scale = scale._replace(label="nats a token; dashed: GPT", mark=found["beside"]["base"][quantity]["mean"])
    draw = partial(drawing.by_size, lines=lines, sizes=labels, values=values, scale=scale)
    yield Panel(f"{title}, by {across}", draw)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


# Findings -------------------------------------------------------------------------------------------------------------


def claims(report: dict) -> Iterator[tuple[str, str, list[Pair], Callable, Callable]]:
    """(claim, paper, pairs, what judges a pair, what writes it), in the paper's order; see findings.py."""
    found = report.get("sweeps", {})
    if not found:
        return
    runs, beside = {name: run["points"] for name, run in found["runs"].items()}, found["beside"]

    def ends(sweep: str, quantity: str, first: int = 0) -> list[Pair]:
        """Two points of a sweep; none where it lacks one, or where both are the same."""
        points = [point for point in runs.get(sweep, []) if quantity in point]
        if len(points) < first + 2:
            return []
        a, b = points[first], points[-1]
        return [(f"{ACROSS[sweep]} {a['value']} → {b['value']}", a[quantity], b[quantity])]

    # E.6, figure 33.
    claim, paper = "More ptx means less alignment tax", "DROP and SQuADv2, ptx_coef 1 → 100: 18 → 26 and 50 → 60"
    yield claim, paper, ends("ptx_coef", "pretraining_loss"), below, _fine
    claim = f"Some ptx_coef keeps the loss within {100 * KEPT:.0f} % of the start's"
    least = _least(runs.get("ptx_coef", []), "pretraining_loss")
    if least and "pretraining_loss" in beside.get("start", {}):
        pairs = [(f"ptx_coef {least['value']}", beside["start"]["pretraining_loss"], least["pretraining_loss"])]
        yield claim, "from ptx_coef 20 on", pairs, lambda a, b: b["mean"] <= (1 + KEPT) * a["mean"], _fine
    claim, paper = "More ptx costs score", "ptx_coef 1 → 100: −0.62 → −1.18"
    yield claim, paper, ends("ptx_coef", "score", first=1), below, _plain
    # E.6, figure 34.
    claim, paper = "A larger kl_coef costs score", "kl_coef 0.001 → 1, from GPT: about 2.8 → −2.3"
    pairs = [(f"{where}, KL from the start", *rest) for where, *rest in ends("kl_coef", "score", first=1)]
    pairs += [(f"{where}, from GPT", *rest) for where, *rest in ends("kl_coef_base", "score", first=1)]
    yield claim, paper, pairs, below, _plain
    claim = "No kl_coef without ptx has the loss of PPO-ptx at its score"
    pairs = list(_instead_of_ptx(runs, beside))
    yield claim, "not even kl_coef 2 repairs DROP and SQuADv2", pairs, _repaired, _both_ways
    claim = f"KL from GPT does what KL from the start does, within {100 * NEAR:.0f} points of preference"
    pairs = list(_references(runs))
    yield claim, "similar results", pairs, near, _shares
    # E.7, figure 36.
    best = [point for point in runs.get("kl_coef_ptx", []) if point["value"] in ("0.01", "0.02") and "likert" in point]
    if best:
        top = max(best, key=lambda point: point["likert"]["mean"])
        for end, paper in ((0, "2.1 → 4.1"), (-1, "3.1 → 4.1")):
            point = runs["kl_coef_ptx"][end]
            where = f"kl_coef {point['value']} → {top['value']}"
            claim = f"kl_coef {'0' if end == 0 else '2'} is rated below 0.01 to 0.02, with ptx"
            yield claim, paper, [(where, point["likert"], top["likert"])], above, _plain
    # E.8, figure 37.
    starts = [point for point in runs.get("start", []) if "likert" in point]
    if starts:
        ordered = sorted(starts, key=lambda point: point["likert"]["mean"])
        pairs = [(f"{ordered[0]['value']} → {ordered[-1]['value']}", ordered[0]["likert"], ordered[-1]["likert"])]
        claim = f"PPO hardly depends on the mix of its start: ratings within {RATING_NEAR}"
        yield claim, "3.8 to 4.0", pairs, lambda a, b: b["mean"] - a["mean"] <= RATING_NEAR, _plain
    # E.9, figure 38.
    pairs = []
    for sweep, name in (("lr", "PPO"), ("lr_ptx", "PPO-ptx")):
        pairs.append((name, _range(runs.get(sweep, []))))
    if all(one for _, one in pairs):
        (_, without), (_, with_ptx) = pairs
        claim, paper = (
            "PPO-ptx depends less on the learning rate than PPO",
            "PPO diverged above 8.05e-6, PPO-ptx did not",
        )
        yield claim, paper, [("spread of ratings", without, with_ptx)], below, _plain
        top = max(runs["lr"], key=lambda point: point["likert"]["mean"])
        where = f"learning rate {top['value']} → {runs['lr'][-1]['value']}"
        claim = "Without ptx the highest learning rate does harm"
        yield claim, paper, [(where, top["likert"], runs["lr"][-1]["likert"])], below, _plain
    # E.6 and E.11.
    claim = "Twice the episodes are rated no higher"
    yield claim, "no gain from 512,000", ends("episodes", "likert"), not_above, _plain
    claim, paper = "More pretraining sequences an episode give better ratings", "32 better than 8, many times slower"
    yield claim, paper, ends("ptx_ratio", "likert"), above, _plain
    usual = beside.get("ppo_ptx", {}).get("label")
    others = [point for point in runs.get("batch", []) if point["label"] != usual and "likert" in point]
    chosen = [point for point in runs.get("batch", []) if point["label"] == usual and "likert" in point]
    if chosen and others:
        pairs = [(f"{chosen[0]['value']} → {one['value']}", chosen[0]["likert"], one["likert"]) for one in others]
        claim = "No other batch is better than the usual one"
        yield claim, "of 64 to 1,024 the 512 was best", pairs, not_above, _plain


def _least(points: list[dict], quantity: str) -> dict:
    return min((point for point in points if quantity in point), key=lambda point: point[quantity]["mean"], default={})


def _instead_of_ptx(runs: dict, beside: dict) -> Iterator[Pair]:
    """PPO-ptx, and of the runs without ptx the best score among those of no higher loss; else the lowest loss."""
    ptx = beside.get("ppo_ptx", {})
    for sweep, where in (("kl_coef", "from the start"), ("kl_coef_base", "from GPT")):
        points = [point for point in runs.get(sweep, []) if {"pretraining_loss", "score"} <= point.keys()]
        if not points or not {"pretraining_loss", "score"} <= ptx.keys():
            continue
        as_low = [one for one in points if one["pretraining_loss"]["mean"] <= ptx["pretraining_loss"]["mean"]]
        one = max(as_low, key=lambda point: point["score"]["mean"]) if as_low else _least(points, "pretraining_loss")
        yield f"KL {where}, kl_coef {one['value']}", ptx, one


def _repaired(ptx: dict, other: dict) -> bool | None:
    """Whether what comes nearest without ptx has a higher loss, or as low a loss and a lower score."""
    loss, score = "pretraining_loss", "score"
    if other[loss]["mean"] > ptx[loss]["mean"]:
        return True if above(ptx[loss], other[loss]) else None
    return below(ptx[score], other[score])


def _both_ways(ptx: dict, other: dict) -> str:
    texts = []
    for one, name in ((other, "loss"), (ptx, "with ptx")):
        texts.append(f"{name} {one['pretraining_loss']['mean']:.3f} at score {words.number(one['score']['mean'])}")
    return "; ".join(texts)


def _references(runs: dict) -> Iterator[Pair]:
    """Preferences at each kl_coef above 0 and below 1 with either reference."""
    other = {point["value"]: point for point in runs.get("kl_coef_base", [])}
    for point in runs.get("kl_coef", []):
        twin = other.get(point["value"], {})
        if 0 < float(point["value"]) < 1 and "win_rate" in point and "win_rate" in twin:
            yield f"kl_coef {point['value']}", point["win_rate"], twin["win_rate"]


def _range(points: list[dict]) -> dict:
    """How far the ratings of a sweep lie apart, and in what interval; {} where it has fewer than two."""
    ratings = sorted((point["likert"] for point in points if "likert" in point), key=lambda one: one["mean"])
    if len(ratings) < 2:
        return {}
    low, high = ratings[0], ratings[-1]
    mean, half = (
        high["mean"] - low["mean"],
        ((low["high"] - low["mean"]) ** 2 + (high["high"] - high["mean"]) ** 2) ** 0.5,
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(ratings)}


def _plain(a: dict, b: dict) -> str:
    halves = [(one["high"] - one["low"]) / 2 for one in (a, b)]
    return f"{a['mean']:.2f} ± {halves[0]:.2f} → {b['mean']:.2f} ± {halves[1]:.2f}".replace("-", "−")


def _fine(a: dict, b: dict) -> str:
    halves = [(one["high"] - one["low"]) / 2 for one in (a, b)]
    return f"{a['mean']:.3f} ± {halves[0]:.3f} → {b['mean']:.3f} ± {halves[1]:.3f} nats"


def _shares(a: dict, b: dict) -> str:
    return f"{words.percent(a)} → {words.percent(b)}"
