"""What docs/from_trl.md says of us: its keys are of configs/common.py, its examples are records, its metrics logged."""

import dataclasses
import json
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from configs import common
from instructgpt_jax.data import forms, schema
from instructgpt_jax.models import ModelConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "from_trl.md").read_text()
# The fields of PPOConfig and OnPolicyConfig of TRL 0.24.0, and the parameters of PPOTrainer but for callbacks and the
# like; the other fields of TrainingArguments are too many.
THEIRS = """
    exp_name reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator
    cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation logging_steps gradient_checkpointing bf16
    run_name dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations
    response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path world_size
    num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size push_to_hub
    processing_class model ref_model reward_model train_dataset value_model eval_dataset peft_config
""".split()


def table(heading):
    """The rows of the table under a heading, each a list of cells."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_key_is_one_of_ours():
    config = common.ppo(1e-6, 1e-6, 0.0)
    config.models.policy = config.models.reward = common.network()
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    keys = set(re.findall(r"config\.([a-z0-9_]+(?:\.[a-z0-9_]+)*)", TEXT))
    for key in keys:
        section, name = config, key
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        assert isinstance(section, ConfigDict) and (name in section or path[0] == "models" and name in fields), key
    assert len(keys) > 50
    settings = set(config.ppo) - {"num_epochs", "ptx_ratio", "ptx_row_length", "ptx_microbatch_rows", "old_logprobs"}
    assert settings <= {key.split(".")[1] for key in keys if key.startswith("ppo.")}


def test_every_argument_of_theirs_is_there_once():
    found = [name for row in table("Arguments") for name in re.findall(r"`(\w+)`", row[0])]
    assert set(THEIRS) <= set(found) and len(found) == len(set(found))


RECORDS = table("Records")


@pytest.mark.parametrize("title, kind, example", RECORDS, ids=[row[0] for row in RECORDS])
def test_every_example_is_a_record(title, kind, example):
    record, why = forms.understood(json.loads(example.strip("`")), kind)
    schema.validate(record, kind)
    assert not why and len(RECORDS) == 10
    if title == "preference, implicit prompt":
        assert record == {"prompt": "The sky is", "completions": [" blue.", " green."], "ranking": [1, 2]}


def test_every_metric_is_logged():
    code = "".join(path.read_text() for path in (ROOT / "instructgpt_jax").rglob("*.py"))
    names = {name for row in table("Metrics") for name in re.findall(r"`(\w+/\w+)`", f"{row[1]} {row[2]}")}
    rates = {"policy/learning_rate", "value/learning_rate"}
    assert rates < names and len(names) > 15 and 'f"{name}/learning_rate"' in code
    assert {name for name in names - rates if f'"{name}"' not in code} == set()
