"""Every family against transformers and torch: logits, gradients, greedy continuations, files in both directions."""

import contextlib
import json
import logging
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import hf_checkpoints
import safetensors.numpy
import transformers
from hf_checkpoints import compiled, equal, word_tokenizer

from instructgpt_jax import models
from instructgpt_jax.models import attention, hf
from instructgpt_jax.models.hf import storage
from instructgpt_jax.rollout import generate
from instructgpt_jax.sharding import path_name

# Two packed rows: (tokens of each sequence, padding). One sequence is longer than every local window.
ROWS = (((7, 11), 2), ((17,), 3))
WIDTH = 20
torch.set_num_threads(1)


def packed():
    """Rows as the stages build them, with rubbish in the padding, and the sequences one by one."""
    random = np.random.default_rng(0)
    tokens, positions, segments = random.integers(3, 64, (2, WIDTH)), np.zeros((2, WIDTH)), np.zeros((2, WIDTH))
    sequences = []
    for row, (lengths, _) in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths):
            columns = slice(start, start + length)
            positions[row, columns], segments[row, columns] = np.arange(length), number + 1
            sequences.append((row, columns, tokens[row, columns]))
            start += length
    return tokens.astype(np.int32), positions.astype(np.int32), segments.astype(np.int32), sequences


@contextlib.contextmanager
def silence():
    """Nothing is warned of inside, by transformers or by Python."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            logger.removeHandler(handler)
    assert not lines and not warned, (lines, [str(each.message) for each in warned])


@pytest.fixture(scope="module", params=hf_checkpoints.CASES)
def checkpoint(request, tmp_path_factory):
    """A checkpoint by transformers, its torch model, and what we read of it."""
    directory = tmp_path_factory.mktemp(request.param)
    model = hf_checkpoints.write(request.param, directory)
    config, params = hf.load(directory)
    return types.SimpleNamespace(case=request.param, model=model, config=config, params=params, directory=directory)


def test_logits_and_gradients(checkpoint, tmp_path):
    tokens, positions, segments, sequences = packed()
    losses = 0.0
    expected = []
    for _, _, sequence in sequences:
        ids = torch.tensor(sequence)[None].long()
        logits = checkpoint.model(ids).logits[0]
        expected.append(logits.detach().numpy())
        losses = losses + torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    checkpoint.model.zero_grad()
    losses.backward()

    def loss(params):
        logits = models.logits(checkpoint.config, params, tokens, positions, segments)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
        return -jnp.sum(logprobs * same), logits

    (value, logits), gradients = compiled(jax.value_and_grad(loss, has_aux=True), checkpoint.params)
    for (row, columns, _), reference in zip(sequences, expected, strict=True):
        np.testing.assert_allclose(logits[row, columns], reference, atol=1e-4, rtol=0)
    np.testing.assert_allclose(value, losses.item(), rtol=1e-5)

    # torch's gradients take the way of the weights: written as a checkpoint, read by the same table.
    named = {name: p.grad.contiguous().numpy() for name, p in checkpoint.model.named_parameters() if p.grad is not None}
    if "gpt_neox" in checkpoint.case:  # whose head has another name in files than in memory
        named["embed_out.weight"] = named.pop("lm_head.weight")
    safetensors.numpy.save_file(named, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint.directory / "config.json").read_text())
    _, references = hf.load(tmp_path)

    def close(path, ours, theirs):
        limit = 1e-4 * max(float(jnp.max(jnp.abs(theirs))), 0.1)  # the gradient of a key bias is nothing but rounding
        np.testing.assert_allclose(ours, theirs, atol=limit, rtol=0, err_msg=path_name(path))

    jax.tree_util.tree_map_with_path(close, gradients, references)


def test_greedy_continuation(checkpoint):
    if checkpoint.case in ("gpt_neox_sequential", "llama_linear"):
        pytest.skip("nothing that decoding could do otherwise than the case before it")
    prompts = np.random.default_rng(1).integers(3, 64, (2, 7)).astype(np.int32)
    lengths = np.array([7, 4], np.int32)
    ours = compiled(
        lambda params: generate(checkpoint.config, params, prompts, lengths, 32, 0, temperature=0.0), checkpoint.params
    )
    checkpoint.model.generation_config.eos_token_id = None
    for prompt, length, tokens in zip(prompts, lengths, np.asarray(ours.tokens), strict=True):
        ids = torch.tensor(prompt[:length])[None].long()
        theirs = checkpoint.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        np.testing.assert_array_equal(tokens, theirs[0, length:].numpy())


def test_round_trip_through_transformers(checkpoint, tmp_path):
    ends = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6}
    hf.save(tmp_path / "ours", checkpoint.config, checkpoint.params, word_tokenizer(64), generation=ends)
    with silence():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
        transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert not any(report.values()), report
    assert model.generation_config.eos_token_id == [1, 2] and model.generation_config.temperature == 0.6
    assert type(model) is type(checkpoint.model) and model.dtype == torch.float32
    states = model.state_dict(), checkpoint.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids).logits, checkpoint.model(ids).logits, atol=1e-5)
        hf.save(tmp_path / "half", checkpoint.config, checkpoint.params, dtype="bfloat16")
        with silence():
            half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
        assert half.dtype == torch.bfloat16 and half.generation_config.eos_token_id is None
        states = half.state_dict(), checkpoint.model.state_dict()
        assert all(torch.equal(states[0][name], states[1][name].bfloat16()) for name in states[0])
    model.save_pretrained(tmp_path / "theirs")
    config, params = hf.load(tmp_path / "theirs")
    assert config == checkpoint.config
    equal(params, checkpoint.params)


@pytest.mark.parametrize("family", hf.FAMILIES.values(), ids=hf.FAMILIES)
def test_classes_exist(family):
    assert hasattr(transformers, family.causal) and hasattr(transformers, family.classifier)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "opt_projected", "qwen3", "gemma3_text"])
def test_reward_model_gives_the_same_score(case, tmp_path):
    hf_checkpoints.write(case, tmp_path / "lm")
    config, params = hf.load(tmp_path / "lm")
    kernel = np.random.default_rng(0).normal(size=config.embedding_width).astype(np.float32)
    config, params = config.replace(head="scalar"), {name: x for name, x in params.items() if name != "head"}
    params["scalar_head"] = {"kernel": kernel, "bias": np.float32(0.37)}
    tokenizer = word_tokenizer(64)  # its PAD is 64, one beyond the vocabulary
    hf.save(tmp_path / "score", config, params, tokenizer)

    random = np.random.default_rng(1)
    sequences = [random.integers(3, 64, n).tolist() + [tokenizer.eos_token_id] for n in (9, 4)]
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "score", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        theirs = model.eval()(**batch).logits[:, 0].numpy()
    assert json.loads((tmp_path / "score" / "config.json").read_text())["reward_bias"] == pytest.approx(0.37)

    def score(params):
        tokens = jnp.array([sequence + [0] * (10 - len(sequence)) for sequence in sequences])
        positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
        return models.scalar(config, params, models.hidden(config, params, tokens, positions, None))

    ours = compiled(score, params)
    np.testing.assert_allclose([ours[0, 9], ours[1, 4]], theirs + model.config.reward_bias, atol=1e-5)

    again, params_again = hf.load(tmp_path / "score")
    assert again == config.replace(vocab_size=65)
    equal(params_again, params)


def test_classifier_by_transformers(tmp_path):
    model = hf_checkpoints.write("llama", tmp_path, head="ForSequenceClassification", num_labels=1)
    config, params = hf.load(tmp_path)
    assert config.head == "scalar" and params["scalar_head"]["bias"] == 0
    np.testing.assert_array_equal(params["scalar_head"]["kernel"], model.score.weight[0].detach().numpy())


@pytest.mark.parametrize("width, theta", [(128, 1e6), (64, 1e6), (96, 1e4)])
def test_yarn_of_real_sizes(width, theta, tmp_path):
    """Frequencies and factor of Qwen2.5's long context, as transformers computes them."""
    options = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    raw = {"model_type": "qwen2", "hidden_size": 2 * width, "num_attention_heads": 2, "num_key_value_heads": 2}
    raw |= {"intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 32_768}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": theta, "rope_scaling": options}))
    theirs, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](
        transformers.AutoConfig.from_pretrained(tmp_path), "cpu"
    )
    config = hf.read_config(tmp_path)
    ours = attention.rotary_frequencies(width, config.rotary_theta, config.rotary_scaling)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
    assert attention.rotary_scale(config.rotary_scaling) == pytest.approx(factor, rel=1e-9)
    assert config.max_length == 131_072


