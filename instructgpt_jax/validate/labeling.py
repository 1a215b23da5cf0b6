"""What `config.label` must be, and what its keys need of each other."""

from ml_collections import ConfigDict

from instructgpt_jax import simulated
from instructgpt_jax.data import sources
from instructgpt_jax.labeling import kinds, people
from instructgpt_jax.validate.rules import EXAMPLE, PART, TEXT, TEXTS, Rule, choice, integer

RULES = {
    "kind": choice(*kinds.PAGES), "step": choice("make", "push", "pull", "read", "simulate"),
    "purpose": choice("training", "evaluation"), "source": TEXTS, "num_tasks": integer(0),
    "labelers": Rule("a file of labelers", lambda x: isinstance(x, str) and x != ""),
    "groups": Rule(
        f"a tuple of {people.GROUPS}", lambda x: TEXTS.holds(x) and len(x) > 0 and set(x) <= set(people.GROUPS)
    ),
    "overlap": integer(0), "overlap_share": PART, "projects": choice("labeler", "shared"), "pairs": integer(2),
    "example": EXAMPLE,
    "separator": TEXT, "instructions": TEXT, "url": TEXT, "export": TEXTS, "skip_answers": integer(0),
}  # fmt: skip


def check_labeling(config: ConfigDict) -> None:
    """A kind has the source that it asks about, a step what it needs.

    Raises:
      ValueError: names the key, what it must be and what it is.
    """
    c, path = config.label, "config.label"
    if c.kind in kinds.WITHOUT_SOURCE:
        if c.source or not c.num_tasks:
            given = f"{c.source} and {c.num_tasks}"
            raise ValueError(f"{path}.source must be () and num_tasks above 0 for kind {c.kind!r}, got {given}")
    elif not c.source:
        raise ValueError(f"{path}.source must name at least one source of {kinds.SOURCE[c.kind]}, got ()")
    for source in c.source:
        try:
            sources.parse(source)
        except ValueError as error:
            raise ValueError(f"{path}.source: {error}") from None
    if c.step == "simulate" and (c.kind != "comparisons" or not set(c.groups) <= set(simulated.GROUPS)):
        raise ValueError(
            f"{path}.kind must be 'comparisons' and groups of {simulated.GROUPS} for step 'simulate', got {c.kind!r} "
            f"and {c.groups}"
        )
    if c.step in ("push", "pull") and not c.url.startswith(("http://", "https://")):
        raise ValueError(f"{path}.url must be the address of a Label Studio server for step {c.step!r}, got {c.url!r}")
