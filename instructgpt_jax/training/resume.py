"""What a run that goes on must share with the one before it, and what it says where the two differ.

The configuration is compared by the loop; here are the data, the schedules, and the architecture of the networks.
"""

import json
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from instructgpt_jax import process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.cluster import agreeing
from instructgpt_jax.training import checkpoint

DATA = "data.json"  # in a workdir: kind -> what was read, see datasets.described
TRAINED = {"ppo": ("policy", "value")}  # entries of config.models that a stage trains, where it is not `model`


def recalled(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """The configuration of a stage of training; where it goes on, with the `architecture` of the networks it trains.

    `networks.build` then need not look at their `init_from`, which may be gone: the checkpoint has their weights. Of a
    network with an adapter it has the adapter alone. What is read again, the base of an adapter and a network that does
    not train, is read in the `version` that the run began with.
    """
    workdir = epath.Path(workdir)
    saved = workdirs.read_config(workdir)
    if saved is None or not checkpoint.steps(workdir):
        return config
    tree = config.to_dict()
    for name in TRAINED.get(config.stage, ("model",)):
        entry = saved.get("models", {}).get(name, {})
        based = entry.get("adapter", {}).get("targets")
        if entry.get("init_from") and entry.get("architecture") and not based and name in tree["models"]:
            tree["models"][name]["architecture"] = entry["architecture"]
    for name, entry in saved.get("models", {}).items():
        asked = tree["models"].get(name, {})
        if entry.get("version") and asked.get("init_from") == entry["init_from"]:
            asked["version"] = entry["version"]
    return workdirs.frozen(tree)


def read_data(workdir: epath.Path) -> dict[str, dict] | None:
    """The data.json of a workdir; None where there is none, or a damaged one."""
    path = workdir / DATA
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:  # also what is no UTF-8
        process.say(f"{path} is damaged: whether the data are still the same is not known")
        return None


def check_data(stage: str, saved: dict | None, read: dict, allowed: bool | None) -> None:
    """Refuses to go on with other data than those of before.

    Args:
      stage: for the message.
      saved: `data` of the checkpoint's metadata, or data.json; None of a run from before there was any.
      read: kind -> what is read now, see datasets.described.
      allowed: config.data.allow_changed; the difference is then only said. None: it cannot be allowed.

    Raises:
      ValueError: names each kind that differs, old and new counts and fingerprints, and the key.
    """
    found = []
    for kind in sorted((saved or {}).keys() | read.keys()) if saved is not None else ():
        old, new = saved.get(kind, {}), read.get(kind, {})
        if old.get("fingerprint") != new.get("fingerprint"):
            found.append(f"{kind}: {_told(old)} before, {_told(new)} now")
    if not found:
        return
    text = "; ".join(found)
    if not allowed:
        way = "" if allowed is None else ", or go on with them by --config.data.allow_changed=True"
        raise ValueError(f"the data of a run must stay the same, got other {text}; take a new --workdir{way}")
    process.say(f"{stage}: goes on with other data, {text} (config.data.allow_changed)")


def _told(entry: dict) -> str:
    if not entry:
        return "none"
    return f"{entry['records']} records, {entry['examples']} examples ({entry['fingerprint'][:12]})"


def tell_data(read: dict, workdir: epath.Path) -> None:
    """Writes data.json, and says in a line what was left out of each kind of data; all processes have the same."""
    agreeing.same("data", {"data": read})
    for kind, entry in read.items():
        left_out = entry["left_out"]
        if left_out:
            reasons = ", ".join(f"{why} ({count})" for why, count in left_out.items())
            process.say(f"{kind}: {entry['records']} records, {sum(left_out.values())} left out: {reasons}")
    if read and jax.process_index() == 0:
        workdirs.write_atomically(workdir / DATA, json.dumps(read, indent=2) + "\n")


def tell_schedule(
    stage: str, step: int, before: int | None, now: int, rates: Callable[[int, int], dict[str, float]]
) -> None:
    """Says in a line that the run is longer or shorter than it was, and how its learning rates jump.

    Args:
      stage: for the message.
      step: of the restored state.
      before: num_steps of the run that saved it; None where it did not say.
      now: num_steps of this one.
      rates: see loop.Stage.
    """
    if before is None or before == now:
        return
    text = f"{stage}: {now} steps, it was {before} when step {step} was saved"
    old, new = (rates(length, step) for length in (before, now))
    moved = [f"{name} {old[name]:.3g} is now {new[name]:.3g}" for name in old if old[name] != new[name]]
    process.say(text + (f"; the schedule is stretched: {', '.join(moved)}" if moved else ""))
