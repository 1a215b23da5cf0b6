"""How far a pipeline is: its stages one by one, what each took, and what is left by those of the same kind.

A stage to come is expected to take what the finished ones of its kind took for as much work: episodes and pretraining
sequences for PPO, updates or epochs of the other training, one run of everything else. Networks of another size are not
told apart.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from instructgpt_jax import workdir as workdirs
from instructgpt_jax.report import words

FILE = "done.json"  # in the pipeline's workdir: the stages that have ended
DONE, RUNNING, TO_COME = "done", "running", "to come"


class Row(NamedTuple):
    """A stage: its state, seconds that it has run, and those expected still, None where none of its kind is done."""

    name: str
    state: str
    seconds: float
    left: float | None


def rows(
    stages: Mapping[str, ConfigDict], done: Collection[str], running: Collection[str], spent: Mapping[str, float]
) -> list[Row]:
    """The stages in their order.

    Args:
      stages: name -> configuration.
      done, running: names.
      spent: name -> seconds up to now; of one that was interrupted too.
    """
    totals: dict[str, tuple[float, float]] = {}
    for name in done:
        if name in stages and spent.get(name, 0.0) > 0:
            kind, amount = work(stages[name])
            seconds, all_of_it = totals.get(kind, (0.0, 0.0))
            totals[kind] = (seconds + spent[name], all_of_it + amount)
    found = []
    for name, stage in stages.items():
        state = DONE if name in done else RUNNING if name in running else TO_COME
        kind, amount = work(stage)
        seconds, left = spent.get(name, 0.0), 0.0
        if state != DONE:
            left = max(0.0, totals[kind][0] / totals[kind][1] * amount - seconds) if kind in totals else None
        found.append(Row(name, state, seconds, left))
    return found


def work(stage: ConfigDict) -> tuple[str, float]:
    """What kind of work a stage is, and how much of it."""
    kind = stage.stage
    section = stage.get(kind, ConfigDict())
    if kind == "ppo":
        return kind, section.iterations * section.batch_size * (1 + section.ptx_ratio * (section.ptx_coef > 0))
    if kind == "reward" and section.get("folds", 0):
        return f"{kind}, folds", section.folds * section.fold_seeds
    if section.get("num_steps", 0):
        return f"{kind}, updates", section.num_steps * section.batch_size
    if section.get("num_epochs", 0):
        return f"{kind}, epochs", section.num_epochs
    return kind, 1


def summary(found: Sequence[Row], together: float) -> str:
    """One line: stages done, time spent, time left.

    Args:
      together: seconds that the pipeline has run, less than the sum of its stages' where some run beside each other.
    """
    ended = sum(row.state == DONE for row in found)
    text = f"pipeline: {ended} of {len(found)} stages done in {words.seconds(together)}"
    left = [row.left for row in found if row.left is not None]
    unknown = sum(row.left is None for row in found)
    if ended == len(found):
        return text
    if unknown == len(found) - ended:
        return f"{text}, none of the others is of a kind that is done"
    spent = sum(row.seconds for row in found)
    share = min(1.0, together / spent) if spent and together else 1.0
    text += f", about {words.seconds(share * sum(left))} left"
    return text + f" and {unknown} stage{'s' * (unknown > 1)} of a kind that none is done of" * (unknown > 0)


def table(found: Sequence[Row], together: float) -> str:
    """All stages below each other, and the summary."""
    wide = max(len(row.name) for row in found)
    lines = [f"{'stage':<{wide}}  {'':<7}  {'time':>11}  {'left':>11}"]
    for row in found:
        time = words.seconds(row.seconds) if row.seconds else ""
        left = "" if row.state == DONE else "?" if row.left is None else words.seconds(row.left)
        lines.append(f"{row.name:<{wide}}  {row.state:<7}  {time:>11}  {left:>11}".rstrip())
    return "\n".join([*lines, summary(found, together)])


def read(workdir: epath.Path) -> set[str]:
    """The stages of a pipeline that have ended and whose workdirs are there; none where the file is damaged."""
    path = workdir / FILE
    try:
        names = json.loads(path.read_text()) if path.exists() else []
    except ValueError:  # also what is no UTF-8
        return set()
    return {name for name in names if (workdir / name).exists()} if isinstance(names, list) else set()


def write(workdir: epath.Path, done: Collection[str]) -> None:
    workdirs.write_atomically(workdir / FILE, json.dumps(sorted(done)) + "\n")
