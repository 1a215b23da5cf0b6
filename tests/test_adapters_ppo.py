"""PPO on adapters: what it starts from, what it shares, what it keeps."""

import contextlib
import functools
import shutil

import jax
import numpy as np
import pytest
import tiny_supervised
from saved_runs import arrays, lines

from configs import common
from instructgpt_jax import main, models, networks, ppo, sharding, validate
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.stages import ppo as ppo_stage

pytestmark = pytest.mark.usefixtures("one_device")
ADAPTER = dict(rank=2, alpha=4.0, targets=("query", "value", "up", "down"))


@pytest.fixture(scope="module")
def world(one_device, tmp_path_factory):
    """A base, SFT with an adapter on it, and a reward model with an adapter on that."""
    folder = tiny_supervised.make_world(tmp_path_factory.mktemp("world"))
    tiny_supervised.make_base(folder)
    tiny_supervised.write_for_ppo(folder)
    sft = tiny_supervised.on_adapter(tiny_supervised.config("sft", folder, **{"sft.num_steps": 4}), folder)
    sft.sft.optimizer.lr = 0.05
    main.run(sft, str(folder / "sft"))
    reward = tiny_supervised.config("reward", folder, **{"reward.num_steps": 3})
    reward = tiny_supervised.on_adapter(reward, folder)
    reward.models.model.init_from = str(folder / "sft")
    main.run(reward, str(folder / "reward"))
    return folder


def config(world, iterations=2, **entries):
    settings = common.ppo(policy_lr=1e-2, value_lr=1e-2, ptx_coef=1.0)
    settings.mesh = dict(data=1, fsdp=1, tensor=1)
    settings.data.update(valid_fraction=0.2, prompts=(f"jsonl:{world}/prompts.jsonl",))
    settings.data.pretraining = (f"jsonl:{world}/text.jsonl",)
    settings.models.policy = common.network(init_from=f"{world}/sft", adapter=common.adapter(**ADAPTER))
    settings.models.value = common.network(adapter=common.adapter(**ADAPTER))
    settings.models.reward = common.network(init_from=f"{world}/reward")
    settings.models.update(entries)
    settings.rollout.wave, settings.eval_every = 0, 2
    settings.checkpoint.update(every=1, keep_last=2)
    settings.ppo.update(
        iterations=iterations, batch_size=8, num_minibatches=2, max_prompt_length=8, response_length=8, row_length=16,
        microbatch_rows=8, ptx_ratio=1, ptx_row_length=32, ptx_microbatch_rows=8, num_samples=2,
    )  # fmt: skip
    settings.ppo.policy_optimizer.warmup_steps = 0
    return settings


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "ppo"
    main.run(config(world), str(workdir))
    return workdir


def nets_of(world, settings):
    mesh = sharding.make_mesh(settings.mesh)
    return ppo_stage.build_networks(settings, mesh, tokenizers.load(world / "bpe")), mesh


def test_the_first_iteration_has_no_kl_and_the_second_has(done):
    first, second = (line for line in lines(done) if "objective/kl" in line)
    assert abs(first["objective/kl"]) < 1e-4 and first["policy/ratio_first"] < 1e-4
    assert first["rollout/logprob_gap"] < 1e-4 and first["ptx/loss"] > 0
    assert (
        second["objective/kl_k3"] > 1e-3 > abs(first["objective/kl_k3"]) and second["policy/ratio_first"] < 1e-4
    )  # sampled merged, trained apart
    assert any("valid/score" in line for line in lines(done))


def test_the_state_is_two_adapters_and_a_head(done):
    state = arrays(done)
    assert [*state["policy"]["params"]] == [*state["policy"]["ema"]] == ["blocks"]
    assert sorted(state["value"]["params"]) == ["blocks", "scalar_head"]
    assert np.abs(state["policy"]["ema"]["blocks"]["mlp"]["up"]["adapter"]["b"]).max() > 0


def test_it_goes_on_to_the_same_bits(world, done, tmp_path):
    again = shutil.copytree(done, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "2")
    main.run(config(world), str(again))
    assert lines(again) == lines(done) and lines(again, "samples.jsonl") == lines(done, "samples.jsonl")
    jax.tree.map(np.testing.assert_array_equal, arrays(again), arrays(done))


def test_reference_and_reward_model_are_the_bases_where_they_are_the_start(world):
    nets, _ = nets_of(world, config(world))
    assert sorted(ppo_stage.frozen_networks(nets)) == ["ref_policy", "reward"]
    other = common.network(init_from=f"{world}/base")
    nets, _ = nets_of(world, config(world, ref_policy=other))
    assert sorted(ppo_stage.frozen_networks(nets)) == ["policy", "ref_policy", "reward"]
    nets, _ = nets_of(world, config(world, policy=common.network(init_from=f"{world}/sft"), value=common.network()))
    assert sorted(ppo_stage.frozen_networks(nets)) == ["ref_policy", "reward"] and nets["value"].base is None


