"""Prompts answered and texts scored: what a response holds, and what it must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_supervised
from ml_collections import ConfigDict

from instructgpt_jax import episodes as ep
from instructgpt_jax import models, responses
from instructgpt_jax.data import padding
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.episodes import Episodes
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.responses import Answers
from instructgpt_jax.sharding import make_mesh

# More ids than the tokenizer has tokens, as published models have.
CONFIG = ModelConfig(vocab_size=300, num_layers=1, width=16, num_heads=4, mlp_width=32, max_length=48, head_bias=True)
SCALAR = CONFIG.replace(head="scalar", head_bias=False)
R = 7
OPTIONS = ConfigDict({"response_length": R, "temperature": 3.0, "top_k": 0, "top_p": 1.0})
PROMPTS = [np.arange(40, 40 + length, dtype=np.int32) for length in (9, 1, 4, 7, 2, 9, 3, 5, 6, 9)]
ONE_WIDTH = [padding.Batch(range(5), 5, 9), padding.Batch(range(5, 10), 5, 9)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train(["the cat sees the dog"] * 9, 262, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def params(tokenizer):
    """A policy that ends about every tenth token."""
    tree = models.init(CONFIG, jax.random.key(0))
    tree["head"]["bias"] = tree["head"]["bias"].at[tokenizer.eos_id].set(3.0 * np.log(25.0))
    return tree


def respond(tokenizer, params, prompts=PROMPTS, index=range(10), batches=tuple(ONE_WIDTH), shards=1, **changes):
    """The response to each prompt."""
    mesh = make_mesh(dict(data=1, fsdp=shards, tensor=1), jax.devices()[:shards])
    found, asked = {}, responses.sampler_of(CONFIG, tokenizer, OPTIONS, seed=0)
    with jax.set_mesh(mesh):
        for batch, some in responses.answer(asked, params, prompts, index, batches, mesh, **changes):
            found |= zip(batch.places, some, strict=True)
    return [found[place] for place in range(len(prompts))]


@pytest.fixture(scope="module")
def plain(tokenizer, params):
    return respond(tokenizer, params)


def same_text(left, right):
    return [one.text for one in left] == [one.text for one in right]


def test_a_response_holds_its_tokens_and_no_end_of_text_in_its_text(tokenizer, plain):
    assert {one.ended for one in plain} == {True, False}
    for one in plain:
        ended = one.tokens[-1] == tokenizer.eos_id
        assert one.ended == ended and tokenizer.eos_id not in one.tokens[:-1]
        assert len(one.tokens) == len(one.logprobs) == R or ended
        assert one.tokens.max() < tokenizer.vocab_size <= 262  # an id without a token has no text
        assert one.text == tokenizer.decode(one.tokens[: len(one.tokens) - ended])
        assert (one.logprobs < 0).all()


def test_a_response_depends_on_its_prompt_its_number_and_the_iteration_alone(tokenizer, params, plain):
    shapes = padding.by_width([len(ids) for ids in PROMPTS], 9, 4, 3)
    assert same_text(respond(tokenizer, params, batches=list(shapes)), plain)
    order = [3, 1, 7, 0, 2, 9, 6, 5, 4, 8]
    moved = respond(tokenizer, params, [PROMPTS[i] for i in order], order)
    assert same_text(moved, [plain[i] for i in order])
    assert same_text(respond(tokenizer, params, batches=[padding.Batch(range(10), 12, 16)], shards=4), plain)
    for other in ({"iteration": 1}, {"index": range(10, 20)}):
        found = respond(tokenizer, params, **other)
        assert sum(one.text == before.text for one, before in zip(found, plain, strict=True)) <= 2


def test_a_prompt_that_stands_there_several_times_is_read_once(tokenizer, params, plain, monkeypatch):
    """Its responses have numbers of their own, and each comes to its place."""
    sent, answer_batch = [], responses.answer_batch

    def kept(*given):
        sent.append(given)
        return answer_batch(*given)

    monkeypatch.setattr(responses, "answer_batch", kept)
    prompts, index = [PROMPTS[i] for i in (0, 3, 0, 2, 3, 0)], [0, 3, 20, 2, 21, 22]
    batches = [padding.Batch(range(3), 3, 9), padding.Batch(range(3, 6), 3, 9)]
    found = respond(tokenizer, params, prompts, index, batches)
    ((sampler, _, _, _, numbers, _, counts),) = sent
    assert sampler.wave == 3 and np.asarray(counts).tolist() == [3, 2, 1] + [0] * 9
    assert np.asarray(numbers)[:6].tolist() == [0, 20, 22, 3, 21, 2]
    assert same_text([found[0], found[1], found[3]], [plain[0], plain[3], plain[2]])
    alone = respond(tokenizer, params, [PROMPTS[0], PROMPTS[3]], [22, 21], [padding.Batch(range(2), 2, 9)])
    assert same_text([found[5], found[4]], alone)


def test_batches_of_one_shape_are_joined():
    shapes = [([0, 1], 2, 9), ([2, 3], 2, 9), ([4], 2, 9), ([5], 3, 9)]
    joined = list(padding.joined([padding.Batch(*shape) for shape in shapes], 2))
    assert joined == [padding.Batch([0, 1, 2, 3], 2, 9), padding.Batch([4], 2, 9), padding.Batch([5], 3, 9)]


def test_batches_by_width_take_each_sequence_once_and_in_its_shape():
    lengths = [5, 30, 9, 10, 11, 2, 7, 1, 3]
    found = list(padding.by_width(lengths, 30, 3, 2))
    assert [(list(batch.places), batch.rows, batch.width) for batch in found] == [
        ([7, 5, 8], 3, 10), ([0, 6, 2], 3, 10), ([3], 3, 10), ([4, 1], 2, 30),
    ]  # fmt: skip
    assert list(padding.by_width([3, 2], 9, 4, 4)) == [padding.Batch([1, 0], 4, 3)]


def by_hand(tokenizer):
    """Answers to two prompts and to what fills the batch."""
    text = tokenizer.encode(["the cat"])[0]
    n, eos = len(text), tokenizer.eos_id
    tokens, mask = np.zeros((3, n + 1), np.int32), np.zeros((3, n + 1), bool)
    tokens[0], mask[0] = [*text, eos], True
    tokens[1:, :n], mask[1:, :n] = text, True
    prompts = np.stack([np.arange(40, 44)] * 3).astype(np.int32)
    logprobs = np.where(mask, -np.arange(1, n + 2), 0).astype(np.float32)
    return Answers(Episodes(prompts, np.array([4, 2, 4]), tokens, mask), logprobs, np.array([7, 3, -1]))


def test_read_by_hand(tokenizer):
    answers = by_hand(tokenizer)
    ended, cut = responses.read(tokenizer, answers, [0, 1])
    n = len(cut.tokens)
    assert (ended.text, ended.ended, cut.text, cut.ended) == ("the cat", True, "the cat", False)
    assert ended.tokens.tolist() == [*cut.tokens, tokenizer.eos_id]
    assert ended.logprobs.tolist() == [*cut.logprobs, -n - 1] == [-i for i in range(1, n + 2)]
    assert responses.read(tokenizer, answers, [1])[0].text == "the cat"


def test_measures_are_of_real_prompts_and_the_first_are_shown(tokenizer, monkeypatch):
    answers = by_hand(tokenizer)
    n = len(tokenizer.encode(["the cat"])[0])
    asked = []

    def answer_batch(sampler, params, prompts, lengths, index, iteration):
        asked.append((prompts, lengths, index, iteration))
        return answers

    monkeypatch.setattr(responses, "answer_batch", answer_batch)
    monkeypatch.setattr(responses, "_with_slots", lambda sampler, *given: sampler)
    batch = {"prompts": "p", "prompt_lengths": "l", "index": "i"}
    scores = iter([np.array([1.0, 2.0, 3.0], np.float32), np.array([4.0, 5.0, 6.0], np.float32)])

    def measures(given):
        assert given is answers
        score = next(scores)
        return {"kl": -score, "score": score}

    sampler = responses.sampler_of(CONFIG, tokenizer, OPTIONS, seed=0)
    found, samples = responses.answer_and_measure(sampler, {}, [batch, batch], measures, 3, iteration=5)
    assert asked == [("p", "l", "i", 5)] * 2
    np.testing.assert_array_equal(found["score"], [1.0, 2.0, 4.0, 5.0])
    np.testing.assert_array_equal(found["length"], [n + 1, n] * 2)
    prompt = tokenizer.decode(range(40, 44))
    assert [list(sample) for sample in samples] == [["prompt", "response", "score", "kl"]] * 3
    assert [sample["prompt"] for sample in samples] == [prompt, tokenizer.decode([40, 41]), prompt]
    assert [sample["score"] for sample in samples] == [1.0, 2.0, 4.0] == [-sample["kl"] for sample in samples]
    assert {sample["response"] for sample in samples} == {"the cat"}


def test_measures_of_answers():
    """Reward model, judge and reference, none like another, against unpacked passes; a greedy policy's KL is at 1."""
    shapes = {"reward": SCALAR, "judge": SCALAR.replace(width=8, num_layers=2), "ref_policy": CONFIG}
    frozen = {name: models.init(network, jax.random.key(n)) for n, (name, network) in enumerate(shapes.items())}
    frozen["judge"]["scalar_head"]["bias"] = jnp.float32(0.5)
    rng, allowed = np.random.default_rng(0), np.arange(300) < 262
    lengths, ends = np.array([4, 1, 3]), np.array([2, 3, 1])
    prompts, texts = rng.integers(0, 262, (3, 4)).astype(np.int32), rng.integers(0, 262, (3, 3)).astype(np.int32)
    logprobs = rng.normal(size=(3, 3)).astype(np.float32)
    sequences = np.zeros((3, 7), np.int32)
    for row, prompt, q, text in zip(sequences, prompts, lengths, texts, strict=True):
        row[: q + 3] = [*prompt[:q], *text]

    @functools.partial(jax.jit, compiler_options=tiny_supervised.QUICK)
    def run(frozen, episodes):
        packed, positions = ep.pack(episodes, 16, 2), jnp.broadcast_to(jnp.arange(7), (3, 7))
        measured = [responses.measures_of(shapes, frozen, episodes, packed, logprobs, t, allowed) for t in (0.0, 0.7)]
        alone = {}
        for name in ("reward", "judge"):
            hidden = models.hidden(shapes[name], frozen[name], sequences, positions, None)
            alone[name] = models.scalar(shapes[name], frozen[name], hidden)
        return measured, alone, models.logits(CONFIG, frozen["ref_policy"], sequences)

    measured, alone, logits = run(frozen, Episodes(prompts, lengths, texts, np.arange(3) < ends[:, None]))
    for temperature, found in zip((1.0, 0.7), measured, strict=True):
        assert found.keys() == {"score", "judge", "kl"}
        for name, network in (("score", "reward"), ("judge", "judge")):
            np.testing.assert_allclose(found[name], alone[network][np.arange(3), lengths + ends - 1], atol=3e-6)
        reference = np.asarray(logits, np.float64)[..., allowed] / temperature
        reference -= np.log(np.exp(reference).sum(axis=-1, keepdims=True))
        for row, (q, r) in enumerate(zip(lengths, ends, strict=True)):
            kl = sum(logprobs[row, t] - reference[row, q - 1 + t, texts[row, t]] for t in range(r))
            np.testing.assert_allclose(found["kl"][row], kl, rtol=1e-5)


