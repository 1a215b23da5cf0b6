"""Endings behind contexts and answers up to a stop text, against a forward pass of one text at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model

from instructgpt_jax import models
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation.benchmarks import generation, scoring
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.sharding import make_mesh

T = 32  # of the model
CONFIG = ModelConfig(vocab_size=280, num_layers=2, width=16, num_heads=4, mlp_width=32, max_length=T)
PROGRAM = jax.jit(scoring.ending_logprobs, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, reference_model.random_params(CONFIG, models.init))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train(["the cat sees the dog. a dog"] * 9, 270, tmp_path_factory.mktemp("bpe"))


def requests():
    """Endings of several lengths behind shared contexts, behind one token, and behind contexts that are too long."""
    rng, found = np.random.default_rng(0), []
    for length, count in ((5, 3), (1, 2), (9, 1), (40, 2), (1, 2), (31, 3), (20, 7), (12, 4)):
        context = rng.integers(0, 280, length).tolist()
        found += [(context, rng.integers(0, 280, rng.integers(1, 9)).tolist()) for _ in range(count)]
    return [found[i] for i in rng.permutation(len(found))]


def plain(params, context, ending):
    """The last T + 1 tokens through the network alone, without packing."""
    kept = (list(context) + list(ending))[-(T + 1) :]
    row = np.zeros((1, T), np.int32)
    row[0, : len(kept) - 1] = kept[:-1]
    logprobs = jax.nn.log_softmax(ALONE(params, row)[0])
    columns = np.arange(len(kept) - 1 - len(ending), len(kept) - 1)
    picked = np.asarray(logprobs)[columns]
    return picked[np.arange(len(ending)), ending].sum(), (picked.argmax(axis=1) == ending).all()


ALONE = jax.jit(lambda params, row: models.logits(CONFIG, params, row))


def scored(params, asked, shards=1, rows=2, row_length=16):
    mesh = make_mesh(dict(data=1, fsdp=shards, tensor=1), jax.devices()[:shards])
    with jax.set_mesh(mesh):
        return scoring.score(lambda rows: PROGRAM(CONFIG, params, rows), asked, T, row_length, rows, mesh)


def test_log_probabilities_are_those_of_each_text_alone(params):
    asked = requests()
    # What greedy decoding gives is greedy; the random endings hardly ever are.
    context = asked[0][0][-10:]
    row = np.zeros((1, T), np.int32)
    row[0, : len(context)] = context
    asked.append((context, [int(np.argmax(ALONE(params, row)[0, len(context) - 1]))]))
    found, cut = scored(params, asked)
    wanted = [plain(params, *request) for request in asked]
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in wanted], rtol=1e-5, atol=1e-4)
    assert [one for _, one in found] == [one for _, one in wanted] and found[-1][1]
    assert cut == sum(len(context) + len(ending) > T + 1 for context, ending in asked) > 0


def test_any_mesh_and_any_rows_give_the_same(params):
    asked = requests()
    alone, wide, many = (scored(params, asked, **how) for how in ({}, {"row_length": 64}, {"shards": 8, "rows": 8}))
    for other in (wide, many):
        np.testing.assert_allclose([x for x, _ in alone[0]], [x for x, _ in other[0]], rtol=1e-5, atol=1e-4)
        assert [x for _, x in alone[0]] == [x for _, x in other[0]] and alone[1] == other[1]


def test_a_shared_context_is_read_once():
    asked = [([1] * 20, [2, 3, 4])] * 4
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    groups, cut = scoring.share(asked, T)
    (batch,) = scoring.batches(groups, 64, 1, mesh)
    assert (batch.rows["segments"] > 0).sum() == 19 + 4 * 3 and not cut
    assert batch.rows["tokens"][0, 19:22].tolist() == [1, 2, 3] and batch.rows["positions"][0, 22] == 19


@pytest.mark.parametrize("request_, said", [(([], [1]), "0 and 1"), (([1], []), "1 and 0"), (([1], [1] * 33), "33")])
def test_what_has_no_log_probability_is_refused(request_, said):
    with pytest.raises(ValueError, match=rf"request 1 must have .* got .*{said}"):
        scoring.share([([1], [2]), request_], T)


def test_answers_are_those_of_a_plain_greedy_loop(params, tokenizer):
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    prompts = [ids.tolist() for ids in tokenizer.encode(["the cat", "a dog sees the cat sees a dog. the cat", "x"])]
    prompts = [*prompts, prompts[1] * 9]  # too long
    allowed = tokenizer.allowed(CONFIG.vocab_size)
    whole = []
    for prompt in prompts:
        ids = prompt[-(T - 8) :]
        for _ in range(8):
            row = np.zeros((1, T), np.int32)
            row[0, : len(ids)] = ids
            ids = [*ids, int(np.argmax(np.where(allowed, ALONE(params, row)[0, len(ids) - 1], -np.inf)))]
            if ids[-1] == tokenizer.eos_id:
                break
        whole.append(generation.text_of(tokenizer, np.array(ids[len(prompt[-(T - 8) :]) :]), ()))
    letter = max(itertools.chain(*whole), key=lambda one: sum(one in text for text in whole))
    pair = whole[1][3:5]
    for until in ((), (letter,), (pair, "not there")):
        how = generation.Manner(until, 8, 0.0, 0, 1.0)
        found, cut = generation.generate(CONFIG, params, tokenizer, prompts, range(4), how, 2, 0, mesh)
        assert cut == 1
        assert found == [min((text.split(stop)[0] for stop in until), key=len, default=text) for text in whole]


def test_tokens_that_hold_a_stop_text_end_an_answer(tokenizer):
    found = generation.stop_ids(tokenizer, (".", "og"))
    texts = {tokenizer.decode([i]) for i in found}
    assert tokenizer.eos_id in found and "." in texts and any("og" in text for text in texts)
    assert all("." in text or "og" in text for text in texts - {tokenizers.EOS})


def test_the_manner_of_a_task():
    given = {"until": ["\n", ""], "max_new_tokens": 20, "do_sample": False, "temperature": 0.7}
    assert generation.manner(given, 256) == (("\n",), 20, 0.0, 0, 1.0)
    assert generation.manner({"until": "Q:", "do_sample": True, "top_p": 0.9}, 256) == (("Q:",), 256, 1.0, 0, 0.9)
    with pytest.raises(ValueError, match="num_beams"):
        generation.manner({"num_beams": 4}, 256)
