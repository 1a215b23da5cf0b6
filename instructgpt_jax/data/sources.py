"""Where records come from: `jsonl:GLOB`, `tfds:NAME[/CONFIG][:SPLIT]`, `simulated:NAME`, each with optional `#OPTION`s
and an optional `@WEIGHT`.

`load` opens the sources of one kind of data (`config.data.demonstrations`, ...) and gives random access to their
records; a record is a dict as `data/schema.py` describes it. It reads and checks every line of a JSONL file and every
simulated record before it returns, so that bad input stops a run before any compute is spent.

* `jsonl:GLOB`: UTF-8, one JSON object a line, plain or gzip; blank lines are skipped. The pattern is a local path or a
  `gs://` address (the extra `gcs`), files are read in the order of their names. A plain local file is memory-mapped, so
  only its line index is held in memory; a compressed or remote file is held whole.
* `tfds:NAME[/CONFIG][:SPLIT]`: a data set prepared as ArrayRecord under `config.data.data_dir` (empty: `$TFDS_DATA_DIR`
  or the default of TFDS), the split `train` when none is named, with the slicing of TFDS (`train[:1%]`). No TensorFlow
  is needed. The first record is checked here, each other one when it is read: a remote data set is too large to read
  twice. `data/build.py` makes such sets from JSONL, and checks every record while it does.
* `simulated:NAME`: the embedded world of `simulated/`.

Options, in any order:

* `#I/N`: the I-th of N parts, by a hash of the prompt (of the text where there is none) that has nothing to do with
  `config.data.valid_fraction`: two models can learn from halves of the same comparisons that share no prompt. `#!I/N`:
  all but that part.
* `#unique`: the first record of each prompt (or text). A file of demonstrations with several answers to a prompt is so
  a source of prompts.
* `#NEW=OLD`: the field OLD of a record under the name NEW too. `#text=completion` makes pretraining text of
  demonstrations; such a record keeps its prompt, so what is held out there is held out here.

With no weights the sources are read as one, one after another. With weights (then on every source) `Records.parts` are
mixed in those proportions by `data/batches.py`.
"""

import bisect
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from instructgpt_jax.data import jsonl, schema
from instructgpt_jax.splits import part_of

EXTRA_FIELDS = "extra_fields_json"  # how data/build.py stores the optional fields of a record
_LISTED = 10  # malformed records listed in an error
_OPTION = re.compile(r"(?:(?P<but>!?)(?P<part>\d+)/(?P<parts>\d+)|(?P<unique>unique)|(?P<new>\w+)=(?P<old>\w+))")
_TFDS_NAME = re.compile(r"(?P<name>\w+(?:/[\w.\-]+)*(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")


class Source(NamedTuple):
    """A parsed source string."""

    form: str  # 'jsonl', 'tfds' or 'simulated'
    name: str  # what stands between the form and the options
    weight: float | None
    options: tuple[str, ...] = ()


class Records(Sequence):
    """Random access to the valid records of one or several sources.

    Attributes:
      parts: one `Records` a source (itself alone for a single source).
      weight: the `@WEIGHT` of a single source, None without one.
      skipped: "file:line: reason" of each malformed record that `skip_bad` let pass.
      left_out: reason -> number of good records that are not among these.
    """

    def __init__(self, length: int, get: Callable[[int], schema.Record], origin: Callable[[int], str]):
        self._length, self._get, self._origin = length, get, origin
        self.parts: tuple[Records, ...] = (self,)
        self.weight: float | None = None
        self.skipped: tuple[str, ...] = ()
        self.left_out: dict[str, int] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> schema.Record:
        return self._get(self._checked(index))

    def origin(self, index: int) -> str:
        """Where record `index` stands: "file:line", or "source[index]" where there are no lines."""
        return self._origin(self._checked(index))

    def _checked(self, index: int) -> int:
        index = int(index)
        if not -self._length <= index < self._length:
            raise IndexError(f"record index must be below {self._length}, got {index}")
        return index % self._length


class _Bad(NamedTuple):
    origin: str
    reason: str


