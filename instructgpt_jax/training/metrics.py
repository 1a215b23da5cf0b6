"""What a run writes down: metrics.jsonl, samples.jsonl, TensorBoard events, and a progress line. Process 0 only.

Numbers are of the step they stand beside, never averages over a window, so a resumed run writes the same lines as an
uninterrupted one; only `perf/*` are means since the line before.
"""

import json
import math
import os
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from rich import console, progress

from instructgpt_jax import errors

# Peak matrix-product rate of one JAX device, FLOP/s in bfloat16 with float32 sums, dense, by `device_kind`.
# TPU: cloud.google.com/tpu/docs, "System architecture" (v2 and v3: a device is one of the chip's two cores; TPU7x: one
# of two chiplets). NVIDIA: the data sheets of V100 (float16), A100, H100 and H200 SXM, L4, T4 (float16).
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla T4": 65e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def say(text: str) -> None:
    """One line for the person who watches, on process 0's stderr; of stages beside each other with their names."""
    if jax.process_index() == 0:
        thread = threading.current_thread()
        prefix = "" if thread is threading.main_thread() else f"[{thread.name}] "
        print(prefix + text, file=sys.stderr, flush=True)


def to_host(metrics: dict[str, Any]) -> dict[str, float]:
    """Device scalars as Python floats, in one transfer.

    A float32 becomes the shortest decimal that reads back as the same float32, so files are legible and exact.
    """
    return {key: float(str(np.float32(value))) for key, value in jax.device_get(metrics).items()}


def find_nonfinite(metrics: dict[str, float]) -> str | None:
    """The first key whose value is not finite, or None."""
    return next((key for key, value in metrics.items() if not math.isfinite(value)), None)


