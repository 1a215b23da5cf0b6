"""Jobs of several processes on this machine: the command line, each process on some fake devices of its own.

All processes are forks of one that has imported the program.
"""

import contextlib
import multiprocessing
import os
import pathlib
import socket
import sys
import time
from typing import NamedTuple

import compiling
import jax
from absl import app

from instructgpt_jax import main
from instructgpt_jax import process as processes
from instructgpt_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["instructgpt_jax.main"])


class Process(NamedTuple):
    """One process of a job.

    arguments: of the command line.
    log: file for what it says.
    cache: folder for its programs, where it keeps any.
    devices: fake ones of its own.
    variables: of the environment.
    held: index of the batch before which it stops for ever; -1 = none.
      slow: seconds that it takes for each batch, and for each part of a stage that does not train.
    folder: where the command is given.
    """

    arguments: list[str]
    log: str
    cache: str
    devices: int
    variables: dict[str, str]
    held: int = -1
    slow: float = 0.0
    folder: str = str(ROOT)


def run(process: Process) -> None:
    """The command line in a process of its own."""
    with open(process.log, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(process.folder)
    flags = f"--xla_force_host_platform_device_count={process.devices} {compiling.SOON}"
    os.environ |= process.variables | {"XLA_FLAGS": flags}
    jax.config.update("jax_compilation_cache_dir", process.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    following = loop._next

    def hold_up(data, index):
        while index == process.held:
            time.sleep(1)
        time.sleep(process.slow)
        return following(data, index)

    loop._next = hold_up
    between = processes.end_if_stopped

    def slowly():
        time.sleep(process.slow)
        between()

    processes.end_if_stopped = slowly
    sys.argv = ["main", *process.arguments]
    try:
        app.run(main.main, flags_parser=main.parse)
    except Exception:  # as at the end of a program: multiprocessing would write the trace itself
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None


@contextlib.contextmanager
def running(arguments: list[str], log: pathlib.Path, count: int, devices: int, changes: dict[int, dict] | None = None):
    """As many processes of one job, `devices` in all; leaves none behind.

    Args:
      arguments: of the command line.
      log: process n writes into `<log>_<n>.log`, and keeps its programs, where it does, in `<log>_cache`.
      changes: process -> what of its Process is another; None instead = it does not come.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(count)}
    processes = []
    for number in range(count):
        variables = job | {"JAX_PROCESS_ID": str(number)} if count > 1 else {}
        one = Process(arguments, f"{log}_{number}.log", f"{log}_cache", devices // count, variables)
        change = (changes or {}).get(number, {})
        if change is not None:
            processes.append(FORKS.Process(target=run, args=(one._replace(**change),)))
            processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def code(process, seconds=300):
    """Exit code of a process; None where it has not ended in time."""
    process.join(seconds)
    return process.exitcode


def said(log: pathlib.Path, number: int = 0, awaited: str = "") -> str:
    """What a process has said; what stands beside it says its last line a moment after it."""
    path, until = pathlib.Path(f"{log}_{number}.log"), time.monotonic() + 20
    while awaited and awaited not in path.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    return path.read_text()
