"""A run's folder: whose it is, and files in it that are never half written."""

import contextlib
import errno
import fcntl
import fnmatch
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import IO, Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, FrozenConfigDict

from instructgpt_jax import errors, paths

# A workdir belongs to one experiment. These parts of the config, and the section named like the stage, must stay the
# same when it is run again ...
FIXED = ("stage", "seed", "models", "data", "rollout")
# ... except, inside them, the length of the run, what changes speed or memory alone, places (the tokenizer that counts
# is the copy in the workdir), the step of labelling, who judges the answers, and the version of an init_from,
# which a run that goes on has from here (resume.recalled). All else (mesh, logging, checkpoints, evaluation) may change
# freely.
FREE = (
    "num_steps", "num_epochs", "iterations", "eval_batches", "num_samples", "distribution_every", "wave", "remat",
    "attention", "parallel", "tokenizer", "version", "cache_dir", "data_dir", "allow_changed", "step", "url", "export",
    "skip_answers", "rankings", "ratings", "preferences",
)  # fmt: skip
LATER = {  # keys that a config.json from before them lacks (* = any name), and what they were then
    "evaluate.answers_per_prompt": 1,
    "rollout.cache": "full",
    "evaluate.prompt_sets": "",
    "evaluate.folds": "",
    "evaluate.sweep_report": "",
    "evaluate.sweeps.beside": [],
    "reward.fold_seeds": 1,
    "data.template": "",
    "data.end_tokens": [],
    "data.skip_long": False,
    "models.*.architecture.scaled_embeddings": False,
    "models.*.architecture.local_rotary_theta": None,
    "models.*.architecture.norm_offset": 0.0,
    "models.*.architecture.adapter": None,
    "models.*.adapter.rank": 16,
    "models.*.adapter.alpha": 32.0,
    "models.*.adapter.targets": [],
    "models.*.adapter.dropout": 0.0,
    "models.*.adapter.base": "",  # also of an architecture
}


LOCK = ".lock"  # in a workdir: held by the run that is at work there, which it names
PATIENCE = 120.0  # seconds: a file server keeps the lock of a machine that died for about 90


def lock(workdir: epath.PathLike, say: Callable[[str], None]) -> IO | None:
    """Takes a workdir for this run alone: two in one would cut each other's metrics and checkpoints.

    The system gives it back when the file is closed or the process ends, however it ends. Object stores, and file
    systems that know no locks, are not taken.

    Args:
      workdir: which exists.
      say: is told of a wait.

    Returns:
      The file to close in the end, or None.

    Raises:
      ValueError: another run holds it, and has not ended in `PATIENCE` seconds.
    """
    if "://" in str(workdir):
        return None
    path, until, told = os.path.join(workdir, LOCK), time.monotonic() + PATIENCE, False
    file = open(path, "ab+", buffering=0)  # noqa: SIM115
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            file.seek(0)
            holder = file.read().decode().strip() or "another run"
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                file.close()
                return None
            if time.monotonic() > until:
                file.close()
                raise ValueError(f"workdir {workdir} must have one run at a time, got {holder} at work in it") from None
            if not told:
                say(f"workdir {workdir}: {holder} is at work in it; waiting {PATIENCE:.0f} s for its end")
                told = True
            time.sleep(1)
    with contextlib.suppress(OSError):  # it is held without a name too, as on a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    return file


def resolved(config: ConfigDict, models: dict[str, dict], steps_per_epoch: int = 0) -> FrozenConfigDict:
    """The configuration with what its stage found out, as config.json and every checkpoint hold it.

    Args:
      models: entries of `config.models` as they were built, see networks.Network.
      steps_per_epoch: what -1 means in `eval_every` and `snapshot_every`; 0 = the stage has no epochs.
    """
    tree = config.to_dict() | {"models": config.models.to_dict() | models}
    for name in ("eval_every", "snapshot_every") if steps_per_epoch else ():
        if tree[name] == -1:
            tree[name] = steps_per_epoch
    return frozen(tree)


def frozen(tree: dict) -> FrozenConfigDict:
    """A configuration that cannot be written, with tuples for lists: ml_collections fails on [] beside ()."""

    def fixed(value):
        if isinstance(value, dict):
            return {key: fixed(part) for key, part in value.items()}
        return tuple(map(fixed, value)) if isinstance(value, list | tuple) else value

    return FrozenConfigDict(fixed(tree))


def claim(config: ConfigDict, workdir: epath.Path) -> dict:
    """Checks that the workdir is new or this experiment's, and writes config.json.

    Returns:
      The config as it reads back from JSON.

    Raises:
      ValueError: files that are not of a run, or a run whose model or data differ; the message lists the differences.
    """
    check(workdir)
    check_settings(config, workdir)
    resolved = as_json(config)
    if jax.process_index() == 0:
        write_atomically(workdir / "config.json", json.dumps(resolved, indent=2) + "\n")
    if jax.process_count() > 1:  # nobody adds to it before everybody has looked
        multihost_utils.sync_global_devices("workdir")
    return resolved


def check(workdir: epath.Path) -> None:
    """Makes the workdir; refuses one that cannot be written or that holds something else than a run."""
    paths.make_folder("workdir", workdir)
    names = sorted(entry.name for entry in workdir.iterdir() if not entry.name.startswith((".", "tokenizer")))
    if names and "config.json" not in names:
        raise ValueError(f"workdir {workdir} must be empty or hold a run's config.json, got {names[:5]}")


def check_settings(config: ConfigDict, workdir: epath.Path, without: tuple[str, ...] = ()) -> None:
    """Refuses a workdir that holds a run of other settings; the sections `without` are not compared."""
    stored = read_config(workdir)
    if stored is None:
        return
    found = compare(*({key: tree[key] for key in tree if key not in without} for tree in (stored, as_json(config))))
    if found:
        raise ValueError(
            f"workdir {workdir} holds another run; take a new --workdir or the old settings:\n" + "\n".join(found)
        )


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as it reads back from JSON."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def compare(stored: dict, asked: dict) -> list[str]:
    """One line for each difference that makes `asked` another experiment than `stored` (see FIXED and FREE)."""
    sections = (*FIXED, str(asked.get("stage")))
    stored, asked = (flatten({key: tree[key] for key in sections if key in tree}) for tree in (stored, asked))
    then = {name: value for key, value in LATER.items() for name in fnmatch.filter(asked, key)}
    stored = then | stored
    names = [name for name in sorted(stored.keys() | asked.keys()) if name.split(".")[-1] not in FREE]
    missing = "nothing"
    return [
        f"  {name}: {stored.get(name, missing)!r} in the workdir, {asked.get(name, missing)!r} asked for"
        for name in names
        if stored.get(name, missing) != asked.get(name, missing)
    ]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_config(workdir: epath.Path) -> dict[str, Any] | None:
    """The config.json of a workdir; None where there is none.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # also what is no UTF-8
        found = str(error)
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must be the JSON of a run's configuration, got {found!r}: put it back (each checkpoint has a copy "
            "in its _CHECKPOINT_METADATA, under custom_metadata.config), or take a new --workdir"
        )
    return found


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """The file has the old content or the new, never a part (an object store's single write is atomic by itself).

    A link stays one, and what is no file, such as /dev/stdout, is written to.
    """
    content = content.encode() if isinstance(content, str) else content
    with errors.naming(path):
        if "://" in str(path):
            path.write_bytes(content)
            return
        target = pathlib.Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            target.write_bytes(content)
            return
        temporary = target.parent / f".{target.name}.tmp"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