def test_fresh_adapters_sample_what_the_start_samples_and_differ_from_the_bare_base(world, tmp_path):
    """The samples are those of a run without adapters, to the bit; KL is 0 against the start, not against the base."""
    settings = config(world)
    nets, mesh = nets_of(world, settings)
    tokenizer = tokenizers.load(world / "bpe")
    with jax.set_mesh(mesh):
        algorithm = ppo_stage.algorithm_of(settings, nets, tokenizer.end_ids, None)
        plain = algorithm._replace(policy=nets["ref_policy"].config)
        frozen = {name: base.load() for name, base in ppo_stage.frozen_networks(nets).items()}
        state = jax.jit(lambda *given: ppo.start(algorithm, *given))(nets["policy"].load(), nets["value"].load())
        batch = {
            "prompts": np.tile(np.arange(40, 48, dtype=np.int32), (8, 1)),
            "prompt_lengths": np.full(8, 8, np.int32),
        }
        sample = lambda of, *given: jax.jit(functools.partial(ppo.rollout, of))(*given)  # noqa: E731
        episodes, logprobs = sample(algorithm, state.policy.params, batch, 0, frozen)
        theirs = sample(plain, frozen["ref_policy"], batch, 0)
        jax.tree.map(np.testing.assert_array_equal, (episodes, logprobs), theirs)
        base = networks.build("base", {"init_from": f"{world}/base"}, "lm", mesh, tokenizer, 0)
        packed = ppo.ep.pack(episodes, 16, 8)
        of = jax.jit(lambda params: ppo.policy_logprobs(plain, params, episodes, packed))
        kl = [float((logprobs - of(params)).sum(axis=1).mean()) for params in (frozen["ref_policy"], base.load())]
        assert abs(kl[0]) < 1e-4 and abs(kl[1]) > 0.05
        value = ppo.whole(algorithm.value, state.value.params, frozen, "value")
        scores = (
            ppo.ep.scores(net, p, episodes, packed)
            for net, p in ((nets["reward"].config, frozen["reward"]), (algorithm.value, value))
        )
        np.testing.assert_array_equal(*scores)


def test_what_comes_of_a_run_is_its_start_with_the_adapter_merged(world, done, tmp_path):
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))
    tokenizer = tokenizers.load(world / "bpe")
    load = lambda place: networks.build("n", {"init_from": str(place)}, "lm", mesh, tokenizer, 0).load()  # noqa: E731
    start, found = (jax.tree.map(np.asarray, load(place)) for place in (world / "sft", done))
    part = arrays(done, "policy/ema")["blocks"]["mlp"]["up"]["adapter"]
    wanted = start["blocks"]["mlp"]["up"]["kernel"] + 2.0 * np.einsum("ldr,lrf->ldf", part["a"], part["b"])
    np.testing.assert_allclose(found["blocks"]["mlp"]["up"]["kernel"], wanted, atol=1e-6)
    np.testing.assert_array_equal(found["embed"]["tokens"], start["embed"]["tokens"])
    export = common.config("export")
    export.models.model = common.network(init_from=str(done))
    export.mesh, export.export = dict(data=1, fsdp=1, tensor=1), common.export() | {"format": "peft"}
    with pytest.raises(ValueError, match=r"config.export.base must name '.*sft' in Hugging Face format"):
        main.run(export, str(tmp_path / "adapter"))
    models.hf.save(tmp_path / "start", networks.shape("n", {"init_from": f"{world}/sft"}), start)
    export.export.base = str(tmp_path / "start")
    main.run(export, str(tmp_path / "adapter"))
    _, read = models.hf.load(tmp_path / "adapter")
    np.testing.assert_allclose(read["blocks"]["mlp"]["up"]["kernel"], wanted, atol=1e-6)


def test_dropout_and_adapters_of_frozen_networks_are_refused(world):
    for name, changes, message in (
        ("policy", dict(dropout=0.1), r"models.policy.adapter.dropout must be 0 in PPO"),
        ("reward", {}, r"models.reward.adapter.targets must be \(\): this network does not train"),
    ):
        entry = common.network(init_from=f"{world}/sft", adapter=common.adapter(**ADAPTER | changes))
        settings = config(world, **{name: entry})
        with pytest.raises(ValueError, match=message):
            validate.validate(settings, sharding.make_mesh(settings.mesh))


def test_eight_devices_agree_with_one(world, done):
    """An iteration laid out over data, fsdp and tensor."""
    settings = config(world)
    settings.data.tokenizer = str(world / "bpe")
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2), devices=jax.devices())
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        stage = ppo_stage.build(settings, mesh)
        state, frozen = stage.init(), stage.frozen()
        batch = next(stack.enter_context(contextlib.closing(stage.data(0))))
        state, metrics = stage.update(state, frozen, batch)
    assert not state.policy.params["blocks"]["mlp"]["up"]["adapter"]["a"].sharding.is_fully_replicated
    one = next(line for line in lines(done) if "objective/kl" in line)
    for name in ("policy/gradient_norm", "value/gradient_norm", "ptx/loss", "objective/score"):
        np.testing.assert_allclose(metrics[name], one[name], rtol=1e-4, err_msg=name)
