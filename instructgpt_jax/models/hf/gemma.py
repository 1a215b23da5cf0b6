"""Gemma 3's text models (270M, 1B): what parts them from Llama. Of model_type `gemma3`, with images, they are not."""

from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.models.hf.fields import Family, Rule
from instructgpt_jax.models.hf.rules import ORIGINAL, activation, flag, number, scaling_of, written

_LAYER = "model.layers.{}."


def gemma3(llama: Family) -> Family:
    """The family's table.

    Norms stand before and after attention and MLP and keep their scale less 1, embeddings are multiplied by the root of
    the width, queries and keys are normed, and layers with a window (five of six) have a rotary base of their own.
    """
    fields = llama.fields | {
        "head_width": ("head_dim", 256),
        "num_kv_heads": ("num_key_value_heads", 4),
        "tied_embeddings": ("tie_word_embeddings", True),
    }
    return llama._replace(
        model_type="gemma3_text",
        causal="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
        tensors=llama.tensors
        | {
            "blocks/norm1_after/scale": (_LAYER + "post_attention_layernorm.weight", "D"),
            "blocks/norm2/scale": (_LAYER + "pre_feedforward_layernorm.weight", "D"),
            "blocks/norm2_after/scale": (_LAYER + "post_feedforward_layernorm.weight", "D"),
        },
        fields=fields,
        constants=llama.constants
        | {"qk_norm": True, "norm_offset": 1.0, "residual": "sandwich", "scaled_embeddings": True},
        rules=(
            activation("hidden_activation", "gelu_pytorch_tanh"),
            _rotary(),
            _windows(),
            _query_scale(),
            flag("attention_bias", False, qkv_bias=(True, False), out_bias=(True, False)),
        ),
        fixed={"final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False},
        ignored="cache_implementation",
    )


def _windows() -> Rule:
    """A sliding window in the layers that `layer_types` names; without it, in all but each sixth or so."""
    full, sliding = "full_attention", "sliding_attention"

    def read(raw, fields):
        layers = fields["num_layers"]
        window, pattern = raw.get("sliding_window", 4_096), raw.get("sliding_window_pattern", 6)
        kinds = raw.get("layer_types")
        if kinds is None:
            if number("sliding_window_pattern", pattern) < 1:
                raise ValueError(f"sliding_window_pattern must be at least 1, got {pattern!r}")
            kinds = [sliding if (layer + 1) % pattern else full for layer in range(layers)]
        if len(kinds) != layers or not set(kinds) <= {full, sliding}:
            raise ValueError(f"layer_types must be {full!r} or {sliding!r} for each of {layers} layers, got {kinds!r}")
        if sliding in kinds and (window is None or number("sliding_window", window) < 1):
            raise ValueError(f"sliding_window must be a number of at least 1 for layers of that kind, got {window!r}")
        return {"windows": tuple(window if kind == sliding else 0 for kind in kinds)}

    def write(config: ModelConfig):
        kinds = [sliding if window else full for window in config.layer_windows]
        return {"sliding_window": max(config.windows) or None, "layer_types": kinds}

    return Rule(("sliding_window", "sliding_window_pattern", "layer_types"), read, write)


def _rotary() -> Rule:
    """Two bases of rotary positions: of the layers without a window, which may be scaled, and of those with one.

    Flat keys, or `rope_parameters` (transformers 5), an object for each kind of layer; flat keys fill in what these
    do not say.
    """
    full, sliding = "full_attention", "sliding_attention"

    def read(raw, fields):
        nested = raw.get("rope_parameters") or {}
        if not isinstance(nested, dict) or not all(isinstance(nested.get(kind, {}), dict) for kind in (full, sliding)):
            raise ValueError(f"rope_parameters must be an object of objects {full!r} and {sliding!r}, got {nested!r}")
        dense = dict(nested.get(full, {})) | dict(raw.get("rope_scaling") or {})
        local = nested.get(sliding, {})
        kind = lambda options: options.get("rope_type", options.get("type", "default"))  # noqa: E731
        if kind(local) != "default":
            raise ValueError(f"rope_parameters.{sliding}.rope_type must be 'default', got {kind(local)!r}")
        where = "rope_scaling" if raw.get("rope_scaling") else f"rope_parameters.{full}"
        shares = {options.get("partial_rotary_factor") for options in (raw, dense, local)} - {None, 1}
        if shares:
            raise ValueError(f"partial_rotary_factor must be 1, the only value that is computed here, got {shares}")
        theta = dense.get("rope_theta", raw.get("rope_theta", 1e6))
        local_theta = local.get("rope_theta", raw.get("rope_local_base_freq", 1e4))
        return {
            "positions": "rotary",
            "rotary_theta": float(number("rope_theta", theta)),
            "local_rotary_theta": float(number("rope_local_base_freq", local_theta)),
            "rotary_scaling": tuple(sorted(scaling_of(kind(dense), where, dense, raw).items())),
        }

    def write(config: ModelConfig):
        local = config.rotary_theta if config.local_rotary_theta is None else config.local_rotary_theta
        return {
            "rope_theta": config.rotary_theta,
            "rope_local_base_freq": local,
            "rope_scaling": written(config.rotary_scaling),
        }

    def unread(raw):
        return [f"rope_parameters.{name}" for name in raw.get("rope_parameters") or () if name not in (full, sliding)]

    keys = ("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters", "partial_rotary_factor", ORIGINAL)
    return Rule(keys, read, write, unread)


def _query_scale() -> Rule:
    """`query_pre_attn_scalar`, whose root divides q·k."""
    key = "query_pre_attn_scalar"

    def read(raw, fields):
        value = raw.get(key, 256)
        if number(key, value) <= 0:
            raise ValueError(f"{key} must be positive, got {value!r}")
        return {"attention_scale": value**-0.5}

    def write(config: ModelConfig):
        return {key: config.head_width if config.attention_scale is None else round(config.attention_scale**-2)}

    return Rule((key,), read, write)
