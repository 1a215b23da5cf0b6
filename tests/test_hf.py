"""Checkpoints in Hugging Face format without torch: golden files, meshes, memory, odd files, and the one real model."""

import json
import pathlib
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from hf_checkpoints import (
    GOLDEN,
    compiled,
    copy_golden,
    count_params,
    edit_config,
    equal,
    file_tensors,
    random_parameters,
    word_tokenizer,
)

from instructgpt_jax import models
from instructgpt_jax.models import ModelConfig, hf
from instructgpt_jax.models.hf import layout, loading, storage
from instructgpt_jax.rollout import generate
from instructgpt_jax.sharding import make_mesh, param_shardings

FAMILIES = sorted(hf.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_logits_and_round_trip(family, tmp_path):
    config, params = hf.load(GOLDEN / family)
    expected = np.load(GOLDEN / family / "expected.npz")
    logits = compiled(lambda params, tokens: models.logits(config, params, tokens), params, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    assert hf.read_config(GOLDEN / family) == config
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    table = params["embed"]["tokens"]
    assert table.shape[0] == 128 and not np.any(table[config.vocab_size :])

    hf.save(tmp_path, config, params)
    again, params_again = hf.load(tmp_path)
    assert again == config
    equal(params, params_again)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    if family != "llama":  # which is bfloat16 in its files
        equal(file_tensors(GOLDEN / family), file_tensors(tmp_path))


def test_golden_covers_every_family():
    assert sorted(path.name for path in GOLDEN.iterdir()) == FAMILIES


def test_layouts_by_hand():
    sizes = {"D": 2, "N": 2, "H": 2, "M": 2}
    fused = np.arange(24).reshape(2, 12)  # rows D, columns q q q q k k k k v v v v
    key = layout.view(fused, "D (1/3 M H)", "D M H", sizes)
    np.testing.assert_array_equal(key, [[[4, 5], [6, 7]], [[16, 17], [18, 19]]])
    assert np.shares_memory(key, fused)
    by_head = fused.reshape(12, 2)  # rows q q k k v v of head 0, then of head 1
    value = layout.view(by_head, "(M 2/3 H) D", "D M H", sizes)
    np.testing.assert_array_equal(value[:, 1], [[20, 22], [21, 23]])
    for file_layout, array in (("D ({}/3 M H)", fused), ("(M {}/3 H) D", by_head)):
        parts = [layout.view(array, file_layout.format(i), "D M H", sizes) for i in range(3)]
        np.testing.assert_array_equal(layout.assemble(parts, file_layout.format(0), "D M H", sizes), array)


GPT2_SHAPE = ModelConfig(vocab_size=100, num_layers=2, width=32, num_heads=4, mlp_width=64, max_length=32)
LLAMA_SHAPE = GPT2_SHAPE.replace(
    num_heads=8, num_kv_heads=4, positions="rotary", norm="rmsnorm", gated_mlp=True, activation="silu", qkv_bias=False,
    out_bias=False, mlp_bias=False, tied_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("config", [GPT2_SHAPE, LLAMA_SHAPE.replace(head="scalar")], ids=["gpt2", "llama-scalar"])
def test_meshes_hold_the_same_parameters(config, tmp_path):
    params = random_parameters(config)
    hf.save(tmp_path / "one", config, params)
    for shape in ((1, 8, 1), (1, 2, 4), (2, 2, 2)):
        mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
        got_config, got = hf.load(tmp_path / "one", mesh)
        assert got_config == config
        equal(got, params)
        jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim) or pytest.fail(str(x.sharding)),
                     got, param_shardings(mesh, got))  # fmt: skip
        hf.save(tmp_path / "mesh", config, got)
        assert (tmp_path / "mesh" / "model.safetensors").read_bytes() == (
            tmp_path / "one" / "model.safetensors"
        ).read_bytes()


def test_mesh_that_does_not_divide_is_refused(tmp_path):
    config = GPT2_SHAPE.replace(num_heads=2, width=24, mlp_width=48)
    hf.save(tmp_path, config, random_parameters(config))
    with pytest.raises(ValueError, match="config.mesh.tensor=4 must divide .* got 2 in blocks/attention/key"):
        hf.load(tmp_path, make_mesh({"data": 1, "fsdp": 2, "tensor": 4}))


PEAK = """
import re, sys
import jax
from instructgpt_jax.models import hf
jax.block_until_ready(jax.numpy.zeros(8))
# Not getrusage, whose peak a process inherits from the one that started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
hf.load(sys.argv[1])           # the same programs on a small model first: compiling has its own peak
before = peak()
config, params = hf.load(sys.argv[2])
largest = max(x.nbytes // config.num_layers for x in jax.tree.leaves(params["blocks"]))
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(params)), largest)
"""


def sparse_gpt2(directory, num_layers, width):
    """A checkpoint of zeros that takes no disk: the header, and a hole."""
    directory.mkdir()
    config = ModelConfig(
        vocab_size=1_000, num_layers=num_layers, width=width, num_heads=8, mlp_width=4 * width, max_length=64
    )
    params = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    held = loading.file_tensors(hf.FAMILIES["gpt2"], config, list(loading.flatten(params)))
    header, offset = {}, 0
    for name, parts in held.items():
        shape = layout.shape(parts[0][2], layout.sizes(config))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + 4 * int(np.prod(shape))]}
        offset = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    raw = {
        "model_type": "gpt2",
        "vocab_size": 1_000,
        "n_layer": num_layers,
        "n_embd": width,
        "n_head": 8,
        "n_positions": 64,
    }
    (directory / "config.json").write_text(json.dumps(raw))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_host_memory_while_loading(tmp_path):
    """On a CPU the parameters are in the same memory: what is left of the peak is what loading itself takes."""
    sparse_gpt2(tmp_path / "small", 2, 64)
    sparse_gpt2(tmp_path / "large", 16, 768)  # 457 MB; a layer has 28, its largest tensor 9, all of those together 151
    arguments = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    peak, size, largest = map(int, subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split())
    assert size > 450e6 and peak > size  # the measurement measures
    assert peak < size + 28e6 + 2 * largest + 80e6, f"{peak=} {size=} {largest=}"


