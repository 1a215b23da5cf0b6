"""Who may label: the first three parts of the paper's test (Ouyang et al. 2022, appendix B.1), with its cut-offs.

    python -m instructgpt_jax.evaluation.screening --labelers=labelers.jsonl --flags=…/flags.jsonl \
        --comparisons=…/comparisons.jsonl --grades=…/grades.jsonl --output=screening.json

1. Sensitive texts: how often a labeler flags as a researcher does (questionnaire `sensitive`, both answer it).
2. Rankings: how often the labeler prefers the same of two outputs as a researcher, pairs that one of the two calls
   equal left out, outputs of one text counted once (questionnaire `comparisons`, both answer it).
3. Demonstrations for sensitive prompts: the mean grade that researchers give to what the labeler wrote (questionnaire
   `demonstrations`, then `grades` about its file).

The paper's cut-offs, 75 %, 75 % and 6 of 7, were soft: who is close to one is for a person to decide. Its fourth part,
what a labeler says of whom they can judge for, is for a talk.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from instructgpt_jax import errors, paths
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import jsonl
from instructgpt_jax.evaluation import agreement
from instructgpt_jax.labeling import people


class Cutoffs(NamedTuple):
    """The least of each part."""

    flags: float  # share
    rankings: float  # share
    grade: float  # mean


def scores(
    crowd: people.People, flags: Iterable[dict], comparisons: Iterable[dict], grades: Iterable[dict], cutoffs: Cutoffs
) -> dict[str, dict[str, Any]]:
    """The scores of everybody who is no researcher.

    Args:
      flags, comparisons, grades: lines of the files of those names, see `labeling`.

    Returns:
      id -> `group`; `flags` and `rankings`, shares in [0, 1]; `grade`, 1 to 7; each with `n_…`, how many pairs or
      grades it is of, and null without any; `passed`, whether all three are there and reach their cut-offs.
    """
    researchers = {one.id for one in crowd.of(("researcher",))}
    own_flags = _by_task((line, line["sensitive"]) for line in flags)
    own_rankings = _by_task((line, agreement.ranking_of(line).ranks) for line in comparisons)
    given: dict[str, list[int]] = {}
    for line in grades:
        if line["labeler"] in researchers:
            given.setdefault(line["author"], []).append(line["grade"])
    found = {}
    for one in crowd.labelers:
        if one.id in researchers:
            continue
        same_flags = [a == b for a, b in _beside(own_flags, one.id, researchers)]
        same_pairs = [same for a, b in _beside(own_rankings, one.id, researchers) for same in agreement.same(a, b)]
        mine = given.get(one.id, [])
        parts = {"flags": _mean(same_flags), "rankings": _mean(same_pairs), "grade": _mean(mine)}
        passed = all(value is not None and value >= getattr(cutoffs, name) for name, value in parts.items())
        counts = {"n_flags": len(same_flags), "n_rankings": len(same_pairs), "n_grade": len(mine)}
        found[one.id] = {"group": one.group, **parts, **counts, "passed": passed}
    return found


def _by_task(answers: Iterable[tuple[dict, Any]]) -> dict[str, dict[str, Any]]:
    """Task -> labeler -> the answer, of lines with their answers."""
    found: dict[str, dict[str, Any]] = {}
    for line, answer in answers:
        found.setdefault(line["task"], {})[line["labeler"]] = answer
    return found


def _beside(answers: dict[str, dict[str, Any]], name: str, researchers: set[str]) -> list[tuple[Any, Any]]:
    """The labeler's answer and a researcher's, of each task that both have."""
    return [
        (of[name], of[other]) for of in answers.values() if name in of for other in sorted(researchers) if other in of
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _read(path: str, *fields: str) -> list[dict]:
    """The lines of a file that `label` has written."""

    def check(number: int, line: dict) -> dict:
        missing = [field for field in ("labeler", *fields) if field not in line]
        if missing:
            raise ValueError(f"a line of label must have {missing}, got {sorted(line)}")
        return line

    return jsonl.objects(paths.expand(path), check) if path else []


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    name = "python -m instructgpt_jax.evaluation.screening"
    parser = argparse.ArgumentParser(name, description=__doc__.split("\n")[0])
    parser.add_argument("--labelers", required=True)
    parser.add_argument("--flags", default="", help="flags.jsonl of a questionnaire `sensitive`")
    parser.add_argument("--comparisons", default="", help="comparisons.jsonl of one `comparisons`")
    parser.add_argument("--grades", default="", help="grades.jsonl of one `grades`")
    parser.add_argument("--least_flags", type=float, default=0.75, help="share of texts flagged alike")
    parser.add_argument("--least_rankings", type=float, default=0.75, help="share of pairs with the same better output")
    parser.add_argument("--least_grade", type=float, default=6.0, help="mean grade of the demonstrations")
    parser.add_argument("--output", default="")
    args = parser.parse_args(argv)
    with errors.one_line():
        found = scores(
            people.load(paths.expand(args.labelers)),
            _read(args.flags, "task", "sensitive"),
            _read(args.comparisons, "task", "completions", "ranking"),
            _read(args.grades, "author", "grade"),
            Cutoffs(args.least_flags, args.least_rankings, args.least_grade),
        )
        print(f"{'labeler':20} {'flags':>8} {'rankings':>8} {'grade':>8}  passed")
        for name, of in found.items():
            shown = ["-" if of[part] is None else f"{of[part]:.2f}" for part in ("flags", "rankings", "grade")]
            print(f"{name:20} {shown[0]:>8} {shown[1]:>8} {shown[2]:>8}  {'yes' if of['passed'] else 'no'}")
        if args.output:
            workdirs.write_atomically(pathlib.Path(paths.expand(args.output)), json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
