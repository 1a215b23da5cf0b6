"""The one training loop. A stage is pure functions; everything impure is here: data, logs, checkpoints, signals.

What a run promises:
  * Killed at any moment, it resumes to the same bits: parameters, optimiser, every line of metrics.jsonl but `perf/*`.
  * SIGTERM and SIGINT save and exit 0, on all processes at the same step; a second signal ends at once.
  * A non-finite metric stops it, and no state is saved before its own step's metrics were read and found finite.
  * A complete run is skipped, and a workdir of another run is refused, or of the same one with other data.
  * A checkpoint that was damaged since it was saved is named, and the run goes on from the one before it.
  * What cannot be written ends it with one line: what, where, and the last good checkpoint.
"""

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax.training import checkpoint, metrics, resume

PyTree = Any

# A workdir belongs to one experiment. These parts of the config, and the section named like the stage, must stay the
# same when it is run again ...
FIXED = ("stage", "seed", "models", "data", "rollout")
# ... except, inside them, the length of the run, what changes speed or memory alone, and places (the tokenizer that
# counts is the copy in the workdir). All else (mesh, logging, checkpoints, evaluation) may change freely.
FREE = (
    "num_steps", "num_epochs", "iterations", "eval_batches", "num_samples", "wave", "remat", "attention",
    "parallel", "tokenizer", "cache_dir", "data_dir", "allow_changed",
)  # fmt: skip
LATER = {"evaluate.answers_per_prompt": 1}  # keys that a config.json from before them lacks, and what they were then


class Stage(NamedTuple):
    """What the loop needs of a stage of training; `state` has a field `step` and is all that is checkpointed.

    Attributes:
      init: () -> state on the mesh; fresh, or with parameters from `init_from`.
      frozen: () -> pytree of networks that do not train, {} if none.
      update: (state, frozen, batch) -> (state, metrics); jitted, state donated; metrics: flat dict of () float32.
        `perf/tokens` and `perf/flops` of the step become rates.
      data: start -> iterator of batches from index `start` on, one an update, global device arrays; has close().
      evaluate: (state, frozen) -> (dict of floats, list of sample dicts).
      programs: () -> name -> (jitted function, tuple of ShapeDtypeStructs with shardings). The first argument of
        'update', where there is one, is the state that a checkpoint is restored into.
      num_steps: updates of the whole run.
      finish: (state, frozen) -> state, once after the last update; what it returns is evaluated and saved.
      best: metric by which one checkpoint is kept beside the last ones, '' = none.
      metadata: JSON dict stored in every checkpoint and snapshot, such as the model's configuration.
      read: kind of data -> what was read of it, see datasets.described.
      rates: (num_steps of a run, step) -> learning rates of the update that follows, by name; without it a run that is
        made longer does not say how they jump.
    """

    init: Callable[[], PyTree]
    frozen: Callable[[], PyTree]
    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, dict[str, jax.Array]]]
    data: Callable[[int], Iterator[PyTree]]
    evaluate: Callable[[PyTree, PyTree], tuple[dict[str, float], list[dict]]]
    programs: Callable[[], dict[str, tuple]]
    num_steps: int
    finish: Callable[[PyTree, PyTree], PyTree] = lambda state, frozen: state
    best: str | None = None
    metadata: dict | None = None
    read: dict[str, dict] | None = None
    rates: Callable[[int, int], dict[str, float]] | None = None


def run(stage: Stage, config, workdir: epath.PathLike) -> PyTree:
    """Trains a stage to its end in `workdir`, from wherever an earlier run there stopped.

    Args:
      stage: what to train.
      config: the resolved config; read here are `stage, seed, log_every, eval_every` (0 = only at the end),
        `snapshot_every` (0 = never), `data.allow_changed` and `checkpoint`: dict(every, keep_last, best_metric,
        best_mode).
      workdir: local or gs:// directory.

    Returns:
      The final state.

    Raises:
      ValueError: the workdir holds something else, or the same stage of another model or other data, or no checkpoint
        that is whole.
      OSError: something could not be written, or read; the message names it and the last good checkpoint.
      FloatingPointError: a metric is not finite; the message has the step and its name.
      SystemExit: with code 0, after the save that a signal asked for.
    """
    _check_run(stage, config)
    workdir = epath.Path(workdir)
    try:
        return _run(stage, config, workdir)
    except OSError as error:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror or str(error)
        raise OSError(f"{config.stage}: {text}; {_last_good(workdir)}") from error


