"""Where records come from: `jsonl:GLOB`, `parquet:GLOB`, `hf:ID_OR_DIR[:CONFIG]:SPLIT`, `tfds:NAME[/CONFIG][:SPLIT]`,
`tokens:GLOB`, `simulated:NAME`, each with optional `#OPTION`s and an optional `@WEIGHT`.

`load` opens the sources of one kind of data (`config.data.demonstrations`, ...) and gives random access to their
records; a record is a dict as `data/schema.py` describes it, made of a row in any of the forms of `data/forms.py`. It
reads and checks every row before it returns, but those of TFDS, so that bad input stops a run before any compute is
spent.

* `jsonl:GLOB`: UTF-8, one JSON object a line, plain or gzip; blank lines are skipped. The pattern is a local path or a
  `gs://` address (the extra `gcs`), files are read in the order of their names. The first 16 MiB of lines of a source
  stay in memory as records, so they are parsed once. Those behind are parsed again when they are asked for, and take 48
  bytes of memory each where the file is plain and local: it is mapped. A compressed or remote one is then held whole.
* `parquet:GLOB`: parquet files, likewise local or `gs://`. Row groups are read again when they are asked for; a record
  takes 24 bytes of memory.
* `hf:ID_OR_DIR[:CONFIG]:SPLIT`: a data set of the library `datasets` (the extra `hf`), of the Hub or a directory; the
  split with its slicing (`train[:1%]`). Its Arrow files are mapped; a record takes 24 bytes of memory.
* `tfds:NAME[/CONFIG][:SPLIT]`: a data set prepared as ArrayRecord under `config.data.data_dir` (empty: `$TFDS_DATA_DIR`
  or the default of TFDS), the split `train` when none is named, with the slicing of TFDS (`train[:1%]`). No TensorFlow
  is needed. The first record is checked here, each other one when it is read: a remote data set is too large to read
  twice. With the options `#I/N` and `#unique`, and where it has `chosen` and `rejected`, all are checked here.
  `data/build.py` makes such sets from other sources, and checks every record while it does.
* `tokens:GLOB`: text as token shards (`data/shards.py`), local or `gs://`; `data/build.py --format=tokens` makes them
  of other sources. The sources of a kind are all of this form or none. Options belong to what the shards are made from.
* `simulated:NAME`: the embedded world of `simulated/`.

Options, in any order:

* `#I/N`: the I-th of N parts, by a hash of the prompt (of the text where there is none) that has nothing to do with
  `config.data.valid_fraction`: two models can learn from halves of the same comparisons that share no prompt. `#!I/N`:
  all but that part.
* `#unique`: the first record of each prompt (or text). A file of demonstrations with several answers to a prompt is so
  a source of prompts.
* `#NEW=OLD`: the field OLD of a record under the name NEW too. `#text=completion` makes pretraining text of
  demonstrations; such a record keeps its prompt, so what is held out there is held out here. Fields are copied before
  `data/forms.py` looks at them: `#prompt=question` beside `chosen` and `rejected`.

With no weights the sources are read as one, one after another. With weights (then on every source) `Records.parts` are
mixed in those proportions by `data/batches.py`.
"""

import array
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from instructgpt_jax import process
from instructgpt_jax.data import forms, jsonl, schema, tables, tokens
from instructgpt_jax.data.records import Records, about, concatenate, keys_of
from instructgpt_jax.splits import part_of

FORMS = {
    "jsonl": "jsonl:GLOB", "parquet": "parquet:GLOB", "hf": "hf:ID_OR_DIR[:CONFIG]:SPLIT", "tfds": "tfds:NAME[:SPLIT]",
    "tokens": "tokens:GLOB", "simulated": "simulated:NAME",
}  # fmt: skip
_LISTED = 10  # bad records listed in an error
_KEPT = 16 << 20  # bytes of lines of a source that stay in memory as records
_OPTION = re.compile(r"(?:(?P<but>!?)(?P<part>\d+)/(?P<parts>\d+)|(?P<unique>unique)|(?P<new>\w+)=(?P<old>\w+))")


class Source(NamedTuple):
    """A parsed source string."""

    form: str  # key of FORMS
    name: str  # what stands between the form and the options
    weight: float | None
    options: tuple[str, ...] = ()


