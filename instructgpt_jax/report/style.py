"""The look of figures: colours, markers, and one panel as SVG or all panels as one PNG.

Panels are drawn in the colours of the light page. In SVG each of these becomes a CSS variable, so that one drawing
serves the light and the dark page. matplotlib is imported only when something is drawn, never pyplot, and its settings
are those of this module only meanwhile.
"""

import contextlib
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from instructgpt_jax.report.words import Line

# Name -> (light, dark). Okabe and Ito's colours, which people with any colour vision tell apart, lightened for the dark
# page; each method has its own marker too.
PALETTE = {
    "base": ("#6b7280", "#a7b0bd"),
    "prefix": ("#b97a00", "#e9a825"),
    "sft": ("#0072b2", "#58b4ea"),
    "ppo": ("#d55e00", "#ff8a4c"),
    "ppo_ptx": ("#00875f", "#2fc596"),
    "flan": ("#b3261e", "#ff9a90"),
    "t0": ("#7a4a2b", "#d3a27f"),
    "control": ("#b0518b", "#e29ac6"),
    "extra1": ("#5b4fc4", "#a79ff5"),
    "extra2": ("#7a6a00", "#d8c74a"),
    "extra3": ("#0f7f8c", "#56c7d4"),
    "ink": ("#1d2329", "#e6e9ed"),
    "muted": ("#59636e", "#9aa5b1"),
    "grid": ("#dde2e8", "#343c46"),
    "paper": ("#ffffff", "#171b21"),
}
MARKERS = {
    "base": "o", "prefix": "s", "sft": "^", "ppo": "D", "ppo_ptx": "v", "flan": "p", "t0": "*", "control": "X",
    "ink": "D",
}  # fmt: skip
SPARE_MARKER = "P"
SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "p": "⬟", "*": "★", "X": "✖", "P": "✚"}  # in legends
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))

WIDTH, HEIGHT = 4.8, 3.3  # of a panel, in inches; 72 SVG units an inch
PNG_DPI = 150


class Panel(NamedTuple):
    """One pair of axes: what stands above it, what draws it, and its height in inches."""

    title: str
    draw: Callable
    height: float = HEIGHT


class Figure(NamedTuple):
    """A figure of the report; its panels lie in rows of `columns`."""

    name: str  # of the PNG, without its ending
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[Line] = ()
    columns: int = 2


def color(name: str) -> str:
    """The colour to draw with."""
    return PALETTE[name][0]


def marker(name: str) -> str:
    """The marker of a colour."""
    return MARKERS.get(name, SPARE_MARKER)


def dashes(line: Line) -> tuple[float, ...]:
    """Lengths of its dashes and gaps, in widths of the line; none = solid."""
    return DASHES[line.dashes % len(DASHES)]


def look(line: Line) -> dict:
    """The colour and the dashes of a line, as arguments of matplotlib's `plot`."""
    return {"color": color(line.color), "linestyle": (0, dashes(line))}


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """matplotlib's defaults with the settings of the report, whatever the user's own are; undone at the end."""
    from matplotlib import style

    chosen = {
        "font.size": 11.5,
        "axes.titlesize": 12,
        "text.color": color("ink"),
        "text.parse_math": False,  # a dollar sign in a label is a dollar sign
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "lines.markersize": 5.5,
        "lines.markeredgewidth": 1.4,
        "svg.fonttype": "none",  # text stays text, in the page's own type
        "figure.constrained_layout.use": True,
    }
    chosen |= dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 11)
    chosen |= dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), color("muted"))
    chosen |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), color("grid"))
    with style.context(["default", chosen]):
        yield


def svg(panel: Panel, name: str) -> str:
    """One panel as an inline <svg> element, coloured by CSS variables; `name` makes the ids in it unique."""
    import matplotlib
    from matplotlib import figure

    with settings(), matplotlib.rc_context({"svg.hashsalt": name}):
        canvas = figure.Figure(figsize=(WIDTH, panel.height))
        panel.draw(canvas.add_subplot())
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(out, format="svg", transparent=True, metadata=nothing)
    box, text = re.search(r'<svg[^>]* (viewBox="[^"]*")[^>]*>(.*</svg>)', out.getvalue(), re.DOTALL).groups()
    text = f'<svg {box} role="img" aria-label="{html.escape(panel.title)}">{text}'
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would be the whole page's
    text = re.sub(r'(?<=<g) id="[^"]*"| id="line2d_\d+"', "", text).replace("xlink:href", "href")
    for key, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{key})")
    return re.sub(r"\s*\n\s*", " ", text).strip()


def png(drawn: Figure) -> bytes:
    """All panels of a figure with its title and its legend, as a PNG on white."""
    from matplotlib import figure, lines

    columns = min(drawn.columns, len(drawn.panels))
    rows = math.ceil(len(drawn.panels) / columns)
    with settings():
        height = max(panel.height for panel in drawn.panels)
        canvas = figure.Figure(figsize=(WIDTH * columns, height * rows + 0.7))
        canvas.suptitle(drawn.title, fontsize=13)
        axes = canvas.subplots(rows, columns, squeeze=False).flatten()
        for panel, ax in zip(drawn.panels, axes, strict=False):
            panel.draw(ax)
            ax.set_title(panel.title)
        for ax in axes[len(drawn.panels) :]:
            ax.set_axis_off()
        if drawn.legend:
            keys = [lines.Line2D([], [], marker=marker(k.color), label=k.label, **look(k)) for k in drawn.legend]
            fits = max(1, int(WIDTH * columns / 1.6))
            canvas.legend(handles=keys, loc="outside lower center", ncols=min(fits, len(keys)), frameon=False)
        out = io.BytesIO()
        canvas.savefig(out, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return out.getvalue()
