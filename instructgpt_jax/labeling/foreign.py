"""Preferences from a Label Studio project that was not made here: its export as records of comparisons.

    python -m instructgpt_jax.labeling.foreign --export=export.json --completions=answer1,answer2 --output=out.jsonl

* `pairwise`: the chosen side goes first; the sides are the two fields of `--completions`, left and right.
* `choices` with one choice: the name of a field of `--completions`, or `left` or `right`; `--tie` names what is a tie.
* `ranker`: buckets called 1, 2, … are ranks, a plain list is best first; `--completions` is the field with the items.

Annotations that were skipped are left out, as are those without one such result; both are counted.
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from instructgpt_jax import errors, paths
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import schema
from instructgpt_jax.labeling import exports

TEXTS = ("body", "text", "html", "title")  # where an item of a list has its text


def comparisons(
    annotations: Iterable[exports.Annotation], prompt: str, completions: Sequence[str], ties: Sequence[str]
) -> tuple[list[dict], dict[str, int]]:
    """Records of comparisons, and reason -> number of annotations that are none.

    Args:
      prompt: the field of a task that holds the prompt.
      completions: the fields that hold the completions, or the one field with a ranker's items.
      ties: choices that mean a tie.

    Raises:
      ValueError: a task without these fields, or a result that does not fit them; names file and task.
    """
    found, left_out = [], collections.Counter()
    for one in annotations:
        if one.skipped:
            left_out["skipped"] += 1
            continue
        try:
            texts, ids = _completions(one.data, completions)
            rankings = [ranking for value in one.values.values() if (ranking := ranked(value, ids, ties)) is not None]
            if len(rankings) != 1:
                left_out[f"{len(rankings)} results that rank"] += 1
                continue
            record = {"prompt": one.data.get(prompt), "completions": texts, "ranking": rankings[0]}
            schema.validate(record, "comparisons")
        except ValueError as error:
            raise ValueError(f"{one.where}: {error}") from None
        labeler = one.labeler.get("email") or one.labeler.get("id") if isinstance(one.labeler, dict) else one.labeler
        found.append(record | {"labeler": labeler, "seconds": one.seconds, "at": one.at})
    return found, dict(left_out)


def ranked(value: Any, ids: tuple[str, ...], ties: Sequence[str]) -> list[int] | None:
    """The ranks that the value of a result gives the items `ids`, None where it ranks nothing."""
    if isinstance(value, tuple) and len(value) == 1:
        if value[0] in ties:
            return [1] * len(ids)
        value = value[0]
    if isinstance(value, str):
        sides = dict(zip(("left", "right"), ids, strict=False)) if len(ids) == 2 else {}
        chosen = sides.get(value, value)
        return [1 if name == chosen else 2 for name in ids] if chosen in ids else None
    return exports.ranks(value, ids) if isinstance(value, dict | list) else None


def _completions(data: dict, fields: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The texts of a task that are ranked, and what a result calls them."""
    missing = [field for field in fields if field not in data]
    if missing:
        raise ValueError(f"a task must have the fields of --completions, got {sorted(data)} without {missing}")
    if len(fields) > 1:
        return [data[field] for field in fields], tuple(fields)
    items = data[fields[0]]
    if not isinstance(items, list) or not all(isinstance(item, dict) and "id" in item for item in items):
        raise ValueError(f"{fields[0]} must be a list of items with an id, got {schema.short(items)}")
    texts = [next((item[name] for name in TEXTS if item.get(name)), "") for item in items]
    return texts, tuple(str(item["id"]) for item in items)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser("python -m instructgpt_jax.labeling.foreign", description=__doc__.split("\n")[0])
    parser.add_argument("--export", required=True, help="of Label Studio, JSON or JSON-MIN")
    parser.add_argument("--prompt", default="prompt", help="field of the prompt")
    parser.add_argument("--completions", required=True, help="fields of the completions, a comma between them")
    parser.add_argument("--tie", default="", help="choices that mean a tie, a comma between them")
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    with errors.one_line():
        export = exports.read(paths.expand(args.export))
        if export.problems:
            raise ValueError("; ".join(export.problems[:3]))
        ties = [name for name in args.tie.split(",") if name]
        found, left_out = comparisons(export.annotations, args.prompt, args.completions.split(","), ties)
        if not found:
            raise ValueError(f"{args.export} must have an annotation that ranks, got none; left out: {left_out}")
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
        workdirs.write_atomically(pathlib.Path(paths.expand(args.output)), text)
        print(f"{len(found)} comparisons in {args.output}; left out: {left_out or 'none'}")


if __name__ == "__main__":
    main()