def test_scores_are_read_at_the_last_token_and_include_the_bias():
    """Seven texts in batches of five, against unpacked forward passes."""
    params = models.init(SCALAR, jax.random.key(1))
    params["scalar_head"]["bias"] = jnp.float32(-1.5)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, 50, length).astype(np.int32) for length in (6, 1, 3, 5, 2, 4, 4)]
    texts = [rng.integers(1, 50, length).astype(np.int32) for length in (4, 2, 1, 3, 4, 2, 3)]
    whole = [np.concatenate(pair) for pair in zip(prompts, texts, strict=True)]
    tokens = np.stack([np.pad(ids, (0, 10 - len(ids))) for ids in whole])
    hidden = models.hidden(SCALAR, params, tokens, np.broadcast_to(np.arange(10), (7, 10)), None)
    want = hidden[np.arange(7), np.array([len(ids) - 1 for ids in whole])] @ params["scalar_head"]["kernel"] - 1.5
    for shards, row_length in ((1, 24), (1, 2), (4, 24)):  # a row of 2 is made longer, 5 texts at once become 8
        mesh = make_mesh(dict(data=1, fsdp=shards, tensor=1), jax.devices()[:shards])
        with jax.set_mesh(mesh):
            found = responses.score(SCALAR, params, prompts, texts, mesh, 5, row_length, 4)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, want, atol=3e-6)


def test_completions_of_comparisons_stand_beside_their_prompts(tokenizer):
    records = [
        {"prompt": "the", "completions": [" cat", " dog"]},
        {"prompt": "a", "completions": ["b"], "ended": [False]},
    ]
    prompts, texts = responses.completions(records, tokenizer, "x", context=6)
    the, cat, dog, a, b = (ids.tolist() for ids in tokenizer.encode(["the", " cat", " dog", "a", "b"]))
    assert [ids.tolist() for ids in prompts] == [the, the, a]
    assert [ids.tolist() for ids in texts] == [cat + [tokenizer.eos_id], dog + [tokenizer.eos_id], b]
    with pytest.raises(ValueError, match="prompt and completion of x must fit the reward model's context of 5 tokens"):
        responses.completions(records, tokenizer, "x", context=5)
