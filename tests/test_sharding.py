"""Meshes, rule tables, and one result on every mesh of eight devices."""

import functools
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from jax.sharding import PartitionSpec as P

from instructgpt_jax import losses, models, rollout, sharding
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.plan import cost, rings, topology

MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]
REMATERIALISED = "Involuntary full rematerialization"
# Three layers (no other dimension is 3), one windowed; grouped queries; both kinds of embedding.
CONFIG = ModelConfig(
    vocab_size=250,
    num_layers=3,
    width=32,
    num_heads=8,
    num_kv_heads=4,
    mlp_width=64,
    max_length=32,
    windows=(0, 4),
)
UNTIED = CONFIG.replace(
    positions="rotary", norm="rmsnorm", gated_mlp=True, activation="silu", tied_embeddings=False, remat="dots",
    residual="sandwich", norm_offset=1.0, scaled_embeddings=True, local_rotary_theta=100.0,
)  # fmt: skip


def mesh_of(shape):
    """Of the sizes of the axes, and perhaps the number of slices."""
    return sharding.make_mesh(dict(zip((*sharding.AXES, "slices"), shape, strict=False)))


def packed_rows(b=16, T=12):
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (b, T)), axis=1)[:, ::-1]
    positions = np.array([[np.sum(row[:t] == row[t]) for t in range(T)] for row in segments]) * (segments > 0)
    return tuple(np.asarray(x, np.int32) for x in (rng.integers(0, 250, (b, T)), positions, segments))


def loss(config, params, tokens, positions, segments):
    """Cross-entropy of the rows as the stages compute it, and the logits."""
    hidden = models.hidden(config, params, tokens, positions, segments)
    kernel, bias = models.unembedding(config, params)
    total = losses.cross_entropy(hidden, kernel, tokens, segments > 0, vocab_size=config.vocab_size, bias=bias, chunk=8)
    return total, models.project(config, params, hidden)


def gradients(config, params, rows, mesh=None):
    """Gradients and logits, on one device or on a mesh: parameters by TRAIN_RULES, rows over data and fsdp."""
    function = jax.grad(functools.partial(loss, config), has_aux=True)
    if mesh is None:
        return jax.jit(function)(params, *rows)
    shardings = sharding.param_shardings(mesh, params)
    split = jax.NamedSharding(mesh, P(sharding.BATCH))
    with jax.set_mesh(mesh):
        function = jax.jit(function, in_shardings=(shardings,) + (split,) * 3, out_shardings=(shardings, split))
        arguments = jax.device_put(params, shardings), *jax.device_put(rows, split)
        function = function.lower(*arguments).compile()
        gathered = re.findall(r"= \(?f32\[([\d,]+)\]\S* all-gather", function.as_text())
        if mesh.shape["fsdp"] > 1:  # parameters are gathered, one layer at a time
            assert gathered and not any(shape.startswith("3,") for shape in gathered), gathered
        return function(*arguments)


@functools.cache
def alone(config):
    """Parameters, and what one device makes of them."""
    params = reference_model.random_params(config, models.init)
    return params, gradients(config, params, packed_rows())


@pytest.mark.parametrize("shape", [*MESHES, (4, 2, 1, 2)], ids=str)
def test_every_mesh_gives_one_devices_logits_and_gradients(shape, capfd):
    config = UNTIED if shape in ((1, 8, 1), (2, 2, 2)) else CONFIG
    params, (expected, expected_logits) = alone(config)
    capfd.readouterr()
    got, logits = gradients(config, params, packed_rows(), mesh_of(shape))
    assert REMATERIALISED not in capfd.readouterr().err
    real = packed_rows()[2] > 0
    np.testing.assert_allclose(np.asarray(logits)[real], np.asarray(expected_logits)[real], rtol=1e-5, atol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))  # some gradients are 0 but for rounding
    for path, g in jax.tree_util.tree_leaves_with_path(expected):
        other = functools.reduce(lambda tree, key: tree[key.key], path, got)
        assert other.sharding.is_equivalent_to(
            jax.NamedSharding(mesh_of(shape), sharding.spec_for(sharding.path_name(path), sharding.TRAIN_RULES)), g.ndim
        )
        np.testing.assert_allclose(other, g, rtol=1e-4, atol=2e-6 * largest, err_msg=sharding.path_name(path))


@functools.cache
def sampled_alone():
    prompts, lengths = prompt_batch()
    generate = functools.partial(rollout.generate, CONFIG, max_new_tokens=6, eos_id=3)
    return jax.jit(generate)(alone(CONFIG)[0], prompts, lengths, seed=0)


