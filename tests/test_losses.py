"""The vocabulary losses against full logits, and the ranking loss against a double loop over pairs.

Covered from the published implementation details of RLHF: the ranking loss over all pairs of a prompt, ties dropped;
logits divided by the temperature in every log-probability; entropy logged and never optimised.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax import losses
from instructgpt_jax.sharding import make_mesh

B, T, D, V, PADDED = 4, 7, 12, 29, 32
VOCABULARY = dict(vocab_size=V, chunk=5)  # 28 tokens: six chunks, the last not full


def example(dtype=jnp.float32, seed=0):
    """hidden (B, T, D), unembedding (PADDED, D) whose padding would win every softmax, bias, targets, weights."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D))
    unembedding = rng.normal(size=(PADDED, D))
    unembedding[V:] *= 100.0
    bias = rng.normal(size=PADDED)
    targets = rng.integers(0, V, size=(B, T))
    weights = rng.integers(0, 3, size=(B, T))
    return (
        jnp.asarray(hidden, dtype),
        jnp.asarray(unembedding, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.int32),
    )


def naive_logprobs(hidden, unembedding, bias, targets, temperature=1.0):
    logits = (hidden.astype(jnp.float32) @ unembedding[:V].T + bias[:V]) / temperature
    distribution = jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(distribution, targets[..., None], axis=-1)[..., 0]
    return logprobs, -(jnp.exp(distribution) * distribution).sum(-1)


def assert_trees_close(actual, expected, rtol=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (np.abs(b).max() + 1e-30))


def test_token_logprobs_by_hand():
    """Logits (0, ln 2, ln 5) at temperature 1/2 have odds 1 : 4 : 25."""
    hidden = jnp.ones((1, 2, 1))
    unembedding = jnp.log(jnp.array([[1.0], [2.0], [5.0], [1e9]]))
    logprobs, entropy = losses.token_logprobs(
        hidden, unembedding, jnp.array([[1, 2]]), vocab_size=3, temperature=0.5, with_entropy=True
    )
    np.testing.assert_allclose(logprobs, np.log([[4 / 30, 25 / 30]]), rtol=1e-6)
    expected = -sum(p * math.log(p) for p in (1 / 30, 4 / 30, 25 / 30))
    np.testing.assert_allclose(entropy, np.full((1, 2), expected), rtol=1e-6)


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 0.7), (5, 1.0), (5, 0.7), (28, 0.7), (1000, 1.0)])
def test_token_logprobs_and_gradients(chunk, temperature):
    hidden, unembedding, bias, targets, _ = example()
    upstream = jnp.asarray(np.random.default_rng(1).normal(size=(B, T)), jnp.float32)

    def chunked(hidden, unembedding, bias):
        logprobs, entropy = losses.token_logprobs(
            hidden,
            unembedding,
            targets,
            vocab_size=V,
            bias=bias,
            temperature=temperature,
            chunk=chunk,
            with_entropy=True,
        )
        return (logprobs * upstream).sum() + entropy.sum(), (logprobs, entropy)

    def naive(hidden, unembedding, bias):
        logprobs, entropy = naive_logprobs(hidden, unembedding, bias, targets, temperature)
        return (logprobs * upstream).sum() + jax.lax.stop_gradient(entropy).sum(), (logprobs, entropy)

    results = [
        jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(hidden, unembedding, bias) for f in (chunked, naive)
    ]
    assert_trees_close(*results)
    assert not np.asarray(results[0][1][1][V:]).any()  # the padding of the vocabulary learns nothing


@pytest.mark.parametrize(("chunk", "with_bias"), [(1, True), (5, True), (5, False), (28, True), (1000, False)])
def test_cross_entropy_and_gradients(chunk, with_bias):
    hidden, unembedding, bias, targets, weights = example()
    bias = bias if with_bias else None

    def chunked(hidden, unembedding, bias):
        return 3 * losses.cross_entropy(hidden, unembedding, targets, weights, vocab_size=V, bias=bias, chunk=chunk)

    def naive(hidden, unembedding, bias):
        bias = jnp.zeros(PADDED) if bias is None else bias
        return -3 * (naive_logprobs(hidden, unembedding, bias, targets)[0] * weights).sum()

    arguments = (0, 1, 2) if with_bias else (0, 1)
    actual, expected = (jax.value_and_grad(f, arguments)(hidden, unembedding, bias) for f in (chunked, naive))
    assert_trees_close(actual, expected)
    np.testing.assert_allclose(chunked(hidden, unembedding, bias), expected[0], rtol=1e-6)  # the form without gradient


