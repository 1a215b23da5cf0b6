"""Collections of public tasks worded as instructions (FLAN, P3, Super-NaturalInstructions), as demonstrations.

    python -m instructgpt_jax.data.instruction --input='p3/*.jsonl.gz' --cap=500000 --total=1000000 --out=t0.jsonl.gz

writes one file for `config.data.demonstrations=jsonl:t0.jsonl.gz`, for the paper's FLAN and T0 baselines (Ouyang et al.
2022, section 3.5 and appendix C.5; configs/flan_175b.py, configs/t0_175b.py), and `t0.sets.json` beside it: how many
records each set had and gave, and what was dropped and why.

This is a command that writes a file, and not a source of a configuration: how much of a set is taken depends on the
sizes of all sets, so that everything is read before the first record is known, and T0++ has 96 million of which the
paper took one. So it is done once, what was taken can be looked at, and a run reads and fingerprints a common source.

An input is a folder of task files of Super-NaturalInstructions, or a pattern of JSONL files or any source of records
(`parquet:GLOB`, `hf:ID:CONFIG:SPLIT`), in one of these layouts:

| collection | prompt and completion |
|---|---|
| P3 (`bigscience/P3`) | `inputs_pretokenized`, `targets_pretokenized` |
| FLAN (`Muennighoff/flan`, `DataProvenanceInitiative/niv2_submix_original`), xP3 | `inputs`, `targets` |
| our own | `prompt`, `completion` |
| Super-NaturalInstructions | `Definition` and the `input` of each of `Instances`, the first `output` |

The set of a record is its `dataset`, `task_name` or `task`; without one, the CONFIG of an `hf:` source or the file that
it is in. Its template is its `template` or `template_name`. The texts of P3 and FLAN get a space between them, unless
the prompt ends in a space or a line. A candidate that P3 keeps for scoring (`is_correct` false) is no demonstration,
and neither is a repeated record.

The mixing is that of the collections, without repeating a record: at most `cap` records of a set, in equal parts of its
templates where they have as many, and of `total` in proportion to min(size of the set, `rate`) until a set is used up.

* FLAN (Wei et al. 2021, section 2.4) takes 30,000 of a set and mixes by size up to 3,000: `--cap=30000 --rate=3000`.
* T0 (Sanh et al. 2021, section 5) mixes by size up to 500,000, divided among the templates: `--cap=500000`. It counts a
  set before it is written in its templates and leaves smaller sets uncapped; here records are counted as they are. On
  the Hub each template is a CONFIG, and so a set: `--cap` is then what 500,000 divided among them leaves.
* Tk-Instruct (Wang et al. 2022) takes 100 instances of a task: `--cap=100`, `--sets=splits/default/train_tasks.txt`.

Which records these are is decided by a hash of their texts: another order of the files gives the same ones. Each input
is read twice; in memory are 8 bytes for each record, and more for those that are taken.
"""

import argparse
import array
import collections
import functools
import gzip
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from instructgpt_jax import errors, paths, process, workdir
from instructgpt_jax.data import instruction_forms, jsonl, sources

REPEATED, OVER_CAP, OVER_TOTAL = "repeated", "over the cap", "over the total"
NOT_WANTED = "not in --sets"
_PRINTED = 40  # sets


class Mixing(NamedTuple):
    """How much of each set is taken."""

    cap: int  # records of a set, at most
    rate: int  # sets are mixed by their sizes up to this; 0 = up to the cap
    total: int  # records in all; 0 = all that the cap leaves


