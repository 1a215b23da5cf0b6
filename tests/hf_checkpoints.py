"""Small checkpoints for the tests: golden files, copies to spoil, and random ones (building those imports torch)."""

import json
import pathlib
import shutil

import jax
import numpy as np
import safetensors.numpy
import tokenizers
import transformers

from instructgpt_jax import models

GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf"
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # these programs run once
_SHAPE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_SHAPE |= {"intermediate_size": 40}
_GPT = {"vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
_HALF = {"rope_theta": 1e4, "partial_rotary_factor": 0.67}
_OPT = _SHAPE | {"intermediate_size": None, "ffn_dim": 40}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 50.0}

# Name -> (class of transformers, configuration). Together they switch every option that the tables know.
CASES = {
    "gpt2": ("GPT2", _GPT),
    "gpt_neo": (
        "GPTNeo",
        _SHAPE
        | {"num_hidden_layers": None, "num_layers": 2, "num_attention_heads": None, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    "gptj": ("GPTJ", _GPT | {"rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", _SHAPE | {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.34}}),
    "gpt_neox_sequential": (
        "GPTNeoX",
        _SHAPE | {"use_parallel_residual": False, "attention_bias": False, "rope_parameters": _HALF},
    ),
    "opt": ("OPT", _OPT),
    "opt_projected": ("OPT", _OPT | {"word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    "llama": ("Llama", _GROUPED),
    "llama_options": (
        "Llama",
        _GROUPED
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8}
        | {"rope_parameters": LLAMA3},
    ),
    "llama_linear": ("Llama", _SHAPE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama_yarn": (
        "Llama",
        _GROUPED
        | {"head_dim": 16}
        | {"rope_parameters": YARN | {"beta_fast": 3, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        _GROUPED
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        "Gemma3Text",
        _GROUPED
        | {"num_hidden_layers": 3, "head_dim": 8, "query_pre_attn_scalar": 6, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    ),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 8, "rope_parameters": YARN}),
}


def build(case: str, head: str = "ForCausalLM", seed: int = 0, **changes):
    """A torch model with every parameter random: biases and norms too are away from their defaults."""
    import torch

    name, options = CASES[case]
    options = {key: value for key, value in (options | changes).items() if value is not None}
    options |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": options.get("pad_token_id", 0)}
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    head = "LMHeadModel" if name == "GPT2" and head == "ForCausalLM" else head
    start = 0 if name.startswith("Gemma") else 1  # of a norm's weight
    name = name.removesuffix("Text") if head == "ForCausalLM" else name
    torch.manual_seed(seed)
    model = getattr(transformers, name + head)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in parameter_name or "ln_" in parameter_name:
                parameter.copy_(0.3 * noise + (start if parameter_name.endswith("weight") else 0))
            else:
                parameter.copy_(noise * (0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5))
    return model


def write(case: str, directory: pathlib.Path, **options) -> object:
    """Builds a model, saves it with transformers and returns it."""
    model = build(case, **options)
    model.save_pretrained(directory)
    return model


def compiled(f, *arguments):
    return jax.jit(f).lower(*arguments).compile(compiler_options=QUICK)(*arguments)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


def file_tensors(directory):
    """Name -> array, read by the safetensors library itself."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def count_params(config):
    """Parameters that init makes, less what pads the vocabulary."""
    shapes = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    padded = sum(x.size for x in jax.tree.leaves(shapes))
    rows = config.padded_vocab_size - config.vocab_size
    tables = 1 if config.tied_embeddings or config.head == "scalar" else 2
    bias = config.head_bias and config.head == "lm"
    return padded - rows * (tables * config.embedding_width + bias)


def random_parameters(config):
    """Parameters of the right shapes, drawn by numpy: nothing to compile."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
    for table in [params["embed"]["tokens"], *params.get("head", {}).values()]:
        table[config.vocab_size :] = 0
    return params


def copy_golden(family, directory):
    """A golden checkpoint where it can be spoilt."""
    return pathlib.Path(shutil.copytree(GOLDEN / family, directory / family))


def edit_config(directory, **changes):
    file = directory / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def word_tokenizer(size, pad_id=None):
    """`size` words, the last of them EOS; PAD is one of them, or comes after."""
    words = [f"w{i}" for i in range(size - 1)] + ["<|endoftext|>"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>" if pad_id is None else f"w{pad_id}"})
    return tokenizer
