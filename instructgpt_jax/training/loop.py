"""The one training loop. A stage is pure functions; everything impure is here: data, logs, checkpoints, signals.

What a run promises:
  * Killed at any moment, it resumes to the same bits: parameters, optimiser, every line of metrics.jsonl but `perf/*`.
  * SIGTERM, SIGINT and a notice that the machine will be taken save and exit 0, on all processes at the same step; a
    second signal ends at once.
  * A non-finite metric stops it, and no state is saved before its own step's metrics were read and found finite.
  * A complete run is skipped, and a workdir of another run is refused, or of the same one with other data.
  * A checkpoint that was damaged since it was saved is named, and the run goes on from the one before it.
  * What cannot be written ends it with one line: what, where, and the last good checkpoint.
  * A step that takes far longer than the others is told, with where all threads are; copies of the state or
    of frozen networks that differ between processes end it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instructgpt_jax import errors, process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.cluster import agreeing
from instructgpt_jax.training import checkpoint, copies, ledger, metrics, resume, tracking
from instructgpt_jax.training.restart import Phases
from instructgpt_jax.training.watchdog import Watchdog

PyTree = Any


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
      models: entries of config.models as they were built, with their architecture, see networks.Network.
      read: kind of data -> what was read of it, see datasets.described.
      rates: (num_steps of a run, step) -> learning rates of the update that follows, by name.
      steps_per_epoch: what -1 means in `config.eval_every` and `snapshot_every`; 0 = the stage has no epochs.
      finish: (state, frozen) -> state, once after the last update; what it returns is evaluated and saved.
    """

    init: Callable[[], PyTree]
    frozen: Callable[[], PyTree]
    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, dict[str, jax.Array]]]
    data: Callable[[int], Iterator[PyTree]]
    evaluate: Callable[[PyTree, PyTree], tuple[dict[str, float], list[dict]]]
    programs: Callable[[], dict[str, tuple]]
    num_steps: int
    models: dict[str, dict]
    read: dict[str, dict]
    rates: Callable[[int, int], dict[str, float]]
    steps_per_epoch: int = 0
    finish: Callable[[PyTree, PyTree], PyTree] = lambda state, frozen: state


def train(
    build: Callable[[ConfigDict, Mesh], Stage], config: ConfigDict, mesh: Mesh, workdir: epath.PathLike
) -> PyTree:
    """Builds a stage and runs it; one that goes on is built with the architectures that it was begun with."""
    phases = Phases()
    config = resume.recalled(config, workdir)
    stage = build(config, mesh)
    phases.end("data and networks")
    return run(stage, config, workdir, phases)


def run(stage: Stage, config: ConfigDict, workdir: epath.PathLike, phases: Phases | None = None) -> PyTree:
    """Trains a stage to its end in `workdir`, from wherever an earlier run there stopped.

    Args:
      stage: what to train.
      config: what it was built from, valid; read here are `stage, log, log_every, eval_every` (0 = only at the end),
        `snapshot_every` (0 = never), `data.allow_changed`, `checkpoint`: dict(every, keep_last, best_metric,
        best_mode) and `watch`: dict(factor, seconds, copies_every).
      workdir: local or gs:// directory.
      phases: of this start, so far.

    Returns:
      The final state.

    Raises:
      ValueError: the workdir holds something else, or the same stage of another model or other data, or no checkpoint
        that is whole.
      OSError: something could not be written, or read; the message names it and the last good checkpoint.
      FloatingPointError: a metric is not finite; the message has the step and its name.
      SystemExit: with code 0, after the save that a signal asked for.
    """
    workdir = epath.Path(workdir)
    try:
        config = workdirs.resolved(config, stage.models, stage.steps_per_epoch)
        return _run(stage, config, workdir, phases or Phases())
    except OSError as error:
        text = errors.describe(error) or error.strerror or str(error)
        raise OSError(f"{config.stage}: {text}; {_last_good(workdir)}") from error


