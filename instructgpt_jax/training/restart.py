"""What a restart costs: seconds from the start of the process to the first step that it makes anew, by phase."""

import os
import pathlib
import time

import jax

from instructgpt_jax import process

_COMPILE, _HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
_compiled = {"seconds": 0.0, "programs": 0, "kept": 0}  # of this process


def _on_duration(name: str, seconds: float, **_) -> None:
    if name == _COMPILE:
        _compiled["seconds"] += seconds
        _compiled["programs"] += 1


def _on_event(name: str, **_) -> None:
    if name == _HIT:
        _compiled["kept"] += 1


jax.monitoring.register_event_duration_secs_listener(_on_duration)
jax.monitoring.register_event_listener(_on_event)


def age() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


class Phases:
    """The phases of a start, one after the other."""

    def __init__(self):
        self._begun = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._before, self._age = dict(_compiled), age()

    def end(self, name: str) -> None:
        """What was done since the last one was this."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def tell(self, stage: str, step: int) -> None:
        """One line, after the first step."""
        new = {key: _compiled[key] - self._before[key] for key in _compiled}
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._seconds.items())
        process.say(
            f"{stage}: step {step} was made {self._age + self._last - self._begun:.1f} s after the process began: "
            f"{self._age:.1f} before the stage, {parts}; of these {new['seconds']:.1f} s to compile "
            f"{new['programs']} programs, {new['kept']} of them kept from before"
        )
