"""Says when a run stands still: what it is at, and where each of its threads is."""

import collections
import statistics
import sys
import threading
import time
import traceback

import jax

from instructgpt_jax import process

KNOWN = 5  # times that a thing must have been done before it can take too long for what it is
FIRST = 1800.0  # seconds that it may take before: reading a checkpoint, the first compile
_LOOKS = 20  # times in the shortest limit


class Watchdog:
    """Beside the loop, on a thread of its own and on every process: the one that is not in a program holds the others.

    A thing takes too long after `factor` times the median of the times it took before, and `seconds`; what was not
    done `KNOWN` times yet after `FIRST`. It is said then, and again whenever it has taken twice as long. Nothing is
    ended.
    """

    def __init__(self, stage: str, factor: float, seconds: float):
        """Watches until `close`; factor 0 = not at all."""
        self._stage, self._factor, self._seconds = stage, factor, seconds
        self._took: dict[str, collections.deque] = collections.defaultdict(lambda: collections.deque(maxlen=101))
        self._at: tuple[str, int, float] | None = None  # what, its step, when it began
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if factor:
            self._thread.start()

    def begin(self, what: str, step: int) -> None:
        """The thing before is done, this one begins."""
        now = time.monotonic()
        if self._at is not None:
            self._took[self._at[0]].append(now - self._at[2])
        self._at = what, step, now

    def close(self) -> None:
        self._over.set()
        if self._factor:
            self._thread.join()

    def limit(self, what: str) -> float:
        """Seconds that a thing may take."""
        took = list(self._took[what])
        return max(self._seconds, self._factor * statistics.median(took)) if len(took) >= KNOWN else FIRST

    def _watch(self) -> None:
        said, after = None, 0.0
        while not self._over.wait(self._seconds / _LOOKS):
            at = self._at
            if at is None:
                continue
            limit = self.limit(at[0])
            since = time.monotonic() - at[2]
            if since > (after if said == at else limit):
                said, after = at, 2 * since
                self._say(at, since)

    def _say(self, at: tuple[str, int, float], since: float) -> None:
        who = f" in process {jax.process_index()}" if jax.process_count() > 1 else ""
        took = list(self._took[at[0]])
        usual = f"the median is {statistics.median(took):.1f} s" if took else "for the first time"
        told = f"{self._stage}: {at[0]} {at[1]}{who} has taken {since:.0f} s, {usual}; threads:"
        process.tell(f"{told}\n{stacks()}")


def stacks() -> str:
    """Where each thread but the caller's is, the main thread first: faulthandler stops after a hundred of them."""
    frames, main = sys._current_frames(), threading.main_thread()
    threads = [main, *(thread for thread in threading.enumerate() if thread is not main)]
    return "".join(
        f"thread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
        for thread in threads
        if thread.ident in frames and thread is not threading.current_thread()
    )
