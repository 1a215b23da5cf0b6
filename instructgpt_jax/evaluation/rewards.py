"""How often a reward model puts two completions in the order in which a labeler put them."""

from collections.abc import Sequence

import numpy as np

from instructgpt_jax import reward_report
from instructgpt_jax.data import encoding
from instructgpt_jax.evaluation import statistics

ALL = "all"  # group of comparisons that carry none


def accuracy(records: Sequence[dict], scores: Sequence[float]) -> dict:
    """Accuracy on untied pairs by labeler group, and the calibration curve over all of them.

    Args:
      records: comparisons, `completions` and `ranking`, perhaps `group`.
      scores: of their completions, one record after another.

    Returns:
      `accuracy`: group -> interval, the prompts being the sample; `calibration`: see reward_report.calibration.
    """
    K = max(len(record["completions"]) for record in records)
    table, ranks = np.zeros((len(records), K)), np.zeros((len(records), K), np.int32)
    start = 0
    for row, record in enumerate(records):
        count = len(record["completions"])
        table[row, :count], ranks[row, :count] = scores[start : start + count], record["ranking"]
        start += count
    better = (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None, :])  # (P, K, K): i ranks above j
    margin = table[:, :, None] - table[:, None, :]
    right, pairs = (better & (margin > 0)).sum(axis=(1, 2)), better.sum(axis=(1, 2))  # (P,)
    groups = np.array([encoding.group_name(record) or ALL for record in records])
    found = {group: statistics.ratio_interval(right[groups == group], pairs[groups == group]) for group in set(groups)}
    return {
        "accuracy": {str(group): found[group] for group in sorted(found) if found[group]},
        "calibration": reward_report.calibration(margin[better]),
    }
