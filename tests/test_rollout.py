"""Sampling: its tokens, their log-probabilities, where it stops, and what it must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from hypothesis import given, settings
from hypothesis import strategies as st

from instructgpt_jax import models, rollout
from instructgpt_jax.models import ModelConfig, attention, flash

CONFIG = ModelConfig(
    vocab_size=300, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=32, max_length=48, windows=(0, 5)
)
PARAMS = reference_model.random_params(CONFIG, models.init)
B, Q, R = 8, 9, 7
PROMPTS = np.random.default_rng(0).integers(0, 300, (B, Q)).astype(np.int32)
LENGTHS = np.array([9, 1, 4, 7, 2, 9, 3, 5], np.int32)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p", "eos_id", "wave"))
def generate(prompts, lengths, seed=0, temperature=1.0, eos_id=None, params=PARAMS, **options):
    return rollout.generate(CONFIG, params, prompts, lengths, R, seed, temperature, eos_id=eos_id, **options)


@functools.cache
def plain():
    return jax.tree.map(np.asarray, generate(PROMPTS, LENGTHS))


@jax.jit
def forward(tokens):
    """(B, T, V) logits of whole rows."""
    return models.logits(CONFIG, PARAMS, tokens)


def responses_in_rows(responses):
    """Each prompt with its response after it, in rows of one length."""
    rows = np.zeros((B, Q + R), np.int32)
    for row, prompt, n, response in zip(rows, PROMPTS, LENGTHS, responses, strict=True):
        row[: n + R] = np.concatenate([prompt[:n], response])
    return rows


def logits_of(responses):
    """(B, R, V) float64: what the full forward pass says before each response token."""
    y = np.asarray(forward(responses_in_rows(responses)), np.float64)
    return np.stack([y[b, n - 1 : n - 1 + R] for b, n in enumerate(LENGTHS)])


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_forward_passes(temperature):
    tokens, logprobs, mask = plain() if temperature == 1 else generate(PROMPTS, LENGTHS, temperature=temperature)
    assert tokens.shape == (B, R) and tokens.dtype == jnp.int32 and mask.all()
    expected = log_softmax(logits_of(np.asarray(tokens)) / temperature)
    expected = np.take_along_axis(expected, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_greedy_is_argmax():
    tokens, logprobs, _ = jax.tree.map(np.asarray, generate(PROMPTS, LENGTHS, temperature=0))
    y = logits_of(tokens)
    np.testing.assert_array_equal(tokens, y.argmax(axis=-1))
    np.testing.assert_allclose(logprobs, log_softmax(y).max(axis=-1), atol=1e-5)


def test_tokens_do_not_depend_on_the_wave():
    for wave in (4, 2):
        other = generate(PROMPTS, LENGTHS, wave=wave)
        np.testing.assert_array_equal(other.tokens, plain().tokens)
        np.testing.assert_allclose(other.logprobs, plain().logprobs, atol=1e-5)


def test_tokens_depend_on_seed_iteration_and_episode_alone():
    def tokens(seed=0, iteration=0, shift=0):
        episodes = np.arange(B) + shift
        return np.asarray(generate(PROMPTS, LENGTHS, seed, iteration=iteration, episodes=episodes).tokens)

    first = tokens()
    np.testing.assert_array_equal(first, plain().tokens)
    for other in (tokens(seed=1), tokens(iteration=1), tokens(shift=B)):
        assert (other != first).any(axis=1).all()
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])  # another slot, the same episode
    moved = generate(PROMPTS[order], LENGTHS[order], 0, iteration=0, episodes=order)
    np.testing.assert_array_equal(moved.tokens, first[order])
    assert len({tuple(row) for row in np.asarray(generate(PROMPTS[[0] * B], LENGTHS[[0] * B]).tokens)}) == B


def test_contents_of_prompt_padding_never_matter():
    rng = np.random.default_rng(0)
    for low, high in ((0, 300), (-(2**31), 2**31 - 1)):
        garbage = np.where(np.arange(Q) < LENGTHS[:, None], PROMPTS, rng.integers(low, high, PROMPTS.shape))
        other = generate(garbage.astype(np.int32), LENGTHS)
        np.testing.assert_array_equal(other.tokens, plain().tokens)
        np.testing.assert_array_equal(other.logprobs, plain().logprobs)


def test_prompts_longer_than_a_chunk(monkeypatch):
    """Prompts of one to three chunks, the longest not a multiple."""
    monkeypatch.setattr(rollout, "PREFILL_CHUNK", 4)
    other = jax.jit(lambda p, n: rollout.generate(CONFIG, PARAMS, p, n, R, 0))(PROMPTS, LENGTHS)
    np.testing.assert_array_equal(other.tokens, plain().tokens)
    np.testing.assert_allclose(other.logprobs, plain().logprobs, atol=1e-5)


def test_layers_in_one_scan(monkeypatch):
    """As for a TPU; windows are of the second layer alone."""
    monkeypatch.setattr(flash, "platform", lambda: "tpu")
    other = jax.jit(lambda p, n: rollout.generate(CONFIG, PARAMS, p, n, R, 0, wave=4))(PROMPTS, LENGTHS)
    np.testing.assert_array_equal(other.tokens, plain().tokens)
    np.testing.assert_allclose(other.logprobs, plain().logprobs, atol=1e-5)


@pytest.fixture
def counted(monkeypatch):
    """A jitted generate with a list that grows by one each time the network runs."""
    calls, extend = [], models.extend

    def counting(*args):
        jax.debug.callback(lambda: calls.append(1))
        return extend(*args)

    monkeypatch.setattr(models, "extend", counting)

    @jax.jit
    def run(prompts, lengths, eos_id, params=PARAMS):
        return rollout.generate(CONFIG, params, prompts, lengths, R, 0, eos_id=eos_id)

    def generate(*args):
        calls.clear()
        result = jax.tree.map(np.asarray, run(*args))
        jax.effects_barrier()
        return result, len(calls)

    return generate


def test_early_exit(counted):
    """The network runs once for the prompts (one chunk) and once for each token, until all have ended."""
    unended, calls = counted(PROMPTS, LENGTHS, -1)
    np.testing.assert_array_equal(unended.tokens, plain().tokens)
    assert calls == 1 + R and unended.mask.all()

    eos = int(plain().tokens[1, 0])  # episode 1 ends with its first token
    ended, calls = counted(PROMPTS, LENGTHS, eos)
    reach = [list(row).index(eos) + 1 if eos in row else R for row in plain().tokens]
    assert reach[1] == 1 and calls == 1 + max(reach)
    np.testing.assert_array_equal(ended.mask, np.arange(R) < np.array(reach)[:, None])
    np.testing.assert_array_equal(ended.tokens, np.where(ended.mask, plain().tokens, 0))
    np.testing.assert_allclose(ended.logprobs, np.where(ended.mask, plain().logprobs, 0), atol=1e-6)

    # A head that always says 5: everyone ends at the first token.
    certain = dict(PARAMS, final_norm={"scale": jnp.zeros(16), "bias": PARAMS["embed"]["tokens"][5] * 1e4})
    result, calls = counted(PROMPTS, LENGTHS, 5, certain)
    assert calls == 2 and result.mask.sum() == B and (result.tokens[:, 0] == 5).all()


# What slots, tray and reads must not change. All is as small as it can be, so that slots are filled many times, the
# clock comes to the end of the columns, reads have many sizes and the last answers go on in fewer slots.

SMALL = dict(vocab_size=16, num_layers=2, width=16, num_heads=4, mlp_width=32, max_length=24)
SHAPES = {
    "learned": ModelConfig(**SMALL, num_kv_heads=2, windows=(0, 5)),
    "rotary": ModelConfig(**SMALL, num_kv_heads=1, windows=(4, 0), positions="rotary"),
}
WEIGHTS = {name: reference_model.random_params(config, models.init) for name, config in SHAPES.items()}
COUNT = 10  # prompts


@functools.partial(jax.jit, static_argnums=(0, 4))
def one_by_one(name, prompts, lengths, seed, answers):
    """(B, R) tokens and log-probabilities: for every token a forward pass of the whole row, no cache and no end."""
    config, params, count = SHAPES[name], WEIGHTS[name], len(prompts) * answers
    rows, ends = (jnp.repeat(x, answers, axis=0) for x in (jnp.pad(prompts, ((0, 0), (0, R))), lengths))
    iteration = jax.random.fold_in(jax.random.key(seed), 0)

    def token(rows, t):
        at = ends + t
        logits = models.logits(config, params, rows)[jnp.arange(count), at - 1]
        keys = [jax.random.fold_in(jax.random.fold_in(iteration, e), at[e]) for e in range(count)]
        tokens, logprobs = rollout.sample(logits, jnp.stack(keys), 1.0)
        return rows.at[jnp.arange(count), at].set(tokens), (tokens, logprobs)

    return jax.tree.map(jnp.transpose, jax.lax.scan(token, rows, jnp.arange(R))[1])


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def with_slots(name, prompts, lengths, seed, ends, wave, answers):
    given = SHAPES[name], WEIGHTS[name], prompts, lengths, R, seed
    return rollout.generate(*given, eos_id=tuple(ends), wave=wave, answers=answers)


def check_against_one_by_one(name, wave, answers, lengths, seed, ends):
    prompts = np.random.default_rng(seed).integers(0, 16, (COUNT, Q), dtype=np.int32)
    lengths = np.array(lengths, np.int32)
    tokens, logprobs = jax.tree.map(np.asarray, one_by_one(name, prompts, lengths, seed, answers))
    got = jax.tree.map(np.asarray, with_slots(name, prompts, lengths, seed, np.array(ends), wave, answers))
    last = np.where(np.isin(tokens, ends), np.arange(R), R - 1).min(axis=1)
    mask = np.arange(R) <= last[:, None]
    np.testing.assert_array_equal(got.mask, mask)
    np.testing.assert_array_equal(got.tokens, np.where(mask, tokens, 0))
    np.testing.assert_allclose(got.logprobs, np.where(mask, logprobs, 0), atol=1e-5)


@pytest.fixture
def crowded(monkeypatch):
    small = {"PREFILL_CHUNK": 4, "TRAY": 2, "TAIL": 2, "LONG": 1}
    for module, sizes in ((rollout, small), (attention, {"FEWEST": 4, "ALIGNED": 4})):
        for key, value in sizes.items():
            monkeypatch.setattr(module, key, value)
    with_slots.clear_cache()


@pytest.mark.parametrize(
    ("name", "wave", "answers"), [("learned", 4, 1), ("rotary", 1, 1), ("rotary", 5, 3), ("learned", None, 1)]
)
def test_slots_change_nothing(crowded, name, wave, answers):
    """More prompts than slots and as many; early ends, none, and all at once (every token ends)."""
    length = st.integers(1, Q)
    ids = st.lists(st.integers(-1, 15), min_size=16, max_size=16)

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(st.lists(length, min_size=COUNT, max_size=COUNT), st.integers(0, 2**31 - 1), ids, st.integers(0, 16))
    def check(lengths, seed, ends, kept):
        check_against_one_by_one(name, wave, answers, lengths, seed, (ends[: kept // 2] + [-1] * 16)[:16])

    check()
    for lengths in ([1] * COUNT, [Q] * COUNT, [Q, 1] * (COUNT // 2)):
        check_against_one_by_one(name, wave, answers, lengths, 3, [-1] * 16)  # none ends
    check_against_one_by_one(name, wave, answers, [Q, 1] * (COUNT // 2), 3, list(range(16)))  # one token each


def support(logits, top_k, top_p):
    """Token ids that may be drawn from one distribution, by a loop."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weights = np.exp([logits[i] - logits[order[0]] for i in order])
    weights /= weights.sum()
    kept, total = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if total >= top_p:
            break
        kept.append(token)
        total += weight
    return set(kept)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (0, 0.6), (20, 0.8), (0, 0.01)])
