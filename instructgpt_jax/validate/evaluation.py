"""What the parts of `config.evaluate` need of each other, and of `config.evaluate_reward` and `config.benchmark`."""

from ml_collections import ConfigDict

from instructgpt_jax.data import sources
from instructgpt_jax.validate.rules import FLAG, POSITIVE, TEXT, TEXTS, Each, Rule, choice, integer, number

METHODS = choice("base", "prefix", "sft", "ppo", "ppo_ptx", "flan", "t0", "control")
PERSPECTIVE = "perspective"  # as a grader: the API instead of a model
BENCHMARK = {
    "title": TEXT, "models": Each({"label": TEXT, "method": METHODS, "size": TEXT, "model": TEXT}), "order": TEXTS,
    "tasks": Rule("a tuple of names of tasks, at least one", lambda x: TEXTS.holds(x) and len(x) > 0),
    "data_dir": TEXT, "limit": integer(0), "num_fewshot": integer(-1), "chat": FLAG, "batch_size": integer(1),
    "row_length": integer(2), "microbatch_rows": integer(1),
    "graders": {"true": TEXT, "info": TEXT, "toxicity": TEXT},
    "perspective": {
        "endpoint": TEXT, "per_second": POSITIVE, "attempts": integer(1), "wait": number(0), "timeout": POSITIVE,
    },
}  # fmt: skip


def check_evaluation(config: ConfigDict) -> None:
    """Names that belong together, and what each part of the evaluation needs of the others."""
    c, path = config.evaluate, "config.evaluate"
    if sorted(c.order) != sorted(c.models) or not c.order:
        raise ValueError(f"{path}.order must name {path}.models {sorted(c.models)}, got {tuple(c.order)}")
    if c.baseline not in c.models:
        raise ValueError(f"{path}.baseline must be one of {tuple(c.order)}, got {c.baseline!r}")
    if not c.distributions:
        raise ValueError(f"{path}.distributions must name at least one set of prompts, got none")
    names = [*c.order, *c.distributions, *c.tasks, *c.overoptimisation.runs]
    for name in names:
        if not name.replace("_", "").replace("-", "").isalnum():  # files are called so
            raise ValueError(f"names in {path} must be letters, digits, - and _, got {name!r}")
    _check_sweeps(c, f"{path}.sweeps")
    prompts = {f"distributions.{name}": c.distributions[name] for name in c.distributions}
    if any(entry.prefix for entry in c.models.values()):
        if config.data.template:
            raise ValueError(
                f"config.data.template must be '' beside a model with a prefix, which reads text, got "
                f"{config.data.template!r}"
            )
        if not c.prefix.candidates or not c.prefix.max_length:
            given = f"{len(c.prefix.candidates)} and {c.prefix.max_length}"
            raise ValueError(
                f"{path}.prefix.candidates and max_length must be set for a model with a prefix, got {given}"
            )
        prompts["prefix.prompts"] = c.prefix.prompts
    if c.overoptimisation.runs:
        prompts["overoptimisation.prompts"] = c.overoptimisation.prompts
    for key in ("rankings", "ratings"):
        if c.labelers and c[key]:
            raise ValueError(f"{path}.labelers must be False where people judge ({path}.{key}={c[key]}), got True")
    if "judge" in c.preferences and "judge" not in config.models:
        raise ValueError(f"{path}.preferences must be of config.models {tuple(config.models)}, got 'judge'")
    named = prompts | {f"tasks.{name}": c.tasks[name] for name in c.tasks}
    more = {key: c[key] for key in ("references", "accuracy", "rankings", "ratings")}
    for name, given in (named | more).items():
        if not given and name in named:
            raise ValueError(f"{path}.{name} must name at least one source, got ()")
        for source in given:
            try:
                form = sources.parse(source).form
            except ValueError as error:
                raise ValueError(f"{path}.{name}: {error}") from None
            if c.labelers and form not in ("simulated", "jsonl") and name in prompts:  # or what `prompts` made of them
                raise ValueError(f"{path}.labelers=True must have simulated prompts, got {path}.{name}={source!r}")
    if c.split == "valid" and not config.data.valid_fraction:
        raise ValueError("config.data.valid_fraction must be above 0 for config.evaluate.split='valid', got 0")


