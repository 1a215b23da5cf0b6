"""What the parts of `config.evaluate` need of each other."""

from ml_collections import ConfigDict

from instructgpt_jax.data import sources


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
            if c.labelers and form != "simulated" and name in prompts:
                raise ValueError(f"{path}.labelers=True must have simulated prompts, got {path}.{name}={source!r}")
    if c.split == "valid" and not config.data.valid_fraction:
        raise ValueError("config.data.valid_fraction must be above 0 for config.evaluate.split='valid', got 0")