def test_unwanted_tokens_never_matter():
    """NaN in the hidden states, and wild targets, where mask or weight is 0: no result and no gradient changes."""
    hidden, unembedding, bias, targets, weights = example()
    unwanted = weights == 0
    dirty = jnp.where(unwanted[..., None], jnp.nan, hidden)
    wild = jnp.where(unwanted, -12345, targets)

    def both(hidden, unembedding, bias, targets):
        logprobs, entropy = losses.token_logprobs(
            hidden, unembedding, targets, bias=bias, mask=weights, with_entropy=True, **VOCABULARY
        )
        loss = losses.cross_entropy(hidden, unembedding, targets, weights, bias=bias, **VOCABULARY)
        return loss + logprobs.sum(), (logprobs, entropy)

    run = jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True)
    clean, result = run(hidden, unembedding, bias, targets), run(dirty, unembedding, bias, wild)
    jax.tree.map(np.testing.assert_array_equal, result, clean)
    (_, (logprobs, entropy)), (to_hidden, *_) = result
    for x in (logprobs, entropy, to_hidden):
        assert not np.asarray(x)[np.asarray(unwanted)].any()
    wanted = ~np.asarray(unwanted)
    expected = naive_logprobs(hidden, unembedding, bias, targets)[0]
    np.testing.assert_allclose(np.asarray(logprobs)[wanted], np.asarray(expected)[wanted], rtol=2e-5)


@pytest.mark.parametrize("chunk", [2, 5, 1000])
def test_a_limit_on_the_wanted_tokens_changes_no_number_and_saves_room(chunk):
    hidden, unembedding, _, targets, weights = example()
    mask = np.zeros((B, T), np.int32)
    mask[0, 2:5] = mask[2, 1:4] = 1

    def run(limit):
        def total(hidden, unembedding):
            options = dict(vocab_size=V, mask=jnp.asarray(mask), chunk=chunk, limit=limit, with_entropy=True)
            logprobs, entropy = losses.token_logprobs(hidden, unembedding, targets, **options)
            return (logprobs * weights).sum(), (logprobs, entropy)

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))

    assert_trees_close(run(6)(hidden, unembedding), run(None)(hidden, unembedding))
    if chunk == 1000:
        assert f"f32[1,6,{PADDED}]" in run(6).lower(hidden, unembedding).as_text(dialect="hlo")
        assert f"f32[1,{B * T},{PADDED}]" not in run(6).lower(hidden, unembedding).as_text(dialect="hlo")


def test_no_wanted_token():
    hidden, unembedding, _, targets, weights = example()
    loss, gradients = jax.value_and_grad(
        lambda h, u: losses.cross_entropy(h, u, targets, weights * 0, **VOCABULARY), argnums=(0, 1)
    )(hidden, unembedding)
    assert loss == 0 and not any(np.asarray(g).any() for g in gradients)


def test_bfloat16_accumulates_in_float32():
    """Products of bfloat16 numbers in float32: equal to exact arithmetic on the rounded inputs, in float32 throughout.

    The gradient of the unembedding over 4,096 equal tokens is a sum that would stall if it were kept in bfloat16.
    """
    hidden, unembedding, _, targets, _ = example(jnp.bfloat16)
    rounded = unembedding.astype(jnp.bfloat16).astype(jnp.float32)
    logprobs = losses.token_logprobs(hidden, unembedding, targets, **VOCABULARY)
    expected = naive_logprobs(hidden.astype(jnp.float32), rounded, jnp.zeros(PADDED), targets)[0]
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-5)

    many = jnp.ones((1, 4096, D), jnp.bfloat16)
    zeros = jnp.zeros((PADDED, D))  # uniform: every token pulls its target up by 1 - 1/V and the others down by 1/V
    targets = jnp.zeros((1, 4096), jnp.int32)
    gradient = jax.grad(lambda u: losses.token_logprobs(many, u, targets, vocab_size=V, chunk=64).sum())(zeros)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient[0], np.full(D, 4096 * (1 - 1 / V)), rtol=4e-3)


def test_vocab_size_must_fit():
    hidden, unembedding, _, targets, _ = example()
    with pytest.raises(ValueError, match=r"vocab_size must be in 1\.\.32.*got 33"):
        losses.token_logprobs(hidden, unembedding, targets, vocab_size=33)


