"""Text as ids, read at random from token shards: memory does not grow with what they hold, see `data/shards.py`.

In memory are the manifests and the places where validation documents interrupt the text: with a twentieth of it held
out about 4 bytes for each document, where a document of 500 tokens has 1,000 in the files.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from instructgpt_jax.data import packing, schema, shards
from instructgpt_jax.data.shards import Files, Found, Shard

_AT_ONCE = 16  # lists of documents that are read at once


class Stream:
    """The ids of runs of documents, one after another, at random access: `len(stream)`, `stream[first:last]`.

    Attributes:
      identity: what it is made of: equal streams have equal ones.
      remote: whether a read waits for a network.
    """

    def __init__(self, found: Found, runs: Sequence[np.ndarray], identity: tuple, files: Files):
        """Args:
        runs: of each shard, (runs, 2) int64: first id and the one behind the last.
        """
        self._shards, self._dtype, self._vocab_size, self._files = found.shards, found.dtype, found.vocab_size, files
        self._first = np.concatenate([shard[:, 0] for shard in runs])
        self._starts = np.cumsum(np.concatenate([[0], *(shard[:, 1] - shard[:, 0] for shard in runs)]), dtype=np.int64)
        self._shard = np.repeat(np.arange(len(runs), dtype=np.int32), [len(shard) for shard in runs])
        self.identity = identity
        self.remote = any("://" in shard.path for shard in found.shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        """The ids of a slice with a beginning and an end, as they are in the files."""
        first, last = where.start, min(where.stop, len(self))
        run, pieces = int(np.searchsorted(self._starts, first, side="right")) - 1, []
        while first < last:
            begin = int(self._first[run]) + first - int(self._starts[run])
            size = min(last, int(self._starts[run + 1])) - first
            pieces.append(self._read(self._shards[self._shard[run]], begin, size))
            first, run = first + size, run + 1
        return np.concatenate(pieces) if pieces else np.zeros(0, self._dtype)

    def _read(self, shard: Shard, begin: int, size: int) -> np.ndarray:
        path, width = shard.path + shards.TOKENS, self._dtype.itemsize
        ids = np.frombuffer(self._files.read(path, begin * width, (begin + size) * width), self._dtype)
        if size and ids.max() >= self._vocab_size:
            raise ValueError(
                f"{path} must have ids below {self._vocab_size}, got {ids.max()} behind id {begin}: it is damaged"
            )
        return ids


class Sequences(Sequence):
    """Equal cuts of long arrays of tokens, as `packing.Example`s.

    Attributes:
      remote: whether to read one waits for a network.
    """

    def __init__(self, streams: list[np.ndarray | Stream], row_length: int):
        self._streams, self._row_length = streams, row_length
        self.remote = any(getattr(stream, "remote", False) for stream in streams)
        self.counts = [len(stream) // row_length for stream in streams]
        self._starts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> packing.Example:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        first = (index - self._starts[part]) * self._row_length
        return packing.Example(self._streams[part][first : first + self._row_length].astype(np.int32), 1)


class Corpus(Sequence):
    """The documents of token shards, or those of one side of a split: stands where `Records` of text do.

    Attributes:
      parts: one `Corpus` a source (itself alone for a single source).
      weight: the `@WEIGHT` of a single source, None without one.
      skipped: bad records that the build left out, see `Records`.
      left_out: reason -> number of good ones that are not among these.
    """

    def __init__(self, name: str, found: Found, weight: float | None = None):
        self.name, self._found, self.weight = name, found, weight
        self.parts: tuple[Corpus, ...] = (self,)
        self.skipped, self.left_out = found.skipped, {}
        self._files = Files()
        self._side: tuple = ()
        self._runs = [np.array([[0, shard.tokens]], np.int64) for shard in found.shards]
        self._length = sum(shard.documents for shard in found.shards)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> schema.Record:
        raise ValueError(f"tokens:{self.name} has ids to train on, and no texts: name the text itself here, jsonl:GLOB")

    def origin(self, index: int) -> str:
        """What an error is about."""
        return f"tokens:{self.name}"

    def stream(self, text_hash: str) -> Stream:
        """The ids of all documents.

        Args:
          text_hash: of the tokenizer that they must be of.

        Raises:
          ValueError: they are of another one.
        """
        found = self._found
        if found.tokenizer != text_hash:
            raise ValueError(
                f"tokens:{self.name} must be of the run's tokenizer {text_hash[:12]}, got shards of "
                f"{shards.told(found)}: build them again with that --tokenizer"
            )
        identity = (shards.FORMAT, found.tokenizer, tuple(shard.checksum for shard in found.shards), self._side)
        return Stream(found, self._runs, identity, self._files)

    def split(self, is_valid: Callable[[np.ndarray], np.ndarray], share: float) -> tuple["Corpus", "Corpus"]:
        """Training and validation documents of a whole corpus, see `datasets.split`; the lists of documents are read
        shard by shard.

        Args:
          is_valid: places (documents,) uint64 -> which of them are in the validation part, (documents,) bool.
          share: of that part, for the identity.
        """
        both = self._seen_in_training(is_valid) if self._found.users else np.zeros(0, np.uint64)
        runs, counts, lost = ([], []), np.zeros((len(self._found.shards), 2), np.int64), 0
        for number, documents in enumerate(self._documents()):
            valid = is_valid(documents["place"])
            held_out = valid & ~np.isin(documents["about"], both) if len(both) else valid
            ends = np.cumsum(documents["length"], dtype=np.int64)
            for side, keep in enumerate((~valid, held_out)):
                runs[side].append(_runs(keep, ends))
                counts[number, side] = keep.sum()
            lost += int(valid.sum() - held_out.sum())
        train, valid = (self._of(runs[side], counts[:, side], (name, share)) for side, name in enumerate(("-", "+")))
        valid.left_out = {"prompt that is in training too, by another user": lost} if lost else {}
        return train, valid

    def none(self) -> "Corpus":
        """None of the documents."""
        count = len(self._found.shards)
        return self._of([np.zeros((0, 2), np.int64)] * count, np.zeros(count, np.int64), ("none",))

    def _of(self, runs: list[np.ndarray], counts: np.ndarray, side: tuple) -> "Corpus":
        """Some of the documents: the runs and the number of them in each shard."""
        made = Corpus(self.name, self._found, self.weight)
        made._runs, made._length, made._side, made._files = runs, int(counts.sum()), side, self._files
        if len(self.parts) > 1:
            parts, first = [], 0
            for part in self.parts:
                here = slice(first, first := first + len(part._found.shards))
                parts.append(part._of(runs[here], counts[here], side))
            made.parts = tuple(parts)
        return made

    def _documents(self) -> Iterator[np.ndarray]:
        """The entries of each shard's documents, a few shards at once, since each may be a request."""
        found = self._found.shards
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for first in range(0, len(found), _AT_ONCE):
                yield from pool.map(self._files.documents, found[first : first + _AT_ONCE])

    def _seen_in_training(self, is_valid: Callable) -> np.ndarray:
        """What validation documents are `about` that training documents are about too, sorted."""
        about = [documents["about"][is_valid(documents["place"])] for documents in self._documents()]
        about = np.unique(np.concatenate(about))
        seen = np.zeros(len(about), bool)
        for documents in self._documents():
            seen |= np.isin(about, documents["about"][~is_valid(documents["place"])])
        return about[seen]


def _runs(keep: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The longest runs of documents that are kept, (runs, 2) int64 ids, given where each document ends."""
    edges = np.flatnonzero(np.diff(keep, prepend=False, append=False))
    return np.concatenate([[0], ends])[edges].reshape(-1, 2)


def load(sources: Sequence[tuple[str, float | None]]) -> Corpus:
    """The documents of all sources, one source after another.

    Args:
      sources: (pattern, weight) of each.
    Raises:
      ValueError: see `shards.find`.
    """
    parts = [Corpus(pattern, shards.find(pattern), weight) for pattern, weight in sources]
    if len(parts) == 1:
        return parts[0]
    whole = Corpus(" and ".join(part.name for part in parts), shards.joined([part._found for part in parts]))
    whole.parts = tuple(parts)
    return whole
