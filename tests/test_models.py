"""The transformer against a numpy loop, in packed rows, on branches, with a cache, with dropout and under remat."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model

from instructgpt_jax import models
from instructgpt_jax.models import ModelConfig, cache, transformer

BASE = ModelConfig(vocab_size=50, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32)
LLAMA = BASE.replace(
    positions="rotary",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    num_kv_heads=2,
    tied_embeddings=False,
)
# Every choice of the configuration at least once.
CONFIGS = {
    "gpt2": BASE,
    "llama": LLAMA,
    "gptj": BASE.replace(
        positions="rotary",
        rotary_interleaved=True,
        rotary_width=2,
        residual="parallel_shared_norm",
        qkv_bias=False,
        out_bias=False,
        tied_embeddings=False,
        head_bias=True,
    ),
    "neox": BASE.replace(positions="rotary", rotary_width=2, activation="gelu", residual="parallel", rotary_theta=9.0),
    "windows": BASE.replace(num_layers=3, windows=(0, 3), num_kv_heads=1, attention_scale=1.0, activation="relu"),
    "qk_norm": LLAMA.replace(qk_norm=True, head_width=6, windows=(2, 0), activation="gelu_tanh", head_bias=True),
    "post_norm": BASE.replace(residual="post_norm", embedding_width=8, position_offset=2, activation="relu"),
    "sandwich": LLAMA.replace(
        residual="sandwich",
        norm_offset=1.0,
        qk_norm=True,
        scaled_embeddings=True,
        tied_embeddings=True,
        windows=(3, 0),
        local_rotary_theta=5.0,
        attention_scale=0.3,
        activation="gelu_tanh",
    ),
    "no positions": BASE.replace(positions="none", gated_mlp=True, tied_embeddings=True, head_bias=True),
}

logits = jax.jit(models.logits, static_argnums=0)
hidden = jax.jit(models.hidden, static_argnums=0)


@functools.cache
def params_of(name):
    return reference_model.random_params(CONFIGS[name], models.init)


def rows(*sequences, length=None):
    """Sequences in one row: tokens, positions, segments, each (1, T)."""
    length = length or sum(map(len, sequences))
    out = np.zeros((3, 1, length), np.int32)
    column = 0
    for segment, tokens in enumerate(sequences, start=1):
        here = slice(column, column + len(tokens))
        out[0, 0, here], out[1, 0, here], out[2, 0, here] = tokens, np.arange(len(tokens)), segment
        column += len(tokens)
    return out


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(0, 50, n)


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_numpy_loop(name):
    config, params = CONFIGS[name], params_of(name)
    first, second = tokens(9), tokens(5, seed=1)
    packed = logits(config, params, *rows(first, second, length=16))
    assert packed.shape == (1, 16, 50) and packed.dtype == jnp.float32
    expected = np.concatenate([reference_model.forward(config, params, x) for x in (first, second)])
    assert np.std(expected) > 0.3  # the comparison is of numbers that matter
    np.testing.assert_allclose(packed[0, :14], expected, atol=1e-5, rtol=1e-5)


def test_logits_default_to_one_sequence_a_row():
    x = np.stack([tokens(6), tokens(6, seed=1)])
    expected = [reference_model.forward(BASE, params_of("gpt2"), row) for row in x]
    np.testing.assert_allclose(logits(BASE, params_of("gpt2"), x), expected, atol=1e-5, rtol=1e-5)


def test_scalar_head():
    config, params = models.with_scalar_head(BASE, params_of("gpt2"), jax.random.key(3))
    assert config.head == "scalar" and "head" not in params
    params["scalar_head"]["bias"] = jnp.float32(0.7)
    values = models.scalar(config, params, hidden(config, params, *rows(tokens(9))))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values[0], reference_model.forward(config, params, tokens(9)), atol=1e-5)


@pytest.mark.parametrize("name", ["windows", "qk_norm", "sandwich"])
def test_packed_rows_are_separate_sequences(name):
    """Values and gradients: a neighbour in the row changes neither."""
    config, params = CONFIGS[name], params_of(name)
    sequences = [tokens(n, seed=n) for n in (7, 5, 4)]
    weights = [np.random.default_rng(n).standard_normal((n, config.embedding_width)) for n in (7, 5, 4)]

    @jax.jit
    def run(arrays, weight):
        def loss(params):
            y = models.hidden(config, params, *arrays)
            return (y * weight).sum(), y

        return jax.grad(loss, has_aux=True)(params)

    def padded(*parts):  # every call has the same shapes: one compilation
        return np.concatenate([*parts, np.zeros((16 - sum(map(len, parts)), parts[0].shape[1]))])[None]

    together, y = run(rows(*sequences, length=16), padded(*weights))
    apart, ys = zip(*(run(rows(s, length=16), padded(w)) for s, w in zip(sequences, weights, strict=True)), strict=True)
    np.testing.assert_allclose(y[0], np.concatenate([y[0, :n] for y, n in zip(ys, (7, 5, 4), strict=True)]), atol=1e-5)
    chex.assert_trees_all_close(together, jax.tree.map(lambda *g: sum(g), *apart), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "windows", "llama"])
def test_branches_are_separate_sequences(name):
    """A prompt shared by completions on branches gives what each gets with a prompt of its own."""
    config, params = CONFIGS[name], params_of(name)
    prompt, completions = tokens(5), [tokens(n, seed=n) for n in (4, 2, 3)]
    row = np.concatenate([prompt, *completions])[None]
    branches = np.concatenate([np.zeros(5), *(np.full(len(c), k) for k, c in enumerate(completions, start=1))])[None]
    positions = np.concatenate([np.arange(5), *(5 + np.arange(len(c)) for c in completions)])[None]
    y = hidden(config, params, row, positions.astype(int), np.ones_like(row), branches.astype(int))
    y = models.project(config, params, y)[0]
    start = 5
    for completion in completions:
        expected = reference_model.forward(config, params, np.concatenate([prompt, completion]))
        got = np.concatenate([y[:5], y[start : start + len(completion)]])
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)
        start += len(completion)


@pytest.mark.parametrize("name", ["windows"])
def test_padding_contents_never_change_a_number(name):
    """Tokens and positions in padding may hold anything, out of range too."""
    config, params = CONFIGS[name], params_of(name)
    arrays = rows(tokens(4), tokens(3, seed=1), length=10)
    weight = jax.random.normal(jax.random.key(0), (1, 10, config.embedding_width)) * (arrays[2] > 0)[..., None]

    @jax.jit
    def run(tokens, positions):
        def loss(params):
            y = models.hidden(config, params, tokens, positions, arrays[2])
            return (y * weight).sum(), y

        return jax.grad(loss, has_aux=True)(params)

    expected, y = run(arrays[0], arrays[1])
    rng = np.random.default_rng(0)
    for trial in range(20):
        low, high = [(0, 32), (-5, 60), (-(2**31), 2**31 - 1)][trial % 3]
        garbage = np.where(arrays[2] > 0, arrays[:2], rng.integers(low, high, arrays[:2].shape)).astype(np.int32)
        gradients, other = run(*garbage)
        np.testing.assert_array_equal(other[:, :7], y[:, :7])
        assert np.isfinite(other).all()
        chex.assert_trees_all_equal(gradients, expected)


@pytest.mark.parametrize("name", ["windows", "qk_norm", "post_norm", "sandwich"])
def test_prefill_and_cached_decoding_are_the_forward_pass(name):
    config, params = CONFIGS[name], params_of(name)
    layers = models.unstack(config, params)
    lengths, new = np.array([7, 2]), 5  # prompts in columns 0 to 7, by chunks of 4; then one token a time
    x = np.stack([tokens(12), tokens(12, seed=1)])
    extend = jax.jit(functools.partial(models.extend, config))

    past = models.init_cache(config, batch=2, length=16)
    outputs = {}
    for start in (0, 4):
        columns = np.arange(start, start + 4)
        positions = np.where(columns < lengths[:, None], columns, -1)
        padded = np.where(positions < 0, 2**31 - 1, x[:, start : start + 4])
        y, past = extend(layers, past, padded, positions, start)
        outputs |= {(row, c): y[row, c - start] for row in range(2) for c in columns if c < lengths[row]}
    for step in range(new):
        at = lengths + step
        y, past = extend(layers, past, x[[0, 1], at][:, None], at[:, None], 8 + step)
        outputs |= {(row, at[row]): y[row, 0] for row in range(2)}
    assert (np.asarray(past.positions) == cache.EMPTY).sum() == 2 * 16 - lengths.sum() - 2 * new
    full = hidden(config, params, x, np.broadcast_to(np.arange(12), x.shape), np.ones_like(x))
    assert len(outputs) == lengths.sum() + 2 * new
    for (row, column), y in outputs.items():
        np.testing.assert_allclose(y, full[row, column], atol=1e-5)


def test_remat_policies_give_the_same_gradients():
    """Dropout on: what is recomputed must use the same masks."""
    config = CONFIGS["windows"].replace(residual_dropout=0.3, attention_dropout=0.2, embedding_dropout=0.1)
    x = rows(tokens(9), tokens(5, seed=1))

    def gradient(remat):
        loss = lambda p: jnp.square(  # noqa: E731
            models.hidden(config.replace(remat=remat), p, *x, dropout_key=jax.random.key(1))
        ).sum()
        return jax.jit(jax.grad(loss))(params_of("windows"))

    expected = gradient("none")
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected["blocks"]["mlp"]))
    for remat in ("light", "dots", "full"):
        chex.assert_trees_all_close(gradient(remat), expected, rtol=1e-4, atol=1e-4)


def test_dropout_rate_and_scale():
    y = transformer.dropout(jnp.ones((200, 500)), 0.2, jax.random.key(0))
    dropped = np.mean(y == 0)
    assert abs(dropped - 0.2) < 4 * np.sqrt(0.2 * 0.8 / y.size)
    np.testing.assert_allclose(np.unique(y), [0, 1.25], rtol=1e-6)


@pytest.mark.parametrize("kind", ["residual_dropout", "embedding_dropout", "attention_dropout"])
def test_dropout_by_key(kind):
    config, params, x = BASE.replace(**{kind: 0.5}), params_of("gpt2"), rows(tokens(9))
    run = jax.jit(lambda key: models.hidden(config, params, *x, dropout_key=key))
    one, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(hidden(config, params, *x), hidden(BASE, params, *x))  # off without a key


def test_dropout_differs_by_layer():
    """The same mask in every layer would be half a regulariser."""
    config = BASE.replace(num_layers=2, residual_dropout=0.5)
    params = dict(params_of("gpt2"))
    # Blocks that add a constant to every channel: what a layer dropped can be read off the difference.
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    params["blocks"]["mlp"]["down"]["bias"] = jnp.ones((2, 16)) * jnp.array([[1.0], [100.0]])
    captured = transformer.final_norm
    try:
        transformer.final_norm = lambda config, params, x: x
        x = rows(tokens(30))
        y = models.hidden(config, params, *x, dropout_key=jax.random.key(0))
        y0 = models.hidden(config, params, *x)
    finally:
        transformer.final_norm = captured
    added = np.round(np.asarray(y - y0) + 101)  # 2 · first mask + 200 · second mask
    first, second = added % 200 > 0, added >= 200
    assert 0.35 < np.mean(first == second) < 0.65


def test_bfloat16_is_near_float32():
    config = CONFIGS["qk_norm"].replace(dtype="bfloat16")
    params = params_of("qk_norm")
    x = rows(tokens(9), tokens(5, seed=1))
    assert hidden(config, params, *x).dtype == jnp.bfloat16
    y, exact = logits(config, params, *x), logits(CONFIGS["qk_norm"], params, *x)
    assert y.dtype == jnp.float32
    error = np.abs(y - exact).max() / np.std(exact)
    assert 1e-4 < error < 0.1
    norms = models.cast(params, "bfloat16")["blocks"]
    assert norms["norm1"]["scale"].dtype == jnp.float32 and norms["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_initialisation():
    config = models.SIZES["tiny"].replace(width=128, mlp_width=512, num_layers=8, vocab_size=500, tied_embeddings=False)
    params = jax.jit(models.init, static_argnums=0)(config, jax.random.key(0))
    blocks = params["blocks"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    for x, std in (
        (params["embed"]["tokens"][:500], 0.02),
        (params["head"]["kernel"][:500], 0.02),
        (params["embed"]["positions"], 0.01),
        (blocks["attention"]["query"]["kernel"], 0.02),
        (blocks["mlp"]["up"]["kernel"], 0.02),
        (blocks["attention"]["out"]["kernel"], 0.02 / 4),  # sqrt(2 · 8 layers) = 4
        (blocks["mlp"]["down"]["kernel"], 0.02 / 4),
    ):
        np.testing.assert_allclose(np.std(x), std, rtol=0.02)
        assert abs(np.mean(x)) < 0.05 * std
    assert np.abs(blocks["mlp"]["up"]["kernel"][0] - blocks["mlp"]["up"]["kernel"][1]).max() > 0.01
    assert params["embed"]["tokens"].shape[0] == 512 and not np.any(params["embed"]["tokens"][500:])
    assert all(not np.any(layer["bias"]) for layer in (blocks["norm1"], blocks["mlp"]["up"], params["final_norm"]))
    kernels = [models.scalar_head(config, jax.random.key(i))["kernel"] for i in range(30)]
    np.testing.assert_allclose(np.std(kernels), 1 / np.sqrt(129), rtol=0.04)


def test_shapes_are_checked():
    x = rows(tokens(6))
    with pytest.raises(AssertionError, match="shape"):
        models.hidden(BASE, params_of("gpt2"), x[0], x[1, :, :5], x[2])
