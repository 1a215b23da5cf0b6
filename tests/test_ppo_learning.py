"""PPO as a whole: what it learns, what it keeps, what it refuses, and that a kill costs it nothing but time."""

import contextlib
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import tiny_ppo
from saved_runs import arrays
from tiny_ppo import SCALAR

from configs import common
from instructgpt_jax import main, models, ppo, run_tokenizer
from instructgpt_jax.data import datasets
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import hf
from instructgpt_jax.sharding import make_mesh
from instructgpt_jax.stages import ppo as ppo_stage
from instructgpt_jax.training import checkpoint
from instructgpt_jax.training.supervised import language_model_loss
from instructgpt_jax.validate import validate

# --------------------------------------------------------------------------------------------- a known optimum

TOKEN = 5  # what the toy reward counts
COUNTER = SCALAR.replace(num_layers=1, width=16)
LEARNING = dict(
    batch_size=32, num_minibatches=4, microbatch_rows=32, ema_decay=0.0, clip_range=0.2, kl_coef=0.0,
    policy_optimizer=tiny_ppo.adam(3e-3), value_optimizer=tiny_ppo.adam(3e-3),
)  # fmt: skip


@functools.cache
def toy():
    settings = tiny_ppo.settings()
    settings.update(LEARNING)
    algorithm = tiny_ppo.algorithm(settings, value=COUNTER, reward=COUNTER)
    return algorithm, tiny_ppo.phases(algorithm)


