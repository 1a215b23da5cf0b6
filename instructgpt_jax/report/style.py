"""The look of figures: colours, markers, and one panel as SVG or all panels as one PNG.

Panels are drawn in the colours of the light page. In SVG each of these becomes a CSS variable, so that one drawing
serves the light and the dark page. matplotlib is imported only when something is drawn, never pyplot, and its settings
are those of this module only meanwhile.
"""

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# Name -> (light, dark). Okabe and Ito's colours, which people with any colour vision tell apart, lightened for the dark
# page; each method has its own marker too.
PALETTE = {
    "base": ("#6b7280", "#a7b0bd"),
    "prefix": ("#b97a00", "#e9a825"),
    "sft": ("#0072b2", "#58b4ea"),
    "ppo": ("#d55e00", "#ff8a4c"),
    "ppo_ptx": ("#00875f", "#2fc596"),
    "control": ("#b0518b", "#e29ac6"),
    "extra1": ("#5b4fc4", "#a79ff5"),
    "extra2": ("#7a6a00", "#d8c74a"),
    "extra3": ("#0f7f8c", "#56c7d4"),
    "ink": ("#1d2329", "#e6e9ed"),
    "muted": ("#59636e", "#9aa5b1"),
    "grid": ("#dde2e8", "#343c46"),
    "paper": ("#ffffff", "#171b21"),
}
MARKERS = {"base": "o", "prefix": "s", "sft": "^", "ppo": "D", "ppo_ptx": "v", "control": "X"}
SPARE_MARKER = "P"
SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "X": "✖", "P": "✚"}  # of the markers, in the page's legends
LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

PANEL = (4.8, 3.3)  # inches; 72 SVG units an inch
PNG_DPI = 150


class Panel(NamedTuple):
    """One pair of axes: what stands above it, and what draws it."""

    title: str
    draw: Callable


class Key(NamedTuple):
    """A line of a legend: its words, the name of its colour, its marker ('' = a line), the dashes of the line."""

    label: str
    color: str
    marker: str = ""
    line: int = 0


class Figure(NamedTuple):
    """A figure of the report; its panels lie in rows of `columns`."""

    name: str  # of the PNG, without its ending
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[Key] = ()
    columns: int = 2


def color(name: str) -> str:
    """The colour to draw with."""
    return PALETTE[name][0]


def marker(name: str) -> str:
    """The marker of a colour."""
    return MARKERS.get(name, SPARE_MARKER)


def variables(dark: bool) -> str:
    """The palette as CSS custom properties."""
    return " ".join(f"--{name.replace('_', '-')}: {pair[dark]};" for name, pair in PALETTE.items())


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """matplotlib's defaults with the settings of the report, whatever the user's own are; undone at the end."""
    from matplotlib import style

    muted, grid = color("muted"), color("grid")
    chosen = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 11.5,
        "axes.titlesize": 12,
        "axes.labelsize": 11.5,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "text.color": color("ink"),
        "axes.labelcolor": muted,
        "axes.titlecolor": color("ink"),
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.facecolor": "none",
        "figure.facecolor": color("paper"),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
        "lines.markeredgewidth": 1.4,
        "svg.fonttype": "none",  # text stays text, in the page's own type
        "figure.constrained_layout.use": True,
    }
    with style.context(["default", chosen]):
        yield


def svg(panel: Panel, name: str) -> str:
    """One panel as an inline <svg> element, coloured by CSS variables; `name` makes the ids in it unique."""
    import matplotlib
    from matplotlib import figure

    with settings(), matplotlib.rc_context({"svg.hashsalt": name}):
        drawing = figure.Figure(figsize=PANEL)
        panel.draw(drawing.add_subplot())
        out = io.StringIO()
        drawing.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # it would be the whole page's
    size = re.search(r'viewBox="[^"]*"', text).group()
    text = re.sub(r"<svg[^>]*>", f'<svg {size} role="img" aria-label="{_attribute(panel.title)}">', text, count=1)
    text = re.sub(r'<g id="[^"]*">', "<g>", text).replace("xlink:href", "href")
    for key, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{key.replace('_', '-')})")
    return re.sub(r"\s*\n\s*", " ", text).strip()


def png(drawn: Figure) -> bytes:
    """All panels of a figure with its title and its legend, as a PNG on white."""
    from matplotlib import figure

    columns = min(drawn.columns, len(drawn.panels))
    rows = math.ceil(len(drawn.panels) / columns)
    with settings():
        canvas = figure.Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.7))
        canvas.suptitle(drawn.title, fontsize=13)
        axes = canvas.subplots(rows, columns, squeeze=False).flatten()
        for panel, ax in zip(drawn.panels, axes, strict=False):
            panel.draw(ax)
            ax.set_title(panel.title)
        for ax in axes[len(drawn.panels) :]:
            ax.set_axis_off()
        if drawn.legend:
            handles = [_handle(key) for key in drawn.legend]
            fits = max(1, int(PANEL[0] * columns / 1.6))
            canvas.legend(handles=handles, loc="outside lower center", ncols=min(fits, len(handles)), frameon=False)
        out = io.BytesIO()
        canvas.savefig(out, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return out.getvalue()


def _handle(key: Key):
    from matplotlib import lines

    style = {"linestyle": LINES[key.line % len(LINES)], "marker": key.marker or None, "label": key.label}
    return lines.Line2D([], [], color=color(key.color), **style)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
