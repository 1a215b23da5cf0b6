"""Each refusal of a configuration names the key and both numbers."""

import re

import jax
import pytest
from ml_collections import ConfigDict

from configs import ppo_ptx_1b3, reward_6b, rlhf_init_1b3, sample, select, sft_1b3
from instructgpt_jax.sharding import make_mesh
from instructgpt_jax.validate import validate

CONFIGS = {"sft": sft_1b3, "init": rlhf_init_1b3, "reward": reward_6b, "ppo": ppo_ptx_1b3, "select": select}
CONFIGS |= {"sample": sample}


def refused(name, message, shards=1, argument="tiny", remove=(), **changes):
    """Asserts the whole message."""
    config = CONFIGS[name].get_config(argument).unlock()
    for key in remove:
        section, _, last = key.rpartition(".")
        del (config[section] if section else config)[last]
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = config
        for section in sections:
            place = place[section]
        place._fields[last] = value  # past ml_collections' own type check: a file may hold anything
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        validate(config, make_mesh({"data": 1, "fsdp": shards, "tensor": 1}, jax.devices()[:shards]))


def test_stage():
    refused("sft", "config.stage must be one of ['benchmark', 'collect', 'evaluate', 'evaluate_reward',", stage="train")
    refused("sft", "config.stage must be one of", remove=["stage"])


def test_keys():
    refused("sft", "config.sft must have the key 'row_length', got ['batch_size',", remove=["sft.row_length"])
    refused("sft", "config must have the key 'checkpoint', got", remove=["checkpoint"])
    refused("sft", "config.sft must be a section of the configuration, got 3", sft=3)
    refused("ppo", "config.models must have the entry 'value', got ['policy', 'ref_policy', 'reward']",
            remove=["models.value"])  # fmt: skip
    refused("ppo", "config.ppo must have no keys but", ppo__kl_coeff=0.1)
    refused("reward", "config.reward.eos_init must be a string, got 5", reward__eos_init=5)
    refused("reward", "config.reward must have the key 'head_l2', got ['batch_size',", remove=["reward.head_l2"])


@pytest.mark.parametrize(
    "name, key, value, expected",
    [
        ("sft", "sft.batch_size", "8", "an integer of at least 1, got '8'"),
        ("sft", "sft.batch_size", True, "an integer of at least 1, got True"),
        ("sft", "seed", -1, "an integer of at least 0 and below 2**31, got -1"),
        ("sft", "seed", 2**31, "an integer of at least 0 and below 2**31, got 2147483648"),
        ("sft", "sft.optimizer.lr", 0.0, "a positive number, got 0.0"),
        ("sft", "sft.optimizer.lr", float("nan"), "a positive number, got nan"),
        ("sft", "sft.optimizer.b2", 1.0, "a number of at least 0 and below 1, got 1.0"),
        ("sft", "sft.loss_on_prompt", 1, "True or False, got 1"),
        ("sft", "sft.pretraining_fraction", 1.0, "a number of at least 0 and below 1, got 1.0"),
        ("sft", "data.demonstrations", "jsonl:x", "a tuple of strings, got 'jsonl:x'"),
        ("sft", "checkpoint.best_mode", "lowest", "one of ('min', 'max'), got 'lowest'"),
        ("sft", "sft.optimizer.schedule", "cos", "one of ('constant', 'linear', 'cosine'), got 'cos'"),
        ("sft", "sft.optimizer.eps_form", "tf", "one of ('optax', 'tensorflow'), got 'tf'"),
        ("sft", "data.cache_dir", "gs://b/cache", "a local path, or '', got 'gs://b/cache'"),
        ("sft", "data.tokenizer", "train:many", "a directory, a Hub id, train:SIZE with a SIZE of at least 258, or ''"),
        ("ppo", "eval_every", -1, "an integer of at least 0 (PPO has no epochs), got -1"),
        ("ppo", "snapshot_every", -1, "an integer of at least 0 (PPO has no epochs), got -1"),
        ("reward", "reward.max_completions", 1, "an integer of at least 2, got 1"),
        ("ppo", "ppo.kl_coef", -0.02, "a number of at least 0, got -0.02"),
        ("ppo", "ppo.lam", 1.5, "a number in [0, 1], got 1.5"),
        ("ppo", "ppo.clip_range", 0, "a positive number, got 0"),
        ("ppo", "ppo.ema_decay", 1.0, "a number of at least 0 and below 1, got 1.0"),
        ("ppo", "ppo.missing_eos_score", "low", "a number, or None, got 'low'"),
        ("ppo", "ppo.num_epochs", 3, "0 (prompts repeat, config.ppo.iterations ends the run), got 3"),
        ("ppo", "rollout.wave", -1, "an integer of at least 0, got -1"),
        ("ppo", "rollout.cache", "fp4", "one of ('full', 'int8'), got 'fp4'"),
        ("ppo", "ppo.distribution_every", -1, "an integer of at least 0, got -1"),
        ("select", "select.top_p", 0.0, "a number above 0 and at most 1, got 0.0"),
        ("select", "select.by", "luck", "one of ('score', 'loss'), got 'luck'"),
    ],
)
def test_types_and_ranges(name, key, value, expected):
    refused(name, f"config.{key} must be {expected}", **{key.replace(".", "__"): value})


