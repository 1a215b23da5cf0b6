"""The written instructions of a questionnaire: Markdown, to be edited, and the same as HTML for Label Studio.

The criteria are those of figure 10 of Ouyang et al. 2022 in our own words; the paper's documents are not public. What
comes first when they disagree depends on the purpose: helpfulness in training data, truth and harmlessness in final
evaluations (section 3.4).
"""

import pathlib
from importlib import resources

from markdown_it import MarkdownIt

# Label Studio takes the browser's own style off, and style attributes too.
STYLE = """
.ig-instructions h1 { font-size: 24px; line-height: 32px; margin: 0 0 12px; }
.ig-instructions h2 { font-size: 20px; line-height: 28px; margin: 20px 0 8px; }
.ig-instructions p { margin: 0 0 8px; }
.ig-instructions ul { list-style: disc; margin: 0 0 12px; padding-left: 24px; }
.ig-instructions li { margin: 0 0 4px; }
"""
CRITERIA = ("demonstrations", "comparisons", "grades")  # kinds that judge by them


def text(kind: str, purpose: str, own: str) -> str:
    """The Markdown of a kind for a purpose, 'training' or 'evaluation'; `own` is a file that stands for it.

    Raises:
      ValueError: `own` is no text.
    """
    if own:
        try:
            return pathlib.Path(own).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"config.label.instructions must be Markdown in UTF-8, got {own}: {error}") from None
    parts = [kind, "criteria", f"priority_{purpose}"] if kind in CRITERIA else [kind]
    folder = resources.files("instructgpt_jax.labeling") / "texts"
    return "\n".join((folder / f"{part}.md").read_text(encoding="utf-8") for part in [*parts, "personal"])


def html(markdown: str) -> str:
    """The Markdown as HTML; HTML in it is shown as text."""
    body = MarkdownIt("commonmark", {"html": False}).render(markdown)
    return f'<style>{STYLE}</style>\n<div class="ig-instructions">\n{body}</div>\n'
