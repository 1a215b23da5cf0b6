"""The evaluate stage on tiny models of the simulated world; what its parts measure, against slow ways of the same."""

import copy
import dataclasses
import functools
import itertools
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, pretrain_tiny, sft_1b3
from instructgpt_jax import main, models, networks, pipeline, sharding, simulated
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation import inputs, labelers, language
from instructgpt_jax.evaluation.answers import Examiner
from instructgpt_jax.evaluation.parts import Parts
from instructgpt_jax.labeling import kinds
from instructgpt_jax.stages import evaluate
from instructgpt_jax.training import ledger

MESH = {"data": 1, "fsdp": -1, "tensor": 1}
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a base model and an SFT model with two snapshots."""
    root = tmp_path_factory.mktemp("runs")

    def run(config, name, **changes):
        config.eval_every = 0
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        main.run(config, str(root / name))

    run(pretrain_tiny.get_config("tiny"), "base", data__tokenizer="train:400", pretrain__num_steps=2,
        data__pretraining=("simulated:pretraining:200",))  # fmt: skip
    run(sft_1b3.get_config("tiny"), "sft", models__model__init_from=f"{root}/base", sft__optimizer__lr=1e-2,
        sft__num_steps=2, data__demonstrations=("simulated:demonstrations:60",), sft__batch_size=8,
        snapshot_every=1)  # fmt: skip
    return root


def config(runs, **changes):
    settings = common.config("evaluate")
    settings.models.reward = common.network("tiny", max_length=256)  # fresh: it scores as well as any
    for name, folder in {"ref_policy": "base", "base": "base", "sft": "sft"}.items():
        settings.models[name] = common.network(init_from=f"{runs}/{folder}")
    settings.data.tokenizer = f"{runs}/base/tokenizer"
    settings.data.max_prompt_tokens = 96
    settings.data.pretraining = ("simulated:pretraining:test:40",)

    def model(label, method, model, prefix=False):
        return {"label": label, "method": method, "size": "tiny", "model": model, "prefix": prefix}

    settings.evaluate = {
        "title": "test",
        "models": {
            "prompted": model("GPT (prompted)", "prefix", "base", prefix=True),
            "base": model("GPT", "base", "base"),
            "sft": model("SFT", "sft", "sft"),
        },
        "order": ("sft", "base", "prompted"),
        "baseline": "sft",
        "distributions": {"instruct": ("simulated:prompts:test:30",), "gpt": ("simulated:gpt_prompts:test:30",)},
        "num_prompts": 12,
        "answers_per_prompt": 1,
        "split": "all",
        "labelers": True,
        "rankings": (),
        "ratings": (),
        "preferences": (),
        "references": (),
        "slots": False,
        "tasks": {"cloze": ("simulated:cloze:test:10",)},
        "pretraining": {"num_sequences": 6, "row_length": 64},
        "accuracy": ("simulated:comparisons:test:6", "simulated:comparisons_heldout:test:6"),
        "prefix": {"candidates": simulated.prefixes()[:2], "prompts": ("simulated:prompts:valid:4",), "max_length": 64},
        "overoptimisation": {"runs": {"sft": f"{runs}/sft"}, "prompts": ("simulated:prompts:valid:4",)},
        "curves": {"sft": f"{runs}/sft"},
        "prompt_sets": "",
        "folds": "",
        "sweeps": {"runs": {}, "repeats": {}, "beside": ()},
        "sweep_report": "",
        "batch_size": 8,
        "max_prompt_length": 96,
        "response_length": 8,
        "row_length": 128,
        "microbatch_rows": 8,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "parallel": 2,
        "num_samples": 2,
        "seconds": "",
        "report": "",
    }
    settings.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return settings


def read(workdir) -> dict:
    """The report without what may differ."""
    report = json.loads((workdir / "report" / "report.json").read_text())
    assert report.pop("perf")["seconds"]["evaluate"] > 0
    return report


def numbers_alone(report, folder):
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def killed(runs):
    """A workdir whose first run was killed in the middle of its answers, its second one at the last moment."""
    workdir, get = runs / "killed", Parts.get
    with pytest.MonkeyPatch.context() as patch:
        made = []

        def dies(self, name, make):
            if len(made) == 5:
                raise KeyboardInterrupt
            made.append(name)
            return get(self, name, make)

        patch.setattr(Parts, "get", dies)
        with pytest.raises(KeyboardInterrupt):
            main.run(config(runs), str(workdir))
        assert made[-1] == "answers.gpt.base" and not (workdir / "report").exists()
        patch.setattr(Parts, "get", get)
        patch.setattr(evaluate.reports, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main.run(config(runs), str(workdir))
        patch.setattr(evaluate.reports, "write", numbers_alone)
        patch.setattr(Examiner, "answer", None)  # nothing is left to answer
        main.run(config(runs), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def whole(runs):
    """The workdir of a run that answers with two policies at a time, as on the one CPU device of a laptop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.jax, "device_count", lambda: 1)
        main.run(config(runs), str(runs / "whole"))
    return runs / "whole"


