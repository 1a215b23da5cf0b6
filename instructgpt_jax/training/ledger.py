"""What the training of a stage has cost, and on what; every checkpoint has it, so that a model card can say it."""

import platform
import time
from importlib import metadata
from typing import Any

import jax

PACKAGES = ("instructgpt-jax", "jax", "jaxlib", "flax", "optax", "numpy")


class Ledger:
    """Tokens, FLOPs and seconds of a stage from its first step on, over all of its restarts.

    Seconds are those of the training loop: with what compiling, evaluating and saving in it took, without what a run
    that was killed had not saved.
    """

    def __init__(self, before: dict[str, Any] | None, step: int):
        """`before`: of the checkpoint that the run goes on from; None where there is none, or an old one without."""
        self._before = before or {"from_step": step, "tokens": 0.0, "flops": 0.0, "seconds": 0.0, "devices": []}
        self._tokens, self._flops, self._started = 0.0, 0.0, time.perf_counter()

    def count(self, metrics: dict[str, float]) -> None:
        """Adds `perf/tokens` and `perf/flops` of a step."""
        self._tokens += metrics.get("perf/tokens", 0.0)
        self._flops += metrics.get("perf/flops", 0.0)

    def so_far(self) -> dict[str, Any]:
        """`from_step` (the sums begin after it), `tokens`, `flops`, `seconds`, `devices` (all that it ran on), and
        `versions` of what it runs with now.
        """
        before, now = self._before, machine()
        return {
            "from_step": before["from_step"],
            "tokens": before["tokens"] + self._tokens,
            "flops": before["flops"] + self._flops,
            "seconds": round(before["seconds"] + time.perf_counter() - self._started, 1),
            "devices": list(dict.fromkeys([*before["devices"], now["device"]])),
            "versions": now["versions"],
        }


def version(package: str) -> str:
    """Version of an installed package; that of one that only stands in the import path is unknown."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def machine() -> dict:
    """What a run is on: versions, device."""
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }
