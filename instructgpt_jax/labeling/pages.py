"""A kind of questionnaire as a labelling configuration of Label Studio: XML, its own style in it.

No text of a user stands in a configuration: a page names fields of its task (`$prompt`), and Label Studio shows them as
text. The outputs of a task come one at a time (`Repeater`), then all of them into columns (`Ranker` with a bucket a
rank), as in figure 12 of Ouyang et al. 2022.
"""

import xml.etree.ElementTree as ET

from instructgpt_jax.labeling import kinds

INDEX = "{{idx}}"  # Label Studio puts the number of an output here
STYLE = """
.ig-two { display: flex; gap: 24px; align-items: flex-start; flex-wrap: wrap; }
.ig-left { flex: 1 1 320px; min-width: 0; }
.ig-right { flex: 2 1 480px; min-width: 0; }
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
        _header(one, "Output")
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
    _header(parent, question.title)
    common = {"name": question.name, "toName": about}
    if question.required:
        common |= {"required": "true", "requiredMessage": f"Please answer: {question.title}"}
    if question.form == "rating":
        ET.SubElement(parent, "Rating", maxRating=str(question.most), **common)
    elif question.form == "text":
        rows = {"rows": "8", "maxSubmissions": "1", "editable": "true", "showSubmitButton": "false"}
        ET.SubElement(parent, "TextArea", **rows, **common)
    else:
        one = {"choice": "single", "showInline": "true"} if question.form == "choice" else {"choice": "multiple"}
        choices = ET.SubElement(parent, "Choices", **one, **common)
        for value, label in question.options.items():
            ET.SubElement(choices, "Choice", value=label, alias=value)
