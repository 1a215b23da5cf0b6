"""The stage `benchmark` and its adapter to lm-evaluation-harness on tiny networks; beside the harness under torch."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="of the extra eval")
import lm_eval
import reference_model

from configs import benchmark as card
from instructgpt_jax import main, models
from instructgpt_jax.data import chats
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation.benchmarks import adapter, catalog, outcome
from instructgpt_jax.models import ModelConfig, hf
from instructgpt_jax.sharding import make_mesh

CONFIG = ModelConfig(vocab_size=290, num_layers=2, width=32, num_heads=4, mlp_width=64, max_length=64)
TASKS = ("hellaswag", "rte", "sst2", "wsc", "truthfulqa_mc1", "truthfulqa_mc2", "crows_pairs_english")
OURS = ("instructgpt_hellaswag", "instructgpt_crows_pairs_biased", "instructgpt_truthfulqa_qa_gen",
        "instructgpt_realtoxicity_basic")  # fmt: skip
NOUNS, VERBS = ("cat", "dog", "cow", "hen", "fox"), ("sees", "likes", "hears")


def sentences(count):
    every = [f"The {one} {verb} the {other}." for one in NOUNS for verb in VERBS for other in NOUNS]
    return [every[n] for n in np.random.default_rng(0).permutation(len(every))[:count]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small sets in the forms of evaluation/benchmarks/local.py."""
    folder, said = tmp_path_factory.mktemp("data"), sentences(12)
    sets = {"hellaswag": [], "rte": [], "sst2": [], "wsc": [], "truthfulqa": [], "crows_pairs": []}
    sets["realtoxicityprompts"] = [{"prompt": {"text": text, "toxicity": 0.1}} for text in said[:5]]
    for n in range(5):
        one, two, three = said[n], said[n + 3], said[n + 7]
        endings = [one, f"{two} {three}", three, "It rains."]
        sets["hellaswag"].append({"ctx": f"Animals: {one} {two}", "endings": endings, "label": n % 4})
        label = ("entailment", "not_entailment")[n % 2]
        sets["rte"].append({"premise": one, "hypothesis": two, "label": label})
        sets["sst2"].append({"sentence": f"{one} ", "label": n % 2})
        target = {"span1_index": 1, "span1_text": one.split()[1], "span2_index": 5, "span2_text": "it"}
        sets["wsc"].append({"text": f"{one} it runs.", "target": target, "label": bool(n % 2)})
        answers = {"Best Answer": one, "Correct Answers": f"{one}; {two}", "Incorrect Answers": f"{three}; No"}
        sets["truthfulqa"].append({"Type": "Adversarial", "Category": "x", "Question": f"{two[:-1]}?"} | answers)
        kind = {"stereo_antistereo": "stereo", "bias_type": "age"}
        sets["crows_pairs"].append({"sent_more": one, "sent_less": two} | kind)
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Two language models and a classifier in Hugging Face format."""
    folder = tmp_path_factory.mktemp("models")
    texts = [" ".join(sentences(60)), "Question: Answer: Passage: Yes No\n\n"]
    tokenizer = tokenizers.train(texts, CONFIG.vocab_size, folder / "t").pretrained(pad=False)
    for seed, name in enumerate(("first", "second", "judge")):
        network = CONFIG.replace(head="scalar" if name == "judge" else "lm")
        hf.save(folder / name, network, reference_model.random_params(network, models.init, seed), tokenizer)
    return folder


def model(policies, chat="", shards=1):
    mesh = make_mesh(dict(data=1, fsdp=shards, tensor=1), jax.devices()[:shards])
    network, params = hf.load(policies / "first", mesh)
    tokenizer = tokenizers.load(policies / "first", chats.Chat(chat))
    return adapter.PolicyLM(network, params, tokenizer, mesh, adapter.Options(128, 8, 8), seed=0)


def stage(policies, data, **changes):
    config = card.get_config(f"first={policies / 'first'},second={policies / 'second'}")
    settings = {"data_dir": str(data), "tasks": OURS, "row_length": 128, "microbatch_rows": 8, "batch_size": 8}
    config.benchmark.update(settings | changes)
    config.benchmark.graders.toxicity = str(policies / "judge")
    return config


def test_stage_goes_on_where_it_was_killed_and_every_number_is_in_its_parts(policies, data, tmp_path, monkeypatch):
    config, whole, killed = stage(policies, data), tmp_path / "whole", tmp_path / "killed"
    main.run(config, str(whole))
    ask, asked = main.benchmark.ask, []

    def until_the_third(*given):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(*given)

    monkeypatch.setattr(main.benchmark, "ask", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        main.run(config, str(killed))
    assert len(list((killed / "parts").iterdir())) == 2 and not (killed / "report").exists()
    main.run(config, str(killed))
    assert len(asked) == 3 + 6

    reports = [json.loads((folder / "report" / "report.json").read_text()) for folder in (whole, killed)]
    assert [report.pop("perf")["seconds"]["benchmark"] > 0 for report in reports] == [True, True]
    assert reports[0] == reports[1]
    report = reports[0]
    assert set(report["models"]) == {"first", "second"} and set(report["benchmarks"]) == set(OURS)
    for task, found in report["benchmarks"].items():
        for name, numbers in found.items():
            part = json.loads((whole / "parts" / f"{name}.{task}.json").read_text())
            for metric, each in part["values"].items():
                assert numbers[metric]["mean"] == pytest.approx(np.mean(each)) and numbers[metric]["n"] == 5
    assert {bar["metric"] for bar in report["benchmark_figures"]["tax"]} == {"acc_token"}
    assert "truthfulqa" not in report["benchmark_figures"]  # nobody judged the truth
    page = (whole / "report" / "index.html").read_text()
    figures = ("figure_bias", "figure_benchmarks", "figure_toxicity", "figure39_toxicity_by_prompt")
    for shown in (*figures, "instructgpt_truthfulqa_qa_gen, n = 5"):
        assert shown in page

    with open(whole / "samples" / "instructgpt_realtoxicity_basic.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["", "model_type", "prompt_type", "context", "sample", "toxicity"]
    first = [float(line["toxicity"]) for line in lines if line["model_type"] == "first" and line["toxicity"]]
    mean = report["benchmarks"]["instructgpt_realtoxicity_basic"]["first"]["toxicity"]
    assert len(lines) == 10 and mean["mean"] == pytest.approx(np.mean(first)) and mean["n"] == len(first)
    of_prompts = report["toxicity_by_prompt"]["instructgpt_realtoxicity_basic"]["models"]["first"]
    assert of_prompts == [{"low": 0.0, "high": 0.2, "toxicity": mean}]  # the toxicity of all prompts is 0.1
    found = outcome.toxicity_by_prompt((0.0, 0.19, 0.2, 1.0, None, 0.9), (0.1, 0.3, None, 0.8, 0.7, 0.6))
    assert [(part["low"], part["toxicity"]["mean"], part["toxicity"]["n"]) for part in found] == [
        (0.0, pytest.approx(0.2), 2), (0.8, pytest.approx(0.7), 2),
    ]  # fmt: skip


def test_data_that_have_changed_are_refused(policies, data, tmp_path):
    config, own = stage(policies, data, tasks=("instructgpt_crows_pairs_basic",)), tmp_path / "data"
    own.mkdir()
    rows = (data / "crows_pairs.jsonl").read_text().splitlines(keepends=True)
    (own / "crows_pairs.jsonl").write_text("".join(rows))
    config.benchmark.data_dir = str(own)
    main.run(config, str(tmp_path / "run"))
    (tmp_path / "run" / "report" / "report.json").unlink()
    (own / "crows_pairs.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(ValueError, match="the data of instructgpt_crows_pairs_basic must stay the same"):
        main.run(config, str(tmp_path / "run"))


def test_accuracy_is_that_of_a_plain_loop_and_no_mesh_changes_it(policies, data):
    lm = model(policies)
    task = catalog.load(["instructgpt_hellaswag"], str(data))["instructgpt_hellaswag"]
    found = outcome.answer(lm, task, 0, -1, False)
    assert found["cut"] > 0 and found["n"] == 5  # the harness cuts as well, see the test with torch
    program = jax.jit(lambda row: jax.nn.log_softmax(models.logits(CONFIG, lm.params, row)[0]))
    right = []
    for document in outcome.documents(task, 0):
        means, context = [], task.fewshot_context(document, 0)
        for choice in document["choices"]:
            ids, start = lm.tok_encode(f"{context} {choice}"), len(lm.tok_encode(context))
            count, ids = len(ids) - start, ids[-65:]
            row = np.zeros((1, 64), np.int32)
            row[0, : len(ids) - 1] = ids[:-1]
            columns = np.arange(len(ids) - 1 - count, len(ids) - 1)
            means.append(np.asarray(program(row))[columns, ids[-count:]].mean())
        right.append(float(np.argmax(means) == document["gold"]))
    assert found["values"]["acc_token"] == right
    assert outcome.answer(model(policies, shards=8), task, 0, -1, False) == found


def test_a_chat_is_written_by_the_template(policies, data):
    lm = model(policies, chat="human_assistant")
    history = [{"role": "user", "content": "Who?"}]
    assert lm.apply_chat_template(history) == "\n\nHuman: Who?\n\nAssistant: "  # the harness moves the space
    begun = [*history, {"role": "assistant", "content": "The"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "\n\nHuman: Who?\n\nAssistant: The"
    assert "Assistant" in lm.chat_template(True) and model(policies).chat_template(True) is None
    task = catalog.load(["rte"], str(data))["rte"]
    plain, chat = (outcome.answer(one, task, 2, 1, bool(one.ours.chat)) for one in (model(policies), lm))
    assert plain["documents"] == chat["documents"] and plain["n"] == 2


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tasks": ()}, "config.benchmark.tasks must be a tuple of names of tasks, at least one"),
        ({"chat": True}, "config.data.template must be set for config.benchmark.chat=True"),
        ({"data_dir": "/not/there"}, "config.benchmark.data_dir must be a folder that exists"),
        ({"tasks": ("no_such_task",)}, r"config.benchmark.tasks must name tasks of ours or of lm-eval, got \['no_such"),
        ({"tasks": ("instructgpt_tldr",)}, "benchmark task instructgpt_tldr needs its data"),
        ({"graders": {"true": "perspective"}}, "config.benchmark.graders.true must be a model"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes, said, policies, data, tmp_path):
    with pytest.raises(ValueError, match=said):
        main.run(stage(policies, data, **changes), str(tmp_path))


def test_log_likelihoods_answers_and_metrics_are_those_of_the_harness_under_torch(policies, data):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    theirs, ours = HFLM(str(policies / "first"), device="cpu", dtype="float32", batch_size=4), model(policies)
    for names in (TASKS, ("instructgpt_truthfulqa_instruction_gen", "instructgpt_realtoxicity_biased")):
        found = []
        for lm in (theirs, ours):
            tasks = catalog.load(names, str(data))
            found.append(lm_eval.evaluate(lm, {"tasks": tasks, "groups": {}}, bootstrap_iters=0))
        for name in names:
            a, b = (one["samples"][name] for one in found)
            if "_gen" in name or "toxicity" in name:
                assert [one["resps"] for one in a] == [one["resps"] for one in b]
                continue
            left, right = ([answer[0] for one in some for answer in one["resps"]] for some in (a, b))
            np.testing.assert_allclose([x for x, _ in left], [x for x, _ in right], rtol=0, atol=1e-3)
            assert [x for _, x in left] == [x for _, x in right]
            numbers = [{k: v for k, v in one["results"][name].items() if isinstance(v, float)} for one in found]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-3) and numbers[0]

    request = lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (" ".join(sentences(40)),), 0)
    asked = [request, lm_eval.api.instance.Instance("loglikelihood_rolling", {}, ("x",), 1)]
    np.testing.assert_allclose(theirs.loglikelihood_rolling(asked), ours.loglikelihood_rolling(asked), rtol=1e-4)
    assert jnp.isfinite(jnp.array(ours.loglikelihood_rolling(asked))).all()
