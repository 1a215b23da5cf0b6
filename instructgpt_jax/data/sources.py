"""Where records come from: `jsonl:GLOB`, `tfds:NAME[/CONFIG][:SPLIT]`, `simulated:NAME`, each with optional `#OPTION`s
and an optional `@WEIGHT`.

`load` opens the sources of one kind of data (`config.data.demonstrations`, ...) and gives random access to their
records; a record is a dict as `data/schema.py` describes it. It reads and checks every line of a JSONL file and every
simulated record before it returns, so that bad input stops a run before any compute is spent.

* `jsonl:GLOB`: UTF-8, one JSON object a line, plain or gzip; blank lines are skipped. The pattern is a local path or a
  `gs://` address (the extra `gcs`), files are read in the order of their names. The first 16 MiB of lines of a source
  stay in memory as records, so they are parsed once. Those behind are parsed again when they are asked for, and take 48
  bytes of memory each where the file is plain and local: it is mapped. A compressed or remote one is then held whole.
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

import array
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from instructgpt_jax.data import jsonl, schema
from instructgpt_jax.data.records import Records, about, concatenate, keys_of
from instructgpt_jax.splits import part_of

EXTRA_FIELDS = "extra_fields_json"  # how data/build.py stores the optional fields of a record
_LISTED = 10  # bad records listed in an error
_KEPT = 16 << 20  # bytes of lines of a source that stay in memory as records
_OPTION = re.compile(r"(?:(?P<but>!?)(?P<part>\d+)/(?P<parts>\d+)|(?P<unique>unique)|(?P<new>\w+)=(?P<old>\w+))")
_TFDS_NAME = re.compile(r"(?P<name>\w+(?:/[\w.\-]+)*(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")


class Source(NamedTuple):
    """A parsed source string."""

    form: str  # 'jsonl', 'tfds' or 'simulated'
    name: str  # what stands between the form and the options
    weight: float | None
    options: tuple[str, ...] = ()


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
    parts = []
    for source in parsed:
        if source.form == "jsonl":
            part = _load_jsonl(source, kind)
        elif source.form == "tfds":
            part = _load_tfds(source, kind, data_dir)
        else:
            part = _load_simulated(source, kind)
        part.weight = source.weight
        parts.append(part)
    refuse_or_list([line for part in parts for line in part.skipped], skip_bad)
    for source, part in zip(sources, parts, strict=True):
        if not len(part):
            raise ValueError(f"data source {source!r} has no valid record of kind {kind}")
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _rename(record: schema.Record, options: tuple[str, ...]) -> schema.Record:
    """The record with the fields that `#NEW=OLD` adds."""
    for match in map(_OPTION.fullmatch, options):
        if match["new"] and match["old"] in record:
            record = record | {match["new"]: record[match["old"]]}
    return record


def _chooser(options: tuple[str, ...]) -> Callable[[schema.Record], bool]:
    """Whether `#I/N` and `#unique` leave a record; asked of all records of a source in their order, once each."""
    matches = [_OPTION.fullmatch(option) for option in options]
    parts = [(int(match["part"]), int(match["parts"]), bool(match["but"])) for match in matches if match["part"]]
    unique, seen = any(match["unique"] for match in matches), set()

    def chosen(record: schema.Record) -> bool:
        text = about(record)
        if any((part_of(text, count) == part) == but for part, count, but in parts):
            return False
        if not unique:
            return True
        new = text not in seen
        seen.add(text)
        return new

    return chosen


def refuse_or_list(bad: Sequence[str], skip_bad: int, key: str = "config.data.skip_bad") -> None:
    """Lists bad records as a warning, or as an error where they are more than `skip_bad`, the value of `key`, allows.

    Args:
      bad: "file:line: reason" of each.
    """
    if not bad:
        return
    listed = "".join(f"\n  {line}" for line in bad[:_LISTED])
    if len(bad) > _LISTED:
        listed += f"\n  … and {len(bad) - _LISTED} more"
    summary = f"{len(bad)} bad record{'s' if len(bad) > 1 else ''}"
    if len(bad) > skip_bad:
        raise ValueError(f"{summary}, {key} allows {skip_bad}:{listed}")
    logging.warning("%s left out (%s = %d):%s", summary, key, skip_bad, listed)


def _load_jsonl(source: Source, kind: str) -> Records:
    """The valid and chosen lines of every file of a pattern."""
    paths, chosen = jsonl.match(source.name), _chooser(source.options)
    kept, buffers, bad, size = [], [], [], 0
    spans, keys = array.array("q"), array.array("Q")
    for number, path in enumerate(paths):
        buffer, empty = jsonl.read(path), True
        for line, start, end in jsonl.lines(buffer):
            empty = False
            try:
                record = _rename(schema.parse_line(buffer[start:end]), source.options)
                schema.validate(record, kind)
            except ValueError as error:
                bad.append(f"{path}:{line}: {error}")
                continue
            if chosen(record):
                spans.extend((number, line, start, end))
                keys.extend(keys_of(record))
                size += end - start
                if size <= _KEPT:
                    kept.append(record)
        if empty:
            bad.append(f"{path}:1: the file is empty")
        buffers.append(buffer if size > _KEPT else b"")
    index = np.asarray(spans).reshape(-1, 4)  # file, line, start and end (bytes)

    def get(i):
        if i < len(kept):
            return kept[i]
        number, _, start, end = index[i].tolist()
        return _rename(schema.parse_line(buffers[number][start:end]), source.options)

    def origin(i):
        return f"{paths[index[i, 0]]}:{index[i, 1]}"

    records = Records(len(index), get, origin, np.asarray(keys).reshape(-1, 2))
    records.skipped = tuple(bad)
    return records


def _load_tfds(source: Source, kind: str, data_dir: str) -> Records:
    import tensorflow_datasets as tfds  # a second of import time that JSONL runs do not pay

    spec = source.name
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
            record = _rename(record, source.options)
            schema.validate(record, kind)
        except ValueError as error:
            raise ValueError(f"{origin(i)}: {error}") from None
        return record

    records = Records(len(rows), get, origin)
    if len(rows):
        get(0)
    if any("=" not in option for option in source.options):
        records = records.subset(np.fromiter(map(_chooser(source.options), records), bool, len(records)))
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


def _load_simulated(source: Source, kind: str) -> Records:
    from instructgpt_jax import simulated

    chosen, kept, numbers, bad = _chooser(source.options), [], [], []
    for i, row in enumerate(simulated.records(source.name)):
        try:
            record = _rename(row, source.options)
            schema.validate(record, kind)
        except ValueError as error:
            bad.append(f"simulated:{source.name}[{i}]: {error}")
            continue
        if chosen(record):
            kept.append(record)
            numbers.append(i)
    records = Records(len(kept), kept.__getitem__, lambda i: f"simulated:{source.name}[{numbers[i]}]")
    records.skipped = tuple(bad)
    return records
