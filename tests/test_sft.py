"""Supervised fine-tuning: packed rows against one sequence a row, whatever the microbatches and the mesh."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_supervised

from configs import common
from instructgpt_jax import main, models, sharding
from instructgpt_jax.data import packing
from instructgpt_jax.stages import sft
from instructgpt_jax.training import supervised
from instructgpt_jax.training.state import create

CONFIG = models.SIZES["tiny"].replace(vocab_size=50, width=32, num_heads=2, mlp_width=64, max_length=128)


def make_examples():
    """Nine sequences of 6 to 24 tokens; the loss begins at a column of its own."""
    rng = np.random.default_rng(0)
    return [
        packing.Example(rng.integers(1, 50, length).astype(np.int32), int(rng.integers(1, length)))
        for length in rng.integers(6, 25, 9)
    ]


def reference(params, examples):
    """The token mean with each sequence alone in a row, the probabilities from full logits."""
    longest = max(len(example.tokens) for example in examples)
    tokens = np.stack([np.pad(example.tokens, (0, longest - len(example.tokens))) for example in examples])
    logprobs = jax.nn.log_softmax(models.logits(CONFIG, params, tokens))
    total = count = 0
    for row, (sequence, loss_from, _) in enumerate(examples):
        for t in range(loss_from, len(sequence)):
            total -= logprobs[row, t - 1, sequence[t]]
            count += 1
    return total / count


@functools.cache
def expected():
    """The reference's loss and gradient of the examples."""
    function = jax.value_and_grad(lambda params: reference(params, make_examples()))
    return jax.jit(function, compiler_options=tiny_supervised.QUICK)(models.init(CONFIG, jax.random.key(1)))


@pytest.mark.parametrize("row_length, rows", [(64, 16), (64, 2), (24, 4)])
def test_packed_rows_equal_one_sequence_a_row(row_length, rows):
    examples = make_examples()
    batch = packing.pack_examples(examples, row_length, packing.num_microbatches(len(examples), rows), rows)
    params = models.init(CONFIG, jax.random.key(1))

    def loss(params, microbatch, key):
        return supervised.language_model_loss(CONFIG, params, microbatch, None)

    @functools.partial(jax.jit, compiler_options=tiny_supervised.QUICK)
    def packed(state, batch):
        after, sums = supervised.update(state, {}, batch, loss=loss, count="loss_tokens", tx=optax.sgd(1.0), seed=0)
        return sums, jax.tree.map(jnp.subtract, state.params, after.params)

    sums, gradient = packed(create(params, optax.sgd(1.0), with_ema=False), batch)
    want_loss, want_gradient = expected()
    assert int(sums["loss_tokens"]) == sum(len(tokens) - loss_from for tokens, loss_from, _ in examples)
    assert int(sums["tokens"]) == sum(len(example.tokens) for example in examples)
    np.testing.assert_allclose(sums["loss"] / sums["loss_tokens"], want_loss, rtol=3e-6)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(want_gradient), jax.tree.leaves(gradient), strict=True
    ):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=1e-6 + 2e-5 * scale, err_msg=jax.tree_util.keystr(path))


def test_weights_of_two_kinds():
    """By hand: five loss tokens of demonstrations and two of texts; a quarter of the loss is the texts'."""
    mask = np.array([[[0, 1, 1, 2], [1, 1, 0, 1]], [[0, 2, 0, 0], [0, 0, 0, 0]]], np.int32)
    weights = np.asarray(sft.with_weights({"loss_mask": mask}, 0.25)["loss_weights"])
    assert weights.shape == mask.shape and weights.dtype == np.float32
    nll = np.random.default_rng(0).random(mask.shape).astype(np.float32)
    mean = (weights * nll).sum() / (mask > 0).sum()  # what the update takes the gradient of
    np.testing.assert_allclose(mean, 0.75 * nll[mask == 1].mean() + 0.25 * nll[mask == 2].mean(), rtol=1e-6)
    only = np.asarray(sft.with_weights({"loss_mask": np.minimum(mask, 1)}, 0.25)["loss_weights"])
    np.testing.assert_allclose(only[mask > 0], 0.75)  # no text: its part of the loss is 0


def test_the_loss_of_a_share_is_that_of_each_kind_alone(tmp_path):
    """The first `sft/loss` of a stage against plain means over the two kinds of its first batch."""
    world = tiny_supervised.make_world(tmp_path)
    (world / "text.jsonl").write_text("".join(json.dumps({"text": "stone river bird " * 60}) + "\n" for _ in range(9)))
    changes = {"models.model.residual_dropout": 0.0, "sft.pretraining_fraction": 0.1}
    changes["data.pretraining"] = (f"jsonl:{world}/text.jsonl",)
    settings = tiny_supervised.config("sft", world, **changes)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = sft.build(settings, mesh)
        state = stage.init()
        config = models.ModelConfig(**stage.models["model"]["architecture"])
        with contextlib.closing(stage.data(0)) as batches:
            batch = jax.tree.map(np.asarray, next(batches))
        sums = {1: [0.0, 0], 2: [0.0, 0]}
        for i in range(len(batch["tokens"])):
            rows = {name: array[i] for name, array in batch.items()}
            inputs = rows["tokens"], rows["positions"], rows["segments"]
            logprobs = jax.nn.log_softmax(models.logits(config, state.params, *inputs))
            nll = -np.take_along_axis(np.asarray(logprobs[:, :-1]), rows["tokens"][:, 1:, None], axis=-1)[..., 0]
            for kind in sums:
                wanted = rows["loss_mask"][:, 1:] == kind
                sums[kind][0] += nll[wanted].sum()
                sums[kind][1] += wanted.sum()
        _, values = stage.update(state, {}, batch)
    assert sums[1][1] > 20 and sums[2][1] == 95  # one text of a row
    want = 0.9 * sums[1][0] / sums[1][1] + 0.1 * sums[2][0] / sums[2][1]
    np.testing.assert_allclose(values["sft/loss"], want, rtol=1e-5)
    assert values["sft/loss_tokens"] == sums[1][1] + sums[2][1]


@pytest.fixture(scope="module")
def learned(one_device, tmp_path_factory):
    """A world, and the workdir of a model that knows its demonstrations by heart."""
    folder = tmp_path_factory.mktemp("learned")
    world = tiny_supervised.make_world(folder / "world")
    changes = {"sft.num_steps": 0, "sft.num_epochs": 30, "eval_every": 0, "checkpoint.every": 1000}
    config = tiny_supervised.config("sft", world, **changes, **{"models.model.residual_dropout": 0.0})
    main.run(config, str(folder / "run"))
    return world, folder / "run"


@pytest.mark.parametrize("rate, said", [(0.9, True), (0.01, False)])
def test_dropout_that_a_model_does_not_bear_is_told(learned, one_device, tmp_path, capsys, rate, said):
    """A model that knows its data by heart, fine-tuned with and without much noise."""
    world, start = learned
    settings = tiny_supervised.config("sft", world, **{"sft.num_steps": 1})
    settings.models.model = common.network(init_from=str(start), residual_dropout=rate)
    capsys.readouterr()
    main.run(settings, str(tmp_path / "noisy"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "with dropout" in line]
    assert len(lines) == said and all(line.startswith("sft: the loss begins at ") for line in lines)


def test_eight_devices_equal_one(tmp_path):
    world = tiny_supervised.make_world(tmp_path)
    tiny_supervised.check_meshes(sft.build, tiny_supervised.config("sft", world), "sft/loss")