def test_killed_and_started_again_gives_the_same_report(killed, whole):
    assert read(killed) == read(whole)


def test_damaged_parts_are_made_again_and_other_data_refused(runs, whole, tmp_path, capsys):
    """From the parts of a whole run: all but the damaged ones are taken as they are."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "report")
    damaged = ["reward_model", "answers.gpt.sft"]
    for name, content in zip(damaged, (b"", b'[{"text": "\xff'), strict=True):
        (tmp_path / "parts" / f"{name}.json").write_bytes(content)
    other = {"evaluate__distributions": {"instruct": ("simulated:prompts:test:30#1/2",)}}
    stored = json.loads((tmp_path / "config.json").read_text())
    changed = config(runs, **other)
    (tmp_path / "config.json").write_text(json.dumps(stored | {"evaluate": changed.evaluate.to_dict()}))
    told = r"^the data .* the same, got other distributions.gpt: .* now; distributions.instruct: .* now; take a new --w"
    with pytest.raises(ValueError, match=told):  # as if the same source had other records
        main.run(changed, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.reports, "write", numbers_alone)
        main.run(config(runs), str(tmp_path))
    log = capsys.readouterr().err
    assert [name for name in damaged if f"{name}.json is damaged (" in log] == damaged and log.count("is damaged") == 2
    assert read(tmp_path) == read(whole)


def test_a_complete_one_is_skipped_and_another_one_refused(runs, whole, capsys):
    before = (whole / "report" / "report.json").read_bytes()
    stored = json.loads((whole / "config.json").read_text())
    del stored["evaluate"]["answers_per_prompt"]  # as of a run from before there was this key
    (whole / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="evaluate.answers_per_prompt: 1 in the workdir, 2 asked for"):
        main.run(config(runs, evaluate__answers_per_prompt=2), str(whole))
    main.run(config(runs), str(whole))
    assert "evaluate: complete in" in capsys.readouterr().err
    assert (whole / "report" / "report.json").read_bytes() == before
    with pytest.raises(ValueError, match="evaluate.num_prompts: 12 in the workdir, 10 asked for"):
        main.run(config(runs, evaluate__num_prompts=10), str(whole))


def test_report(whole):
    report = read(whole)
    assert list(report["models"]) == ["sft", "base", "prompted"] and report["models"]["base"]["method"] == "base"
    assert report["distributions"] == {"gpt": {"n": 12}, "instruct": {"n": 12}}
    for rows in report["results"].values():
        assert list(rows) == ["sft", "base", "prompted"]
        assert rows["sft"]["win_rate"]["heldout"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 12}
        assert report["head_to_head"].keys() == report["results"].keys()
        assert rows["base"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)  # the base model is the reference
        assert abs(rows["prompted"]["kl"]["mean"]) > 0.01  # the reference does not see the prefix
        assert abs(rows["sft"]["kl"]["mean"]) > 0.01
        assert 1 <= rows["sft"]["likert"]["training"]["mean"] <= 7
        assert rows["sft"]["metadata"]["toxic"]["n"] == 12
        assert "judge" not in rows["sft"] and "bleu" not in rows["sft"] and "slot_coverage" not in rows["sft"]
    for distribution, groups in report["head_to_head"].items():
        for group, table in groups.items():
            rows = report["results"][distribution]
            assert all(table[name]["sft"] == rows[name]["win_rate"][group] for name in ("base", "prompted"))
    assert set(report["language"]) == {"ref_policy", "sft", "base"} and report["chance"] == {"cloze": 0.25}
    assert 4 < report["language"]["base"]["pretraining_loss"]["mean"] < 6.5
    assert sorted(report["reward_model"]["accuracy"]) == ["heldout", "training"]
    assert 0.6 < report["reward_model"]["agreement"]["training"] < 0.9
    assert report["curves"]["sft"]["sft/loss"][0][0] == 1
    assert [row["step"] for row in report["overoptimisation"]["sft"]] == [0, 1, 2]
    assert report["overoptimisation"]["sft"][0]["kl"] == pytest.approx(0, abs=1e-4)
    assert len(report["prefix"]["candidates"]) == 2
    scores = [candidate["score"] for candidate in report["prefix"]["candidates"]]
    assert scores[report["prefix"]["chosen"]] == max(scores)
    assert len(report["samples"]) == 4 and list(report["samples"][0]["responses"]) == ["sft", "base", "prompted"]
    assert (whole / "report" / "index.html").exists()


def test_people_and_the_reward_model_judge(runs, whole, tmp_path, capsys):
    """The answers of a whole run, with labels of other completions in place of the panel; more labels may come."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "report")
    (tmp_path / "parts" / "reward_model.json").unlink()
    unused = simulated.records("gpt_prompts:test:30")[-1]["prompt"]  # behind config.evaluate.num_prompts
    ranking = {
        "prompt": unused, "completions": ["a", "b", "c"], "policies": ["base", "sft", "sft"],
        "ranking": [1, 2, 1], "task": "t", "labeler": "x", "group": "heldout",
    }  # fmt: skip
    lines = [ranking, ranking | {"labeler": "y", "ranking": [2, 2, 1]}]
    (tmp_path / ".rankings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rated = {"prompt": "elsewhere", "answer": "a", "policy": "base", "rating": 6, "labeler": "x", "group": "heldout"}
    rated |= {"fields": {"opinion": True, "hallucination": None}}
    (tmp_path / ".ratings.jsonl").write_text(json.dumps(rated) + "\n")
    named = {"rankings": (f"jsonl:{tmp_path}/.rankings.jsonl",), "ratings": (f"jsonl:{tmp_path}/.ratings.jsonl",)}
    settings = config(runs, evaluate__labelers=False, evaluate__preferences=("reward",))
    stored = json.loads((tmp_path / "config.json").read_text()) | {"evaluate": settings.evaluate.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    settings.evaluate.update(named)
    main.run(settings, str(tmp_path))
    assert "evaluate: 2 rankings and 1 ratings by 2 labelers" in capsys.readouterr().err
    report = read(tmp_path)
    rates = report["results"]["gpt"]["base"]["win_rate"]
    assert rates["heldout"]["mean"] == (0.75 + 0.25) / 2
    assert report["results"]["gpt"]["sft"]["win_rate"]["heldout"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    answers = {n: json.loads((whole / "parts" / f"answers.gpt.{n}.json").read_text()) for n in ("base", "sft")}
    won = [a["score"] > b["score"] for a, b in zip(*answers.values(), strict=True)]
    assert rates["reward"]["mean"] == np.mean(won) and rates["reward"]["n"] == 12
    assert report["head_to_head"]["gpt"]["reward"]["sft"]["base"]["mean"] == pytest.approx(1 - np.mean(won))
    assert list(report["results"]["instruct"]["prompted"]["win_rate"]) == ["reward"]
    assert report["results"]["other"] == {
        "base": {
            "likert": {"heldout": {"mean": 6.0, "low": 6.0, "high": 6.0, "n": 1}},
            "metadata": {"opinion": report["results"]["other"]["base"]["metadata"]["opinion"]},
        }
    }
    assert report["people"]["labelers"] == {"heldout": 2}
    assert report["people"]["agreement"]["heldout"] == report["reward_model"]["agreement"]["heldout"]
    assert report["people"]["agreement"]["heldout"]["mean"] == 1  # both decide the pair b, c
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Judged by 2 held-out labelers: 2 rankings and 1 ratings of responses to 2 prompts." in page
    assert "GPT prompts, the reward model" in page and "Which model labelers prefer" not in page


def test_several_answers_to_a_prompt(runs, monkeypatch):
    monkeypatch.setattr(evaluate.reports, "write", numbers_alone)
    changes = {"order": ("sft", "base"), "num_prompts": 4, "num_samples": 6, "answers_per_prompt": 2, "tasks": {}}
    settings = config(runs)
    settings.evaluate.update({"overoptimisation": {"runs": {}}, "curves": {}} | changes)
    del settings.evaluate.models.prompted
    main.run(settings, str(runs / "several"))
    answers = json.loads((runs / "several" / "parts" / "answers.instruct.base.json").read_text())
    assert len(answers) == 8
    assert all(one["text"] != other["text"] for one, other in zip(answers[:4], answers[4:], strict=True))
    report = read(runs / "several")
    assert report["distributions"]["instruct"] == {"n": 4} and len(report["samples"]) == 8
    shown = report["results"]["instruct"]["base"]
    assert {shown[key]["n"] for key in ("score", "kl", "length", "gold")} == {4}
    assert shown["win_rate"]["training"]["n"] == shown["likert"]["heldout"]["n"] == shown["metadata"]["toxic"]["n"] == 4
    assert shown["score"]["mean"] == pytest.approx(np.mean([one["score"] for one in answers]))


def padded(ids) -> jax.Array:
    """(1, 96): a causal model does not see what stands behind."""
    return jnp.array([[*ids, *[0] * (96 - len(ids))]], jnp.int32)


logits = jax.jit(models.logits, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def scalars(network, params, tokens):
    hidden = models.hidden(network, params, tokens, jnp.arange(96)[None], jnp.ones_like(tokens))
    return models.scalar(network, params, hidden)


def token_logprobs(network, params, ids) -> np.ndarray:
    """Of each token but the first."""
    found = np.asarray(jax.nn.log_softmax(logits(network, params, padded(ids))[0]))
    return found[np.arange(len(ids) - 1), ids[1:]]


def test_answers_do_not_depend_on_the_batch(runs, whole, examiner):
    """Text, score and KL of an answer, against unpacked forward passes of one sequence at a time."""
    settings, examine, nets, mesh = examiner
    prompts = evaluate.inputs.load(settings, tokenizers.load(settings.data.tokenizer), longest=64).prompts["gpt"]
    with jax.set_mesh(mesh):
        params = {name: networks.freeze(nets[name]) for name in ("sft", "ref_policy", "reward")}
        answers = examine.answer(nets["sft"].config, params["sft"], "sft", prompts)
    kept = json.loads((whole / "parts" / "answers.gpt.sft.json").read_text())
    compared = 0
    for prompt, one, before in zip(prompts, answers, kept, strict=True):
        assert one["text"] == before["text"] and one["score"] == pytest.approx(before["score"], abs=1e-5)
        tokenizer = tokenizers.load(settings.data.tokenizer)
        ids = [i for part in tokenizer.encode([prompt, one["text"]]) for i in part]
        if one["ended"]:
            ids.append(tokenizer.eos_id)
        if len(ids) != len(tokenizer.encode([prompt])[0]) + one["length"]:
            continue  # a sampled text can have more than one encoding
        compared += 1
        logprobs = [token_logprobs(nets[name].config, params[name], ids) for name in ("sft", "ref_policy")]
        start = len(ids) - one["length"]
        assert one["kl"] == pytest.approx((logprobs[0] - logprobs[1])[start - 1 :].sum(), abs=1e-4)
        found = scalars(nets["reward"].config, params["reward"], padded(ids))
        assert one["score"] == pytest.approx(float(found[0, len(ids) - 1]), abs=1e-4)
    assert compared >= 3


@pytest.fixture(scope="module")
def examiner(runs):
    settings = config(runs)
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        tokenizer = tokenizers.load(settings.data.tokenizer)
        nets = evaluate.build_networks(settings, mesh, tokenizer)
        return settings, Examiner(settings, tokenizer, {n: nets[n] for n in ("reward", "ref_policy")}, mesh), nets, mesh


def test_closed_task_and_pretraining_loss(examiner):
    settings, _, nets, mesh = examiner
    tokenizer, network = tokenizers.load(settings.data.tokenizer), nets["sft"].config
    with jax.set_mesh(mesh):
        params = nets["sft"].load()

        def logprob(prompt, choice):
            begun, end = tokenizer.encode([prompt, choice])
            return token_logprobs(network, params, [*begun, *end])[len(begun) - 1 :]

        prompt, choices = "The fox lives in", [" the forest.", " soup.", " a b c."]
        each = [logprob(prompt, choice) for choice in choices]
        best = {rule: int(np.argmax([getattr(x, rule)() for x in each])) for rule in ("sum", "mean")}
        records = [{"prompt": prompt, "choices": choices, "answer": number} for number in range(3)]
        found = language.closed_task(network, params, tokenizer, records, settings.evaluate, mesh)
        assert found == {rule: [float(number == which) for number in range(3)] for rule, which in best.items()}
        logprobs, lengths = language.choice_logprobs(
            network, params, tokenizer, [(prompt, choice) for choice in choices], settings.evaluate, mesh
        )
        assert lengths == [len(x) for x in each]
        np.testing.assert_allclose(logprobs, [x.sum() for x in each], rtol=1e-5)
        assert language.chance([*records, {"choices": ["a", "b"]}]) == pytest.approx((3 * 1 / 3 + 1 / 2) / 4)

        sequences = [np.arange(3, 15, dtype=np.int32), np.full(12, 7, np.int32), np.arange(12, dtype=np.int32)]
        losses = language.pretraining_losses(network, params, sequences, 2, mesh)
        for sequence, loss in zip(sequences, losses, strict=True):
            assert loss == pytest.approx(-token_logprobs(network, params, sequence.tolist()).mean(), rel=1e-5)


def test_labelers_prefer_what_is_better():
    prompts = [record["prompt"] for record in simulated.records("prompts:test:150")]
    rng = np.random.default_rng(0)
    good, bad = [simulated.write(prompt, rng) for prompt in prompts], ["I do not know."] * len(prompts)
    found = labelers.judge(prompts, good, bad, seed=0)
    for group in simulated.GROUPS:
        assert found["win_rate"][group]["low"] > 0.8 and found["likert"][group]["mean"] > 5
    assert found["metadata"]["fails_instruction"]["mean"] < 0.1 > found["metadata"]["toxic"]["mean"]
    assert set(found["metadata"]) == {*kinds.FIELDS, "toxic"} and found["metadata"]["opinion"]["mean"] == 0
    assert found["metadata"]["hallucination"]["n"] < len(prompts)  # asked of closed-domain tasks alone
    assert found == labelers.judge(prompts, good, bad, seed=0) != labelers.judge(prompts, good, bad, seed=1)
    lost = labelers.judge(prompts, bad, good, seed=0)["win_rate"]["heldout"]["mean"]
    assert lost == pytest.approx(1 - found["win_rate"]["heldout"]["mean"])
    panels = [[labeler.name for labeler in labelers.panel_of(prompt, "heldout", 0)] for prompt in prompts]
    assert all(len(set(panel)) == 5 for panel in panels) and len({panel[0] for panel in panels}) == 8


def test_head_to_head_says_what_each_panel_says():
    """Each two policies, against asking the labelers one by one; and beside the baseline what `judge` says."""
    prompts = [record["prompt"] for record in simulated.records("prompts:test:20")] * 2
    rng = np.random.default_rng(0)
    good, other = ([simulated.write(prompt, rng) for prompt in prompts] for _ in range(2))
    texts = {"a": good, "b": other, "c": good[:30] + ["I do not know."] * 10}
    answers = {name: [{"text": text} for text in given] for name, given in texts.items()}
    found = labelers.head_to_head({"x": prompts}, {"x": answers}, ("a", "b", "c"), seed=3)["x"]
    for group in simulated.GROUPS:
        for first, second in itertools.permutations(texts, 2):
            wins = [
                np.mean([simulated.prefer(one, *case, 3) for one in labelers.panel_of(case[0], group, 3)])
                for case in zip(prompts, texts[first], texts[second], strict=True)
            ]
            said = found[group][first][second]
            assert said["mean"] == pytest.approx(np.mean(wins)) and said["n"] == len(set(prompts))
            assert said == labelers.judge(prompts, texts[first], texts[second], 3)["win_rate"][group]
        assert found[group]["a"]["c"]["mean"] > 0.5 and list(found[group]["b"]) == ["a", "c"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"order": ("sft", "base")}, "config.evaluate.order must name config.evaluate.models ['base', 'prompted',"),
        ({"baseline": "gpt3"}, "config.evaluate.baseline must be one of ('sft', 'base', 'prompted'), got 'gpt3'"),
        ({"split": "valid"}, "config.evaluate.split must be"),
        ({"ratings": ("jsonl:x",)}, "config.evaluate.labelers must be False where people judge (config.evaluate.rat"),
        ({"labelers": False, "rankings": ("x",)}, "config.evaluate.rankings: a data source must be jsonl:GLOB"),
        ({"labelers": False, "rankings": ("jsonl:x",)}, "config.evaluate.rankings: "),
        ({"preferences": ("gold",)}, "config.evaluate.preferences must be a tuple of ('reward', 'judge'), or ()"),
        ({"preferences": ("judge",)}, "config.evaluate.preferences must be of config.models ('base', 're"),
        ({"models__sft__method": "dpo"}, "config.evaluate.models.sft.method must be one of ('base',"),
        ({"models__sft__model": "gone"}, "config.models must have the entry 'gone'"),
        ({"prefix__candidates": ()}, "config.evaluate.prefix.candidates and max_length must be set"),
        ({"prefix__prompts": ()}, "config.evaluate.prefix.prompts must name at least one source, got ()"),
        ({"tasks__cloze": ("cloze",)}, "config.evaluate.tasks.cloze: a data source must be jsonl:GLOB"),
        ({"distributions__gpt": ("hf:x:y",)}, "config.evaluate.labelers=True must have simulated prompts, got"),
        (
            {"sweeps__runs": {"lr": {"key": "x", "values": ("1", "2"), "policies": ("sft", "ppo")}}},
            "config.evaluate.sweeps.runs.lr.policies must name policies of config.evaluate.models, got 'ppo'",
        ),
        (
            {"sweeps__runs": {"lr": {"key": "x", "values": ("1",), "policies": ("sft", "base")}}},
            "config.evaluate.sweeps.runs.lr.values must be two or more, each once, with a policy for each, got ('1',)",
        ),
        (
            {"sweeps__runs": {"lr": {"key": "x", "values": ("1", "2"), "policies": ("sft", "base")}}},
            "config.evaluate.sweeps.beside must have the baseline 'sft', got ()",
        ),
        ({"sweeps__repeats": {"a": ("sft",)}}, "config.evaluate.sweeps.repeats.a must have at least two policies"),
        ({"sweeps__beside": ("sft",)}, "config.evaluate.sweeps.runs must have a sweep for repeats and what stands"),
        ({"row_length": 100}, "config.evaluate.row_length must hold"),
        ({"max_prompt_length": 0}, "config.evaluate.max_prompt_length must be an integer of at least 1, got 0"),
    ],
)
def test_bad_configurations(tmp_path, changes, message):
    settings = config(tmp_path, **{f"evaluate__{key}": value for key, value in changes.items()})
    if "split" in changes:
        settings.data.valid_fraction, message = 0.0, "config.data.valid_fraction must be above 0"
    with pytest.raises(ValueError) as refused:
        main.check(settings, str(tmp_path))
    assert str(refused.value).startswith(message)


def test_a_prefix_and_a_chat_template_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="^config.data.template must be '' beside a model with a prefix, .* 'chat'"):
        main.check(config(tmp_path, data__template="chat"), str(tmp_path))