def learn_to_count(kl_coef, iterations):
    """Metrics of each iteration: the score is 10 times the share of TOKEN in prompt and response."""
    algorithm, phases = toy()
    state, frozen = tiny_ppo.start(algorithm)
    frozen["reward"] = tiny_ppo.counter(COUNTER, TOKEN, 10.0)
    state = state.replace(kl_coef=jnp.float32(kl_coef))
    history = []
    for iteration in range(iterations):
        batch = tiny_ppo.batch(algorithm.config, seed=iteration, prompt_lengths=[1] * 32)
        batch["prompts"] = jnp.where(batch["prompts"] == TOKEN, TOKEN + 1, batch["prompts"])
        state, metrics = tiny_ppo.iterate(phases, state, frozen, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def test_the_counter_counts():
    tokens = jnp.array([[TOKEN] * 5, [2, 3, TOKEN, TOKEN, 4]])
    hidden = models.hidden(
        COUNTER, params := tiny_ppo.counter(COUNTER, TOKEN, 10.0), tokens, jnp.arange(5) + 0 * tokens, None
    )
    counts = np.cumsum(np.asarray(tokens) == TOKEN, axis=1) / np.arange(1, 6)
    np.testing.assert_allclose(models.scalar(COUNTER, params, hidden), 10 * counts, atol=0.01)


def test_a_known_optimum_is_reached():
    """A prompt of 1 token and 6 more: the best score is 60 / 7, of six TOKENs and no end of text."""
    history = learn_to_count(kl_coef=0.0, iterations=150)
    start, end = (np.mean([m["objective/score"] for m in part]) for part in (history[:3], history[-5:]))
    assert start < 1.0 and end > 0.95 * 60 / 7, (start, end)
    assert np.mean([m["response/length"] for m in history[-5:]]) > 5.8
    assert all(m["policy/ratio_first"] <= 1e-5 for m in history)
    assert all(m["rollout/logprob_gap"] <= 1e-5 for m in history)
    assert history[-1]["value/explained_variance"] > 0.5 or history[-1]["value/loss"] < history[0]["value/loss"]
    # KL of an episode is a mean of 32: not below 0 beyond the noise that k1 has.
    assert all(m["objective/kl"] > -4 * np.sqrt(2 * max(m["objective/kl_k3"], 1e-3) / 32) for m in history)
    assert history[-1]["objective/kl"] > 3 and all(m["objective/kl_k3"] >= 0 for m in history)


def test_a_large_kl_coefficient_holds_the_policy():
    """With beta 50 a nat costs more than the whole score is worth."""
    free, held = (learn_to_count(kl_coef, iterations=60) for kl_coef in (0.0, 50.0))
    kl = [np.mean([m["objective/kl_k3"] for m in history[-5:]]) for history in (free, held)]
    assert kl[1] < 0.1 < 1.0 < kl[0], kl
    assert np.mean([m["objective/kl"] for m in held]) > -0.02
    assert held[-1]["objective/score"] < 0.5 * free[-1]["objective/score"]


# ------------------------------------------------------------------------------------- where epsilon stands in Adam


def test_early_statistics_of_the_two_adams():
    """eps 1e-5, b2 0.999: torch's and optax's Adam moves several times more than TensorFlow's in epochs 1 and 2.

    On GPT-2 the 2019 fixture has approxkl 3.7e-4 / 2.4e-3, clipfrac 4.6e-3 / 2.0e-2, largest ratio 1.23 / 1.81 and a
    variance of the log-ratio of 7.2e-4 / 4.7e-3 (TensorFlow's / torch's form). That is the regime of gradients
    between the two forms' thresholds, eps and eps / sqrt(1 - b2) = 3e-4: the advantages are scaled to be there.
    """
    statistics = {}
    for form in ("tensorflow", "optax"):
        optimizer = tiny_ppo.adam(3e-3, eps=1e-5, b2=0.999, eps_form=form)
        settings = tiny_ppo.settings(num_minibatches=1, inner_epochs=3, microbatch_rows=32)
        settings.update(dict(batch_size=32, policy_optimizer=optimizer, value_optimizer=optimizer))
        algorithm = tiny_ppo.algorithm(settings, value=COUNTER, reward=COUNTER)
        state, frozen = tiny_ppo.start(algorithm)
        _, phases = toy()
        batch = tiny_ppo.batch(settings)
        episodes, logprobs = phases[0](state.policy.params, batch, state.step)
        experience, metrics = phases[1](state, frozen, episodes, logprobs)
        experience = experience._replace(advantages=experience.advantages * 3e-3)
        new, metrics = jax.jit(functools.partial(ppo.learn, algorithm))(state, experience, None, metrics)
        statistics[form] = {name: float(value) for name, value in metrics.items()}
    tensorflow, optax = statistics["tensorflow"], statistics["optax"]
    assert tensorflow["policy/ratio_first"] < 1e-5 and optax["policy/ratio_first"] < 1e-5
    assert 2 < optax["policy/update_norm"] / tensorflow["policy/update_norm"] < 30
    assert 3 < optax["policy/approxkl"] / tensorflow["policy/approxkl"] < 60
    assert 1.5 < optax["policy/ratio_deviation"] / tensorflow["policy/ratio_deviation"] < 30
    assert optax["policy/clipfrac"] > 2 * tensorflow["policy/clipfrac"]


# ------------------------------------------------------------------------------------ real stages on a small world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with text and prompts, and a workdir `base` of a base model that knows the text."""
    folder = tmp_path_factory.mktemp("world")
    small_runs.write(folder)
    main.run(small_runs.pretrain(folder), str(folder / "base"))
    return folder


def build(config, workdir):
    """The stage as the command line builds it, and its mesh."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    validate(config, mesh)
    config = run_tokenizer.settled(config, workdir)
    with jax.set_mesh(mesh):
        return ppo_stage.build(config, mesh), mesh


def from_base(world, **changes):
    config = small_runs.get_config(world)
    config.data.tokenizer = ""
    config.models.policy = common.network(init_from=str(world / "base"))
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def text_loss(world):
    """params -> loss a token of 64 rows of the text, in nats."""
    config = small_runs.pretrain(world)
    config.data.tokenizer = str(world / "base" / "tokenizer")
    config.pretrain.update(dict(batch_size=64, microbatch_rows=64))
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), datasets_load(config).train_batches[0])
    shape = tiny_shape()

    @jax.jit
    def loss(params):
        total, sums = language_model_loss(shape, params, rows, None)
        return total / sums["loss_tokens"]

    return lambda params: float(loss(jax.device_get(params)))


def datasets_load(config):
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    return datasets.load(config, config.pretrain, "pretraining", mesh)


def tiny_shape(**changes):
    return models.SIZES["tiny"].replace(**small_runs.MODEL, vocab_size=small_runs.VOCAB_SIZE, **changes)


def test_ptx_keeps_the_pretraining_loss(world, text_loss):
    """The reward is one word's share, up to one token in seven: as much as sentences of the text can have.

    PPO unlearns the text on its way there; PPO-ptx gets as far and does not.
    """
    word = tokenizers.load(str(world / "base" / "tokenizer")).encode([" dog"])[0][-1]
    start, loss, score = None, {}, {}
    for name, ptx_coef in (("ppo", 0.0), ("ptx", 27.8)):
        config = from_base(world, **{"ppo.ptx_coef": ptx_coef, "ppo.kl_coef": 0.0, "ppo.adaptive_kl.target": 0.0})
        config.ppo.update(dict(iterations=150, batch_size=16, microbatch_rows=8, score_clip=1.5))
        stage, mesh = build(config, world / name)
        with jax.set_mesh(mesh), contextlib.closing(stage.data(0)) as data:
            state, frozen = stage.init(), stage.frozen()
            frozen["reward"] = tiny_ppo.counter(tiny_shape(head="scalar"), word, 10.0)
            start = text_loss(state.policy.params)
            scores = []
            for _ in range(config.ppo.iterations):
                state, metrics = stage.update(state, frozen, next(data))
                scores.append(float(metrics["objective/reward"]))  # the clipped score: kl_coef is 0
        loss[name], score[name] = text_loss(state.policy.params), np.mean(scores[-10:])
        assert score[name] > 1.3 > 2 * np.mean(scores[:5]), (name, scores[:5], score[name])
    assert loss["ppo"] > 1.2 * start, (start, loss)
    assert loss["ptx"] <= 1.02 * start, (start, loss)
    assert score["ptx"] > 0.9 * score["ppo"], score


def command(folder, workdir, *overrides):
    """A PPO-ptx run of the command line, from fresh networks, on one device; programs are compiled once for all."""
    environment = os.environ | {
        "XLA_FLAGS": compiling.SOON, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    config = f"--config={small_runs.__file__}:{folder}"
    arguments = [sys.executable, "-m", "instructgpt_jax.main", config, f"--workdir={workdir}", *overrides]
    return subprocess.Popen(
        arguments, env=environment, cwd=pathlib.Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    )


def read(workdir, name="metrics.jsonl"):
    path = workdir / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in parsed]


def wait_for(process, workdir, step):
    deadline = time.monotonic() + 400
    while not any(line["step"] >= step for line in read(workdir)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(world):
    """The workdir of an uninterrupted run of the command line."""
    process = command(world, world / "whole")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return world / "whole"


def test_killed_and_stopped_runs_end_the_same(world, whole):
    """One SIGTERM and two kill -9 at random moments: the same metrics, samples and bits as the uninterrupted run.

    The run has PPO-ptx, an average of the weights, an adaptive KL coefficient and evaluations in it.
    """
    killed, draw = world / "killed", random.Random()
    for step, number in (
        (draw.randint(1, 3), signal.SIGTERM),
        (6, signal.SIGKILL),
        (draw.randint(8, 10), signal.SIGKILL),
    ):
        process = command(world, killed)
        wait_for(process, killed, step)
        time.sleep(draw.uniform(0.0, 0.1))
        process.send_signal(number)
        assert process.wait() == (0 if number == signal.SIGTERM else -number), process.stderr.read()
        if number == signal.SIGTERM:
            assert checkpoint.steps(killed) == [read(killed)[-1]["step"]]  # saved where it stopped
    last = command(world, killed)
    _, errors = last.communicate()
    assert last.returncode == 0 and "restored step" in errors
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert read(killed, name) == read(whole, name)
    states = arrays(killed), arrays(whole)
    jax.tree.map(np.testing.assert_array_equal, *states)

    lines = [line for line in read(whole) if "objective/kl" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["policy/ratio_first"] <= 1e-5 and line["rollout/logprob_gap"] <= 1e-5 for line in lines)
    gaps = {line["step"]: line["rollout/distribution_gap"] for line in lines if "rollout/distribution_gap" in line}
    assert gaps.keys() == {5, 10} and all(0 <= gap <= 2e-6 for gap in gaps.values())
    coefficients = [line["objective/kl_coef"] for line in lines]
    assert len(set(coefficients)) == 12 and lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[-1]["objective/kl_k3"] > 0
    evaluations = [line for line in read(whole) if "valid/score" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12] and evaluations[-1]["valid/length"] <= 8
    samples = read(whole, "samples.jsonl")
    assert len(samples) == 6 and not any("<|endoftext|>" in sample["response"] for sample in samples)


def test_networks_of_the_stage(world, whole):
    """The reference is the policy PPO starts from, the value model the reward model; after a resume as before it."""
    config = small_runs.get_config(world)
    stage, mesh = build(config, world / "fresh")
    with jax.set_mesh(mesh):
        state, frozen = stage.init(), stage.frozen()
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(frozen["ref_policy"], state.policy.params)
    same(state.policy.ema, state.policy.params)
    same(frozen["reward"], state.value.params)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, frozen))]
    assert len(set(buffers)) == len(buffers)
    trained = arrays(whole, "policy")["params"]
    with jax.set_mesh(mesh):
        again, _ = build(small_runs.get_config(world), whole)
        same(again.frozen()["ref_policy"], frozen["ref_policy"])
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), trained, frozen["ref_policy"]))) > 1e-3


def published(folder, config, tokenizer):
    """A network with fresh weights and its tokenizer, as a directory in Hugging Face format."""
    hf.save(folder, config, models.init(config, jax.random.key(3)))
    tokenizer.save(folder)  # afterwards: a tokenizer of more ids than the model has is no export
    return common.network(init_from=str(folder))


def test_networks_of_other_sizes_with_one_tokenizer(world, tmp_path):
    """Published models have more ids than their tokenizer, each as many as it likes: those are never sampled."""
    tokenizer = tokenizers.load(str(world / "base" / "tokenizer"))
    config = small_runs.get_config(world)
    config.data.tokenizer = str(world / "base" / "tokenizer")
    config.ppo.temperature = 3.0  # every id is about as likely as another
    for name, size, head in (("policy", 600, "lm"), ("reward", 400, "scalar")):
        shape = tiny_shape().replace(vocab_size=size, head=head)
        config.models[name] = published(tmp_path / name, shape, tokenizer)
    stage, mesh = build(config, tmp_path / "run")
    with jax.set_mesh(mesh), contextlib.closing(stage.data(0)) as data:
        state, frozen = stage.init(), stage.frozen()
        for _ in range(2):
            state, metrics = stage.update(state, frozen, next(data))
            assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.policy.params, state.value.params)))
            assert metrics["policy/ratio_first"] <= 1e-5 and metrics["rollout/logprob_gap"] <= 1e-5
            assert metrics["policy/entropy"] < np.log(tokenizer.vocab_size)
        _, samples = stage.evaluate(state, frozen)
    assert len(samples) == 2 and all(np.isfinite(sample["score"]) for sample in samples)


def test_a_network_that_lacks_ids_of_the_tokenizer_is_refused(world, tmp_path):
    tokenizer = tokenizers.load(str(world / "base" / "tokenizer"))
    config = small_runs.get_config(world)
    shape = tiny_shape().replace(vocab_size=tokenizer.vocab_size - 2, head="scalar")
    config.models.reward = published(tmp_path / "reward", shape, tokenizer)
    config.data.tokenizer = str(world / "base" / "tokenizer")
    message = f"config.models.reward must have a vocabulary of at least the tokenizer's {shape.vocab_size + 2}, got "
    with pytest.raises(ValueError, match=message + str(shape.vocab_size)):
        build(config, tmp_path / "run")


BAD = {
    "policy and reward model of other vocabularies": (
        {"models.reward.vocab_size": 300}, "config.models.reward must share the policy's vocabulary of 272, got 300"
    ),
    "prompts and responses beyond the context": (
        {"ppo.row_length": 128}, "config.ppo.row_length must be at most the model's context of 64 tokens, got 128"
    ),
    "ptx rows beyond the context": (
        {"ppo.ptx_row_length": 65}, "config.ppo.ptx_row_length must be at most the model's context of 64 tokens, got 65"
    ),
    "prompts that leave no room": (
        {"ppo.max_prompt_length": 9},
        r"config.ppo.row_length must hold .*max_prompt_length \+ config.ppo.response_length = 17 tokens, got 16",
    ),
    "a prompt longer than its place": ({"ppo.max_prompt_length": 3}, "prompts.jsonl"),
    "minibatches that do not divide": (
        {"ppo.num_minibatches": 3}, "config.ppo.batch_size must be a multiple of config.ppo.num_minibatches = 3, got 8"
    ),
    "ptx without text": ({"data.pretraining": ()}, r"config.data.pretraining must .*ptx_coef=27.8"),
    "no temperature": ({"ppo.temperature": 0.0}, "config.ppo.temperature must be a positive number, got 0.0"),
    "a misspelt option": (
        {"ppo.whiten_advantages": "Batch"}, "config.ppo.whiten_advantages must be one of .* got 'Batch'"
    ),
    "a language model for a reward model": (
        {"models.reward": "base"}, "config.models.reward must be a reward model, got a language model from '.*base'"
    ),
    "a reference of another architecture": (
        {"models.ref_policy": dict(size="tiny", **small_runs.MODEL | {"width": 16})},
        "ref_policy must have the architecture of config.models.policy, .*'width': 32.*, got .*'width': 16",
    ),
    "a value model that cannot start from the reward model": (
        {"models.value.width": 64}, "value must have the architecture of .*reward, .*'width': 32.* got .*'width': 64"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_compilation(world, what, monkeypatch):
    changes, message = BAD[what]
    config = small_runs.get_config(world)
    with config.unlocked():
        for key, value in changes.items():
            if value == "base":
                value = common.network(init_from=str(world / "base"))
            *path, last = key.split(".")
            section = functools.reduce(lambda tree, name: tree[name], path, config)
            section[last] = common.network(**value) if isinstance(value, dict) else value
    config.data.tokenizer = str(world / "base" / "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled"))
        patch.setattr(models, "hidden", lambda *_, **__: pytest.fail("traced"))
        with pytest.raises(ValueError, match=message):
            build(config, world / "refused")
