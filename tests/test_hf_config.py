"""config.json in both directions: published models, families found from the fields, and every kind of bad input."""

import json

import numpy as np
import pytest
import safetensors.numpy
import transformers
from hf_checkpoints import GOLDEN, copy_golden, count_params, edit_config, file_tensors, random_parameters

from instructgpt_jax import models
from instructgpt_jax.models import hf
from instructgpt_jax.models.hf import fields, loading

# config.json as the models' publishers wrote them (the keys that matter, and some that do not), and the published
# number of parameters.
PUBLISHED = {
    "GPT-2": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_ctx": 1024}
        | {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "resid_pdrop": 0.1}
        | {"summary_type": "cls_index", "task_specific_params": {"text-generation": {"do_sample": True}}},
        124_439_808,
        {"positions": "learned", "tied_embeddings": True, "residual_dropout": 0.0},
    ),
    "GPT-Neo 1.3B": (
        {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "activation_function": "gelu_new"}
        | {"attention_layers": ["global", "local"] * 12, "attention_types": [[["global", "local"], 12]]}
        | {"num_heads": 16}
        | {"hidden_size": 2048, "intermediate_size": None, "num_layers": 24, "max_position_embeddings": 2048}
        | {"vocab_size": 50257, "window_size": 256, "gradient_checkpointing": False},
        1_315_575_808,
        {"windows": (0, 256), "attention_scale": 1.0, "qkv_bias": False},
    ),
    "GPT-J 6B": (
        {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "activation_function": "gelu_new", "n_embd": 4096}
        | {"n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048, "rotary": True, "rotary_dim": 64}
        | {"scale_attn_weights": True, "tie_word_embeddings": False, "vocab_size": 50400},
        6_050_882_784,
        {"residual": "parallel_shared_norm", "rotary_width": 64, "rotary_interleaved": True, "head_bias": True},
    ),
    "Pythia 160M": (
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 768}
        | {"intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "rotary_pct": 0.25}
        | {"num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10000, "vocab_size": 50304}
        | {"tie_word_embeddings": False, "use_parallel_residual": True, "torch_dtype": "float16"},
        162_322_944,
        {"residual": "parallel", "rotary_width": 16, "activation": "gelu"},
    ),
    "OPT 125M": (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "activation_function": "relu", "ffn_dim": 3072}
        | {"hidden_size": 768, "max_position_embeddings": 2048, "num_attention_heads": 12, "num_hidden_layers": 12}
        | {"vocab_size": 50272, "word_embed_proj_dim": 768, "do_layer_norm_before": True, "prefix": "</s>"}
        | {"_remove_final_layer_norm": False, "activation_dropout": 0.0, "layerdrop": 0.0},
        125_239_296,
        {"position_offset": 2, "activation": "relu"},
    ),
    "OPT 350M": (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "activation_function": "relu", "ffn_dim": 4096}
        | {"hidden_size": 1024, "max_position_embeddings": 2048, "num_attention_heads": 16, "num_hidden_layers": 24}
        | {"vocab_size": 50272, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
        331_196_416,
        {"embedding_width": 512, "residual": "post_norm"},
    ),
    "Llama 3.1 8B": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096}
        | {"intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8}
        | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256}
        | {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False}
        | {"rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
           | {"original_max_position_embeddings": 8192}},  # fmt: skip
        8_030_261_248,
        {"rotary_theta": 500_000.0, "num_kv_heads": 8, "head_width": 128},
    ),
    "Mistral 7B": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096}
        | {"intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
        | {"sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000},
        7_241_732_096,
        {"windows": (4096,)},
    ),
    "Qwen2.5 0.5B": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896}
        | {"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "vocab_size": 151936}
        | {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06}
        | {"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False}
        | {"use_sliding_window": False},
        494_032_768,
        {"windows": (0,), "qkv_bias": True, "out_bias": False, "rotary_theta": 1e6},
    ),
    "Qwen3 0.6B": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "hidden_size": 1024}
        | {"head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28}
        | {"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06}
        | {"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True}
        | {"use_sliding_window": False, "vocab_size": 151936, "attention_bias": False},
        596_049_920,
        {"qk_norm": True, "head_width": 128},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name, tmp_path):
    raw, num_params, fields = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = hf.read_config(tmp_path)
    assert count_params(config) == num_params
    assert {field: getattr(config, field) for field in fields} == fields
    assert hf.family_of(config).model_type == raw["model_type"]


@pytest.mark.parametrize("name", [name for name in models.SIZES if name.startswith("gpt3")])
def test_gpt3_sizes_are_gpt2s(name):
    assert hf.family_of(models.SIZES[name].replace(residual_dropout=0.1, dtype="bfloat16")).model_type == "gpt2"


def test_family_is_inferred_or_the_fields_are_named(tmp_path):
    size = models.SIZES["gpt3-125m"]
    assert hf.family_of(size.replace(windows=(0, 256), qkv_bias=False, attention_scale=1.0)).model_type == "gpt_neo"
    with pytest.raises(ValueError, match=r"families.*the nearest, gpt2, does not have windows=\(0, 256\)"):
        hf.family_of(size.replace(windows=(0, 256)))
    with pytest.raises(ValueError, match="norm='rmsnorm'"):
        hf.save(tmp_path / "x", size.replace(norm="rmsnorm"), {})
    assert not (tmp_path / "x").exists()


BAD_OPTIONS = [
    ("gpt2", {"model_type": "mixtral"}, "model_type must be one of .*got 'mixtral'"),
    ("gpt2", {"activation_function": "mish"}, "activation_function must be one of .*got 'mish'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, .*got True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False"),
    ("gpt2", {"is_causal": False}, "is_causal must be True, the only value that is computed here, got False"),
    ("gpt2", {"transformers_weights": "other.safetensors"}, "transformers_weights must be None"),
    ("gpt2", {"hidden_size": 24}, "hidden_size must be 16, the only value that is computed here, got 24"),
    ("gpt2", {"sliding_window": 5}, "sliding_window must be at least the context of 24, got 5"),
    ("gpt_neox", {"head_dim": 8}, "head_dim must be 4, the width divided among the heads, got 8"),
    ("gpt2", {"n_layer": "absent"}, "n_layer must be given"),
    ("gpt2", {"n_layer": "2"}, "n_layer must be of type int, got '2'"),
    ("gpt2", {"n_embd": 18}, "width must be a multiple of num_heads, got 18 and 4"),
    ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "architectures must be one of .*DoubleHeads"),
    ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "id2label must have one label.*got 2"),
    ("gpt2", {"reward_bias": "high"}, "reward_bias must be a finite number, got 'high'"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be 'full_attention' for"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config must be None"),
    ("llama", {"quantization": {"bits": 4}}, "quantization must be None"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        r"rope_parameters.rope_type must be one of \['default', 'linear', 'llama3', 'yarn'\], got 'longrope'",
    ),
    ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling of type 'yarn' must have the options .*none of"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "no"}}, "rope_scaling.truncate must be true"),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 2.0}}}, r"the same for all.*\['full_attention'\]"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type must be .*got 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' must have the options"),
    ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor must be 1"),
    ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
    ("gpt_neo", {"attention_types": [[["global", "sparse"], 1]]}, "attention_types must give 'global' or 'local'"),
    ("gpt_neo", {"attention_layers": ["local", "local"]}, "attention_layers must say the same as attention_types"),
    ("gptj", {"rotary_dim": None}, "rotary_dim must be given"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine must be True"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm must be False"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types must be"),
    ("gemma3_text", {"model_type": "gemma3"}, "model_type must be one of .*got 'gemma3'"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be None, .*got 30.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be False, .*got True"),
    ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types must be .* for each of 2 layers, got"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window must be a number of at least 1 .*got None"),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must be at least 1"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive, got 0"),
    ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, .*got {0.5}"),
    ("gemma3_text", {"rope_parameters": {"full_attention": 5}}, "rope_parameters must be an object of objects"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.rope_type must be .*'dynamic'"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.sliding_attention.rope_type must be 'default', got 'linear'",
    ),
]


