"""A configuration is resolved once, into a new one, and then only read."""

import json

import jax
import pytest
import small_runs
import tiny_supervised
from ml_collections import FrozenConfigDict

from configs import common
from instructgpt_jax import main, networks, sharding
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import tokenizer
from instructgpt_jax.stages import ppo, reward, sft
from instructgpt_jax.training import loop
from instructgpt_jax.validate import validate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_supervised.make_world(tmp_path_factory.mktemp("world"))


def mesh():
    return sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])


@pytest.mark.parametrize("name, build", [("sft", sft.build), ("reward", reward.build)])
def test_a_stage_runs_on_a_configuration_that_cannot_be_written(name, build, world, tmp_path):
    """What it found out is in config.json all the same: the architecture, and how many updates an epoch has."""
    changes = {f"{name}.num_steps": 1, "eval_every": -1, "snapshot_every": -1, "data.valid_fraction": 0.0}
    config = FrozenConfigDict(tiny_supervised.config(name, world, **changes))
    with jax.set_mesh(mesh()):
        stage = build(config, mesh())
        loop.run(stage, config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["eval_every"] == stored["snapshot_every"] == stage.steps_per_epoch == 7  # 60 examples, 8 a batch
    architecture = stored["models"]["model"].pop("architecture")
    assert architecture["width"] == 32 and architecture["head"] == ("lm" if name == "sft" else "scalar")
    expected = workdirs.as_json(config) | {"eval_every": 7, "snapshot_every": 7}
    assert stored == expected


def test_main_leaves_the_configuration_that_it_is_given_as_it_is(world, tmp_path, monkeypatch):
    """The stage gets a frozen one, with its paths and its tokenizer."""
    got = []
    monkeypatch.setitem(main.STAGES, "sft", lambda config, mesh, workdir: got.append(config))
    config = tiny_supervised.config("sft", world)
    config.mesh.fsdp, config.data.cache_dir = -1, "~/cache"
    before = config.to_dict()
    main.run(config, str(tmp_path / "run"))
    assert config.to_dict() == before
    (frozen,) = got
    with pytest.raises(AttributeError, match="immutable"):
        frozen.models.model.size = "other"
    assert frozen.data.tokenizer == str(tmp_path / "run" / "tokenizer") and "~" not in frozen.data.cache_dir


def test_what_stands_in_for_the_empty_networks_of_ppo(world, tmp_path):
    """Entries of their own in what is stored, and nothing in what was given."""
    small_runs.write(tmp_path)
    config = small_runs.get_config(tmp_path)
    config.data.tokenizer = str(world / "bpe")
    config.models.ref_policy = common.network(dtype="bfloat16")
    frozen = FrozenConfigDict(config)
    stage = ppo.build(frozen, mesh())
    entries = workdirs.as_json(workdirs.resolved(frozen, stage.models))["models"]
    assert all(entries[name].pop("architecture")["vocab_size"] == 300 for name in entries)
    policy, reward = (json.loads(frozen.models[name].to_json()) for name in ("policy", "reward"))
    assert entries == {
        "policy": policy,
        "ref_policy": policy | {"dtype": "bfloat16"},
        "reward": reward,
        "value": reward,
    }
    assert frozen.models.value.size == "" and stage.steps_per_epoch == 0


def test_an_architecture_is_found_and_not_given(world, tmp_path):
    """An entry that goes on has one: its shape is known, its weights are the checkpoint's."""
    vocabulary = tokenizer.load(world / "bpe")
    fresh = networks.build("config.models.model", common.network("tiny"), "scalar", mesh(), vocabulary, 0)
    entry = fresh.entry | {"init_from": str(tmp_path / "gone"), "residual_dropout": 0.2}
    again = networks.build("config.models.model", entry, "scalar", mesh(), vocabulary, 0)
    assert again.config == fresh.config.replace(residual_dropout=0.2) and "architecture" not in common.network("tiny")
    with pytest.raises(ValueError, match="config.models.model must go on from a checkpoint of the workdir"):
        again.load()
    config = tiny_supervised.config("sft", world)
    for field in ("architecture", "version"):
        config.models.model = common.network("tiny", **{field: entry.get(field, "step 1")})
        with pytest.raises(ValueError, match=f"config.models.model must have no {field}"):
            validate(config, mesh())


def test_a_run_is_no_longer_than_its_data(world):
    config = tiny_supervised.config("sft", world, **{"sft.num_steps": 99, "data.valid_fraction": 0.0})
    told = "^config.sft.num_steps must be at most the 15 batches of the data, got 99$"  # two epochs of 60, 8 a batch
    with pytest.raises(ValueError, match=told):
        sft.build(config, mesh())
