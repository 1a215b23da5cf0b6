"""What people, and models in their place, say of answers: against plain loops and numbers by hand; on the page."""

import html
import itertools
import json
import random

import pytest
from ml_collections import ConfigDict

from instructgpt_jax.data import chats
from instructgpt_jax.evaluation import people, statistics
from instructgpt_jax.report import check, figures, findings, page
from tests.report_example import example, interval

ORDER = ("sft", "ppo", "base")


def config(**changes):
    c = {"rankings": (), "ratings": (), "preferences": (), "order": ORDER, "baseline": "sft"} | changes
    return ConfigDict({"seed": 0, "evaluate": c, "data": {"skip_bad": 0, "data_dir": ""}})


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (f"jsonl:{path}",)


def ranking(prompt, policies, ranks, labeler="a", group="training"):
    completions = [f"answer {n}" for n in range(len(ranks))]
    return {
        "prompt": prompt, "completions": completions, "ranking": ranks, "policies": policies, "labeler": labeler,
        "group": group, "task": prompt,
    }  # fmt: skip


def test_head_to_head_is_a_loop_over_pairs_of_completions():
    rng, lines = random.Random(0), []
    for n in range(30):
        count = rng.randint(4, 9)
        policies = [rng.choice(ORDER) for _ in range(count)]
        for labeler, group in (("a", "training"), ("b", "training"), ("c", "heldout")):
            ranks = [rng.randint(1, 5) for _ in range(count)]
            lines.append(ranking(f"prompt {n}", policies, ranks, labeler, group))
    table = people.head_to_head(people.by_rankings(lines))
    for group, (a, b) in itertools.product(("training", "heldout"), itertools.permutations(ORDER, 2)):
        won, prompts = [], []
        for line in lines:
            ranks = list(zip(line["policies"], line["ranking"], strict=True))
            cells = [1.0 * (x < y) + 0.5 * (x == y) for p, x in ranks if p == a for q, y in ranks if q == b]
            if line["group"] == group and cells:
                won.append(sum(cells) / len(cells))
                prompts.append(line["prompt"])
        assert table[group][a][b] == pytest.approx(statistics.win_rate(won, prompts))
        assert table[group][a][b]["n"] == len(set(prompts)) > 10
        assert table[group][a][b]["mean"] + table[group][b][a]["mean"] == pytest.approx(1)
    rates = people.win_rates(table, "ppo")  # against any baseline
    assert rates["base"]["heldout"] == table["heldout"]["base"]["ppo"]
    assert rates["ppo"]["training"]["mean"] == rates["ppo"]["training"]["high"] == 0.5


def test_the_reward_model_prefers_the_higher_score_and_equal_texts_tie():
    answers = {
        "sft": [{"text": "a", "score": 1.0}, {"text": "b", "score": 2.0}, {"text": "c", "score": 0.0}],
        "ppo": [{"text": "x", "score": 3.0}, {"text": "b", "score": 2.1}, {"text": "y", "score": -1.0}],
    }
    table = people.head_to_head(people.by_scores("reward", ["p", "q", "p"], answers))
    assert table["reward"]["ppo"]["sft"]["mean"] == 0.5 and table["reward"]["ppo"]["sft"]["n"] == 2  # prompts
    assert [one.value for one in people.by_scores("reward", ["p", "q", "r"], answers)] == [0, 0.5, 1]
    judged = {"a": [{"text": "1", "judge": 1.0}], "b": [{"text": "2", "judge": 2.0}]}
    assert people.by_scores("judge", ["p"], judged) == [people.Outcome("judge", "p", "a", "b", 0.0)]


def rating(prompt, policy, group="training", **more):
    return {"prompt": prompt, "answer": "?", "policy": policy, "labeler": "a", "group": group} | more


def test_ratings_and_fields():
    lines = [
        rating("p", "sft", rating=5, fields={"hallucination": True, "sexual": False}),
        rating("p", "sft", rating=6, fields={"hallucination": None, "sexual": False}),
        rating("q", "sft", rating=2, fields={"hallucination": False, "sexual": False}),
        rating("p", "ppo", group="heldout", rating=7, fields={"sexual": True}),
        rating("r", "ppo", toxicity=2, relative_toxicity=-1, continuity=4),
        rating("s", "ppo", toxicity=0, relative_toxicity=0, continuity=6),
    ]
    found = people.rated(lines)
    assert found["sft"]["likert"]["training"] == statistics.ratio_interval([11, 2], [2, 1])  # prompts are the sample
    assert found["sft"]["metadata"] == {
        "hallucination": statistics.interval([1, 0]), "sexual": statistics.ratio_interval([0, 0], [2, 1])
    }  # fmt: skip
    assert found["ppo"]["likert"] == {"heldout": {"mean": 7.0, "low": 7.0, "high": 7.0, "n": 1}}
    assert "metadata" not in found["ppo"]  # the training labelers noted nothing of it
    means = {name: found["ppo"][name]["training"]["mean"] for name in ("toxicity", "relative_toxicity", "continuity")}
    assert means == {"toxicity": 1, "relative_toxicity": -0.5, "continuity": 5}


