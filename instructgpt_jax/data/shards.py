"""The files of token shards, text that was tokenised once: `data/build_tokens.py` writes them, `data/tokens.py` reads.

A folder of shards has

* `NNNNN.tokens`: the ids of documents, each with what the tokenizer puts before it and EOS behind it, one after another
  as little-endian uint16 (uint32 where the vocabulary asks for it) and nothing else;
* `NNNNN.documents`: an entry of `DOCUMENT` for each of them: its length, and what the validation split goes by;
* `manifest-I-of-N.json`, one for each part of the build: the hash of the tokenizer, and of each shard of the part its
  documents, tokens and checksum.

The shards in the order of their numbers are the text in its order, so that what is split, joined and cut here is what
the same text would be. Flat files and not ArrayRecord, whose unit is a record: a sequence of any `row_length` is here
one read of its bytes, with nothing to decode, and one request of a range where the file is in a bucket. Reads are
positioned and not mapped: what has been read does not pile up in the memory of the process, and a file that is cut
while a run reads it is an error and no crash.
"""

import collections
import fnmatch
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from instructgpt_jax.data import jsonl, schema

FORMAT = "instructgpt_jax tokens, version 1"
TOKENS, DOCUMENTS = ".tokens", ".documents"
DOCUMENT = np.dtype([("length", "<u4"), ("place", "<u8"), ("about", "<u8")])  # place and about: records.keys_of
SAME = ("parts", "shards_of_all_parts", "tokenizer", "vocab_size")  # in the manifests of all parts
ENTRY = ("name", "documents", "tokens", "checksum")  # of a shard in its manifest
_KEYS = {*SAME, "part", "users", "skipped", "shards"}
_OPEN = 64  # local files that stay open


class Shard(NamedTuple):
    """One of the shards that a source names."""

    path: str  # of both its files, without their endings
    documents: int
    tokens: int
    checksum: str  # of both its files

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Ending -> bytes of the file."""
        return {TOKENS: self.tokens * dtype.itemsize, DOCUMENTS: self.documents * DOCUMENT.itemsize}


class Found(NamedTuple):
    """What a pattern names, as the manifests beside the shards say it.

    tokenizer: `text_hash` of the tokenizer.
    vocab_size: of the tokenizer; ids are below it.
    users: whether a record said who wrote it.
    skipped: "file:line: reason" of each bad record that the build left out.
    """

    shards: tuple[Shard, ...]
    tokenizer: str
    vocab_size: int
    users: bool
    skipped: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of the ids in the files."""
        return dtype_of(self.vocab_size)


