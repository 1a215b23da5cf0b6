"""Intervals against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from instructgpt_jax.evaluation import curves, rewards, statistics


def close(found, mean, low, high, n):
    assert found == {"mean": pytest.approx(mean), "low": pytest.approx(low), "high": pytest.approx(high), "n": n}


def test_win_rate_counts_ties_half():
    # Mean 2.5/4; squared deviations 2 · 0.375² + 0.125² + 0.625² = 0.6875; standard error sqrt(0.6875 / 3 / 4).
    half = 1.959964 * math.sqrt(0.6875 / 12)
    close(statistics.win_rate([1, 0.5, 0, 1]), 0.625, 0.625 - half, 1.0, 4)  # a share is at most 1
    close(statistics.win_rate([0.5, 0.5]), 0.5, 0.5, 0.5, 2)  # a policy against itself
    with pytest.raises(ValueError, match="^outcomes must be from 0 to 1, got \\[1.3\\]"):
        statistics.win_rate([1.3])


def test_interval_of_a_share_is_wilsons():
    close(statistics.interval([1, 1, 1, 0]), 0.75, 0.300642, 0.954413, 4)  # the textbook's 3 of 4
    none = statistics.interval([0] * 20)
    close(none, 0.0, 0.0, 1.959964**2 / (20 + 1.959964**2), 20)  # not empty where nothing was seen
    assert all(statistics.interval([0] * n)["low"] == 0.0 for n in range(1, 50))  # never "-0 %"
    assert all(statistics.interval([1] * n)["high"] == 1.0 for n in range(1, 50))
    close(statistics.interval([True] * 20), 1.0, 1 - none["high"], 1.0, 20)
    assert statistics.interval([]) is None


def test_interval_of_a_mean():
    half = 1.959964 * math.sqrt(20 / 3 / 4)  # deviations -3, -1, 1, 3
    close(statistics.interval([1, 3, 5, 7]), 4.0, 4 - half, 4 + half, 4)
    close(statistics.interval([2.5]), 2.5, 2.5, 2.5, 1)


def test_interval_holds_its_promise():
    draw = np.random.default_rng(0)
    for make, true in ((lambda: draw.random(60) < 0.1, 0.1), (lambda: draw.normal(3, 2, 60), 3.0)):
        found = [statistics.interval(make()) for _ in range(1000)]
        assert 0.93 < np.mean([one["low"] <= true <= one["high"] for one in found]) < 0.97


def test_ratio_interval_takes_prompts_as_the_sample():
    # 1 of 2 and 3 of 4: ratio 4/6, residuals -1/3 and 1/3, standard error sqrt(2/9 · 2) / 6.
    half = 1.959964 * math.sqrt(4 / 9) / 6
    close(statistics.ratio_interval([1, 3], [2, 4]), 4 / 6, 4 / 6 - half, 4 / 6 + half, 2)
    close(statistics.ratio_interval([1, 3, 0], [2, 4, 0]), 4 / 6, 4 / 6 - half, 4 / 6 + half, 2)  # no pair, no prompt
    assert statistics.ratio_interval([0], [0]) is None
    # Every prompt's pairs agree among themselves: ten pairs a prompt say no more than one.
    rights = np.random.default_rng(1).random(200) < 0.7
    ten, one = statistics.ratio_interval(10 * rights, [10] * 200), statistics.interval(rights.astype(float) + 0.0)
    assert ten["high"] - ten["low"] == pytest.approx(one["high"] - one["low"], rel=0.03)


def test_answers_to_one_prompt_are_one_sample():
    values, prompts = [1, 0, 3, 4], ["a", "a", "b", "b"]  # prompt means 0.5 and 3.5
    half = 1.959964 * math.sqrt(2 * 1.5**2 / 2)
    close(statistics.interval(values, prompts), 2.0, 2 - half, 2 + half, 2)
    close(statistics.interval([1, 0, 1, 0], prompts), 0.5, 0.5, 0.5, 2)  # also where all are 0 or 1
    assert statistics.interval(values, ["a", "b", "c", "d"]) == statistics.interval(values)
    close(statistics.win_rate([1, 0.5, 0, 0.5], prompts), 0.5, 0.5 - half / 6, 0.5 + half / 6, 2)  # 0.75 and 0.25


def test_paired_difference():
    ours, theirs = [1.0, 2.0, 3.0], [0.5, 1.5, 2.5]
    close(statistics.paired_difference(ours, theirs, seed=0), 0.5, 0.5, 0.5, 3)
    draw = np.random.default_rng(2)
    base = draw.normal(0, 10, 400)  # what the prompts have in common does not widen the interval
    found = statistics.paired_difference(base + draw.normal(0.3, 1, 400), base, seed=0)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 20, rel=0.1)
    with pytest.raises(ValueError, match="value for each prompt, got \\(2,\\) and \\(3,\\)"):
        statistics.paired_difference([1, 2], theirs, 0)


def test_paired_difference_of_several_values_a_prompt():
    """The values of a prompt are drawn together: 100 prompts of 4 equal values say no more than 100 values."""
    values = np.random.default_rng(3).normal(0.2, 1, 100)
    prompts = [f"prompt {i}" for i in range(100) for _ in range(4)]
    found = statistics.paired_difference(np.repeat(values, 4), np.zeros(400), 0, prompts)
    close(found, values.mean(), found["low"], found["high"], 100)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)
    uneven = statistics.paired_difference([1, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1], 0, ["a", "a", "a", "b", "b", "c"])
    close(uneven, 1 / 6, -1, 2 / 3, 3)  # 2 of 6 less 1 of 6; c alone; a alone


def test_accuracy_by_group():
    records = [
        {"completions": ["a", "b", "c"], "ranking": [1, 2, 2], "group": "training"},  # 2 pairs, both right
        {"completions": ["a", "b"], "ranking": [2, 1], "group": "training"},  # wrong
        {"completions": ["a", "b"], "ranking": [1, 1], "group": "training"},  # tied: no pair
        {"completions": ["a", "b"], "ranking": [1, 2], "group": "heldout"},  # equal scores are an error
        {"completions": ["a", "b"], "ranking": [1, 2]},
    ]
    found = rewards.accuracy(records, [3.0, 1.0, 2.0, 5.0, 4.0, 0.0, 0.0, 7.0, 7.0, 2.0, 1.0])
    assert {group: (x["mean"], x["n"]) for group, x in found["accuracy"].items()} == {
        "all": (1.0, 1), "heldout": (0.0, 1), "training": (pytest.approx(2 / 3), 2),
    }  # fmt: skip
    assert sum(point["pairs"] for point in found["calibration"]) == 10  # five pairs, in both orders


def test_curves(tmp_path):
    lines = [
        {"step": 1, "sft/loss": 2.0, "perf/mfu": 0.1},
        {"step": 2, "sft/loss": None},
        {"step": 2, "sft/valid_loss": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves.read(tmp_path) == {"sft/loss": [[1, 2.0]], "sft/valid_loss": [[2, 1.5]]}
    with pytest.raises(ValueError, match="^config.evaluate.curves must name workdirs of finished stages, found no"):
        curves.read(tmp_path / "nothing")
