"""The processes and threads of a job: what is said, which signals are caught, who stops when, what runs beside what."""

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax.cluster import notices


def tell(text: str) -> None:
    """A line on stderr, also where nobody reads it any more: Ctrl-C ends `tee` too, and the run is yet to save."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for all that is told later


def say(text: str) -> None:
    """One line for the person who watches, on process 0's stderr; of stages beside each other with their names."""
    if jax.process_index() == 0:
        thread = threading.current_thread()
        prefix = "" if thread is threading.main_thread() else f"[{thread.name}] "
        tell(prefix + text)


class Progress:
    """How far a long piece of work is, in lines: none in its first seconds, then one every few.

    Args of a call: what `line` makes a line of.
    """

    QUIET, EVERY = 5.0, 15.0  # seconds

    def __init__(self, line: Callable[..., str], to: Callable[[str], None] = say):
        self._line, self._say = line, to
        self._began = time.monotonic()
        self._next = self._began + self.QUIET

    def __call__(self, *numbers) -> bool:
        """Whether a line was said."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.EVERY
        self._say(self._line(*numbers))
        return True

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def left(self, share: float) -> str:
        """About how long the rest takes, given the share that is done."""
        seconds = self.seconds * (1 - share) / max(share, 1e-9)
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


_stop = threading.Event()  # SIGTERM or SIGINT has come, or a stage beside this one has failed
_caught = False  # the handlers are in place


@contextlib.contextmanager
def catching_signals() -> Iterator[threading.Event]:
    """Yields the event that SIGTERM, SIGINT or a notice of Compute Engine sets: every stage then saves and ends.

    Handlers belong to the main thread; in others, where a pipeline runs stages, the event is the main thread's. A job
    of several processes catches signals from its beginning to its end: inside, the event is that one.
    """
    global _caught
    if _caught or threading.current_thread() is not threading.main_thread():
        yield _stop
        return
    _stop.clear()
    _caught = True
    previous, over = {}, threading.Event()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number, _):
        _stop.set()
        restore()
        say(f"received {signal.Signals(number).name}: saving after this step")

    def on_notice(words: str):
        _stop.set()
        tell(f"this machine will be taken ({words}): saving after this step")

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    if host := notices.server():
        threading.Thread(target=notices.watch, args=(host, on_notice, over), name="notices", daemon=True).start()
    try:
        yield _stop
    finally:
        over.set()
        restore()
        _caught = False
        _stop.clear()


_asked = 0  # the last number that JAX's preemption service was asked about


def will_be_taken(step: int | None = None) -> bool:
    """Whether JAX's preemption service says that a machine of the job will be taken: to all processes at one call.

    When a notice comes, the service takes the number after the largest that a process has asked about, and says yes
    to that number alone. So the number after the last one is asked about too: steps begin at 1 in each stage of a
    pipeline, and elsewhere in a run that goes on. All processes of a job call it together.

    Args:
      step: that is done, as Orbax asks about it when it saves; None = not of a stage that trains.
    """
    global _asked
    if not jax.distributed.is_initialized():
        return False
    numbers = dict.fromkeys((_asked + 1, _asked + 1 if step is None else step))
    try:
        told = [multihost_utils.reached_preemption_sync_point(number) for number in numbers]
    except RuntimeError:  # JAX_ENABLE_PREEMPTION_SERVICE=0
        return False
    *_, _asked = numbers
    return any(told)


def end_if_stopped() -> None:
    """For stages that do not train, between parts of their work. All processes of a job call it together.

    Raises:
      SystemExit: with code 0, where a signal was caught, in any process, or a stage beside this one has failed.
    """
    stopped = _stop.is_set() | will_be_taken()
    if jax.process_count() > 1:
        stopped = multihost_utils.process_allgather(np.int32(stopped)).any()
    if stopped:
        raise SystemExit(0)


def gathered(value: Any) -> list:
    """What each process has, in the order of the processes; each of them must call it.

    Args:
      value: anything that can be pickled, below 2 GiB.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    every = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def agreed(received: threading.Event) -> Callable[[], bool]:
    """A vote of all processes: every call sends this process's flag into an all-reduce.

    It returns the result of the call before. Reading one call late keeps the host ahead of the devices; all processes
    read the same results in the same order, so they stop at the same step.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    votes = []

    def vote() -> bool:
        mine = np.full(jax.local_device_count(), received.is_set(), np.int32)
        votes.append(largest(jax.make_array_from_process_local_data(NamedSharding(mesh, P("all")), mine)))
        return bool(votes.pop(0)) if len(votes) > 1 else False

    return vote


def run_together(waiting_for: dict[str, set[str]], run_one: Callable[[str], None], count: int) -> None:
    """Runs every task once, each when those it waits for have ended: `count` at a time in threads of their own where
    they are the programs of one CPU device, elsewhere one by one.

    When one fails or a signal comes, those that run save and end, and the first error is raised.

    Args:
      waiting_for: task -> tasks before it that must have ended, in the order in which to start them.
      run_one: runs the task of a name.
    """
    one_device = jax.default_backend() == "cpu" and jax.device_count() == 1
    if min(count, len(waiting_for)) == 1 or not one_device:
        for name in waiting_for:
            run_one(name)
        return
    ended: queue.Queue[tuple[str, BaseException | None]] = queue.Queue()
    waiting, running, done = dict(waiting_for), {}, set()

    def work(name: str) -> None:
        try:
            run_one(name)
        except BaseException as error:  # SystemExit too: a stage that a signal stopped
            ended.put((name, error))
        else:
            ended.put((name, None))

    failure = None
    with catching_signals() as stop:
        while waiting or running:
            for name in [name for name, others in waiting.items() if others <= done]:
                if len(running) < count and failure is None and not stop.is_set():
                    del waiting[name]
                    # Daemons: a second signal ends the process at once.
                    running[name] = threading.Thread(target=work, args=(name,), name=name, daemon=True)
                    running[name].start()
            if not running:
                break
            try:
                name, error = ended.get(timeout=1)  # Python handles signals between the waits
            except queue.Empty:
                continue
            del running[name]
            if error is None:
                done.add(name)
            else:
                failure = failure or error
                stop.set()
    if failure is not None:
        raise failure
    if waiting:
        raise SystemExit(0)  # between two stages