def _run(stage: Stage, config, workdir: epath.Path) -> PyTree:
    resolved = claim_workdir(config, workdir)
    best = stage.best or config.checkpoint.best_metric
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(catching_signals())
        stop = received.is_set if jax.process_count() == 1 else _agreed(received)
        opened = checkpoint.Checkpoints(workdir, config.checkpoint.keep_last, best, config.checkpoint.best_mode)
        checkpoints = stack.enter_context(opened)

        # 1. The workdir's own newest whole checkpoint; else, inside init: 2. init_from, 3. fresh parameters.
        step, saved = 0, {}
        if checkpoints.latest is not None:
            state = checkpoints.restore(_abstract_state(stage))
            step = checkpoints.latest
            saved = checkpoint.read_metadata(workdir, step)
            metrics.say(f"{config.stage}: restored step {step} from {workdir}")
        if step >= stage.num_steps:
            metrics.say(f"{config.stage}: complete in {workdir} at step {step} of {stage.num_steps}, nothing to do")
            return state
        read = stage.read or {}
        resume.check_data(config.stage, saved.get("data"), read, config.data.allow_changed)
        resume.tell_schedule(config.stage, step, saved.get("num_steps"), stage.num_steps, stage.rates)
        resume.tell_data(read, workdir)
        if not step:
            state = stage.init()
        frozen = stage.frozen()
        data = stack.enter_context(contextlib.closing(stage.data(step)))
        writer = stack.enter_context(metrics.Writer(workdir, step, stage.num_steps, config.stage))
        meter = metrics.Meter()

        def settle(at: int, on_device: dict[str, jax.Array]) -> dict[str, float]:
            """Reads the metrics of step `at`, refuses what is not finite, and logs."""
            values = meter.step_done(metrics.to_host(on_device))
            bad = metrics.find_nonfinite(values)
            if bad is not None:
                kept = f"the last good checkpoint in {workdir} is of step {checkpoints.latest or 'none'}"
                raise FloatingPointError(f"{config.stage}: {bad} is {values[bad]} at step {at}; {kept}")
            if at % config.log_every == 0 or at == stage.num_steps:
                values |= meter.rates()
                writer.scalars(at, values)
                writer.progress(at, values)
            return values

        pending = None  # (step, metrics on device): read one step late, so that the device never waits for the host
        while step < stage.num_steps:
            state, on_device = stage.update(state, frozen, _next(data, step))
            step += 1
            if pending is not None:
                settle(*pending)
            pending = (step, on_device)

            last, stopping = step == stage.num_steps, stop()
            evaluating = last or _due(step, config.eval_every)
            snapshotting = _due(step, config.snapshot_every)
            saving = last or stopping or _due(step, config.checkpoint.every)
            if not (evaluating or snapshotting or saving):
                continue

            # Nothing of a step is kept before its metrics are known to be finite.
            values, pending = settle(*pending), None
            if last:
                state = stage.finish(state, frozen)
            if evaluating:
                evaluation, samples = stage.evaluate(state, frozen)
                evaluation = {key: float(value) for key, value in evaluation.items()}
                if evaluation:
                    writer.scalars(step, evaluation)
                writer.samples(step, samples)
                values |= evaluation
            about = {"config": resolved, "metadata": stage.metadata or {}, "num_steps": stage.num_steps, "data": read}
            metadata = {"step": step, "data_index": step} | about
            if snapshotting:
                checkpoints.snapshot(step, state, metadata)
            if saving:
                writer.flush()
                finite = {key: value for key, value in values.items() if math.isfinite(value)}
                checkpoints.save(step, state, metadata, finite)
            if stopping and not last:
                checkpoints.wait()
                metrics.say(f"{config.stage}: stopped by a signal, saved step {step} in {workdir}")
                raise SystemExit(0)
            meter.skip()
        return state


def _last_good(workdir: epath.Path) -> str:
    step, _ = checkpoint.newest(workdir)
    return f"the last good checkpoint in {workdir} is of step {step or 'none'}"


