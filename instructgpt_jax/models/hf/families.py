"""One table for each family of checkpoints: gpt2, gpt_neo, gptj, gpt_neox, opt, llama, mistral, qwen2, qwen3, gemma3.

Layouts are those of layout.py, `{}` is the layer. A parameter that a configuration does not have (a bias, a gate) is
skipped.
"""

from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.models.hf.fields import REQUIRED, Family, canonical, differences
from instructgpt_jax.models.hf.gemma import gemma3
from instructgpt_jax.models.hf.rules import (
    EVEN_HEAD_WIDTH,
    GPT_NEO_WINDOWS,
    MISTRAL_WINDOW,
    NO_WINDOWS,
    QWEN_WINDOWS,
    activation,
    flag,
    rotary,
)


def _four_times(fields):
    return 4 * fields["width"]


def _same_as(field):
    return lambda fields: fields[field]


def _even_share(fields):
    return fields["width"] // fields["num_heads"]


def _norm(path: str, name: str) -> dict:
    return {f"{path}/scale": (f"{name}.weight", "D"), f"{path}/bias": (f"{name}.bias", "D")}


def _linear(path: str, name: str, kernel: str, bias: str) -> dict:
    return {f"{path}/kernel": (f"{name}.weight", kernel), f"{path}/bias": (f"{name}.bias", bias)}


SCORE = {"scalar_head/kernel": ("score.weight", "1 E")}

_H = "transformer.h.{}."
_GPT_EMBEDDINGS = {
    "embed/tokens": ("transformer.wte.weight", "V E"),
    **_norm("final_norm", "transformer.ln_f"),
    "head/kernel": ("lm_head.weight", "V E"),
    "head/bias": ("lm_head.bias", "V"),
    **SCORE,
}

# GPT-2 keeps its matrices (in, out), the transpose of everyone else's.
GPT2 = Family(
    model_type="gpt2",
    causal="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    prefix="transformer.",
    tensors={
        **_GPT_EMBEDDINGS,
        "embed/positions": ("transformer.wpe.weight", "P D"),
        **_norm("blocks/norm1", _H + "ln_1"),
        **_linear("blocks/attention/query", _H + "attn.c_attn", "D (0/3 N H)", "(0/3 N H)"),
        **_linear("blocks/attention/key", _H + "attn.c_attn", "D (1/3 M H)", "(1/3 M H)"),
        **_linear("blocks/attention/value", _H + "attn.c_attn", "D (2/3 M H)", "(2/3 M H)"),
        **_linear("blocks/attention/out", _H + "attn.c_proj", "(N H) D", "D"),
        **_norm("blocks/norm2", _H + "ln_2"),
        **_linear("blocks/mlp/up", _H + "mlp.c_fc", "D F", "F"),
        **_linear("blocks/mlp/down", _H + "mlp.c_proj", "F D", "D"),
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "num_layers": ("n_layer", REQUIRED),
        "width": ("n_embd", REQUIRED),
        "num_heads": ("n_head", REQUIRED),
        "mlp_width": ("n_inner", _four_times),
        "max_length": ("n_positions", REQUIRED),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied_embeddings": ("tie_word_embeddings", True),
    },
    constants={},
    rules=(
        activation("activation_function", "gelu_new"),
        flag("scale_attn_weights", True, attention_scale=(None, 1.0)),
        NO_WINDOWS,
    ),
    fixed={"scale_attn_by_inverse_layer_idx": False},
    dropouts={"residual_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop", "attention_dropout": "attn_pdrop"},
    ignored="n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout",
    buffers=r"\.attn\.(masked_)?bias$",
)