@pytest.fixture
def no_device_memory(monkeypatch):
    def taken(*_):
        raise AssertionError("device memory was taken before the error")

    monkeypatch.setattr(loading, "_put", taken)


@pytest.mark.parametrize(
    "family, changes, message", BAD_OPTIONS, ids=[f"{f}-{next(iter(c))}" for f, c, _ in BAD_OPTIONS]
)
def test_bad_options_are_named(family, changes, message, no_device_memory, tmp_path):
    directory = copy_golden(family, tmp_path)
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=message) as error:
        hf.load(directory)
    assert str(directory / "config.json") in str(error.value)


# Keys of real checkpoints that no class of transformers knows, options of other architectures, other names of a key.
NO_MATTER = [
    ("gpt2", {"output_past": True, "unk_token_id": 0, "auto_map": {"AutoModel": "modeling_x.X"}}),
    ("gpt2", {"alibi": True, "hidden_size": 16, "num_attention_heads": 4}),
    ("gpt_neo", {"unk_token_id": None, "renormalize_logits": True}),
    ("llama", {"num_local_experts": 8, "unsloth_version": "2025.1", "max_new_tokens": 9}),
    ("gemma3_text", {"tie_vision": True}),
]

YARN = {"kind": "yarn", "factor": 4.0, "original_max_position": 24, "beta_fast": 32.0, "beta_slow": 1.0} | {
    "attention_factor": pytest.approx(1.1386294361119891),  # 0.1 ln 4 + 1
    "truncate": True,
}
ROTARY = [  # options in config.json -> the scaling, and the context
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, YARN, 96),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8}}, YARN | {"beta_fast": 8.0}, 96),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5, "truncate": False}},
        YARN | {"original_max_position": 5, "truncate": False},
        24,  # of max_position_embeddings, which is more than four times 5
    ),
    (
        # A key of its own counts before the option of that name, in transformers as well.
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 12},
        YARN | {"original_max_position": 12},
        48,
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": 1}},
        YARN | {"attention_factor": 1.0},
        96,
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 2.5, "mscale": 1, "mscale_all_dim": 1}},
        YARN | {"attention_factor": 2.5},
        96,
    ),
    ({"rope_scaling": {"type": "linear", "factor": 3.0}}, {"kind": "linear", "factor": 3.0}, 24),
]


