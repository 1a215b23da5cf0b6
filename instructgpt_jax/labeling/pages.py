"""A kind of questionnaire as a labelling configuration of Label Studio: XML, its own style in it.

No text of a user stands in a configuration: a page names fields of its task (`$prompt`), and Label Studio shows them as
text. The outputs of a task come one at a time (`Repeater`), then all of them into columns (`Ranker` with a bucket a
rank), as in figure 12 of Ouyang et al. 2022.
"""

import xml.etree.ElementTree as ET

from instructgpt_jax.labeling import kinds

INDEX = "{{idx}}"  # Label Studio puts the number of an output here
# Label Studio's classes are those of 1.23; where another version calls them otherwise, the pages are only plainer. The
# panels beside a page are for regions of images and texts, of which there are none here.
STYLE = """
.lsf-sidepanels__wrapper { display: none; }
.lsf-sidepanels { padding: 0 !important; }
.ig-two { display: flex; gap: 24px; align-items: flex-start; flex-wrap: wrap; }
.ig-left { flex: 1 1 320px; min-width: 0; position: sticky; top: 0; }
.ig-right { flex: 2 1 480px; min-width: 0; }
.ig-two .lsf-richtext__container {
  white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px 14px; border-left: 3px solid #7c8db5;
  background: rgba(124, 141, 181, 0.1); max-height: 60vh; overflow-y: auto;
}
.ig-ask { margin-top: 12px; }
.ig-ask h4 { font-size: 14px !important; line-height: 20px !important; margin: 4px 0 !important; }
.ig-ask .lsf-choices { margin: 0; }
.ig-ask label span { line-height: 20px !important; }
.ig-ask .lsf-choices_layout_vertical { display: grid; grid-template-columns: 1fr 1fr; }
.ig-two .lsf-choice { margin: 2px 12px 2px 0; }
.ig-ranking { margin-top: 16px; }
.ig-ranking h3 { font-size: 15px !important; line-height: 20px !important; }
.htx-ranker-column { min-width: 120px; }
.htx-ranker-item p { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 40vh; overflow-y: auto; }
.htx-ranker-item p:last-child { display: none; }
"""


def config(page: kinds.Page) -> str:
    """The XML of `config.xml`."""
    root = ET.Element("View")
    ET.SubElement(root, "Style").text = STYLE
    columns = _view(root, "ig-two")
    left, right = _view(columns, "ig-left"), _view(columns, "ig-right")
    for field, heading in page.shows.items():
        _header(left, heading)
        _text(left, field, f"${field}")
    shown = next(iter(page.shows))
    for question in page.asks:
        _ask(left if page.asks_of_each else right, question, shown)
    if page.asks_of_each:
        each = ET.SubElement(right, "Repeater", on=f"${kinds.OUTPUTS}", indexFlag=INDEX, mode="pagination")
        one = _view(each, "ig-output")
        _header(one, f"${kinds.OUTPUTS}[{INDEX}].title")
        _text(one, f"output_{INDEX}", f"${kinds.OUTPUTS}[{INDEX}].body")
        for question in page.asks_of_each:
            _ask(one, question._replace(name=f"{question.name}_{INDEX}"), f"output_{INDEX}")
        ranking = _view(root, "ig-ranking")
        _header(ranking, page.ranking)
        ET.SubElement(ranking, "List", name=kinds.OUTPUTS, value=f"${kinds.OUTPUTS}", title="Not ranked yet")
        ranker = ET.SubElement(ranking, "Ranker", name=kinds.RANKING, toName=kinds.OUTPUTS)
        for rank in range(1, kinds.RANKS + 1):
            ET.SubElement(ranker, "Bucket", name=str(rank), title=f"Rank {rank}" + " (best)" * (rank == 1))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _view(parent: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(parent, "View", className=name)


def _header(parent: ET.Element, text: str) -> None:
    ET.SubElement(parent, "Header", value=text, size="5")


def _text(parent: ET.Element, name: str, value: str) -> None:
    # valueType: a text that looks like an address would be fetched.
    ET.SubElement(parent, "Text", name=name, value=value, valueType="text")


def _ask(parent: ET.Element, question: kinds.Question, about: str) -> None:
    parent = _view(parent, "ig-ask")
    _header(parent, question.title)
    common = {"name": question.name, "toName": about}
    if question.required:
        common |= {"required": "true", "requiredMessage": f"Please answer: {question.title}"}
    if question.form == "rating":
        ET.SubElement(parent, "Rating", maxRating=str(question.most), **common)
    elif question.form == "text":
        rows = str(question.rows)
        ET.SubElement(parent, "TextArea", rows=rows, maxSubmissions="1", showSubmitButton="false", **common)
    else:
        single = question.form == "choice"
        one = {"choice": "single", "showInline": "true"} if single else {"choice": "multiple"}
        choices = ET.SubElement(parent, "Choices", **one, **common)
        for value, label in question.options.items():
            ET.SubElement(choices, "Choice", value=label, alias=value)
