"""What draws a panel: each function takes numbers and returns a function that draws them into matplotlib axes."""

import math
import textwrap
from collections.abc import Callable

from instructgpt_jax.report import words
from instructgpt_jax.report.style import LINES, Key, color, marker

SPREAD = 0.08  # between the methods' points at one size, of the distance between sizes


def by_size(lines: list[words.Line], sizes: list[tuple[str, str]], value: Callable, axis: Callable) -> Callable:
    """One line a method through the model sizes; with a single size, one point a method.

    Args:
      lines: the methods.
      sizes: (size, its label) from left to right.
      value: name of a model -> its interval or None.
      axis: sets the y axis up.
    """
    order = [size for size, _ in sizes]

    def draw(ax):
        for n, line in enumerate(lines):
            if len(order) == 1:
                points = [(n, value(name)) for name in line.models.values()]
            else:
                shift = SPREAD * (n - (len(lines) - 1) / 2)
                points = [(order.index(size) + shift, value(name)) for size, name in line.models.items()]
            points = sorted((x, found) for x, found in points if found is not None)
            means = [found["mean"] for _, found in points]
            style = {"color": color(line.color), "linestyle": LINES[line.dashes % len(LINES)]}
            ax.plot([x for x, _ in points], means, linewidth=1.4, **style)
            for x, found in points:
                _point(ax, x, found, line.color)
        if len(order) == 1:
            _method_ticks(ax, lines)
            ax.set_xlim(-0.6, len(lines) - 0.4)
        else:
            ax.set_xticks(range(len(order)), [label for _, label in sizes])
            ax.set_xlim(-0.45, len(order) - 0.55)
        ax.grid(axis="x", visible=False)
        axis(ax)

    return draw


def win_rate_axis(baseline: str, top: float) -> Callable:
    """From 0 to above `top`, the baseline's 50 % dashed."""

    def axis(ax):
        ax.axhline(0.5, color=color("muted"), linewidth=1, linestyle=LINES[1], zorder=1)
        _percent(ax.yaxis)
        ax.set_ylim(0, min(1.02, max(0.6, 1.06 * top)))
        ax.set_ylabel(f"win rate against {baseline}")

    return axis


def rating_axis(ax) -> None:
    """The whole scale, 1 to 7."""
    ax.set_ylim(0.9, 7.1)
    ax.set_yticks(range(1, 8))
    ax.set_ylabel("mean rating, 1 to 7")


def bars(lines: list[words.Line], sizes: list[str], values: dict[str, dict]) -> Callable:
    """A group of bars a method, in it a bar a size, paler for smaller ones. `values`: name of a model -> interval."""

    def draw(ax):
        width = 0.76 / len(sizes)
        for x, line in enumerate(lines):
            have = [size for size in sizes if size in line.models]
            for n, size in enumerate(have):
                value, at = values[line.models[size]], x + width * (n - (len(have) - 1) / 2)
                alpha = 0.9 if len(sizes) == 1 else 0.45 + 0.5 * sizes.index(size) / (len(sizes) - 1)
                ax.bar(at, value["mean"], width * 0.92, color=color("paper"))  # hides the grid behind the pale bar
                ax.bar(at, value["mean"], width * 0.92, color=color(line.color), alpha=alpha)
                _interval(ax, at, value, "ink", 1.3)
        _method_ticks(ax, lines)
        ax.grid(axis="x", visible=False)
        _percent(ax.yaxis)
        ax.set_ylabel("share of responses")
        top = max(value["high"] for value in values.values())
        ax.set_ylim(0, min(1.02, 1.08 * top) if top > 0 else 0.1)

    return draw