def test_bad_models_and_records(runs, tmp_path):
    settings = config(runs)
    settings.models.reward = common.network(init_from=f"{runs}/sft")
    with pytest.raises(ValueError, match="^config.models.reward must be a reward model, got a language model from"):
        main.run(settings, str(tmp_path / "a"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is love?"}\n')
    foreign = {"evaluate__distributions": {"instruct": (f"jsonl:{tmp_path}/prompts.jsonl",)}}
    with pytest.raises(ValueError, match="must have prompts of the simulated world in distributions.instruct, got 'Wh"):
        main.run(config(runs, **foreign), str(tmp_path / "d"))
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 2}\n')
    with pytest.raises(ValueError, match="tasks.jsonl:1: answer must be a number from 0 to 1, got 2"):
        main.run(config(runs, evaluate__tasks__cloze=(f"jsonl:{tmp_path}/tasks.jsonl",)), str(tmp_path / "b"))
    with pytest.raises(ValueError, match="^config.evaluate.overoptimisation.runs.sft must be a workdir with snapshots"):
        main.run(config(runs, evaluate__overoptimisation__runs__sft=f"{runs}/base"), str(tmp_path / "c"))


@pytest.mark.parametrize("key", ["distributions.few", "tasks.few", "prefix.prompts", "accuracy", "references"])
def test_a_key_whose_records_are_all_for_training_is_refused(runs, tmp_path, key):
    settings = config(runs, evaluate__labelers=False, evaluate__split="valid", data__valid_fraction=0.3)
    settings.evaluate.prefix.prompts = settings.evaluate.overoptimisation.prompts = ("simulated:prompts:valid:40",)
    record = {"prompt": "1", "completion": "a", "completions": ["a", "b"], "ranking": [1, 2], "choices": ["a", "b"]}
    (tmp_path / "few.jsonl").write_text(json.dumps(record | {"answer": 0}) + "\n")
    *above, last = key.split(".")
    section = settings.evaluate[above[0]] if above else settings.evaluate
    with section.unlocked():
        section[last] = (f"jsonl:{tmp_path}/few.jsonl",)
    message = f"^config.evaluate.{key} must leave at least one record .config.evaluate.split='valid', .*, got none"
    with pytest.raises(ValueError, match=message):
        inputs.load(settings, tokenizers.load(settings.data.tokenizer), 256)


def test_a_snapshot_that_lacks_ids_of_the_tokenizer_is_refused_at_the_start(runs):
    settings = config(runs)
    more = dataclasses.replace(tokenizers.load(settings.data.tokenizer), vocab_size=600)
    for name in ("reward", "ref_policy", "base", "sft"):
        settings.models[name] = common.network("tiny", vocab_size=600)
    with pytest.raises(ValueError, match=r"^config.evaluate.overoptimisation.runs.sft: .* tokenizer's 600, got \d{3}$"):
        evaluate.build_networks(settings, sharding.make_mesh(MESH), more)


def test_policies_are_evaluated_beside_each_other(monkeypatch):
    monkeypatch.setattr(pipeline.jax, "device_count", lambda: 1)
    pair, meshes = threading.Barrier(2, timeout=30), {}

    def one(name):
        pair.wait()  # passes only when both run
        meshes[name] = jax.sharding.get_abstract_mesh().shape

    settings = ConfigDict({"evaluate": {"parallel": 2}})
    evaluate.together(settings, sharding.make_mesh(MESH), ("a", "b"), one)
    assert meshes == {"a": MESH | {"fsdp": 1}, "b": MESH | {"fsdp": 1}}


def test_a_pipeline_counts_the_seconds_of_its_stages(tmp_path):
    stage = common.config("evaluate")
    settings = stage.copy_and_resolve_references()
    whole = copy.deepcopy(settings)
    stages = {"stages": {"a": settings, "b": whole}, "order": ("a", "b")}
    config = type(stage)({"stage": "pipeline", "only": "", "parallel": 1} | stages)

    def work(_, workdir):
        (tmp_path / workdir).mkdir(parents=True, exist_ok=True)
        if workdir.endswith("b"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, str(tmp_path), lambda *_: None, work)
    first = json.loads((tmp_path / "seconds.json").read_text())
    assert sorted(first) == ["a", "b", "together"]


def test_a_package_that_is_not_installed_does_not_stop_a_report():
    assert ledger.version("jax") == jax.__version__
    assert ledger.version("no-such-package") == "unknown"
