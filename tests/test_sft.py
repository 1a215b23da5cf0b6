"""Supervised fine-tuning: packed rows against one sequence a row, whatever the microbatches and the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_supervised

from instructgpt_jax import models, pretrain, sft
from instructgpt_jax.data import packing
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
    longest = max(len(tokens) for tokens, _ in examples)
    tokens = np.stack([np.pad(tokens, (0, longest - len(tokens))) for tokens, _ in examples])
    logprobs = jax.nn.log_softmax(models.logits(CONFIG, params, tokens))
    total = count = 0
    for row, (sequence, loss_from) in enumerate(examples):
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
        return pretrain.language_model_loss(CONFIG, params, microbatch, None)

    @functools.partial(jax.jit, compiler_options=tiny_supervised.QUICK)
    def packed(state, batch):
        after, sums = supervised.update(state, {}, batch, loss=loss, count="loss_tokens", tx=optax.sgd(1.0), seed=0)
        return sums, jax.tree.map(jnp.subtract, state.params, after.params)

    sums, gradient = packed(create(params, optax.sgd(1.0), with_ema=False), batch)
    want_loss, want_gradient = expected()
    assert int(sums["loss_tokens"]) == sum(len(tokens) - loss_from for tokens, loss_from in examples)
    assert int(sums["tokens"]) == sum(len(tokens) for tokens, _ in examples)
    np.testing.assert_allclose(sums["loss"] / sums["loss_tokens"], want_loss, rtol=3e-6)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(want_gradient), jax.tree.leaves(gradient), strict=True
    ):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=1e-6 + 2e-5 * scale, err_msg=jax.tree_util.keystr(path))


def test_eight_devices_equal_one(tmp_path):
    world = tiny_supervised.make_world(tmp_path)
    tiny_supervised.check_meshes(sft.build, tiny_supervised.config("sft", world), "sft/loss")
