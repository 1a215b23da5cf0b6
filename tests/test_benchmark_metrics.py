"""The measures of benchmark answers: worked out by hand, and over the samples that the paper released."""

import collections
import csv
import gzip
import json
import math
import pickle
import re

import numpy as np
import pytest

from instructgpt_jax.evaluation import text
from instructgpt_jax.evaluation.benchmarks import metrics, results, samples

FAMILIES = ("gpt", "sft", "ppo-noptx", "ppo-ptx")
# Means over all 100 contexts of the released files, XL / 6B / 175B of each family; the copy at hand has about half.
TOXICITY = {
    "basic prompt": (0.212, 0.213, 0.199, 0.186, 0.196, 0.189, 0.197, 0.191, 0.199, 0.180, 0.215, 0.195),
    "respectful prompt": (0.171, 0.204, 0.195, 0.153, 0.158, 0.184, 0.154, 0.142, 0.178, 0.171, 0.198, 0.173),
    "biased prompt": (0.256, 0.227, 0.244, 0.194, 0.188, 0.239, 0.213, 0.317, 0.411, 0.260, 0.461, 0.329),
}
TRUE = {
    "QA prompt": (0.31, 0.18, 0.24, 0.23, 0.40, 0.50, 0.54, 0.49, 0.74, 0.24, 0.44, 0.63),
    "QA + instruction": (0.30, 0.42, 0.54, 0.30, 0.71, 0.61, 0.56, 0.93, 0.86, 0.33, 0.71, 0.80),
    "instruction prompt": (0.27, 0.29, 0.39, 0.51, 0.55, 0.81, 0.73, 0.67, 0.94, 0.24, 0.50, 0.51),
}
TRUE_INFORMATIVE = {
    "QA prompt": (0.17, 0.18, 0.22, 0.19, 0.21, 0.28, 0.50, 0.48, 0.73, 0.23, 0.42, 0.61),
    "QA + instruction": (0.17, 0.20, 0.21, 0.20, 0.21, 0.21, 0.45, 0.16, 0.34, 0.33, 0.27, 0.50),
    "instruction prompt": (0.15, 0.22, 0.25, 0.21, 0.25, 0.16, 0.72, 0.58, 0.54, 0.16, 0.35, 0.26),
}
SQUAD = {
    "zeroshot": (0.504, 0.562, 0.567, 0.372, 0.423, 0.534, 0.465, 0.480, 0.407, 0.450, 0.431, 0.531),
    "fewshot": (0.536, 0.564, 0.679, 0.447, 0.552, 0.641, 0.453, 0.512, 0.480, 0.539, 0.611, 0.658),
}
DROP = {
    "zeroshot": (0.269, 0.330, 0.447, 0.239, 0.213, 0.233, 0.266, 0.202, 0.220, 0.232, 0.188, 0.283),
    "fewshot": (0.395, 0.423, 0.515, 0.412, 0.432, 0.543, 0.363, 0.410, 0.459, 0.392, 0.409, 0.494),
}
WORDS = {"": (59.6, 28.1, 22.7, 23.9, 32.2, 22.4, 26.6, 33.9, 45.0, 46.3, 46.4, 43.3)}
COLUMNS = {
    "instructgpt_truthfulqa_qa_gen": ("truthful_qa", "model_type prompt_type adversarial question answer true info"),
    "instructgpt_realtoxicity_biased": ("real_toxicity", "model_type prompt_type context sample toxicity"),
    "instructgpt_squadv2_fewshot": ("squadv2", "model_type prompt_type context ref_text sample"),
    "instructgpt_drop": ("drop", "model_type prompt_type context ref_text sample"),
    "instructgpt_wmt15_fr_en": ("fr_to_en", "model_type prompt_type context ref_text sample"),
    "instructgpt_tldr": ("tldr", "model_type context ref_text sample"),
}


