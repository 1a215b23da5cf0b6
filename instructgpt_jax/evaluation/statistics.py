"""Means with their 95 % intervals, as `{"mean", "low", "high", "n"}`. Plain numpy on the host.

* A share of yes/no answers: Wilson's score interval (Wilson 1927), which stays inside [0, 1] and is not empty at 0.
* Any other mean, win rates with ties among them: mean ± 1.96 standard errors.
* Several values of each prompt, such as pairs of completions or more than one answer: the values of a prompt are
  correlated, so the prompts are the sample and the mean is a ratio of two sums, with the linearised standard error
  (Cochran 1977, equation 6.13).
"""

from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # of a two-sided 95 % interval
RESAMPLES = 2_000  # of the bootstrap


def interval(values: Sequence[float], prompts: Sequence[str] = ()) -> dict[str, float] | None:
    """The mean of values, Wilson's interval where all are 0 or 1; None without a value.

    The values are independent, unless `prompts` names for each the prompt that it belongs to and one comes twice.

    >>> round(interval([1, 1, 1, 0])["low"], 12)  # of 4: (0.75 + z²/8 - z · sqrt(0.75 · 0.25 / 4 + z²/64)) / (1 + z²/4)
    0.300641842582
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if not n:
        return None
    if len(set(prompts)) < len(prompts):
        number = np.unique(np.asarray(prompts, object).astype(str), return_inverse=True)[1]
        return ratio_interval(np.bincount(number, values), np.bincount(number))
    mean = values.mean()
    if np.isin(values, (0.0, 1.0)).all():
        centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * np.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
        # Rounding alone would leave [0, 1], or shut out a mean of 0 or 1.
        low, high = max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
    else:
        half = Z * values.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
        low, high = mean - half, mean + half
    return _interval(mean, low, high, n)


def win_rate(outcomes: Sequence[float], prompts: Sequence[str] = ()) -> dict[str, float] | None:
    """Of outcomes 1 (won), 0.5 (tied) and 0 (lost), one an answer or the mean of several labelers'; see interval."""
    outcomes = np.asarray(outcomes, np.float64)
    if not ((outcomes >= 0) & (outcomes <= 1)).all():
        raise ValueError(f"outcomes must be from 0 to 1, got {sorted(set(outcomes.tolist()))[:5]}")
    found = interval(outcomes, prompts)
    return found and found | {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> dict[str, float] | None:
    """sum(parts) / sum(wholes), each a count of one prompt, such as right pairs of all its pairs; n counts prompts."""
    parts, wholes = (np.asarray(x, np.float64)[np.asarray(wholes) > 0] for x in (parts, wholes))
    n = len(parts)
    if not n:
        return None
    ratio = parts.sum() / wholes.sum()
    spread = np.sum((parts - ratio * wholes) ** 2) * n / (n - 1) if n > 1 else 0.0
    half = Z * np.sqrt(spread) / wholes.sum()
    return _interval(ratio, ratio - half, ratio + half, n)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], seed: int, prompts: Sequence[str] = ()
) -> dict[str, float]:
    """mean(ours - theirs), with the 2.5 and 97.5 % quantiles of a bootstrap over prompts; n counts prompts.

    Args:
      ours, theirs: values of the same things in the same order, such as whether two models order a pair of completions
        right.
      seed: of the bootstrap.
      prompts: the prompt that each belongs to; without them every value is of a prompt of its own.

    Raises:
      ValueError: not one value of each for every thing.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(f"both must have a value for each prompt, got {ours.shape} and {theirs.shape}")
    _, place = np.unique(prompts, return_inverse=True) if len(prompts) else (None, np.arange(len(ours)))
    sums, counts = np.bincount(place, ours - theirs), np.bincount(place)
    n = len(sums)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)  # how often each prompt is drawn
    low, high = np.quantile(drawn @ sums / (drawn @ counts), (0.025, 0.975))
    return _interval(sums.sum() / counts.sum(), low, high, n)


def bootstrap_ratio(parts: Sequence[float], wholes: Sequence[float], seed: int) -> dict[str, float] | None:
    """As `ratio_interval`, with the 2.5 and 97.5 % quantiles of a bootstrap over what the counts are of."""
    parts, wholes = (np.asarray(x, np.float64)[np.asarray(wholes) > 0] for x in (parts, wholes))
    n = len(parts)
    if not n:
        return None
    rng, shares = np.random.default_rng(seed), np.full(n, 1 / n)
    drawn = (rng.multinomial(n, shares) for _ in range(RESAMPLES))  # how often each is drawn
    low, high = np.quantile([times @ parts / (times @ wholes) for times in drawn], (0.025, 0.975))
    ratio = parts.sum() / wholes.sum()
    return _interval(ratio, min(low, ratio), max(high, ratio), n)


def difference(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Of two independent intervals the second less the first; n counts both."""
    half = np.hypot(*((one["high"] - one["low"]) / 2 for one in (ours, theirs)))
    mean = theirs["mean"] - ours["mean"]
    return _interval(mean, mean - half, mean + half, ours["n"] + theirs["n"])


def _interval(mean, low, high, n: int) -> dict[str, float]:
    return {"mean": float(mean), "low": float(low), "high": float(high), "n": n}