def prompt_batch():
    rng = np.random.default_rng(1)
    return rng.integers(0, 250, (16, 7)).astype(np.int32), rng.integers(1, 8, 16).astype(np.int32)


@pytest.mark.parametrize(("shape", "wave"), [*zip(MESHES, (8, None, 4, None), strict=True)], ids=str)
def test_every_mesh_samples_the_same_tokens(shape, wave, capfd):
    params, mesh = alone(CONFIG)[0], mesh_of(shape)
    expected = sampled_alone()
    generate = functools.partial(rollout.generate, CONFIG, max_new_tokens=6, seed=0, eos_id=3, wave=wave)
    shardings, split = sharding.param_shardings(mesh, params), jax.NamedSharding(mesh, P(sharding.BATCH))
    capfd.readouterr()
    with jax.set_mesh(mesh):
        generate = jax.jit(generate, in_shardings=(shardings, split, split), out_shardings=split)
        got = generate(jax.device_put(params, shardings), *jax.device_put(prompt_batch(), split))
    assert REMATERIALISED not in capfd.readouterr().err
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_slots_of_shards_share_a_queue(monkeypatch, capfd):
    """More prompts than slots, some with several answers and some with none: each shard has its slots and its tray."""
    monkeypatch.setattr(rollout, "TRAY", 1)
    params, mesh, (prompts, lengths) = alone(CONFIG)[0], mesh_of((2, 2, 2)), prompt_batch()
    counts = np.array([3, 0, 1, 1, 5, 0, 1, 2, 1, 1, 0, 1, 3, 1, 1, 2], np.int32)  # 23 of 24 rows
    generate = functools.partial(rollout.generate, CONFIG, max_new_tokens=6, seed=0, eos_id=3)
    rows = np.repeat(np.arange(16), counts)
    expected = jax.jit(generate)(params, prompts[rows], lengths[rows], episodes=np.arange(23))
    generate_ = functools.partial(generate, episodes=np.arange(24), wave=8)
    shardings, split = sharding.param_shardings(mesh, params), jax.NamedSharding(mesh, P(sharding.BATCH))
    capfd.readouterr()
    with jax.set_mesh(mesh):
        generate = jax.jit(lambda p, x, n, k: generate_(p, x, n, answers=k), out_shardings=split)
        got = generate(jax.device_put(params, shardings), *jax.device_put((prompts, lengths, counts), split))
    assert REMATERIALISED not in capfd.readouterr().err
    np.testing.assert_array_equal(got.tokens[:23], expected.tokens)
    np.testing.assert_array_equal(got.mask[:23], expected.mask)
    np.testing.assert_allclose(got.logprobs[:23], expected.logprobs, atol=1e-5)
    assert not np.asarray(got.mask[23]).any()


def test_make_mesh():
    assert dict(mesh_of((2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh_of((8, 1, 1)).axis_types)
    one = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    assert one.size == 1 and sharding.batch_shards(mesh_of((2, 2, 2))) == 4


def test_data_goes_over_the_slices_first_and_nothing_else_leaves_one():
    mesh = mesh_of((4, -1, 1, 2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    number = np.vectorize(lambda device: device.id)(mesh.devices)[..., 0]
    assert [set(number[rows].ravel()) for rows in (slice(2), slice(2, 4))] == [set(range(4)), set(range(4, 8))]


def test_gradients_are_summed_inside_a_slice_first():
    """What goes from slice to slice of a layer's weights is the share of a device, after the sum inside."""
    params, mesh = alone(CONFIG)[0], mesh_of((2, 4, 1, 2))
    shardings = sharding.param_shardings(mesh, params)
    split = jax.NamedSharding(mesh, P(sharding.BATCH))
    function = jax.grad(functools.partial(loss, CONFIG), has_aux=True)
    with jax.set_mesh(mesh):
        function = jax.jit(function, in_shardings=(shardings, *(split,) * 3), out_shardings=(shardings, split))
        text = function.lower(params, *packed_rows()).compile().as_text()
    chip = topology.Chip(flops=1e12, bandwidth=1e12, capacity=1e9, link=1e9)
    found = cost.estimate(text, chip, rings.groups_on(mesh.devices, mesh.axis_names, 4), {}).collectives
    summed = {axes: some.bytes for (kind, axes, _), some in found.items() if kind == "all-reduce"}
    weights = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]) if x.ndim > 2 and x.shape[-1] != 64)
    assert summed["fsdp"] >= weights
    assert weights / 4 <= summed["data"] <= summed["fsdp"] / 4
    assert summed["data × fsdp"] < 3 * sum(x.nbytes for x in jax.tree.leaves(params["embed"]))  # tables and norms


def test_tpus_know_their_slices():
    chips = [types.SimpleNamespace(platform="tpu", slice_index=index) for index in (1, 0, 1, 0)]
    assert sharding._by_slice(chips, 2) == [[chips[1], chips[3]], [chips[0], chips[2]]]
    with pytest.raises(ValueError, match="config.mesh.slices must be 2, the slices of these TPUs, got 1"):
        sharding.make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, chips)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"data": 8, "fsdp": 1}, "config.mesh must have the axes .* got .'data', 'fsdp'."),
        ({"data": 8, "fsdp": 1, "tensors": 1}, "config.mesh must have the axes"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "at most one -1"),
        ({"data": 0, "fsdp": 8, "tensor": 1}, "positive sizes"),
        ({"data": -2, "fsdp": 4, "tensor": 1}, "positive sizes"),
        ({"data": 3, "fsdp": 1, "tensor": 1}, "number of devices, 8, got 3"),
        ({"data": 3, "fsdp": -1, "tensor": 1}, "number of devices, 8, got 3"),
        ({"data": 1, "fsdp": 8, "tensor": 1, "slices": 2}, "data must be a multiple of config.mesh.slices = 2, got 1"),
        ({"data": 8, "fsdp": 1, "tensor": 1, "slices": 3}, "slices must divide the number of devices, 8, got 3"),
    ],
    ids=str,
)
def test_bad_meshes(shape, words):
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(shape)