class JsonLines:
    """A file of one JSON object a line, that a restored run can cut back to its step.

    On a local disk lines are appended as they come; an object store has no append, so there the file is held in memory
    and written whole at each `flush`.
    """

    def __init__(self, path: epath.PathLike, last_step: int):
        """Keeps the lines of an earlier run up to `last_step` and drops the rest, by an atomic rewrite."""
        self._path = epath.Path(path)
        self._remote = "://" in str(path)
        lines = _lines(self._path) if self._path.exists() else []
        self._lines = [line for line in lines if _step_of(line) <= last_step]
        if len(self._lines) < len(lines):
            write_atomically(self._path, b"".join(self._lines))
        self._file = None if self._remote else open(self._path, "a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds `{"step": step, **values}`; numbers that are not finite become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = json.dumps({"step": step, **clean}, ensure_ascii=False) + "\n"
        if self._remote:
            self._lines.append(line.encode())
        else:
            with errors.naming(self._path):
                self._file.write(line)
                self._file.flush()

    def flush(self) -> None:
        """Everything written so far is in the file, also after a power cut."""
        if self._remote:
            self._path.write_bytes(b"".join(self._lines))
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        if not self._remote:
            self._file.close()


def _lines(path: epath.Path) -> list[bytes]:
    """The lines of a file with their ends: they end at `\\n` alone, while str.splitlines cuts a text at U+2028 too."""
    return path.read_bytes().splitlines(keepends=True)


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """What a .jsonl file of a run says, without a last line that a kill cut short."""
    return [json.loads(line) for line in _lines(epath.Path(path)) if _step_of(line) < math.inf]


def _step_of(line: bytes) -> float:
    """The step of a line; of a line that a kill cut short, infinity."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:  # no JSON, or cut inside a character
        return math.inf


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """The file has the old content or the new, never a part (an object store's single write is atomic by itself)."""
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(path):
        path.write_bytes(content)
        return
    temporary = path.parent / f".{path.name}.tmp"
    with errors.naming(path), open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Meter:
    """Turns `perf/tokens` and `perf/flops` of the steps since the last line into rates."""

    def __init__(self):
        devices = jax.devices()
        peak = PEAK_FLOPS.get(devices[0].device_kind)
        self._peak = None if peak is None else peak * len(devices)
        self._steps, self._tokens, self._flops, self._seconds = 0, 0.0, 0.0, 0.0
        self._mark = time.perf_counter()

    def step_done(self, metrics: dict[str, float]) -> dict[str, float]:
        """Counts a finished step; returns its metrics without the raw two."""
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._steps += 1
        self._tokens += metrics.get("perf/tokens", 0.0)
        self._flops += metrics.get("perf/flops", 0.0)
        return {key: value for key, value in metrics.items() if key not in ("perf/tokens", "perf/flops")}

    def skip(self) -> None:
        """Leaves out the time since the last step: evaluation, saving."""
        self._mark = time.perf_counter()

    def rates(self) -> dict[str, float]:
        """`perf/step_seconds`, `perf/tokens_per_s` and, where the peak is known, `perf/mfu`; starts a new window."""
        seconds = max(self._seconds, 1e-9)
        rates = {"perf/step_seconds": seconds / max(self._steps, 1), "perf/tokens_per_s": self._tokens / seconds}
        if self._peak is not None and self._flops:
            rates["perf/mfu"] = self._flops / seconds / self._peak
        self._steps, self._tokens, self._flops, self._seconds = 0, 0.0, 0.0, 0.0
        return rates


class Writer:
    """All outputs of a run. On other processes than 0 every method does nothing."""

    def __init__(self, workdir: epath.PathLike, start_step: int, num_steps: int, name: str):
        """Cuts the `.jsonl` files back to `start_step` and opens everything.

        Args:
          workdir: local or gs:// directory, which exists.
          start_step: the step of the restored state, 0 of a fresh one.
          num_steps: the last step, for the progress bar.
          name: what is trained, shown before the bar.
        """
        self._active = jax.process_index() == 0
        self._num_steps = num_steps
        self._name = name
        if not self._active:
            return
        workdir = epath.Path(workdir)
        self._metrics = JsonLines(workdir / "metrics.jsonl", start_step)
        self._samples = JsonLines(workdir / "samples.jsonl", start_step)
        self._events = _open_events(workdir / "tensorboard", start_step)
        self._bar = None
        if sys.stderr.isatty() and threading.current_thread() is threading.main_thread():  # there is room for one bar
            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[text]}"),
            )
            self._bar = progress.Progress(*columns, console=console.Console(stderr=True))
            self._task = self._bar.add_task(name, total=num_steps, completed=start_step, text="")
            self._bar.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl and its TensorBoard points."""
        if not self._active:
            return
        self._metrics.write(step, values)
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(key, value, step)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        if self._active:
            for sample in samples:
                self._samples.write(step, sample)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Moves the bar; without a terminal, one plain line."""
        if not self._active:
            return
        text = _progress_text(values, self._num_steps - step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            say(f"{self._name} {step}/{self._num_steps} {text}")

    def flush(self) -> None:
        """Puts the files on disk: before a checkpoint of the same step, so that no line before it can be lost."""
        if not self._active:
            return
        self._metrics.flush()
        self._samples.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if not self._active:
            return
        self._metrics.close()
        self._samples.close()
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.stop()


def _open_events(folder: epath.Path, start_step: int):
    """TensorBoard's writer; points of an earlier run after `start_step` are marked as superseded."""
    import tensorboardX  # slow to import, and only process 0 needs it

    try:
        return tensorboardX.SummaryWriter(str(folder), purge_step=start_step + 1)
    except ImportError as error:  # gs:// needs the google-cloud-storage package
        say(f"no TensorBoard events in {folder}: {error}")
        return None


def _progress_text(values: dict[str, float], steps_left: int) -> str:
    """`sft/loss 2.31  1.2e+04 tokens/s  mfu 41 %  left 0:03:12`."""
    shown = ("/loss", "/accuracy", "/score", "/kl")
    parts = [f"{key} {value:.4g}" for key, value in values.items() if key.endswith(shown)]
    parts.append(f"{values['perf/tokens_per_s']:.3g} tokens/s")
    if "perf/mfu" in values:
        parts.append(f"mfu {100 * values['perf/mfu']:.0f} %")
    left = int(steps_left * values["perf/step_seconds"])
    parts.append(f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
    return "  ".join(parts)
