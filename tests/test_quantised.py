"""Quantised bases of adapters: against kernels written out, in SFT and PPO, and what they leave."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

qwix = pytest.importorskip("qwix")

import test_adapters_ppo
import test_resume
import tiny_supervised
from reference_model import random_params
from saved_runs import arrays, lines
from test_adapters import ALL, NET, built, loss_of, moved, written_out

from configs import common
from instructgpt_jax import main, models, networks, rollout, sharding, validate
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import Adapter, adapters, quantised
from instructgpt_jax.plan import answer, sampling
from instructgpt_jax.stages import ppo as ppo_stage
from instructgpt_jax.stages import sft as sft_stage

pytestmark = pytest.mark.usefixtures("one_device")
AXES = {"out": (1, 2)}  # that a kernel (L, in, out) is summed over, of every other projection (1,)


def restored(params, form):
    """Every kernel through the format: int8 by hand in numpy, nf4 by qwix's own functions."""
    found = jax.tree.map(np.asarray, params)
    for part in ("attention", "mlp"):
        for name, tree in found["blocks"][part].items():
            if name not in ALL:
                continue
            kernel, inputs = tree["kernel"], AXES.get(name, (1,))
            if form == "int8":
                scale = np.abs(kernel).max(inputs, keepdims=True) / 127
                tree["kernel"] = np.rint(kernel / scale) * scale
            else:
                last = inputs[-1]
                block = max(n for n in range(1, 65) if kernel.shape[last] % n == 0)
                own = [axis for axis in range(kernel.ndim) if axis != last]
                made = qwix.quantize(jnp.asarray(kernel), "nf4", channelwise_axes=own, tiled_axes={last: block})
                tree["kernel"] = np.asarray(qwix.dequantize(made))
    return found


@pytest.mark.parametrize("form", quantised.FORMATS)
def test_values_and_gradients_are_those_of_the_restored_weights(form):
    base, adapter = random_params(NET, models.init), moved(adapters.init(NET, jax.random.key(1)))
    stored, plain = quantised.store(base, form), NET.replace(adapter=None)
    wanted_base = restored(base, form)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), quantised.plain(stored, "float32"), wanted_base
    )
    assert np.abs(wanted_base["blocks"]["mlp"]["up"]["kernel"] - base["blocks"]["mlp"]["up"]["kernel"]).max() > 1e-3
    assert quantised.store(stored, form) == stored  # the very arrays
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 40)
    ours = lambda adapter: loss_of(NET, adapters.join(NET, stored, adapter), tokens)  # noqa: E731
    explicit = lambda adapter: loss_of(plain, written_out(wanted_base, adapter, 2.0), tokens)  # noqa: E731
    (value, gradient), (wanted, wanted_gradient) = (
        jax.jit(jax.value_and_grad(f), compiler_options=tiny_supervised.QUICK)(adapter) for f in (ours, explicit)
    )
    np.testing.assert_allclose(value, wanted, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, wanted_gradient)
    merged = adapters.merged(adapters.join(NET, stored, adapter))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, written_out(wanted_base, adapter, 2.0)
    )


@pytest.fixture(scope="module")
def world(one_device, tmp_path_factory):
    """SFT with an adapter on a base in int8, and a reward model with one on that in nf4."""
    folder = tiny_supervised.make_world(tmp_path_factory.mktemp("world"))
    tiny_supervised.make_base(folder)
    tiny_supervised.write_for_ppo(folder)
    sft = tiny_supervised.config("sft", folder, **{"sft.num_steps": 4})
    sft = tiny_supervised.on_adapter(sft, folder, base="int8")
    sft.sft.optimizer.lr = 0.05
    main.run(sft, str(folder / "sft"))
    reward = tiny_supervised.config("reward", folder, **{"reward.num_steps": 3, "reward.head_examples": 8})
    reward = tiny_supervised.on_adapter(reward, folder, base="nf4")
    reward.models.model.init_from = str(folder / "sft")
    main.run(reward, str(folder / "reward"))
    return folder


