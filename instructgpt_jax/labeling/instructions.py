"""The written instructions of a questionnaire: Markdown, to be edited, and the same as HTML for Label Studio.

The criteria are those of figure 10 of Ouyang et al. 2022 in our own words; the paper's documents are not public. What
comes first when they disagree depends on the purpose: helpfulness in training data, truth and harmlessness in final
evaluations (section 3.4).
"""

import pathlib
from importlib import resources

from markdown_it import MarkdownIt

STYLES = {  # Label Studio takes the browser's own style off
    "h1": "margin: 0 0 12px", "h2": "margin: 20px 0 8px", "p": "margin: 0 0 8px",
    "ul": "list-style: disc; margin: 0 0 8px; padding-left: 24px", "li": "margin: 0 0 4px",
}  # fmt: skip
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
    parser = MarkdownIt("commonmark", {"html": False})
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.nesting == 1 and token.tag in STYLES:
            token.attrSet("style", STYLES[token.tag])
    return parser.renderer.render(tokens, parser.options, {})
