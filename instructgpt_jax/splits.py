"""Which part of the data a record is in: keyed hashes, so that a record stays where it is when the data grow."""

import functools
import hashlib
from typing import Any


def split_of(record: dict[str, Any], split_key: str, valid_share: float, test_share: float) -> str:
    """'train', 'valid' or 'test': a keyed hash of the user, who so stays where they are when the data grow.

    A prompt without a user is its own user: equal prompts stay together. The shares are shares of users; a larger
    `valid_share` only moves users from train to valid.
    """
    place = place_of(record, split_key) / 2**64
    if place < test_share:
        return "test"
    return "valid" if place < test_share + valid_share else "train"


def place_of(record: dict[str, Any], split_key: str) -> int:
    """Where a record's user, or its prompt where it has none, stands between 0 and 2^64: see `split_of`."""
    user = record.get("user")
    name = f"prompt:{record['prompt']}" if user is None else f"user:{user}"
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=_hash_key(split_key)).digest()
    return int.from_bytes(digest, "big")


@functools.cache
def _hash_key(split_key: str) -> bytes:
    return hashlib.blake2b(split_key.encode()).digest()  # 64 bytes, the longest key BLAKE2b takes


def part_of(text: str, parts: int) -> int:
    """Which of the parts 1 to `parts` a text is in: what `#I/N` of a data source chooses by."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"parts of a source").digest()
    return int.from_bytes(digest, "big") % parts + 1
