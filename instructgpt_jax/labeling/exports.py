"""Label Studio's exports, of any project: JSON and JSON-MIN, as annotations with plain values.

A result of JSON is `{"from_name", "to_name", "type", "value"}`; JSON-MIN has one object an annotation, in it the task's
data and under each control's name what was answered. Formats as Label Studio 1.23 writes them; a single task instead of
a list, and results without a labeler, are read too.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from instructgpt_jax.data.schema import short

FORMS = {  # type of a result -> the key of its value
    "rating": "rating", "choices": "choices", "textarea": "text", "ranker": "ranker", "pairwise": "selected",
}  # fmt: skip
NOT_RANKED = "_"  # the column in which a ranking begins
MIN_FIELDS = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")


class Annotation(NamedTuple):
    """What one person said of one task.

    where: for errors: file and task.
    labeler: as the export names them, None where it does not.
    values: control -> its answer: rating int; choices (str, ...); text (str, ...); ranker {bucket: [ids]} or [ids],
      best first; pairwise 'left' or 'right'. As the file has them: whether they are right is the reader's to say.
      In JSON-MIN what the task's data have of texts and numbers stands among them.
    skipped: the page was skipped or the annotation cancelled.
    number: of the annotation, which grows with time.
    """

    where: str
    data: dict
    labeler: Any
    values: dict[str, Any]
    skipped: bool
    seconds: float | None
    at: str | None
    number: int


class Export(NamedTuple):
    """A file."""

    annotations: list[Annotation]
    problems: list[str]  # what could not be read, with the task


def read(path: str) -> Export:
    """The annotations of a file.

    Raises:
      ValueError: a file that cannot be read, or is no JSON of tasks.
    """
    try:
        document = json.loads(epath.Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} must be readable, got {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be an export of Label Studio in JSON or JSON-MIN, whole: {error}") from None
    tasks = [document] if isinstance(document, dict) else document
    if not isinstance(tasks, list):
        raise ValueError(f"{path} must be a list of tasks, got {type(document).__name__}")
    found, problems = [], []
    for n, task in enumerate(tasks):
        where = f"{path}[{n}]"
        try:
            for one in _annotations(task, where):
                if isinstance(one, str):
                    problems.append(one)
                else:
                    found.append(one)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return Export(found, problems)


def _annotations(task: Any, where: str) -> Iterator[Annotation | str]:
    if not isinstance(task, dict):
        raise ValueError(f"a task must be an object, got {short(task)}")
    if "annotations" not in task and ("annotator" in task or "annotation_id" in task):
        if task.get("annotation_id") is not None:  # of a task that nobody has answered yet
            yield _minimal(task, f"{where}: {_name(task)}")
        return
    data = task.get("data", {})
    if not isinstance(data, dict):
        raise ValueError(f"data of {_name(task)} must be an object, got {short(data)}")
    about = f"{where}: {_name(task | data)}"
    annotations = task.get("annotations", task.get("completions"))  # what they were called before version 1.0
    if not isinstance(annotations, list):
        raise ValueError(f"annotations of {_name(task | data)} must be a list, got {short(annotations)}")
    for annotation in annotations:
        labeler = annotation.get("completed_by") if isinstance(annotation, dict) else None
        try:
            yield _annotation(annotation, data, about)
        except ValueError as error:
            yield f"{about}, labeler {json.dumps(labeler)}: {error}"


def _annotation(annotation: Any, data: dict, about: str) -> Annotation:
    if not isinstance(annotation, dict):
        raise ValueError(f"an annotation must be an object, got {short(annotation)}")
    cancelled, results, values = annotation.get("was_cancelled", False), annotation.get("result"), {}
    if not isinstance(cancelled, bool):
        raise ValueError(f"was_cancelled must be true or false, got {short(cancelled)}")
    if not cancelled:
        if not isinstance(results, list):
            raise ValueError(f"result must be a list, got {short(results)}")
        for result in results:
            name, value = _result(result)
            if name in values:
                raise ValueError(f"{name} must be answered once, got a second result")
            values[name] = value
    return _made(annotation, about, data, annotation.get("completed_by"), values, cancelled)


def _result(result: Any) -> tuple[str, Any]:
    if not isinstance(result, dict) or not isinstance(result.get("from_name"), str):
        raise ValueError(f"a result must be an object with from_name, got {short(result)}")
    name, form, value = result["from_name"], result.get("type"), result.get("value")
    if form not in FORMS:
        raise ValueError(f"type of {name} must be one of {tuple(FORMS)}, got {short(form)}")
    if not isinstance(value, dict) or FORMS[form] not in value:
        raise ValueError(f"value of {name} must be an object with {FORMS[form]!r}, got {short(value)}")
    return name, _plain(form, value[FORMS[form]])


def _plain(form: str, value: Any) -> Any:
    """Texts and choices always as a tuple: Label Studio writes a single one with or without a list."""
    if form in ("choices", "textarea"):
        return tuple(value) if isinstance(value, list) else (value,)
    return value


def _minimal(task: dict, about: str) -> Annotation:
    """An object of JSON-MIN; the reader knows which of its fields are controls.

    One choice or text is a string there, all else the value of a result, alone or as a list of one. Other lists and
    objects are the task's.
    """
    data = {name: value for name, value in task.items() if name not in MIN_FIELDS}
    values = {}
    for name, value in data.items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        form = next((form for form, inner in FORMS.items() if isinstance(value, dict) and inner in value), "")
        if form:
            values[name] = _plain(form, value[FORMS[form]])
        elif not isinstance(value, list | dict):
            values[name] = (value,) if isinstance(value, str) else value
    return _made(task | {"id": task.get("annotation_id")}, about, data, task.get("annotator"), values, False)


def _made(source: dict, about: str, data: dict, labeler: Any, values: dict, skipped: bool) -> Annotation:
    seconds, at = source.get("lead_time"), source.get("updated_at") or source.get("created_at")
    if seconds is not None and (not isinstance(seconds, int | float) or isinstance(seconds, bool) or seconds < 0):
        raise ValueError(f"lead_time must be a number of seconds or null, got {short(seconds)}")
    if at is not None and not isinstance(at, str):
        raise ValueError(f"updated_at must be a time as text, got {short(at)}")
    number = source.get("id")
    number = number if isinstance(number, int) and not isinstance(number, bool) else 0
    return Annotation(about, data, labeler, values, skipped, seconds, at, number)


def _name(task: dict) -> str:
    """What a task is called: by us, or else by Label Studio."""
    return f"task {task.get('task') or task.get('id') or 'without id'}"


def ranks(value: Any, ids: tuple[str, ...]) -> list[int]:
    """The dense ranks, 1 = best, of the items `ids` by the value of a ranker.

    Args:
      value: {bucket: [ids]}, the buckets called by their rank; or [ids], best first and without ties.

    Raises:
      ValueError: an item in no bucket or in two, an item or bucket that is not there.
    """
    if isinstance(value, list):
        value = {str(rank): [item] for rank, item in enumerate(value, 1)}
    if not isinstance(value, dict):
        raise ValueError(f"a ranking must be an object of columns or a list of items, got {short(value)}")
    found: dict[str, int] = {}
    for column, items in value.items():
        if not (isinstance(column, str) and column.isascii() and column.isdecimal() and int(column) > 0):
            if column == NOT_RANKED:
                continue
            raise ValueError(f"a column of a ranking must be called by its rank, got {short(column)}")
        if not isinstance(items, list):
            raise ValueError(f"column {column} of a ranking must be a list of items, got {short(items)}")
        for item in items:
            if not isinstance(item, str | int) or str(item) not in ids:
                raise ValueError(f"column {column} of a ranking must hold outputs {ids}, got {short(item)}")
            if str(item) in found:
                raise ValueError(f"output {item} must be in one column, got it in {found[str(item)]} and {column}")
            found[str(item)] = int(column)
    missing = [item for item in ids if item not in found]
    if missing:
        raise ValueError(f"every output must be in a column, got {', '.join(missing)} in none")
    levels = sorted(set(found.values()))
    return [1 + levels.index(found[item]) for item in ids]