def test_who_starts_from_such_a_workdir_gets_what_was_trained(world):
    base = jax.tree.map(np.asarray, built(world / "base", world).load())
    start = jax.tree.map(np.asarray, built(world / "sft", world).load())
    check = functools.partial(jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6))
    sft, reward = (arrays(world / name)["params"] for name in ("sft", "reward"))
    wanted = restored(base, "int8")
    check(start, written_out(wanted, sft, 2.0))
    scored = built(world / "reward", world, "scalar").load()
    # What int8 left is in nf4; the adapter of SFT is beside it, and not rounded to its levels.
    wanted = written_out(written_out(restored(wanted, "nf4"), sft, 2.0), reward, 2.0)
    check(jax.tree.map(np.asarray, scored)["blocks"], wanted["blocks"])
    export = common.config("export")
    export.models.model = common.network(init_from=str(world / "sft"))
    export.mesh, export.export = dict(data=1, fsdp=1, tensor=1), common.export() | {"format": "peft"}
    with pytest.raises(ValueError, match=r"export.format must be 'merged'.* was trained on a base in int8"):
        main.run(export, str(world / "adapter"))
    export.export.format = "merged"
    main.run(export, str(world / "merged"))
    _, read = models.hf.load(world / "merged")
    np.testing.assert_allclose(read["blocks"]["mlp"]["up"]["kernel"], start["blocks"]["mlp"]["up"]["kernel"], atol=1e-6)


def ppo_config(world, policy="int8", value="nf4"):
    settings = test_adapters_ppo.config(world)
    for name, form in (("policy", policy), ("value", value)):
        settings.models[name].adapter.base = form
    return settings


def test_the_first_iteration_of_ppo_has_no_kl_and_learning_has(world, tmp_path):
    """Two networks are in memory, quantised; the adapters of SFT and of the reward model stay beside them."""
    nets, mesh = test_adapters_ppo.nets_of(world, ppo_config(world))
    bases = ppo_stage.frozen_networks(nets)
    assert sorted(bases) == ["ref_policy", "reward"]
    loaded = {name: base.load() for name, base in bases.items()}
    for name, base in bases.items():
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), loaded[name])
        assert described == base.abstract
    up = loaded["ref_policy"]["blocks"]["mlp"]["up"]
    assert up["kernel"]["codes"].dtype == jnp.int8 and up["adapter"]["a"].shape[-1] == 4
    assert loaded["reward"]["blocks"]["mlp"]["up"]["kernel"]["codes"].dtype == jnp.uint4
    assert loaded["reward"]["blocks"]["mlp"]["up"]["adapter"]["a"].shape[-1] == 8  # of SFT and of the reward model
    start, tokens = built(world / "sft", world), jnp.arange(12)[None]
    logits = jax.jit(models.logits, static_argnums=0)
    np.testing.assert_allclose(
        logits(start.config, loaded["ref_policy"], tokens), logits(start.config, start.load(), tokens), atol=1e-5
    )
    main.run(ppo_config(world), str(tmp_path / "run"))
    first, second = (line for line in lines(tmp_path / "run") if "objective/kl" in line)
    assert abs(first["objective/kl"]) < 1e-4 and first["policy/ratio_first"] < 1e-4
    assert second["objective/kl_k3"] > 1e-3 > abs(first["objective/kl_k3"]) and first["rollout/logprob_gap"] < 1e-4
    assert [*arrays(tmp_path / "run")["policy"]["params"]] == ["blocks"]


