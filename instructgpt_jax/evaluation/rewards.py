"""How well a reward model's scores agree with rankings: accuracy, loss, calibration. Plain numpy on the host."""

from collections.abc import Sequence

import numpy as np

from instructgpt_jax import losses
from instructgpt_jax.evaluation import agreement, statistics

BINS = 10  # of predicted probability, equally wide


def accuracy(records: Sequence[dict], scores: Sequence[float]) -> dict:
    """Accuracy on untied pairs by labeler group, and the calibration curve over all of them.

    Args:
      records: comparisons, `completions` and `ranking`, perhaps `group`.
      scores: of their completions, one record after another.

    Returns:
      `accuracy`: group -> interval, the prompts being the sample; `calibration`: see calibration.
    """
    table, ranks = tables(records, scores)
    better, margin = losses.ranked_above(ranks), margins(table)
    right, pairs = (better & (margin > 0)).sum(axis=(1, 2)), better.sum(axis=(1, 2))  # (P,)
    groups = np.array([agreement.group_of(record) for record in records])
    found = {group: statistics.ratio_interval(right[groups == group], pairs[groups == group]) for group in set(groups)}
    return {
        "accuracy": {str(group): found[group] for group in sorted(found) if found[group]},
        "calibration": calibration(margin[better]),
    }


def tables(records: Sequence[dict], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (P, K) float64 and ranks (P, K) int32 of comparisons, 0 where there is no completion; see accuracy."""
    K = max(len(record["completions"]) for record in records)
    table, ranks = np.zeros((len(records), K)), np.zeros((len(records), K), np.int32)
    start = 0
    for row, record in enumerate(records):
        count = len(record["completions"])
        table[row, :count], ranks[row, :count] = scores[start : start + count], record["ranking"]
        start += count
    return table, ranks


def margins(table: np.ndarray) -> np.ndarray:
    """(P, K, K): the score of completion i less that of completion j."""
    return table[:, :, None] - table[:, None, :]


def collect(scored: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores and ranks (M, G, K) and groups (M, G) of several batches as (P, K), (P, K), (P,), without empty slots."""
    scores, ranks, groups = (
        np.concatenate([arrays[n].reshape(-1, *arrays[n].shape[2:]) for arrays in scored]) for n in range(3)
    )
    used = ranks.any(axis=1)
    return scores[used], ranks[used], groups[used]


def summarise(
    scores: np.ndarray, ranks: np.ndarray, groups: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Agreement of scores with rankings. Tied completions make no pair; equal scores of an untied pair are an error.

    Args:
      scores: (P, K) float32 of K completions of each prompt.
      ranks: (P, K) int32, 1 = best, 0 = no completion.
      groups: (P,) int32, index into `names`, -1 = unknown.
      names: of the labeler groups.

    Returns:
      `loss` (mean over pairs, then prompts), `accuracy` (share of all pairs), `accuracy_k<K>` of the prompts with K
      completions, `accuracy_group_<name>` where groups are known, `prompts`, `pairs`, `calibration_error`; and the
      calibration curve. A share of no pairs is left out.
    """
    loss, _ = losses.ranking_loss(scores, ranks)
    better = losses.ranked_above(ranks)
    prompt, i, j = np.nonzero(better)
    margin = scores[prompt, i].astype(np.float64) - scores[prompt, j]
    correct = margin > 0
    completions, group = (ranks > 0).sum(axis=1)[prompt], groups[prompt]
    curve = calibration(margin)
    found = {"loss": float(loss), "prompts": float(len(ranks)), "pairs": float(len(margin))}
    if len(margin):
        found["accuracy"] = float(correct.mean())
        found["calibration_error"] = calibration_error(curve)
    for k in np.unique(completions):
        found[f"accuracy_k{k}"] = float(correct[completions == k].mean())
    for g in np.unique(group[group >= 0]):
        found[f"accuracy_group_{names[g]}"] = float(correct[group == g].mean())
    return found, curve


def calibration_error(curve: list[dict[str, float]]) -> float:
    """Mean distance of predicted and observed over the pairs of a calibration curve."""
    gaps = sum(b["pairs"] * abs(b["predicted"] - b["observed"]) for b in curve)
    return gaps / sum(b["pairs"] for b in curve)


def calibration(margin: np.ndarray) -> list[dict[str, float]]:
    """Predicted probability that the first of two completions is preferred, sigmoid(margin), against how often it was.

    Every pair counts in both orders, so that the curve does not hang on the order in which completions were stored; it
    is symmetric about (0.5, 0.5).

    Args:
      margin: score of the preferred completion less score of the other, of each untied pair.

    Returns:
      for each tenth of the range of probabilities that is not empty, `predicted` and `observed` (means) and `pairs`
      (both orders counted).
    """
    probability = 0.5 * (1 + np.tanh(np.concatenate([margin, -margin]) / 2))  # sigmoid without overflow
    preferred = np.repeat([1.0, 0.0], len(margin))
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    return [
        {
            "predicted": float(probability[bins == b].mean()),
            "observed": float(preferred[bins == b].mean()),
            "pairs": int((bins == b).sum()),
        }
        for b in np.unique(bins)
    ]