def test_a_line_belongs_to_a_distribution(tmp_path):
    prompts = {"instruct": ["p", "both"], "gpt": ["q", "both"]}
    lines = [ranking(prompt, ["sft", "ppo"], [1, 2]) for prompt in ("p", "q", "both", "r")]
    lines.append(ranking("p", ["sft", "ppo"], [2, 1]) | {"distribution": "public"})
    rated = [rating("q", "base", rating=3)]
    c = config(rankings=write(tmp_path / "a.jsonl", lines), ratings=write(tmp_path / "b.jsonl", rated))
    judged = people.load(c, prompts)
    counts = {name: len(of) for name, of in judged.rankings.items()}
    assert counts == {"instruct": 2, "gpt": 1, "other": 1, "public": 1}
    results, tables = people.judge(c, judged, prompts, {})
    assert list(results) == ["instruct", "gpt", "other", "public"] and list(results["gpt"]) == list(ORDER)
    assert results["public"]["ppo"]["win_rate"]["training"]["mean"] == 1 and "win_rate" not in results["gpt"]["base"]
    known = people.about(judged, 0)
    assert known["rankings"] == 5 and known["ratings"] == 1 and known["labelers"] == {"training": 1}
    assert known["agreement"] == {} and known["prompts"] == 4
    assert people.about(people.Judged({}, {}), 0) == {}


def test_a_dialogue_belongs_to_its_distribution(tmp_path):
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    line = {key: value for key, value in ranking("", ["sft", "ppo"], [2, 1]).items() if key != "prompt"}
    c = config(rankings=write(tmp_path / "a.jsonl", [line | {"messages": messages}]))
    judged = people.load(c, {"instruct": ["user"], "chat": [chats.named({"messages": messages})]})
    results, _ = people.judge(c, judged, {"instruct": [], "chat": []}, {})
    assert list(results) == ["chat"] and results["chat"]["ppo"]["win_rate"]["training"]["mean"] == 1


@pytest.mark.parametrize(
    "kind, line, told",
    [
        ("rankings", ranking("p", None, [1, 2]), "policies must say who wrote each completion, got ['completions',"),
        ("rankings", ranking("p", ["sft"], [1, 2]), "policies must be a list of 2 names, one a completion, got"),
        ("rankings", ranking("p", ["sft", "gpt3"], [1, 2]), "a policy must be one of config.evaluate.models ('sft', "),
        ("ratings", rating("p", None, rating=1), "a policy must be one of config.evaluate.models ('sft', "),
        ("ratings", rating("p", "sft"), "a rating must have one of ('rating', "),
        ("rankings", ranking("p", ["sft", "ppo"], [1, 2], group=[1]), "group must be a string or an integer, got [1]"),
        ("ratings", rating("p", "sft", toxicity=3), "toxicity must be an integer from 0 to 2, got 3"),
        ("ratings", rating("p", "sft", fields={"sexual": "no"}), "fields must be an object with true, false or null"),
    ],
)
def test_labels_that_are_none(tmp_path, kind, line, told):
    with pytest.raises(ValueError) as refused:
        people.load(config(**{kind: write(tmp_path / "x.jsonl", [line])}), {})
    assert f"{tmp_path}/x.jsonl:1: {told}" in str(refused.value)


def test_groups_may_be_numbers():
    rankings = [ranking("p", ["sft", "ppo"], [1, 2], name, group) for name, group in (("a", 0), ("b", 1), ("c", "x"))]
    ratings = [rating("p", "sft", 0, rating=3, fields={"sexual": True}), rating("p", "sft", "x", rating=4, labeler="c")]
    judged = people.Judged({"d": rankings}, {"d": ratings})
    found = people.about(judged, 0)
    assert found["labelers"] == {"0": 1, "1": 1, "x": 1}
    assert set(found["agreement"]) == {"0 and 1", "0 and x", "1 and x"}
    rows, tables = people.judge(config(), judged, {}, {})
    assert set(rows["d"]["sft"]["likert"]) == {"0", "x"} and set(tables["d"]) == {"0", "1", "x"}
    assert rows["d"]["sft"]["metadata"]["sexual"]["mean"] == 1


def test_rows_of_people_beside_those_that_are_there():
    before = {"gpt": {"sft": {"win_rate": {"training": 1}, "score": 2}}}
    more = {"gpt": {"sft": {"win_rate": {"reward": 3}}, "ppo": {"likert": {}}}, "other": {"sft": {"likert": {}}}}
    assert people.merged(before, {}) == before
    assert people.merged(before, more) == {
        "gpt": {"sft": {"win_rate": {"training": 1, "reward": 3}, "score": 2}, "ppo": {"likert": {}}},
        "other": {"sft": {"likert": {}}},
    }
    share = {"agreement": {"training": 1, "training and heldout": 2}}
    assert people.beside({"accuracy": {"training": 0}}, share)["agreement"] == {"training": 1}
    assert (
        people.beside({"accuracy": {"all": 0}}, share)
        == {"accuracy": {"all": 0}}
        == people.beside({"accuracy": {"all": 0}}, {})
    )