@pytest.mark.parametrize("keys, scaling, context", ROTARY)
def test_scaling_of_rotary_positions(keys, scaling, context, tmp_path):
    directory = copy_golden("llama", tmp_path)
    edit_config(directory, **({"rope_parameters": "absent", "rope_theta": 100.0} | keys))
    config = hf.read_config(directory)
    assert dict(config.rotary_scaling) == scaling and config.max_length == context
    assert config.rotary_theta == 100.0
    hf.save(tmp_path / "again", config, random_parameters(config))
    assert hf.read_config(tmp_path / "again") == config


GEMMA = [  # keys of config.json -> (base, base in layers with a window, scaling), windows of seven layers
    ({"rope_parameters": "absent"}, (1e6, 1e4, {}), [5, 5, 5, 5, 5, 0, 5]),
    (
        {"rope_parameters": "absent", "rope_theta": 300, "rope_local_base_freq": 20, "sliding_window_pattern": 3}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        (300.0, 20.0, {"kind": "linear", "factor": 8.0}),
        [5, 5, 0, 5, 5, 0, 5],
    ),
    (
        {"rope_parameters": {"sliding_attention": {"rope_theta": 7.0}}, "rope_theta": 300}
        | {"_sliding_window_pattern": 3},
        (300.0, 7.0, {}),
        [5, 5, 5, 5, 5, 0, 5],
    ),
]


