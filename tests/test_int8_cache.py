"""Keys and values of sampling in 8 bits, and the distance between the distributions of sampling and of scoring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
import test_sharding
import tiny_ppo
from jax.sharding import PartitionSpec as P

from instructgpt_jax import episodes, models, ppo, rollout, sharding
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.models import ModelConfig, attention, stores

SMALL = dict(vocab_size=60, num_layers=2, width=16, num_heads=4, mlp_width=32, max_length=32)
SHAPES = {
    "grouped": ModelConfig(**SMALL, num_kv_heads=2, windows=(0, 5)),
    "rotary": ModelConfig(**SMALL, positions="rotary"),
}
WEIGHTS = {name: reference_model.random_params(config, models.init) for name, config in SHAPES.items()}
B, Q, R = 6, 9, 7
PROMPTS = np.random.default_rng(0).integers(0, 60, (B, Q)).astype(np.int32)
LENGTHS = np.array([9, 1, 4, 7, 2, 9], np.int32)


def rounded(x, nudge=0.0):
    """Every vector of the last axis on a grid of 127 steps to each side of 0; `nudge` decides what is half way."""
    step = np.abs(np.asarray(x)).max(axis=-1, keepdims=True) / 127
    return np.round(np.asarray(x) / np.maximum(step, 1e-30) * np.float32(1 + nudge)) * step


def rows_of(prompts, lengths, responses):
    rows = np.zeros((len(prompts), Q + R), np.int32)
    for row, prompt, n, response in zip(rows, prompts, lengths, np.asarray(responses), strict=True):
        row[: n + R] = np.concatenate([prompt[:n], response])
    return rows


def test_eight_bits():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5, 8)).at[1, 2, 3].set(0.0)
    stored = stores.quantise(x)
    assert stored.numbers.dtype == jnp.int8 and stored.scales.dtype == jnp.float32
    assert stored.numbers.shape == x.shape and stored.scales.shape == x.shape[:-1]
    again = stored.numbers * stored.scales[..., None]
    np.testing.assert_allclose(again, rounded(x), atol=1e-6)
    assert not np.asarray(again[1, 2, 3]).any() and np.abs(stored.numbers).max() == 127
    assert stores.quantise(x.astype(jnp.bfloat16)).scales.dtype == jnp.float32


@functools.partial(jax.jit, static_argnames=("name", "wave", "answers", "cache"))
def sampled(name, prompts=PROMPTS, lengths=LENGTHS, wave=None, answers=1, cache="int8"):
    given = SHAPES[name], WEIGHTS[name], prompts, lengths, R, 0
    return rollout.generate(*given, eos_id=3, wave=wave, answers=answers, cache=cache)


@pytest.mark.parametrize("name", SHAPES)
def test_sampling_is_from_the_network_with_rounded_keys_and_values(name, monkeypatch):
    """Against a forward pass of whole rows, no cache, whose keys and values stand on the grid.

    Sums in another order may tip a number that lies half way over to its neighbour on the grid: a row must be that of
    the one or of the other.
    """
    tokens, logprobs, mask = jax.tree.map(np.asarray, sampled(name))
    plain = attention.attend

    def differences():  # (B, R)
        logits = models.logits(SHAPES[name], WEIGHTS[name], rows_of(PROMPTS, LENGTHS, tokens))
        every = jax.nn.log_softmax(logits)
        chosen = np.stack([
            [every[b, n - 1 + t, tokens[b, t]] for t in range(R)] for b, n in enumerate(LENGTHS)
        ])  # fmt: skip
        return np.where(mask, np.abs(chosen - logprobs), 0.0)

    exact, on_grid = differences(), []
    for nudge in (-3e-7, 0.0, 3e-7):  # a few last places

        def attend(query, key, value, *rest):
            grid = lambda x: jax.pure_callback(functools.partial(rounded, nudge=nudge), x, x)  # noqa: B023, E731
            return plain(query, grid(key), grid(value), *rest)

        monkeypatch.setattr(attention, "attend", attend)
        on_grid.append(differences().max(axis=1))
    assert np.min(on_grid, axis=0).max() < 1e-5
    assert np.median(exact[mask]) > 1e-4  # what rounding does is seen


@pytest.mark.parametrize("name", SHAPES)
def test_slots_and_answers_change_nothing(name, monkeypatch):
    """Refills, prompts read once for several answers, the clock at the end of its columns, the last few slots."""
    for key, size in {"PREFILL_CHUNK": 4, "TRAY": 2, "TAIL": 2, "LONG": 1}.items():
        monkeypatch.setattr(rollout, key, size)
    separate = sampled(name, np.repeat(PROMPTS, 2, axis=0), np.repeat(LENGTHS, 2))
    sampled.clear_cache()
    for wave in (4, 1):
        together = sampled(name, wave=wave, answers=2)
        np.testing.assert_array_equal(together.tokens, separate.tokens)
        np.testing.assert_array_equal(together.mask, separate.mask)
        np.testing.assert_allclose(together.logprobs, separate.logprobs, atol=2e-3)


def test_on_a_mesh(capfd):
    """Slots, trays and copies of several shards, heads over `tensor`."""
    config = test_sharding.CONFIG
    params, (prompts, lengths) = test_sharding.alone(config)[0], test_sharding.prompt_batch()
    generate = functools.partial(rollout.generate, config, max_new_tokens=6, seed=0, eos_id=3, cache="int8")
    expected = jax.jit(generate)(params, prompts, lengths)
    mesh = test_sharding.mesh_of((2, 2, 2))
    shardings, split = sharding.param_shardings(mesh, params), jax.NamedSharding(mesh, P(sharding.BATCH))
    capfd.readouterr()
    with jax.set_mesh(mesh):
        given = jax.device_put(params, shardings), *jax.device_put((prompts, lengths), split)
        got = jax.jit(functools.partial(generate, wave=8), out_shardings=split)(*given)
    assert test_sharding.REMATERIALISED not in capfd.readouterr().err
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=2e-3)


def test_a_cache_of_another_kind():
    with pytest.raises(ValueError, match=r"rollout.cache must be one of \('full', 'int8'\), got 'fp4'"):
        rollout.generate(SHAPES["rotary"], WEIGHTS["rotary"], PROMPTS, LENGTHS, R, 0, cache="fp4")


def test_it_takes_less_memory():
    config = SHAPES["rotary"].replace(width=512, dtype="bfloat16")  # heads of 128
    sizes = {}
    for kind in stores.KINDS:
        shapes = jax.eval_shape(functools.partial(models.init_cache, config, 4, 100, kind))
        sizes[kind] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((shapes.keys, shapes.values)))
    assert sizes["int8"] / sizes["full"] == (128 + 4) / 256


def test_old_logprobs_come_from_the_forward_pass():
    """The ratio is 1 before the first update; what the grid changes is in the gap."""
    settings = tiny_ppo.settings()
    algorithm = tiny_ppo.algorithm(settings)._replace(cache="int8")
    assert ppo.samples_are_old(algorithm._replace(cache="full")) and not ppo.samples_are_old(algorithm)
    state, frozen = tiny_ppo.start(algorithm)
    batch = {"prompts": jnp.asarray(PROMPTS[:, :6].repeat(2, axis=0)[:8] % 24), "prompt_lengths": jnp.full(8, 5)}
    _, metrics = jax.jit(functools.partial(ppo.update, algorithm))(state, frozen, batch)
    assert metrics["policy/ratio_first"] <= 1e-5 and 1e-6 < metrics["rollout/logprob_gap"] < 0.1


# The distance of whole distributions ----------------------------------------------------------------------------------


def plain_gap(config, params, tokens, mask, temperature, allowed, kind):
    """A loop over sequences and tokens: decoding feeds one token at a time, scoring reads the whole sequence."""
    decode = jax.jit(functools.partial(models.extend, config))
    ready, found = models.sampling_params(config, params), []
    real = np.ones(config.vocab_size, bool) if allowed is None else allowed

    def probabilities(logits):
        y = np.where(real, np.asarray(logits, np.float64) / temperature, -np.inf)
        y = np.exp(y - y.max())
        return y / y.sum()

    for prompt, n, response, count in zip(PROMPTS, LENGTHS, tokens, mask.sum(axis=1), strict=True):
        sequence = np.concatenate([prompt[:n], response[:count]])
        whole = models.logits(config, params, np.pad(sequence, (0, Q + R - len(sequence)))[None])[0]
        past = models.init_cache(config, 1, Q + R, kind)
        for at, token in enumerate(sequence[:-1]):
            hidden, past = decode(ready, past, np.full((1, 1), token), np.full((1, 1), at), np.int32(at))
            if at >= n - 1:
                p = probabilities(models.project(config, params, hidden)[0, 0])
                found.append(np.abs(p - probabilities(whole[at])).sum() / 2)
    return max(found)


@pytest.mark.parametrize(
    ("name", "dtype", "kind", "temperature", "least", "most"),
    [
        ("grouped", "float32", "full", 0.7, 0.0, 2e-6),
        ("grouped", "float32", "int8", 0.7, 1e-4, 0.05),
        ("rotary", "bfloat16", "full", 1.0, 0.0, 0.05),  # so small a network may have no gap
    ],
)
def test_distribution_gap(name, dtype, kind, temperature, least, most):
    config, params = SHAPES[name].replace(dtype=dtype), WEIGHTS[name]
    allowed = np.arange(60) < 50 if kind == "int8" else None
    tokens, _, mask = jax.tree.map(np.asarray, sampled(name))
    gap = functools.partial(
        episodes.distribution_gap, config, row_length=20, temperature=temperature, allowed=allowed, cache=kind
    )
    got = float(jax.jit(gap)(params, Episodes(*map(jnp.asarray, (PROMPTS, LENGTHS, tokens, mask)))))
    expected = plain_gap(config, params, tokens, mask, temperature, allowed, kind)
    assert least <= got <= most, got
    # Packed rows and chunks of prompts take sums in another order, which may tip a number over in 8 and in 16 bits.
    np.testing.assert_allclose(got, expected, atol=2e-6 if most < 1e-5 else 0.01)


def test_distribution_gap_sees_another_policy(monkeypatch):
    """Where other weights sample than those that score: with a last norm of zeros all tokens are alike."""
    config, params = SHAPES["rotary"], WEIGHTS["rotary"]
    tokens, _, mask = sampled("rotary")
    given = Episodes(*map(jnp.asarray, (PROMPTS, LENGTHS, tokens, mask)))
    plain = models.sampling_params

    def others(config, params):
        return plain(config, params | {"final_norm": jax.tree.map(jnp.zeros_like, params["final_norm"])})

    monkeypatch.setattr(models, "sampling_params", others)
    assert float(episodes.distribution_gap(config, params, given, 20, 1.0, None, "full")) > 0.1
