"""Packed rows against plain references: nothing lost, nothing doubled, nothing seen that should not be."""

import collections

import numpy as np
import pytest

from instructgpt_jax.data import packing
from instructgpt_jax.data.packing import Comparison, Example

# Prompt lengths of the paper's table 9: mean, 25 %, 50 %, 75 %, and the largest.
TABLE_9 = {"sft": (408, 37, 283, 632, 2048), "reward": (199, 20, 64, 203, 2032), "ppo": (166, 19, 62, 179, 2044)}


def table_9_lengths(name, count, rng):
    """Lengths with the quartiles, the maximum and the mean of table 9: linear between quartiles, a power law above."""
    mean, q1, q2, q3, largest = TABLE_9[name]
    tail = 4 * mean - (1 + q1) / 2 - (q1 + q2) / 2 - (q2 + q3) / 2  # mean of the last quarter
    power = (largest - q3) / (tail - q3) - 1
    u = rng.uniform(size=count)
    below = np.interp(u, [0, 0.25, 0.5, 0.75], [1, q1, q2, q3])
    above = q3 + (largest - q3) * np.clip(4 * u - 3, 0, 1) ** power
    return np.where(u < 0.75, below, above).astype(int)


def test_the_fitted_lengths_have_the_paper_s_statistics():
    lengths = table_9_lengths("sft", 200_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(408, rel=0.01)
    assert lengths.std() == pytest.approx(433, rel=0.1)
    np.testing.assert_allclose(np.percentile(lengths, [25, 50, 75]), [37, 283, 632], rtol=0.03)


@pytest.mark.parametrize("name", TABLE_9)
def test_first_fit_fills_95_percent_of_a_stream(name):
    lengths = table_9_lengths(name, 5_000, np.random.default_rng(1))
    rows = list(packing.first_fit(lengths, 2048, window=64))
    assert sorted(number for row in rows for number in row) == list(range(5_000))
    fill = np.array([lengths[row].sum() / 2048 for row in rows])
    assert fill.max() <= 1
    assert fill.mean() >= 0.95


def test_first_fit_by_hand():
    # 6 and 5 open rows 0 and 1, 4 and 3 join them; 8 finds the window full, so the fullest row leaves first.
    rows = packing.first_fit([6, 5, 4, 3, 8], 10, window=2)
    assert list(rows) == [[0, 2], [1, 3], [4]]
    assert list(packing.first_fit([6, 5, 4, 3, 8, 2], 10, window=9)) == [[0, 2], [1, 3, 5], [4]]
    assert list(packing.first_fit([3, 8, 9], 10, window=2)) == [[1], [0], [2]]  # the fullest is not the oldest
    assert list(packing.first_fit([], 10, window=9)) == []


@pytest.mark.parametrize("length", [0, 11])
def test_first_fit_refuses_lengths_outside_the_row(length):
    with pytest.raises(ValueError, match=f"sequence 1 must have 1 to row_length=10 tokens, got {length}"):
        list(packing.first_fit([3, length], 10, window=4))


def test_first_fit_decreasing_equals_a_plain_loop():
    rng = np.random.default_rng(2)
    for _ in range(50):
        lengths = np.sort(rng.integers(1, 21, rng.integers(1, 40)))[::-1]
        bins = []
        for number, length in enumerate(lengths):
            for candidate in bins:
                if sum(lengths[i] for i in candidate) + length <= 20:
                    candidate.append(number)
                    break
            else:
                bins.append([number])
        assert list(packing.first_fit(lengths, 20, window=len(lengths))) == bins


def random_examples(rng, count, longest):
    examples = []
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        examples.append(Example(rng.integers(1, 99, length).astype(np.int32), int(rng.integers(1, length))))
    return examples


def unpack(batch):
    """(tokens, loss mask) of every segment of a supervised batch, as tuples; checks what holds for every row."""
    found = []
    for tokens, positions, segments, mask in zip(
        *(batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "positions", "segments", "loss_mask")),
        strict=True,
    ):
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all()  # the padding is at the end
        assert not tokens[used:].any() and not positions[used:].any() and not mask[used:].any()
        assert list(dict.fromkeys(segments[:used])) == list(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            found.append((tuple(tokens[here]), tuple(mask[here])))
    return found


def test_examples_come_back_from_the_rows():
    rng = np.random.default_rng(3)
    for _ in range(30):
        examples = random_examples(rng, int(rng.integers(0, 25)), 16)
        rows = int(rng.integers(1, 6))
        batch = packing.pack_examples(examples, 16, packing.num_microbatches(25, rows), rows)
        wanted = [(tuple(e.tokens), tuple(int(i >= e.loss_from) for i in range(len(e.tokens)))) for e in examples]
        assert collections.Counter(unpack(batch)) == collections.Counter(wanted)
        used = batch["segments"].any(-1).reshape(-1)
        assert not np.any(np.diff(used.astype(int)) > 0)  # non-empty rows first
        assert all(array.shape == (packing.num_microbatches(25, rows), rows, 16) for array in batch.values())
        assert all(array.dtype == np.int32 for array in batch.values())


def test_longer_examples_are_placed_first_and_keep_their_kind():
    """4, 6, 5 and 5 tokens fill two rows of 10 only if 6 goes first."""
    examples = [Example(np.arange(1, n + 1), 2, kind) for n, kind in ((4, 1), (6, 2), (5, 1), (5, 2))]
    batch = packing.pack_examples(examples, 10, 4, 1)
    assert batch["segments"][2:].max() == 0
    assert batch["loss_mask"][0].tolist() == [[0, 0, 2, 2, 2, 2, 0, 0, 1, 1]]


def test_the_worst_case_of_examples_fits():
    examples = [Example(np.ones(8, np.int32), 1)] * 10
    batch = packing.pack_examples(examples, 8, packing.num_microbatches(10, 4), 4)
    assert batch["segments"].any(-1).sum() == 10 and batch["segments"].shape[:2] == (3, 4)


def test_a_first_token_is_never_a_loss_token():
    with pytest.raises(ValueError, match="loss_from must be at least 1"):
        packing.pack_examples([Example(np.ones(4, np.int32), 0)], 8, 1, 1)


def random_comparison(rng, longest_prompt, longest_completion, k):
    prompt = rng.integers(1, 99, rng.integers(1, longest_prompt + 1)).astype(np.int32)
    completions = [rng.integers(1, 99, rng.integers(1, longest_completion + 1)).astype(np.int32) for _ in range(k)]
    return Comparison(prompt, completions, rng.integers(1, k + 1, k).tolist(), int(rng.integers(-1, 3)))


def unpack_comparisons(batch, shared_prompt, first_row):
    """Every comparison as its completions' full sequences, read the way attention sees them from the last token."""
    found = []
    for m, slot in zip(*np.nonzero(batch["ranks"].any(-1)), strict=True):
        sequences = []
        for k in np.flatnonzero(batch["ranks"][m, slot]):
            row, column = batch["ends"][m, slot, k] - (first_row, 0)
            visible = batch["segments"][m, row] == batch["segments"][m, row, column]
            visible &= np.arange(visible.size) <= column
            if shared_prompt:
                branches = batch["branches"][m, row]
                assert branches[column] == k + 1
                visible &= (branches == 0) | (branches == branches[column])
            np.testing.assert_array_equal(batch["positions"][m, row][visible], np.arange(visible.sum()))
            sequences.append(tuple(batch["tokens"][m, row][visible]))
        ranks = batch["ranks"][m, slot]
        found.append((tuple(sequences), tuple(ranks[ranks > 0]), int(batch["groups"][m, slot])))
    return found


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_comparisons_come_back_from_the_rows(shared_prompt):
    rng = np.random.default_rng(4)
    for _ in range(40):
        count, rows = int(rng.integers(1, 9)), int(rng.integers(5, 8))
        comparisons = [random_comparison(rng, 10, 14, int(rng.integers(2, 6))) for _ in range(count)]
        microbatches = packing.num_comparison_microbatches(count, rows, 5)
        batch = packing.pack_comparisons(
            comparisons, 24, microbatches, rows, slots=8, max_completions=5, shared_prompt=shared_prompt, first_row=14
        )
        wanted = [
            (tuple(tuple(np.concatenate([c.prompt, x])) for x in c.completions), tuple(c.ranks), c.group)
            for c in comparisons
        ]
        found = unpack_comparisons(batch, shared_prompt, 14)
        assert collections.Counter(found) == collections.Counter(wanted)
        used = batch["segments"].any((1, 2))
        assert not np.any(np.diff(used.astype(int)) > 0)  # non-empty microbatches first
        assert ("branches" in batch) == shared_prompt


def test_shared_prompt_stores_it_once_where_the_row_allows():
    prompt, short, long = np.arange(1, 6, dtype=np.int32), np.full(2, 7, np.int32), np.full(9, 8, np.int32)
    for completions, copies in (([short, short, short], 1), ([long, long, short], 2)):
        batch = packing.pack_comparisons(
            [Comparison(prompt, completions, [1, 2, 3], -1)], 16, 1, 2, 2, 3, shared_prompt=True, first_row=0
        )
        assert int((batch["tokens"] == 1).sum()) == copies


def test_one_comparison_by_hand():
    comparison = Comparison(np.array([5, 6]), [np.array([7]), np.array([8, 9])], [2, 1], 3)
    batch = packing.pack_comparisons([comparison], 8, 1, 1, 1, 3, shared_prompt=True, first_row=4)
    assert batch["tokens"][0, 0].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch["positions"][0, 0].tolist() == [0, 1, 2, 2, 3, 0, 0, 0]
    assert batch["segments"][0, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert batch["branches"][0, 0].tolist() == [0, 0, 1, 2, 2, 0, 0, 0]
    assert batch["ends"][0, 0].tolist() == [[4, 2], [4, 4], [0, 0]]
    assert batch["ranks"][0, 0].tolist() == [2, 1, 0] and batch["groups"][0, 0] == 3


def test_comparisons_of_the_worst_case_fit():
    """Every completion needs a row of its own, for every number of rows that can hold one comparison."""
    for k in (2, 4, 9):
        for rows in range(k, 3 * k):
            full = Comparison(np.ones(2, np.int32), [np.ones(6, np.int32)] * k, list(range(1, k + 1)), -1)
            pair = Comparison(np.ones(2, np.int32), [np.ones(6, np.int32)] * 2, [1, 2], -1)
            mixed = [full, pair] * 6
            microbatches = packing.num_comparison_microbatches(12, rows, k)
            batch = packing.pack_comparisons(mixed, 8, microbatches, rows, 12, k, shared_prompt=True, first_row=0)
            assert batch["segments"].any(-1).sum() == 6 * (k + 2)


def test_a_comparison_larger_than_a_microbatch_is_refused():
    comparison = Comparison(np.ones(2, np.int32), [np.ones(6, np.int32)] * 3, [1, 2, 3], -1)
    assert packing.rows_of_comparison(2, [6, 6, 6], 8, shared_prompt=True) == 3
    with pytest.raises(ValueError, match="microbatch_rows must .* the 3 rows of 8 tokens .* got 2"):
        packing.pack_comparisons([comparison], 8, 1, 2, 2, 3, shared_prompt=True, first_row=0)


def test_split_comparison_by_hand():
    assert packing.split_comparison(4, [3, 3, 3], 13, shared_prompt=True) == [[0, 1, 2]]
    assert packing.split_comparison(4, [3, 3, 3], 12, shared_prompt=True) == [[0, 1], [2]]
    assert packing.split_comparison(4, [3, 8, 3], 12, shared_prompt=True) == [[1], [0, 2]]
    assert packing.split_comparison(4, [3, 8, 4], 99, shared_prompt=False) == [[1], [2], [0]]
    assert packing.rows_of_comparison(4, [3, 8, 4], 16, shared_prompt=False) == 2
