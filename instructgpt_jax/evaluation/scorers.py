"""All that comparisons say of a scorer: a reward model, or a simple rule beside it. Plain numpy on the host.

A scorer is right about a pair where the completion that was ranked above the other has the higher score; equal scores
count half, since a rule such as "the longer one" has many. The prompts are the sample of every interval.
"""

import math
from collections.abc import Sequence

import numpy as np

from instructgpt_jax import losses
from instructgpt_jax.evaluation import baselines, rewards, statistics


def examine(records: Sequence[dict], scores: Sequence[float], best_of: Sequence[int]) -> dict:
    """Agreement of scores with rankings, in every respect that the comparisons allow.

    Args:
      records: comparisons, `completions` and `ranking`.
      scores: of their completions, one record after another.
      best_of: numbers of completions to choose the best of.

    Returns:
      `prompts`, and `pairs` that are not tied. `accuracy`: an interval, absent without such a pair. `by_k`: number of
      completions -> accuracy. `calibration` and `calibration_error`, see rewards.calibration. `ties`, see of_ties.
      `length`, see of_length. `best_of`: n -> see of_best.
    """
    table, ranks = rewards.tables(records, scores)
    margin, better = rewards.margins(table), losses.ranked_above(ranks)
    right, pairs = _sums(baselines.right(margin), better)
    found = {"prompts": len(records), "pairs": int(pairs.sum())}
    if found["pairs"]:
        count = (ranks > 0).sum(axis=1)
        by_k = {str(k): statistics.ratio_interval(right[count == k], pairs[count == k]) for k in np.unique(count)}
        curve = rewards.calibration(margin[better])
        found |= {"accuracy": statistics.ratio_interval(right, pairs), "by_k": {k: x for k, x in by_k.items() if x}}
        found |= {"calibration": curve, "calibration_error": rewards.calibration_error(curve)}
    found["ties"] = of_ties(margin, ranks)
    found["length"] = of_length(records, margin, ranks)
    chosen = {str(n): of_best(table, ranks, n) for n in best_of}
    found["best_of"] = {n: quality for n, quality in chosen.items() if quality}
    return found


def of_ties(margin: np.ndarray, ranks: np.ndarray) -> dict:
    """Whether equal completions are scored alike.

    Args:
      margin: (P, K, K), see rewards.margins.
      ranks: (P, K) int32, 0 = no completion.

    Returns:
      `pairs` that are tied, and the mean distance of the two scores in `tied` and in `untied` pairs; a mean of nothing
      is left out.
    """
    here = (ranks > 0)[:, :, None] & (ranks > 0)[:, None, :] & ~np.eye(ranks.shape[1], dtype=bool)
    equal = here & (ranks[:, :, None] == ranks[:, None, :])
    found = {"pairs": int(equal.sum()) // 2}
    for name, chosen in (("tied", equal), ("untied", here & ~equal)):
        if chosen.any():
            found[name] = float(np.abs(margin[chosen]).mean())
    return found


def of_length(records: Sequence[dict], margin: np.ndarray, ranks: np.ndarray) -> dict:
    """How far length alone goes, in untied pairs whose completions differ in characters.

    Returns:
      intervals, each absent without a pair: `preferred`, how often people prefer the longer completion; `scored`, how
      often it has the higher score; `right_on_longer` and `right_on_shorter`, the accuracy where people prefer the
      longer and the shorter one. A scorer without a bias of its own has `scored` near `preferred`.
    """
    lengths, _ = rewards.tables(records, [len(text) for record in records for text in record["completions"]])
    difference, better = rewards.margins(lengths), losses.ranked_above(ranks)
    longer, shorter, right = better & (difference > 0), better & (difference < 0), baselines.right(margin)
    found = {
        "preferred": statistics.ratio_interval(*_sums(longer.astype(float), longer | shorter)),
        "scored": statistics.ratio_interval(*_sums(np.where(difference > 0, right, 1 - right), longer | shorter)),
        "right_on_longer": statistics.ratio_interval(*_sums(right, longer)),
        "right_on_shorter": statistics.ratio_interval(*_sums(right, shorter)),
    }
    return {name: share for name, share in found.items() if share}


def of_best(table: np.ndarray, ranks: np.ndarray, n: int) -> dict | None:
    """How good the completion is that the scorer takes out of n, drawn from those of a prompt without replacement.

    The quality of a completion is the share of the prompt's other completions that it is ranked above, ties half: a
    random choice has 0.5. The mean over all draws is exact: among K completions in the order of their scores, the one
    that j others go before is taken in C(K - 1 - j, n - 1) of the C(K, n) draws. Prompts with fewer than n completions,
    or with all of them tied, are left out.

    Args:
      table, ranks: (P, K) scores and ranks, see rewards.tables.

    Returns:
      intervals of the quality: `chosen` by the scores, and `ideal`, by the ranks themselves; None without a prompt.
    """
    chosen, ideal = [], []
    for scores, rank in zip(table, ranks, strict=True):
        scores, rank = scores[rank > 0], rank[rank > 0]
        K = len(rank)
        if K < max(n, 2) or len(set(rank)) == 1:
            continue
        above = (rank[:, None] < rank[None]) + 0.5 * (rank[:, None] == rank[None])
        quality = (above.sum(axis=1) - 0.5) / (K - 1)  # it is tied with itself
        taken = np.array([math.comb(K - 1 - j, n - 1) for j in range(K)]) / math.comb(K, n)
        chosen.append(_in_order(quality, -scores) @ taken)
        ideal.append(_in_order(quality, rank) @ taken)
    if not chosen:
        return None
    return {"chosen": statistics.interval(chosen), "ideal": statistics.interval(ideal)}


def _in_order(quality: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Qualities by ascending key; where keys are equal, their mean: the scorer has no preference there."""
    _, place, count = np.unique(key, return_inverse=True, return_counts=True)
    means = np.bincount(place, quality) / count
    return np.repeat(means, count)


def _sums(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt, the sum of the values of the chosen pairs and their number, (P,) each."""
    return np.where(chosen, values, 0.0).sum(axis=(1, 2)), chosen.sum(axis=(1, 2))
