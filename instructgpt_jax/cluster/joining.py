"""Joining the other processes of a job: a TPU slice, Slurm, Open MPI, or by hand with three variables."""

import os
import subprocess
import sys

import jax

from instructgpt_jax.cluster import ending, last_line

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What the launchers of a cluster set; jax.distributed.initialize() reads the rest from them.
CLUSTER = ("COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")


def join(on_cloud: bool, join_seconds: int, heartbeat_seconds: int) -> None:
    """Joins the other processes, where there are any; this one then ends in one line where another is lost.

    By hand: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the last one different in each.

    Args:
      on_cloud: the workers of a Cloud TPU VM do not know of each other by their environment: join them all the same.
      join_seconds: how long to wait for all to come.
      heartbeat_seconds: how long one may be silent before it counts as lost; 0 = 30 on CPUs, where nothing keeps a
        process from its heartbeats for long, else 100.

    Raises:
      ValueError: the variables by hand are not all there, or are not the number of processes and that of this one.
    """
    on_cluster = any(map(os.environ.get, CLUSTER)) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    address, count, index = _by_hand(alone=not (on_cloud or on_cluster))
    if not (address or on_cloud or on_cluster):
        return
    silence = heartbeat_seconds or (30 if jax.config.jax_platforms == "cpu" else 100)
    # Who is not process 0 is told by the launcher later than this: a number above 0 stands for any of the others.
    number = index if index is not None else int(os.environ.get("SLURM_PROCID") or os.environ.get("TPU_WORKER_ID") or 1)
    _listen(number, address or "", join_seconds, silence)
    waits = dict(initialization_timeout=join_seconds, heartbeat_timeout_seconds=silence)
    jax.distributed.initialize(address, count, index, **waits)
    sys.excepthook = ending.excepthook


def _by_hand(alone: bool) -> tuple[str, int, int] | tuple[None, None, None]:
    """Address, number of processes and that of this one; nothing where they are not given.

    Args:
      alone: nothing else says how to join: processes that know a part would each begin a job of one.
    """
    given = {name: os.environ.get(name, "") for name in BY_HAND}
    missing = [name for name, value in given.items() if not value]
    if missing:
        if alone and len(missing) < len(given):
            raise ValueError(f"{', '.join(BY_HAND)} must be set together, got no {' and no '.join(missing)}")
        return None, None, None
    address, count, index = given.values()
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(f"{BY_HAND[2]} must be a number below {BY_HAND[1]}, got {index!r} of {count!r}")
    return address, int(count), int(index)


def _listen(number: int, address: str, join_seconds: int, silence: int) -> None:
    """Puts last_line.py behind this process's file descriptor 2; what Python itself writes goes past it."""
    own = os.dup(2)
    reading, writing = os.pipe()
    command = [sys.executable, "-I", last_line.__file__, str(number), address, str(join_seconds), str(silence)]
    subprocess.Popen(command, stdin=reading, stdout=own, stderr=own, start_new_session=True)
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = open(own, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
