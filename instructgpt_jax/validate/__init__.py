"""One check of a whole configuration before anything is built: keys, types, ranges, divisibility, data sources.

Whether what the configuration names is there: inputs.py. What needs the models (vocabulary, heads, context) is checked
in networks.py and stages/ppo.py, what needs the records in data/, all of it before any compute.
"""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax.data import sources
from instructgpt_jax.models import stores
from instructgpt_jax.sharding import batch_shards
from instructgpt_jax.validate import labeling, prompts
from instructgpt_jax.validate.adapter import check_adapter
from instructgpt_jax.validate.evaluation import (
    BENCHMARK,
    METHODS,
    check_benchmark,
    check_evaluation,
    check_reward_evaluation,
)
from instructgpt_jax.validate.rules import (
    FLAG,
    LOCAL,
    PART,
    POSITIVE,
    SHARE,
    TEXT,
    TEXTS,
    Each,
    Rule,
    check,
    choice,
    integer,
    number,
    optional,
)

OPTIMIZER = {
    "algorithm": choice("adam", "muon"), "lr": POSITIVE,
    "schedule": choice("constant", "linear", "cosine"), "final_fraction": number(0, 1), "warmup_steps": integer(0),
    "warmup_start": number(0, 1), "b1": SHARE, "b2": SHARE, "eps": POSITIVE, "eps_form": choice("optax", "tensorflow"),
    "weight_decay": number(0), "max_grad_norm": number(0),
}  # fmt: skip
GROUPS = ("training", "heldout")  # of simulated labelers
JUDGES = ("reward", "judge")  # entries of config.models whose scores are preferences
NO_EPOCHS = integer(0)._replace(expected="an integer of at least 0 (PPO has no epochs)")
TOKENIZER = Rule(
    "a directory, a Hub id, train:SIZE with a SIZE of at least 258, or ''",
    lambda x: isinstance(x, str) and (not x.startswith("train:") or (x[6:].isdecimal() and int(x[6:]) >= 258)),
)
# A larger one is no int32, as programs take it; up to here the next ones too, of folds and of sources, are uint32.
SEED = Rule("an integer of at least 0 and below 2**31", lambda x: integer(0).holds(x) and x < 2**31)
MESH = {axis: integer(-1) for axis in ("data", "fsdp", "tensor")}
DATA = {
    "tokenizer": TOKENIZER, "template": TEXT, "end_tokens": TEXTS,
    "demonstrations": TEXTS, "comparisons": TEXTS, "prompts": TEXTS, "pretraining": TEXTS,
    "valid_fraction": SHARE, "max_prompt_tokens": integer(0), "skip_bad": integer(0), "skip_long": FLAG,
    "data_dir": TEXT, "cache_dir": LOCAL, "allow_changed": FLAG,
}  # fmt: skip
LOG = {"log": {"wandb": TEXT}}
TRAINING = {
    "log_every": integer(1), "eval_every": integer(-1), "snapshot_every": integer(-1),
    "checkpoint": {
        "every": integer(1), "keep_last": integer(1), "best_metric": TEXT, "best_mode": choice("min", "max"),
    },
    "watch": {"factor": number(0), "seconds": POSITIVE, "copies_every": integer(0)},
}  # fmt: skip
ROWS = {
    "batch_size": integer(1), "num_epochs": integer(0), "num_steps": integer(0), "row_length": integer(2),
    "microbatch_rows": integer(1), "optimizer": OPTIMIZER,
}  # fmt: skip
ANSWERS = {
    "batch_size": integer(1), "response_length": integer(1), "temperature": number(0), "top_k": integer(0),
    "top_p": PART,
}  # fmt: skip
SECTIONS = {
    "pretrain": ROWS,
    "sft": ROWS | {
        "loss_on_prompt": FLAG, "pretraining_fraction": SHARE,
        "pretraining_fraction_of": choice("loss", "tokens", "examples"),
    },
    "reward": ROWS | {
        "max_completions": integer(2), "shared_prompt": FLAG, "bias_examples": integer(1),
        "folds": Rule("0 or an integer of at least 2", lambda x: integer(0).holds(x) and x != 1),
        "fold_by": choice("group", "labeler", "prompt"), "fold_seeds": integer(1),
        "held_out_groups": TEXTS, "eos_init": TEXT, "head_examples": integer(0), "head_l2": POSITIVE,
    },
    "ppo": {
        "iterations": integer(1), "batch_size": integer(1),
        "num_epochs": Rule("0 (prompts repeat, config.ppo.iterations ends the run)", lambda x: x == 0),
        "max_prompt_length": integer(1), "response_length": integer(1), "temperature": POSITIVE,
        "num_minibatches": integer(1), "inner_epochs": integer(1), "row_length": integer(2),
        "microbatch_rows": integer(1), "kl_coef": number(0),
        "adaptive_kl": {"target": number(0), "horizon": POSITIVE}, "gamma": number(0, 1), "lam": number(0, 1),
        "clip_range": POSITIVE, "clip_range_value": POSITIVE,
        "whiten_advantages": choice("batch", "minibatch", "none"), "whiten_rewards": FLAG, "score_clip": number(0),
        "missing_eos_score": optional(number()), "ptx_coef": number(0), "ptx_ratio": integer(1),
        "ptx_row_length": integer(2), "ptx_microbatch_rows": integer(1), "ema_decay": SHARE,
        "old_logprobs": choice("auto", "sampling", "forward"), "distribution_every": integer(0),
        "eval_batches": integer(0), "num_samples": integer(0),
        "policy_optimizer": OPTIMIZER, "value_optimizer": OPTIMIZER,
    },
    "select": ANSWERS | {
        "by": choice("score", "loss"), "num_batches": integer(1), "max_prompt_length": integer(1),
        "row_length": integer(2), "microbatch_rows": integer(1), "num_samples": integer(0),
    },
    "evaluate": ANSWERS | {
        "models": Each({
            "label": TEXT, "method": METHODS, "size": TEXT,
            "model": TEXT, "prefix": FLAG,
        }),
        "order": TEXTS, "baseline": TEXT, "title": TEXT, "report": TEXT, "seconds": TEXT,
        "distributions": Each(TEXTS), "num_prompts": integer(0), "split": choice("all", "valid"), "labelers": FLAG,
        "answers_per_prompt": integer(1), "parallel": integer(1), "rankings": TEXTS, "ratings": TEXTS,
        "preferences": Rule(f"a tuple of {JUDGES}, or ()", lambda x: TEXTS.holds(x) and set(x) <= set(JUDGES)),
        "references": TEXTS, "slots": FLAG, "tasks": Each(TEXTS), "accuracy": TEXTS,
        "pretraining": {"num_sequences": integer(0), "row_length": integer(2)},
        "prefix": {"candidates": TEXTS, "prompts": TEXTS, "max_length": integer(0)},
        "overoptimisation": {"runs": Each(TEXT), "prompts": TEXTS}, "curves": Each(TEXT), "folds": TEXT,
        "sweeps": {
            "runs": Each({"key": TEXT, "values": TEXTS, "policies": TEXTS}), "repeats": Each(TEXTS), "beside": TEXTS,
        },
        "sweep_report": TEXT,
        "prompt_sets": TEXT, "max_prompt_length": integer(1), "row_length": integer(2),
        "microbatch_rows": integer(1), "num_samples": integer(0),
    },
    "collect": ANSWERS | {
        "num_prompts": integer(0), "max_prompt_length": integer(1), "shuffled": FLAG,
        "completions": Rule(
            "a pair (low, high) of integers with 2 <= low <= high",
            lambda x: isinstance(x, tuple) and len(x) == 2 and all(integer(2).holds(k) for k in x) and x[0] <= x[1],
        ),
        "labelers": Rule(f"a tuple of {GROUPS}, or ()", lambda x: TEXTS.holds(x) and set(x) <= set(GROUPS)),
    },
    "evaluate_reward": {
        "comparisons": TEXTS, "bag_of_words": TEXTS, "split": choice("all", "valid"),
        "best_of": Rule(
            "a tuple of integers of at least 2",
            lambda x: isinstance(x, tuple) and all(integer(2).holds(n) for n in x),
        ),
        "batch_size": integer(1), "row_length": integer(2), "microbatch_rows": integer(1),
    },
    "benchmark": BENCHMARK,
    "label": labeling.RULES,
    "prompts": prompts.RULES,
    "sample": ANSWERS | {"prompts": TEXTS, "file": TEXT},
    "export": {"dtype": choice("float32", "bfloat16"), "format": choice("merged", "peft"), "base": TEXT},
}  # fmt: skip
PIPELINE = {"only": TEXT, "parallel": integer(1)}
# Their workdirs keep none: models bring theirs.
WITHOUT_TOKENIZER = ("sample", "export", "evaluate_reward", "label", "benchmark")
TRAINED = ("pretrain", "sft", "reward", "ppo")  # stages that run the training loop
NETWORKS = {  # entries of config.models
    "ppo": ("policy", "ref_policy", "value", "reward"),
    "select": ("model", "reward"),
    "evaluate": ("ref_policy", "reward"),
    "label": (),
    "prompts": (),
}
SOURCES = {
    "pretrain": "pretraining", "sft": "demonstrations", "reward": "comparisons", "ppo": "prompts",
    "collect": "prompts", "prompts": "prompts",
}  # fmt: skip


