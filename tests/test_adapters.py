"""Adapters on frozen networks: against W + (alpha / r) A B written out, in the stages, and what they leave."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_supervised
from ml_collections import ConfigDict
from reference_model import random_params
from saved_runs import arrays

from configs import common
from instructgpt_jax import main, models, networks, sharding, validate
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import Adapter, adapters
from instructgpt_jax.stages import reward as reward_stage
from instructgpt_jax.stages import sft as sft_stage
from instructgpt_jax.training import checkpoint, resume

pytestmark = pytest.mark.usefixtures("one_device")
ALL = models.config.PROJECTIONS
NET = models.ModelConfig(
    vocab_size=40, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=16, gated_mlp=True,
    activation="silu", qk_norm=True, adapter=Adapter(3, 6.0, ALL),
)  # fmt: skip
# Of each kernel (L, in, out), its A and its B.
PRODUCTS = {
    "query": "ldr,lrnh->ldnh", "key": "ldr,lrnh->ldnh", "value": "ldr,lrnh->ldnh", "out": "lnhr,lrd->lnhd",
    "up": "ldr,lrf->ldf", "gate": "ldr,lrf->ldf", "down": "lfr,lrd->lfd",
}  # fmt: skip


def moved(tree, seed=3):
    """An adapter whose B is no longer zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + 0.2 * rng.standard_normal(x.shape), np.float32), tree)


def written_out(base, adapter, scale):
    """W + (alpha / r) A B at every projection, by one einsum each."""
    found = jax.tree.map(jnp.asarray, base)
    for part in adapter["blocks"]:
        for name, tree in adapter["blocks"][part].items():
            a, b = tree["adapter"]["a"], tree["adapter"]["b"]
            kernel = found["blocks"][part][name]["kernel"]
            found["blocks"][part][name]["kernel"] = kernel + scale * jnp.einsum(PRODUCTS[name], a, b)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny_supervised.make_world(tmp_path_factory.mktemp("world"))
    tiny_supervised.make_base(folder)
    return folder


def loss_of(net, params, tokens):
    logprobs = jax.nn.log_softmax(models.logits(net, params, tokens))
    return -jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1).mean()


def test_values_and_gradients_are_those_of_the_changed_weights():
    base, adapter = random_params(NET, models.init), moved(adapters.init(NET, jax.random.key(1)))
    assert jax.tree.structure(adapter) == jax.tree.structure(adapters.trained_part(NET, base, jax.random.key(1)))
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 40)
    ours = lambda adapter: loss_of(NET, adapters.join(NET, base, adapter), tokens)  # noqa: E731
    plain = NET.replace(adapter=None)
    explicit = lambda adapter: loss_of(plain, written_out(base, adapter, 2.0), tokens)  # noqa: E731
    (value, gradient), (wanted, wanted_gradient) = (
        jax.jit(jax.value_and_grad(f), compiler_options=tiny_supervised.QUICK)(adapter) for f in (ours, explicit)
    )
    assert abs(float(value - loss_of(plain, base, tokens))) > 0.01
    np.testing.assert_allclose(value, wanted, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, wanted_gradient)
    merged = adapters.merged(adapters.join(NET, base, adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, written_out(base, adapter, 2.0))


def test_an_adapter_on_an_adapter_adds_up_and_a_fresh_one_changes_no_bit():
    base, first = random_params(NET, models.init), moved(adapters.init(NET, jax.random.key(1)))
    joined, tokens = adapters.join(NET, base, first), jnp.arange(12)[None] % 40
    other = NET.replace(adapter=Adapter(2, 1.0, ("key", "gate")))
    fresh = adapters.init(other, jax.random.key(4))
    logits = jax.jit(models.logits, static_argnums=0)
    np.testing.assert_array_equal(logits(other, adapters.join(other, base, fresh), tokens), logits(NET, base, tokens))
    second = moved(fresh, 5)
    both = written_out(written_out(base, first, 2.0), second, 0.5)
    got = logits(other, adapters.join(other, joined, second), tokens)
    np.testing.assert_allclose(got, logits(NET, both, tokens), atol=1e-5)


def test_dropout_is_of_what_the_adapter_reads_alone():
    net = NET.replace(adapter=dataclasses.replace(NET.adapter, dropout=0.5))
    assert net.has_dropout and not net.without_dropout().has_dropout and not NET.has_dropout
    base, fresh = random_params(NET, models.init), adapters.init(NET, jax.random.key(1))
    tokens = jnp.arange(8)[None]
    hidden = lambda tree, key: models.hidden(net, adapters.join(net, base, tree), tokens, tokens, None, dropout_key=key)  # noqa: E731
    np.testing.assert_array_equal(hidden(fresh, jax.random.key(2)), hidden(fresh, None))
    plain, *noisy = (hidden(moved(fresh), key) for key in (None, jax.random.key(2), jax.random.key(3)))
    assert all(np.abs(noise - plain).max() > 0.1 for noise in noisy) and np.abs(noisy[0] - noisy[1]).max() > 0.1


def test_dropout_does_not_touch_an_adapter_that_is_frozen():
    """A fresh one over it changes nothing yet, whatever it drops."""
    base = adapters.join(NET, random_params(NET, models.init), moved(adapters.init(NET, jax.random.key(1))))
    net = NET.replace(adapter=Adapter(2, 1.0, ("up", "key"), dropout=0.5))
    joined, tokens = adapters.join(net, base, adapters.init(net, jax.random.key(2))), jnp.arange(8)[None]
    hidden = lambda key: models.hidden(net, joined, tokens, tokens, None, dropout_key=key)  # noqa: E731
    np.testing.assert_allclose(hidden(jax.random.key(3)), hidden(None), atol=1e-5)


def test_meshes_agree(world):
    config = tiny_supervised.on_adapter(tiny_supervised.config("reward", world), world)
    tiny_supervised.check_meshes(reward_stage.build, config, "reward/loss", ((2, 2, 2),))


@pytest.fixture(scope="module")
def tuned(world, one_device, tmp_path_factory):
    """Workdirs of SFT with an adapter on the base, and of a reward model with one on that."""
    folder = tmp_path_factory.mktemp("tuned")
    sft = tiny_supervised.on_adapter(tiny_supervised.config("sft", world, **{"sft.num_steps": 4}), world)
    main.run(sft, str(folder / "sft"))
    changes = {"reward.num_steps": 4, "reward.head_examples": 8}
    reward = tiny_supervised.on_adapter(tiny_supervised.config("reward", world, **changes), world)
    reward.models.model.init_from = str(folder / "sft")
    main.run(reward, str(folder / "reward"))
    return folder


def built(init_from, world, head="", **changes):
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))
    entry = common.network(init_from=str(init_from), **changes)
    return networks.build("config.models.model", entry, head, mesh, tokenizers.load(world / "bpe"), 0)