def test_half_precision_in_several_files(tmp_path):
    model = hf_checkpoints.build("mistral").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, params = hf.load(tmp_path)
    expected = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(params["embed"]["tokens"][:64], expected)


def test_our_several_files_open_in_transformers(tmp_path):
    config, params = hf.load(hf_checkpoints.write("qwen2", tmp_path / "a") and tmp_path / "a")
    hf.save(tmp_path / "b", config, params, shard_bytes=10_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bin_files(tmp_path, monkeypatch):
    model = hf_checkpoints.write("gpt2", tmp_path)
    expected = hf.load(tmp_path)[1]
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # with the tied head in it
    equal(hf.load(tmp_path)[1], expected)

    names = sorted(model.state_dict())
    places = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: model.state_dict()[name].to(torch.bfloat16) for name in names if places[name] == file}
        torch.save(part, tmp_path / file)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    equal(hf.load(tmp_path)[1], jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), expected))

    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) > 0 for layer in range(2)}
    masks |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-10_000) for layer in range(2)}
    torch.save(model.state_dict() | masks, tmp_path / "pytorch_model.bin")  # goes before the index
    equal(hf.load(tmp_path)[1], expected)
    whole = {name: x.long() if "ln_f.bias" in name else x for name, x in model.state_dict().items()}
    torch.save(whole, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="bin: tensor 'transformer.ln_f.bias' must be of dtype .*got 'torch.int64'"):
        hf.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()

    (tmp_path / places[names[0]]).write_bytes(b"no state dict")
    with pytest.raises(ValueError, match="must be a state dict that torch can load"):
        storage.tensors(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ValueError, match="can only be read with torch; without it convert"):
        storage.tensors(tmp_path)
