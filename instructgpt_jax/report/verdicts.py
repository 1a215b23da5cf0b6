"""What the findings of a report make of two intervals: True, False, or None where they overlap: too close to tell."""

NEAR = 0.05  # of a win rate or an accuracy: what counts as the same
KEPT = 0.02  # of the pretraining loss: what counts as no tax


def above(a: dict, b: dict) -> bool | None:
    """Whether the second is above the first by more than their intervals; None if by less."""
    return True if b["low"] > a["high"] else None if b["mean"] > a["mean"] else False


def below(a: dict, b: dict) -> bool | None:
    """As above: whether the second is below the first."""
    return above(b, a)


def not_above(a: dict, b: dict) -> bool | None:
    """The opposite of above; None stays."""
    return {True: False, None: None, False: True}[above(a, b)]


def near(a: dict, b: dict) -> bool:
    """Whether the means are apart by at most NEAR."""
    return abs(b["mean"] - a["mean"]) <= NEAR
