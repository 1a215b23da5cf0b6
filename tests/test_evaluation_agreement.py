"""Agreement, alpha and the tables of labelers: against plain loops, numbers by hand and published annotations."""

import gzip
import itertools
import json
import random
import re

import numpy as np
import pytest

from instructgpt_jax.evaluation import agreement, quality
from instructgpt_jax.evaluation.agreement import Ranking

KRIPPENDORFF = (  # Krippendorff 2011, Computing Krippendorff's alpha-reliability, section D; . = not observed
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def lines(path):
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def plain(rankings):
    """(same, decided): a loop over tasks, two rankings of different labelers, and two items."""
    same = decided = 0
    for task in {one.task for one in rankings}:
        for a, b in itertools.combinations([one for one in rankings if one.task == task], 2):
            for i, j in itertools.combinations(range(len(a.ranks)), 2):
                x, y = (a.ranks[i], a.ranks[j]), (b.ranks[i], b.ranks[j])
                if a.labeler == b.labeler or 0 in (*x, *y) or x[0] == x[1] or y[0] == y[1]:
                    continue
                decided += 1
                same += (x[0] < x[1]) == (y[0] < y[1])
    return same, decided


def test_agreement_by_hand():
    rankings = [
        Ranking("t", "a", "training", (1, 2, 3)),
        Ranking("t", "b", "training", (1, 3, 2)),  # with a: two of three
        Ranking("t", "c", "heldout", (2, 1, 1)),  # decides 0-1 and 0-2, against both
        Ranking("u", "a", "training", (1, 2, 0)),
        Ranking("u", "c", "heldout", (1, 2, 3)),  # with a: the one pair that both saw
        Ranking("v", "c", "heldout", (1, 2, 3)),  # alone
    ]
    found = agreement.pairs(rankings)
    assert [(pair.same, pair.decided) for pair in found] == [(2, 3), (0, 2), (0, 2), (1, 1)]
    shares = agreement.by_group(found, seed=0)
    assert list(shares) == ["training", "heldout and training"]
    assert shares["training"] == {"mean": 2 / 3, "low": 2 / 3, "high": 2 / 3, "n": 1}
    both = shares["heldout and training"]
    assert both["mean"] == 1 / 5 and (both["low"], both["high"], both["n"]) == (0, 1, 2)
    assert agreement.share([], 0) is None
    assert agreement.share(agreement.pairs([Ranking("t", "a", "", (1, 1)), Ranking("t", "b", "", (1, 2))]), 0) is None
    with pytest.raises(ValueError, match="^rankings of task t must have as many ranks, got"):
        agreement.pairs([Ranking("t", "a", "", (1, 2)), Ranking("t", "b", "", (1, 2, 3))])


def test_the_bootstrap_is_over_tasks():
    """Each of 400 tasks is agreed on wholly or not at all: the interval is that of 400 coins, not of 4,000 pairs."""
    rng = random.Random(0)
    found = [agreement.Pair(str(n), ("a", "b"), ("", ""), 10 * rng.randint(0, 1), 10) for n in range(400)]
    shown = agreement.share(found, seed=1)
    half = 1.96 * (shown["mean"] * (1 - shown["mean"]) / 400) ** 0.5
    assert shown["n"] == 400 and shown["high"] - shown["low"] == pytest.approx(2 * half, rel=0.05)
    assert agreement.share(found, seed=1) == shown


def published(folder, name):
    """The rankings of a published file, as its fields have them."""
    for number, row in enumerate(lines(folder / f"{name}.jsonl.gz")):
        names = row.get("annotator_ids") or range(len(row["annotators"]))
        yield from (
            Ranking(str(number), str(who), "", tuple(ranks))
            for who, ranks in zip(names, row["annotators"], strict=True)
        )


def judged(folder):
    """WMT 2015: several judges a segment, each of whom saw five of its translations."""
    rows = lines(folder / "restricted" / "wmt15_fr_en_rankings_judges.jsonl.gz")
    systems = {row["segment"]: [] for row in rows}
    for row in rows:
        systems[row["segment"]] += [name for name in row["systems"] if name not in systems[row["segment"]]]
    for row in rows:
        ranks = dict(zip(row["systems"], row["ranking"], strict=True))
        yield Ranking(
            str(row["segment"]), row["judge"], "", tuple(ranks.get(name, 0) for name in systems[row["segment"]])
        )


@pytest.mark.parametrize(
    "name",
    [
        "comparisons/pandalm_pairs_3annotators", "comparisons/tldr_openai_pairs",
        "restricted/news_summary_pairs_6annotators", "restricted/wmt15_fr_en_rankings_judges",
    ],
)  # fmt: skip
def test_published_annotations(shared_data, name):
    rankings = list(judged(shared_data) if "wmt15" in name else published(shared_data, name))
    found = agreement.share(agreement.pairs(rankings), seed=0)
    same, decided = plain(rankings)
    assert found["mean"] == same / decided and decided > 20
    assert found["low"] < found["mean"] < found["high"] < 1 and found["mean"] > 0.5  # better than chance


def test_alpha_of_the_published_example():
    pytest.importorskip("krippendorff", reason="the extra 'label'")
    table = [row.split() for row in KRIPPENDORFF]
    values = [(unit, float(row[unit])) for unit in range(12) for row in table if row[unit] != "."]
    for level, published in {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849, "ratio": 0.797}.items():
        assert round(agreement.alpha(values, level), 3) == published
    assert agreement.alpha([("u", 1.0), ("u", 1.0), ("v", 2.0)], "nominal") is None  # nobody could have disagreed
    assert agreement.alpha([("u", 1.0), ("v", 2.0)], "nominal") is None


def test_alpha_of_published_annotations(shared_data):
    """QAGS: three people a sentence; alpha from its definition, 1 - observed / expected disagreement."""
    pytest.importorskip("krippendorff", reason="the extra 'label'")
    for dataset, printed in {"cnndm": 0.51, "xsum": 0.34}.items():  # Wang et al. 2020, section 4.1, of all sentences
        units = [
            [answer == "yes" for answer in sentence["consistent"]]
            for row in lines(shared_data / "restricted" / "qags_consistency_3annotators.jsonl.gz")
            if row["dataset"] == dataset
            for sentence in row["summary_sentences"]
        ]
        found = agreement.alpha([(n, float(one)) for n, given in enumerate(units) for one in given], "nominal")
        total = sum(len(given) for given in units)
        observed = sum(sum(a != b for a, b in itertools.permutations(g, 2)) / (len(g) - 1) for g in units) / total
        yes = sum(map(sum, units))
        expected = 2 * yes * (total - yes) / (total * (total - 1))
        assert found == pytest.approx(1 - observed / expected) and found == pytest.approx(printed, abs=0.12)


def test_alpha_without_its_library(monkeypatch):
    monkeypatch.setattr(agreement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the extra 'label' \(pip install 'instructgpt-jax\[label\]'\)"):
        agreement.alpha([("u", 1.0), ("u", 2.0)], "nominal")


# --- the tables ---


def comparison(task, labeler, group, ranking, at=None, seconds=None, completions=("p", "q", "r")):
    return {
        "prompt": "?", "completions": list(completions), "ranking": ranking, "task": task, "labeler": labeler,
        "group": group, "at": at, "seconds": seconds,
    }  # fmt: skip


def rating(task, labeler, group, answer, value, at=None, seconds=None, **fields):
    return {
        "prompt": "?", "answer": answer, "rating": value, "fields": fields, "task": task, "labeler": labeler,
        "group": group, "at": at, "seconds": seconds,
    }  # fmt: skip


def test_labelers_by_hand(tmp_path, capsys):
    times = {"t": "2026-01-01T10:00:00Z", "u": "2026-01-01T11:00:00Z", "v": "2026-01-02T09:00:00Z"}
    a = {"t": [1, 2, 3], "u": [1, 2, 2], "v": [1, 1, 1]}
    comparisons = [comparison(t, "a", "training", a[t], times[t], 60.0 + 30 * n) for n, t in enumerate(a)]
    comparisons += [comparison("t", "b", "heldout", [2, 1, 2], completions=("p", "q", "p ")),
                    comparison("u", "b", "heldout", [1, 2, 3])]  # fmt: skip
    with pytest.raises(ValueError, match="^rankings of task t must have as many ranks"):  # another page of that name
        quality.summary(comparisons, [], 0)
    comparisons[3] = comparison("t", "b", "heldout", [2, 1, 3])
    ratings = [rating("t", "a", "training", "p", 5, times["t"], 60.0), rating("v", "a", "training", "q", 1, times["v"])]
    files = {"comparisons": comparisons, "ratings": ratings}
    for name, of in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of))
    paths = [f"--{name}={tmp_path}/{name}.jsonl" for name in files]
    quality.main([*paths, f"--output={tmp_path}/quality.json"])
    found = json.loads((tmp_path / "quality.json").read_text())
    # t: 0-1 differ, 0-2 and 1-2 alike; u: a decides 0-1 and 0-2, as b does.
    assert found["agreement"]["heldout and training"]["mean"] == 4 / 5 and found["alpha"] == {}
    of = found["labelers"]["a"]
    assert (of["group"], of["tasks"], of["ratings"], of["seconds"]) == ("training", 3, 2, 90.0)
    assert of["hours"] == round(270 / 3600, 4) and of["ties"]["mean"] == 4 / 9 and of["rating"]["mean"] == 3
    assert of["agreement"]["mean"] == 4 / 5 and of["agreement"]["n"] == 2
    # t, then u and v: 60 s and 105 s; no tie and 4 of 6; 2/3 and 2/2; rated 5 and 1.
    drift = {name: value["mean"] for name, value in of["drift"].items()}
    assert drift == pytest.approx({"seconds": 45.0, "ties": 4 / 6, "agreement": 1 / 3, "rating": -4.0})
    assert found["labelers"]["b"]["drift"] is None and found["labelers"]["b"]["seconds"] is None
    shown = capsys.readouterr().out
    assert re.search(r"^heldout and training +80.0 % +\S+ % to 100.0 %  2$", shown, re.MULTILINE)
    assert "a                        training         3        90    44.4 %    80.0 %      3.00" in shown