@pytest.mark.parametrize("keys, rotary, windows", GEMMA)
def test_gemmas_two_bases_and_windows(keys, rotary, windows, tmp_path):
    """As transformers reads them; the last case: its own note of the pattern counts no more where it is read back."""
    directory = copy_golden("gemma3_text", tmp_path)
    edit_config(directory, **({"num_hidden_layers": 7, "layer_types": "absent"} | keys))
    config, theirs = hf.read_config(directory), transformers.AutoConfig.from_pretrained(directory)
    assert (config.rotary_theta, config.local_rotary_theta, dict(config.rotary_scaling)) == rotary
    assert list(config.layer_windows) == windows
    assert windows == [5 if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
    dense, local = (theirs.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    assert (dense["rope_theta"], local["rope_theta"], dense.get("factor")) == (*rotary[:2], rotary[2].get("factor"))
    hf.save(tmp_path / "again", config, random_parameters(config))
    assert hf.read_config(tmp_path / "again") == config


def test_options_inside_rotary_scaling_that_change_nothing_are_told(caplog, tmp_path):
    directory = copy_golden("llama", tmp_path)
    with caplog.at_level("WARNING", "absl"):
        edit_config(directory, rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 8, "finetuned": True})
        hf.read_config(directory)
        edit_config(directory, some_key=1, transformers_version="17.0.1")
        hf.read_config(directory)
        gemma = copy_golden("gemma3_text", tmp_path)
        options = json.loads((gemma / "config.json").read_text())["rope_parameters"]
        edit_config(gemma, rope_parameters=options | {"rope_theta": 3.0})
        assert hf.read_config(gemma) == hf.read_config(GOLDEN / "gemma3_text")
    first, second, third = caplog.messages
    assert "config.json: ignored rope_parameters.rope_theta, which change nothing in 'gemma3_text'" in third
    assert "config.json: ignored rope_scaling.beta_fast, rope_scaling.finetuned, which" in first
    assert "some_key, which change nothing in 'llama' of transformers 5" in second
    assert second.endswith(" (the file is of 17.0.1, which may know them)")


@pytest.mark.parametrize("family, extra", NO_MATTER, ids=[f"{f}-{next(iter(e))}" for f, e in NO_MATTER])
def test_keys_that_change_nothing_are_told_once(family, extra, caplog, tmp_path):
    directory = copy_golden(family, tmp_path)
    expected = hf.read_config(directory)
    edit_config(directory, **extra)
    with caplog.at_level("WARNING", "absl"):
        assert hf.read_config(directory) == expected
        assert hf.load(directory)[0] == expected
    (line,) = caplog.messages
    assert line.startswith(f"{directory}/config.json: ignored {', '.join(sorted(extra))}, which change nothing")


def test_keys_that_say_nothing_new_are_not_told(caplog, tmp_path):
    directory = copy_golden("gpt2", tmp_path)
    edit_config(directory, torch_dtype="float16", do_sample=True, max_length=50, sliding_window=1_000, use_cache=False)
    with caplog.at_level("WARNING", "absl"):
        assert hf.read_config(directory) == hf.read_config(GOLDEN / "gpt2")
    assert not caplog.messages


def test_a_key_that_only_transformers_knows_must_stand_at_its_default(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(fields, "IGNORED", fields.IGNORED - {"chunk_size_feed_forward"})
    directory = copy_golden("qwen3", tmp_path)
    edit_config(directory, chunk_size_feed_forward=0)
    with caplog.at_level("WARNING", "absl"):
        hf.read_config(directory)
    assert "config.json: ignored chunk_size_feed_forward, which" in caplog.text
    edit_config(directory, chunk_size_feed_forward=2)
    with pytest.raises(ValueError, match="config.json: chunk_size_feed_forward must be 0, .*got 2"):
        hf.read_config(directory)


def test_bad_files_are_named(no_device_memory, tmp_path):
    directory = copy_golden("gpt2", tmp_path)
    file = directory / "model.safetensors"
    tensors, whole = file_tensors(directory), file.read_bytes()
    name = "transformer.h.1.mlp.c_fc.weight"

    def fails(message):
        with pytest.raises(ValueError, match=message):
            hf.load(directory)

    safetensors.numpy.save_file({key: x for key, x in tensors.items() if key != name}, file)
    fails(rf"must hold the tensor '{name}' of shape \(16, 64\), got none")
    safetensors.numpy.save_file(tensors | {name: tensors[name].T.copy()}, file)
    fails(rf"model.safetensors: tensor '{name}' must have shape \(16, 64\), got \(64, 16\)")
    safetensors.numpy.save_file(tensors | {"transformer.h.2.ln_1.bias": np.zeros(16, np.float32)}, file)
    fails("tensor 'transformer.h.2.ln_1.bias' of shape .* is unexpected")
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.int32)}, file)
    fails(f"tensor '{name}' must be of dtype .*got 'I32'")
    file.write_bytes(whole[:-1])
    fails(rf"model.safetensors must have {len(whole)} bytes by its header, got {len(whole) - 1}")
    file.write_bytes(whole[:100])
    fails("model.safetensors must have a header of")
    file.write_bytes(b"\x10" + bytes(7) + b"not json at all!" + whole)
    fails("must start with a JSON header")
    file.unlink()
    fails("must hold model.safetensors, model.safetensors.index.json, or pytorch_model.bin; got none")
    (directory / "config.json").write_text("{")
    fails("config.json must be JSON")
    (directory / "config.json").unlink()
    fails("config.json must exist")

    directory = copy_golden("llama", tmp_path)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    fails(f"index.json names 1 files that must stand beside it, got none of .*{shard.name}")


def test_bad_parameters_are_named(tmp_path):
    config, params = hf.load(GOLDEN / "gpt2")
    params["blocks"]["mlp"]["up"]["bias"] = params["blocks"]["mlp"]["up"]["bias"][:, :-1]
    with pytest.raises(ValueError, match=r"params must have blocks/mlp/up/bias of shape \(2, 64\), got \(2, 63\)"):
        hf.save(tmp_path, config, params)
    with pytest.raises(ValueError, match="directory must be a local one, got 'gs://bucket/model'"):
        hf.save("gs://bucket/model", config, params)
