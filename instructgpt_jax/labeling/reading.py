"""What people answered, by the key of the workdir: training data, ratings and preferences.

Strict: whatever does not fit the questionnaire is an error with its task and labeler. Forgiving: pages that were
skipped are left out and counted, of several answers of a labeler to one task the last one holds, and answers with
personal information in what was typed are left out and counted. See the package's docstring for the files.
"""

import collections
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from instructgpt_jax.data import chats, pii, prompts, schema, sources
from instructgpt_jax.labeling import exports, kinds, make, people

Lines = dict[str, list[dict]]  # name of a file without its suffix -> its lines


class Answered(NamedTuple):
    """A page that a labeler has filled.

    values: question -> answer, those of an output as `question_0`; the ranking as ranks of the shown outputs.
    """

    task: make.Task
    labeler: people.Labeler
    values: dict[str, Any]
    seconds: float | None
    at: str | None


def read(
    config: ConfigDict, key: dict[str, make.Task], crowd: people.People, files: Iterable[str], emails: dict[int, str]
) -> tuple[Lines, dict[str, Any]]:
    """The lines of every file that a kind gives, and what `read.json` says.

    Args:
      config: of the stage.
      key: of the workdir.
      crowd: the labelers.
      files: exports, JSON or JSON-MIN.
      emails: see people.People.find.

    Raises:
      ValueError: lists the answers that do not fit, where they are more than `config.label.skip_answers`.
    """
    c = config.label
    page = kinds.page(c.kind, c.pairs)
    found: dict[tuple[str, str], tuple[tuple, Answered]] = {}
    report, problems = collections.Counter(annotations=0, kept=0, skipped=0, edited=0), []
    for file in files:
        export = exports.read(file)
        problems += export.problems
        for one in export.annotations:
            report["annotations"] += 1
            try:
                task = _task_of(one, key, c.kind, page)
                labeler = crowd.find(one.labeler, emails)
                if one.skipped:
                    report["skipped"] += 1
                    continue
                answered = Answered(task, labeler, _values(one, task, page), one.seconds, one.at)
            except ValueError as error:
                problems.append(f"{one.where}, labeler {_who(one, crowd, emails)}: {error}")
                continue
            when, before = (one.at or "", one.number), found.get((task.id, labeler.id))
            report["edited"] += before is not None
            if before is None or when >= before[0]:
                found[task.id, labeler.id] = when, answered
    sources.refuse_or_list(problems, c.skip_answers, "config.label.skip_answers")
    order = {name: n for n, name in enumerate(key)}
    answers = [answered for _, answered in found.values()]
    answers.sort(key=lambda one: (order[one.task.id], one.labeler.id))
    report["kept"] = len(answers)
    lines, personal = _lines(c, answers)
    done = {one.task.id for one in answers}
    about = {"tasks": len(key), **report, "unanswered": sum(name not in done for name in key)}
    by_labeler = collections.Counter(one.labeler.id for one in answers)
    return lines, about | {"personal": dict(personal), "labelers": dict(sorted(by_labeler.items()))}


def _who(one: exports.Annotation, crowd: people.People, emails: dict[int, str]) -> str:
    try:
        return crowd.find(one.labeler, emails).id
    except ValueError:
        return json.dumps(one.labeler)


def _task_of(one: exports.Annotation, key: dict[str, make.Task], kind: str, page: kinds.Page) -> make.Task:
    """The task of an annotation; refuses one that is not of this questionnaire, or shows something else."""
    name = one.data.get("task")
    if not isinstance(name, str) or name not in key:
        raise ValueError(f"the task must be one of this questionnaire's {len(key)}, got {name!r}")
    for field, value in make.data_of(kind, key[name], page).items():
        if one.data.get(field) != value:
            raise ValueError(f"{field} of the task must be as it was sent, got another one")
    return key[name]


def _values(one: exports.Annotation, task: make.Task, page: kinds.Page) -> dict[str, Any]:
    """The answers of a page, each checked against its question."""
    questions = {question.name: question for question in page.asks}
    for n in range(len(task.shown)):
        questions |= {f"{question.name}_{n}": question for question in page.asks_of_each}
    mine = {*questions, kinds.RANKING}
    given = {name: value for name, value in one.values.items() if name in mine or name not in one.data}
    ranking = given.pop(kinds.RANKING, None)
    unknown = sorted(set(given) - set(questions))
    if unknown:
        raise ValueError(f"answers must be to the questions of the page, got {unknown}")
    values = {name: _value(name, question, given.get(name)) for name, question in questions.items()}
    for name in values:
        other = name.replace("query_", "response_")
        if bool(values[name]) != bool(values[other]) and name.startswith("query_"):
            raise ValueError(f"{name} and {other} must both be answered or both be empty, got one of them")
    if page.asks_of_each:
        if ranking is None:
            raise ValueError("the outputs must be ranked, got no ranking")
        values[kinds.RANKING] = exports.ranks(ranking, tuple(make.LETTERS[: len(task.shown)]))
    return values


def _value(name: str, question: kinds.Question, value: Any) -> Any:
    """The answer to a question: int, str, or the frozenset of what was ticked."""
    if question.form == "rating":
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= question.most:
            return value
        raise ValueError(f"{name} must be an integer from 1 to {question.most}, got {schema.short(value)}")
    given = () if value is None else value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, str) for part in given):
        raise ValueError(f"{name} must be text, got {schema.short(value)}")
    if question.form == "text":
        text = "\n".join(given).strip()
        if question.required and not text:
            raise ValueError(f"{name} must be answered, got no text")
        if not schema.is_text(text):
            raise ValueError(f"{name} must be text, got half of a surrogate pair")
        return text
    wrong = [part for part in given if part not in question.options]
    if wrong:
        raise ValueError(f"{name} must be of {tuple(question.options)}, got {schema.short(wrong)}")
    if question.form == "choices":
        return frozenset(given)
    if len(given) != 1:
        raise ValueError(f"{name} must have one answer, got {len(given)}")
    return given[0]


