"""The public forms of instruction collections as demonstrations; data/instruction.py says which, and mixes them."""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from instructgpt_jax.data import jsonl, schema, sources, tables

LAYOUTS = (  # collection, and the fields of its prompts and completions; a record of P3 has those of FLAN too, as ids
    ("p3", "inputs_pretokenized", "targets_pretokenized"),
    ("flan", "inputs", "targets"),
    ("ours", "prompt", "completion"),
)
SET_FIELDS, TEMPLATE_FIELDS = ("dataset", "task_name", "task"), ("template", "template_name")
EMPTY, WRONG = "empty prompt or completion", "a wrong choice of a scoring set"
_ENDINGS = (".gz", ".jsonl", ".json", ".parquet")


class Found(NamedTuple):
    """A record of a collection.

    why: the reason that it is dropped for, "" where it is not.
    """

    set: str
    template: str
    record: schema.Record
    why: str = ""


def records(inputs: Sequence[str], bad: list[str]) -> Iterator[Found]:
    """The records of all inputs in their order; "origin: reason" of each malformed one goes to `bad`."""
    for given in inputs:
        if os.path.isdir(given):
            yield from _tasks(given, bad)
            continue
        source = sources.parse(given if given.partition(":")[0] in sources.FORMS else f"jsonl:{given}")
        if source.form not in ("jsonl", "parquet", "hf") or source.options or source.weight is not None:
            raise ValueError(f"--input must be a folder, jsonl:GLOB, parquet:GLOB or hf:ID:SPLIT alone, got {given!r}")
        layout = None
        for origin, name, read in _rows(source):
            try:
                row = read()
                layout = layout if layout and layout[1] in row else layout_of(row)
                yield _understood(row, layout, name)
            except _UnknownLayout as error:
                raise ValueError(f"{origin}: {error}") from None
            except ValueError as error:
                bad.append(f"{origin}: {error}")


class _UnknownLayout(ValueError):
    """A record of a collection that is not known: told at once, for the others will be like it."""


def _rows(source: sources.Source) -> Iterator[tuple[str, str, Callable[[], schema.Record]]]:
    """(where it stands, the set that its place names, () -> row) of each record of a source."""
    if source.form == "jsonl":
        for path in jsonl.match(source.name, source.form):
            buffer, name = jsonl.read(path), stem(os.path.basename(path))
            for line, start, end in jsonl.lines(buffer):
                yield f"{path}:{line}", name, lambda part=buffer[start:end]: schema.parse_line(part)
        return
    rows = tables.parquet(source.name) if source.form == "parquet" else tables.hf(source.name)
    for i in range(rows.length):
        file = os.path.basename(rows.origin(i).rpartition("[")[0])
        name = stem(file) if source.form == "parquet" else tables.hf_set(source.name)
        yield rows.origin(i), name, lambda i=i: rows.get(i)


def layout_of(row: schema.Record) -> tuple[str, str, str]:
    """The one of `LAYOUTS` that a record has.

    Raises:
      ValueError: none of them.
    """
    for layout in LAYOUTS:
        if layout[1] in row and layout[2] in row:
            return layout
    known = "; ".join(f"{prompt} and {completion}" for _, prompt, completion in LAYOUTS)
    raise _UnknownLayout(f"a record of an instruction collection must have {known}, got the fields {sorted(row)}")


def _understood(row: schema.Record, layout: tuple[str, str, str], place: str) -> Found:
    collection, *fields = layout
    for field in fields:
        if not isinstance(row.get(field), str):
            raise ValueError(f"{field} must be a text, got {type(row.get(field)).__name__}")
    prompt, completion = row[fields[0]], row[fields[1]]
    named = next((str(row[field]) for field in SET_FIELDS if row.get(field)), place)
    template = next((str(row[field]) for field in TEMPLATE_FIELDS if row.get(field) not in (None, "")), "")
    if not prompt.strip() or not completion.strip():
        return Found(named, template, {}, EMPTY)
    if row.get("is_correct") is False:
        return Found(named, template, {}, WRONG)
    if collection != "ours":
        prompt, completion = _joined(prompt, completion)
    source = str(row.get("source") or collection)
    record = {"prompt": prompt, "completion": completion, "source": source, "dataset": named, "template": template}
    return Found(named, template, record)


def _joined(prompt: str, completion: str) -> tuple[str, str]:
    """Both, with one space between them where the prompt does not end in a space or a line."""
    completion = completion.strip()
    return prompt, completion if prompt[-1].isspace() else f" {completion}"


def _tasks(folder: str, bad: list[str]) -> Iterator[Found]:
    """The instances of the task files of a folder of Super-NaturalInstructions, or of `tasks/` in it."""
    place = pathlib.Path(folder)
    place = place / "tasks" if (place / "tasks").is_dir() else place
    files = sorted(path for path in place.iterdir() if path.name.endswith(".json"))
    if not files:
        raise ValueError(f"--input must be a folder of task files (*.json) of Super-NaturalInstructions, got {folder}")
    for path in files:
        try:
            task = schema.parse_line(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not isinstance(task.get("Instances"), list) or not task.get("Definition"):
            expected = "a task of Super-NaturalInstructions must have a Definition and a list of Instances"
            raise ValueError(f"{path}: {expected}, got the fields {sorted(task)}")
        definition, name = _first(task["Definition"]), stem(path.name)
        for number, instance in enumerate(task["Instances"]):
            given = instance if isinstance(instance, dict) else {}
            asked, answer = given.get("input"), _first(given.get("output"))
            if not isinstance(asked, str) or not isinstance(answer, str) or not isinstance(definition, str):
                bad.append(f"{path}: Instances[{number}] must have input and output as texts, got {sorted(given)}")
                continue
            if not asked.strip() or not answer.strip():
                yield Found(name, "", {}, EMPTY)
                continue
            prompt = f"{definition.strip()}\n\nInput: {asked.strip()}\n\nOutput:"
            record = {"prompt": prompt, "completion": f" {answer.strip()}", "source": "super_natural_instructions"}
            yield Found(name, "", record | {"dataset": name, "template": ""})


def _first(value: Any) -> Any:
    """The first of a list, or what is no list."""
    return value[0] if isinstance(value, list) and value else value


def stem(name: str) -> str:
    """A file's name without its endings."""
    while name.endswith(_ENDINGS):
        name = name[: name.rindex(".")]
    return name