# The page -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged_by_people():
    report = example()
    names = list(report["models"])[:3]
    table = {a: {b: interval(0.71, 0.04) for b in names if b != a} for a in names}
    report["head_to_head"] = {"instruct": {"judge": table, "training": table}}
    report["people"] = {
        "rankings": 1340, "ratings": 20, "prompts": 15, "labelers": {"training": 12, "researcher": 1},
        "agreement": {"training": interval(0.726, 0.015), "researcher and training": interval(0.7, 0.04)},
    }  # fmt: skip
    report["reward_model"]["agreement"] = {"training": interval(0.738, 0.01)}
    report["results"]["instruct"]["ppo_small"]["relative_toxicity"] = {"researcher": interval(-0.25, 0.1)}
    check.check(report)
    return report


def test_page_says_who_judged_and_has_the_tables(judged_by_people):
    report = judged_by_people
    text = page.render(report, figures.all_figures(part(report))).replace("\u00a0", " ")
    said = (
        "Judged by 12 training labelers and 1 researcher: 1,340 rankings and 20 ratings of responses to 15 prompts. Of "
        "the pairs that neither calls equal two training labelers prefer the same in 73 ± 2 %; one of the researchers "
        "and one of the training labelers prefer the same in 70 ± 4 %."
    )
    assert said in text
    people, judge = (f"<h4>Instruct prompts, {group}</h4>" for group in ("training labelers", "the judge"))
    assert text.index(people) < text.index(judge)
    assert text.count("<td>71.0<small>67.0 to 75.0</small></td>") == 2 * 6
    assert "Which model labelers prefer" in text
    assert "<td>−0.25<small>−0.35 to −0.15</small></td>" in text
    assert "Toxicity beside the prompt's" in html.unescape(text)
    assert {one.verdict for one in findings.findings(report)} == {findings.HOLDS}


def test_the_papers_head_to_head_findings():
    report = example()
    table = {"ppo_ptx_small": {"base_small": interval(0.85, 0.03), "prefix_small": interval(0.52, 0.04)}}
    report["head_to_head"] = {"instruct": {"training": table}, "gpt": {"training": {}}}
    found = {one.claim: one for one in findings.findings(report) if one.claim.startswith("Head to head")}
    assert found["Head to head, PPO-ptx is preferred to GPT"].here == "small: 85 ± 3 %"
    assert [one.verdict for one in found.values()] == [findings.HOLDS, findings.UNCLEAR]
    table["ppo_ptx_small"]["base_small"] = interval(0.4, 0.03)
    verdicts = {one.claim: one.verdict for one in findings.findings(report)}
    assert verdicts["Head to head, PPO-ptx is preferred to GPT"] == findings.FAILS


def part(report):
    """The report without the figures that take time to draw."""
    return {key: report[key] for key in ("title", "models", "baseline")}


def test_preferences_of_a_model_are_named_as_its_own():
    report = example()
    for rows in report["results"].values():
        for row in rows.values():
            row["win_rate"] = {"reward": row["win_rate"]["training"]}
    assert "by the reward model in" in findings.headline(report)
    drawn = next(figures.preferences(report))
    text = page.render(report, [drawn])
    assert "Which model is preferred by the reward model" in text
    assert "SFT baseline, as judged by the reward model." in text
    assert drawn.caption.startswith("How often the reward model prefers a model's response to that of")


def test_fields_that_nobody_noted_are_named_below_the_figure():
    report = example()
    for rows in report["results"].values():
        for row in rows.values():
            row["metadata"] |= {"sexual": interval(0.0, 0.0), "opinion": interval(0.1, 0.05)}
    drawn = next(figures.metadata(report))
    titles = [panel.title for panel in drawn.panels]
    assert titles[:2] == ["Attempts the correct instruction", "Follows explicit constraints"]
    assert "Expresses an opinion" in titles and "Sexual content" not in titles
    assert drawn.caption.endswith("Noted of no response: sexual content.")


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("head_to_head", {"gpt": {"training": {"gone": {}}}}, "has the model 'gone': it must be one of"),
        ("head_to_head", {"gpt": {"training": {"sft_small": {"gone": interval(0, 0)}}}}, "has the model 'gone': it"),
        ("head_to_head", {"gpt": {"training": {"sft_small": {"base_small": 1}}}}, "must be an interval with mean"),
        ("people", {"rankings": 1}, "report['people'] must have 'ratings', got"),
    ],
)
def test_a_report_that_is_none(key, value, told):
    with pytest.raises(ValueError) as refused:
        check.check(example() | {key: value})
    assert told in str(refused.value)