def test_supports_of_truncated_sampling(top_k, top_p):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 300)) * 2
    keys = jax.random.split(jax.random.key(0), (3000, 6))
    draw = jax.jit(jax.vmap(lambda keys: rollout.sample(jnp.float32(logits), keys, 1.0, top_k, top_p)))
    tokens, logprobs = jax.tree.map(np.asarray, draw(keys))
    full = log_softmax(logits)
    for row in range(6):
        allowed = support(logits[row], top_k, top_p)
        seen = set(tokens[:, row].tolist())
        assert seen <= allowed
        mass = sum(np.exp(full[row, i]) for i in allowed)
        assert {i for i in allowed if np.exp(full[row, i]) / mass > 0.005} <= seen
        np.testing.assert_allclose(logprobs[:, row], full[row, tokens[:, row]], atol=1e-5)  # not of the truncated one


@pytest.mark.parametrize("vocab", [40, 300])
def test_frequencies_match_probabilities(vocab):
    """Pearson's chi-square within its mean plus five standard deviations; 300 tokens are three blocks of the draw."""
    logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32) * 1.5
    n, temperature = 200_000, 0.8
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(lambda keys: rollout.sample(jnp.broadcast_to(logits, (len(keys), vocab)), keys, temperature)[0])
    counts = np.bincount(np.concatenate([draw(part) for part in np.split(keys, 10)]), minlength=vocab)
    expected = n * np.exp(log_softmax(logits.astype(np.float64) / temperature))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (vocab - 1)) < 5 * np.sqrt(2 * (vocab - 1))


