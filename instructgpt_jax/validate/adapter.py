"""What `config.models.<name>.adapter` must be; whether the network has its targets, networks.py looks."""

from ml_collections import ConfigDict

from instructgpt_jax.models import quantised
from instructgpt_jax.validate.rules import POSITIVE, SHARE, TEXTS, check, choice, integer

RULES = {
    "rank": integer(1), "alpha": POSITIVE, "targets": TEXTS, "dropout": SHARE, "base": choice("", *quantised.FORMATS),
}  # fmt: skip


def check_adapter(config: ConfigDict, name: str, stages: tuple[str, ...]) -> None:
    """Refuses a wrong key, and an adapter where nothing trains, without a base, or where the stage would change it.

    Args:
      name: an entry of config.models with an `adapter`.
      stages: those that train.
    """
    check(config.models[name], "adapter", RULES, f"config.models.{name}")
    entry, key = config.models[name], f"config.models.{name}.adapter"
    if not entry.adapter.targets:
        if entry.adapter.base:
            raise ValueError(f"{key}.base must be '' without targets, nothing stands on it, got {entry.adapter.base!r}")
        return
    trained = {"ppo": ("policy", "value")}.get(config.stage, ("model",) if config.stage in stages else ())
    if name not in trained:
        raise ValueError(f"{key}.targets must be (): this network does not train, got {entry.adapter.targets}")
    base = entry.get("init_from", "") or (name == "value" and not entry.get("size", ""))  # that of the reward model
    if not base:
        raise ValueError(f"{key}.targets must be () for a fresh network, it has no base, got {entry.adapter.targets}")
    if config.stage == "ppo" and entry.adapter.dropout:
        raise ValueError(f"{key}.dropout must be 0 in PPO, which has no dropout, got {entry.adapter.dropout}")
    if config.stage == "reward" and config.reward.eos_init:
        raise ValueError(
            f"config.reward.eos_init must be '' with {key}.targets: it would change the base, "
            f"got {config.reward.eos_init!r}"
        )
