"""What a key of a configuration must be, and the check of a key or a section against it; __init__.py has the rules."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


class Each(NamedTuple):
    """A section with names of the user's own, each value by one rule."""

    rule: Any


def integer(least: int) -> Rule:
    expected = f"an integer of at least {least}"
    return Rule(expected, lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= least)


def number(low: float = -math.inf, high: float = math.inf) -> Rule:
    text = "a number" + (f" in [{low:g}, {high:g}]" if high < math.inf else f" of at least {low:g}" * (low > -math.inf))
    return Rule(text, lambda x: _is_number(x) and low <= x <= high)


def choice(*options: str) -> Rule:
    return Rule(f"one of {options}", lambda x: x in options)


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or None", lambda x: x is None or rule.holds(x))


def _is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


POSITIVE = Rule("a positive number", lambda x: _is_number(x) and x > 0)
SHARE = Rule("a number of at least 0 and below 1", lambda x: _is_number(x) and 0 <= x < 1)
EXAMPLE = Rule(
    "a text that holds {query} and ends in {response}",
    lambda x: isinstance(x, str) and "{query}" in x and x.endswith("{response}"),
)
PART = Rule("a number above 0 and at most 1", lambda x: _is_number(x) and 0 < x <= 1)
FLAG = Rule("True or False", lambda x: isinstance(x, bool))
TEXT = Rule("a string", lambda x: isinstance(x, str))
LOCAL = Rule("a local path, or ''", lambda x: isinstance(x, str) and "://" not in x)
TEXTS = Rule("a tuple of strings", lambda x: isinstance(x, tuple) and all(isinstance(part, str) for part in x))


def check(parent: Any, name: str, rule: Any, path: str) -> None:
    """One key against its rule, or a section against all of its own, and no others."""
    if not isinstance(parent, ConfigDict):
        raise ValueError(f"{path} must be a section of the configuration, got {parent!r}")
    if name not in parent:
        raise ValueError(f"{path} must have the key {name!r}, got {sorted(parent)}")
    value = parent[name]
    if isinstance(rule, Rule):
        if not rule.holds(value):
            raise ValueError(f"{path}.{name} must be {rule.expected}, got {value!r}")
        return
    if isinstance(rule, Each):
        if not isinstance(value, ConfigDict):
            raise ValueError(f"{path}.{name} must be a section of the configuration, got {value!r}")
        rule = dict.fromkeys(value, rule.rule)
    for inner, inner_rule in rule.items():
        check(value, inner, inner_rule, f"{path}.{name}")
    unknown = sorted(set(value) - set(rule))
    if unknown:
        raise ValueError(f"{path}.{name} must have no keys but {sorted(rule)}, got {unknown}")
