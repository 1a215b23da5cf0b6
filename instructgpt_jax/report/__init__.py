"""The report of an evaluation: report.json, one page of HTML, and its figures as PNG."""

import json

from etils import epath

from instructgpt_jax import workdir as workdirs
from instructgpt_jax.report import check, figures, page, style, words

__all__ = ["words", "write"]


def write(report: dict, folder: epath.PathLike) -> None:
    """Writes `index.html`, a PNG a figure, and last `report.json`: where that is, the report is whole.

    Each file appears whole or not at all, and the same report makes the same bytes. Figures of an earlier report that
    this one has no numbers for are removed.

    Args:
      report: `title` and `models`, and any of the sections `results`, `head_to_head`, `people`, `language`,
        `reward_model`, `folds`, `prompt_sets`, `curves`, `overoptimisation`, `prefix`, `samples`, `perf`; `check.check`
        says what they hold. A section that is missing is missing on the page.
      folder: local or gs://; made if it does not exist.

    Raises:
      ValueError: the report has not the form that a section needs; nothing is written.
    """
    check.check(report)
    shown = words.visible(report)
    drawn = figures.all_figures(shown)
    index = page.render(shown, drawn)
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(figures.NAMES) - {figure.name for figure in drawn}:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for figure in drawn:
        workdirs.write_atomically(folder / f"{figure.name}.png", style.png(figure))
    workdirs.write_atomically(folder / "index.html", index)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    workdirs.write_atomically(folder / "report.json", text.encode("utf-8", "replace"))  # half a surrogate pair: '?'
