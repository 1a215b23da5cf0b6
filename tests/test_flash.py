"""Fused attention beside the reference: values and gradients on packed rows, a mesh, refusals, and cuDNN's calls."""

import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from instructgpt_jax import models, sharding
from instructgpt_jax.data import packing
from instructgpt_jax.episodes import Episodes, pack
from instructgpt_jax.models import ModelConfig, attention, flash
from instructgpt_jax.models.attention import Layout

T = 256
CONFIG = ModelConfig(
    vocab_size=128, num_layers=2, width=32, num_heads=4, num_kv_heads=2, mlp_width=64, max_length=T, positions="rotary"
)


def packed_layout(seed, b, padding=True):
    """Random rows of consecutive segments, with padding behind them."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, b, T), np.int32)
    for row in range(b):
        ends = np.sort(rng.choice(np.arange(1, T), 3, replace=False)).tolist() + ([] if padding else [T])
        start = 0
        for segment, end in enumerate(ends, 1):
            segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
            start = end
    return Layout(jnp.array(positions), jnp.array(segments))


def branched_layout(seed, b):
    """Random rows of segments, each a prompt and 1 to 9 completions on branches of any numbers, with padding behind."""
    rng = np.random.default_rng(seed)
    segments, positions, branches = np.zeros((3, b, T), np.int32)
    for row in range(b):
        column, end = 0, T - rng.integers(1, 60)
        for segment in range(1, T):
            prompt = rng.integers(1, 40)
            numbers = rng.permutation(np.append(rng.integers(10, 2**flash.BRANCH_BITS, 4), np.arange(1, 10)))
            pieces = [(0, prompt, 0)] + [(prompt, rng.integers(1, 20), n) for n in numbers[: rng.integers(1, 10)]]
            for start, length, branch in pieces:
                here = slice(column, min(column + length, end))
                length = here.stop - column
                segments[row, here], branches[row, here] = segment, branch
                positions[row, here], column = np.arange(start, start + length), here.stop
            if column == end:
                break
    return Layout(*map(jnp.array, (positions, segments, branches)))


def reference(query, key, value, layout, scale, window):
    mask = attention.visible(layout, layout) & attention.within_window(layout, layout, jnp.int32(window))
    return attention.attend(query, key, value, mask, scale)


@pytest.mark.parametrize(
    "groups,window,rows",
    [(4, 0, "packed"), (1, 40, "packed"), (2, 150, "whole"), (4, 0, "branched"), (1, 0, "branched")],
)
def test_splash_agrees_with_the_reference(monkeypatch, groups, window, rows):
    monkeypatch.setattr(flash, "BLOCK", 128)  # several blocks a row
    B, N, H = 2, 4, 16
    layout = (branched_layout if rows == "branched" else packed_layout)(groups, B)
    real = jnp.float32(layout.segments > 0)[:, None, :, None]
    if rows == "whole":
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        layout, real = Layout(positions), jnp.float32(1)
    rng = np.random.default_rng(0)
    arrays = [jnp.float32(rng.standard_normal((B, n, T, H))) for n in (N, groups, groups)]
    weights = real * jnp.float32(rng.standard_normal((B, N, T, H)))

    def total(attend, arrays):
        out = attend(*arrays, layout=layout, scale=0.3, window=window)
        return (out * weights).sum(), out * real

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(total, attend), has_aux=True))(arrays)
        for attend in (flash._splash, reference)
    )
    chex.assert_trees_all_close(ours, theirs, atol=2e-5, rtol=2e-5)


def gradient(config, params, layout, tokens, mesh=None):
    """Of a weighted sum of the hidden states of real tokens."""

    def total(params):
        hidden = models.hidden(config, params, tokens, *layout)
        weights = jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape)) * (layout.segments > 0)[..., None]
        return (hidden * weights).sum()

    return jax.jit(jax.grad(total))(params)


@pytest.mark.parametrize("windows,layout", [((0, 50), packed_layout(1, 2)), ((0,), branched_layout(1, 2))])
def test_network_on_a_mesh(windows, layout):
    """Two windows in turn, with a rotary base each, or branches; grouped queries over tensor, rows over fsdp."""
    config = CONFIG.replace(windows=windows, local_rotary_theta=100.0)
    params = models.init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, 128)
    expected = gradient(config, params, layout, tokens)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        rows = jax.device_put((layout, tokens), jax.NamedSharding(mesh, P(sharding.BATCH)))
        placed = jax.device_put(params, sharding.param_shardings(mesh, params))
        got = gradient(config.replace(attention="splash"), placed, *rows)
    chex.assert_trees_all_close(got, expected, atol=2e-4, rtol=2e-3)


def assert_advances(positions, segments):
    """Each segment is one run of columns along which positions count from 0."""
    for row, ids in zip(np.asarray(positions), np.asarray(segments), strict=True):
        for segment in set(ids.tolist()) - {0}:
            columns = np.flatnonzero(ids == segment)
            assert (np.diff(columns) == 1).all()
            np.testing.assert_array_equal(row[columns], np.arange(columns.size))


def test_packed_rows_advance_by_one_position_a_column():
    """What makes columns stand for positions in the kernels."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 12)
    prompts, mask = rng.integers(0, 9, (12, 20)), np.arange(10) < rng.integers(1, 11, 12)[:, None]
    packed = pack(Episodes(*map(jnp.asarray, (prompts, lengths, prompts[:, :10], mask))), 48, 4)
    assert_advances(packed.positions.reshape(-1, 48), packed.segments.reshape(-1, 48))
    sequence = lambda n: np.arange(n, dtype=np.int32)  # noqa: E731
    examples = [packing.Example(sequence(n), 1) for n in (30, 5, 17, 40, 8)]
    comparisons = [packing.Comparison(sequence(6), [sequence(n) for n in (8, 9, 10)], [1, 2, 3], 0)] * 2
    for batch in (
        packing.pack_examples(examples, 48, 2, 2),
        packing.pack_comparisons(comparisons, 48, 2, 2, 2, 3, shared_prompt=False, first_row=0),
    ):
        assert_advances(batch["positions"].reshape(-1, 48), batch["segments"].reshape(-1, 48))
        assert (batch["segments"] > 1).any()


