"""Training and validation records: a fixed split by who or what a record is about."""

import hashlib

import numpy as np

from instructgpt_jax.data import sources


def split(records: sources.Records, valid_fraction: float) -> tuple[sources.Records, sources.Records]:
    """Splits records into training and validation by a hash of the user, or of the prompt or text where there is none.

    All records of a user (or a prompt) are on one side, in every kind of data, and stay there when the data grow.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"config.data.valid_fraction must be in [0, 1), got {valid_fraction!r}")
    valid = np.array([_fraction(records[i]) < valid_fraction for i in range(len(records))], bool)
    return _subset(records, ~valid), _subset(records, valid)


def _fraction(record) -> float:
    """A number in [0, 1) that is a fixed function of who or what the record is about."""
    name = record.get("user")
    name = record.get("prompt", record.get("text")) if name is None else f"user {name}"
    return int.from_bytes(hashlib.sha256(f"valid|{name}".encode()).digest()[:8], "big") / 2**64


def _subset(records: sources.Records, keep: np.ndarray) -> sources.Records:
    def of(numbers, base):
        return sources.Records(len(numbers), lambda i: base[numbers[i]], lambda i: base.origin(numbers[i]))

    subset = of(np.flatnonzero(keep), records)
    parts, start = [], 0
    for part in records.parts:
        parts.append(of(np.flatnonzero(keep[start : start + len(part)]), part))
        parts[-1].weight = part.weight
        start += len(part)
    subset.parts, subset.skipped, subset.weight = tuple(parts), records.skipped, records.weight
    return subset
