"""Entries of config.models: which stand in for others, what can be a Hub id, and what a frozen network looks like."""

import jax
import pytest
from ml_collections import ConfigDict

from instructgpt_jax import models, networks
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.sharding import make_mesh


def test_a_frozen_network_is_as_its_shapes_say(tmp_path):
    """In the dtype that it computes in, laid out by the rules; what else was loaded of the entry stays as it is."""
    mesh = make_mesh(dict(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    tokenizer = tokenizers.train(["the cat sees the dog"] * 9, 262, tmp_path)
    entry = dict(
        size="tiny", init_from="", num_layers=1, width=16, num_heads=4, mlp_width=32, max_length=16, dtype="bfloat16"
    )
    network = networks.build("config.models.reward", entry, "scalar", mesh, tokenizer, 0)
    trained, told, made = network.load(), networks.abstract_frozen(network), networks.freeze(network)
    assert jax.tree.structure(told) == jax.tree.structure(made)
    for shape, array in zip(jax.tree.leaves(told), jax.tree.leaves(made), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim)
    assert told["embed"]["tokens"].dtype == "bfloat16" and not told["embed"]["tokens"].sharding.is_fully_replicated
    assert told["scalar_head"]["bias"].dtype == "float32"
    assert {(x.dtype.name, x.is_deleted()) for x in jax.tree.leaves(trained)} == {("float32", False)}


def test_empty_entries_of_ppo_are_those_of_others():
    policy = {"size": "", "init_from": "runs/sft", "weights": "ema", "architecture": {"width": 8}}
    reward = {"size": "tiny", "init_from": "", "weights": "", "width": 16}
    empty = {"size": "", "init_from": "", "weights": ""}
    settings = {"policy": policy, "reward": reward, "ref_policy": empty | {"dtype": "bfloat16"}, "value": empty}
    config = ConfigDict({"stage": "ppo", "models": settings})
    assert networks.stand_ins(config) == {
        "ref_policy": {"size": "", "init_from": "runs/sft", "weights": "ema", "dtype": "bfloat16"},
        "value": reward,
    }
    for given in ({"init_from": "runs/reward"}, {"size": "tiny"}):
        config.models.value = empty | given
        assert [*networks.stand_ins(config)] == ["ref_policy"]
    config.stage = "evaluate"
    assert networks.stand_ins(config) == {}


def test_what_can_be_a_hub_id():
    assert all(map(networks.is_hub_id, ("openai-community/gpt2", "a_b.c/d-1")))
    others = ("gpt2", "runs/sft", "./models/a", "../a", "~/a", "a/b/c", "/models/a", "owner/a b", "a/", "/a", "")
    assert not any(map(networks.is_hub_id, others))


def test_rows_may_fill_the_shortest_context():
    short, long = (models.SIZES["tiny"].replace(max_length=length) for length in (8, 16))
    networks.check_context("config.sft.row_length", 8, long, short)
    with pytest.raises(ValueError, match="row_length must be at most the model's context of 8 tokens, got 9"):
        networks.check_context("config.sft.row_length", 9, long, short)