# Scores are not scaled; every second layer sees a local window.
GPT_NEO = Family(
    model_type="gpt_neo",
    causal="GPTNeoForCausalLM",
    classifier="GPTNeoForSequenceClassification",
    prefix="transformer.",
    tensors={
        **_GPT_EMBEDDINGS,
        "embed/positions": ("transformer.wpe.weight", "P D"),
        **_norm("blocks/norm1", _H + "ln_1"),
        "blocks/attention/query/kernel": (_H + "attn.attention.q_proj.weight", "(N H) D"),
        "blocks/attention/key/kernel": (_H + "attn.attention.k_proj.weight", "(M H) D"),
        "blocks/attention/value/kernel": (_H + "attn.attention.v_proj.weight", "(M H) D"),
        **_linear("blocks/attention/out", _H + "attn.attention.out_proj", "D (N H)", "D"),
        **_norm("blocks/norm2", _H + "ln_2"),
        **_linear("blocks/mlp/up", _H + "mlp.c_fc", "F D", "F"),
        **_linear("blocks/mlp/down", _H + "mlp.c_proj", "D F", "D"),
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "num_layers": ("num_layers", REQUIRED),
        "width": ("hidden_size", REQUIRED),
        "num_heads": ("num_heads", REQUIRED),
        "mlp_width": ("intermediate_size", _four_times),
        "max_length": ("max_position_embeddings", REQUIRED),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied_embeddings": ("tie_word_embeddings", True),
    },
    constants={"qkv_bias": False, "attention_scale": 1.0},
    rules=(activation("activation_function", "gelu_new"), GPT_NEO_WINDOWS, NO_WINDOWS),
    fixed={},
    dropouts={
        "residual_dropout": "resid_dropout",
        "embedding_dropout": "embed_dropout",
        "attention_dropout": "attention_dropout",
    },
    ignored="summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout",
    buffers=r"\.attn\.attention\.(masked_)?bias$",
)

GPTJ = Family(
    model_type="gptj",
    causal="GPTJForCausalLM",
    classifier="GPTJForSequenceClassification",
    prefix="transformer.",
    tensors={
        **_GPT_EMBEDDINGS,
        **_norm("blocks/norm1", _H + "ln_1"),
        "blocks/attention/query/kernel": (_H + "attn.q_proj.weight", "(N H) D"),
        "blocks/attention/key/kernel": (_H + "attn.k_proj.weight", "(M H) D"),
        "blocks/attention/value/kernel": (_H + "attn.v_proj.weight", "(M H) D"),
        "blocks/attention/out/kernel": (_H + "attn.out_proj.weight", "D (N H)"),
        **_linear("blocks/mlp/up", _H + "mlp.fc_in", "F D", "F"),
        **_linear("blocks/mlp/down", _H + "mlp.fc_out", "D F", "D"),
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "num_layers": ("n_layer", REQUIRED),
        "width": ("n_embd", REQUIRED),
        "num_heads": ("n_head", REQUIRED),
        "mlp_width": ("n_inner", _four_times),
        "max_length": ("n_positions", REQUIRED),
        "rotary_width": ("rotary_dim", REQUIRED),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied_embeddings": ("tie_word_embeddings", False),
    },
    constants={
        "positions": "rotary",
        "rotary_interleaved": True,
        "residual": "parallel_shared_norm",
        "qkv_bias": False,
        "out_bias": False,
        "head_bias": True,
    },
    rules=(activation("activation_function", "gelu_new"), NO_WINDOWS),
    fixed={"rotary": True, "scale_attn_weights": True},
    dropouts={"residual_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop", "attention_dropout": "attn_pdrop"},
    ignored="n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout",
    buffers=r"\.attn\.((masked_)?bias|embed_positions)$",
)

_NEOX = "gpt_neox.layers.{}."

