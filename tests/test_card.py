"""The model card, of workdirs that are written here by hand: what stands in them must stand in it."""

import json
import re

import jax.numpy as jnp
import pytest
import report_example
import yaml
from huggingface_hub import ModelCard

from instructgpt_jax.report import card
from instructgpt_jax.training import checkpoint

SHAPE = dict(num_layers=2, width=64, num_heads=4, vocab_size=50_257, max_length=1024)
SPENT = dict(from_step=0, tokens=2e6, flops=1.296e20, seconds=5400.0, devices=["8 x TPU v5 lite"])
SPENT |= {"versions": {"jax": "0.10.2"}}
READ = dict(records=1200, examples=1000, validation=150, left_out={"bad": 50}, fingerprint="0123456789abcdef")
HOURS = "| 1.3e+20 | 1.5 | 1.5 | 8 x TPU v5 lite |"  # 1.296e20 / 8.64e19, 5400 / 3600


def stage(folder, kind, models, data=None, sources=None, saved=None, **more):
    """A workdir with a configuration, what was read, and with `saved` a checkpoint that has this beside it."""
    folder.mkdir(parents=True)
    config = {"stage": kind, "models": models, "data": sources or {}, kind: {}} | more
    (folder / "config.json").write_text(json.dumps(config))
    if data is not None:
        (folder / "data.json").write_text(json.dumps(data))
    if saved is not None:
        with checkpoint.Checkpoints(folder, 1, "", "min") as checkpoints:
            checkpoints.save(saved["step"], {"params": {"w": jnp.zeros(1)}}, saved, {})