def released(shared_data, name: str) -> list[dict]:
    with gzip.open(shared_data / "restricted" / f"instructgpt_samples_{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def grouped(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found = collections.defaultdict(list)
    for row in rows:
        found[row.get("prompt_type", ""), row["model_type"]].append(row)
    return found


def near(found: dict[tuple[str, str], float], figures: dict[str, tuple], spread: float, bias: float) -> None:
    """About half of the contexts: each mean near the one over all of them, and no common difference."""
    models = [f"{family}-{size}" for family in FAMILIES for size in ("xl", "6b", "175b")]
    assert found.keys() == {(prompt, model) for prompt in figures for model in models}
    apart = [found[prompt, model] - x for prompt in figures for model, x in zip(models, figures[prompt], strict=True)]
    assert np.abs(apart).max() < spread, apart
    assert abs(np.mean(apart)) < bias, np.mean(apart)


# By hand --------------------------------------------------------------------------------------------------------------


def test_choices_by_their_mean_log_probability_per_token():
    logprobs = (-4.0, -6.0, -5.0)
    assert metrics.choose(logprobs, (1, 1, 1)) == 0  # the sum
    assert metrics.choose(logprobs, (2, 4, 2)) == 1  # -2, -1.5, -2.5 per token
    assert metrics.choose((-1.0, -1.0), (1, 1)) == 0
    for wrong in (((), ()), ((-1.0,), (0,)), ((-1.0, -2.0), (1,))):
        with pytest.raises(ValueError, match="must have a positive length"):
            metrics.choose(*wrong)


def test_the_paper_s_rule_needs_the_number_of_tokens():
    document = {"choices": ["ab", "abcdefgh", "abc"], "gold": 1}
    pairs = [(-4.0, False), (-6.0, False), (-5.0, True)]
    assert results.choice(document, pairs) == {"acc": 0.0, "acc_norm": 1.0}  # per character: -2, -0.75, -1.67
    counted = [metrics.Loglikelihood(*pair, tokens) for pair, tokens in zip(pairs, (2, 4, 2), strict=True)]
    assert results.choice(document, counted) == {"acc": 0.0, "acc_norm": 1.0, "acc_token": 1.0}
    assert counted == pairs and list(zip(*counted, strict=True)) == list(zip(*pairs, strict=True))
    assert pickle.loads(pickle.dumps(counted[1])).tokens == 4


def test_entropy_of_a_pair():
    assert metrics.entropy_bits((-812.25, -812.25)) == 1.0
    p = 1 / (1 + math.exp(-1.5))
    expected = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert metrics.entropy_bits((-700.0, -701.5)) == pytest.approx(expected, rel=1e-12)
    assert metrics.entropy_bits((-1.0, -2000.0)) == 0.0
    with pytest.raises(ValueError, match="two finite log-probabilities"):
        metrics.entropy_bits((-1.0, -math.inf))


def test_pairs_and_masses():
    found = results.crows_pairs({}, [(-10.0, False), (-10.5, False)])
    assert found == {"entropy": metrics.entropy_bits((-10.0, -10.5)), "pct_stereotype": 1.0, "likelihood_diff": 0.5}
    assert results.winogender({}, [(-10.0, False), (-10.0, False)]) == {"entropy": 1.0, "pct_male": 0.0}
    document = {"mc2_targets": {"labels": [1, 0, 1]}}
    logprobs = [(math.log(p) - 800, False) for p in (0.1, 0.2, 0.3)]  # whose exponentials are 0
    assert results.mc2(document, logprobs)["acc"] == pytest.approx(2 / 3)


def test_graded_answers():
    assert metrics.true((0.5, 0.51, 1.0)) == [0.0, 1.0, 1.0]
    assert metrics.true_informative((0.9, 0.9, 0.1), (0.6, 0.4, 0.9)) == [1.0, 0.0, 0.0]
    assert metrics.toxicity((0.5, 0.1, 0.3, 0.7)) == {"mean": pytest.approx(0.4), "share": 0.5}
    with pytest.raises(ValueError, match="toxicity must be a probability for every answer, got None for answer 1"):
        metrics.toxicity((0.5, None))
    with pytest.raises(ValueError, match="true must be a probability"):
        metrics.true((1.5,))
    with pytest.raises(ValueError, match="at least one text"):
        metrics.toxicity(())


def test_f1_of_words():
    assert metrics.f1("The cat sat.", ["a cat", "dogs"]) == pytest.approx(2 / 3)
    assert metrics.f1("cat cat", ["cat"]) == pytest.approx(2 / 3)  # a word counts as often as it stands there
    assert metrics.f1("", ["Not in background."]) == 0.0
    assert metrics.f1("the", ["a"]) == 1.0  # articles alone: nothing on both sides
    assert (metrics.exact("not in Background", ["Not in background."]), metrics.exact("no", ["yes"])) == (1.0, 0.0)
    with pytest.raises(ValueError, match="at least one reference"):
        metrics.f1("x", [])


@pytest.mark.parametrize(
    "answer, references, expected",
    [
        ("7,761", [["7761"]], (1.0, 1.0)),
        ("7761.0", [["7761"]], (1.0, 1.0)),
        ("about 7762 dollars", [["7761 dollars"]], (0.0, 0.0)),  # another number
        ("the answer is 7761", [["7761"]], (0.0, 0.5)),
        ("Smith", [["Smith", "Jones"]], (0.0, 0.5)),  # one of two spans
        ("an ex-wife", [["ex wife"], ["x"]], (1.0, 1.0)),
        ("", [["Smith"]], (0.0, 0.0)),
        ("x", [[""], ["x"]], (1.0, 1.0)),
    ],
)
def test_drop_s_own_scores(answer, references, expected):
    assert metrics.drop_scores(answer, references) == expected


def test_drop_scores_as_the_harness_has_them(shared_data):
    drop = pytest.importorskip("lm_eval.tasks.drop.utils")
    for row in released(shared_data, "drop")[::4]:
        answers = [(answer,) for answer in row["ref_text"].split("|")]
        theirs = drop.process_results({"answers": answers}, [row["sample"]])
        assert metrics.drop_scores(row["sample"], answers) == (theirs["em"], theirs["f1"]), row
    both = ("Smith", "Jones")
    for answer, spans in (("Smith", both), ("Smith and Jones", both), ("1.5-2", ("2", "3"))):
        theirs = drop.process_results({"answers": [spans]}, [answer])
        assert metrics.drop_scores(answer, [spans]) == (theirs["em"], theirs["f1"])


def test_the_noun_of_an_answer():
    assert metrics.names("The barman.", "barman") and metrics.names("barman", "the barman")
    assert not metrics.names("the table", "barman") and not metrics.names(" ", "barman")
    document = {"span1_text": "Ann", "label": 0}
    assert results.wsc(document, [" Bill\nPassage:"]) == {"acc": 1.0}
    assert results.wsc(document | {"label": 1}, [" ann"]) == {"acc": 1.0}
    assert results.wsc(document | {"label": 1}, [""]) == {"acc": 0.0}


def test_answers_end_at_the_first_newline():
    assert results.cut("  North Sea \nQ: next") == "North Sea"
    assert results.cut("\n\nNorth Sea") == ""


# Over the released samples --------------------------------------------------------------------------------------------


def test_truthfulness_of_the_released_samples(shared_data):
    groups, true, both = grouped(released(shared_data, "truthful_qa")), {}, {}
    for key, rows in groups.items():
        right = informative = 0
        for row in rows:  # a plain loop
            if float(row["true"]) > 0.5:
                right += 1
                informative += float(row["info"]) > 0.5
        given = [float(row["true"]) for row in rows], [float(row["info"]) for row in rows]
        true[key], both[key] = np.mean(metrics.true(given[0])), np.mean(metrics.true_informative(*given))
        assert (true[key], both[key]) == (pytest.approx(right / len(rows)), pytest.approx(informative / len(rows)))
    near(true, TRUE, 0.12, 0.02)
    near(both, TRUE_INFORMATIVE, 0.12, 0.02)


def test_toxicity_of_the_released_samples(shared_data):
    found = {}
    for key, rows in grouped(released(shared_data, "real_toxicity")).items():
        total = toxic = 0.0
        for row in rows:
            total, toxic = total + float(row["toxicity"]), toxic + (float(row["toxicity"]) >= 0.5)
        measured = metrics.toxicity([float(row["toxicity"]) for row in rows])
        assert measured == {"mean": pytest.approx(total / len(rows)), "share": pytest.approx(toxic / len(rows))}
        found[key] = measured["mean"]
    near(found, TOXICITY, 0.06, 0.02)


def plain_f1(answer: str, reference: str) -> float:
    """Token F1 letter by letter, without a regular expression or a Counter."""
    bags = []
    for side in (answer, reference):
        kept = "".join(c for c in side.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        bags.append([word for word in kept.split() if word not in ("a", "an", "the")])
    left, same = list(bags[1]), 0
    for word in bags[0]:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / (len(bags[0]) + len(bags[1])) if same else float(bags[0] == bags[1])


@pytest.mark.parametrize("name, figures", [("squadv2", SQUAD), ("drop", DROP)])
def test_f1_of_the_released_samples(shared_data, name, figures):
    found = {}
    for key, rows in grouped(released(shared_data, name)).items():
        values = [metrics.f1(row["sample"], row["ref_text"].split("|")) for row in rows]
        plain = [max(plain_f1(row["sample"], one) for one in row["ref_text"].split("|")) for row in rows]
        assert values == pytest.approx(plain, abs=1e-12)
        found[key] = np.mean(values)
    near(found, figures, 0.09, 0.01)


def test_bleu_of_the_released_samples(shared_data):
    sacrebleu = pytest.importorskip("sacrebleu")
    for rows in grouped(released(shared_data, "fr_to_en")).values():
        items = [results.translation({"references": [row["ref_text"]]}, [row["sample"]])["bleu"] for row in rows]
        theirs = sacrebleu.BLEU().corpus_score([row["sample"] for row in rows], [[row["ref_text"] for row in rows]])
        assert results.corpus_bleu(items) == pytest.approx(theirs.score, abs=1e-9)
        assert 15 < theirs.score < 45


def plain_rouge_l(answer: str, reference: str) -> float:
    a, b = (re.findall("[a-z0-9]+", side.lower()) for side in (answer, reference))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    same = table[-1][-1]
    return 2 * same / (len(a) + len(b)) if same else 0.0


def test_rouge_l_and_words_of_the_released_samples(shared_data):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    words = {}
    for key, rows in grouped(released(shared_data, "tldr")).items():
        for row in rows[::8]:
            references = row["ref_text"].split("|")
            found = results.summary({"references": references}, [row["sample"]])
            theirs = [scorer.score(one, row["sample"])["rougeL"].fmeasure for one in references]
            assert found["rougeL"] == pytest.approx(max(theirs), abs=1e-12) == text.rouge_l(row["sample"], references)
            assert found["rougeL"] == pytest.approx(max(plain_rouge_l(row["sample"], one) for one in references))
        words[key] = np.mean([results.written({}, [row["sample"]])["words"] for row in rows])
    near(words, WORDS, 14, 1.5)


# In their layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", COLUMNS)
def test_samples_have_the_layout_of_the_released_ones(task, shared_data, tmp_path):
    name, columns = COLUMNS[task]
    rows = [row for row in released(shared_data, name) if row.get("prompt_type") == line_of(task)["prompt_type"]][:30]
    assert list(rows[0]) == columns.split() and len(rows) == 30
    documents, answers, scores = [], [], collections.defaultdict(list)
    for row in rows:
        references = row.get("ref_text", "").split("|")
        documents.append({"query": row.get("context", ""), "references": references, "question": row.get("question")})
        documents[-1]["type"] = "Adversarial" if row.get("adversarial") == "True" else "Non-Adversarial"
        answers.append(row.get("sample", row.get("answer")))
        for key in {"true", "info", "toxicity"} & row.keys():
            scores[key].append(row[key])
    lines = [
        line
        for number, row in enumerate(rows)
        for line in samples.rows(
            task,
            documents[number : number + 1],
            answers[number : number + 1],
            {key: values[number : number + 1] for key, values in scores.items()},
            row["model_type"],
        )
    ]
    assert lines == rows
    samples.write(tmp_path / "x.csv", lines)
    with open(tmp_path / "x.csv", encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["", *columns.split()]
    assert [row[0] for row in table[1:]] == [str(number) for number in range(30)]
    assert [dict(zip(table[0][1:], row[1:], strict=True)) for row in table[1:]] == rows


def line_of(task: str) -> dict:
    """The first line of a task's samples, of a document with nothing in it."""
    document = {"query": "", "references": [""], "question": "", "type": ""}
    return {"prompt_type": None} | samples.rows(task, [document], ["an answer"], {})[0]


def test_samples_without_a_grader_have_no_score():
    assert line_of("instructgpt_realtoxicity_basic") == {
        "prompt_type": "basic prompt", "context": "", "sample": "an answer", "toxicity": "",
    }  # fmt: skip
    line = line_of("instructgpt_truthfulqa_qa_instruction_gen")
    assert (line["prompt_type"], line["true"], line["info"]) == ("QA + instruction", "", "")
    assert line_of("instructgpt_quac_fewshot")["prompt_type"] == "fewshot"
    assert "prompt_type" not in samples.rows("instructgpt_cnn_dm", [{"query": "", "references": [""]}], [""], {})[0]


def test_samples_that_have_no_layout_are_refused(tmp_path):
    ours = (f"instructgpt_{name}" for name in ("rte", "truthfulqa_qa_mc1", "winogender_basic", "wsc"))
    for task in ("hellaswag", "drop", *ours):
        assert not samples.released(task)
        with pytest.raises(ValueError, match=f"a kind that the paper released .*, got {task}"):
            samples.rows(task, [], [], {})
    with pytest.raises(ValueError, match="a document and a score for each of 1 answers"):
        samples.rows("instructgpt_drop", [], ["x"], {})
    with pytest.raises(ValueError, match="same columns"):
        samples.write(tmp_path / "x.csv", [{"a": 1}, {"b": 1}])
    assert not list(tmp_path.iterdir())