def parse(source: str) -> Source:
    """Splits a source string: "jsonl:data/*.jsonl#1/2@0.3" -> Source("jsonl", "data/*.jsonl", 0.3, ("1/2",))."""
    form, colon, name = source.partition(":")
    if not colon or form not in FORMS or not name:
        raise ValueError(f"a data source must be {', '.join(FORMS.values())}, got {source!r}")
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
    if form == "hf" and not tables.is_hf(name):
        raise ValueError(f"a source of the library datasets must be {FORMS['hf']}, got {source!r}")
    if form == "tokens" and options:
        raise ValueError(f"{FORMS['tokens']} has no options, the --input that it was built of has, got {source!r}")
    return Source(form, name, weight, tuple(options))


def with_option(source: str, option: str) -> str:
    """The source with one more option: with_option("jsonl:a@2", "1/5") -> "jsonl:a#1/5@2"."""
    return extended((source,), f"#{option}")[0]


def extended(sources: tuple[str, ...], ending: str) -> tuple[str, ...]:
    """Each source with more options; the weight of the ending is theirs together, in the proportions of their own.

    >>> extended(("jsonl:a@3", "jsonl:b#unique"), "#1/2@0.4")
    ('jsonl:a#1/2@0.3', 'jsonl:b#unique#1/2@0.1')
    """
    more = parse(f"jsonl:*{ending}")
    parsed = [parse(source) for source in sources]
    whole = sum(source.weight or 1.0 for source in parsed)
    found = []
    for form, name, weight, options in parsed:
        weight = weight if more.weight is None else more.weight * (weight or 1.0) / whole
        chosen = "".join(f"#{option}" for option in (*options, *more.options))
        found.append(f"{form}:{name}{chosen}" + ("" if weight is None else f"@{weight:g}"))
    return tuple(found)


