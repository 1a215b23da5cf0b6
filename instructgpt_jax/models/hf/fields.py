"""config.json <-> ModelConfig: what a family's table is made of, and how it is read in both directions.

Nothing in a config.json is passed over in silence: a key is read into a field, or must have the one value this code
computes (`fixed`), or is on a list of keys that do not change the function. Of a key that is none of these,
transformers' class of the family is asked: what it does not know cannot change the function there, and is ignored with
a word; what it knows must stand at its default.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from absl import logging

from instructgpt_jax.models.config import RUNTIME_FIELDS, ModelConfig

REQUIRED = object()

# Keys of any config.json that change neither the logits nor the score. Keys that start with `_` are bookkeeping too.
IGNORED = frozenset(
    "architectures model_type transformers_version torch_dtype dtype use_cache initializer_range init_std "
    "name_or_path bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id id2label label2id num_labels problem_type finetuning_task task_specific_params "
    "tokenizer_class prefix classifier_dropout output_attentions output_hidden_states output_scores return_dict "
    "return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward gradient_checkpointing "
    "is_decoder pretraining_tp max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens cross_attention_hidden_size "
    "reward_bias".split()
)

# Keys of any config.json that would change the function or the weights, and the only value this code computes.
# transformers reads some of them though no class of a configuration declares them.
FIXED = {
    "add_cross_attention": False,
    "compression_config": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "pruned_heads": {},
    "quantization": None,
    "quantization_config": None,
    "tie_encoder_decoder": False,
    "transformers_weights": None,
}


class Rule(NamedTuple):
    """Fields of a ModelConfig that need more than a renamed key.

    keys: of config.json, all that `read` looks at.
    read: (config.json, the fields read so far) -> fields.
    write: ModelConfig -> the keys.
    unread: config.json -> what stands inside these keys and changes nothing, with its key.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    unread: Callable[[Mapping[str, Any]], list[str]] = lambda raw: []


class Family(NamedTuple):
    """One family of checkpoints: everything that is particular to it.

    model_type: of its config.json.
    causal, classifier: its classes of transformers, for a language model and for a scalar head.
    prefix: of the tensors' names, which some checkpoints lack.
    tensors: path of a parameter -> (name in the file, `{}` = the layer, layout in the file; see layout.py).
    fields: field of ModelConfig -> (key, value without it, or a function of the fields read so far, or REQUIRED).
    constants: fields that every model of the family has alike.
    rules: fields made of several keys, or of other values.
    fixed: keys that would change the function -> the only value this code computes.
    dropouts: rates, field -> key; written, not read: noise is a stage's own setting.
    ignored: further keys that do not change the function.
    buffers: names in the file that are no parameters.
    """

    model_type: str
    causal: str
    classifier: str
    prefix: str
    tensors: Mapping[str, tuple[str, str]]
    fields: Mapping[str, tuple[str, Any]]
    constants: Mapping[str, Any]
    rules: tuple[Rule, ...]
    fixed: Mapping[str, Any]
    dropouts: Mapping[str, str]
    ignored: str = ""
    buffers: str = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"


