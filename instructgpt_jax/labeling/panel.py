"""The labelers of the simulated world answer a questionnaire of kind `comparisons`, file to file as people do.

They rank, rate and tick as `simulated.rank` and `simulated.rate` say, on the day `seed`. Where projects are shared the
labelers of a task are drawn as `collect` draws them, so that a questionnaire gives the very rankings that `collect`
writes by itself.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from instructgpt_jax import simulated
from instructgpt_jax.data import chats
from instructgpt_jax.labeling import filling, kinds, make, people

NAME = "simulated labelers"  # in place of a file


def crowd() -> people.People:
    """All simulated labelers, as a file of labelers would name them."""
    return people.People([_person(one) for group in simulated.GROUPS for one in simulated.labelers(group)], NAME)


def _person(one: simulated.Labeler) -> people.Labeler:
    return people.Labeler(one.name, one.group, f"{one.name}@example.org")


def answers(tasks: Iterable[make.Task], groups: tuple[str, ...], seed: int) -> Iterator[filling.Answer]:
    """Every task answered by the labelers that it is for; where projects are shared, by `task.copies` of each group."""
    known = {one.name: one for group in simulated.GROUPS for one in simulated.labelers(group)}
    for task in tasks:
        chosen = [known[name] for name in task.labelers]
        if not chosen:
            prompt = chats.named(task.record)
            chosen = [one for group in groups for one in simulated.draw_labelers(group, prompt, task.copies, seed)]
        for one in chosen:
            yield task, _person(one), fill(task, one, seed)


def fill(task: make.Task, labeler: simulated.Labeler, seed: int) -> dict[str, Any]:
    """What the labeler says on the pages of a task, as filling.results takes it."""
    prompt = chats.named(task.record)
    texts = [task.record["completions"][group[0]] for group in task.shown]
    values: dict[str, Any] = {kinds.RANKING: simulated.rank(labeler, prompt, texts, seed)}
    for n, text in enumerate(texts):
        said = simulated.rate(labeler, prompt, text, seed)
        values[f"rating_{n}"] = said["rating"]
        for name in kinds.WHERE_IT_APPLIES:
            values[f"{name}_{n}"] = {True: "yes", False: "no", None: "none"}[said[name]]
        values[f"{kinds.FLAGS}_{n}"] = frozenset(name for name in kinds.NINE if said[name])
    return values