# Queries, keys and values lie side by side within each head.
GPT_NEOX = Family(
    model_type="gpt_neox",
    causal="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    prefix="gpt_neox.",
    tensors={
        "embed/tokens": ("gpt_neox.embed_in.weight", "V E"),
        **_norm("blocks/norm1", _NEOX + "input_layernorm"),
        **_linear("blocks/attention/query", _NEOX + "attention.query_key_value", "(N 0/3 H) D", "(N 0/3 H)"),
        **_linear("blocks/attention/key", _NEOX + "attention.query_key_value", "(M 1/3 H) D", "(M 1/3 H)"),
        **_linear("blocks/attention/value", _NEOX + "attention.query_key_value", "(M 2/3 H) D", "(M 2/3 H)"),
        **_linear("blocks/attention/out", _NEOX + "attention.dense", "D (N H)", "D"),
        **_norm("blocks/norm2", _NEOX + "post_attention_layernorm"),
        **_linear("blocks/mlp/up", _NEOX + "mlp.dense_h_to_4h", "F D", "F"),
        **_linear("blocks/mlp/down", _NEOX + "mlp.dense_4h_to_h", "D F", "D"),
        **_norm("final_norm", "gpt_neox.final_layer_norm"),
        "head/kernel": ("embed_out.weight", "V E"),
        **SCORE,
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "num_layers": ("num_hidden_layers", REQUIRED),
        "width": ("hidden_size", REQUIRED),
        "num_heads": ("num_attention_heads", REQUIRED),
        "mlp_width": ("intermediate_size", REQUIRED),
        "max_length": ("max_position_embeddings", REQUIRED),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "tied_embeddings": ("tie_word_embeddings", False),
    },
    constants={},
    rules=(
        activation("hidden_act", "gelu"),
        rotary("rotary_emb_base", "rotary_pct", 0.25),
        flag("use_parallel_residual", True, residual=("parallel", "sequential")),
        EVEN_HEAD_WIDTH,
        NO_WINDOWS,
        flag("attention_bias", True, qkv_bias=(True, False), out_bias=(True, False)),
    ),
    fixed={},
    dropouts={"residual_dropout": "hidden_dropout", "attention_dropout": "attention_dropout"},
    buffers=r"attention\.((masked_)?bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))$",
)

_OPT = "model.decoder.layers.{}."

OPT = Family(
    model_type="opt",
    causal="OPTForCausalLM",
    classifier="OPTForSequenceClassification",
    prefix="model.",
    tensors={
        "embed/tokens": ("model.decoder.embed_tokens.weight", "V E"),
        "embed/positions": ("model.decoder.embed_positions.weight", "P D"),
        "embed/project_in": ("model.decoder.project_in.weight", "D E"),
        "embed/project_out": ("model.decoder.project_out.weight", "E D"),
        **_norm("blocks/norm1", _OPT + "self_attn_layer_norm"),
        **_linear("blocks/attention/query", _OPT + "self_attn.q_proj", "(N H) D", "(N H)"),
        **_linear("blocks/attention/key", _OPT + "self_attn.k_proj", "(M H) D", "(M H)"),
        **_linear("blocks/attention/value", _OPT + "self_attn.v_proj", "(M H) D", "(M H)"),
        **_linear("blocks/attention/out", _OPT + "self_attn.out_proj", "D (N H)", "D"),
        **_norm("blocks/norm2", _OPT + "final_layer_norm"),
        **_linear("blocks/mlp/up", _OPT + "fc1", "F D", "F"),
        **_linear("blocks/mlp/down", _OPT + "fc2", "D F", "D"),
        **_norm("final_norm", "model.decoder.final_layer_norm"),
        "head/kernel": ("lm_head.weight", "V E"),
        **SCORE,
    },
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "num_layers": ("num_hidden_layers", REQUIRED),
        "width": ("hidden_size", REQUIRED),
        "embedding_width": ("word_embed_proj_dim", _same_as("width")),
        "num_heads": ("num_attention_heads", REQUIRED),
        "mlp_width": ("ffn_dim", REQUIRED),
        "max_length": ("max_position_embeddings", REQUIRED),
        "tied_embeddings": ("tie_word_embeddings", True),
    },
    constants={"position_offset": 2, "norm_eps": 1e-5},
    rules=(
        activation("activation_function", "relu"),
        flag("do_layer_norm_before", True, residual=("sequential", "post_norm")),
        NO_WINDOWS,
        flag("enable_bias", True, qkv_bias=(True, False), out_bias=(True, False), mlp_bias=(True, False)),
    ),
    fixed={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    dropouts={"residual_dropout": "dropout", "attention_dropout": "attention_dropout"},
    ignored="activation_dropout layerdrop",
    buffers=r"decoder\.version$",
)

