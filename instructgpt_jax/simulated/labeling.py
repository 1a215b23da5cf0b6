"""Simulated labelers: they rate, rank and compare answers, each with own weights, noise and strictness.

A labeler values an answer at `weights · features + noise · z`. The weights scatter around the common ones of the gold
score (`judging.GOLD_WEIGHTS`), every labeler has a taste for long or short answers, and z is a standard normal number
that depends on labeler, prompt, text and seed alone: the same question asked again with the same seed gets the same
answer, equal texts always tie, and a new seed is a new day. The training group and the held-out group come from the
same population, but the held-out labelers were not screened: their weights scatter more and they are noisier.

The noise is set so that labelers of a group agree on 70-76 % of the pairs about which none of the two is indifferent
(Stiennon et al. 2020, appendix C.2; the paper reports 72.6 and 77.3 %, section 3.4), on the written mixture of
`records("comparisons")`: 74 % (training) and 73 % (held out), with 19 and 18 % ties. On answers of similar quality they
agree on 71 and 70 %, on flawless ones on half. The gold score predicts 80 and 79 % of their untied pairs.
"""

import functools
import hashlib
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from instructgpt_jax.simulated import judging, world

GROUPS = ("training", "heldout")
_COUNTS = {"training": 12, "heldout": 8}
_NOISE = {"training": 2.65, "heldout": 3.1}  # calibrated: see the docstring
_SCATTER = {"training": 0.25, "heldout": 0.35}  # standard deviation of the logarithm of each weight
_SHIFT = {  # what the screening selects for: the held-out group values form and manner less, truth a little more
    "training": {},
    "heldout": {"constraint": 0.85, "care": 0.8, "false": 1.15},
}
# Fields of table 3 that nothing in this world gives reason for.
NEVER = ("sexual", "violent", "encourages_harm", "denigrates", "opinion", "moral_judgment")
_NORMAL = statistics.NormalDist()


class Labeler(NamedTuple):
    """One labeler."""

    name: str
    group: str  # 'training' or 'heldout'
    weights: judging.Features
    noise: float  # standard deviation, in units of the gold score
    tie: float  # answers whose values differ by less share a rank
    slip: float  # share of wrong answers to the yes/no questions
    carelessness: float  # of the demonstrations they write, see `writing.draw_flaws`


class Agreement(NamedTuple):
    """How far labelers agree on pairs of answers."""

    share: float  # of pairs where neither of two labelers is indifferent: both prefer the same answer
    pairs: int  # such (pair of answers, pair of labelers)
    ties: float  # share of (pair of answers, labeler) with a tie


@functools.cache
def labelers(group: str) -> tuple[Labeler, ...]:
    """The labelers of a group: 12 in 'training', 8 in 'heldout'."""
    if group not in GROUPS:
        raise ValueError(f"group must be one of {GROUPS}, got {group!r}")
    people = []
    for i in range(_COUNTS[group]):
        rng = world.rng_of("labeler", group, i)
        normal = [_NORMAL.inv_cdf(min(max(rng.random(), 1e-6), 1 - 1e-6)) for _ in range(len(judging.GOLD_WEIGHTS))]
        weights = {
            name: weight * math.exp(_SCATTER[group] * z) * _SHIFT[group].get(name, 1.0)
            for (name, weight), z in zip(judging.GOLD_WEIGHTS._asdict().items(), normal, strict=True)
        }
        weights["length"] = 0.5 * normal[-1]
        people.append(
            Labeler(
                name=f"{group}-{i:02d}",
                group=group,
                weights=judging.Features(**weights),
                noise=_NOISE[group] * (0.8 + 0.4 * rng.random()),
                tie=0.4 + 0.6 * rng.random(),
                slip=0.01 + 0.03 * rng.random(),
                carelessness=0.06 + 0.16 * rng.random(),
            )
        )
    return tuple(people)


def draw_labelers(group: str, prompt: str, count: int, seed: int) -> list[Labeler]:
    """`count` labelers of a group, who judge the completions of a prompt."""
    people = labelers(group)
    first = people.index(world.pick(world.rng_of("labeler of", group, prompt, seed), people))
    return [people[(first + n) % len(people)] for n in range(count)]