def test_a_mesh_that_does_not_divide_the_heads():
    shapes = jax.eval_shape(lambda: models.init(CONFIG.replace(num_kv_heads=2), jax.random.key(0)))
    with pytest.raises(ValueError, match=r"config.mesh.tensor=4 must divide .* got 2 in blocks/attention/key"):
        sharding.param_shardings(mesh_of((1, 2, 4)), shapes)


def test_a_mesh_that_does_not_divide_the_rows():
    """Found while tracing, before anything is computed, in training and in sampling."""
    params = jax.eval_shape(lambda: models.init(CONFIG, jax.random.key(0)))
    words = r"config.mesh.data × config.mesh.fsdp = 8 must divide .* got 6 in \(6, "
    rows = (jax.ShapeDtypeStruct((6, 12), jnp.int32),) * 3
    lengths = jax.ShapeDtypeStruct((6,), jnp.int32)
    with jax.set_mesh(mesh_of((8, 1, 1))):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(functools.partial(models.hidden, CONFIG), params, *rows)
        with pytest.raises(ValueError, match=words):
            generate = functools.partial(rollout.generate, CONFIG, max_new_tokens=4, seed=0)
            jax.eval_shape(generate, params, rows[0], lengths)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("config", [CONFIG, UNTIED.replace(head_bias=True, qk_norm=True)], ids=["tied", "untied"])
def test_every_parameter_has_a_rule(config, head):
    """Every matrix is cut along fsdp and tensor in training, and along tensor alone in sampling."""
    shapes = jax.eval_shape(lambda: models.init(config.replace(head=head), jax.random.key(0)))
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        name = sharding.path_name(path)
        train, sampling = (sharding.spec_for(name, rules) for rules in (sharding.TRAIN_RULES, sharding.ROLLOUT_RULES))
        assert len(train) <= x.ndim
        assert "fsdp" not in tuple(sampling) and ("tensor" in tuple(train)) == ("tensor" in tuple(sampling)), name
        if name.startswith("blocks") and name.endswith("kernel"):
            assert train[0] is None and {"fsdp", "tensor"} <= set(train), name
    with pytest.raises(ValueError, match="no sharding rule for the parameter 'blocks/mlp/sideways/kernel'"):
        sharding.spec_for("blocks/mlp/sideways/kernel", sharding.TRAIN_RULES)


def test_constrain():
    x = jnp.zeros((8, 6))
    assert sharding.constrain(x, sharding.BATCH, None) is x  # no mesh
    with jax.set_mesh(mesh_of((2, 2, 2))):
        y = jax.jit(lambda x: sharding.constrain(x, sharding.BATCH, "tensor"))(x)
    assert y.sharding.spec == P(("data", "fsdp"), "tensor")
    tree = {"embed": {"tokens": jnp.zeros((8, 8))}}
    chex.assert_trees_all_equal(sharding.constrain_params(tree, sharding.TRAIN_RULES), tree)
