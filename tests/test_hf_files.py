"""Which files and tensors of a folder in Hugging Face format count, and which files an export leaves in it."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import transformers
from hf_checkpoints import GOLDEN, copy_golden, equal, file_tensors, word_tokenizer

from instructgpt_jax import networks
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import hf

MASKS = {
    "gpt2": ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
    "gpt_neo": ("transformer.h.{}.attn.attention.bias", "transformer.h.{}.attn.attention.masked_bias"),
    "gptj": (
        "transformer.h.{}.attn.bias",
        "transformer.h.{}.attn.masked_bias",
        "transformer.h.{}.attn.embed_positions",
    ),
    "gpt_neox": ("gpt_neox.layers.{}.attention.bias", "gpt_neox.layers.{}.attention.rotary_emb.inv_freq"),
    "llama": ("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.layers.{}.self_attn.rotary_emb.cos_cached"),
}


def one_file(directory, tensors):
    for file in directory.glob("model*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("family", MASKS)
def test_what_is_no_parameter_may_be_of_any_dtype(family, tmp_path):
    directory = copy_golden(family, tmp_path)
    _, expected = hf.load(directory)
    tensors = file_tensors(directory)
    for dtype in (np.bool_, np.uint8, np.int64):
        masks = {name.format(layer): np.ones((1, 1, 24, 24), dtype) for name in MASKS[family] for layer in range(2)}
        one_file(directory, tensors | masks)
        equal(hf.load(directory)[1], expected)


def test_bytes_of_a_mask_are_not_looked_at(tmp_path):
    """Two elements in one byte, as no dtype of numpy has them; the same for a parameter is refused."""
    directory = copy_golden("gpt2", tmp_path)
    file = directory / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = json.loads(file.read_bytes()[8 : 8 + length]), file.read_bytes()[8 + length :]

    def write(name):
        entry = {"dtype": "F4", "shape": [2, 2], "data_offsets": [len(data), len(data) + 2]}
        text = json.dumps(header | {name: entry}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data + b"\0\0")

    write("transformer.h.0.attn.bias")
    equal(hf.load(directory)[1], hf.load(GOLDEN / "gpt2")[1])
    write("transformer.h.0.ln_1.weight")
    with pytest.raises(ValueError, match="tensor 'transformer.h.0.ln_1.weight' must be of dtype .*got 'F4'"):
        hf.load(directory)
    text = b'{"a": {"dtype": "F32"}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="must start with a JSON header"):
        hf.load(directory)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
def test_a_parameter_of_integers_is_refused(dtype, tmp_path):
    directory = copy_golden("gpt_neo", tmp_path)
    name = "transformer.h.1.ln_1.bias"
    tensors = file_tensors(directory)
    one_file(directory, tensors | {name: tensors[name].astype(dtype)})
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor '{name}' must be of dtype \['BF16', "):
        hf.load(directory)
    table = tensors["transformer.wte.weight"]
    one_file(directory, tensors | {"lm_head.weight": table.astype(dtype)})  # tied, and read to be compared
    with pytest.raises(ValueError, match="tensor 'lm_head.weight' must be of dtype"):
        hf.load(directory)


def several(directory, parts, weight_map, name="model.safetensors"):
    for file, tensors in parts.items():
        safetensors.numpy.save_file(tensors, directory / file)
    (directory / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_goes_before_an_index_and_before_bin(tmp_path):
    directory = copy_golden("gpt2", tmp_path)
    tensors = file_tensors(directory)
    old = {name: x + 1 for name, x in tensors.items()}
    expected, older = (hf.load(GOLDEN / "gpt2")[1]["final_norm"]["bias"] + add for add in (0, 1))
    several(
        directory, {"model-00001-of-00001.safetensors": old}, dict.fromkeys(old, "model-00001-of-00001.safetensors")
    )
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    (directory / "pytorch_model.bin.index.json").write_text("never read")
    np.testing.assert_array_equal(hf.load(directory)[1]["final_norm"]["bias"], expected)
    (directory / "model.safetensors").unlink()
    np.testing.assert_array_equal(hf.load(directory)[1]["final_norm"]["bias"], older)
    (directory / "model-00001-of-00001.safetensors").unlink()
    one_file(directory, tensors)
    several(directory, {}, {"transformer.wte.weight": "gone.safetensors"})  # an index whose files are gone
    np.testing.assert_array_equal(hf.load(directory)[1]["final_norm"]["bias"], expected)


def test_an_index_and_its_files(tmp_path):
    directory = copy_golden("gpt2", tmp_path)
    tensors = file_tensors(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    half = {name: tensors[name] for name in names[::2]}
    rest = {name: tensors[name] for name in names[1::2]}
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 24, 24), np.uint8)}
    # A tensor that is in another file than its own is found, as transformers finds it; a mask may be twice, or nowhere.
    places = dict.fromkeys(half, "b.safetensors") | dict.fromkeys(rest, "a.safetensors")
    places |= dict.fromkeys(mask, "a.safetensors") | {"transformer.h.1.attn.bias": "a.safetensors"}
    several(directory, {"a.safetensors": half | mask, "b.safetensors": rest | mask}, places)
    equal(hf.load(directory)[1], hf.load(GOLDEN / "gpt2")[1])

    twice = names[0]
    several(directory, {"b.safetensors": rest | {twice: tensors[twice] + 1}}, places)
    with pytest.raises(ValueError, match=f"b.safetensors: tensor '{twice}' must stand in one file .*got .*a.safetens"):
        hf.load(directory)
    several(directory, {"b.safetensors": {name: x for name, x in rest.items() if name != names[1]}}, places)
    with pytest.raises(ValueError, match=f"must hold the tensor '{names[1]}' of shape .*got none"):
        hf.load(directory)
    several(directory, {}, [])
    with pytest.raises(
        ValueError, match=r"index.json: weight_map must be an object of tensors and their files, got \[\]"
    ):
        hf.load(directory)


def test_a_tensor_under_both_its_names_is_refused(tmp_path):
    directory = copy_golden("gpt2", tmp_path)
    tensors = file_tensors(directory)
    one_file(directory, tensors | {"wte.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match="'wte.weight'.* 'transformer.wte.weight'"):
        hf.load(directory)


def without_pad(vocab_size, directory):
    """A byte-level BPE whose ids end at `vocab_size`, EOS the only special token; for transformers, with a PAD."""
    tokenizers.train(["Some text about Mira and a fox."] * 9, vocab_size, directory)
    file = directory / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["added_tokens"] = raw["added_tokens"][:1]
    raw["model"]["vocab"]["<|former pad|>"] = raw["model"]["vocab"].pop("<|pad|>")
    file.write_text(json.dumps(raw))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    return tokenizers.load(directory).pretrained(pad=True)


def test_no_id_of_an_export_lies_beyond_its_embedding(tmp_path):
    tokenizer = without_pad(270, tmp_path / "tokenizer")
    vocab_size = tokenizer.pad_token_id  # added beyond all others
    assert vocab_size == 270 == len(tokenizer) - 1
    config, params = hf.load(GOLDEN / "gpt2")
    config = config.replace(vocab_size=vocab_size)
    params["embed"]["tokens"] = np.ones((config.padded_vocab_size, 16), np.float32)
    params["embed"]["tokens"][vocab_size:] = 0
    tokenizer(["A fox.", "Mira"], padding=True)  # leaves its PAD in the state of the encoder
    hf.save(tmp_path / "lm", config, params, tokenizer)

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    raw = transformers.AutoConfig.from_pretrained(tmp_path / "lm")
    rows = len(file_tensors(tmp_path / "lm")["transformer.wte.weight"])
    assert raw.vocab_size == rows == vocab_size
    assert raw.pad_token_id == raw.eos_token_id == theirs.pad_token_id == theirs.eos_token_id
    assert len(theirs) <= rows and max(theirs.get_vocab().values()) < rows
    batch = theirs(["A fox with <|pad|> in it.", "Mira"], padding=True)
    assert max(map(max, batch["input_ids"])) < rows and 0 in batch["attention_mask"][1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert "<|pad|>" not in (tmp_path / "lm" / name).read_text()
    assert tokenizer.pad_token_id == vocab_size and tokenizer.pad_token == "<|pad|>"  # the caller's is as it was
    again, params_again = hf.load(tmp_path / "lm")
    assert again == config
    equal(params_again, params)
    ours = tokenizers.load(tmp_path / "lm")
    assert ours.vocabulary() == {token: i for token, i in tokenizer.get_vocab().items() if i < vocab_size}
    assert ours.vocab_size == vocab_size and ours.pad == ""

    score = {name: x for name, x in params.items() if name != "head"}
    score["scalar_head"] = {"kernel": np.ones(16, np.float32), "bias": np.float32(0)}
    hf.save(tmp_path / "score", config.replace(head="scalar"), score, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "score")
    assert len(file_tensors(tmp_path / "score")["transformer.wte.weight"]) == len(theirs) == theirs.pad_token_id + 1


def test_other_tokens_beyond_the_embedding_are_refused(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    tokenizer = word_tokenizer(40)
    tokenizer.add_tokens(["extra"])  # id 41; PAD is 40
    with pytest.raises(ValueError, match="tokenizer must have ids below vocab_size=40 only, got 41 for 'extra'"):
        hf.save(tmp_path / "lm", config, params, tokenizer)
    tokenizer = word_tokenizer(40)
    tokenizer.unk_token = tokenizer.pad_token
    with pytest.raises(ValueError, match="tokenizer.unk_token_id must be below vocab_size=40, got 40"):
        hf.save(tmp_path / "lm", config, params, tokenizer)
    assert not (tmp_path / "lm").exists()


def names(directory):
    return sorted(file.name for file in directory.iterdir())


def test_an_export_replaces_all_of_an_earlier_one(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    templated = word_tokenizer(40, pad_id=1)
    templated.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    hf.save(tmp_path, config, params, templated, shard_bytes=8_000)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "w3"}')  # as older versions of transformers write
    assert {"chat_template.jinja", "additional_chat_templates", "model.safetensors.index.json"} < set(names(tmp_path))

    plain = word_tokenizer(40, pad_id=2)
    hf.save(tmp_path, config, params, plain)
    expected = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert names(tmp_path) == expected
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.chat_template, loaded.eos_token, loaded.pad_token) == (None, plain.eos_token, "w2")
    equal(hf.load(tmp_path)[1], params)
    hf.save(tmp_path, config, params)
    assert names(tmp_path) == expected[:2]


def test_bfloat16_rounds_to_the_nearest(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    hf.save(tmp_path / "one", config, params, dtype="bfloat16")
    hf.save(tmp_path / "several", config, params, dtype="bfloat16", shard_bytes=8_000)
    expected = {name: x.astype(jnp.bfloat16) for name, x in file_tensors(GOLDEN / "gpt2").items()}
    size = sum(2 * x.size for x in expected.values())
    assert size < (tmp_path / "one" / "model.safetensors").stat().st_size < size + 4_000
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = {name: x.astype(np.float32) for name, x in expected.items()}
    equal(hf.load(tmp_path / "one")[1], jax.tree.map(lambda x: np.float32(x.astype(jnp.bfloat16)), params))
    for directory in (tmp_path / "one", tmp_path / "several"):
        found = {}
        for file in directory.glob("*.safetensors"):
            found |= {name: np.float32(x) for name, x in safetensors.flax.load_file(file).items()}
        equal(found, rounded)
    with pytest.raises(ValueError, match=r"dtype must be one of \['bfloat16', 'float32'\], got 'float16'"):
        hf.save(tmp_path / "two", config, params, dtype="float16")


def test_generation_config_is_that_of_the_model(tmp_path):
    """What the source says stays, but for ids that this model does not have, or has in other places."""
    config, params = hf.load(GOLDEN / "gpt2")
    (tmp_path / "source").mkdir()
    given = {"do_sample": True, "temperature": 0.6, "eos_token_id": [5, 99, 7], "pad_token_id": 99, "bos_token_id": 3}
    file = tmp_path / "source" / "generation_config.json"
    file.write_text(json.dumps(given | {"transformers_version": "4.40.0", "_from_model_config": True}))
    assert hf.read_generation(tmp_path / "source") == given
    assert hf.read_generation(tmp_path) == {} == hf.read_generation(tmp_path / "nowhere")

    tokenizer = word_tokenizer(40)  # EOS is 39; PAD is 40, which EOS stands in for; no BOS
    hf.save(tmp_path / "lm", config, params, tokenizer, generation=given)
    expected = given | {"eos_token_id": [5, 7], "pad_token_id": 39, "bos_token_id": None}
    assert hf.read_generation(tmp_path / "lm") == expected
    hf.save(tmp_path / "lm", config, params, tokenizer, generation={"eos_token_id": [98, 99], "top_k": 4})
    assert hf.read_generation(tmp_path / "lm")["eos_token_id"] == 39
    hf.save(tmp_path / "lm", config, params, generation={"eos_token_id": 5})
    assert hf.read_generation(tmp_path / "lm") == {"eos_token_id": 5, "bos_token_id": None, "pad_token_id": None}
    hf.save(tmp_path / "lm", config, params)
    assert not (tmp_path / "lm" / "generation_config.json").exists()
    score = params | {"scalar_head": {"kernel": np.ones(16, np.float32), "bias": np.float32(0)}}
    hf.save(tmp_path / "lm", config.replace(head="scalar"), score, tokenizer, generation=given)
    assert not (tmp_path / "lm" / "generation_config.json").exists()

    file.write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be .*got \['</s>'\]"):
        hf.read_generation(tmp_path / "source")


def test_a_gguf_file_is_told_what_to_do_with(tmp_path):
    directory = copy_golden("gpt2", tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "gpt2.Q4_1.gguf").write_bytes(b"GGUF")
    command = f"make one with: python benchmarks/gguf_to_hf.py --gguf={directory}/gpt2.Q4_1.gguf --out=DIR"
    with pytest.raises(ValueError, match=f"must hold model.safetensors.*; got none of them; of .*{command}"):
        hf.load(directory)
    (directory / "config.json").unlink()
    entry = {"init_from": str(directory)}
    for place in (directory, directory / "gpt2.Q4_1.gguf"):
        with pytest.raises(ValueError, match=command):
            hf.load(place)
        with pytest.raises(ValueError, match=f"config.models.model.init_from must hold a checkpoint or .*{command}"):
            networks.shape("config.models.model", entry | {"init_from": str(place)})


def test_programs_that_the_command_line_compiled_are_no_part_of_an_export(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    for _ in range(2):
        (tmp_path / "out" / ".compiled").mkdir(parents=True, exist_ok=True)  # before the stage begins
        (tmp_path / "out" / ".compiled" / "jit_f-cache").write_bytes(b"")
        hf.save(tmp_path / "out", config, params)
        assert names(tmp_path / "out") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("foreign", ["merges.txt", "README.md", "pytorch_model.bin", "model.fp16.safetensors"])
def test_a_file_that_no_export_writes_is_refused(foreign, tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    hf.save(tmp_path, config, params, shard_bytes=8_000)
    (tmp_path / foreign).write_text("{}")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=f"directory must be empty or hold an earlier export, got .* with '{foreign}', wh"
    ):
        hf.save(tmp_path, config, params)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_models_and_tokenizers_of_others_are_refused(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    directory = copy_golden("gpt2", tmp_path)
    (directory / "expected.npz").unlink()
    with pytest.raises(
        ValueError, match="must be empty or hold an earlier export, got .*gpt2, which transformers wrote"
    ):
        hf.save(directory, config, params)
    word_tokenizer(40).save_pretrained(tmp_path / "tokenizer")
    before = names(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="hold an earlier export, got .*tokenizer without a model's config.json"):
        hf.save(tmp_path / "tokenizer", config, params)
    assert names(tmp_path / "tokenizer") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="directory must be a directory, got the file"):
        hf.save(tmp_path / "file", config, params)


def test_an_export_killed_at_any_moment_leaves_no_mixture(tmp_path, monkeypatch):
    """Stops the replacement after each of its steps: the folder is the old one, the new one, or opens for nobody."""
    config, old = hf.load(GOLDEN / "gpt2")
    new = {
        name: {key: x + 1 for key, x in part.items()} if name == "final_norm" else part for name, part in old.items()
    }
    replace, unlink = os.replace, type(tmp_path).unlink
    seen = []
    for limit in range(20):
        directory = tmp_path / str(limit)
        hf.save(directory, config, old, word_tokenizer(40, pad_id=1), shard_bytes=8_000)
        count = iter(range(limit))

        def step(do, count=count):
            def stopping(*arguments, **options):
                if next(count, None) is None:
                    raise KeyboardInterrupt
                return do(*arguments, **options)

            return stopping

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", step(replace))
            patch.setattr(type(tmp_path), "unlink", step(unlink))
            try:
                hf.save(directory, config, new)
                seen.append("whole")
            except KeyboardInterrupt:
                seen.append("")
        if (directory / "config.json").exists():
            seen[-1] = seen[-1] or "old"
            equal(hf.load(directory)[1], old if seen[-1] == "old" else new)
        else:
            with pytest.raises(ValueError, match="config.json must exist"):
                hf.load(directory)
        hf.save(directory, config, new)  # goes on from there
        assert names(directory) == ["config.json", "model.safetensors"]
        equal(hf.load(directory)[1], new)
        if seen[-1] == "whole":
            break
    assert seen[0] == "old" and seen[-1] == "whole" and len(seen) > 5 and not any(seen[1:-1])