def network(init_from):
    return dict(init_from=str(init_from), architecture=SHAPE)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """SFT of a base of the Hub, a reward model, PPO that is half done, an evaluation, benchmarks and comparisons."""
    folder = tmp_path_factory.mktemp("run")
    whole = dict(step=40, num_steps=40, spent=SPENT)
    sources = ["hf:acme/dolly:train#prompt=instruction", "jsonl:/home/me/private/data/own|a.jsonl"]
    stage(
        folder / "sft", "sft", {"model": network("acme/base-1b")}, {"demonstrations": READ},
        {"demonstrations": sources}, whole,
    )  # fmt: skip
    groups = {"groups": {"heldout": 300, "training": 700}}
    stage(
        folder / "reward", "reward", {"model": network(folder / "sft")}, {"comparisons": READ | groups},
        {"comparisons": ["hf:acme/hh:train"]}, whole,
    )  # fmt: skip
    stage(
        folder / "ppo", "ppo", {"policy": network(folder / "sft"), "reward": network(folder / "reward")},
        {"prompts": READ}, {"prompts": ["hf:acme/hh:train#unique"]},
        dict(step=50, num_steps=100, spent=SPENT | {"from_step": 20, "versions": {"jax": "0.11.0"}}),
        ppo=dict(max_prompt_length=512, response_length=256),
    )  # fmt: skip
    where = {"report": str(folder / "report")}
    stage(folder / "evaluate", "evaluate", {"policy": network(folder / "ppo")}, evaluate=where)
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text(json.dumps(report_example.example()))
    stage(folder / "rewards", "evaluate_reward", {"reward": network(folder / "reward")})
    accuracy = report_example.interval(0.617, 0.021)
    table = {"hf:acme/hh:test": {"reward": {"accuracy": accuracy}}, "all": {"reward": {"accuracy": accuracy}}}
    (folder / "rewards" / "rewards.json").write_text(json.dumps(table))
    stage(folder / "other", "evaluate", {"policy": network("runs/other")})  # of something else
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")  # nobody knows whose
    (folder / "seconds.json").write_text("{}")
    return folder


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def check_tables(text):
    """Each row of a table has as many cells as its head."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table


def test_the_card_of_an_exported_policy(pipeline):
    text = card.of_network(str(pipeline / "ppo"), "lm")
    check_tables(text)
    assert head(text) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": ["acme/base-1b"],
        "datasets": ["acme/dolly", "acme/hh"], "tags": ["instructgpt", "rlhf", "ppo"],
    }  # fmt: skip
    assert ModelCard(text).data.base_model == ["acme/base-1b"]  # as the Hub's library reads it
    details = section(text, "Model details")
    assert "Base: `acme/base-1b`" in details
    assert "`sft` (sft): 2 layers, width 64, 4 heads, vocabulary 50,257" in details
    data = section(text, "Data")
    assert "| 1,200 | 1,000 | 150 | 50 bad | `0123456789ab` |" in data
    assert r"`jsonl:…/data/own\|a.jsonl`" in data and "/home/me" not in text and str(pipeline.parent) not in text
    labelers = section(text, "Labelers")
    assert "| reward | held-out labelers | 300 |" in labelers and "| reward | training labelers | 700 |" in labelers
    assert "Accuracy, % of pairs" in labelers and "Agreement of labelers, % of pairs" in labelers
    training = section(text, "Training")
    assert f"| sft | 40 | 2,000,000 {HOURS}" in training and f"| reward | 40 | 2,000,000 {HOURS}" in training
    assert f"| ppo | 50 of 100, counted from step 20 | 2,000,000 {HOURS}" in training
    assert "| all |  |  | 3.89e+20 | 4.5 | 4.5 |  |" in training
    assert "SFT 4.9 petaflop/s-days" in training and "PPO-ptx 60" in training
    assert "- sft, reward: jax 0.10.2\n- ppo: jax 0.11.0\n" in training
    evaluation = section(text, "Evaluation")
    assert "### Instruct prompts, n = 1,000" in evaluation and "| training labelers | 8.0 (" in evaluation
    assert "Reward models" not in evaluation  # its own network is not what those comparisons measured
    assert "accuracy by the mean per token, %" in section(text, "Benchmarks")
    assert "prompts of up to 512 tokens, and answers of up to 256" in section(text, "Limits")


def test_the_card_of_an_exported_reward_model(pipeline):
    text = card.of_network(str(pipeline / "reward"), "scalar")
    check_tables(text)
    assert head(text)["pipeline_tag"] == "text-classification" and "reward-model" in head(text)["tags"]
    assert "| ppo |" not in text and "A reward model: it scores" in text
    evaluation = section(text, "Evaluation")
    assert "| `hf:acme/hh:test` | 61.7 (59.6 to 63.8) |" in evaluation and "Instruct prompts" not in evaluation


def test_the_card_of_a_pipeline_has_all_stages(pipeline):
    text = card.of_pipeline(pipeline, ("sft", "reward", "ppo", "evaluate", "rewards", "export"))
    check_tables(text)
    assert "pipeline_tag" not in head(text)
    rows = [line.split(" ")[1] for line in section(text, "Training").splitlines() if HOURS in line]
    assert rows == ["sft", "reward", "ppo"]
    assert "61.7" in section(text, "Evaluation") and "Instruct prompts" in section(text, "Evaluation")


def test_a_run_that_was_moved_finds_what_moved_with_it(pipeline, tmp_path):
    moved = tmp_path / "moved"
    pipeline.rename(moved)
    try:
        text = card.of_network(str(moved / "ppo"), "lm")
        assert "| sft | 40 |" in text and "Instruct prompts" in text
    finally:
        moved.rename(pipeline)


def test_a_workdir_without_evaluation_says_so_in_its_sections(tmp_path):
    stage(tmp_path / "ppo", "ppo", {"policy": network("")}, saved=dict(step=3, num_steps=3))
    for text in (card.of_network(str(tmp_path / "ppo"), "lm"), card.of_pipeline(tmp_path, ("ppo", "evaluate"))):
        check_tables(text)
        assert "Not evaluated: " in section(text, "Evaluation") and "None was run" in section(text, "Benchmarks")
        assert "no record of the data" in section(text, "Data") and "do not say who ranked" in section(text, "Labelers")
        assert "| ppo | 3 | not recorded |" in section(text, "Training")  # a run from before it was recorded
        assert "Base: none" in text and "base_model" not in head(text)


def test_stages_of_two_rounds_are_told_apart(tmp_path):
    for n in (1, 2):
        stage(tmp_path / f"round{n}" / "sft", "sft", {"model": network("")}, saved=dict(step=n, num_steps=2))
    training = section(card.of_pipeline(tmp_path, ("round1/sft", "round2/sft")), "Training")
    assert "| round1/sft | 1 of 2 |" in training and "| round2/sft | 2 |" in training


def test_folds_are_one_stage_that_cost_what_all_have_cost(tmp_path):
    sources = {"comparisons": ["jsonl:c.jsonl"]}
    stage(tmp_path / "folds", "reward", {"model": {"init_from": ""}}, sources=sources)
    for name in ("fold0", "fold1"):
        saved = dict(step=20, num_steps=20, spent=SPENT)
        stage(tmp_path / "folds" / name, "reward", {"model": network("")}, {"comparisons": READ}, sources, saved)
    text = card.of_pipeline(tmp_path, ("folds",))
    check_tables(text)
    assert "| folds | 40 | 4,000,000 | 2.59e+20 | 3 | 3 | 8 x TPU v5 lite |" in section(text, "Training")
    assert "`folds` (reward): 2 layers" in text and "| folds | comparisons |" in text


def test_a_network_that_was_not_trained_here(tmp_path):
    text = card.of_network("acme/base-1b", "lm")
    assert "Nothing was trained." in text and head(text)["base_model"] == ["acme/base-1b"]
    assert "Nothing was trained." in card.of_pipeline(tmp_path, ("sft",))


def test_simulated_labelers_are_no_people(tmp_path):
    sources = {"demonstrations": ["simulated:demonstrations:train"]}
    stage(tmp_path / "sft", "sft", {"model": network("")}, {"demonstrations": READ}, sources)
    limits = section(card.of_network(str(tmp_path / "sft"), "lm"), "Limits")
    assert "nothing in this card is a statement about people" in limits


def test_a_damaged_file_is_named(pipeline):
    path = pipeline / "rewards" / "rewards.json"
    text = path.read_text()
    path.write_text(text[:-9])
    try:
        with pytest.raises(ValueError, match=rf"{path} must be JSON, as its stage wrote it, got "):
            card.of_network(str(pipeline / "reward"), "scalar")
    finally:
        path.write_text(text)


def test_a_report_that_is_none_is_named_and_left_out(pipeline, capfd):
    path = pipeline / "report" / "report.json"
    text, others = path.read_text(), []
    report = json.loads(text)
    del report["models"]
    try:
        for damaged in (json.dumps(report), text[:-9]):
            path.write_text(damaged)
            others.append(card.of_network(str(pipeline / "ppo"), "lm"))
            assert f"card: without the report {path}: " in capfd.readouterr().err
    finally:
        path.write_text(text)
    assert others[0] == others[1] != card.of_network(str(pipeline / "ppo"), "lm")
    assert not capfd.readouterr().err