def test_chunks_by_the_size_of_the_vocabulary(monkeypatch):
    """1 GiB of float32 logits, not under 512 tokens and not over 8,192; 512 where more gains nothing."""
    sizes = [100, 32_000, 50_304, 151_936, 2**19, 10**6]
    assert [losses.chunk_of(size, "NVIDIA H200") for size in sizes] == [8192, 8192, 5336, 1766, 512, 512]
    assert {losses.chunk_of(size, kind) for size in sizes for kind in ("cpu", "TPU v5", "TPU v5 lite")} == {512}
    hidden, unembedding, _, targets, weights = example()
    asked = []
    monkeypatch.setattr(losses, "chunk_of", lambda *given: asked.append(given) or 5)
    for chunk in (5, None):
        options = dict(vocab_size=V, chunk=chunk)
        several = (
            lambda h, o=options: losses.token_logprobs(h, unembedding, targets, **o),
            lambda h, o=options: losses.cross_entropy(h, unembedding, targets, weights, **o),
        )
        asked += [str(jax.make_jaxpr(one)(hidden)) for one in several]
    said = [x for x in asked if isinstance(x, tuple)]
    assert said == [(PADDED, "cpu")] * 2
    texts = [x for x in asked if isinstance(x, str)]
    assert len(texts) == 4 and texts[:2] == texts[2:]


def test_full_logits_never_exist():
    """No array of the compiled programs holds as many numbers as (B, T, V)."""
    rows, columns, width, vocabulary = 4, 64, 16, 1000
    shapes = (
        jax.ShapeDtypeStruct((rows, columns, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
    )
    targets = jnp.zeros((rows, columns), jnp.int32)
    full = rows * columns * vocabulary

    def largest(f):
        text = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(*shapes).compile().as_text()
        sizes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
        return max(math.prod(map(int, size.split(","))) for size in sizes)

    keys = dict(vocab_size=vocabulary, chunk=32)
    assert (
        largest(lambda h, u: naive_logprobs_full(h, u, targets)) >= full
    )  # the test sees such an array when there is one
    assert largest(lambda h, u: losses.token_logprobs(h, u, targets, **keys).sum()) <= full // 8
    assert largest(lambda h, u: losses.cross_entropy(h, u, targets, targets + 1, **keys)) <= full // 8


def naive_logprobs_full(hidden, unembedding, targets):
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ unembedding.T), targets[..., None], axis=-1).sum()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_eight_devices_equal_one(shape):
    """Rows over data × fsdp, the unembedding over tensor × fsdp: the same numbers, little moves between devices."""
    rng = np.random.default_rng(0)
    rows = 8
    hidden = jnp.asarray(rng.normal(size=(rows, T, D)), jnp.float32)
    _, unembedding, bias, _, _ = example()
    targets = jnp.asarray(rng.integers(0, V, size=(rows, T)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, size=(rows, T)), jnp.int32).at[3].set(0)

    def both(hidden, unembedding, bias, targets, weights):
        logprobs, entropy = losses.token_logprobs(
            hidden,
            unembedding,
            targets,
            bias=bias,
            mask=weights,
            temperature=0.7,
            with_entropy=True,
            vocab_size=V,
            chunk=3,
        )
        loss = losses.cross_entropy(hidden, unembedding, targets, weights, bias=bias, vocab_size=V, chunk=3)
        return loss + jnp.sin(logprobs).sum(), (logprobs, entropy)

    run = jax.value_and_grad(both, argnums=(0, 1, 2), has_aux=True)
    arguments = (hidden, unembedding, bias, targets, weights)
    expected = jax.jit(run)(*arguments)

    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    batch = P(("data", "fsdp"))
    specs = (batch, P("tensor", "fsdp"), P("tensor"), batch, batch)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
        compiled = jax.jit(run).lower(*placed).compile()
        actual = compiled(*placed)
    assert_trees_close(actual, expected)
    assert actual[1][1].sharding.is_equivalent_to(placed[1].sharding, 2)  # gradient laid out as the parameter
    # Between devices, the loop passes only sums over the vocabulary's shards, each of the size of a chunk of tokens:
    # no row, and nothing of the size of the unembedding, which is gathered once and whose gradient is summed once.
    in_loop = [line for line in compiled.as_text().splitlines() if re.search(COLLECTIVE, line) and "while/body" in line]
    for line in in_loop:
        result, kind = re.search(COLLECTIVE, line).groups()
        sizes = [math.prod(map(int, size.split(","))) for size in re.findall(r"\[([\d,]+)\]", result)]
        assert kind == "all-reduce" and max(sizes, default=1) <= 3 * D, line
    assert bool(in_loop) == (shape[2] > 1)


def test_every_shard_runs_its_own_chunks_once():
    """Where every token is wanted on every shard, a chunk too many would count its tokens twice."""
    hidden, unembedding, bias, targets, _ = example()
    weights = jnp.ones((B, T))
    expected = -naive_logprobs(hidden, unembedding, bias, targets)[0].sum()
    with jax.set_mesh(make_mesh({"data": 4, "fsdp": 1, "tensor": 2})):
        loss = jax.jit(functools.partial(losses.cross_entropy, vocab_size=V, chunk=3))
        np.testing.assert_allclose(loss(hidden, unembedding, targets, weights, bias=bias), expected, rtol=1e-5)


