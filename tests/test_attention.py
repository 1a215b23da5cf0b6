"""Masks, rotary positions and attention against loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructgpt_jax.models import attention
from instructgpt_jax.models.attention import Layout


def random_layout(seed, T=14):
    """A row of segments with branches, and padding that holds anything."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, T))[::-1].copy()
    branches, positions = rng.integers(0, 3, T), rng.integers(0, 9, T)
    return Layout(*(np.asarray(x, np.int32)[None] for x in (positions, segments, branches)))


@pytest.mark.parametrize("seed", range(3))
def test_visible_by_definition(seed):
    layout = random_layout(seed)
    mask = np.asarray(attention.visible(layout, layout))[0]
    windowed = np.asarray(attention.within_window(layout, layout, jnp.int32(3)))[0]
    positions, segments, branches = (x[0] for x in layout)
    seen = 0
    for t in range(14):
        for s in range(14):
            expected = segments[t] == segments[s] != 0 and positions[s] <= positions[t]
            expected = expected and branches[s] in (0, branches[t])
            assert mask[t, s] == expected
            assert windowed[t, s] == (positions[t] - positions[s] < 3)
            seen += expected
    assert 10 < seen < 150
    assert np.asarray(attention.within_window(layout, layout, jnp.int32(0))).all()


def test_empty_slots_are_never_seen():
    query = Layout(jnp.array([[0, 7, -1]]))
    key = Layout(jnp.array([[0, 1, attention.EMPTY]]))
    np.testing.assert_array_equal(attention.visible(query, key)[0], [[1, 0, 0], [1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attend(groups):
    B, N, T, S, H = 2, 4, 3, 5, 6
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((B, n, t, H)) for n, t in ((N, T), (groups, S), (groups, S)))
    mask = rng.random((B, T, S)) < 0.6
    mask[1, 2] = False  # padding sees nothing
    mask[:, :2, 0] = True
    y = attention.attend(*(jnp.float32(x) for x in (query, key, value)), jnp.array(mask), 0.3)
    assert np.isfinite(y).all()
    for b in range(B):
        for n in range(N):
            for t in range(T):
                if not mask[b, t].any():
                    continue
                m = n // (N // groups)
                weights = np.array([mask[b, t, s] * math.exp(0.3 * query[b, n, t] @ key[b, m, s]) for s in range(S)])
                np.testing.assert_allclose(y[b, n, t], weights @ value[b, m] / weights.sum(), atol=1e-5)


def test_attention_dropout_keeps_the_mean():
    ones = jnp.ones((1, 1, 1, 4))
    key = value = jnp.ones((1, 1, 20_000, 4))
    mask = jnp.ones((1, 1, 20_000), bool)
    y = attention.attend(ones, key, value, mask, 1.0, dropout_rate=0.25, dropout_key=jax.random.key(0))
    assert abs(float(y[0, 0, 0, 0]) - 1) < 4 * math.sqrt(0.25 / 0.75 / 20_000)
    assert float(y[0, 0, 0, 0]) != 1.0


def test_rotary_frequencies():
    np.testing.assert_allclose(attention.rotary_frequencies(4, 100.0, ()), [1.0, 0.1], rtol=1e-6)
    linear = (("factor", 4.0), ("kind", "linear"))
    np.testing.assert_allclose(attention.rotary_frequencies(4, 100.0, linear), [0.25, 0.025], rtol=1e-6)
    with pytest.raises(ValueError, match="rotary_scaling kind .*'dynamic'"):
        attention.rotary_frequencies(4, 100.0, (("kind", "dynamic"),))


def test_yarn_by_hand():
    """Of 100 turns in the original context to 1, channel 0 to 2 of a width of 4: 0 stays, 1 is halfway, 2 is none."""
    options = {"kind": "yarn", "factor": 4.0, "original_max_position": 200 * math.pi, "attention_factor": 1.5}
    options |= {"beta_fast": 100 - 1e-6, "beta_slow": 1.0 + 1e-9, "truncate": False}
    got = attention.rotary_frequencies(4, 100.0, tuple(options.items()))
    np.testing.assert_allclose(got, [1.0, 0.1 / 2 + 0.1 / 4 / 2], rtol=1e-5)
    options |= {"beta_fast": 40.0, "beta_slow": 20.0}  # channels 0.4 and 0.7: whole ones are 0 and 1
    got = attention.rotary_frequencies(4, 100.0, tuple((options | {"truncate": True}).items()))
    np.testing.assert_allclose(got, [1.0, 0.1 / 4], rtol=1e-5)
    assert attention.rotary_scale(tuple(options.items())) == 1.5 and attention.rotary_scale(()) == 1
    cos, sin = attention.rotary_angles(jnp.array([[3]]), jnp.array([0.5]), 2.0)
    np.testing.assert_allclose([cos[0, 0, 0], sin[0, 0, 0]], [2 * math.cos(1.5), 2 * math.sin(1.5)], rtol=1e-6)


def test_llama3_scaling_by_cases():
    """Llama 3.1's published rule, frequency by frequency: kept, divided, or in between."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    options = (
        ("factor", factor),
        ("high_freq_factor", high),
        ("kind", "llama3"),
        ("low_freq_factor", low),
        ("original_max_position", original),
    )
    got = attention.rotary_frequencies(128, 500_000.0, options)
    cases = set()
    for i, result in enumerate(got):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            case, expected = "kept", frequency
        elif wavelength > original / low:
            case, expected = "divided", frequency / factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            case, expected = "between", (1 - smooth) * frequency / factor + smooth * frequency
        cases.add(case)
        np.testing.assert_allclose(result, expected, rtol=2e-5)
    assert cases == {"kept", "divided", "between"}


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_depends_on_distance_only(interleaved):
    rng = np.random.default_rng(0)
    query, key = (jnp.float32(rng.standard_normal((1, 1, 1, 8))) for _ in range(2))
    frequencies = attention.rotary_frequencies(6, 100.0, ())

    def product(q_position, k_position):
        turned = [
            attention.rotate(x, *attention.rotary_angles(jnp.array([[p]]), frequencies), interleaved)
            for x, p in ((query, q_position), (key, k_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(5, 3) == pytest.approx(product(12, 10), abs=1e-4)
    assert product(5, 3) != pytest.approx(product(5, 4), abs=1e-3)
    still = attention.rotate(query, *attention.rotary_angles(jnp.array([[4]]), frequencies), interleaved)
    np.testing.assert_array_equal(still[..., 6:], query[..., 6:])  # partial: the rest passes through