def read(family: Family, raw: Mapping[str, Any], file: str) -> ModelConfig:
    """The ModelConfig of a config.json. Keys that are ignored because nobody knows them are told in one line.

    Args:
      family: its family.
      raw: the JSON object.
      file: its name, for errors.

    Raises:
      ValueError: a missing key, a value of the wrong type, or an option that is not computed here.
    """
    try:
        config, ignored = _read(family, raw), _without_effect(family, raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if ignored:
        _warn(f"{file}: ignored {', '.join(ignored)}, which change nothing in {family.model_type!r} of {_judge(raw)}")
    return config


def _judge(raw: Mapping[str, Any]) -> str:
    """Whose word it is that a key changes nothing; a newer transformers than ours may say otherwise."""
    import transformers

    ours, theirs = transformers.__version__, str(raw.get("transformers_version"))
    major_minor = lambda version: [int(number) for number in re.findall(r"\d+", version)[:2]]  # noqa: E731
    newer = major_minor(theirs) > major_minor(ours)
    return f"transformers {ours}" + (f" (the file is of {theirs}, which may know them)" if newer else "")


@functools.cache
def _warn(line: str) -> None:
    """Says it once: a run reads a configuration more than once."""
    if jax.process_index() == 0:
        logging.warning("%s", line)


def _read(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
    fields: dict[str, Any] = {"head": _head(family, raw)}
    for field, (key, default) in family.fields.items():
        value = raw.get(key)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{key} must be given")
            value = default(fields) if callable(default) else default
        types = ModelConfig.__annotations__[field]
        kinds = bool if types is bool else (int, float) if types is float else int
        if not isinstance(value, kinds) or (isinstance(value, bool) and types is not bool):
            raise ValueError(f"{key} must be of type {getattr(types, '__name__', types)}, got {value!r}")
        fields[field] = value
    fields |= family.constants
    for rule in family.rules:
        fields |= rule.read(raw, fields)
    for key, expected in (FIXED | family.fixed).items():
        _must_be(key, expected, raw)
    return canonical(ModelConfig(**fields))


def _must_be(key: str, expected: Any, raw: Mapping[str, Any]) -> None:
    # `false`, `null` and `{}` are the same word here: the option is off.
    if key in raw and raw[key] != expected and (raw[key] or expected):
        raise ValueError(f"{key} must be {expected!r}, the only value that is computed here, got {raw[key]!r}")


def _without_effect(family: Family, raw: Mapping[str, Any]) -> list[str]:
    """The keys that this table does not know and that change nothing in transformers either."""
    known = {key for key, _ in family.fields.values()} | {key for rule in family.rules for key in rule.keys}
    known |= set(FIXED) | set(family.fixed) | IGNORED | set(family.ignored.split()) | set(family.dropouts.values())
    unknown = [key for key in raw if key not in known and not key.startswith("_")]
    if unknown:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # seldom needed, and slow

        default = CONFIG_MAPPING[family.model_type]()
        for key in unknown:
            if key in default.attribute_map:  # another name of a key: gpt2's n_embd is hidden_size too
                _must_be(key, raw.get(default.attribute_map[key]), raw)
            elif hasattr(default, key):
                _must_be(key, getattr(default, key), raw)
    return sorted(unknown + [option for rule in family.rules for option in rule.unread(raw)])


def _head(family: Family, raw: Mapping[str, Any]) -> str:
    """`lm` or `scalar`, from the class that wrote the checkpoint; its base model counts as a language model."""
    classes = raw.get("architectures") or [family.causal]
    base = re.sub("(ForCausalLM|LMHeadModel)$", "Model", family.causal)
    if classes[0] in (family.causal, base):
        return "lm"
    if classes[0] == family.classifier:
        labels = len(raw.get("id2label") or {}) or raw.get("num_labels", 2)
        if labels != 1:
            raise ValueError(f"id2label must have one label, a scalar head has one output, got {labels}")
        return "scalar"
    raise ValueError(f"architectures must be one of {[family.causal, base, family.classifier]}, got {classes}")


def write(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that `read` turns into `config`, where the family can express it."""
    raw: dict[str, Any] = {"model_type": family.model_type}
    raw["architectures"] = [family.causal if config.head == "lm" else family.classifier]
    if config.head == "scalar":
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    raw |= {key: getattr(config, field) for field, (key, _) in family.fields.items()}
    for rule in family.rules:
        raw |= rule.write(config)
    return raw | {key: getattr(config, field) for field, key in family.dropouts.items()}


def canonical(config: ModelConfig) -> ModelConfig:
    """The same function written one way: what a stage sets and what has no effect is put at its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    changes = {field: defaults[field] for field in RUNTIME_FIELDS}
    windows, layers = config.layer_windows, range(config.num_layers)
    period = next(p for p in range(1, len(windows) + 1) if all(windows[i] == windows[i % p] for i in layers))
    changes["windows"] = windows[:period]
    if config.attention_scale == config.head_width**-0.5:
        changes["attention_scale"] = None
    if config.positions != "learned":
        changes["position_offset"] = 0
    if config.positions == "rotary":
        changes["rotary_scaling"] = tuple(sorted(config.rotary_scaling))
    else:
        changes |= {field: defaults[field] for field in defaults if field.startswith("rotary")}
    if config.positions != "rotary" or not any(windows):
        changes["local_rotary_theta"] = None
    return config.replace(**changes)


def differences(family: Family, config: ModelConfig) -> list[str]:
    """Fields of `config` that the family cannot express; empty if it can."""
    wanted = canonical(config)
    try:
        got = _read(family, write(family, wanted))
    except ValueError as error:
        return [str(error)]
    names = (field.name for field in dataclasses.fields(ModelConfig))
    return [f"{name}={getattr(wanted, name)!r}" for name in names if getattr(wanted, name) != getattr(got, name)]