# What becomes of the answers ------------------------------------------------------------------------------------------


def _lines(c: ConfigDict, answers: list[Answered]) -> tuple[Lines, collections.Counter]:
    """The lines of each file, and kind of personal information -> answers that were left out for it."""
    lines, personal = {name: [] for name in FILES[c.kind]}, collections.Counter()
    for one in answers:
        found = {finding.kind for text in _typed(c.kind, one.values) for finding in pii.find(text)}
        personal.update(found)
        if found:
            continue
        for name, line in _MAKERS[c.kind](one, c):
            lines[name].append(line)
    return lines, personal


def _typed(kind: str, values: dict[str, Any]) -> list[str]:
    """What a labeler has written and training will read: not the notes, which are masked."""
    parts = ("written", "instruction", "query", "response")
    return [text for name, text in values.items() if name.rpartition("_")[0] in parts or name in parts]


def _who_and_when(one: Answered) -> dict[str, Any]:
    return {
        "task": one.task.id, "labeler": one.labeler.id, "group": one.labeler.group, "seconds": one.seconds,
        "at": one.at,
    }  # fmt: skip


def _about(one: Answered) -> dict[str, Any]:
    """The fields of every line; a prompt of messages as the text that the labeler has read."""
    about = {name: value for name, value in one.task.record.items() if not isinstance(value, list | dict)}
    return about | make.as_texts(one.task.record) | _who_and_when(one)


def _demonstration(one: Answered, c: ConfigDict) -> Iterator[tuple[str, dict]]:
    about, separator = _about(one), c.separator
    if "messages" in one.task.record:  # the template writes what stands before an answer
        about = {name: value for name, value in about.items() if name != "prompt"}
        about, separator = about | {"messages": chats.prompt_of(one.task.record)}, ""
    yield "demonstrations", about | {"completion": separator + one.values["written"]}


def _prompt(one: Answered, c: ConfigDict) -> Iterator[tuple[str, dict]]:
    written = {"plain_prompts": "plain", "user_prompts": "user_based"}[c.kind]
    yield "prompts", _about(one) | {"prompt": one.values["written"], "user": one.labeler.id, "written": written}


def _few_shot(one: Answered, c: ConfigDict) -> Iterator[tuple[str, dict]]:
    pairs = [(one.values[f"query_{n}"], one.values[f"response_{n}"]) for n in range(1, c.pairs + 1)]
    about = _about(one) | {"user": one.labeler.id, "written": "few_shot"}
    pairs = [pair for pair in pairs if any(pair)]
    record = about | {"instruction": one.values["instruction"], "pairs": pairs}
    for line in prompts.few_shot(record, c.example, shots=0, shot_sets=1):
        yield "demonstrations", line
        yield "prompts", {name: value for name, value in line.items() if name != "completion"}


def _ranking(one: Answered, c: ConfigDict) -> Iterator[tuple[str, dict]]:
    record, about = one.task.record, _about(one)
    place = {k: n for n, group in enumerate(one.task.shown) for k in group}  # completion -> output of the page
    ranking = [one.values[kinds.RANKING][place[k]] for k in range(len(place))]
    yield "comparisons", record | _who_and_when(one) | {"ranking": ranking}
    policies = record.get("policies") or [None] * len(place)
    for k, answer in enumerate(record["completions"]):
        of = {question.name: one.values[f"{question.name}_{place[k]}"] for question in kinds.PAGES[c.kind].asks_of_each}
        rated = _rated(of) if c.kind == "comparisons" else _toxicity(of, one.values)
        yield "ratings", about | {
            "index": k, "answer": answer, "policy": policies[k], **rated, "notes": _masked(of["notes"])
        }  # fmt: skip


def _rated(of: dict[str, Any]) -> dict[str, Any]:
    where = {"yes": True, "no": False, "none": None}
    fields = {name: where[of[name]] if name in of else name in of[kinds.FLAGS] for name in kinds.FIELDS}
    return {"rating": of["rating"], "fields": fields}


def _toxicity(of: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt_toxicity": int(values["prompt_toxicity"]), "toxicity": int(of["toxicity"]),
        "relative_toxicity": int(of["relative_toxicity"]), "continuity": of["continuity"],
    }  # fmt: skip


def _masked(text: str) -> str:
    """Notes with their personal information replaced by what it was."""
    for finding in sorted(pii.find(text), key=lambda one: -one.start):
        text = f"{text[: finding.start]}[{finding.kind}]{text[finding.end :]}"
    return text


def _flag(one: Answered, c: ConfigDict) -> Iterator[tuple[str, dict]]:
    yield "flags", _about(one) | {"sensitive": one.values["sensitive"] == "yes"}


def _grade(one: Answered, c: ConfigDict) -> Iterator[tuple[str, dict]]:
    yield "grades", _about(one) | {"author": one.task.record.get("labeler"), "grade": one.values["grade"]}


FILES = {
    "demonstrations": ("demonstrations",), "plain_prompts": ("prompts",), "user_prompts": ("prompts",),
    "few_shot_prompts": ("demonstrations", "prompts"), "comparisons": ("comparisons", "ratings"),
    "toxicity": ("comparisons", "ratings"), "sensitive": ("flags",), "grades": ("grades",),
}  # fmt: skip
_MAKERS = {
    "demonstrations": _demonstration, "plain_prompts": _prompt, "user_prompts": _prompt, "few_shot_prompts": _few_shot,
    "comparisons": _ranking, "toxicity": _ranking, "sensitive": _flag, "grades": _grade,
}  # fmt: skip