def _check_sweeps(c: ConfigDict, path: str) -> None:
    """Policies that are evaluated, one for each value; the baseline stands beside them."""
    runs, repeats = c.sweeps.runs, c.sweeps.repeats
    named = {f"runs.{name}.policies": runs[name].policies for name in runs}
    named |= {f"repeats.{name}": repeats[name] for name in repeats} | {"beside": c.sweeps.beside}
    for key, policies in named.items():
        for name in policies:
            if name not in c.models:
                raise ValueError(f"{path}.{key} must name policies of config.evaluate.models, got {name!r}")
    for name in runs:
        values, policies = runs[name]["values"], runs[name].policies
        if len(values) != len(policies) or len(set(values)) < max(2, len(values)):
            raise ValueError(
                f"{path}.runs.{name}.values must be two or more, each once, with a policy for each, got {values} and "
                f"{policies}"
            )
    for name in repeats:
        if len(repeats[name]) < 2:
            raise ValueError(f"{path}.repeats.{name} must have at least two policies, got {repeats[name]}")
    if runs and c.baseline not in c.sweeps.beside:
        raise ValueError(f"{path}.beside must have the baseline {c.baseline!r}, got {c.sweeps.beside}")
    if (repeats or c.sweeps.beside) and not runs:
        raise ValueError(f"{path}.runs must have a sweep for repeats and what stands beside, got none")


def check_reward_evaluation(config: ConfigDict) -> None:
    """Reward models that are named, and sets of comparisons to score."""
    c, path = config.evaluate_reward, "config.evaluate_reward"
    for name in config.models:
        if not name.replace("_", "").replace("-", "").isalnum():  # files are called so
            raise ValueError(f"names in config.models must be letters, digits, - and _, got {name!r}")
    for name, entry in config.models.items():
        if name in ("longer", "bag_of_words"):
            raise ValueError(f"config.models must not have the name of a baseline, got {name!r}")
        if not entry.get("init_from", ""):
            raise ValueError(f"config.models.{name}.init_from must be a workdir or a Hugging Face classifier, got ''")
    if not c.comparisons:
        raise ValueError(f"{path}.comparisons must name at least one source, got ()")
    for name in ("comparisons", "bag_of_words"):
        for source in c[name]:
            try:
                sources.parse(source)
            except ValueError as error:
                raise ValueError(f"{path}.{name}: {error}") from None
    if c.split == "valid" and not config.data.valid_fraction:
        raise ValueError(f"config.data.valid_fraction must be above 0 for {path}.split='valid', got 0")


def check_benchmark(config: ConfigDict) -> None:
    """Policies that are named, and what chats and graders need."""
    c, path = config.benchmark, "config.benchmark"
    if sorted(c.order) != sorted(c.models) or not c.order:
        raise ValueError(f"{path}.order must name {path}.models {sorted(c.models)}, got {tuple(c.order)}")
    for name in c.order:
        if not name.replace("_", "").replace("-", "").isalnum():  # files are called so
            raise ValueError(f"names in {path} must be letters, digits, - and _, got {name!r}")
    for name in dict.fromkeys(entry.model for entry in c.models.values()):
        if name in config.models and not config.models[name].get("init_from", ""):
            raise ValueError(f"config.models.{name}.init_from must be a workdir or a Hugging Face model, got ''")
    if c.chat and not config.data.template:
        raise ValueError(f"config.data.template must be set for {path}.chat=True, got ''")
    for what in ("true", "info"):
        if c.graders[what] == PERSPECTIVE:
            raise ValueError(f"{path}.graders.{what} must be a model, Perspective grades toxicity, got {PERSPECTIVE!r}")