def test_sources():
    refused(
        "sft",
        "config.data.demonstrations must name at least one source, got (); for example "
        "--config.data.demonstrations=jsonl:data/demonstrations.jsonl",
        argument="",
    )
    missing = "config.data.pretraining must name at least one source "
    refused("init", missing + "(config.sft.pretraining_fraction=0.1), got ()", data__pretraining=())
    refused("ppo", missing + "for the ptx term (config.ppo.ptx_coef=27.8), got ()", data__pretraining=())
    refused("reward", "config.data.comparisons: a data source must be jsonl:GLOB, ", data__comparisons=("x.jsonl",))
    refused("sft", "config.data.pretraining must name at least one source (config.data.tokenizer='train:400'), got ()",
            data__tokenizer="train:400", data__pretraining=())  # fmt: skip
    refused("reward", "config.data.demonstrations: a data source must be", data__demonstrations=("x.jsonl",))
    refused("select", "config.data.valid_fraction must be above 0", data__valid_fraction=0.0)


def test_rows_and_shards():
    refused("sft", "config.sft.microbatch_rows must be a multiple of config.mesh.data x config.mesh.fsdp = 4, got 6",
            shards=4, sft__microbatch_rows=6)  # fmt: skip


def test_batches_of_episodes():
    shards = "a multiple of config.mesh.data x config.mesh.fsdp = 8"
    refused("ppo", "config.ppo.batch_size must be a multiple of config.ppo.num_minibatches = 5, got 32",
            ppo__num_minibatches=5)  # fmt: skip
    refused("ppo", f"config.ppo.batch_size / config.ppo.num_minibatches must be {shards}, got 4",
            shards=8, ppo__num_minibatches=8)  # fmt: skip
    refused("ppo", f"config.rollout.wave must be {shards}, got 4", shards=8, rollout__wave=4)
    refused("ppo", "config.ppo.old_logprobs must be 'auto' or 'forward' for config.rollout.cache='int8', ",
            rollout__cache="int8", ppo__old_logprobs="sampling")  # fmt: skip
    refused("ppo", "config.ppo.distribution_every must be a multiple of config.log_every = 2, got 3",
            log_every=2, ppo__distribution_every=3)  # fmt: skip
    refused("ppo", f"config.ppo.microbatch_rows must be {shards}, got 4", shards=8, ppo__microbatch_rows=4)
    refused("ppo", f"config.ppo.ptx_microbatch_rows must be {shards}, got 4",
            shards=8, ppo__ptx_microbatch_rows=4)  # fmt: skip
    refused("select", f"config.select.batch_size must be {shards}, got 12", shards=8, select__batch_size=12)
    refused("sample", f"config.sample.batch_size must be {shards}, got 6", shards=8, sample__batch_size=6)


def test_the_length_of_a_run_and_its_warm_up():
    refused("sft", "config.sft.optimizer.warmup_steps must be at most config.sft.num_steps = 8, got 9",
            sft__optimizer__warmup_steps=9)  # fmt: skip
    product = "config.ppo.iterations x num_minibatches x inner_epochs = 16"
    refused("ppo", f"config.ppo.value_optimizer.warmup_steps must be at most {product}, got 17",
            ppo__value_optimizer__warmup_steps=17)  # fmt: skip
    refused("sft", "config.sft.num_steps must be above 0 for config.sft.num_epochs=0 (without end), got 0",
            sft__num_epochs=0, sft__num_steps=0)  # fmt: skip


def test_folds():
    by_people = "config.data.valid_fraction must be above 0: it measures the training groups, got 0"
    refused("reward", by_people, reward__folds=3, data__valid_fraction=0.0)
    refused("reward", "config.reward.folds must be 0 or an integer of at least 2, got 1", reward__folds=1)


def test_lengths():
    refused(
        "ppo",
        "config.ppo.row_length must hold config.ppo.max_prompt_length + config.ppo.response_length = 128 tokens, "
        "got 127",
        ppo__row_length=127,
    )


def test_what_to_use_is_named():
    config = select.get_config("tiny")
    config.models.model = ConfigDict({"size": "tiny", "init_from": "", "weights": ""})
    with pytest.raises(ValueError, match=r"config.models.model.init_from must be .* got '' \(stage 'select'\)"):
        validate(config, make_mesh({"data": 1, "fsdp": 8, "tensor": 1}))


def test_loss_needs_no_reward_model():
    config = select.get_config("tiny").unlock()
    config.select.by = "loss"
    del config.models["reward"]
    validate(config, make_mesh({"data": 1, "fsdp": 8, "tensor": 1}))