def parse(source: str) -> Source:
    """Splits a source string: "jsonl:data/*.jsonl#1/2@0.3" -> Source("jsonl", "data/*.jsonl", 0.3, ("1/2",))."""
    form, colon, name = source.partition(":")
    if not colon or form not in ("jsonl", "tfds", "simulated") or not name:
        raise ValueError(f"a data source must be jsonl:GLOB, tfds:NAME[:SPLIT] or simulated:NAME, got {source!r}")
    weight, options = None, []
    head, at, tail = name.rpartition("@")
    if at:
        try:
            name, weight = head, float(tail)
        except ValueError:  # an "@" inside a file name
            name = f"{head}@{tail}"
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of a data source must be a positive number, got {source!r}")
    while "#" in name and _OPTION.fullmatch(name.rpartition("#")[2]):
        name, _, option = name.rpartition("#")
        options.insert(0, option)
    for match in map(_OPTION.fullmatch, options):
        if match["part"] and not 1 <= int(match["part"]) <= int(match["parts"]):
            raise ValueError(f"the part I/N of a data source must have I from 1 to N, got {source!r}")
    if not name:
        raise ValueError(f"a data source must have a name before its options and weight, got {source!r}")
    return Source(form, name, weight, tuple(options))


def with_option(source: str, option: str) -> str:
    """The source with one more option: with_option("jsonl:a@2", "1/5") -> "jsonl:a#1/5@2"."""
    form, name, weight, options = parse(source)
    return f"{form}:{name}" + "".join(f"#{o}" for o in (*options, option)) + ("" if weight is None else f"@{weight:g}")


def load(sources: tuple[str, ...], kind: str, skip_bad: int, data_dir: str = "") -> Records:
    """Opens and checks all records of `sources`.

    Args:
      sources: source strings, in the order in which their records stand in the result.
      kind: one of `schema.KINDS`.
      skip_bad: how many malformed records (over all sources) may be left out; they are listed in `.skipped`.
      data_dir: where TFDS sets lie; empty for the default.
    Returns:
      The records of all sources, one source after another; `.parts` has them one by one.
    Raises:
      ValueError: a source that does not exist, a damaged file, or more malformed records than allowed (file and line).
    """
    if isinstance(sources, str) or not sources:
        raise ValueError(f"data sources of {kind} must be a non-empty tuple of strings, got {sources!r}")
    if kind not in schema.KINDS:
        raise ValueError(f"kind must be one of {schema.KINDS}, got {kind!r}")
    parsed = [parse(source) for source in sources]
    if len({source.weight is None for source in parsed}) == 2:
        raise ValueError(f"either every data source or none must have a weight, got {tuple(sources)!r}")
    parts, bad = [], []
    for source in parsed:
        rename = functools.partial(_rename, options=source.options)
        if source.form == "jsonl":
            part, bad_here = _load_jsonl(source.name, kind, rename)
        elif source.form == "tfds":
            part, bad_here = _load_tfds(source.name, kind, data_dir, rename), []
        else:
            part, bad_here = _load_simulated(source.name, kind, rename)
        part = _choose(part, source.options)
        part.weight = source.weight
        part.skipped = tuple(f"{b.origin}: {b.reason}" for b in bad_here)
        parts.append(part)
        bad += part.skipped
    refuse_or_list(bad, f"malformed record of kind {kind}", skip_bad)
    for source, part in zip(sources, parts, strict=True):
        if not len(part):
            raise ValueError(f"data source {source!r} has no valid record of kind {kind}")
    return parts[0] if len(parts) == 1 else _concatenate(parts)


def _rename(record: schema.Record, options: tuple[str, ...]) -> schema.Record:
    """The record with the fields that `#NEW=OLD` adds."""
    for match in map(_OPTION.fullmatch, options):
        if match["new"] and match["old"] in record:
            record = record | {match["new"]: record[match["old"]]}
    return record


def _choose(records: Records, options: tuple[str, ...]) -> Records:
    """The records that `#I/N` and `#unique` leave."""
    chosen = [match for match in map(_OPTION.fullmatch, options) if not match["new"]]
    if not chosen:
        return records
    parts = [match for match in chosen if match["part"]]
    keep, seen = [], set()
    for i in range(len(records)):
        record = records[i]
        text = record.get("prompt", record.get("text"))
        if any((part_of(text, int(m["parts"])) == int(m["part"])) == bool(m["but"]) for m in parts):
            continue
        if any(match["unique"] for match in chosen):
            if text in seen:
                continue
            seen.add(text)
        keep.append(i)
    return Records(len(keep), lambda i: records[keep[i]], lambda i: records.origin(keep[i]))


def refuse_or_list(bad: list[str], what: str, skip_bad: int, before: int = 0) -> None:
    """Lists bad records as a warning, or as an error where they are more than `config.data.skip_bad` allows.

    Args:
      bad: "file:line: reason" of each.
      what: they are, one of them.
      before: how many of those that are allowed were met earlier.
    """
    if not bad:
        return
    listed = "".join(f"\n  {line}" for line in bad[:_LISTED])
    if len(bad) > _LISTED:
        listed += f"\n  … and {len(bad) - _LISTED} more"
    count = len(bad) + before
    summary = f"{count} {what.replace('record', 'records') if count > 1 else what}"
    if count > skip_bad:
        raise ValueError(f"{summary}, config.data.skip_bad allows {skip_bad}:{listed}")
    logging.warning("%s left out (config.data.skip_bad = %d):%s", summary, skip_bad, listed)