def validate(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses a configuration that cannot run.

    Args:
      config: of one stage.
      mesh: the mesh it will run on.

    Raises:
      ValueError: names the key, what it must be and what it is; where two numbers disagree, both.
    """
    stage = config.get("stage", None)
    if stage not in SECTIONS:
        raise ValueError(f"config.stage must be one of {sorted(SECTIONS)}, got {stage!r}")
    slices = {"slices": integer(1)} if "slices" in config.get("mesh", {}) else {}  # a mesh from before them has one
    rules = {"seed": SEED, "mesh": MESH | slices} | ({stage: SECTIONS[stage]} if SECTIONS[stage] else {})
    rules |= TRAINING if stage in TRAINED else {}
    rules |= LOG if stage in (*TRAINED, "evaluate", "benchmark") else {}
    rules |= {"eval_every": NO_EPOCHS, "snapshot_every": NO_EPOCHS} if stage == "ppo" else {}
    rules |= {"rollout": {"wave": integer(0), "cache": choice(*stores.KINDS)}} if stage in ("ppo", "select") else {}
    for name, rule in rules.items():
        check(config, name, rule, "config")
    _check_networks(config)
    if stage != "export":
        for name, rule in DATA.items():
            check(config.get("data", None), name, rule, "config.data")
    if stage == "evaluate":
        check_evaluation(config)
    elif stage == "evaluate_reward":
        check_reward_evaluation(config)
    elif stage == "benchmark":
        check_benchmark(config)
    elif stage == "label":
        labeling.check_labeling(config)
    elif stage == "prompts":
        prompts.check_prompts(config)
    _check_sources(config)
    if stage in ("ppo", "select", "evaluate"):
        _check_episodes(config, stage, mesh)
    elif stage == "collect":
        _divides("config.collect.batch_size", config.collect.batch_size, *_shards(mesh))
        if config.collect.shuffled and not config.collect.labelers:
            raise ValueError("config.collect.labelers must name a group for config.collect.shuffled=True, got ()")
    elif stage == "sample":
        _divides("config.sample.batch_size", config.sample.batch_size, *_shards(mesh))
    elif stage == "evaluate_reward":
        for name in ("batch_size", "microbatch_rows"):
            _divides(f"config.evaluate_reward.{name}", config.evaluate_reward[name], *_shards(mesh))
    elif stage in TRAINED:
        _divides(f"config.{stage}.microbatch_rows", config[stage].microbatch_rows, *_shards(mesh))
    if stage in TRAINED:
        _check_length(config, stage)


def validate_pipeline(config: ConfigDict) -> None:
    """Refuses a pipeline whose stages are not named as they must be; each of them is for `validate`.

    Raises:
      ValueError: names the key, what it must be and what it is.
    """
    if not isinstance(config.get("stages", None), ConfigDict):
        raise ValueError(f"config.stages must be a section of the configuration, got {config.get('stages', None)!r}")
    for name, rule in PIPELINE.items():
        check(config, name, rule, "config")
    if sorted(config.order) != sorted(config.stages):
        raise ValueError(f"config.order must name the stages {sorted(config.stages)}, got {tuple(config.order)}")
    if config.only and config.only not in config.stages:
        raise ValueError(f"config.only must be one of {tuple(config.order)}, got {config.only!r}")
    if "only_with" in config:  # a pipeline of one's own may do without
        check(config, "only_with", Each(TEXT), "config")
    for name, key in config.get("only_with", {}).items():
        if name not in config.stages or not isinstance(config.get(key, None), str):
            raise ValueError(f"config.only_with must name a stage and a text beside it, got {name!r} and {key!r}")
        if name == config.only and not config[key]:
            raise ValueError(f"config.{key} must be set for config.only={name!r}, got ''")


def networks_used(config: ConfigDict) -> tuple[str, ...]:
    """The entries of config.models that a stage builds."""
    wanted = NETWORKS.get(config.stage, ("model",))
    if config.stage == "select" and config.select.by == "loss":
        return ("model",)
    if config.stage in ("collect", "evaluate_reward"):
        return tuple(config.get("models", ())) or wanted
    if config.stage == "evaluate":
        return (*wanted, *(entry.model for entry in config.evaluate.models.values()))
    if config.stage == "benchmark":
        return tuple(dict.fromkeys(entry.model for entry in config.benchmark.models.values()))
    return wanted


def _check_networks(config: ConfigDict) -> None:
    for name in networks_used(config):
        entry = config.get("models", ConfigDict()).get(name, None)
        if not isinstance(entry, ConfigDict):
            raise ValueError(f"config.models must have the entry {name!r}, got {sorted(config.get('models', {}))}")
        for field in ("size", "init_from", "weights"):
            if not isinstance(entry.get(field, ""), str):
                raise ValueError(f"config.models.{name}.{field} must be a string, got {entry[field]!r}")
        for field in ("architecture", "version"):
            if field in entry:
                raise ValueError(f"config.models.{name} must have no {field}, its size or init_from says it, got one")
        if "adapter" in entry:
            check_adapter(config, name, TRAINED)
    if config.stage in ("select", "sample", "export") and not config.models.model.get("init_from", ""):
        raise ValueError(
            f"config.models.model.init_from must be a workdir or a Hugging Face model, got '' (stage {config.stage!r})"
        )
    if config.stage == "ppo":
        value, start = config.models.value, config.models.reward.get("init_from", "")
        if start and value.get("size", "") and not value.get("init_from", ""):
            raise ValueError(
                "config.models.value must be empty, to start from the reward model of config.models.reward.init_from="
                f"{start!r}, or have an init_from of its own, got size={value.size!r}"
            )


def kinds_read(config: ConfigDict, with_tokenizer: bool = True) -> dict[str, str]:
    """The kinds of `config.data` that a stage reads -> why, where that is not plain from the stage.

    Args:
      with_tokenizer: also what `config.data.tokenizer=train:SIZE` is trained on.
    """
    stage = config.stage
    needs = {SOURCES[stage]: ""} if stage in SOURCES else {}
    if stage == "reward" and config.data.demonstrations:  # the bias is theirs
        needs["demonstrations"] = ""
    if stage == "select" and config.select.by == "score":
        needs["prompts"] = " (config.select.by='score')"
    if stage == "sft" and config.sft.pretraining_fraction:
        needs["pretraining"] = f" (config.sft.pretraining_fraction={config.sft.pretraining_fraction})"
    if stage == "ppo" and config.ppo.ptx_coef:
        needs["pretraining"] = f" for the ptx term (config.ppo.ptx_coef={config.ppo.ptx_coef})"
    if stage == "evaluate" and config.evaluate.pretraining.num_sequences:
        needs["pretraining"] = " (config.evaluate.pretraining.num_sequences)"
    if with_tokenizer and stage != "export" and config.data.tokenizer.startswith("train:"):
        needs.setdefault("pretraining", f" (config.data.tokenizer={config.data.tokenizer!r})")
    return needs


def _check_sources(config: ConfigDict) -> None:
    """The sources a stage reads are named and well formed."""
    if config.stage == "select" and config.select.by == "score" and not config.data.valid_fraction:
        raise ValueError("config.data.valid_fraction must be above 0 for stage 'select', got 0")
    if config.stage == "reward" and config.reward.folds and config.reward.fold_by != "prompt":
        if not config.data.valid_fraction:
            raise ValueError("config.data.valid_fraction must be above 0: it measures the training groups, got 0")
    for kind, why in kinds_read(config).items():
        if not config.data[kind]:
            raise ValueError(
                f"config.data.{kind} must name at least one source{why}, got (); for example "
                f"--config.data.{kind}=jsonl:data/{kind}.jsonl"
            )
        for source in config.data[kind]:
            try:
                sources.parse(source)
            except ValueError as error:
                raise ValueError(f"config.data.{kind}: {error}") from None


def _check_length(config: ConfigDict, stage: str) -> None:
    """The length of a training run, where the configuration says it, and a warm-up that fits it."""
    section, path = config[stage], f"config.{stage}"
    if stage == "ppo":
        length = section.iterations * section.num_minibatches * section.inner_epochs
        said = f"{path}.iterations x num_minibatches x inner_epochs"
    else:
        length, said = section.num_steps, f"{path}.num_steps"
        if not section.num_epochs and not length:
            raise ValueError(f"{said} must be above 0 for {path}.num_epochs=0 (without end), got 0")
    for name in ("policy_optimizer", "value_optimizer") if stage == "ppo" else ("optimizer",):
        if length and section[name].warmup_steps > length:
            steps = section[name].warmup_steps
            raise ValueError(f"{path}.{name}.warmup_steps must be at most {said} = {length}, got {steps}")


def _check_episodes(config: ConfigDict, stage: str, mesh: Mesh) -> None:
    """Batches of episodes: how they split into minibatches, microbatches and shards."""
    section, path = config[stage], f"config.{stage}"
    name, shards = _shards(mesh)
    _divides(f"{path}.batch_size", section.batch_size, name, shards)
    if stage != "evaluate" and config.rollout.wave:
        _divides("config.rollout.wave", config.rollout.wave, name, shards)
    if stage == "ppo" and config.rollout.cache != "full" and section.old_logprobs == "sampling":
        raise ValueError(
            f"config.ppo.old_logprobs must be 'auto' or 'forward' for config.rollout.cache={config.rollout.cache!r}, "
            "which samples from another distribution than the one that trains, got 'sampling'"
        )
    if stage == "ppo" and section.distribution_every:  # else what was found would not be logged
        _divides(f"{path}.distribution_every", section.distribution_every, "config.log_every", config.log_every)
    if stage == "ppo":
        _divides(f"{path}.batch_size", section.batch_size, f"{path}.num_minibatches", section.num_minibatches)
        minibatch = section.batch_size // section.num_minibatches
        _divides(f"{path}.batch_size / {path}.num_minibatches", minibatch, name, shards)
    _divides(f"{path}.microbatch_rows", section.microbatch_rows, name, shards)
    longest = section.max_prompt_length + section.response_length
    if longest > section.row_length:
        raise ValueError(
            f"{path}.row_length must hold {path}.max_prompt_length + {path}.response_length = {longest} tokens, "
            f"got {section.row_length}"
        )
    if stage == "ppo" and section.ptx_coef:
        _divides(f"{path}.ptx_microbatch_rows", section.ptx_microbatch_rows, name, shards)


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ValueError(f"{name} must be a multiple of {by_name} = {by}, got {value}")


def _shards(mesh: Mesh) -> tuple[str, int]:
    """The number of batch shards, and what to call it."""
    return "config.mesh.data x config.mesh.fsdp", batch_shards(mesh)
