"""What people said of answers, in place of the simulated panel: win rates, ratings, fields; and by the same way the
preferences of the reward model, of a judge, or of a grader, each named as what it is.

People's answers are `comparisons.jsonl` and `ratings.jsonl` of stage `label` (see `labeling`). They name the policy
that wrote each completion, as `config.evaluate.models` calls it; `collect` has sampled these completions, they are not
those that `evaluate` scores. Lines of other sources do too: `group` says who ranked ('training', 'heldout',
'researcher', 'grader', ...; none = 'all').
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from instructgpt_jax import process
from instructgpt_jax.data import chats, schema, sources
from instructgpt_jax.evaluation import agreement, statistics

QUANTITIES = {  # field of a rating -> what the report calls its mean
    "rating": "likert", "toxicity": "toxicity", "relative_toxicity": "relative_toxicity", "continuity": "continuity",
}  # fmt: skip
FIRST = ("training", "heldout", "researcher")  # whose fields are shown: those of the first group that has noted any
ELSEWHERE = "other"  # distribution of labels whose prompt is in none of `config.evaluate.distributions`

Rows = dict[str, dict]  # policy -> its row of the report
Table = dict[str, dict[str, dict[str, dict]]]  # group -> policy -> other policy -> interval


class Judged(NamedTuple):
    """What people answered: lines by distribution."""

    rankings: dict[str, list[dict]]
    ratings: dict[str, list[dict]]


class Outcome(NamedTuple):
    """How often `first` was preferred to `second` on a prompt: 1 always, 0 never; a tie is half."""

    group: str
    prompt: str
    first: str
    second: str
    value: float


def load(config: ConfigDict, prompts: dict[str, Iterable[str]]) -> Judged:
    """Reads `config.evaluate.rankings` and `config.evaluate.ratings`.

    Args:
      prompts: distribution -> all its prompts. A line is of the distribution that its field `distribution` names, else
        of the first that has its prompt, else of ELSEWHERE.

    Raises:
      ValueError: a line that does not say which of the evaluated policies it is of; names file and line.
    """
    c, of = config.evaluate, {}
    for name in reversed(prompts):
        of |= dict.fromkeys(prompts[name], name)

    def read(names: tuple[str, ...], kind: str) -> dict[str, list[dict]]:
        found: dict[str, list[dict]] = {}
        records = sources.load(names, kind, config.data.skip_bad, config.data.data_dir) if names else ()
        for n, record in enumerate(records):
            try:
                _check_policies(record, kind, tuple(c.order))
                agreement.group_of(record)
            except ValueError as error:
                raise ValueError(f"{records.origin(n)}: {error}") from None
            told = record.get("distribution")
            name = told if isinstance(told, str) and told else of.get(chats.named(record), ELSEWHERE)
            found.setdefault(name, []).append(record)
        return found

    return Judged(read(c.rankings, "comparisons"), read(c.ratings, "ratings"))


def _check_policies(record: dict, kind: str, known: tuple[str, ...]) -> None:
    if kind == "comparisons":
        schema.check_policies(record, len(record["completions"]))
        if record.get("policies") is None:
            raise ValueError(f"policies must say who wrote each completion, got {sorted(record)} without them")
    for name in record["policies"] if kind == "comparisons" else [record.get("policy")]:
        if name not in known:
            raise ValueError(f"a policy must be one of config.evaluate.models {known}, got {name!r}")


# Preferences ----------------------------------------------------------------------------------------------------------


def by_rankings(lines: Iterable[dict]) -> list[Outcome]:
    """Of every ranking, the mean over the completions of each two policies."""
    found = []
    for line in lines:
        ranks: dict[str, list[int]] = {}
        prompt = chats.named(line)
        for name, rank in zip(line["policies"], line["ranking"], strict=True):
            ranks.setdefault(name, []).append(rank)
        for first, second in itertools.combinations(ranks, 2):
            wins = [_prefer(b, a) for a in ranks[first] for b in ranks[second]]  # the lower rank is the better one
            found.append(Outcome(agreement.group_of(line), prompt, first, second, sum(wins) / len(wins)))
    return found


def by_scores(key: str, prompts: Sequence[str], answers: dict[str, list[dict]]) -> list[Outcome]:
    """What the model of `key`, 'reward' or 'judge', prefers: the higher score; equal texts tie."""
    field, found = {"reward": "score"}.get(key, key), []
    for first, second in itertools.combinations(answers, 2):
        for prompt, a, b in zip(prompts, answers[first], answers[second], strict=True):
            value = 0.5 if a["text"] == b["text"] else _prefer(a[field], b[field])
            found.append(Outcome(key, prompt, first, second, value))
    return found


def _prefer(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


def head_to_head(outcomes: Iterable[Outcome]) -> Table:
    """How often each policy is preferred to each other, ties as halves; the prompts are the sample."""
    values: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for one in outcomes:
        values.setdefault((one.group, one.first, one.second), []).append((one.value, one.prompt))
        values.setdefault((one.group, one.second, one.first), []).append((1 - one.value, one.prompt))
    found: Table = {}
    for (group, first, second), cells in values.items():
        found.setdefault(group, {}).setdefault(first, {})[second] = statistics.win_rate(*zip(*cells, strict=True))
    return found


def win_rates(table: Table, baseline: str) -> dict[str, dict[str, dict]]:
    """policy -> group -> win rate against the baseline, which itself has one half wherever others are beside it."""
    found: dict[str, dict[str, dict]] = {}
    for group, rows in table.items():
        for name, others in rows.items():
            if baseline in others:
                found.setdefault(name, {})[group] = others[baseline]
        if baseline in rows:
            count = max(value["n"] for value in rows[baseline].values())
            found.setdefault(baseline, {})[group] = {"mean": 0.5, "low": 0.5, "high": 0.5, "n": count}
    return found


# Ratings --------------------------------------------------------------------------------------------------------------


def rated(lines: Sequence[dict]) -> Rows:
    """Policy -> the means of its grades by group, and `metadata`, the shares of its fields; the prompts are the sample.

    A field that does not apply to an answer does not count there.
    """
    grades: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    fields: dict[str, dict[str, dict[str, list[tuple[float, str]]]]] = {}  # group -> policy -> field
    for line in lines:
        name, group, prompt = line["policy"], agreement.group_of(line), line["prompt"]
        for field, quantity in QUANTITIES.items():
            if line.get(field) is not None:
                grades.setdefault((name, quantity, group), []).append((line[field], prompt))
        for field, value in (line.get("fields") or {}).items():
            if value is not None:
                of = fields.setdefault(group, {}).setdefault(name, {})
                of.setdefault(field, []).append((float(value), prompt))
    found: Rows = {}
    for (name, quantity, group), cells in grades.items():
        found.setdefault(name, {}).setdefault(quantity, {})[group] = statistics.interval(*zip(*cells, strict=True))
    shown = next((group for group in (*FIRST, *sorted(fields)) if group in fields), "")
    for name, of in fields.get(shown, {}).items():
        metadata = {field: statistics.win_rate(*zip(*cells, strict=True)) for field, cells in of.items()}  # in [0, 1]
        found.setdefault(name, {})["metadata"] = metadata
    return found


# The report -----------------------------------------------------------------------------------------------------------


def judge(
    config: ConfigDict, judged: Judged, prompts: dict[str, list[str]], answers: dict[str, dict[str, list[dict]]]
) -> tuple[dict[str, Rows], dict[str, Table]]:
    """What people and `config.evaluate.preferences` say.

    Args:
      judged: see load.
      prompts, answers: distribution -> prompts; distribution -> policy -> answers, see answers.Examiner.answer.

    Returns:
      distribution -> policy -> its row; distribution -> its head-to-head table.
    """
    c, results, tables = config.evaluate, {}, {}
    for distribution in dict.fromkeys([*prompts, *judged.rankings, *judged.ratings]):
        outcomes = by_rankings(judged.rankings.get(distribution, ()))
        for key in c.preferences if distribution in prompts else ():
            given = {name: answers[distribution][name] for name in c.order}
            outcomes += by_scores(key, prompts[distribution], given)
        table = head_to_head(outcomes)
        if table:
            tables[distribution] = {group: _in_order(table[group], c.order) for group in table}
        rows = rated(judged.ratings.get(distribution, ()))
        for name, rates in win_rates(table, c.baseline).items():
            rows[name] = {"win_rate": rates} | rows.get(name, {})
        if rows:
            results[distribution] = {name: rows[name] for name in c.order if name in rows}
    return results, tables


def _in_order(table: dict[str, dict[str, dict]], order: Sequence[str]) -> dict[str, dict[str, dict]]:
    return {a: {b: table[a][b] for b in order if b in table[a]} for a in order if a in table}


def merged(results: dict[str, Rows], more: dict[str, Rows]) -> dict[str, Rows]:
    """The rows of both; where both have a quantity by group, the groups of both."""
    found = {distribution: dict(rows) for distribution, rows in results.items()}
    for distribution, rows in more.items():
        of = found.setdefault(distribution, {})
        for name, row in rows.items():
            before = of.get(name, {})
            of[name] = row | before | {key: before[key] | row[key] for key in before.keys() & row.keys()}
    return found


def about(judged: Judged, seed: int) -> dict:
    """Who judged, how much, and how far they agree; {} where nobody did.

    Returns:
      `rankings`, `ratings`, `prompts` (numbers), `labelers` (group -> how many), `agreement` (see agreement.by_group).
    """
    rankings, ratings = ([line for lines in of.values() for line in lines] for of in judged)
    if not rankings and not ratings:
        return {}
    known: dict[str, set[str]] = {}
    for line in (*rankings, *ratings):
        if line.get("labeler") is not None:
            known.setdefault(agreement.group_of(line), set()).add(str(line["labeler"]))
    signed = [agreement.ranking_of(line) for line in rankings if line.get("labeler") is not None]
    prompts = {chats.named(line) for line in (*rankings, *ratings)}
    people = {group: len(names) for group, names in sorted(known.items())}
    process.say(f"evaluate: {len(rankings)} rankings and {len(ratings)} ratings by {sum(people.values())} labelers")
    return {
        "rankings": len(rankings), "ratings": len(ratings), "prompts": len(prompts), "labelers": people,
        "agreement": agreement.by_group(agreement.pairs(signed), seed),
    }  # fmt: skip


def beside(found: dict, known: dict) -> dict:
    """What the report says of the reward model, with the agreement of the groups of people that its accuracy is of.

    Args:
      found: see stages.evaluate.examine_reward_model.
      known: see about.
    """
    agreed = known.get("agreement", {})
    shares = {group: agreed[group] for group in found.get("accuracy", {}) if group in agreed}
    return found | {"agreement": found.get("agreement", {}) | shares} if shares else found
