"""What a reward model must beat: the longer completion, and a linear model of words. Plain numpy on the host.

The linear model is a logistic regression on the differences of two completions' sets of words and pairs of neighbouring
words, lower-cased: it knows nothing of the prompt, of order, or of any text but its comparisons.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

FOLDS = 5  # by prompt, that the strength of the penalty is chosen on
STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0)  # of the L2 penalty; the log-likelihood is a sum over pairs


def longer(records: Sequence[dict]) -> np.ndarray:
    """(N,) characters of the completions of comparisons, one record after another: the score of "the longer one"."""
    return np.array([len(text) for record in records for text in record["completions"]], np.float64)


def words(train: Sequence[dict], records: Sequence[dict], keys: Sequence[int]) -> tuple[np.ndarray, float]:
    """Scores of a linear model of words.

    Args:
      train: the comparisons that it learns from.
      records: those that it scores.
      keys: of each of `train`, equal for one prompt: the strength of the penalty is chosen on folds over them.

    Returns:
      (N,) scores of the completions of `records`, one record after another, and the strength.

    Raises:
      ValueError: no pair to learn from.
    """
    x, places, names = differences(train)
    strength = _best_strength(x, fold_of(keys)[places])
    weights = fit(x, strength)
    texts = (features(text) for record in records for text in record["completions"])
    scores = [sum(weights[names[name]] for name in found if name in names) for found in texts]
    return np.array(scores, np.float64), strength


def fold_of(keys: Sequence[int]) -> np.ndarray:
    """The fold of each key, from 0, equal keys in one; as many folds as keys where they are fewer than FOLDS."""
    return np.unique(np.asarray(keys), return_inverse=True)[1] % FOLDS


def features(text: str) -> set:
    """Words, punctuation marks and pairs of neighbours of a text."""
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    return set(found) | set(itertools.pairwise(found))


def pairs(row: dict) -> list[tuple[int, int]]:
    """(better, worse) completions of a comparison; ties make none."""
    ranking = row["ranking"]
    return [(i, j) for i in range(len(ranking)) for j in range(len(ranking)) if ranking[i] < ranking[j]]


def differences(rows: Sequence[dict]) -> tuple[scipy.sparse.csr_matrix, np.ndarray, dict]:
    """What the linear model learns from.

    Returns:
      (pairs, features) of 1, 0 and -1: those of the better completion less those of the worse; (pairs,) the row that
      each is of; feature -> its column.

    Raises:
      ValueError: no pair of completions differs.
    """
    names, entries, places = {}, [], []
    for number, row in enumerate(rows):
        found = [features(text) for text in row["completions"]]
        for i, j in pairs(row):
            signed = [(name, 1.0) for name in found[i] - found[j]] + [(name, -1.0) for name in found[j] - found[i]]
            # The order of a set of strings changes from run to run, that of the columns must not.
            for name, sign in sorted(signed, key=repr):
                entries.append((len(places), names.setdefault(name, len(names)), sign))
            places.append(number)
    if not entries:
        raise ValueError(f"a linear model must have pairs of different completions to learn from, got {len(rows)} rows")
    at, column, sign = zip(*entries, strict=True)
    return scipy.sparse.csr_matrix((sign, (at, column)), (len(places), len(names))), np.array(places), names


def fit(x: scipy.sparse.csr_matrix, strength: float) -> np.ndarray:
    """Weights that minimise -Σ log σ(x·w) + strength/2 · |w|²."""

    def loss(w):
        margins = x @ w
        value = np.logaddexp(0, -margins).sum() + 0.5 * strength * w @ w
        return value, strength * w - x.T @ (1 / (1 + np.exp(margins)))

    return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


def right(margins: np.ndarray) -> np.ndarray:
    """1 for a pair in the right order, a half for equal scores."""
    return (margins > 0) + 0.5 * (margins == 0)


def held_out(x: scipy.sparse.csr_matrix, fold: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Margins of all pairs by models that did not see their fold, and the strength chosen for each fold.

    Args:
      x: see `differences`.
      fold: (pairs,) of each pair, all of a prompt in one.
    """
    margins, chosen = np.zeros(len(fold)), []
    for number in np.unique(fold):
        others = fold != number
        chosen.append(_best_strength(x[others], fold[others]))
        margins[~others] = x[~others] @ fit(x[others], chosen[-1])
    return margins, chosen


def _best_strength(x: scipy.sparse.csr_matrix, fold: np.ndarray) -> float:
    """The strength of the penalty whose models are right most often on the folds that they did not see."""
    if len(np.unique(fold)) < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    found = {}
    for strength in STRENGTHS:
        hits = [right(x[fold == one] @ fit(x[fold != one], strength)) for one in np.unique(fold)]
        found[strength] = np.concatenate(hits).mean()
    return max(STRENGTHS, key=found.get)