def test_groups_may_be_numbers():
    comparisons = [comparison("t", name, group, [1, 2, 3]) for name, group in (("a", 0), ("b", 1), ("c", "heldout"))]
    found = quality.summary(comparisons, [rating("t", "a", 0, "p", 5)], 0)
    assert set(found["agreement"]) == {"0 and 1", "0 and heldout", "1 and heldout"}
    assert {name: of["group"] for name, of in found["labelers"].items()} == {"a": "0", "b": "1", "c": "heldout"}
    assert "a                               0" in "\n".join(quality.table(found))


def test_alpha_by_question_and_group():
    pytest.importorskip("krippendorff", reason="the extra 'label'")
    rng, ratings = np.random.default_rng(0), []
    for n in range(30):
        value = int(rng.integers(1, 8))
        for labeler, group in (("a", "training"), ("b", "training"), ("c", "heldout")):
            own = value if group == "training" else int(rng.integers(1, 8))
            line = rating("t", labeler, group, f"answer {n}", own, opinion=own > 4, hallucination=None, sexual=False)
            ratings += [line, line | {"answer": f"answer {n} "}]  # equal outputs are rated once
    found = quality.alphas(ratings)
    assert set(found) == {"rating", "opinion"}  # nobody said whether, or all said no
    assert set(found["rating"]) == {"all", "training"}
    assert found["rating"]["training"] == found["opinion"]["training"] == 1
    assert 0 < found["rating"]["all"] < 0.9


def test_lines_that_are_none(tmp_path, capsys):
    cases = {
        "comparisons": (comparison("t", "a", "", [1, 2]), "ranking must give one rank for each"),
        "ratings": (rating("t", "a", "", "p", 8), "rating must be an integer from 1 to 7, got 8"),
    }
    for name, (line, told) in cases.items():
        (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(SystemExit):
            quality.main([f"--{name}={tmp_path}/x.jsonl"])
        assert f"error: {tmp_path}/x.jsonl:1: {told}" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text(json.dumps(rating("t", "a", [1], "p", 7)) + "\n")
    with pytest.raises(SystemExit):
        quality.main([f"--ratings={tmp_path}/x.jsonl"])
    assert "x.jsonl:1: group must be a string or an integer, got [1]" in capsys.readouterr().err
    line = rating("t", "a", "", "p", 7)
    del line["labeler"]
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit):
        quality.main([f"--ratings={tmp_path}/x.jsonl"])
    assert "x.jsonl:1: missing field 'labeler'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main([])
    assert "--comparisons or --ratings must name a file, got neither" in capsys.readouterr().err
