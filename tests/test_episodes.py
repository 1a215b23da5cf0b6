"""Episodes in packed rows: placed as a plain loop places them, and worth the same as each episode by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_ppo
from tiny_ppo import EOS, POLICY, SCALAR, VOCAB

from instructgpt_jax import episodes as ep
from instructgpt_jax import models, rollout
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.training.state import count_nonempty

B, Q, R, T = 8, 6, 6, 14
TEMPERATURE = 0.7


def first_fit_decreasing(lengths, row_length):
    """The textbook loop: [(row, column, segment)] of each sequence."""
    rows, placed = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, used in enumerate(rows) if row_length - sum(used) >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
        placed[i] = (row, sum(rows[row]), len(rows[row]) + 1)
        rows[row].append(lengths[i])
    return [placed[i] for i in range(len(lengths))], len(rows)


@pytest.mark.parametrize("seed", range(4))
def test_placement_equals_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, 60)
    lengths[:3] = 32, 32, 1
    placed, used = first_fit_decreasing(lengths.tolist(), 32)
    got = np.stack(jax.jit(ep.first_fit_decreasing, static_argnums=1)(jnp.array(lengths), 32), axis=1)
    np.testing.assert_array_equal(got, placed)
    assert used < 45  # of 60: rows are shared


def make(prompt_lengths, response_lengths, seed=0, garbage=False) -> Episodes:
    """Random episodes of given lengths; with `garbage` the padding holds what no vocabulary has, else zeros."""
    rng = np.random.default_rng(seed)

    def tokens(lengths, width, noise):
        inside = np.arange(width) < np.asarray(lengths)[:, None]
        real = rng.integers(0, VOCAB, inside.shape)
        return jnp.array(np.where(inside, real, noise), jnp.int32), inside

    noise = [
        np.random.default_rng(99 + i).integers(-(10**6), 10**6, (B, w)) if garbage else 0 for i, w in enumerate((Q, R))
    ]
    prompts, _ = tokens(prompt_lengths, Q, noise[0])
    responses, mask = tokens(response_lengths, R, noise[1])
    return Episodes(prompts, jnp.array(prompt_lengths, jnp.int32), responses, jnp.array(mask))


MIXED = ([1, 6, 3, 2, 6, 1, 4, 5], [1, 6, 2, 6, 1, 1, 3, 6])  # a response that ends at once, some that never do
CASES = {
    "mixed": MIXED,
    "all end at once": ([1, 2, 3, 4, 5, 6, 1, 2], [1] * 8),
    "all as long as can be": ([6] * 8, [6] * 8),
}


NETWORKS = tiny_ppo.params(POLICY, 0, 20.0), tiny_ppo.params(SCALAR, 1, 20.0)


@functools.partial(jax.jit, static_argnums=1)
def packed_results(episodes, microbatch_rows):
    """Log-probabilities and values (B, R), scores (B,), and the packed rows."""
    policy, reward = NETWORKS
    packed = ep.pack(episodes, T, microbatch_rows)
    logprobs = ep.forward_episodes(lambda rows: ep.row_logprobs(POLICY, policy, rows, TEMPERATURE), episodes, packed)
    values = ep.forward_episodes(lambda rows: ep.row_scalars(SCALAR, reward, rows), episodes, packed)
    return logprobs, values, ep.scores(SCALAR, reward, episodes, packed), packed


@jax.jit
def unpacked(sequences):
    """Logits and scalars of whole sequences, one a row, from position 0."""
    policy, reward = NETWORKS
    positions = jnp.broadcast_to(jnp.arange(sequences.shape[1]), sequences.shape)
    return (
        models.logits(POLICY, policy, sequences, positions),
        models.scalar(SCALAR, reward, models.hidden(SCALAR, reward, sequences, positions, None)),
    )


def one_by_one(episodes):
    """The same from separate sequences, read out by plain loops."""
    prompts, lengths, responses, mask = map(np.asarray, episodes)
    sequences = np.zeros((B, Q + R), np.int32)
    for i, (q, r) in enumerate(zip(lengths, mask.sum(axis=1), strict=True)):
        sequences[i, : q + r] = [*prompts[i, :q], *responses[i, :r]]
    logits, scalars = (np.asarray(x, np.float64) for x in unpacked(sequences))
    logprobs, values, scores = np.zeros((B, R)), np.zeros((B, R)), np.zeros(B)
    for i, (q, r) in enumerate(zip(lengths, mask.sum(axis=1), strict=True)):
        for t in range(r):
            z = logits[i, q + t - 1] / TEMPERATURE
            logprobs[i, t] = z[sequences[i, q + t]] - np.log(np.sum(np.exp(z - z.max()))) - z.max()
            values[i, t] = scalars[i, q + t - 1]  # of the state before the token
        scores[i] = scalars[i, q + r - 1]
    return logprobs, values, scores


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("microbatch_rows", [1, 3])
def test_packed_equals_one_by_one(case, microbatch_rows):
    episodes = make(*CASES[case])
    *results, _ = packed_results(episodes, microbatch_rows)
    for got, expected in zip(results, one_by_one(episodes), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
        assert not np.asarray(got)[expected == 0].any()


@pytest.mark.parametrize("seed", range(3))
def test_padding_never_matters(seed):
    """Neither behind prompts nor behind responses, not even numbers that are no tokens: equal to the last bit."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, Q + 1, B), rng.integers(1, R + 1, B)
    clean, dirty = (packed_results(make(*lengths, seed, garbage), 3) for garbage in (False, True))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_padding_of_prompts_never_changes_a_sample():
    policy, _ = NETWORKS
    sample = jax.jit(lambda prompts, lengths: rollout.generate(POLICY, policy, prompts, lengths, R, 3, eos_id=EOS))
    clean, dirty = (make(*MIXED, garbage=garbage) for garbage in (False, True))
    clean, dirty = (sample(episodes.prompts, episodes.prompt_lengths) for episodes in (clean, dirty))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert np.isfinite(clean.logprobs).all() and np.asarray(clean.logprobs).any()


