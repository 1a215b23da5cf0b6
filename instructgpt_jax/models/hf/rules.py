"""Rules that the families' tables share: activations, biases, rotary positions, windows."""

import math

from instructgpt_jax.models.config import ModelConfig
from instructgpt_jax.models.hf.fields import Rule

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ORIGINAL = "original_max_position_embeddings"
# Kind of rotary scaling -> its options that must be given, and all that transformers reads.
SCALINGS = {
    "default": ((), ()),
    "linear": (("factor",), ("factor",)),
    "llama3": (("factor", "high_freq_factor", "low_freq_factor"), (ORIGINAL,)),
    "yarn": (
        ("factor",),
        (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def activation(key: str, default: str) -> Rule:
    """The feed-forward activation under its name in transformers."""

    def read(raw, fields):
        value = raw.get(key) or default
        if value not in ACTIVATIONS:
            raise ValueError(f"{key} must be one of {sorted(ACTIVATIONS)}, got {value!r}")
        return {"activation": ACTIVATIONS[value]}

    def write(config: ModelConfig):
        return {key: next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)}

    return Rule((key,), read, write)


def flag(key: str, default: bool, **choices: tuple) -> Rule:
    """A switch that decides several fields: each choice is (value if true, value if false)."""

    def read(raw, fields):
        value = raw.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        return {field: choice[not value] for field, choice in choices.items()}

    def write(config: ModelConfig):
        field, choice = next(iter(choices.items()))
        return {key: getattr(config, field) == choice[0]}

    return Rule((key,), read, write)


def number(key: str, value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, got {value!r}")
    return value


def rotary(
    theta_key: str = "rope_theta", fraction_key: str = "partial_rotary_factor", fraction: float | None = None
) -> Rule:
    """Rotary positions: base, share of the channels, scaling; flat keys, or all in `rope_parameters` (transformers 5).

    Args:
      theta_key: the flat key of the base.
      fraction_key: the flat key of the share of a head's channels that is rotated.
      fraction: the family's share where none is given; None = it rotates all and has no such option.
    """

    def read(raw, fields):
        where, options = _rope_options(raw)
        theta = options.get("rope_theta") or raw.get(theta_key) or raw.get("rope_theta") or 10_000.0
        kind = options.get("rope_type", options.get("type", "default"))
        share = options.get("partial_rotary_factor", raw.get(fraction_key, raw.get("partial_rotary_factor")))
        share = (fraction or 1.0) if share is None else share
        if fraction is None and share != 1:
            raise ValueError(f"{fraction_key} must be 1, the only value that is computed here, got {share!r}")
        head_width = fields.get("head_width") or fields["width"] // fields["num_heads"]
        scaling = scaling_of(kind, where, options, raw)
        read = {
            "positions": "rotary",
            "rotary_theta": float(number(theta_key, theta)),
            "rotary_width": int(head_width * number(fraction_key, share)),
            "rotary_scaling": tuple(sorted(scaling.items())),
        }
        if kind == "yarn":  # which is there for a context that max_position_embeddings need not name
            extended = int(scaling["factor"] * scaling["original_max_position"])
            read["max_length"] = max(fields["max_length"], extended)
        return read

    def write(config: ModelConfig):
        raw = {theta_key: config.rotary_theta, "rope_scaling": written(config.rotary_scaling)}
        return raw if fraction is None else raw | {fraction_key: config.rotary_width / config.head_width}

    def unread(raw):
        where, options = _rope_options(raw)
        read = {name for names in SCALINGS[options.get("rope_type", options.get("type", "default"))] for name in names}
        read |= {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
        return [f"{where}.{name}" for name in options if name not in read]

    keys = (theta_key, fraction_key, "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters", ORIGINAL)
    return Rule(keys, read, write, unread)


def written(scaling: tuple[tuple[str, float | str], ...]) -> dict[str, float | str] | None:
    """A ModelConfig's scaling as config.json has it."""
    names = {"kind": "rope_type", "original_max_position": ORIGINAL}
    return {names.get(name, name): value for name, value in scaling} or None


def _rope_options(raw) -> tuple[str, dict]:
    """The key of the rotary options that counts, and the options."""
    where = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    options = raw.get(where) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{where} must be an object, got {options!r}")
    nested = [name for name, value in options.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{where} must be the same for all layers of this family, got options for each of {nested}")
    return where, options


def scaling_of(kind: str, where: str, options: dict, raw) -> dict[str, float | str]:
    """The scaling of rotary positions as ModelConfig has it, with what transformers takes where an option is absent."""
    if kind not in SCALINGS:
        raise ValueError(f"{where}.rope_type must be one of {sorted(SCALINGS)}, got {kind!r}")
    if kind == "default":
        return {}
    required, optional = SCALINGS[kind]
    missing = [name for name in required if options.get(name) is None]
    if missing:
        raise ValueError(f"{where} of type {kind!r} must have the options {required}, got none of {missing}")
    scaling = {name: number(f"{where}.{name}", options[name]) for name in required}
    if ORIGINAL in optional:
        given = raw.get(ORIGINAL, options.get(ORIGINAL))  # beside them it counts before that among them
        given = raw["max_position_embeddings"] if given is None else given
        scaling["original_max_position"] = number(ORIGINAL, given)
    if kind == "yarn":
        scaling |= _yarn(where, options, scaling["factor"])
    return scaling | {"kind": kind}


def _yarn(where: str, options: dict, factor: float) -> dict[str, float]:
    """YaRN's further options: where its ramp begins and ends, and what the cosines and sines are multiplied by."""
    option = lambda name, default: float(number(f"{where}.{name}", options.get(name) or default))  # noqa: E731
    truncate = options.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"{where}.truncate must be true or false, got {truncate!r}")
    grown = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
    if options.get("mscale") and options.get("mscale_all_dim"):
        attention_factor = grown(option("mscale", 0)) / grown(option("mscale_all_dim", 0))
    else:
        attention_factor = grown(1.0)
    if options.get("attention_factor") is not None:
        attention_factor = number(f"{where}.attention_factor", options["attention_factor"])
    return {
        "beta_fast": option("beta_fast", 32),
        "beta_slow": option("beta_slow", 1),
        "attention_factor": float(attention_factor),
        "truncate": truncate,
    }


def _no_windows() -> Rule:
    """No window in any layer. A cache of transformers reads these keys even where the family's class has none."""

    def read(raw, fields):
        for key in ("sliding_window", "attention_chunk_size"):
            if raw.get(key) is not None and number(key, raw[key]) < fields["max_length"]:
                raise ValueError(f"{key} must be at least the context of {fields['max_length']}, got {raw[key]!r}")
        if not set(raw.get("layer_types") or ()) <= {"full_attention"}:
            raise ValueError(f"layer_types must be 'full_attention' for every layer, got {raw['layer_types']!r}")
        return {}

    return Rule(("sliding_window", "attention_chunk_size", "layer_types"), read, lambda config: {})


def _even_head_width() -> Rule:
    """`head_dim` where the family's class has none: its rotary positions read it all the same."""

    def read(raw, fields):
        even = fields["width"] // fields["num_heads"]
        if raw.get("head_dim") not in (None, even):
            raise ValueError(f"head_dim must be {even}, the width divided among the heads, got {raw['head_dim']!r}")
        return {}

    return Rule(("head_dim",), read, lambda config: {})


def _gpt_neo_windows() -> Rule:
    """Local attention in the layers that `attention_types` names: [[[kinds of a few layers], how often], …]."""

    def read(raw, fields):
        types = raw.get("attention_types") or [[["global", "local"], 12]]
        try:
            kinds = [kind for pattern, times in types for _ in range(times) for kind in pattern]
        except (TypeError, ValueError):
            raise ValueError(f"attention_types must be [[[kind, …], times], …], got {types!r}") from None
        if len(kinds) != fields["num_layers"] or not set(kinds) <= {"global", "local"}:
            raise ValueError(
                f"attention_types must give 'global' or 'local' to each of {fields['num_layers']} layers, got {types!r}"
            )
        if raw.get("attention_layers", kinds) != kinds:
            raise ValueError(f"attention_layers must say the same as attention_types, got {raw['attention_layers']!r}")
        window = raw.get("window_size", 256)
        return {"windows": tuple(0 if kind == "global" else number("window_size", window) for kind in kinds)}

    def write(config: ModelConfig):
        kinds = ["local" if window else "global" for window in config.layer_windows]
        return {"attention_types": [[kinds, 1]], "window_size": max(config.layer_windows) or 256}

    return Rule(("attention_types", "attention_layers", "window_size"), read, write)


def _mistral_window() -> Rule:
    """The same sliding window in every layer, or none."""

    def read(raw, fields):
        window = raw.get("sliding_window", 4_096)
        if raw.get("layer_types") is not None and len(set(raw["layer_types"])) != 1:
            raise ValueError(f"layer_types must be the same for every layer, got {raw['layer_types']!r}")
        return {"windows": (0 if window is None else number("sliding_window", window),)}

    return Rule(("sliding_window", "layer_types"), read, lambda config: {"sliding_window": config.windows[0] or None})


def _qwen_windows() -> Rule:
    """A sliding window in the layers from `max_window_layers` on, or in those that `layer_types` names."""
    full, sliding = "full_attention", "sliding_attention"

    def read(raw, fields):
        layers = fields["num_layers"]
        window = raw.get("sliding_window", 4_096) if raw.get("use_sliding_window", False) else None
        first = raw.get("max_window_layers", 28)
        kinds = raw.get("layer_types")
        if kinds is None:
            kinds = [full if window is None or layer < first else sliding for layer in range(layers)]
        if len(kinds) != layers or not set(kinds) <= {full, sliding} or (window is None and sliding in kinds):
            raise ValueError(
                f"layer_types must be {full!r} or {sliding!r} (with use_sliding_window) for {layers} layers, "
                f"got {kinds!r}"
            )
        return {"windows": tuple(0 if kind == full else number("sliding_window", window) for kind in kinds)}

    def write(config: ModelConfig):
        window = max(config.windows)
        return {
            "use_sliding_window": window > 0,
            "sliding_window": window or None,
            "layer_types": [sliding if w else full for w in config.layer_windows],
        }

    return Rule(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), read, write)


NO_WINDOWS = _no_windows()
EVEN_HEAD_WIDTH = _even_head_width()
GPT_NEO_WINDOWS = _gpt_neo_windows()
MISTRAL_WINDOW = _mistral_window()
QWEN_WINDOWS = _qwen_windows()
