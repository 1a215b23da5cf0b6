"""Files that a pattern names, local and remote; files of lines, plain and gzip: where each line begins and ends."""

import glob
import gzip
import io
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from instructgpt_jax import paths
from instructgpt_jax.data import schema


def match(pattern: str, form: str) -> list[str]:
    """The files of a local or remote pattern, sorted; a path that exists is taken as it is.

    Args:
      form: of the source, `jsonl` or `parquet`, for the error.
    """
    if "://" in pattern:
        head = pattern[: re.search(r"[*?\[]|$", pattern).start()].rpartition("/")[0]
        try:
            inner = pattern[len(head) + 1 :]
            literal = epath.Path(pattern)
            if not glob.has_magic(inner):
                found = [str(literal)] if literal.exists() else []
            else:
                found = sorted(str(path) for path in epath.Path(head).glob(inner))
        except ImportError as error:
            raise ValueError(f"{form}:{pattern} needs the extra 'gcs' (pip install 'instructgpt-jax[gcs]')") from error
    else:
        local = paths.expand(pattern)
        named = [local] if os.path.isfile(local) else glob.glob(local, recursive=True)
        found = sorted(path for path in named if os.path.isfile(path))
        if os.path.isdir(local):
            raise ValueError(f"{form}:{pattern} must name files, got a folder; {pattern}/*.{form} names those in it")
    if not found:
        raise ValueError(f"{form}:{pattern} must name at least one file, got none")
    return found


def read(path: str) -> bytes | mmap.mmap:
    """The text of a file: mapped where it is plain and local, else in memory."""
    try:
        if "://" in path:
            buffer = epath.Path(path).read_bytes()
        else:
            with open(path, "rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0  # an empty file cannot be mapped
                buffer = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"{path} must be readable, got {error.strerror or error}") from error
    if path.endswith(".gz") or buffer[:2] == b"\x1f\x8b":
        return _decompress(path, buffer)
    return buffer


def _decompress(path: str, buffer: bytes | mmap.mmap) -> bytes:
    """Never salvages a damaged file: how many records it lost is not known, so no allowance could cover them."""
    if not buffer[:2]:
        return b""
    chunks = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(buffer)) as file:
            while chunk := file.read(1 << 20):
                chunks.append(chunk)
    except (OSError, EOFError, zlib.error) as error:
        line = 1 + sum(chunk.count(b"\n") for chunk in chunks)
        raise ValueError(f"{path}:{line}: the gzip data is damaged or cut at or after this line ({error})") from None
    return b"".join(chunks)


def lines(buffer: bytes | mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """(line number from 1, start, end) of each line that is not blank; passes over a byte-order mark at the start."""
    start = 3 if buffer[:3] == b"\xef\xbb\xbf" else 0
    line, size = 1, len(buffer)
    while start < size:
        end = buffer.find(b"\n", start)
        end = size if end < 0 else end
        if buffer[start:end].strip():
            yield line, start, end
        start, line = end + 1, line + 1


def texts(path: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each line of plain text that is not blank; lines end at \\n or \\r\\n alone.

    Raises:
      ValueError: a file that cannot be read, or a line that is not UTF-8.
    """
    buffer = read(path)
    for line, start, end in lines(buffer):
        try:
            text = buffer[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{line}: invalid UTF-8 at byte {error.start} of the line") from None
        yield line, text.removesuffix("\r")


def objects(path: str, check: Callable[[int, dict[str, Any]], Any]) -> list:
    """What `check` makes of each line of a small file: (number of the line, its object) -> anything.

    Raises:
      ValueError: what `check` raises, or a line that is no object; names file and line.
    """
    found, buffer = [], read(path)
    for number, start, end in lines(buffer):
        try:
            found.append(check(number, schema.parse_line(buffer[start:end])))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return found