def test_log_probabilities_over_some_ids_with_a_bias_of_the_head():
    config, draw = POLICY.replace(head_bias=True), jax.random.normal
    params = models.init(config, jax.random.key(3))
    params = jax.tree.map(lambda x: x + 0.3 * draw(jax.random.key(x.size), x.shape), params)
    allowed, episodes = np.arange(VOCAB) % 3 > 0, make(*MIXED)
    packed = ep.pack(episodes, T, 8)
    head = lambda rows: ep.row_logprobs(config, params, rows, TEMPERATURE, allowed=allowed)  # noqa: E731
    found = np.asarray(jax.jit(lambda packed: ep.forward_episodes(head, episodes, packed))(packed))
    asked = np.asarray(episodes.response_mask) & allowed[np.asarray(episodes.responses)]
    for i, t in [(i, t) for i, t in zip(*np.nonzero(asked), strict=True)][:6]:
        before = jnp.concatenate([episodes.prompts[i, : episodes.prompt_lengths[i]], episodes.responses[i, :t]])[None]
        logits = np.where(allowed, np.asarray(models.logits(config, params, before))[0, -1] / TEMPERATURE, -np.inf)
        exact = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        np.testing.assert_allclose(found[i, t], exact[int(episodes.responses[i, t])], atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_rows_hold_every_token_once(case):
    """Read back from the rows: tokens, positions, targets and segments of each episode; nothing else is there."""
    episodes = make(*CASES[case], garbage=True)
    packed = jax.tree.map(np.asarray, packed_results(episodes, 3)[-1])
    prompts, lengths, responses, mask = map(np.asarray, episodes)
    rows = {name: x.reshape(-1, T) for name, x in packed.rows.items()}
    seen = np.zeros_like(rows["tokens"])
    for i, (q, r) in enumerate(zip(lengths, mask.sum(axis=1), strict=True)):
        where = packed.row[i], slice(packed.column[i], packed.column[i] + q + r)
        np.testing.assert_array_equal(rows["tokens"][where], [*prompts[i, :q], *responses[i, :r]])
        np.testing.assert_array_equal(rows["positions"][where], np.arange(q + r))
        assert len(set(rows["segments"][where])) == 1 and rows["segments"][where][0] > 0
        np.testing.assert_array_equal(rows["predicts"][where], [0] * (q - 1) + [1] * r + [0])
        np.testing.assert_array_equal(rows["targets"][where][q - 1 : -1], responses[i, :r])
        seen[where] += 1
    assert seen.max() == 1
    for name, x in rows.items():
        assert not x[seen == 0].any(), name
    used = np.flatnonzero(seen.any(axis=1))
    np.testing.assert_array_equal(used, np.arange(len(used)))  # rows with tokens come first


def test_microbatches_are_as_many_as_the_rows_need():
    """8 episodes of 12 tokens fill a row of 14 each; 8 of 2 to 7 tokens share rows."""
    full, short = (packed_results(make(*CASES[case]), 3)[-1] for case in ("all as long as can be", "all end at once"))
    assert full.tokens.shape == short.tokens.shape == (3, 3, T)  # room for the worst case: 8 rows
    assert int(count_nonempty(full.segments)) == 3
    lengths = [q + r for q, r in zip(*CASES["all end at once"], strict=True)]
    _, rows = first_fit_decreasing(lengths, T)
    assert int(count_nonempty(short.segments)) == -(-rows // 3) == 1
    assert ep.pack(make(*MIXED), T, 100).tokens.shape == (1, B, T)  # never more rows than episodes


def test_microbatches_behind_the_last_are_not_run():
    """The network is called once where one microbatch of the three holds tokens."""
    calls = []

    def head(rows):
        jax.debug.callback(lambda tokens: calls.append(int((tokens > 0).sum())), rows["segments"])
        return rows["segments"].astype(jnp.float32)

    episodes = make(*CASES["all end at once"])
    packed = ep.pack(episodes, T, 3)
    jax.block_until_ready(ep.forward_episodes(head, episodes, packed))
    jax.effects_barrier()
    assert len(calls) == 1 and calls[0] == sum(q + r for q, r in zip(*CASES["all end at once"], strict=True))


def test_unpack_and_its_gradient():
    """unpack is a gather: each (row, column) that predicts a response token gets its cotangent, all others 0."""
    episodes = make(*MIXED)
    packed = packed_results(episodes, 3)[-1]
    M, b, _ = packed.tokens.shape
    values = jnp.arange(1.0, M * b * T + 1).reshape(M, b, T)
    weights = jnp.array(np.random.default_rng(0).normal(size=(B, R)), jnp.float32)
    expected, by_hand = np.zeros((B, R)), np.zeros((M * b, T))
    for i, (q, r) in enumerate(zip(*MIXED, strict=True)):
        for t in range(r):
            row, column = int(packed.row[i]), int(packed.column[i]) + q - 1 + t
            expected[i, t] = np.asarray(values).reshape(-1, T)[row, column]
            by_hand[row, column] += weights[i, t]
    whole, mask = ep.unpack(packed, values, episodes)
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(mask, episodes.response_mask)
    parts = [ep.unpack(packed, values[m : m + 1], episodes, m) for m in range(M)]
    np.testing.assert_array_equal(sum(part for part, _ in parts), expected)
    np.testing.assert_array_equal(sum(mask.astype(int) for _, mask in parts), episodes.response_mask)
    gradient = jax.grad(lambda v: (weights * ep.unpack(packed, v, episodes)[0]).sum())(values)
    np.testing.assert_allclose(np.asarray(gradient).reshape(-1, T), by_hand, rtol=1e-6)


def test_rows_too_short_are_refused():
    with pytest.raises(ValueError, match=r"row_length must hold a prompt and a response, 6 \+ 6 tokens, got 11"):
        ep.pack(make(*MIXED), 11, 2)
