"""What a run writes down: metrics.jsonl, samples.jsonl, TensorBoard events, and a progress line. Process 0 only.

Numbers are of the step they stand beside, never averages over a window, so a resumed run writes the same lines as an
uninterrupted one; only `perf/*` are means since the line before.
"""

import contextlib
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

from instructgpt_jax import errors, process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.training import tracking

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
EVENTS_SECONDS = 120  # between the times that TensorBoard's events reach the disk


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
        found = _lines(self._path)
        self._lines = []
        for number, line in enumerate(found, start=1):
            step = _step_of(line)
            if step is not None and step <= last_step:
                self._lines.append(line)
            elif step is None and number < len(found):  # the last one is what a kill cuts short
                process.say(f"{path}:{number} is damaged, the line is left out")
        if len(self._lines) < len(found):
            workdirs.write_atomically(self._path, b"".join(self._lines))
        self._file = None if self._remote else open(self._path, "ab")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds `{"step": step, **values}`; numbers that are not finite become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = (json.dumps({"step": step, **clean}, ensure_ascii=False) + "\n").encode()
        if self._remote:
            self._lines.append(line)
        else:
            with errors.naming(self._path):
                self._file.write(line)
                self._file.flush()

    def flush(self) -> None:
        """Everything written so far is in the file, also after a power cut.

        Raises:
          OSError: it is not, or nobody will find it: the file was deleted since it was opened.
        """
        with errors.naming(self._path):
            if self._remote:
                self._path.write_bytes(b"".join(self._lines))
            else:
                os.fsync(self._file.fileno())
                os.stat(self._path)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            if not self._remote:
                with errors.naming(self._path):
                    self._file.close()


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's .jsonl file; [] where there is none. What a kill left of a last line is left out.

    Raises:
      ValueError: a damaged line before the last; names file and line.
    """
    found = _lines(epath.Path(path))
    for number, line in enumerate(found[:-1], start=1):
        if _step_of(line) is None:
            raise ValueError(f"{path}:{number} must be a line of JSON with a step, got {line[:60]!r}")
    return [json.loads(line) for line in found if _step_of(line) is not None]


def _lines(path: epath.Path) -> list[bytes]:
    """The lines of a file with their ends: a text may hold what else ends a line, such as U+2028."""
    pieces = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [piece + b"\n" for piece in pieces[:-1]] + pieces[-1:] * bool(pieces[-1])


def _step_of(line: bytes) -> float | None:
    """The step of a line; None of one that is damaged or was cut short."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # also what is no UTF-8
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int | float) else None


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

    def __init__(self, workdir: epath.PathLike, start_step: int, num_steps: int, name: str, tracked: tracking.Run):
        """Cuts the `.jsonl` files back to `start_step` and opens everything.

        Args:
          workdir: local or gs:// directory, which exists.
          start_step: the step of the restored state, 0 of a fresh one.
          num_steps: the last step, for the progress bar.
          name: what is trained, shown before the bar.
          tracked: where scalars and samples go beside.
        """
        self._tracked = tracked
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
            self._events.scalars(step, values)
        self._tracked.scalars(step, values)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        if self._active:
            for sample in samples:
                self._samples.write(step, sample)
            self._tracked.samples(step, samples)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Moves the bar; without a terminal, one plain line."""
        if not self._active:
            return
        text = _progress_text(values, self._num_steps - step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            process.say(f"{self._name} {step}/{self._num_steps} {text}")

    def flush(self) -> None:
        """Puts the files on disk: before a checkpoint of the same step, so that no line before it can be lost."""
        if not self._active:
            return
        self._metrics.flush()
        self._samples.flush()
        if self._events is not None:
            self._events.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Closes everything. What fails then is raised, but for where another error is on its way."""
        try:
            self.close()
        except OSError:
            if error is None or isinstance(error, SystemExit):
                raise

    def close(self) -> None:
        if not self._active:
            return
        with contextlib.ExitStack() as stack:  # all of them, whichever fails
            if self._bar is not None:
                stack.callback(self._bar.stop)
            for file in (self._events, self._samples, self._metrics):
                if file is not None:
                    stack.callback(file.close)


class _Events:
    """TensorBoard's events of scalars, written by the thread that calls.

    `tensorboardX.SummaryWriter` has one of its own, behind a short queue; a full disk ends it, and then the queue holds
    up the run for ever.
    """

    def __init__(self, folder: epath.Path, start_step: int):
        """Points of an earlier run after `start_step` are marked as superseded."""
        from tensorboardX import event_file_writer  # slow to import, and only process 0 needs it
        from tensorboardX.proto import event_pb2, summary_pb2

        self._folder, self._flushed = folder, time.monotonic()
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        with errors.naming(folder):
            event_file_writer.directory_check(str(folder))
            self._file = event_file_writer.EventsWriter(os.path.join(folder, "events"))
            begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            for field in ({"file_version": "brain.Event:2"}, {"session_log": begun}):
                self._file.write_event(self._event(wall_time=time.time(), step=start_step + 1, **field))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        with errors.naming(self._folder):
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > EVENTS_SECONDS:
            self.flush()

    def flush(self) -> None:
        with errors.naming(self._folder):
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with errors.naming(self._folder):
            self._file.close()


def _open_events(folder: epath.Path, start_step: int) -> _Events | None:
    try:
        return _Events(folder, start_step)
    except ImportError as error:  # gs:// needs the google-cloud-storage package
        process.say(f"no TensorBoard events in {folder}: {error}")
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
