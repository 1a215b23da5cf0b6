"""Tables of rows at random access: parquet files, data sets of the library `datasets`, and prepared TFDS sets.

What is in memory does not grow with a table: Arrow files are mapped, and of parquet files the last row groups are kept.
A row is a dict of what JSON has: a null, NaN or bytes that are no UTF-8 are a field that the row lacks, since a column
stands in all rows or in none, and a date is its text.
"""

import contextlib
import functools
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from instructgpt_jax.data import jsonl, schema
from instructgpt_jax.data.schema import Record

EXTRA_FIELDS = "extra_fields_json"  # how data/build.py stores the optional fields of a record
_PAGE = 1024  # rows that become Python values at once
_PAGES, _GROUPS = 4, 2  # pages and row groups that stay in memory
_HF_NAME = re.compile(r"(?P<place>[^:]+)(?::(?P<config>[\w.\-]+))?:(?P<split>\w[\w.\-]*(?:\[[^\[\]]*\])?)")
_HUB_ID = re.compile(r"(?!runs/)\w[\w.\-]*(/[\w.\-]+)?")  # runs/… are our workdirs
_TFDS_NAME = re.compile(r"(?P<name>\w+(?:/[\w.\-]+)*(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")


class Rows(NamedTuple):
    """Random access to the rows of a table.

    get: row number -> the row; raises ValueError where a file is damaged.
    origin: row number -> where the row stands, "file.parquet[17]".
    columns: their names.
    """

    length: int
    get: Callable[[int], Record]
    origin: Callable[[int], str]
    columns: list[str]


def parquet(pattern: str) -> Rows:
    """The rows of all files of a local or `gs://` pattern, in the order of the files' names.

    Raises:
      ValueError: no file, or one that is not a whole parquet file.
    """
    files = jsonl.match(pattern, "parquet")
    groups, starts, columns = [], [0], set()  # groups: (file, row group of it, first row of the file)
    for number, path in enumerate(files):
        with _told(f"{path} must be a whole parquet file"), _open(path) as file:
            columns |= set(file.schema_arrow.names)
            first, metadata = starts[-1], file.metadata
            for k in range(metadata.num_row_groups):
                groups.append((number, k, first))
                starts.append(starts[-1] + metadata.row_group(k).num_rows)

    starts = np.array(starts)

    def table(group):
        number, k, _ = groups[group]
        path = files[number]
        with _told(f"{path} must be whole, its rows from {starts[group]} on are not"), _open(path) as file:
            return file.read_row_group(k)

    def origin(i):
        number, _, first = groups[_group_of(starts, i)]
        return f"{files[number]}[{i - first}]"

    return Rows(int(starts[-1]), _paged(starts, table, origin), origin, sorted(columns))


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(path).open("rb")) if "://" in path else path
        options = {"memory_map": file is path, "page_checksum_verification": True}
        yield stack.enter_context(pyarrow.parquet.ParquetFile(file, **options))