def make(inputs: Sequence[str], out: str, mixing: Mixing, wanted: Sequence[str] = (), skip_bad: int = 0) -> dict:
    """Writes the demonstrations of some collections, and beside them the report, see the module's docstring.

    Args:
      inputs: folders of task files, patterns of JSONL files and sources.
      out: the file of demonstrations: `prompt`, `completion`, `source` (the collection), `dataset` (the set) and
        `template`, one a line; gzip where its name ends in `.gz`.
      mixing: how much of each set is taken.
      wanted: names of the sets that are taken; () = all.
      skip_bad: malformed records that may be left out.

    Returns:
      The report: `mixing`, `read`, `written`, `bad`, `dropped`: reason -> records, and `sets`: name -> what was `read`
      and `taken` of it and the number of its `templates`.

    Raises:
      ValueError: a number below 1, an unknown layout, a malformed record, a name in `wanted` that is no set.
    """
    if "://" in out:
        raise ValueError(f"--out must be a local file, got {out!r}")
    if mixing.cap < 1:
        raise ValueError(f"--cap must be at least 1, got {mixing.cap}")
    for name in ("rate", "total"):
        if getattr(mixing, name) < 0:
            raise ValueError(f"--{name} must be at least 1, or 0 for none, got {getattr(mixing, name)}")
    dropped, bad, read, wanted = collections.Counter(), [], collections.Counter(), set(wanted)
    hashes = collections.defaultdict(lambda: collections.defaultdict(lambda: array.array("Q")))
    progress = process.Progress(lambda count: f"instruction: {count:,} records read", process.say)
    for number, found in enumerate(instruction_forms.records(inputs, bad), 1):
        progress(number)
        read[found.set] += 1
        why = NOT_WANTED if wanted and found.set not in wanted else found.why
        if why:
            dropped[why] += 1
        else:
            hashes[found.set][found.template].append(_hash(found))
    sources.refuse_or_list(bad, skip_bad, "--skip_bad")
    unknown = sorted(wanted - set(read))
    if unknown:
        raise ValueError(f"--sets must name sets of the input, got {len(unknown)} that are not, such as {unknown[0]!r}")

    distinct = {name: {t: np.unique(one) for t, one in own.items()} for name, own in sorted(hashes.items())}
    dropped[REPEATED] = sum(read.values()) - dropped.total() - sum(map(_size, distinct.values()))
    taken = plan({name: {t: len(one) for t, one in own.items()} for name, own in distinct.items()}, mixing)
    capped = sum(min(_size(own), mixing.cap) for own in distinct.values())
    dropped[OVER_CAP] = sum(map(_size, distinct.values())) - capped
    written = sum(sum(own.values()) for own in taken.values())
    dropped[OVER_TOTAL] = capped - written
    if not written:
        raise ValueError(f"--input must have at least one demonstration, got none in {', '.join(inputs)}")
    left = {int(one) for name, own in taken.items() for t, count in own.items() for one in distinct[name][t][:count]}
    del hashes, distinct
    _write(out, inputs, left)
    report = {
        "inputs": list(inputs), "mixing": mixing._asdict(), "read": sum(read.values()), "written": written,
        "bad": len(bad), "dropped": {why: count for why, count in dropped.items() if count},
        "sets": {
            name: {"read": count, "taken": sum(taken.get(name, {}).values()), "templates": len(taken.get(name, {}))}
            for name, count in sorted(read.items())
        },
    }  # fmt: skip
    workdir.write_atomically(report_of(out), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def report_of(out: str) -> epath.Path:
    """Where the report of a file of demonstrations is: t0.jsonl.gz -> t0.sets.json."""
    path = epath.Path(out)
    return path.with_name(instruction_forms.stem(path.name) + ".sets.json")


def plan(sizes: dict[str, dict[str, int]], mixing: Mixing) -> dict[str, dict[str, int]]:
    """How many records are taken: set -> template -> number.

    Args:
      sizes: set -> template -> number of records.
    """
    whole = {name: min(sum(own.values()), mixing.cap) for name, own in sizes.items()}
    rate = mixing.rate or mixing.cap
    total = sum(whole.values())
    total = min(total, mixing.total or total)
    counts = shares(list(whole.values()), [min(size, rate) for size in whole.values()], total)
    return {
        name: dict(zip(own, shares(list(own.values()), [1] * len(own), count), strict=True))
        for (name, own), count in zip(sizes.items(), counts, strict=True)
    }


def shares(sizes: Sequence[int], rates: Sequence[float], total: int) -> list[int]:
    """`total` things of several groups in proportion to their rates, of no group more than it has.

    So group i gives min(size i, x · rate i), rounded, for the x that makes it `total` in all. Rounding favours the
    largest remainders, and the first group among equal ones.

    >>> shares([10, 100, 100], [10, 50, 50], 110)  # in proportion
    [10, 50, 50]
    >>> shares([10, 100, 100], [10, 50, 50], 160)  # the first is used up
    [10, 75, 75]
    """
    sizes, rates = np.asarray(sizes, float), np.asarray(rates, float)
    if not len(sizes) or total >= sizes.sum():
        return sizes.astype(int).tolist()
    full = sizes / rates  # the x at which a group is used up
    order = np.argsort(full, kind="stable")
    used = np.concatenate([[0.0], np.cumsum(sizes[order])])  # by the groups that are used up before each one
    rest = np.cumsum(rates[order][::-1])[::-1]  # the rates of all others
    x = next((total - used[k]) / rest[k] for k in range(len(order)) if used[k] + full[order[k]] * rest[k] >= total)
    exact = np.minimum(sizes, x * rates)
    counts = np.floor(exact + 1e-9).astype(int)
    more = np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]
    counts[more] += 1
    return counts.tolist()


