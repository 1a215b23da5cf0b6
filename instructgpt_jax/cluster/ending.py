"""How a process of a job ends: at once, so that the others learn of it, and in one line where it is not the cause."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import jax

from instructgpt_jax.cluster import last_line

TOGETHER = 10  # seconds for the others to fail by the same error, and to say so
LINGER = 1.0  # seconds that the coordinator stays after them: with it the service goes, and ends who is still there


def excepthook(kind: type, error: BaseException, trace) -> None:
    """An uncaught error: one line where another process cannot be reached, else as ever."""
    if lost(error):
        reason = str(lost(error)).splitlines()[0]
        told = f"error: another process of this job ended or cannot be reached: {reason}{last_line.AGAIN}"
        print(told, file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


def lost(error: BaseException | None) -> BaseException | None:
    """What a broken transfer raised, where that is behind an error.

    CPU processes talk to each other by Gloo; on other devices a lost process is only noticed by its heartbeats.
    """
    while error is not None and not (isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error)):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Ends a process of a job that fails where it stands.

    The usual end waits in a barrier for the others, and they wait in their programs for it. Processes that are refused
    alike all say why before the first one is gone.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or (isinstance(error, SystemExit) and not error.code):
            raise
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        elif isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        os.write(2, last_line.TOLD.encode())
        if not lost(error):
            _wait_for_others()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _wait_for_others() -> None:
    from jax._src import distributed  # as in agreeing.py

    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier("instructgpt_jax/end", TOGETHER * 1000)
        if distributed.global_state.process_id == 0:
            time.sleep(LINGER)