def test_columns_order_completions_behind_a_shared_prompt():
    """Who sees whom by columns is who sees whom by positions."""
    sequence = lambda n: np.arange(n, dtype=np.int32)  # noqa: E731
    comparisons = [packing.Comparison(sequence(6), [sequence(n) for n in (8, 9, k)], [1, 2, 3], 0) for k in (3, 9, 30)]
    batch = packing.pack_comparisons(comparisons, 48, 1, 4, 3, 3, shared_prompt=True, first_row=0)
    layout = Layout(*(jnp.asarray(batch[name][0]) for name in ("positions", "segments", "branches")))
    columns = layout._replace(positions=jnp.broadcast_to(jnp.arange(48), layout.positions.shape))
    np.testing.assert_array_equal(attention.visible(columns, columns), attention.visible(layout, layout))
    assert layout.branches.max() == 3


@pytest.mark.parametrize("segmented,window", [(False, 0), (False, 40), (True, 0), (True, 40)])
def test_cudnn_is_called_without_a_mask_where_it_can_be(monkeypatch, segmented, window):
    """The program for a GPU, as far as it can be made without one: its kernels and what they read."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)

    def total(query, key, value, positions):
        layout = Layout(positions, positions if segmented else None)
        return flash._cudnn(query, key, value, layout=layout, scale=0.1, window=window).astype(jnp.float32).sum()

    query, key = (jax.ShapeDtypeStruct((2, heads, T, 64), jnp.bfloat16) for heads in (4, 2))
    positions = jax.ShapeDtypeStruct((2, T), jnp.int32)
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(query, key, key, positions)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2 and "Backward" in calls[1]
    for call in calls:
        assert ("fmhaScaleBias" in call) == segmented == (f"tensor<2x1x{T}x{T}xbf16>" in call)
        assert "CAUSAL" in call and f"sliding_window_length\\22: {0 if segmented else window}," in call
    assert f"x4x{T}x{T}x" not in text  # no scores of every head


def layout_of(length, branches=False):
    positions = jnp.zeros((1, length), jnp.int32)
    return Layout(positions, positions + 1, positions if branches else None)


@pytest.mark.parametrize(
    "change,layout,dropout,message",
    [
        ({"attention": "splash", "windows": (0, 9)}, layout_of(256, branches=True), False, "windows over completions"),
        ({"attention": "splash"}, layout_of(200), False, "200 tokens"),
        ({"attention": "splash"}, layout_of(256), True, "dropout"),
        ({"attention": "cudnn", "dtype": "bfloat16"}, layout_of(256), False, "CPU"),
    ],
)
def test_a_forced_backend_refuses_what_it_cannot_do(change, layout, dropout, message):
    with pytest.raises(ValueError, match=f"attention must be 'auto' or 'xla' for .*{message}"):
        flash.choose(CONFIG.replace(**change), layout, dropout)


def test_auto_follows_the_platform_and_falls_back_with_one_line(monkeypatch, caplog):
    assert flash.choose(CONFIG, layout_of(256), False) == "xla"
    bf16 = CONFIG.replace(dtype="bfloat16")
    for name, backend in (("tpu", "splash"), ("gpu", "cudnn")):
        monkeypatch.setattr(flash, "platform", lambda name=name: name)
        assert flash.choose(bf16, layout_of(256), False) == backend
    flash._say_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert flash.choose(CONFIG, layout_of(256), False) == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        "attention: cudnn does not do float32 (cudnn: bfloat16); xla does it"
    ]


@pytest.mark.parametrize(
    "flags,backend",
    [
        ("--xla_gpu_autotune_level=4 --xla_gpu_deterministic_ops=true", "xla"),
        ("--xla_gpu_exclude_nondeterministic_ops", "xla"),
        ("--xla_gpu_deterministic_ops=false", "cudnn"),
    ],
)
def test_a_gpu_that_must_give_the_same_bits_attends_with_xla(monkeypatch, flags, backend):
    monkeypatch.setattr(flash, "platform", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert flash.choose(CONFIG.replace(dtype="bfloat16"), layout_of(256), False) == backend


def test_attention_of_a_model_is_checked():
    with pytest.raises(ValueError, match="attention must be one of"):
        CONFIG.replace(attention="flash")