def claim_workdir(config, workdir: epath.Path) -> dict:
    """Checks that the workdir is new or this experiment's, and writes config.json.

    Returns:
      The config as it reads back from JSON.

    Raises:
      ValueError: files that are not of a run, or a run whose model or data differ; the message lists the differences.
    """
    resolved = json.loads(json.dumps(config.to_dict(), default=str))
    check_workdir(workdir)
    stored = resume.read_config(workdir)
    if stored is not None:
        found = compare(stored, resolved)
        if found:
            raise ValueError(
                f"workdir {workdir} holds another run; take a new --workdir or the old settings:\n" + "\n".join(found)
            )
    if jax.process_index() == 0:
        metrics.write_atomically(workdir / "config.json", json.dumps(resolved, indent=2) + "\n")
    return resolved


def check_workdir(workdir: epath.Path) -> None:
    """Makes the workdir; refuses one that cannot be written or that holds something else than a run."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"workdir must be a folder that can be made, got {workdir}: {error.strerror}") from None
    if "://" not in str(workdir) and not os.access(workdir, os.W_OK):
        raise ValueError(f"workdir must be a folder that can be written, got {workdir}")
    names = sorted(entry.name for entry in workdir.iterdir() if not entry.name.startswith((".", "tokenizer")))
    if names and "config.json" not in names:
        raise ValueError(f"workdir {workdir} must be empty or hold a run's config.json, got {names[:5]}")


def compare(stored: dict, asked: dict) -> list[str]:
    """One line for each difference that makes `asked` another experiment than `stored` (see FIXED and FREE)."""
    sections = (*FIXED, str(asked.get("stage")))
    stored, asked = (_flatten({key: tree[key] for key in sections if key in tree}) for tree in (stored, asked))
    stored = {name: value for name, value in LATER.items() if name in asked} | stored
    names = [name for name in sorted(stored.keys() | asked.keys()) if name.split(".")[-1] not in FREE]
    missing = "nothing"
    return [
        f"  {name}: {stored.get(name, missing)!r} in the workdir, {asked.get(name, missing)!r} asked for"
        for name in names
        if stored.get(name, missing) != asked.get(name, missing)
    ]


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_run(stage: Stage, config) -> None:
    for name, value, least in (
        ("num_steps", stage.num_steps, 1),
        ("log_every", config.log_every, 1),
        ("eval_every", config.eval_every, 0),
        ("snapshot_every", config.snapshot_every, 0),
        ("checkpoint.every", config.checkpoint.every, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value!r}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _next(data: Iterator[PyTree], index: int) -> PyTree:
    try:
        return next(data)
    except StopIteration:
        raise ValueError(f"data must have a batch for every step, got an end before batch {index}") from None


def _abstract_state(stage: Stage) -> PyTree:
    """Shapes and shardings to restore into: of the update's program, else of a state made for the purpose."""
    programs = stage.programs()
    if "update" in programs:
        return programs["update"][1][0]
    state = stage.init()
    abstract = checkpoint.abstract_like(state)
    for leaf in jax.tree.leaves(state):  # free the memory before the checkpoint takes its place
        leaf.delete()
    return abstract


_stop = threading.Event()  # SIGTERM or SIGINT has come, or a stage beside this one has failed


@contextlib.contextmanager
def catching_signals() -> Iterator[threading.Event]:
    """Yields the event that SIGTERM and SIGINT set: every stage of this process then saves and ends.

    Handlers belong to the main thread; in others, where a pipeline runs stages, the event is the main thread's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _stop
        return
    _stop.clear()
    previous = {}

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number, _):
        _stop.set()
        restore()
        metrics.say(f"received {signal.Signals(number).name}: saving after this step")

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield _stop
    finally:
        restore()
        _stop.clear()


def end_if_stopped() -> None:
    """For stages that do not train, between parts of their work.

    Raises:
      SystemExit: with code 0, where a signal was caught or a stage beside this one has failed.
    """
    if _stop.is_set():
        raise SystemExit(0)


def _agreed(received: threading.Event) -> Callable[[], bool]:
    """Every call sends this process's flag into an all-reduce and returns the result of the call before.

    Reading one call late keeps the host ahead of the devices; all processes read the same results in the same order,
    so they stop at the same step.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    votes = []

    def vote() -> bool:
        mine = np.full(jax.local_device_count(), received.is_set(), np.int32)
        votes.append(largest(jax.make_array_from_process_local_data(NamedSharding(mesh, P("all")), mine)))
        return bool(votes.pop(0)) if len(votes) > 1 else False

    return vote