def value(labeler: Labeler, prompt: str, text: str, seed: int) -> float:
    """What the answer is worth to the labeler on the day `seed`."""
    features = judging.features(prompt, text)
    taste = sum(w * f for w, f in zip(labeler.weights, features, strict=True))
    return taste + labeler.noise * _NORMAL.inv_cdf(_uniform(labeler, prompt, text.strip(), seed))


def _uniform(labeler: Labeler, *key) -> float:
    """A number in (0, 1) that depends on the labeler and `key` alone."""
    digest = hashlib.blake2b(
        "\x1f".join((labeler.name, *map(str, key))).encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52


def rank(labeler: Labeler, prompt: str, completions: Sequence[str], seed: int) -> list[int]:
    """Ranks of the completions, 1 = best, equal = tied, without gaps.

    As on the paper's page (appendix B.5) the labeler drags answers into columns: from the best one down, an answer
    joins the column as long as it is nearly as good as the column's best.
    """
    values = [value(labeler, prompt, text, seed) for text in completions]
    ranks, column, top = [0] * len(values), 0, math.inf
    for k in sorted(range(len(values)), key=lambda k: -values[k]):
        if top - values[k] >= labeler.tie or column == 0:
            column, top = column + 1, values[k]
        ranks[k] = column
    return ranks


def prefer(labeler: Labeler, prompt: str, a: str, b: str, seed: int) -> float:
    """1 if the labeler prefers a, 0 if b, 0.5 for a tie."""
    difference = value(labeler, prompt, a, seed) - value(labeler, prompt, b, seed)
    return 0.5 if abs(difference) < labeler.tie else float(difference > 0)


def rate(labeler: Labeler, prompt: str, text: str, seed: int) -> dict[str, int | bool | None]:
    """What the page of a single output asks (the paper's table 3), as this labeler sees it: `rating` 1-7, the eleven
    yes/no fields, and one of our own, `toxic`.

    `satisfies_constraint` is None where the prompt states no constraint, `hallucination` outside closed-domain tasks.
    Harmful advice is help with a harmful request. This world has nothing sexual, no violence, no protected classes, no
    opinions and no morals: the fields that ask for them are no.
    """
    facts = judging.facts(prompt, text)
    worth = value(labeler, prompt, text, seed)

    def answer(question: str, truth: bool) -> bool:
        return truth != (_uniform(labeler, question, prompt, text.strip(), seed) < labeler.slip)

    toxic = facts.features.toxic >= 0.5
    return {
        "rating": min(7, max(1, round(2 + worth * 0.66))),
        "fails_instruction": not answer("follows", facts.follows),
        "inappropriate": not answer("appropriate", not toxic and facts.features.follow > 0.2),
        "hallucination": answer("hallucination", facts.hallucinates) if facts.closed else None,
        "satisfies_constraint": answer("satisfies", facts.satisfies) if facts.constrained else None,
        **dict.fromkeys(NEVER, False),
        "harmful_advice": answer("harmful", facts.helps_harm),
        "toxic": answer("toxic", toxic),
    }


def agreement(people: Sequence[Labeler], items: Sequence[tuple[str, Sequence[str]]], seed: int) -> Agreement:
    """How far `people` agree on the pairs of completions of each prompt in `items`: (prompt, completions)."""
    same = decided = ties = judged = 0
    for prompt, completions in items:
        ranks = [rank(labeler, prompt, completions, seed) for labeler in people]
        for a in range(len(completions)):
            for b in range(a):
                signs = [(r[a] > r[b]) - (r[a] < r[b]) for r in ranks]
                up, down = signs.count(1), signs.count(-1)
                decided += (up + down) * (up + down - 1) // 2
                same += up * (up - 1) // 2 + down * (down - 1) // 2
                ties += len(signs) - up - down
                judged += len(signs)
    return Agreement(same / max(1, decided), decided, ties / max(1, judged))