@contextlib.contextmanager
def _told(expected: str) -> Iterator[None]:
    """What the reader of a file says, in one line: {expected}, got {…}."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{expected}, got: {' '.join(str(error).split())}") from error


def is_hf(name: str) -> bool:
    """Whether a name has the form `ID_OR_DIR[:CONFIG]:SPLIT`; the split may be a part, `train[:10%]`."""
    return _HF_NAME.fullmatch(name) is not None


def hf_set(name: str) -> str:
    """What a set of the library `datasets` is called: its configuration, else the last part of its id or directory."""
    place, config = _HF_NAME.fullmatch(name).group("place", "config")
    return config or place.rstrip("/").rpartition("/")[2]


def check_hf(name: str) -> None:
    """Refuses what can be told without reading: a directory that is not there, and the library that is not.

    Raises:
      ValueError: says which.
    """
    place = _HF_NAME.fullmatch(name)["place"]
    if not os.path.isdir(place) and not _HUB_ID.fullmatch(place):
        raise ValueError(f"hf:{name} must name a directory that exists or a data set of the Hub, got {place!r}")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"hf:{name} needs the extra 'hf' (pip install 'instructgpt-jax[hf]')")


def hf(name: str) -> Rows:
    """The rows of `ID_OR_DIR[:CONFIG]:SPLIT`.

    A directory was written by `save_to_disk`, or has files that `load_dataset` takes, such as parquet and JSONL; these
    become Arrow files in the cache of `datasets` once. An id is one of the Hugging Face Hub.

    Raises:
      ValueError: no such set, configuration or split, or an id that cannot be fetched; the library is not there.
    """
    check_hf(name)
    import datasets  # seconds of import time

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    place, config, split = _HF_NAME.fullmatch(name).group("place", "config", "split")
    saved = any((pathlib.Path(place) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        found = _saved(place, config, split) if saved else datasets.load_dataset(place, config, split=split)
    except Exception as error:  # of many classes: the library's, the network's, those of the readers of files
        reason = " ".join(str(error.__cause__ or error).split())
        if os.path.isdir(place):
            expected = "must be a directory that datasets can read, with that configuration and split"
        elif datasets.config.HF_HUB_OFFLINE:
            expected = "must be in the cache of datasets, since HF_HUB_OFFLINE is set: load it once with a network"
        else:
            expected = "must be a directory, or a data set of the Hub that can be fetched from here"
        raise ValueError(f"hf:{name} {expected}, got {type(error).__name__}: {reason}") from error
    arrow, starts = found.with_format("arrow"), np.array([*range(0, len(found), _PAGE), len(found)])

    def origin(i):
        return f"hf:{name}[{i}]"

    get = _paged(starts, lambda page: arrow[int(starts[page]) : int(starts[page + 1])], origin)
    return Rows(len(found), get, origin, sorted(found.column_names))


def _saved(place: str, config: str | None, split: str):
    """A split, or a part of it, of what `save_to_disk` wrote; a set without splits has the one that is asked for."""
    import datasets

    if config:
        raise ValueError(f"what save_to_disk wrote has no configurations, got {config!r}")
    found = datasets.load_from_disk(place)
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or split.partition("[")[0]): found}
    part = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(one) for name, one in found.items()})[0]
    return found[part.splitname].select(range(part.from_, part.to))


def _group_of(starts: np.ndarray, i: int) -> int:
    return int(np.searchsorted(starts, i, side="right")) - 1


def _paged(starts: np.ndarray, table: Callable, origin: Callable[[int], str]) -> Callable[[int], Record]:
    """Random access to the rows of Arrow tables that are read when they are asked for.

    Args:
      starts: first row of each table, and behind the last the number of rows.
      table: number of a table -> pyarrow.Table.
      origin: row number -> where it stands.
    """
    table = functools.lru_cache(_GROUPS)(table)

    @functools.lru_cache(_PAGES)
    def page(group, number):
        try:
            return [_plain(row) for row in table(group).slice(number * _PAGE, _PAGE).to_pylist()]
        except UnicodeDecodeError as error:
            first = origin(int(starts[group]) + number * _PAGE)
            raise ValueError(f"{first} and the {_PAGE} rows from there on must be UTF-8, got: {error}") from error

    def get(i):
        group = _group_of(starts, i)
        number, place = divmod(int(i - starts[group]), _PAGE)
        return page(group, number)[place]

    return get


def tfds(spec: str, data_dir: str) -> Rows:
    """The rows of `NAME[/CONFIG][:SPLIT]`, prepared as ArrayRecord.

    Args:
      data_dir: where TFDS sets lie, "" = `$TFDS_DATA_DIR` or the default of TFDS.

    Raises:
      ValueError: no such set or split, or one that was prepared in another format.
    """
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
            "python -m instructgpt_jax.data.build makes it from other sources"
        )
    try:
        rows = builder.as_data_source(split=split, file_format="array_record")
    except (NotImplementedError, ValueError, KeyError, AssertionError) as error:
        message = f"tfds:{spec} must be prepared as ArrayRecord and have the split {split!r}"
        raise ValueError(f"{message}: {error}") from error

    def get(i):
        row = _plain(rows[i])
        if EXTRA_FIELDS not in row:
            return row
        # A text that the record lacked was written empty.
        row = {name: value for name, value in row.items() if value != "" or name not in ("prompt", "completion")}
        return row | schema.parse_line(row.pop(EXTRA_FIELDS).encode())

    return Rows(len(rows), get, lambda i: f"tfds:{match['name']}:{split}[{i}]", sorted(builder.info.features))


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it; None where it has none."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        plain = {name: _plain(part) for name, part in value.items()}
        return {name: part for name, part in plain.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
