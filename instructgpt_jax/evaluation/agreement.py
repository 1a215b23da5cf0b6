"""How far people who judged the same answers agree: preferences (Stiennon et al. 2020, appendix C.2), Krippendorff's
alpha. Plain numpy on the host.
"""

import importlib.util
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from instructgpt_jax.data import chats, encoding
from instructgpt_jax.evaluation import statistics

ALL = "all"  # group of a labeler who has none


class Ranking(NamedTuple):
    """One labeler's ranking of the items of a task.

    ranks: one an item, 1 = best, equal = tied, 0 = the labeler did not see it; the same items in the same order for
      everybody who judged the task.
    """

    task: str
    labeler: str
    group: str
    ranks: tuple[int, ...]


class Pair(NamedTuple):
    """Two labelers on one task.

    decided: pairs of items that both ranked and neither called equal; `same` of them have the same preferred item.
    """

    task: str
    labelers: tuple[str, str]
    groups: tuple[str, str]
    same: int
    decided: int


def group_of(line: dict[str, Any]) -> str:
    """Who a comparison or a rating is by, ALL where it does not say.

    >>> group_of({"group": 0}), group_of({})
    ('0', 'all')

    Raises:
      ValueError: see encoding.group_name.
    """
    return encoding.group_name(line) or ALL


def ranking_of(line: dict[str, Any]) -> Ranking:
    """A comparison with its labeler; outputs of one text are one item, as on the page that people see.

    Its task is its field `task`, or else its prompt with its completions.

    >>> ranking_of({"prompt": "?", "completions": ["a", "b", "a "], "ranking": [2, 1, 2], "labeler": "x"}).ranks
    (2, 1)
    """
    ranks: dict[str, int] = {}
    for text, rank in zip(line["completions"], line["ranking"], strict=True):
        ranks.setdefault(text.strip(), rank)
    task = line.get("task") or json.dumps([chats.named(line), line["completions"]])
    return Ranking(str(task), str(line["labeler"]), group_of(line), tuple(ranks.values()))


def pairs(rankings: Iterable[Ranking]) -> list[Pair]:
    """Every two labelers on every task that both ranked.

    Raises:
      ValueError: two rankings of one task have not as many ranks.
    """
    tasks: dict[str, list[Ranking]] = {}
    for one in rankings:
        tasks.setdefault(one.task, []).append(one)
    found = []
    for task, of in tasks.items():
        if len({len(one.ranks) for one in of}) > 1:
            raise ValueError(f"rankings of task {task} must have as many ranks, got {[one.ranks for one in of]}")
        for a, b in itertools.combinations(of, 2):
            if a.labeler != b.labeler:
                agreed = same(a.ranks, b.ranks)
                found.append(Pair(task, (a.labeler, b.labeler), (a.group, b.group), sum(agreed), len(agreed)))
    return found


def same(a: Sequence[int], b: Sequence[int]) -> list[bool]:
    """Of each pair of items that two rankings of them both decide, whether they prefer the same one.

    >>> same((1, 2, 2), (1, 2, 3)), same((1, 2), (2, 1)), same((1, 1), (1, 2))
    ([True, True], [False], [])
    """
    above, other = preferences(a), preferences(b)
    return (above == other)[(above != 0) & (other != 0)].tolist()


def preferences(ranks: Sequence[int]) -> np.ndarray:
    """(K (K-1) / 2,) int: of each two items 1 = the first is preferred, -1 = the second, 0 = equal or not both ranked.

    >>> preferences((1, 2, 2, 0)).tolist()
    [1, 1, 0, 0, 0, 0]
    """
    ranks = np.asarray(ranks)
    i, j = np.triu_indices(len(ranks), 1)
    return np.sign(ranks[j] - ranks[i]) * (ranks[i] > 0) * (ranks[j] > 0)


def share(of: Iterable[Pair], seed: int) -> dict[str, float] | None:
    """Of the decided pairs of items the share on which two labelers prefer the same one; 0.5 = chance.

    Returns:
      The interval is of a bootstrap over tasks, n counts tasks; None where nobody decided a pair that another did.
    """
    tasks: dict[str, list[int]] = {}
    for pair in of:
        sums = tasks.setdefault(pair.task, [0, 0])
        sums[0] += pair.same
        sums[1] += pair.decided
    return statistics.bootstrap_ratio(*zip(*tasks.values(), strict=True), seed) if tasks else None


def by_group(found: Sequence[Pair], seed: int) -> dict[str, dict[str, float]]:
    """`share` within each group, under its name, and across each two, under 'one and other'."""
    groups = sorted({group for pair in found for group in pair.groups})
    shares = {group: share((p for p in found if p.groups == (group, group)), seed) for group in groups}
    for two in itertools.combinations(groups, 2):
        shares[" and ".join(two)] = share((pair for pair in found if set(pair.groups) == set(two)), seed)
    return {name: value for name, value in shares.items() if value}


def of_labeler(found: Iterable[Pair], labeler: str) -> list[Pair]:
    """The pairs that the labeler is one of."""
    return [pair for pair in found if labeler in pair.labelers]


def alpha(values: Iterable[tuple[Any, float]], level: str) -> float | None:
    """Krippendorff's alpha, by the library `krippendorff`: 1 = all agree, 0 = as by chance.

    Args:
      values: (unit, value), one for each labeler who judged the unit.
      level: of measurement: 'nominal', 'ordinal', 'interval' or 'ratio'.

    Returns:
      None where it is not defined: no unit has two values, or all values are equal.

    Raises:
      ValueError: the library is not installed.
    """
    units: dict[Any, list[float]] = {}
    for unit, value in values:
        units.setdefault(unit, []).append(value)
    several = [given for given in units.values() if len(given) > 1]
    domain = sorted({value for given in several for value in given})
    if len(domain) < 2:
        return None
    counts = np.array([[given.count(value) for value in domain] for given in several])
    return float(_library()(value_counts=counts, value_domain=domain, level_of_measurement=level))


def _library() -> Callable:
    if importlib.util.find_spec("krippendorff") is None:
        raise ValueError("Krippendorff's alpha needs the extra 'label' (pip install 'instructgpt-jax[label]')")
    import krippendorff

    return krippendorff.alpha