def dots(rows: list[tuple[str, str, dict]], unit: str, shares: bool, chance: float | None) -> Callable:
    """A row a model, (label, colour, interval), from top to bottom; the line of chance dotted."""

    def draw(ax):
        for y, (_, tint, value) in enumerate(rows):
            ax.plot([value["low"], value["high"]], [y, y], color=color(tint), linewidth=1.8, solid_capstyle="butt")
            ends = {"marker": "|", "markersize": 7, "linestyle": "none"}
            ax.plot([value["low"], value["high"]], [y, y], color=color(tint), **ends)
            ax.plot([value["mean"]], [y], color=color(tint), marker=marker(tint))
        ax.set_yticks(range(len(rows)), [textwrap.fill(label, 18) for label, _, _ in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.margins(x=0.08)
        ax.locator_params(axis="x", nbins=5)
        if shares:
            _percent(ax.xaxis)
        if chance is not None:
            ax.axvline(chance, color=color("muted"), linewidth=1.4, linestyle=LINES[2], zorder=1)
        ax.set_xlabel(unit)

    return draw


def accuracy(groups: list[tuple[str, dict | None, float | None]]) -> Callable:
    """Accuracy with its interval beside the labelers' agreement, by group: (label, accuracy, agreement)."""

    def draw(ax):
        for x, (_, found, agreement) in enumerate(groups):
            if found is not None:
                _point(ax, x - 0.1 * (agreement is not None), found, "sft")
            if agreement is not None:
                ax.plot([x + 0.1], [agreement], color=color("ink"), marker="D", linestyle="none")
        ax.axhline(0.5, color=color("muted"), linewidth=1.4, linestyle=LINES[2], zorder=1)
        ax.set_xticks(range(len(groups)), [_wrap(label) for label, _, _ in groups])
        ax.set_xlim(-0.6, len(groups) - 0.4)
        ax.margins(y=0.1)
        ax.grid(axis="x", visible=False)
        _percent(ax.yaxis)
        ax.set_ylabel("share of pairs")

    return draw


def calibration(bins: list[dict]) -> Callable:
    """Observed against predicted preference; the area of a point is its number of pairs."""

    def draw(ax):
        ax.plot([0, 1], [0, 1], color=color("muted"), linewidth=1, linestyle=LINES[1])
        predicted, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
        ax.plot(predicted, observed, color=color("sft"), linewidth=1.2)
        most = max(b["pairs"] for b in bins) or 1
        ax.scatter(predicted, observed, [12 + 70 * b["pairs"] / most for b in bins], color=color("sft"), zorder=3)
        _percent(ax.xaxis)
        _percent(ax.yaxis)
        ax.set_xlabel("predicted preference")
        ax.set_ylabel("observed preference")

    return draw


def against_kl(runs: dict[str, list[tuple[float, dict | float]]], looks: dict[str, Key]) -> Callable:
    """Points (KL, mean) of the snapshots of each run, in the order of training."""

    def draw(ax):
        for name, points in runs.items():
            look = looks[name]
            line = {"linestyle": LINES[look.line % len(LINES)], "linewidth": 1.4, "markersize": 5}
            means = [words.mean(value) for _, value in points]
            ax.plot([kl for kl, _ in points], means, color=color(look.color), marker=look.marker, **line)
            for kl, value in points:
                if isinstance(value, dict):
                    _interval(ax, kl, value, look.color, 1.1)
        ax.set_xlabel("KL from the reference, nats a response")
        ax.set_ylabel("mean of the responses")

    return draw


def training(curves: dict[str, tuple[list, list]], looks: dict[str, Key], step: str, unit: str) -> Callable:
    """Of each stage the values on training batches as a line, and those on validation data as points."""

    def draw(ax):
        for stage, (train, valid) in curves.items():
            tint, dashes = color(looks[stage].color), LINES[looks[stage].line % len(LINES)]
            if train:
                ax.plot(*_finite(train), color=tint, linewidth=1.2, linestyle=dashes)
            if valid:
                style = {"linestyle": LINES[2] if train else dashes, "linewidth": 1.2}
                ax.plot(*_finite(valid), color=tint, marker=looks[stage].marker, markersize=4.5, **style)
        ax.set_xlabel(step)
        ax.set_ylabel(unit)

    return draw


def _point(ax, x: float, value: dict, tint: str) -> None:
    """A mean with its interval."""
    _interval(ax, x, value, tint, 1.8)
    ax.plot([x], [value["mean"]], color=color(tint), marker=marker(tint), linestyle="none")


def _interval(ax, x: float, value: dict, tint: str, width: float) -> None:
    ends = [value["low"], value["high"]]
    ax.plot([x, x], ends, color=color(tint), linewidth=width, solid_capstyle="butt", zorder=2.5)
    if ends[0] < ends[1]:
        ax.plot([x, x], ends, color=color(tint), marker="_", markersize=9, linestyle="none", zorder=2.5)


def _method_ticks(ax, lines: list[words.Line]) -> None:
    size = 11 if len(lines) < 5 else 10 if len(lines) < 7 else 8.5
    ax.set_xticks(range(len(lines)), [_wrap(line.label) for line in lines], fontsize=size)


def _percent(axis) -> None:
    from matplotlib import ticker

    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{round(100 * x, 6):g} %"))


def _finite(points: list) -> tuple[list[float], list[float]]:
    have = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    return [step for step, _ in have], [value for _, value in have]


def _wrap(label: str) -> str:
    return textwrap.fill(label, 10, break_long_words=False)
