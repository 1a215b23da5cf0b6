"""What prompt sets hold, in the form of the paper's tables 6 and 8 to 11 (appendix A), as pure functions of records."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instructgpt_jax.data import chats

Record = dict[str, Any]
CountTokens = Callable[[list[str]], Sequence[int]]


def tables(splits: dict[str, Sequence[Record]], demonstrations: Sequence[Record], count_tokens: CountTokens) -> dict:
    """All of them.

    Args:
      splits: the prompts of each split; `user`, `use_case` and `source` of a record count where it has them.
      demonstrations: records with `prompt` and `completion`.
      count_tokens: lengths in tokens of a list of texts.

    Returns:
      `sizes` (table 6: split -> source -> prompts), `prompts_per_user` (table 8: split -> mean), `lengths` (table 9, by
      split), `lengths_by_use_case` (table 10), `lengths_of_demonstrations` (table 11: prompt and demonstration by
      source). A length is described as `described` has it. Without a field there is no row of it.
    """
    everything = [record for split in splits.values() for record in split]
    lengths = {name: _prompt_lengths(split, count_tokens) for name, split in splits.items()}
    flat = [length for split in lengths.values() for length in split]
    return {
        "sizes": {name: _counts(split, "source") | {"total": len(split)} for name, split in splits.items()},
        "prompts_per_user": {name: mean for name, split in splits.items() if (mean := _per_user(split))},
        "lengths": {name: described(split) for name, split in lengths.items() if split},
        "lengths_by_use_case": _by(everything, "use_case", flat),
        "lengths_of_demonstrations": {
            "prompt": _by(demonstrations, "source", _prompt_lengths(demonstrations, count_tokens)),
            "demonstration": _by(
                demonstrations, "source", count_tokens([record["completion"] for record in demonstrations])
            ),
        },
    }


def described(lengths: Sequence[int]) -> dict[str, float]:
    """Count, mean, standard deviation (over n), min, quartiles and max, as tables 9 to 11 have them."""
    values = np.asarray(lengths, np.float64)
    quartiles = np.percentile(values, (25, 50, 75))
    found = {"count": values.size, "mean": values.mean(), "std": values.std(), "min": values.min()}
    found |= dict(zip(("25%", "50%", "75%"), quartiles, strict=True)) | {"max": values.max()}
    return {name: round(float(value), 2) for name, value in found.items()}


def _prompt_lengths(records: Sequence[Record], count_tokens: CountTokens) -> Sequence[int]:
    return count_tokens([chats.named(record) for record in records])


def _counts(records: Sequence[Record], field: str) -> dict[str, int]:
    return dict(collections.Counter(str(record[field]) for record in records if field in record).most_common())


def _per_user(records: Sequence[Record]) -> float | None:
    users = [str(record["user"]) for record in records if record.get("user") is not None]
    return round(len(users) / len(set(users)), 2) if users else None


def _by(records: Sequence[Record], field: str, lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """A description of the lengths for each value of a field, the most frequent first; "" = records without it."""
    grouped = collections.defaultdict(list)
    for record, length in zip(records, lengths, strict=True):
        grouped[str(record.get(field, ""))].append(length)
    return {value: described(grouped[value]) for value in sorted(grouped, key=lambda value: -len(grouped[value]))}