def load(
    sources: tuple[str, ...], kind: str, skip_bad: int, data_dir: str = "", tell: Callable[[str], None] | None = None
) -> Records | tokens.Corpus:
    """Opens and checks all records of `sources`.

    Args:
      sources: source strings, in the order in which their records stand in the result.
      kind: one of `schema.KINDS`.
      skip_bad: how many malformed records (over all sources) may be left out; they are listed in `.skipped`.
      data_dir: where TFDS sets lie; empty for the default.
      tell: what is told how far reading is, where it takes long.
    Returns:
      The records of all sources, one source after another; `.parts` has them one by one. Those of token shards have no
      texts.
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
    if any(source.form == "tokens" for source in parsed):
        if kind != "pretraining" or any(source.form != "tokens" for source in parsed):
            raise ValueError(f"tokens: sources must be of pretraining text and stand alone, got {kind}: {sources!r}")
        return tokens.load([(source.name, source.weight) for source in parsed])
    parts = [read(source, kind, data_dir, tell) for source in parsed]
    refuse_or_list([line for part in parts for line in part.skipped], skip_bad)
    for source, part in zip(sources, parts, strict=True):
        if not len(part):
            raise ValueError(f"data source {source!r} has no valid record of kind {kind}")
    return parts[0] if len(parts) == 1 else concatenate(parts)


def read(source: Source, kind: str, data_dir: str, tell: Callable[[str], None] | None = None) -> Records:
    """The records of one source of any form but `tokens`, see `load`; bad ones stand in `.skipped`, however many."""
    sieve = _Sieve(source, kind, tell)
    if source.form == "jsonl":
        part = _load_jsonl(source, sieve)
    elif source.form == "parquet":
        part = _load_rows(source, sieve, tables.parquet(source.name))
    elif source.form == "hf":
        part = _load_rows(source, sieve, tables.hf(source.name))
    elif source.form == "tfds":
        part = _load_tfds(source, sieve, data_dir)
    else:
        part = _load_simulated(source, sieve)
    part.weight = source.weight
    return part


class _Sieve:
    """What becomes of the rows of a source, asked of all of them in their order, once each.

    Attributes:
      bad: "file:line: reason" of each malformed one.
      left_out: reason -> number of good ones that are no use.
      keys: `keys_of` of those that stay, one after another.
    """

    def __init__(self, source: Source, kind: str, tell: Callable[[str], None] | None):
        self._options, self.kind = source.options, kind
        self._taken = 0
        place = f"{source.form}:{source.name}"
        self._progress = tell and process.Progress(lambda count: f"{kind}: {count:,} records of {place} read", tell)
        matches = [_OPTION.fullmatch(option) for option in source.options]
        named = [match.group("part", "parts", "but") for match in matches if match["part"]]
        self._parts = [(int(part), int(count), bool(but)) for part, count, but in named]
        self._unique, self._seen = any(match["unique"] for match in matches), set()
        self.bad: list[str] = []
        self.left_out: dict[str, int] = {}
        self.keys = array.array("Q")

    def take(self, origin: str, read: Callable[..., schema.Record], row) -> schema.Record | None:
        """The record that a row is, or None where it does not stay.

        Args:
          origin: where the row stands.
          read: row -> its fields; raises ValueError for a malformed one.
        """
        self._taken += 1
        if self._progress:
            self._progress(self._taken)
        try:
            record, why = self.understood(read(row))
        except ValueError as error:
            self.bad.append(f"{origin}: {error}")
            return None
        text = about(record)
        if any((part_of(text, count) == part) == but for part, count, but in self._parts):
            return None
        if why:
            self.left_out[why] = self.left_out.get(why, 0) + 1
            return None
        if self._unique and text in self._seen:
            return None
        if self._unique:
            self._seen.add(text)
        self.keys.extend(keys_of(record))
        return record

    def understood(self, row: schema.Record) -> tuple[schema.Record, str]:
        """The record that a row is, valid, and why it is left out, "" where it is not."""
        for match in map(_OPTION.fullmatch, self._options):
            if match["new"] and match["old"] in row:
                row = row | {match["new"]: row[match["old"]]}
        record, why = forms.understood(row, self.kind)
        schema.validate(record, self.kind)
        return record, why

    def records(self, length: int, get: Callable[[int], schema.Record], origin: Callable[[int], str]) -> Records:
        """Those that stay."""
        self._seen.clear()
        records = Records(length, get, origin, np.asarray(self.keys).reshape(-1, 2))
        records.skipped, records.left_out = tuple(self.bad), self.left_out
        return records


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


def _load_jsonl(source: Source, sieve: _Sieve) -> Records:
    """The valid and chosen lines of every file of a pattern."""
    paths = jsonl.match(source.name, source.form)
    kept, buffers, size = [], [], 0
    spans = array.array("q")
    for number, path in enumerate(paths):
        buffer, empty = jsonl.read(path), True
        for line, start, end in jsonl.lines(buffer):
            empty = False
            record = sieve.take(f"{path}:{line}", schema.parse_line, buffer[start:end])
            if record is not None:
                spans.extend((number, line, start, end))
                size += end - start
                if size <= _KEPT:
                    kept.append(record)
        if empty:
            sieve.bad.append(f"{path}:1: the file is empty")
        buffers.append(buffer if size > _KEPT else b"")
    index = np.asarray(spans).reshape(-1, 4)  # file, line, start and end (bytes)

    def get(i):
        if i < len(kept):
            return kept[i]
        number, _, start, end = index[i].tolist()
        return sieve.understood(schema.parse_line(buffers[number][start:end]))[0]

    return sieve.records(len(index), get, lambda i: f"{paths[index[i, 0]]}:{index[i, 1]}")


def _load_rows(source: Source, sieve: _Sieve, rows: tables.Rows) -> Records:
    """The valid and chosen rows of a table."""
    kept = array.array("q")
    for i in range(rows.length):
        if sieve.take(rows.origin(i), dict, rows.get(i)) is not None:
            kept.append(i)
    if sieve.bad and not kept:  # a table of other columns: told once, whatever is allowed
        raise ValueError(f"no row of {source.form}:{source.name} is a record of kind {sieve.kind}: {sieve.bad[0]}")
    index = np.asarray(kept)

    def get(i):
        return sieve.understood(rows.get(int(index[i])))[0]

    return sieve.records(len(index), get, lambda i: rows.origin(int(index[i])))


def _load_tfds(source: Source, sieve: _Sieve, data_dir: str) -> Records:
    """The rows of a TFDS set, checked when they are read unless all of them must be known."""
    rows = tables.tfds(source.name, data_dir)
    columns = {*rows.columns, *(option.partition("=")[0] for option in source.options)}
    if any("=" not in option for option in source.options) or {"chosen", "rejected"} <= columns:
        return _load_rows(source, sieve, rows)

    def get(i):
        try:
            return sieve.understood(rows.get(i))[0]
        except ValueError as error:
            raise ValueError(f"{rows.origin(i)}: {error}") from None

    records = Records(rows.length, get, rows.origin)
    if rows.length:
        get(0)
    return records


def _load_simulated(source: Source, sieve: _Sieve) -> Records:
    from instructgpt_jax import simulated

    kept, numbers = [], []
    for i, row in enumerate(simulated.records(source.name)):
        record = sieve.take(f"simulated:{source.name}[{i}]", dict, row)
        if record is not None:
            kept.append(record)
            numbers.append(i)
    return sieve.records(len(kept), kept.__getitem__, lambda i: f"simulated:{source.name}[{numbers[i]}]")
