"""Records at random access: where they stand, which source they are of, and what splits go by."""

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instructgpt_jax import splits
from instructgpt_jax.data.schema import ASSISTANT, Record


class Records(Sequence):
    """Random access to the valid records of one or several sources.

    Attributes:
      parts: one `Records` a source (itself alone for a single source).
      weight: the `@WEIGHT` of a single source, None without one.
      skipped: "file:line: reason" of each bad record that `skip_bad` let pass.
      left_out: reason -> number of good records that are not among these.
    """

    def __init__(
        self,
        length: int,
        get: Callable[[int], Record],
        origin: Callable[[int], str],
        keys: np.ndarray | None = None,
    ):
        self._length, self._get, self._origin, self._keys = length, get, origin, keys
        self.parts: tuple[Records, ...] = (self,)
        self.weight: float | None = None
        self.skipped: tuple[str, ...] = ()
        self.left_out: dict[str, int] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return self._get(self._checked(index))

    def origin(self, index: int) -> str:
        """Where record `index` stands: "file:line", or "source[index]" where there are no lines."""
        return self._origin(self._checked(index))

    @property
    def keys(self) -> np.ndarray:
        """(records, 2) uint64, `keys_of` each; noted when the records were read first, where all of them were."""
        if self._keys is None:
            self._keys = np.array([keys_of(record) for record in self], np.uint64).reshape(-1, 2)
        return self._keys

    def subset(self, keep: np.ndarray) -> "Records":
        """The records where `keep` (one bool a record) is true, in their order; their parts are cut likewise."""
        numbers = np.flatnonzero(keep)
        keys = None if self._keys is None else self._keys[numbers]
        chosen = Records(len(numbers), lambda i: self[numbers[i]], lambda i: self.origin(numbers[i]), keys)
        chosen.weight, chosen.skipped, chosen.left_out = self.weight, self.skipped, self.left_out
        if len(self.parts) > 1:
            cuts = np.cumsum([len(part) for part in self.parts])[:-1]
            chosen.parts = tuple(part.subset(here) for part, here in zip(self.parts, np.split(keep, cuts), strict=True))
        return chosen

    def _checked(self, index: int) -> int:
        index = int(index)
        if not -self._length <= index < self._length:
            raise IndexError(f"record index must be below {self._length}, got {index}")
        return index % self._length


def concatenate(parts: Sequence[Records]) -> Records:
    """The records of several sources, one source after another."""
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

    noted = all(part._keys is not None for part in parts)
    records = Records(starts[-1], get, origin, np.concatenate([part.keys for part in parts]) if noted else None)
    records.parts = tuple(parts)
    records.skipped = tuple(line for part in parts for line in part.skipped)
    for part in parts:
        for why, count in part.left_out.items():
            records.left_out[why] = records.left_out.get(why, 0) + count
    return records


def about(record: Record) -> str:
    """What a record is chosen and split by: its prompt, the opening of its messages, its text, or its instruction.

    The opening is what stands before the assistant's first turn, so that a dialogue, its parts and other ways that it
    went on are together. That of a user's single message is its text, as if it were a prompt.
    """
    prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(prompt, str):
        return prompt
    if isinstance(messages, list) and all(map(_is_message, messages)):  # a text may carry anything under these names
        return _opening(messages)
    return record["text"] if "text" in record else record["instruction"]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(field), str) for field in ("role", "content"))


def _opening(messages: list[dict]) -> str:
    before = itertools.takewhile(lambda message: message["role"] != ASSISTANT, messages)
    turns = [(message["role"], message["content"]) for message in before if message["content"]]
    return turns[0][1] if [role for role, _ in turns] == ["user"] else json.dumps(turns)


def keys_of(record: Record) -> tuple[int, int]:
    """64 bits each: the place of its user in the validation split, and a hash of what it is `about`.

    A record without a user has the place of what it is about.
    """
    text = about(record)
    place = splits.place_of({"user": record.get("user"), "prompt": text}, "instructgpt_jax")
    return place, int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
