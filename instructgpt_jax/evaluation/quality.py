"""How well labelers agree, and what each of them did: tables of what `label` has read.

    python -m instructgpt_jax.evaluation.quality --comparisons=…/comparisons.jsonl --ratings=…/ratings.jsonl \
        --output=quality.json

* Preferences, as in Stiennon et al. 2020, appendix C.2: of the pairs of outputs that two labelers both ranked and
  neither called equal, the share on which they prefer the same; 50 % is chance. Within each group and across groups,
  with 95 % intervals of a bootstrap over tasks. In Ouyang et al. 2022, section 3.4, training labelers agree on 72.6 %.
* Krippendorff's alpha of ratings (ordinal) and of the yes/no fields (nominal): 1 = all agree, 0 = as by chance. Needs
  the extra `label`.
* Of each labeler how many tasks, how long, the share of ties, the agreement with all others, the mean rating; and the
  drift of these, the second half of the labeler's tasks less the first by the time of their last edit.

Outputs of one text count once. Lines of other sources do too: a comparison needs a `labeler`, a `group` if it has one.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from instructgpt_jax import errors, paths
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import jsonl, schema
from instructgpt_jax.evaluation import agreement, statistics
from instructgpt_jax.evaluation.agreement import ALL, Pair, Ranking

LEVELS = dict.fromkeys(schema.GRADES, "ordinal")  # all else is yes or no: nominal


def summary(comparisons: Sequence[dict], ratings: Sequence[dict], seed: int) -> dict[str, Any]:
    """Everything that the module's docstring names.

    Args:
      comparisons, ratings: lines of the files of those names, see `labeling`; either may be empty.
      seed: of the bootstrap.

    Returns:
      `agreement` (group, or 'one and other' -> interval), `alpha` (question -> group -> number, groups without one left
      out) and `labelers` (id -> see `of_each`).

    Raises:
      ValueError: ratings without the library `krippendorff`, or rankings of one task that differ in length.
    """
    found = agreement.pairs(map(agreement.ranking_of, comparisons))
    return {
        "agreement": agreement.by_group(found, seed),
        "alpha": alphas(ratings),
        "labelers": of_each(comparisons, ratings, found, seed),
    }


def alphas(ratings: Iterable[dict]) -> dict[str, dict[str, float]]:
    """Question -> group, and 'all' where there are several -> Krippendorff's alpha; what is undefined is left out."""
    values: dict[str, dict[tuple, tuple[str, float]]] = {}  # question -> (unit, labeler) -> (group, value)
    for line in ratings:
        unit = _task(line), line["answer"].strip()
        given = {name: line[name] for name in schema.GRADES if line.get(name) is not None}
        given |= {name: value for name, value in (line.get("fields") or {}).items() if value is not None}
        for name, value in given.items():
            values.setdefault(name, {})[unit, str(line["labeler"])] = agreement.group_of(line), float(value)
    found = {}
    for name, of in values.items():
        groups = sorted({group for group, _ in of.values()})
        for group in groups if len(groups) < 2 else (ALL, *groups):
            chosen = [(unit, value) for (unit, _), (own, value) in of.items() if group in (own, ALL)]
            number = agreement.alpha(chosen, LEVELS.get(name, "nominal"))
            if number is not None:
                found.setdefault(name, {})[group] = number
    return found


def of_each(
    comparisons: Iterable[dict], ratings: Iterable[dict], found: Sequence[Pair], seed: int
) -> dict[str, dict[str, Any]]:
    """What each labeler did.

    Returns:
      id -> `group`, `tasks` and `ratings` (numbers), `seconds` (median of a task) and `hours` (all of them); intervals
      of `ties` (share of pairs of outputs), `agreement` with all others and `rating`; `drift`, those of them, and of
      `seconds` (mean), that both halves of the tasks have. What nothing is known of is null.
    """
    rankings: dict[str, list[tuple[dict, Ranking]]] = {}
    rated: dict[str, list[dict]] = {}
    for line in comparisons:
        rankings.setdefault(str(line["labeler"]), []).append((line, agreement.ranking_of(line)))
    for line in ratings:
        rated.setdefault(str(line["labeler"]), []).append(line)
    result = {}
    for name in sorted(rankings | rated):
        own, scores = rankings.get(name, []), rated.get(name, [])
        pages = {_task(line): line for line in scores}
        pages |= {ranking.task: line for line, ranking in own}
        spent = [line["seconds"] for line in pages.values() if line.get("seconds") is not None]
        pairs = agreement.of_labeler(found, name)
        result[name] = {
            "group": agreement.group_of(next(iter(pages.values()))),
            "tasks": len(pages),
            "ratings": len(scores),
            "seconds": float(np.median(spent)) if spent else None,
            "hours": round(sum(spent) / 3600, 4) if spent else None,
            "ties": _ties(ranking for _, ranking in own),
            "agreement": agreement.share(pairs, seed),
            "rating": _rating(scores),
            "drift": _drift(pages, own, scores, pairs, seed),
        }
    return result


