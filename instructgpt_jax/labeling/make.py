"""Records as questionnaires: tasks without a trace of who wrote what, and the key that the workdir keeps.

Everything random follows from the seed: the order of the outputs on a page, the order of the tasks, who gets which.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import chats, schema, sources
from instructgpt_jax.labeling import instructions, kinds, pages, people

KEY, PROJECTS = "key.jsonl", "projects"
EMPTY = "[This output is empty.]"  # an item without text could not be seen
LETTERS = "ABCDEFGHI"
ONCE, SEVERAL = "once", "several"  # the projects that all labelers share


class Task(NamedTuple):
    """A task as the key holds it.

    record: of the source, whole; {"use_case": ...} where there is no source.
    shown: for each output of the page the completions of the record that it stands for: equal ones are one output.
    labelers: ids of those who are asked for it; () = whoever comes, where projects are shared.
    """

    id: str
    record: dict
    shown: tuple[tuple[int, ...], ...]
    labelers: tuple[str, ...]
    copies: int  # labelers that it is for


class Project(NamedTuple):
    """A project of Label Studio."""

    name: str  # of its folder: a labeler's id, or ONCE or SEVERAL
    tasks: list[Task]
    copies: int  # labelers a task


def write(config: ConfigDict, crowd: people.People, folder: epath.Path) -> dict[str, int]:
    """Writes the projects and, in the end, the key.

    Args:
      config: of the stage; `config.label` says what is asked and whom.
      crowd: the labelers.
      folder: the workdir.

    Returns:
      What was made, in numbers: tasks, projects, answers of labelers asked for, prompts left out.

    Raises:
      ValueError: a source that cannot be read, more than nine outputs, nobody to ask.
    """
    c = config.label
    asked = crowd.of(c.groups)
    if not asked:
        raise ValueError(f"config.label.labelers must name somebody of the groups {c.groups}, got none in {crowd.path}")
    most = c.overlap or len(asked)
    if most > len(asked):
        raise ValueError(f"config.label.overlap must be at most the {len(asked)} labelers of {c.groups}, got {most}")
    records, left_out = read_source(c, config.data, config.seed)
    tasks = [_task(c.kind, n, record, config.seed) for n, record in enumerate(records)]
    tasks = distribute(tasks, asked, most, c.overlap_share, config.seed)
    if c.projects == "shared":
        tasks = [task._replace(labelers=()) for task in tasks]
        parts = [
            Project(ONCE, [task for task in tasks if task.copies == 1], 1),
            Project(SEVERAL, [task for task in tasks if task.copies > 1], most),
        ]
    else:
        parts = [Project(one.id, [task for task in tasks if one.id in task.labelers], 1) for one in asked]
    parts = [part for part in parts if part.tasks]
    page = kinds.page(c.kind, c.pairs)
    text = instructions.text(c.kind, c.purpose, c.instructions)
    for part in parts:
        _write_project(folder / PROJECTS / part.name, part, c.kind, page, text, config.seed)
    lines = [json.dumps(task._asdict(), ensure_ascii=False) + "\n" for task in tasks]
    workdirs.write_atomically(folder / KEY, "".join(lines))  # last: it says that all is there
    copies = sum(task.copies for task in tasks)
    return {"tasks": len(tasks), "projects": len(parts), "answers asked for": copies} | left_out


def read_source(c: ConfigDict, data: ConfigDict, seed: int) -> tuple[list[dict], dict[str, int]]:
    """The records that are asked about, and reason -> number of those left out.

    Without a source: `config.label.num_tasks` use cases, drawn in the shares of table 1.
    """
    if c.kind in kinds.WITHOUT_SOURCE:
        rng = random.Random(f"use cases {seed}")
        drawn = rng.choices(list(kinds.USE_CASES), list(kinds.USE_CASES.values()), k=c.num_tasks)
        return [{"use_case": use_case} for use_case in drawn], {}
    found = sources.load(c.source, kinds.SOURCE[c.kind], data.skip_bad, data.data_dir)
    records, equal = [], 0
    for n in range(len(found)):
        record = found[n]
        if "completions" in record:
            distinct = {text.strip() for text in record["completions"]}
            if len(distinct) > kinds.MOST_OUTPUTS:
                raise ValueError(
                    f"{found.origin(n)}: completions must be at most {kinds.MOST_OUTPUTS} different texts for people "
                    f"to rank, got {len(distinct)}"
                )
            if len(distinct) == 1 and c.purpose == "training":  # nobody learns from a tie; a win rate counts it
                equal += 1
                continue
        records.append(record)
    if not records:
        raise ValueError(f"config.label.source must have a record to ask about, got none in {c.source}")
    rng = random.Random(f"records {seed}")
    if c.num_tasks and c.num_tasks < len(records):
        records = [records[n] for n in sorted(rng.sample(range(len(records)), c.num_tasks))]
    return records, {"prompts with equal outputs only, left out": equal} if equal else {}


def _task(kind: str, number: int, record: dict, seed: int) -> Task:
    """The task of a record; its id tells nothing of it."""
    text = json.dumps([kind, seed, number, record], sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    groups: dict[str, list[int]] = {}
    for k, completion in enumerate(record.get("completions", ())):
        groups.setdefault(completion.strip(), []).append(k)
    shown = [tuple(group) for group in groups.values()]
    random.Random(f"outputs {seed} {name}").shuffle(shown)
    return Task(name, record, tuple(shown), (), 1)


def distribute(
    tasks: Sequence[Task], asked: Sequence[people.Labeler], overlap: int, share: float, seed: int
) -> list[Task]:
    """Who gets which: a share of the tasks goes to `overlap` labelers each, the others to one; all have equally many.

    The several of a task are drawn anew each time, so that every two labelers share some.
    """
    rng = random.Random(f"labelers {seed}")
    order = list(range(len(tasks)))
    rng.shuffle(order)
    several = set(order[: round(share * len(tasks))])
    load, found = dict.fromkeys((one.id for one in asked), 0), list(tasks)
    for n in order:
        copies = overlap if n in several else 1
        chosen = sorted(load, key=lambda name: (load[name], rng.random()))[:copies]
        for name in chosen:
            load[name] += 1
        found[n] = tasks[n]._replace(labelers=tuple(sorted(chosen)), copies=copies)
    return found


def data_of(kind: str, task: Task, page: kinds.Page) -> dict:
    """What Label Studio is told of a task: these fields and no others."""
    data, record = {"task": task.id}, task.record | as_texts(task.record)
    for field in page.shows:
        data[field] = record.get(field) or "not said"
    if page.asks_of_each:
        texts = [task.record["completions"][group[0]] for group in task.shown]
        data[kinds.OUTPUTS] = [
            {"id": letter, "title": f"Output {letter}", "body": text if text.strip() else EMPTY}
            for letter, text in zip(LETTERS, texts, strict=False)
        ]
    return data


def as_texts(record: dict) -> dict[str, str]:
    """`prompt` of a record with messages, and `completion` of a whole dialogue: what people read."""
    if "messages" not in record:
        return {}
    found = {"prompt": str(chats.named(record))}
    whole = record["messages"][-1]["role"] == schema.ASSISTANT
    return found | ({"completion": record["messages"][-1]["content"]} if whole and "completion" not in record else {})


def _write_project(folder: epath.Path, part: Project, kind: str, page: kinds.Page, text: str, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [{"data": data_of(kind, task, page)} for task in part.tasks]
    random.Random(f"tasks {seed} {part.name}").shuffle(tasks)
    about = {"kind": kind, "labelers_per_task": part.copies, "tasks": len(tasks)}
    for name, content in {
        "tasks.json": json.dumps(tasks, ensure_ascii=False, indent=1) + "\n",
        "config.xml": pages.config(page),
        "instructions.md": text,
        "instructions.html": instructions.html(text),
        "project.json": json.dumps(about) + "\n",
    }.items():
        workdirs.write_atomically(folder / name, content)


def read_key(folder: epath.Path) -> dict[str, Task]:
    """The tasks of a workdir by their ids, in the order of the source.

    Raises:
      ValueError: there is no key, or it is damaged.
    """
    path = folder / KEY
    if not path.exists():
        raise ValueError(f"{path} must be there: config.label.step=make writes it with the questionnaires")
    found = {}
    for line, text in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            task = Task(**json.loads(text))
            shown = tuple(map(tuple, task.shown))
            found[task.id] = task._replace(shown=shown, labelers=tuple(task.labelers))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{line}: a line of the key must be as it was written ({error})") from None
    return found
