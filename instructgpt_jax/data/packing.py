"""Sequences into packed rows: several sequences share a row of fixed length, and a batch is a fixed number of rows.

Pure numpy on the host. The arrays of a batch are those every stage trains on, all int32 (M microbatches, B rows of a
microbatch, T columns of a row):

* `tokens`, `positions`, `segments` (M, B, T): segments count 1, 2, … within a row, 0 is the empty rest of it, where the
  other two are 0 as well; positions restart at 0 in each segment.
* `loss_mask` (M, B, T): above 0 on a token to be predicted from the column before it, never on a segment's first: the
  `kind` of its example, 1 unless two kinds are mixed.
* comparisons only: `branches` (M, B, T), `ends` (M, G, K, 2), `ranks` (M, G, K), `groups` (M, G), see
  `pack_comparisons`.

Shapes do not depend on the data: M has room for the worst case (`num_microbatches`, `num_comparison_microbatches`), and
non-empty rows come first, so that a loop over microbatches may stop at the first empty one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_BRANCHES = 2**16 - 1  # of a segment: attention may hold their numbers in 16 bits, see models/attention.py


class Example(NamedTuple):
    """One sequence of a supervised batch."""

    tokens: np.ndarray  # (length,) int32
    loss_from: int  # the first column of the sequence that is a loss token, at least 1
    kind: int = 1  # what `loss_mask` holds on its loss tokens

    @property
    def loss(self) -> np.ndarray:
        """(length,) bool, the loss tokens."""
        return np.arange(len(self.tokens)) >= self.loss_from


class Dialogue(NamedTuple):
    """One sequence of a supervised batch with several turns to learn from."""

    tokens: np.ndarray  # (length,) int32
    loss: np.ndarray  # (length,) bool, the loss tokens; never the first
    kind: int = 1  # what `loss_mask` holds on its loss tokens


class Comparison(NamedTuple):
    """One prompt with its K ranked completions."""

    prompt: np.ndarray  # (length,) int32, at least one token
    completions: Sequence[np.ndarray]  # K of (length,) int32, at least one token each, EOS behind those that ended
    ranks: Sequence[int]  # K, 1 = best, ties equal
    group: int  # labeler group, -1 = unknown


def first_fit(lengths: Iterable[int], row_length: int, window: int) -> Iterator[list[int]]:
    """Packs sequences into rows, each into the first open row that has room; at most `window` rows are open at once.

    With a window it packs an endless stream batched by rows: when no open row has room, the fullest is given out and a
    new one opened. Sorted by falling length and with `window` as large as the list it is first-fit decreasing.

    Args:
      lengths: tokens of each sequence, at most `row_length`.
      row_length: columns of a row.
      window: number of open rows, at least 1.
    Yields:
      the sequence numbers of one row, in the order of arrival.
    """
    free, rows = np.zeros(window, np.int64), []  # a row that is not open has no room
    for number, length in enumerate(lengths):
        if not 0 < length <= row_length:
            raise ValueError(f"sequence {number} must have 1 to row_length={row_length} tokens, got {length}")
        row = int(np.argmax(free >= length))
        if free[row] < length:
            if len(rows) == window:
                fullest = int(np.argmin(free))
                free[fullest:-1] = free[fullest + 1 :]
                yield rows.pop(fullest)
            row = len(rows)
            free[row] = row_length
            rows.append([])
        free[row] -= length
        rows[row].append(number)
    yield from rows


def num_microbatches(examples: int, rows: int) -> int:
    """Microbatches of `rows` rows that hold any `examples` sequences, each of which fits a row: one row for each."""
    return -(-examples // rows)


def num_comparison_microbatches(examples: int, rows: int, max_completions: int) -> int:
    """Microbatches of `rows` rows that hold any `examples` comparisons, placed first-fit and each in one microbatch.

    A comparison takes at most K = `max_completions` rows. It passes a microbatch by only when that has fewer than K
    empty rows, that is at least rows - K + 1 used ones; and each microbatch in use holds at least one comparison.
    """
    if rows < max_completions:
        return examples
    return min(examples, -(-examples * max_completions // (rows - max_completions + 1)))


def pack_examples(
    examples: Sequence[Example | Dialogue], row_length: int, microbatches: int, rows: int
) -> dict[str, np.ndarray]:
    """Packs sequences by first-fit decreasing.

    Args:
      examples: at most microbatches × rows sequences of at most `row_length` tokens.
      row_length: T.
      microbatches: M.
      rows: B.
    Returns:
      `tokens`, `positions`, `segments`, `loss_mask`, each (M, B, T) int32.
    """
    flat = _empty(("tokens", "positions", "segments", "loss_mask"), microbatches * rows, row_length)
    examples = sorted(examples, key=lambda example: -len(example.tokens))  # stable: equal lengths keep their order
    packed = first_fit((len(example.tokens) for example in examples), row_length, max(1, len(examples)))
    for row, numbers in enumerate(packed):
        column = 0
        for segment, number in enumerate(numbers, 1):
            example = examples[number]
            tokens, loss = example.tokens, example.loss
            if loss[0]:
                raise ValueError("loss_from must be at least 1 (nothing predicts a first token), got 0")
            here = slice(column, column + len(tokens))
            flat["tokens"][row, here] = tokens
            flat["positions"][row, here] = np.arange(len(tokens))
            flat["segments"][row, here] = segment
            flat["loss_mask"][row, here] = loss * example.kind
            column = here.stop
    return {name: array.reshape(microbatches, rows, row_length) for name, array in flat.items()}


def split_comparison(prompt: int, completions: Sequence[int], row_length: int, shared_prompt: bool) -> list[list[int]]:
    """The segments of a comparison: which completions stand together behind one copy of the prompt.

    Args:
      prompt, completions: lengths in tokens; the prompt with any one of the completions fits a row.
      row_length: T.
      shared_prompt: False gives each completion a segment of its own.
    Returns:
      lists of completion numbers, the longest segment first. A comparison that fits one row is one segment.
    """
    if shared_prompt and prompt + sum(completions) <= row_length:
        return [list(range(len(completions)))]
    order = sorted(range(len(completions)), key=lambda k: -completions[k])
    if shared_prompt:
        lengths = [completions[k] for k in order]
        pieces = [sorted(order[i] for i in row) for row in first_fit(lengths, row_length - prompt, len(order))]
        return sorted(pieces, key=lambda piece: -sum(completions[k] for k in piece))
    return [[k] for k in order]


def rows_of_comparison(prompt: int, completions: Sequence[int], row_length: int, shared_prompt: bool) -> int:
    """How many empty rows a comparison takes, lengths as in `split_comparison`."""
    pieces = split_comparison(prompt, completions, row_length, shared_prompt)
    lengths = [prompt + sum(completions[k] for k in piece) for piece in pieces]
    return sum(1 for _ in first_fit(lengths, row_length, len(lengths)))


def pack_comparisons(
    comparisons: Sequence[Comparison],
    row_length: int,
    microbatches: int,
    rows: int,
    slots: int,
    max_completions: int,
    shared_prompt: bool,
    first_row: int,
) -> dict[str, np.ndarray]:
    """Packs comparisons so that all rows of each lie in one microbatch, larger comparisons first.

    A segment is one prompt followed by its completions, each of which sees the prompt and itself: `branches` is 0 on
    the prompt and k + 1 on completion k, whose positions continue from the prompt's length. A comparison longer than a
    row is split into several segments that repeat the prompt. With `shared_prompt=False` every completion is a segment
    of its own and there are no `branches`.

    Args:
      comparisons: each takes at most `rows` rows (`rows_of_comparison`) and has at most `max_completions` completions.
      row_length: T.
      microbatches: M, from `num_comparison_microbatches`.
      rows: B, rows of a microbatch packed here (one process's slice).
      slots: G, room for the comparisons of a microbatch.
      max_completions: K, at most `MAX_BRANCHES` with a shared prompt.
      shared_prompt: the encoding.
      first_row: number within the global microbatch of the first row packed here.
    Returns:
      `tokens`, `positions`, `segments` and, with a shared prompt, `branches`, each (M, B, T) int32;
      `ends` (M, G, K, 2) int32, (row within the global microbatch, column) of each completion's last token;
      `ranks` (M, G, K) int32, 0 where there is no completion; `groups` (M, G) int32, -1 where unknown or empty.
    Raises:
      ValueError: a comparison that no microbatch can hold; names `microbatch_rows` and both numbers.
    """
    names = ("tokens", "positions", "segments") + (("branches",) if shared_prompt else ())
    flat = _empty(names, microbatches * rows, row_length)
    ends = np.zeros((microbatches, slots, max_completions, 2), np.int32)
    ranks = np.zeros((microbatches, slots, max_completions), np.int32)
    groups = np.full((microbatches, slots), -1, np.int32)
    free = np.full((microbatches, rows), row_length)
    segments = np.zeros(microbatches * rows, np.int32)
    used = [0] * microbatches

    for comparison in sorted(comparisons, key=lambda c: -(len(c.prompt) + sum(map(len, c.completions)))):
        prompt, completions = comparison.prompt, comparison.completions
        pieces = split_comparison(len(prompt), [len(c) for c in completions], row_length, shared_prompt)
        lengths = [len(prompt) + sum(len(completions[k]) for k in piece) for piece in pieces]
        microbatch, places = _place(lengths, free)
        if places is None:
            needed = sum(1 for _ in first_fit(lengths, row_length, len(lengths)))
            raise ValueError(
                f"microbatch_rows must give a process at least the {needed} rows of {row_length} tokens that one "
                f"comparison takes, got {rows}"
            )
        slot, used[microbatch] = used[microbatch], used[microbatch] + 1
        groups[microbatch, slot] = comparison.group
        ranks[microbatch, slot, : len(completions)] = comparison.ranks
        for piece, length, row in zip(pieces, lengths, places, strict=True):
            at = microbatch * rows + row
            column = row_length - free[microbatch, row]
            free[microbatch, row] -= length
            segments[at] += 1
            flat["segments"][at, column : column + length] = segments[at]
            flat["tokens"][at, column : column + len(prompt)] = prompt
            flat["positions"][at, column : column + len(prompt)] = np.arange(len(prompt))
            column += len(prompt)
            for k in piece:
                here = slice(column, column + len(completions[k]))
                flat["tokens"][at, here] = completions[k]
                flat["positions"][at, here] = np.arange(len(prompt), len(prompt) + len(completions[k]))
                if shared_prompt:
                    flat["branches"][at, here] = k + 1
                column = here.stop
                ends[microbatch, slot, k] = first_row + row, column - 1
    batch = {name: array.reshape(microbatches, rows, row_length) for name, array in flat.items()}
    return batch | {"ends": ends, "ranks": ranks, "groups": groups}


def _place(lengths: Sequence[int], free: np.ndarray) -> tuple[int, list[int] | None]:
    """The first microbatch with room for segments of these lengths, and the row of each; None when no one has."""
    for microbatch in range(len(free)):
        room = free[microbatch].copy()
        places = []
        for length in lengths:
            row = int(np.argmax(room >= length))
            if room[row] < length:
                break
            room[row] -= length
            places.append(row)
        if len(places) == len(lengths):
            return microbatch, places
    return -1, None


def _empty(names: Sequence[str], rows: int, row_length: int) -> dict[str, np.ndarray]:
    return {name: np.zeros((rows, row_length), np.int32) for name in names}