def _task(rating: dict) -> str:
    return str(rating.get("task") or rating["prompt"])


def _ties(rankings: Iterable[Ranking]) -> dict[str, float] | None:
    found = [agreement.preferences(ranking.ranks) for ranking in rankings]
    return statistics.ratio_interval([(signs == 0).sum() for signs in found], [len(signs) for signs in found])


def _rating(ratings: Iterable[dict]) -> dict[str, float] | None:
    given = [(line["rating"], _task(line)) for line in ratings if line.get("rating") is not None]
    return statistics.interval(*zip(*given, strict=True)) if given else None


def _drift(
    pages: dict[str, dict], own: list[tuple[dict, Ranking]], scores: list[dict], pairs: list[Pair], seed: int
) -> dict[str, dict[str, float]] | None:
    """The second half of the tasks less the first; None where the time of one is not known, or there is only one."""
    if len(pages) < 2 or not all(line.get("at") for line in pages.values()):
        return None
    order = sorted(pages, key=lambda task: pages[task]["at"])
    halves = []
    for tasks in (set(order[: len(order) // 2]), set(order[len(order) // 2 :])):
        spent = [pages[task]["seconds"] for task in tasks if pages[task].get("seconds") is not None]
        halves.append(
            {
                "seconds": statistics.interval(spent),
                "ties": _ties(ranking for _, ranking in own if ranking.task in tasks),
                "agreement": agreement.share((pair for pair in pairs if pair.task in tasks), seed),
                "rating": _rating(line for line in scores if _task(line) in tasks),
            }
        )
    first, second = halves
    return {name: statistics.difference(first[name], second[name]) for name in first if first[name] and second[name]}


# The command line -----------------------------------------------------------------------------------------------------


def read(path: str, kind: str) -> list[dict]:
    """The lines of a file of `comparisons` or `ratings`, checked.

    Raises:
      ValueError: a line that is none, or that does not say who it is by; names file and line.
    """

    def check(number: int, line: dict) -> dict:
        schema.validate(line, kind)
        if "labeler" not in line:
            raise ValueError(f"missing field 'labeler', the record has {sorted(line)}")
        agreement.group_of(line)
        return line

    return jsonl.objects(paths.expand(path), check) if path else []


def table(found: dict[str, Any]) -> list[str]:
    """The summary as lines of text."""
    lines = [f"{'agreement':28} {'share':>8}   95 % interval  tasks"]
    for name, value in found["agreement"].items():
        low, high = _percent(value, "low"), _percent(value, "high")
        lines.append(f"{name:28} {_percent(value):>8}   {low} to {high}  {value['n']}")
    lines += ["", f"{'alpha':28} {'group':>12} {'alpha':>8}"]
    for name, of in found["alpha"].items():
        lines += [f"{name:28} {group:>12} {value:8.3f}" for group, value in of.items()]
    heads = ("tasks", "seconds", "ties", "agreement", "rating")
    lines += ["", f"{'labeler':20} {'group':>12} " + " ".join(f"{head:>9}" for head in heads)]
    for name, of in found["labelers"].items():
        seconds = "-" if of["seconds"] is None else f"{of['seconds']:.0f}"
        rating = "-" if of["rating"] is None else f"{of['rating']['mean']:.2f}"
        shown = (str(of["tasks"]), seconds, _percent(of["ties"]), _percent(of["agreement"]), rating)
        lines.append(f"{name:20} {of['group']:>12} " + " ".join(f"{text:>9}" for text in shown))
    return lines


def _percent(value: dict[str, float] | None, key: str = "mean") -> str:
    return "-" if value is None else f"{100 * value[key]:.1f} %"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    name = "python -m instructgpt_jax.evaluation.quality"
    parser = argparse.ArgumentParser(name, description=__doc__.split("\n")[0])
    parser.add_argument("--comparisons", default="", help="comparisons.jsonl")
    parser.add_argument("--ratings", default="", help="ratings.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--output", default="", help="a file for all numbers, JSON")
    args = parser.parse_args(argv)
    with errors.one_line():
        if not args.comparisons and not args.ratings:
            raise ValueError("--comparisons or --ratings must name a file, got neither")
        found = summary(read(args.comparisons, "comparisons"), read(args.ratings, "ratings"), args.seed)
        print("\n".join(table(found)))
        if args.output:
            workdirs.write_atomically(pathlib.Path(paths.expand(args.output)), json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