def test_a_stage_keeps_the_adapter_alone_and_hands_on_the_merged_network(world, tuned):
    base = jax.tree.map(np.asarray, built(world / "base", world).load())
    sft, reward = arrays(tuned / "sft"), arrays(tuned / "reward")
    assert [*sft["params"]] == ["blocks"] and sorted(reward["params"]) == ["blocks", "scalar_head"]
    assert len(jax.tree.leaves(sft)) == 10 * 3 + 3  # with two moments each; and the counters
    start = built(tuned / "sft", world)
    assert start.config == built(world / "base", world).config
    merged = jax.tree.map(np.asarray, start.load())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, written_out(base, sft["params"], 2.0)
    )
    assert np.abs(merged["blocks"]["mlp"]["up"]["kernel"] - base["blocks"]["mlp"]["up"]["kernel"]).max() > 1e-3
    model = built(tuned / "reward", world, "scalar")
    scored = jax.tree.map(np.asarray, model.load())
    assert scored["scalar_head"]["bias"] == reward["params"]["scalar_head"]["bias"] != 0 and "head" not in scored
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        scored["blocks"],
        written_out(merged, reward["params"], 2.0)["blocks"],
    )


def test_a_snapshot_is_chosen_merged(world, tmp_path):
    """`select` leaves a whole network, which needs the base no longer."""
    run = tiny_supervised.config("sft", world, **{"sft.num_steps": 4, "eval_every": 2, "snapshot_every": 2})
    main.run(tiny_supervised.on_adapter(run, world), str(tmp_path / "sft"))
    chosen = common.selection()
    chosen.mesh = dict(data=1, fsdp=1, tensor=1)
    chosen.data.update({"valid_fraction": 0.2, "tokenizer": str(world / "bpe")})
    chosen.models.model = common.network(init_from=str(tmp_path / "sft"))
    chosen.select.update({"by": "loss", "row_length": 96, "max_prompt_length": 32, "response_length": 32})
    main.run(chosen, str(tmp_path / "select"))
    step = checkpoint.steps(tmp_path / "select")[0]
    of_the_run = built(tmp_path / "sft" / "snapshots" / str(step), world).load()
    (tmp_path / "sft").rename(tmp_path / "gone")
    jax.tree.map(np.testing.assert_array_equal, built(tmp_path / "select", world).load(), of_the_run)