def _run(stage: Stage, config: ConfigDict, workdir: epath.Path, phases: Phases) -> PyTree:
    agreeing.same("networks and data", {"config": config.to_dict(), "data": stage.read})
    resolved, c = workdirs.claim(config, workdir), config.checkpoint
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(process.catching_signals())
        stop = received.is_set if jax.process_count() == 1 else process.agreed(received)
        watch = Watchdog(config.stage, config.watch.factor, config.watch.seconds)
        watchdog = stack.enter_context(contextlib.closing(watch))
        watchdog.begin("the start, before step", 1)
        opened = checkpoint.Checkpoints(workdir, c.keep_last, c.best_metric, c.best_mode)
        checkpoints = stack.enter_context(opened)

        # 1. The workdir's own newest whole checkpoint; else, inside init: 2. init_from, 3. fresh parameters.
        step, saved = 0, {}
        if checkpoints.latest is not None:
            state = checkpoints.restore(_abstract_state(stage))
            step = checkpoints.latest
            saved = checkpoint.read_metadata(workdir, step)
            process.say(f"{config.stage}: restored step {step} from {workdir}")
            phases.end("restore")
        if step >= stage.num_steps:
            process.say(f"{config.stage}: complete in {workdir} at step {step} of {stage.num_steps}, nothing to do")
            return state
        resume.check_data(config.stage, saved.get("data"), stage.read, config.data.allow_changed)
        resume.tell_schedule(config.stage, step, saved.get("num_steps"), stage.num_steps, stage.rates)
        resume.tell_data(stage.read, workdir)
        if not step:
            state = stage.init()
        first, frozen = step + 1, stage.frozen()
        phases.end("frozen networks" if step else "networks on the devices")
        data = stack.enter_context(contextlib.closing(stage.data(step)))
        tracked = stack.enter_context(tracking.run(config.log.wandb, workdir, resolved))
        writer = stack.enter_context(metrics.Writer(workdir, step, stage.num_steps, config.stage, tracked))
        copies_every = config.watch.copies_every if jax.process_count() > 1 else 0
        bits_of, groups = copies.make_sums((state, frozen)) if copies_every else (None, None)
        meter, spent = metrics.Meter(), ledger.Ledger(saved.get("spent"), step)

        def settle(at: int, on_device: dict[str, jax.Array], bits: jax.Array | None) -> dict[str, float]:
            """Reads the metrics of step `at`, refuses what is not finite or not the same everywhere, and logs."""
            on_host = metrics.to_host(on_device)
            spent.count(on_host)
            values = meter.step_done(on_host)
            if at == first:
                phases.end("first batch and step")
                phases.tell(config.stage, at)
            kept = f"the last good checkpoint in {workdir} is of step {checkpoints.latest or 'none'}"
            bad = metrics.find_nonfinite(values)
            if bad is not None:
                raise FloatingPointError(f"{config.stage}: {bad} is {values[bad]} at step {at}; {kept}")
            where = copies.unequal(np.asarray(bits), groups) if bits is not None else ""
            if where:
                raise FloatingPointError(f"{config.stage}: the copies {where} differ at step {at}; {kept}")
            if at % config.log_every == 0 or at == stage.num_steps:
                values |= meter.rates()
                writer.scalars(at, values)
                writer.progress(at, values)
            return values

        pending = None  # what `settle` takes: read one step late, so that the device never waits for the host
        while step < stage.num_steps:
            watchdog.begin("step", step + 1)
            state, on_device = stage.update(state, frozen, _next(data, step))
            step += 1
            if pending is not None:
                settle(*pending)
            pending = (step, on_device, bits_of((state, frozen)) if _due(step, copies_every) else None)

            last = step == stage.num_steps
            stopping = stop() | process.will_be_taken(step)
            evaluating = last or _due(step, config.eval_every)
            snapshotting = _due(step, config.snapshot_every)
            saving = last or stopping or _due(step, c.every)
            if not (evaluating or snapshotting or saving):
                continue

            # Nothing of a step is kept before its metrics are known to be finite.
            values, pending = settle(*pending), None
            watchdog.begin("evaluating or saving step", step)
            if last:
                state = stage.finish(state, frozen)
            if evaluating:
                evaluation, samples = stage.evaluate(state, frozen)
                evaluation = {key: float(value) for key, value in evaluation.items()}
                if evaluation:
                    writer.scalars(step, evaluation)
                writer.samples(step, samples)
                values |= evaluation
            about = {"config": resolved, "num_steps": stage.num_steps, "data": stage.read, "spent": spent.so_far()}
            metadata = {"step": step, "data_index": step} | about
            if snapshotting:
                checkpoints.snapshot(step, state, metadata)
            if saving:
                writer.flush()
                finite = {key: value for key, value in values.items() if math.isfinite(value)}
                checkpoints.save(step, state, metadata, finite)
            if stopping and not last:
                checkpoints.wait()
                process.say(f"{config.stage}: stopped by a signal, saved step {step} in {workdir}")
                raise SystemExit(0)
            meter.skip()
        return state


def _last_good(workdir: epath.Path) -> str:
    step, _ = checkpoint.newest(workdir)
    return f"the last good checkpoint in {workdir} is of step {step or 'none'}"


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
