"""What draws a panel: each function draws numbers into matplotlib axes."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from instructgpt_jax.report import words
from instructgpt_jax.report.style import DASHES, color, look, marker

SPREAD = 0.08  # between the methods' points at one size, of the distance between sizes


class Scale(NamedTuple):
    """The axis that values are read from."""

    label: str
    share: bool = False  # written in per cent
    limits: tuple[float, float] | None = None
    mark: float | None = None  # where a dashed line is: chance, the baseline


class Row(NamedTuple):
    """One line of `rows`: its label and the (colour, interval) of each of its points."""

    label: str
    points: Sequence[tuple[str, dict]]


def by_size(ax, lines: list[words.Line], sizes: dict[str, str], values: dict[str, dict], scale: Scale) -> None:
    """One line a method through the model sizes.

    Args:
      ax: the axes.
      lines: the methods.
      sizes: each size and its label, from left to right.
      values: name of a model -> interval.
      scale: the y axis.
    """
    order = list(sizes)
    for n, line in enumerate(lines):
        shift = SPREAD * (n - (len(lines) - 1) / 2)
        points = [(order.index(size) + shift, values[name]) for size, name in line.models.items() if name in values]
        points.sort(key=lambda point: point[0])
        ax.plot([x for x, _ in points], [value["mean"] for _, value in points], linewidth=1.4, **look(line))
        for x, value in points:
            _point(ax, x, value, line.color, marker(line.color))
    ax.set_xticks(range(len(order)), sizes.values())
    ax.set_xlim(-0.45, len(order) - 0.55)
    ax.grid(axis="x", visible=False)
    _scale(ax, "y", scale)


def rows(ax, rows: list[Row], scale: Scale, bars: bool = False) -> None:
    """From top to bottom a row of points with intervals, `bars` = on bars from 0; the x axis is the scale."""
    for y, row in enumerate(rows):
        for n, (tint, value) in enumerate(row.points):
            if bars:
                ax.barh(y, value["mean"], 0.7, color=color("paper"))  # hides the grid behind the pale bar
                ax.barh(y, value["mean"], 0.7, color=color(tint), alpha=0.7)
            at = y + 0.24 * (n - (len(row.points) - 1) / 2)
            _point(ax, at, value, "ink" if bars else tint, "" if bars else marker(tint), across=True)
    ax.set_yticks(range(len(rows)), [textwrap.fill(row.label, 18) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.08)
    ax.grid(axis="y", visible=not bars)
    _scale(ax, "x", scale)
    if bars:
        ax.set_xlim(left=0)  # also where all of them are 0


def calibration(ax, bins: list[dict]) -> None:
    """Observed against predicted preference; the area of a point is its number of pairs."""
    ax.plot([0, 1], [0, 1], color=color("muted"), linewidth=1, dashes=DASHES[1])
    predicted, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    ax.plot(predicted, observed, color=color("sft"), linewidth=1.2)
    most = max(b["pairs"] for b in bins) or 1
    ax.scatter(predicted, observed, [12 + 70 * b["pairs"] / most for b in bins], color=color("sft"), zorder=3)
    _scale(ax, "x", Scale("predicted preference", share=True))
    _scale(ax, "y", Scale("observed preference", share=True))


def curves(ax, drawn: list[tuple[words.Line, list, bool]], across: str, up: str) -> None:
    """Lines through [x, value] points, in their order; `drawn` says of each whether its points have markers."""
    for line, points, marked in drawn:
        points = [(x, value) for x, value in points if value is not None]
        sign = {"marker": marker(line.color) if marked else "", "markersize": 4.5}
        ax.plot([x for x, _ in points], [words.mean(y) for _, y in points], linewidth=1.3, **look(line), **sign)
        for x, value in points:
            if isinstance(value, dict):
                _point(ax, x, value, line.color, "")
    _scale(ax, "x", Scale(across))
    _scale(ax, "y", Scale(up))


def _point(ax, at: float, value: dict, tint: str, sign: str, across: bool = False) -> None:
    """A mean with its interval, which lies along the y axis or `across`."""
    mean, low, high = (value[key] for key in ("mean", "low", "high"))
    ends = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
    style = {"color": color(tint), "marker": sign, "elinewidth": 1.6, "capsize": 4 * (low < high), "linestyle": "none"}
    if across:
        ax.errorbar([mean], [at], xerr=ends, **style)
    else:
        ax.errorbar([at], [mean], yerr=ends, **style)


def _scale(ax, which: str, scale: Scale) -> None:
    from matplotlib import ticker

    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_label_text(scale.label)
    if which == "x":
        ax.locator_params(axis="x", nbins=6)  # the labels of more would touch
    if scale.mark is not None:
        draw = ax.axvline if which == "x" else ax.axhline
        draw(scale.mark, color=color("muted"), linewidth=1.2, dashes=DASHES[1], zorder=1)
    if scale.share:
        axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{round(100 * x, 6):g} %"))
    if scale.limits:
        ax.set(**{f"{which}lim": scale.limits})