def _concatenate(parts: list[Records]) -> Records:
    starts = [0, *itertools.accumulate(len(part) for part in parts)]

    def locate(index):
        which = bisect.bisect_right(starts, index) - 1
        return parts[which], index - starts[which]

    def get(index):
        part, inner = locate(index)
        return part[inner]

    def origin(index):
        part, inner = locate(index)
        return part.origin(inner)

    records = Records(starts[-1], get, origin)
    records.parts = tuple(parts)
    records.skipped = tuple(line for part in parts for line in part.skipped)
    return records


def _load_jsonl(pattern: str, kind: str, rename: Callable) -> tuple[Records, list[_Bad]]:
    """Indexes the valid lines of every file of `pattern`."""
    paths = jsonl.match(pattern)
    buffers, spans, bad = [], [], []
    for number, path in enumerate(paths):
        buffer = jsonl.read(path)
        found = 0
        for line, start, end in jsonl.lines(buffer):
            found += 1
            try:
                schema.validate(rename(schema.parse_line(buffer[start:end])), kind)
            except ValueError as error:
                bad.append(_Bad(f"{path}:{line}", str(error)))
            else:
                spans.append((number, line, start, end))
        if not found:
            bad.append(_Bad(f"{path}:1", "the file is empty"))
        buffers.append(buffer)
    index = np.array(spans, np.int64).reshape(-1, 4)  # file, line, start and end (bytes)

    def get(i):
        number, _, start, end = index[i].tolist()
        return rename(schema.parse_line(buffers[number][start:end]))

    def origin(i):
        return f"{paths[index[i, 0]]}:{index[i, 1]}"

    return Records(len(index), get, origin), bad


def _load_tfds(spec: str, kind: str, data_dir: str, rename: Callable) -> Records:
    import tensorflow_datasets as tfds  # a second of import time that JSONL runs do not pay

    match = _TFDS_NAME.fullmatch(spec)
    if not match:
        raise ValueError(f"a tfds source must be tfds:NAME[/CONFIG][:SPLIT], got {'tfds:' + spec!r}")
    split = match["split"] or "train"
    where = data_dir or os.environ.get("TFDS_DATA_DIR", "") or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(match["name"], data_dir=data_dir or None)
        prepared = bool(builder.info.splits)
    except (tfds.core.DatasetNotFoundError, OSError) as error:
        logging.info("tfds: %s", error)
        prepared = False
    if not prepared:
        raise ValueError(
            f"tfds:{spec} must be prepared as ArrayRecord under {where} (config.data.data_dir), found nothing there; "
            "python -m instructgpt_jax.data.build makes it from JSONL"
        )
    try:
        rows = builder.as_data_source(split=split, file_format="array_record")
    except (NotImplementedError, ValueError, KeyError, AssertionError) as error:
        message = f"tfds:{spec} must be prepared as ArrayRecord and have the split {split!r}"
        raise ValueError(f"{message}: {error}") from error
    name = f"tfds:{match['name']}:{split}"

    def origin(i):
        return f"{name}[{i}]"

    def get(i):
        record = _plain(rows[i])
        try:
            if EXTRA_FIELDS in record:
                record |= schema.parse_line(record.pop(EXTRA_FIELDS).encode())
            record = rename(record)
            schema.validate(record, kind)
        except ValueError as error:
            raise ValueError(f"{origin(i)}: {error}") from None
        return record

    records = Records(len(rows), get, origin)
    if len(rows):
        get(0)
    return records


def _plain(value: Any) -> Any:
    """NumPy scalars, arrays and bytes as Python numbers, lists and strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _load_simulated(name: str, kind: str, rename: Callable) -> tuple[Records, list[_Bad]]:
    from instructgpt_jax import simulated

    rows = simulated.records(name)
    bad, keep = [], []
    for i, row in enumerate(rows):
        try:
            schema.validate(rename(row), kind)
        except ValueError as error:
            bad.append(_Bad(f"simulated:{name}[{i}]", str(error)))
        else:
            keep.append(i)
    return Records(len(keep), lambda i: rename(rows[keep[i]]), lambda i: f"simulated:{name}[{keep[i]}]"), bad
