"""What the processes of a job tell each other before they compute, and refuse to go on with where they differ.

It goes through the store of JAX's coordination service, which is there before any device is: processes that would
compile different programs wait for each other for ever in the first one that communicates.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from instructgpt_jax import workdir as workdirs

SECONDS = 3600  # for all to tell something: one may read its data far slower; who died is noticed by its heartbeats
SHOWN = 20.0  # seconds until a file of one process is seen by all, over a network with caches
TOKEN = ".job"  # a file in the workdir
PACKAGES = (
    "instructgpt_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy",
    "ml_collections", "tokenizers", "transformers", "safetensors", "scipy", "qwix", "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)  # fmt: skip
OPTIONS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")  # of the compilers
OWN_OPTIONS = ("--xla_dump", "--xla_force_host_platform_device_count")  # where, and what is compared by itself

_calls = itertools.count()  # all processes call in the same order


def exchange(text: str) -> list[str]:
    """What every process says, in their order. All call it together; with one process nothing is sent.

    Raises:
      ValueError: not all of them have said something in time.
    """
    state = _state()
    if state.client is None:
        return [text]
    key = f"instructgpt_jax/{next(_calls)}"
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(text))
    try:
        state.client.wait_at_barrier(key, SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise _late(error, set(range(state.num_processes)) - _said(key).keys()) from None
    said = _said(key)
    return [said[n] for n in range(state.num_processes)]


def _late(error: jax.errors.JaxRuntimeError, absent: set[int]) -> Exception:
    """What a wait for other processes has ended with: their numbers, or an error of another kind as it is."""
    if "DEADLINE_EXCEEDED" not in str(error):
        return error
    return ValueError(f"all processes of a job must go on together, got none of {sorted(absent)} in {SECONDS} s")


def _said(key: str) -> dict[int, str]:
    """What there is of an exchange, by process."""
    found = _state().client.key_value_dir_get(f"{key}/")
    return {int(name.rpartition("/")[2]): json.loads(text) for name, text in found}


def same(what: str, tree: dict[str, Any]) -> None:
    """Refuses to go on where a nested dict is not the same in all processes.

    Args:
      what: for the error.
      tree: JSON; what is no JSON counts by its text.

    Raises:
      ValueError: in all processes, with the first difference to process 0.
    """
    state = _state()
    if state.client is None:
        return
    mine = json.loads(json.dumps(tree, default=str))
    key = f"instructgpt_jax/first/{next(_calls)}"
    if state.process_id == 0:
        state.client.key_value_set(key, json.dumps(mine))
    try:
        first = json.loads(state.client.blocking_key_value_get(key, SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise _late(error, {0}) from None
    differences = exchange(difference(mine, first, f"process {state.process_id} ({platform.node()})"))
    for found in filter(None, differences):
        raise ValueError(f"all processes of a job must have the same {what}, got {found}")


def difference(mine: dict, first: dict, name: str) -> str:
    """The first key, in their order, at which a process is unlike process 0; '' = none."""
    mine, first = workdirs.flatten(mine), workdirs.flatten(first)
    for key in sorted(mine.keys() | first.keys()):
        left, right = (tree.get(key, "nothing") for tree in (mine, first))
        if left != right:
            return f"{key} = {left!r} in {name}, {right!r} in process 0"
    return ""


def versions() -> dict[str, str]:
    """What decides what is computed or how it is saved: Python, packages, our own files, options of the compilers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):  # one version has many commits
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    found["files of instructgpt_jax"] = digest.hexdigest()[:16]
    for name in OPTIONS:
        words = os.environ.get(name, "").split()
        found[name] = " ".join(word for word in words if not word.startswith(OWN_OPTIONS))
    return found


@contextlib.contextmanager
def alone(workdir: epath.PathLike, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps a workdir for this job while the block runs, see workdir.lock: process 0 holds it.

    Raises:
      ValueError: in all processes, where another run is at work there.
    """
    held, refusal = None, ""
    if _state().process_id == 0:
        try:
            held = workdirs.lock(workdir, say)
        except ValueError as error:
            refusal = str(error)
    for told in filter(None, exchange(refusal)):
        raise ValueError(told)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def shared(workdir: epath.PathLike) -> None:
    """Refuses a workdir that is another folder in another process.

    Raises:
      ValueError: in all processes; names the first that does not see what process 0 writes.
    """
    state = _state()
    if state.client is None:
        return
    path = epath.Path(workdir) / TOKEN
    token = secrets.token_hex(8) if state.process_id == 0 else ""
    if token:
        workdirs.write_atomically(path, token)
    token = exchange(token)[0]
    blind = exchange("" if _sees(path, token) else platform.node())
    if state.process_id == 0:
        path.unlink()
    exchange("")  # a stage may refuse a folder with a file that is not its own: it is gone for all
    for number, host in enumerate(blind):
        if host:
            raise ValueError(
                f"workdir {workdir} must be a folder that all processes of the job share, process {number} ({host}) "
                "does not see there what process 0 writes"
            )


def _sees(path: epath.Path, token: str) -> bool:
    """Whether the file has the token, now or within a while."""
    until = time.monotonic() + SHOWN
    while True:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def _state():
    """JAX has no public way to its store; Orbax takes it from the same place."""
    from jax._src import distributed

    return distributed.global_state