def test_several_files_and_replacement(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    hf.save(tmp_path / "out", config, params, shard_bytes=8_000)
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    equal(hf.load(tmp_path / "out")[1], params)
    equal(file_tensors(tmp_path / "out"), file_tensors(GOLDEN / "gpt2"))

    hf.save(tmp_path / "out", config, params)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_float16_and_base_model_names(tmp_path):
    """Half precision is cast; the names of a bare base model (no prefix, causal masks as buffers) are understood."""
    directory = copy_golden("gpt2", tmp_path)
    tensors = {name.removeprefix("transformer."): x.astype(np.float16) for name, x in file_tensors(directory).items()}
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float16))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    edit_config(directory, architectures=["GPT2Model"])
    _, exact = hf.load(GOLDEN / "gpt2")
    equal(hf.load(directory)[1], jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), exact))


def test_tied_head_stored_twice(tmp_path):
    directory = copy_golden("gpt2", tmp_path)
    tensors = file_tensors(directory)
    safetensors.numpy.save_file(
        tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, directory / "model.safetensors"
    )
    equal(hf.load(directory)[1], hf.load(GOLDEN / "gpt2")[1])
    other = tensors["transformer.wte.weight"] + 1
    safetensors.numpy.save_file(tensors | {"lm_head.weight": other}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="'lm_head.weight' must equal the embedding under tie_word_embeddings"):
        hf.load(directory)
    edit_config(directory, tie_word_embeddings=False)
    config, params = hf.load(directory)
    assert not config.tied_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"][: config.vocab_size], other)


def test_special_tokens(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    hf.save(tmp_path / "lm", config, params, word_tokenizer(40))
    raw = json.loads((tmp_path / "lm" / "config.json").read_text())
    # PAD is 40, one more than a language model of 40 words can read: EOS stands in.
    assert (raw["vocab_size"], raw["eos_token_id"], raw["bos_token_id"], raw["pad_token_id"]) == (40, 39, None, 39)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded("w3 w5")["input_ids"]) == (39, 39, [3, 5])
    equal(hf.load(tmp_path / "lm")[1], params)

    config = config.replace(head="scalar")
    params["scalar_head"] = {"kernel": np.arange(16, dtype=np.float32), "bias": np.float32(-0.5)}
    hf.save(tmp_path / "score", config, params, word_tokenizer(40))
    raw = json.loads((tmp_path / "score" / "config.json").read_text())
    assert (raw["vocab_size"], raw["pad_token_id"]) == (41, 40)
    table = file_tensors(tmp_path / "score")["transformer.wte.weight"]
    assert table.shape == (41, 16) and not table[40].any() and table[39].any()
    equal(hf.load(tmp_path / "score")[1], params)

    same = word_tokenizer(40)
    same.pad_token = same.eos_token
    with pytest.raises(ValueError, match="tokenizer.pad_token_id must be an id of its own"):
        hf.save(tmp_path / "none", config, params, same)
    with pytest.raises(ValueError, match="tokenizer.eos_token_id must be below vocab_size=40, got 41"):
        hf.save(tmp_path / "none", config, params, word_tokenizer(42, pad_id=0))