def test_a_killed_run_goes_on_to_the_same_bits(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    test_resume.finish(test_resume.start("sft+nf4", world, whole), whole)
    assert test_resume.kill_after(test_resume.start("sft+nf4", world, killed), killed, 3, 0.0) != 0
    test_resume.finish(test_resume.start("sft+nf4", world, killed), killed)
    assert lines(killed) == lines(whole) and test_resume.state(killed) == test_resume.state(whole)


def test_meshes_agree(world):
    """SFT over int8; and a base in nf4, whose codes a program that was compiled ahead does not take (jax 0.10)."""
    config = tiny_supervised.on_adapter(tiny_supervised.config("sft", world), world, base="int8")
    tiny_supervised.check_meshes(sft_stage.build, config, "sft/loss", ((2, 2, 2),))
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(
            dict(zip(sharding.AXES, sizes, strict=True)), devices=jax.devices()[: math.prod(sizes)]
        )
        entry = common.network(init_from=f"{world}/base", adapter=common.adapter(targets=("up",), base="nf4"))
        with jax.set_mesh(mesh):
            net = networks.build("config.models.model", entry, "", mesh, tokenizers.load(world / "bpe"), 0)
            base = net.base.load()
            codes = base["blocks"]["mlp"]["up"]["kernel"]["codes"]
            assert codes.addressable_shards[0].data.size * sizes[1] * sizes[2] == codes.size
            logits = jax.jit(models.logits, static_argnums=0)(net.config, base, jnp.tile(jnp.arange(12), (8, 1)))
        found.append(jax.tree.map(np.asarray, (quantised.plain(base, "float32"), logits)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


def test_what_cannot_be_is_named(world, monkeypatch):
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))
    for changes, message in (
        (dict(base="int4"), r"adapter.base must be one of \('', 'int8', 'nf4'\), got 'int4'"),
        (dict(base="nf4", targets=()), r"adapter.base must be '' without targets, nothing stands on it, got 'nf4'"),
    ):
        config = tiny_supervised.on_adapter(tiny_supervised.config("sft", world), world, **changes)
        with pytest.raises(ValueError, match=message):
            validate.validate(config, mesh)
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"policy.adapter.base must be '' without qwix, got 'int8': pip install"):
        test_adapters_ppo.nets_of(world, ppo_config(world))
    monkeypatch.undo()

    def refused(*_):
        raise NotImplementedError("no such type\nand more")

    monkeypatch.setattr(quantised, "_stored", refused)
    with pytest.raises(ValueError, match=r"adapter.base must be '' on cpu, which has no int8: no such type$"):
        test_adapters_ppo.nets_of(world, ppo_config(world))


@pytest.mark.parametrize("form, each", [("int8", 1.0), ("nf4", 0.5 + 4 / 64)])
def test_a_plan_counts_codes_and_scales(form, each):
    """Bytes of a weight by hand; two codes of nf4 share one."""
    net = models.SIZES["gpt3-1.3b"].replace(dtype="bfloat16", adapter=Adapter(16, 32.0, ("up",), base=form))
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), devices=jax.devices()[:1])
    whole = networks.Network(net.replace(adapter=None), dict, networks.abstract(net, mesh), {})
    kernels = 24 * (4 * 2048 * 2048 + 2 * 2048 * 8192)
    rest = sum(x.size for x in jax.tree.leaves(whole.abstract)) - kernels
    wanted = kernels * each + 2 * rest
    held = answer.device_bytes(networks.frozen(whole, form).abstract)
    read = sampling.weight_bytes(sampling.Sampled(net, 16, 768, 256, 512.0), mesh)
    np.testing.assert_allclose([held, read], wanted, rtol=2e-3)


def test_samples_are_those_of_the_restored_weights():
    """Whose kernels are made for each token anew."""
    base, plain = random_params(NET, models.init), NET.replace(adapter=None)
    prompts, lengths = jnp.arange(8)[None] % 40, jnp.array([8])
    answer_of = jax.jit(
        lambda params: rollout.generate(plain, params, prompts, lengths, 4, 0), compiler_options=tiny_supervised.QUICK
    )
    got, wanted = answer_of(quantised.store(base, "nf4")), answer_of(restored(base, "nf4"))
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)