def test_rows_that_the_mesh_does_not_divide():
    hidden, unembedding, _, targets, weights = (x[:3] if x.shape[0] == B else x for x in example())
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="4 shards.*got 3"):
        losses.cross_entropy(hidden, unembedding, targets, weights, **VOCABULARY)


COLLECTIVE = r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\("


def python_ranking_loss(scores, ranks):
    """Eq. 1 by two loops over the pairs of each prompt; also pairs and correct pairs."""
    means, pairs, correct = [], 0, 0
    for score, rank in zip(np.asarray(scores, np.float64), np.asarray(ranks), strict=True):
        terms = []
        for i in range(len(rank)):
            for j in range(len(rank)):
                if rank[i] and rank[j] and rank[i] < rank[j]:
                    terms.append(math.log1p(math.exp(-(score[i] - score[j]))))
                    correct += score[i] > score[j]
        pairs += len(terms)
        if terms:
            means.append(sum(terms) / len(terms))
    return (sum(means) / len(means) if means else 0.0), len(means), pairs, correct


def random_ranking(seed, prompts=6, k=9):
    rng = np.random.default_rng(seed)
    ranks = rng.integers(1, 5, size=(prompts, k)) * (rng.random((prompts, k)) < 0.8)
    return rng.normal(size=(prompts, k)) * 2, ranks


def test_ranking_loss_by_hand():
    """Prompt 1: A > B = C, scores 2, 0, 3: pairs A-B (margin 2, right) and A-C (-1, wrong). Prompt 2: a tie, left out.
    Prompt 3: two completions, margin 0: log 2, and not right."""
    scores = jnp.array([[2.0, 0.0, 3.0], [1.0, 5.0, 0.0], [4.0, 4.0, 9.0]])
    ranks = jnp.array([[1, 2, 2], [1, 1, 0], [2, 1, 0]])
    loss, aux = losses.ranking_loss(scores, ranks)
    first = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(1.0))) / 2
    np.testing.assert_allclose(loss, (first + math.log(2.0)) / 2, rtol=1e-6)
    assert {k: float(v) for k, v in aux.items() if k != "sum"} == {"prompts": 2, "pairs": 3, "correct": 1}
    np.testing.assert_allclose(aux["sum"], first + math.log(2.0), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ranking_loss_equals_a_double_loop(seed):
    scores, ranks = random_ranking(seed)
    loss, aux = jax.jit(losses.ranking_loss)(jnp.asarray(scores, jnp.float32), jnp.asarray(ranks, jnp.int32))
    expected, prompts, pairs, correct = python_ranking_loss(scores, ranks)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (aux["prompts"], aux["pairs"], aux["correct"]) == (prompts, pairs, correct)


def test_ranking_loss_gradient_equals_finite_differences():
    scores, ranks = random_ranking(11, prompts=3, k=4)
    gradient = jax.grad(lambda s: losses.ranking_loss(s, jnp.asarray(ranks, jnp.int32))[0])(
        jnp.asarray(scores, jnp.float32)
    )
    for index in np.ndindex(*scores.shape):
        step = np.zeros_like(scores)
        step[index] = 1e-5
        difference = python_ranking_loss(scores + step, ranks)[0] - python_ranking_loss(scores - step, ranks)[0]
        np.testing.assert_allclose(gradient[index], difference / 2e-5, atol=1e-6)


def test_ranking_loss_ignores_missing_completions_and_is_stable():
    scores, ranks = random_ranking(2)
    dirty = jnp.where(ranks == 0, jnp.nan, scores).astype(jnp.float32)
    run = jax.value_and_grad(lambda s: losses.ranking_loss(s, jnp.asarray(ranks, jnp.int32))[0])
    jax.tree.map(np.testing.assert_array_equal, run(dirty), run(jnp.asarray(scores, jnp.float32)))
    loss, aux = losses.ranking_loss(jnp.array([[-500.0, 500.0]]), jnp.array([[1, 2]]))
    assert loss == 1000.0 and aux["correct"] == 0
    loss, aux = losses.ranking_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32))
    assert loss == 0.0 and aux["prompts"] == 0


def test_ranking_loss_of_microbatches_adds_up():
    scores, ranks = (jnp.asarray(x, t) for x, t in zip(random_ranking(3), (jnp.float32, jnp.int32), strict=True))
    whole, _ = losses.ranking_loss(scores, ranks)
    parts = [losses.ranking_loss(scores[i : i + 2], ranks[i : i + 2])[1] for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(p["sum"] for p in parts) / sum(p["prompts"] for p in parts), whole, rtol=1e-6)