ALLOWED = np.isin(np.arange(300), [3, 4, 5, *range(40, 100)])  # two of the three blocks of the draw are empty


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_k": 80}, {"top_k": 5}, {"top_p": 0.7}], ids=str
)
def test_only_allowed_ids_are_sampled(options):
    """Their log-probabilities are of the softmax over these."""
    run = jax.jit(lambda p, n: rollout.generate(CONFIG, PARAMS, p, n, R, 0, allowed=ALLOWED, **options))
    tokens, logprobs, mask = jax.tree.map(np.asarray, run(PROMPTS, LENGTHS))
    assert mask.all() and ALLOWED[tokens].all() and not ALLOWED[np.asarray(plain().tokens)].all()
    masked = np.where(ALLOWED, logits_of(tokens) / (options.get("temperature", 1.0) or 1.0), -np.inf)
    expected = np.take_along_axis(log_softmax(masked), tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_allowed_frequencies_match_probabilities():
    logits = np.random.default_rng(5).standard_normal(300).astype(np.float32) * 1.5
    n, masked = 100_000, np.where(ALLOWED, logits, -np.inf).astype(np.float32)
    draw = jax.jit(lambda keys: rollout.sample(jnp.broadcast_to(masked, (len(keys), 300)), keys, 1.0)[0])
    counts = np.bincount(np.concatenate([draw(part) for part in np.split(jax.random.split(jax.random.key(0), n), 5)]),
                         minlength=300)  # fmt: skip
    assert not counts[~ALLOWED].any()
    expected = n * np.exp(log_softmax(masked[ALLOWED].astype(np.float64)))
    chi_square = ((counts[ALLOWED] - expected) ** 2 / expected).sum()
    freedom = ALLOWED.sum() - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 40}, "context of 48, got 9 \\+ 40"),
        ({"max_new_tokens": 40}, "at most 39 fit"),
        ({"answers": 0}, "answers must be at least 1, got 0"),
        ({"wave": 0}, "rollout.wave must be at least 1, got 0"),
        ({"temperature": -1.0}, "got -1.0, 0 and 1.0"),
        ({"top_k": -1}, "got 1.0, -1 and 1.0"),
        ({"top_p": 0.0}, "got 1.0, 0 and 0.0"),
    ],
    ids=str,
)
def test_bad_requests(options, words):
    with pytest.raises(ValueError, match=words):
        rollout.generate(CONFIG, PARAMS, PROMPTS, LENGTHS, **{"max_new_tokens": R, "seed": 0} | options)
