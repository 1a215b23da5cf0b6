"""Every configuration loads, whole and shrunk, passes the check, and has the paper's numbers."""

import importlib
import pathlib
import re

import jax
import pytest
from ml_collections import ConfigDict

from instructgpt_jax import pipeline
from instructgpt_jax.sharding import make_mesh
from instructgpt_jax.validate import validate

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "measured", "__init__"))
STAGES = ("demonstrations", "comparisons", "prompts", "pretraining")

# Ouyang et al. 2022. Appendix C.1 (16 epochs, residual dropout 0.2) and C.3 (2 epochs, a tenth pretraining data):
# learning rate, batch, epochs, share of pretraining data, residual dropout.
FINE_TUNING = {
    "sft_1b3": (9.65e-6, 32, 16, 0.0, 0.2),
    "sft_6b": (9.65e-6, 32, 16, 0.0, 0.2),
    "sft_175b": (5.03e-6, 8, 16, 0.0, 0.2),
    "rlhf_init_1b3": (5e-6, 32, 2, 0.1, 0.0),
    "rlhf_init_6b": (1.04e-5, 32, 2, 0.1, 0.0),
    "rlhf_init_175b": (2.45e-6, 8, 2, 0.1, 0.0),
}
# Appendix C.4 and E.9: policy rate, value rate, ptx coefficient.
PPO = {
    "ppo_1b3": (8e-6, 9e-6, 0.0),
    "ppo_6b": (8e-6, 9e-6, 0.0),
    "ppo_175b": (2.55e-6, 5e-6, 0.0),
    "ppo_ptx_1b3": (1e-5, 9e-6, 27.8),
    "ppo_ptx_6b": (1e-5, 9e-6, 27.8),
    "ppo_ptx_175b": (2.55e-6, 5e-6, 27.8),
}


def load(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


def parts(config):
    """The configurations of single stages in a configuration; what a pipeline leaves to the user is some file."""
    if config.stage != "pipeline":
        return [config]
    for key, value in config.items():
        if value == ():
            config[key] = (f"jsonl:{key}.jsonl",)
        elif value == "" and key != "only":
            config[key] = key
    return [ConfigDict(pipeline.stage_config(config, name, "{workdir}")).unlock() for name in config.order]


def with_sources(config):
    for kind in STAGES:
        config.data[kind] = (f"jsonl:{kind}.jsonl",)
    if config.stage == "evaluate_reward":
        config.evaluate_reward.comparisons = config.data.comparisons
    elif config.stage == "label":
        config.label.source = ("jsonl:unranked.jsonl",)
    return config


def mesh_of(config):
    """The smallest mesh that the configuration asks for, on the suite's eight devices."""
    shape = {axis: 1 if size == -1 else size for axis, size in config.mesh.items()}
    return make_mesh(shape, jax.devices()[: shape["data"] * shape["fsdp"] * shape["tensor"]])


def check_optimizer(optimizer, lr, schedule):
    assert optimizer.lr == lr and optimizer.schedule == schedule
    assert (optimizer.b1, optimizer.b2) == (0.9, 0.95)  # appendix C
    if schedule == "cosine":
        assert optimizer.final_fraction == 0.1 and optimizer.warmup_steps == 0


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_passes_the_check(name):
    for argument in ("", "tiny"):
        for config in parts(load(name, argument)):
            validate(with_sources(config) if argument == "" else config, mesh_of(config))


@pytest.mark.parametrize("name", NAMES)
def test_tiny_needs_no_files_and_no_downloads(name):
    for config in parts(load(name, "tiny")):
        for kind in STAGES:
            assert all(source.startswith(("simulated:", "jsonl:{workdir}/")) for source in config.data[kind])
        for entry in config.models.values():
            assert entry.init_from == "" or entry.init_from.startswith(("runs/", "{workdir}/"))
            assert entry.init_from.endswith("_tiny") or not entry.init_from.startswith("runs/")
        validate(config, make_mesh({"data": 1, "fsdp": 8, "tensor": 1}))  # and on eight devices


@pytest.mark.parametrize("name", NAMES)
def test_docstring_is_an_experiment_card(name):
    card = importlib.import_module(f"configs.{name}").__doc__
    for field in ("Command:", "Hardware:"):
        assert field in card
    assert f"--config=configs/{name}.py" in card


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_has_the_papers_numbers(name):
    lr, batch, epochs, share, dropout = FINE_TUNING[name]
    config = load(name)
    assert config.stage == "sft"
    assert (config.sft.batch_size, config.sft.num_epochs, config.sft.num_steps) == (batch, epochs, 0)
    assert config.sft.pretraining_fraction == share and config.sft.loss_on_prompt is False
    assert config.models.model.get("residual_dropout", 0.0) == dropout
    assert config.snapshot_every == (-1 if epochs == 16 else 0)
    assert config.data.max_prompt_tokens == 1024 and config.sft.row_length == 2048
    check_optimizer(config.sft.optimizer, lr, "cosine")
    if name.endswith("175b"):
        assert config.models.model.size == "gpt3-175b" and config.mesh.data * config.mesh.fsdp == batch


# The paper has dropout in the SFT baseline alone; the two embedded worlds have their own, in supervised stages alone.
DROPOUT = {"quickstart": 0.1, "e2e": 0.1, "instruct": 0.0} | {name: row[-1] for name, row in FINE_TUNING.items()}


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_that_of_the_paper(name):
    for config in parts(load(name)):
        for entry in config.models.values():
            assert entry.get("embedding_dropout", 0.0) == entry.get("attention_dropout", 0.0) == 0.0
            rate = entry.get("residual_dropout", 0.0)
            if config.stage == "sft":
                assert rate == DROPOUT[name]
            elif (name, config.stage) == ("e2e", "reward"):
                assert rate == 0.1
            else:
                assert rate == 0.0, config.stage


def test_reward_model_has_the_papers_numbers():
    config = load("reward_6b")
    assert config.stage == "reward" and config.models.model.init_from == "runs/sft_6b"
    assert (config.reward.batch_size, config.reward.num_epochs) == (64, 1)
    assert config.reward.max_completions == 9 and config.reward.row_length == 2048
    check_optimizer(config.reward.optimizer, 9e-6, "cosine")


@pytest.mark.parametrize("name", PPO)
def test_ppo_has_the_papers_numbers(name):
    policy_lr, value_lr, ptx_coef = PPO[name]
    config = load(name)
    c = config.ppo
    assert c.iterations * c.batch_size == 256_000 and c.batch_size == 512
    assert c.batch_size // c.num_minibatches == 64 and c.inner_epochs == 1
    assert c.temperature == 1.0 and c.gamma == 1.0 and c.kl_coef == 0.02 and c.clip_range == 0.2
    assert c.adaptive_kl.target == 0.0
    assert c.ema_decay == 0.992 and c.ptx_coef == ptx_coef and c.ptx_ratio == 8
    assert c.max_prompt_length + c.response_length == 2048
    check_optimizer(c.policy_optimizer, policy_lr, "constant")
    check_optimizer(c.value_optimizer, value_lr, "constant")
    assert c.policy_optimizer.warmup_steps == 10 * 8 and c.policy_optimizer.warmup_start == 0.1
    size = re.sub("ppo_(ptx_)?", "", name)
    assert config.models.policy.init_from == f"runs/rlhf_init_{size}"
    assert config.models.reward.init_from == "runs/reward_6b"  # and so does the value model's
    assert config.models.value.init_from == config.models.value.size == config.models.ref_policy.init_from == ""