def dtype_of(vocab_size: int) -> np.dtype:
    """The type of the ids of a vocabulary in shards."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def find(pattern: str) -> Found:
    """Reads the manifests of `FOLDER/NAMES`, NAMES a pattern of `.tokens` files, and checks the sizes of the files.

    Raises:
      ValueError: no such shard, a manifest that is damaged or is missing, parts of different builds, a shard that is
        missing or has been cut.
    """
    folder, _, names = pattern.rpartition("/")
    if not names.endswith(TOKENS):
        raise ValueError(f"tokens:{pattern} must name files that end in {TOKENS}, as FOLDER/*{TOKENS}")
    by_folder = collections.defaultdict(list)
    for path in jsonl.match(f"{folder or '.'}/manifest-*.json", "tokens"):
        by_folder[path.rpartition("/")[0]].append(path)
    found = [_of_folder(paths, names) for _, paths in sorted(by_folder.items())]
    if not any(one.shards for one in found):
        raise ValueError(f"tokens:{pattern} must name at least one shard of its manifests, got none")
    return joined([one for one in found if one.shards])


def joined(found: Sequence[Found]) -> Found:
    """The shards of several patterns or folders, one after another.

    Raises:
      ValueError: they are of different tokenizers.
    """
    first = found[0]
    for one in found[1:]:
        if one.tokenizer != first.tokenizer:
            raise ValueError(
                f"token shards that are read as one must be of one tokenizer, got {told(first)} and {told(one)}"
            )
    return first._replace(
        shards=tuple(shard for one in found for shard in one.shards),
        users=any(one.users for one in found),
        skipped=tuple(line for one in found for line in one.skipped),
    )


def told(found: Found) -> str:
    """Which tokenizer they are of, and where they lie."""
    return f"{found.tokenizer[:12]} of {found.vocab_size} ids ({os.path.dirname(found.shards[0].path)})"


def _of_folder(paths: list[str], names: str) -> Found:
    """The shards of one folder whose names match, in their order; all of its parts must be there."""
    manifests = [_manifest(path) for path in paths]
    first = manifests[0]
    for path, manifest in zip(paths, manifests, strict=True):
        differ = [key for key in SAME if manifest[key] != first[key]]
        if differ:
            wanted, got = ({key: one[key] for key in differ} for one in (first, manifest))
            raise ValueError(f"{path} must be of the build of {paths[0]}, with {wanted}, got {got}")
    missing = sorted(set(range(1, first["parts"] + 1)) - {manifest["part"] for manifest in manifests})
    if missing:
        raise ValueError(
            f"the manifests beside {paths[0]} must be of all {first['parts']} parts, got none of part {missing[0]}: "
            f"has data.build --part={missing[0]}/{first['parts']} ended?"
        )
    folder = paths[0].rpartition("/")[0]
    entries = sorted((entry for manifest in manifests for entry in manifest["shards"]), key=lambda entry: entry["name"])
    if len(entries) != first["shards_of_all_parts"]:
        raise ValueError(
            f"the manifests beside {paths[0]} must list {first['shards_of_all_parts']} shards, got {len(entries)}"
        )
    chosen = tuple(
        Shard(f"{folder}/{entry['name']}", entry["documents"], entry["tokens"], entry["checksum"])
        for entry in entries
        if fnmatch.fnmatchcase(entry["name"] + TOKENS, names)
    )
    skipped = tuple(line for manifest in manifests for line in manifest["skipped"])
    users = any(manifest["users"] for manifest in manifests)
    found = Found(chosen, first["tokenizer"], first["vocab_size"], users, skipped)
    there = _sizes(folder)
    for shard in chosen:
        for ending, size in shard.sizes(found.dtype).items():
            _check_size(shard.path + ending, size, there.get(os.path.basename(shard.path) + ending))
    return found


def _manifest(path: str) -> dict[str, Any]:
    try:
        manifest = schema.parse_line(bytes(jsonl.read(path)))
    except ValueError as error:
        raise ValueError(f"{path} must be a manifest of data.build --format=tokens: {error}") from None
    if manifest.get("format") != FORMAT or not manifest.keys() >= _KEYS:
        missing = sorted(_KEYS - manifest.keys())
        raise ValueError(f"{path} must have the format {FORMAT!r}, got {manifest.get('format')!r} without {missing}")
    return manifest


def _sizes(folder: str) -> dict[str, int]:
    """Name -> bytes of each file of a folder, by one listing."""
    if "://" not in folder:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    files, place = _remote(folder)
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in files.ls(place, detail=True)}


def _check_size(path: str, wanted: int, got: int | None) -> None:
    if got != wanted:
        there = "no file" if got is None else f"{got:,}"
        raise ValueError(f"{path} must have the {wanted:,} bytes that its manifest says, got {there}: copy it again")


def _remote(path: str) -> tuple[Any, str]:
    """The file system of a remote path, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ValueError(f"tokens:{path} needs the extra 'gcs' (pip install 'instructgpt-jax[gcs]')") from error


class Files:
    """Reads ranges of files, from any thread."""

    def __init__(self):
        # A file that falls out of the cache while it is read is closed when the read ends.
        self._opened = functools.lru_cache(_OPEN)(lambda path: open(path, "rb", buffering=0))

    def read(self, path: str, first: int, last: int) -> bytes:
        """The bytes from `first` to before `last`.

        Raises:
          ValueError: the file cannot be read, or ends before.
        """
        try:
            if "://" in path:
                files, place = _remote(path)
                found = files.cat_file(place, start=first, end=last) if first < last else b""
            else:
                file = self._opened(path)
                found = os.pread(file.fileno(), last - first, first)
                while 0 < len(found) < last - first and (more := os.pread(file.fileno(), 1 << 30, first + len(found))):
                    found += more[: last - first - len(found)]
        except OSError as error:
            raise ValueError(f"{path} must be readable, got {error.strerror or error}") from error
        if len(found) != last - first:
            raise ValueError(f"{path} must have at least {last:,} bytes, got {first + len(found):,}: it has been cut")
        return found

    def documents(self, shard: Shard) -> np.ndarray:
        """The entries of a shard's documents."""
        data = self.read(shard.path + DOCUMENTS, 0, shard.documents * DOCUMENT.itemsize)
        return np.frombuffer(data, DOCUMENT)