def test_another_base_is_refused(world, tuned, tmp_path):
    """By its architecture: the adapter would have the shapes for a base with another activation."""
    here, other = tmp_path / "base", models.SIZES["tiny"].replace(**tiny_supervised.MODEL, activation="relu")
    made = tokenizers.load(world / "bpe").pretrained(pad=False)
    models.hf.save(here, other.without_dropout(), models.init(other, jax.random.key(0)), made)
    saved = checkpoint.read_metadata(tuned / "sft")
    saved["config"]["models"]["model"] |= {"init_from": str(here), "version": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_metadata", lambda *_: saved)
        with pytest.raises(ValueError, match=r"made for another base than .*base: activation gelu_tanh and now relu"):
            built(tuned / "sft", world)
        saved["config"]["models"]["model"]["init_from"] = str(tmp_path / "gone")
        with pytest.raises(ValueError, match=r"in .*sft, config.models.model.init_from must exist, got .*gone"):
            built(tuned / "sft", world)


def test_a_base_that_was_trained_on_is_read_as_it_was(world, tmp_path):
    """By whoever starts from the adapter, and by its own run that goes on."""
    base = tiny_supervised.config("sft", world, **{"sft.num_steps": 2, "checkpoint.keep_last": 4})
    main.run(base, str(tmp_path / "base"))
    config = tiny_supervised.on_adapter(tiny_supervised.config("sft", world, **{"sft.num_steps": 2}), world)
    config.models.model.init_from = str(tmp_path / "base")
    main.run(config, str(tmp_path / "run"))

    def frozen():
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            return jax.tree.map(np.asarray, sft_stage.build(resume.recalled(config, tmp_path / "run"), mesh).frozen())

    before, whole = frozen(), jax.tree.map(np.asarray, built(tmp_path / "run", world).load())
    base.sft.num_steps = 4
    main.run(base, str(tmp_path / "base"))
    assert checkpoint.steps(tmp_path / "base") == [2, 4]
    jax.tree.map(np.testing.assert_array_equal, built(tmp_path / "run", world).load(), whole)
    jax.tree.map(np.testing.assert_array_equal, frozen(), before)
    saved = checkpoint.read_metadata(tmp_path / "run")
    assert saved["config"]["models"]["model"].pop("version") == "step 2"
    read = checkpoint.read_metadata
    with pytest.MonkeyPatch.context() as patch:  # of an adapter from before there were versions, it is the newest
        patch.setattr(checkpoint, "read_metadata", lambda at: saved if "/run/" in at else read(at))
        assert built(tmp_path / "run", world).source.base.version == "step 4"
    shutil.rmtree(tmp_path / "base" / "checkpoints" / "2")
    told = r"in .*/run, config.models.model.init_from must still hold what was read at first, step 2, got steps \[4\]"
    with pytest.raises(ValueError, match=told):
        built(tmp_path / "run", world)
    with pytest.raises(ValueError, match=r"config.models.model.init_from must still hold .* in '.*/base'"):
        frozen()


def test_a_base_in_other_files_is_refused(world, tuned, tmp_path):
    """Files of the same names, sizes and headers."""
    made = tokenizers.load(world / "bpe").pretrained(pad=False)
    config, params = models.hf.load(world / "base")
    changed = jax.tree.map(lambda x: x + 1e-3, params)
    shutil.copytree(world / "base", tmp_path / "base")
    assert models.hf.version(tmp_path / "base") == models.hf.version(world / "base")
    saved = checkpoint.read_metadata(tuned / "sft")
    saved["config"]["models"]["model"]["init_from"] = str(tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_metadata", lambda *_: saved)
        built(tuned / "sft", world)
        models.hf.save(tmp_path / "base", config, changed, made)
        with pytest.raises(ValueError, match=r"still hold what was read at first, files \w{16}, got files \w{16} in"):
            built(tuned / "sft", world)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rank=0), r"models.model.adapter.rank must be an integer of at least 1, got 0"),
        (dict(alpha=0.0), r"models.model.adapter.alpha must be a positive number, got 0.0"),
        (dict(dropout=1.0), r"models.model.adapter.dropout must be a number of at least 0 and below 1, got 1.0"),
        (dict(r=4), r"models.model.adapter must have no keys but .*got \['r'\]"),
        (dict(targets="query"), r"models.model.adapter.targets must be a tuple of strings, got 'query'"),
    ],
)
def test_bad_adapters_are_named(world, changes, message):
    config = tiny_supervised.on_adapter(tiny_supervised.config("sft", world), world, **changes)
    with pytest.raises(ValueError, match=message):
        validate.validate(config, sharding.make_mesh(config.mesh))


def test_what_cannot_have_an_adapter_is_named(world):
    with pytest.raises(ValueError, match=r"adapter.targets must be among .*'down'\), .*all.* got \['gate', 'q_proj'\]"):
        built(world / "base", world, adapter=common.adapter(targets=("up", "gate", "q_proj")))
    everything = built(world / "base", world, adapter=common.adapter(targets=("all",)))
    assert everything.config.adapter.targets == ("query", "key", "value", "out", "up", "down")
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))
    config = tiny_supervised.on_adapter(tiny_supervised.config("reward", world), world)
    config.reward.eos_init = "."
    with pytest.raises(ValueError, match=r"reward.eos_init must be '' with config.models.model.adapter.targets"):
        validate.validate(config, mesh)
    config.reward.eos_init, config.models.model.init_from, config.models.model.size = "", "", "tiny"
    with pytest.raises(ValueError, match=r"adapter.targets must be \(\) for a fresh network"):
        validate.validate(config, mesh)
    config = ConfigDict(common.collection().to_dict() | {"data": config.data.to_dict()})
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    config.data.prompts = ("simulated:prompts:9",)
    config.models.policy = common.network(init_from="x", adapter=common.adapter(targets=("up",)))
    with pytest.raises(ValueError, match=r"models.policy.adapter.targets must be \(\): this network does not train"):
        validate.validate(config, mesh)