_LLAMA = "model.layers.{}."
_LLAMA_TENSORS = {
    "embed/tokens": ("model.embed_tokens.weight", "V E"),
    **_norm("blocks/norm1", _LLAMA + "input_layernorm"),
    **_linear("blocks/attention/query", _LLAMA + "self_attn.q_proj", "(N H) D", "(N H)"),
    **_linear("blocks/attention/key", _LLAMA + "self_attn.k_proj", "(M H) D", "(M H)"),
    **_linear("blocks/attention/value", _LLAMA + "self_attn.v_proj", "(M H) D", "(M H)"),
    "blocks/attention/query_norm/scale": (_LLAMA + "self_attn.q_norm.weight", "H"),
    "blocks/attention/key_norm/scale": (_LLAMA + "self_attn.k_norm.weight", "H"),
    **_linear("blocks/attention/out", _LLAMA + "self_attn.o_proj", "D (N H)", "D"),
    **_norm("blocks/norm2", _LLAMA + "post_attention_layernorm"),
    **_linear("blocks/mlp/up", _LLAMA + "mlp.up_proj", "F D", "F"),
    **_linear("blocks/mlp/gate", _LLAMA + "mlp.gate_proj", "F D", "F"),
    **_linear("blocks/mlp/down", _LLAMA + "mlp.down_proj", "D F", "D"),
    **_norm("final_norm", "model.norm"),
    "head/kernel": ("lm_head.weight", "V E"),
    **SCORE,
}
_LLAMA_FIELDS = {
    "vocab_size": ("vocab_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "width": ("hidden_size", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "num_kv_heads": ("num_key_value_heads", _same_as("num_heads")),
    "mlp_width": ("intermediate_size", REQUIRED),
    "max_length": ("max_position_embeddings", REQUIRED),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied_embeddings": ("tie_word_embeddings", False),
}
_LLAMA_CONSTANTS = {"norm": "rmsnorm", "gated_mlp": True, "mlp_bias": False, "qkv_bias": False, "out_bias": False}
_BIASES = flag("attention_bias", False, qkv_bias=(True, False), out_bias=(True, False))

LLAMA = Family(
    model_type="llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    prefix="model.",
    tensors=_LLAMA_TENSORS,
    fields=_LLAMA_FIELDS | {"head_width": ("head_dim", _even_share)},
    constants=_LLAMA_CONSTANTS,
    rules=(
        activation("hidden_act", "silu"),
        rotary(),
        _BIASES,
        flag("mlp_bias", False, mlp_bias=(True, False)),
        NO_WINDOWS,
    ),
    fixed={"rope_interleaved": False},
    dropouts={"attention_dropout": "attention_dropout"},
)

MISTRAL = LLAMA._replace(
    model_type="mistral",
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    rules=(activation("hidden_act", "silu"), rotary(), MISTRAL_WINDOW),
    fixed={},
)

QWEN2 = LLAMA._replace(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    constants=_LLAMA_CONSTANTS | {"qkv_bias": True},
    rules=(activation("hidden_act", "silu"), rotary(), QWEN_WINDOWS),
    fixed={"use_mrope": False},
)

QWEN3 = LLAMA._replace(
    model_type="qwen3",
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    fields=_LLAMA_FIELDS | {"head_width": ("head_dim", 128)},
    constants=_LLAMA_CONSTANTS | {"qk_norm": True},
    rules=(activation("hidden_act", "silu"), rotary(), _BIASES, QWEN_WINDOWS),
    fixed={},
)

GEMMA3 = gemma3(LLAMA)

_ALL = (GPT2, GPT_NEO, GPTJ, GPT_NEOX, OPT, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3)
FAMILIES = {family.model_type: family for family in _ALL}


def family_of(config: ModelConfig) -> Family:
    """The first family that computes exactly this network.

    Raises:
      ValueError: none does; names the nearest one and the fields that part them.
    """
    misses = {name: differences(family, config) for name, family in FAMILIES.items()}
    name = min(misses, key=lambda name: len(misses[name]))
    if misses[name]:
        raise ValueError(
            f"the network must be of one of the families {list(FAMILIES)} to be saved; the nearest, {name}, does not "
            f"have {', '.join(misses[name])}"
        )
    return FAMILIES[name]


__all__ = ["FAMILIES", "Family", "canonical", "family_of"]
