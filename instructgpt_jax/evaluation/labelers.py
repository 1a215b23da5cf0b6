"""What the labelers of the simulated world say of answers: preference, the overall rating, and the yes/no fields.

Eleven fields are those of the paper's table 3; `toxic` is our own.

Each prompt goes to five labelers of each group, drawn by the prompt and the seed alone, so that the same people judge
all policies; the first of them also rates each answer by itself. Everything follows from the texts: nothing here is
random.
"""

import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from instructgpt_jax import simulated
from instructgpt_jax.data import chats
from instructgpt_jax.evaluation import statistics

PANEL = 5  # labelers who compare the answers to a prompt


def panel_of(prompt: str, group: str, seed: int) -> list[simulated.Labeler]:
    """The labelers of a group who judge the answers to a prompt."""
    people = simulated.labelers(group)
    first = zlib.crc32(f"{seed}\n{group}\n{prompt}".encode())
    return [people[(first + i) % len(people)] for i in range(PANEL)]


def judge(prompts: Sequence[str], texts: Sequence[str], baseline: Sequence[str], seed: int) -> dict:
    """The labelers' view of one policy's answers.

    Args:
      prompts, texts, baseline: the prompts, the policy's answers, and those of the policy it is compared with.
      seed: the day on which the labelers judge.

    Returns:
      `win_rate` against the baseline (the mean of a prompt's panel, the interval over prompts) and `likert` (1 to 7),
      each by labeler group; `metadata`, the shares of the questions as the training labelers see them (where a
      question does not apply, the prompt does not count); `gold`, the mean of the labelers' common preference.
    """
    found: dict = {"win_rate": {}, "likert": {}}
    for group in simulated.GROUPS:
        panels = [panel_of(prompt, group, seed) for prompt in prompts]
        wins = [
            sum(simulated.prefer(labeler, *case, seed) for labeler in panel) / len(panel)
            for panel, *case in zip(panels, prompts, texts, baseline, strict=True)
        ]
        rated = [simulated.rate(panel[0], *case, seed) for panel, *case in zip(panels, prompts, texts, strict=True)]
        found["win_rate"][group] = statistics.win_rate(wins, prompts)
        found["likert"][group] = statistics.interval([answer["rating"] for answer in rated], prompts)
        if group == "training":
            columns = {
                name: [(rating[name], prompt) for rating, prompt in zip(rated, prompts, strict=True)
                       if rating[name] is not None]
                for name in rated[0] if name != "rating"
            }  # fmt: skip
            found["metadata"] = {name: statistics.interval(*zip(*cells, strict=True))
                                 for name, cells in columns.items() if cells}  # fmt: skip
    found["gold"] = statistics.interval(gold(prompts, texts), prompts)
    return found


def head_to_head(
    prompts: dict[str, Sequence[str]], answers: dict[str, dict[str, list[dict]]], order: Sequence[str], seed: int
) -> dict[str, dict[str, dict]]:
    """How often each policy is preferred to each other; beside the baseline the same numbers as `judge` has.

    Args:
      prompts: distribution -> its prompts.
      answers: distribution -> policy -> its answers, see answers.Examiner.answer.
      order: the policies.
      seed: the day on which the labelers judge.

    Returns:
      distribution -> group -> policy -> other policy -> the mean of the prompts' panels, a tie is half.
    """
    found: dict[str, dict[str, dict]] = {}
    for distribution, group in itertools.product(prompts, simulated.GROUPS):
        asked, values = prompts[distribution], {}
        panels = [panel_of(prompt, group, seed) for prompt in asked]
        ties = np.array([[labeler.tie for labeler in panel] for panel in panels])  # (P, PANEL)
        for name in order:
            cases = [(prompt, one["text"]) for prompt, one in zip(asked, answers[distribution][name], strict=True)]
            worth = [[simulated.value(one, *case, seed) for one in panel]
                     for panel, case in zip(panels, cases, strict=True)]  # fmt: skip
            values[name] = np.array(worth)
        table = found.setdefault(distribution, {})[group] = {name: {} for name in order}
        for first, second in itertools.permutations(order, 2):
            difference = values[first] - values[second]
            wins = np.where(np.abs(difference) < ties, 0.5, difference > 0).mean(axis=1)
            table[first][second] = statistics.win_rate(wins, asked)
    return found


def gold(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """The gold score of each answer."""
    return [simulated.gold_score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def agreement(records: Sequence[dict], seed: int) -> dict[str, float]:
    """Share of pairs on which two labelers of a group agree, by group of the comparisons, on their own completions."""
    found = {}
    for group in simulated.GROUPS:
        items = [(chats.named(one), one["completions"]) for one in records if one.get("group") == group]
        if items:
            found[group] = simulated.agreement(simulated.labelers(group), items, seed).share
    return found
