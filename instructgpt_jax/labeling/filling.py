"""Answers as Label Studio exports them: for labelers who are no people, and for tests of the way back."""

import json
from collections.abc import Iterable
from typing import Any

from instructgpt_jax.labeling import kinds, make, people

Answer = tuple[make.Task, people.Labeler, dict[str, Any]]  # the answers by question, as reading.Answered has them


def export(kind: str, page: kinds.Page, answers: Iterable[Answer]) -> list[dict]:
    """The export in JSON, a task with its annotations after another: what `reading.read` takes."""
    found: dict[str, dict] = {}
    for number, (task, labeler, values) in enumerate(answers, 1):
        data = make.data_of(kind, task, page)
        entry = found.setdefault(task.id, {"id": len(found) + 1, "data": data, "annotations": [], "predictions": []})
        entry["annotations"].append(
            {
                "id": number,
                "completed_by": {"id": labeler.label_studio_id, "email": labeler.email},
                "result": results(page, task, values),
                "was_cancelled": False,
                "lead_time": None,
            }
        )
    return list(found.values())


def results(page: kinds.Page, task: make.Task, values: dict[str, Any]) -> list[dict]:
    """The results of one annotation.

    Args:
      values: int of a rating, str of a text or of one choice, a set of choices, ranks of the shown outputs.
    """
    questions = [(question, question.name, next(iter(page.shows))) for question in page.asks]
    for n in range(len(task.shown)):
        questions += [(question, f"{question.name}_{n}", f"output_{n}") for question in page.asks_of_each]
    found = []
    for question, name, about in questions:
        value = values.get(name)
        if value is None or value == "" or value == frozenset():
            continue
        if question.form == "rating":
            found.append(_result(name, about, "rating", {"rating": value}))
        elif question.form == "text":
            found.append(_result(name, about, "textarea", {"text": [value]}))
        else:
            chosen = [value] if isinstance(value, str) else sorted(value)
            found.append(_result(name, about, "choices", {"choices": chosen}))
    if page.asks_of_each:
        columns: dict[str, list[str]] = {str(rank): [] for rank in range(1, kinds.RANKS + 1)}
        for letter, rank in zip(make.LETTERS, values[kinds.RANKING], strict=False):
            columns.setdefault(str(rank), []).append(letter)
        found.append(_result(kinds.RANKING, kinds.OUTPUTS, "ranker", {"ranker": columns}))
    return found


def _result(name: str, about: str, form: str, value: dict) -> dict:
    return {"id": name, "from_name": name, "to_name": about, "type": form, "value": value, "origin": "manual"}


def dump(tasks: list[dict]) -> str:
    """An export as the text of a file."""
    return json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"