def test_hub_id(monkeypatch):
    calls = []

    def download(name, allow_patterns, revision):
        calls.append((name, allow_patterns, revision))
        return str(GOLDEN / "gpt2")

    monkeypatch.setattr(storage.huggingface_hub, "snapshot_download", download)
    assert hf.read_config("owner/tiny-gpt2").width == 16
    assert len(calls) == 1 and "*.safetensors" not in calls[0][1]
    equal(hf.load("owner/tiny-gpt2")[1], hf.load(GOLDEN / "gpt2")[1])
    assert ("owner/tiny-gpt2", ["*.safetensors"], None) in calls
    hf.load("owner/tiny-gpt2@a1b2")
    assert calls[-1] == ("owner/tiny-gpt2", ["*.safetensors"], "a1b2")
    assert hf.version("owner/tiny-gpt2") == "commit gpt2"  # the folder is named by it

    def unreachable(name, allow_patterns, revision):
        raise OSError("no route to host")

    monkeypatch.setattr(storage.huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match="'owner/tiny-gpt2' must be a directory, or a Hub id that can be fetched.*no route"
    ):
        hf.load("owner/tiny-gpt2")
    with pytest.raises(ValueError, match="must be a directory in Hugging Face format or a Hub id"):
        hf.load("/nowhere/at/all")


def llama2c(file: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes a llama2.c checkpoint in Hugging Face format: adjacent rotary pairs become halves."""
    raw = file.read_bytes()
    D, F, L, N, M, V, T = struct.unpack("<7i", raw[:28])
    numbers = iter(np.split(np.frombuffer(raw[28:], "<f4"), np.cumsum(
        [V * D, L * D, L * D * D, *2 * [L * M * D * D // N], L * D * D, L * D, *3 * [L * F * D], D]
    )))  # fmt: skip
    take = lambda *shape: next(numbers).reshape(shape)  # noqa: E731
    halves = lambda w, heads: w.reshape(heads, -1, 2, D).swapaxes(1, 2).reshape(-1, D)  # noqa: E731
    tensors = {"model.embed_tokens.weight": take(V, D)}
    stacks = {"input_layernorm": take(L, D), "self_attn.q_proj": take(L, D, D), "self_attn.k_proj": take(L, -1, D)}
    stacks |= {"self_attn.v_proj": take(L, -1, D), "self_attn.o_proj": take(L, D, D)}
    stacks |= {"post_attention_layernorm": take(L, D), "mlp.gate_proj": take(L, F, D), "mlp.down_proj": take(L, D, F)}
    stacks |= {"mlp.up_proj": take(L, F, D)}
    tensors["model.norm.weight"] = take(D)
    for name, stack in stacks.items():
        for layer, w in enumerate(stack):
            w = halves(w, N) if "q_proj" in name else halves(w, M) if "k_proj" in name else w
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(w)
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "vocab_size": V}
    config |= {"num_attention_heads": N, "num_key_value_heads": M, "max_position_embeddings": T, "rms_norm_eps": 1e-5}
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def test_a_real_model_tells_its_story(shared_data, tmp_path):
    llama2c(shared_data / "tiny_lm" / "stories260K.bin", tmp_path / "model")
    config, params = hf.load(tmp_path / "model")
    assert count_params(config) == 260_032
    words, raw, offset = [], (shared_data / "tiny_lm" / "tok512.bin").read_bytes(), 4
    for _ in range(config.vocab_size):
        (length,) = struct.unpack_from("<i", raw, offset + 4)
        words.append(raw[offset + 8 : offset + 8 + length])
        offset += 8 + length
    prompt, length = jnp.array([[1]], jnp.int32), jnp.array([1], jnp.int32)
    story = compiled(lambda params: generate(config, params, prompt, length, 64, 0, temperature=0.0), params).tokens[0]
    text = b"".join(words[token] for token in np.asarray(story)).decode()
    assert text.strip().startswith("Once upon a time, there was a little girl named Lily."), text