def _size(own: dict[str, Sequence]) -> int:
    return sum(map(len, own.values()))


def _hash(found: instruction_forms.Found) -> int:
    """64 bits of a record's set, template and texts: what it is chosen by."""
    texts = (found.set, found.template, found.record["prompt"], found.record["completion"])
    return int.from_bytes(hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).digest(), "big")


def _write(out: str, inputs: Sequence[str], left: set[int]) -> None:
    """Writes the records whose hash is in `left`, which is emptied meanwhile, so that each comes once."""
    path = pathlib.Path(out)
    paths.make_folder("--out", path.parent)
    partial = path.with_name(path.name + ".partial")
    opened = functools.partial(gzip.open, compresslevel=3) if out.endswith(".gz") else open
    with errors.naming(partial), opened(partial, "wt", encoding="utf-8") as file:
        for found in instruction_forms.records(inputs, []):
            if found.record and (key := _hash(found)) in left:
                left.discard(key)
                file.write(json.dumps(found.record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        "python -m instructgpt_jax.data.instruction", description="Instruction collections to demonstrations."
    )
    parser.add_argument("--input", required=True, nargs="+", help="folders of task files, patterns of JSONL, sources")
    parser.add_argument("--out", required=True, help="file of demonstrations; NAME.sets.json beside it is the report")
    parser.add_argument("--cap", required=True, type=int, help="records of a set, at most")
    parser.add_argument("--rate", default=0, type=int, help="sets are mixed by their sizes up to this; 0: the cap")
    parser.add_argument("--total", default=0, type=int, help="records in all; 0: all that the cap leaves")
    parser.add_argument("--sets", default="", help="file with the names of the sets that are taken, one a line")
    parser.add_argument("--skip_bad", default=0, type=int, help="malformed records that may be left out")
    args = parser.parse_args(argv)
    with errors.one_line():
        wanted = [text.strip() for _, text in jsonl.texts(paths.expand(args.sets))] if args.sets else []
        if args.sets and not wanted:
            raise ValueError(f"--sets must name at least one set, got none in {args.sets}")
        inputs, out = [paths.expand_source(paths.expand(given)) for given in args.input], paths.expand(args.out)
        report = make(inputs, out, Mixing(args.cap, args.rate, args.total), wanted, args.skip_bad)
    largest = sorted(report["sets"], key=lambda name: -report["sets"][name]["taken"])
    for name in sorted(largest[:_PRINTED]):
        own = report["sets"][name]
        templates = f", {own['templates']} templates" if own["templates"] > 1 else ""
        print(f"{name}: {own['taken']:,} of {own['read']:,}{templates}")
    if len(largest) > _PRINTED:
        rest = sum(report["sets"][name]["taken"] for name in largest[_PRINTED:])
        print(f"{len(largest) - _PRINTED:,} other sets: {rest:,}")
    for why, count in report["dropped"].items():
        print(f"dropped: {count:,}, {why}")
    taken = sum(own["taken"] > 0 for own in report["sets"].values())
    print(f"jsonl:{out} has {report['written']:,} demonstrations of {taken:,} sets; {report_of(out)} has the counts")


if __name__ == "__main__":
    main()
