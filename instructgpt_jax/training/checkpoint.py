"""Checkpoints: the one module that knows Orbax (and integrity.py its files).

Layout of a workdir::

    checkpoints/<step>/     whole state, with the data index, the resolved config and what was read
    snapshots/<step>/       the state without the optimisers' part, for choosing among epochs

One checkpoint is one atomic save: Orbax writes to a temporary name and renames it (or, on gs://, commits it with a last
file), so it appears whole or not at all, and the one before it is deleted only afterwards. Saving is asynchronous: the
call returns when the arrays are on the host, before the next update may reuse (donate) their buffers, and writes in the
background.

What a disk or a person does to it later is another matter: before anything is read, `integrity.damage` looks whether
every file that it needs is there, and long enough. A run goes on from the newest checkpoint that is whole. Who reads
the newest of another run is told instead: an older one is another model.

Restore precedence of a training run:
  1. the newest whole checkpoint of its own workdir: everything, including the position in the data;
  2. else `init_from` of its networks (an earlier stage's workdir, a snapshot, a Hugging Face directory): parameters
     alone;
  3. else fresh parameters from the seed.
The loop does 1 through `Checkpoints.restore`; a stage's `init` does 2 and 3 and calls `load_params` for our workdirs.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from instructgpt_jax import process
from instructgpt_jax.cluster import ending
from instructgpt_jax.sharding import path_name
from instructgpt_jax.training.integrity import COMMITTED, STATE, damage, reason

PyTree = Any

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
DAMAGED = ".damaged"  # what is added to the name of a checkpoint that a run went round


class Checkpoints:
    """The checkpoints of one workdir, for the length of a run. Every process calls every method."""

    def __init__(self, workdir: epath.PathLike, keep_last: int, best_metric: str, best_mode: str):
        """Opens `workdir/checkpoints` and clears what a save cut short left there.

        Args:
          workdir: local or gs:// directory.
          keep_last: how many of the newest checkpoints to keep, at least 1.
          best_metric: also keep the best checkpoint by this metric of `save`; '' = none.
          best_mode: 'min' or 'max', which value is the best.
        """
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)]
        if best_metric:
            worst = math.inf if best_mode == "min" else -math.inf  # of what was saved under another best_metric
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics.get(best_metric, worst),
                reverse=best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            keep.append(best)
        self._workdir = _absolute(workdir)
        self._best_metric = best_metric
        self._saving: int | None = None  # the last step whose save was started
        with self._naming("opened"):
            self._checkpointer = ocp.training.Checkpointer(
                self._workdir / CHECKPOINTS,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Waits for the save in progress. Its failure is raised, but for where another error is on its way."""
        try:
            with self._naming("saved", error):
                self._checkpointer.close()
        except OSError as failed:
            if error is None or isinstance(error, SystemExit):
                raise
            if str(failed) != str(error):
                process.say(str(failed))

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: PyTree, metadata: dict, metrics: dict[str, float]) -> None:
        """Starts an asynchronous save; a failed one raises OSError at the next call or on leaving the context.

        Args:
          step: the state's step; saving one that exists does nothing.
          state: tree of arrays. Its buffers may be donated as soon as this returns.
          metadata: JSON dict stored in the same save and read by `read_metadata`.
          metrics: this step's metrics; only the one that decides the best is kept, if it is among them.
        """
        if step == self.latest:
            return
        best = {key: metrics[key] for key in (self._best_metric,) if key in metrics}
        self.wait()  # for the save before, whose failure has its own step
        self._saving = step
        with self._naming("saved"):
            with _saving_context():
                self._checkpointer.save_checkpointables_async(
                    step, {STATE: state}, force=True, custom_metadata=metadata, metrics=best or None
                )

    def snapshot(self, step: int, state: PyTree, metadata: dict) -> None:
        """Saves the state without its optimisers' part as `snapshots/<step>`, and waits until it is written.

        Waiting keeps the order: a checkpoint never exists without the snapshots that came before it.
        """
        path = self._workdir / SNAPSHOTS / str(step)
        try:
            with _saving_context():
                kept = {STATE: without_optimizer(state)}
                ocp.save_checkpointables(path, kept, overwrite=True, custom_metadata=metadata)
        except (OSError, ValueError, RuntimeError) as error:
            if peer := ending.lost(error):
                raise peer from None
            raise OSError(f"the snapshot of step {step} could not be saved: {reason(error)}") from error

    def restore(self, abstract: PyTree) -> PyTree:
        """The newest whole checkpoint's state in shapes, dtypes and shardings of `abstract`, whatever mesh saved it.

        Newer ones that are damaged are named in a line, and renamed when the other one was read, so that their steps
        can be saved again; `latest` is then the step of the state.

        With several processes the first one decides, so that all read the same step, or none. A file that fails
        afterwards, while it is read, is an error and no reason to take another step: the process that meets it says so
        at once, and JAX's coordination service ends the others, which wait for it in a barrier, within five minutes.

        Raises:
          ValueError: no checkpoint is whole, or one that seemed to be cannot be read; nothing was renamed.
        """
        step, damaged = newest(self._workdir) if jax.process_index() == 0 else (None, {})
        if jax.process_count() > 1:
            agreed = int(multihost_utils.broadcast_one_to_all(np.array(-1 if step is None else step)))
            step = None if agreed < 0 else agreed
        if step is None:
            listed = "; ".join(f"step {n}: {why}" for n, why in damaged.items())
            raise ValueError(
                f"{self._workdir} must have a checkpoint that is whole, to go on from, got damaged ones alone "
                f"({listed}); nothing was deleted: put the files back, or take a new --workdir"
            )
        for n, why in damaged.items():
            process.say(f"checkpoint {n} in {self._workdir} is damaged ({why}): going on from step {step}")
        try:
            state = self._checkpointer.load_checkpointables(step, {STATE: abstract})[STATE]
        except Exception as error:  # Orbax raises bare ones
            raise ValueError(
                f"checkpoint {step} in {self._workdir} could not be read: {reason(error)}; to go on from the one "
                f"before it, rename {CHECKPOINTS}/{step}"
            ) from error
        self.set_aside(damaged)
        return state

    def set_aside(self, damaged: dict[int, str]) -> None:
        """Renames damaged checkpoints to `<step>.damaged`, which no run reads or deletes."""
        if jax.process_index() == 0:
            for n in damaged:
                path = self._workdir / CHECKPOINTS / str(n)
                kept = path.parent / (path.name + DAMAGED)
                if kept.exists():
                    kept.rmtree()
                path.rename(kept)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        self._checkpointer.reload()

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises OSError if a save failed."""
        with self._naming("saved"):
            self._checkpointer.wait()

    @contextlib.contextmanager
    def _naming(self, what: str, outer: BaseException | None = None) -> Iterator[None]:
        """Errors of the file system, whatever Orbax makes of them, as an OSError of one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if peer := ending.lost(error):  # the disk is not to blame
                raise peer from None
            which = "checkpoints" if self._saving is None else f"the checkpoint of step {self._saving}"
            raise OSError(f"{which} could not be {what}: {reason(error, outer)}") from error


def _saving_context() -> ocp.Context:
    """Directories are made before a save's call returns.

    In the background Orbax waits for them by the number of the process's newest save, which is another one's where two
    stages save at once in threads of their own: they would write into folders that are not there yet.
    """
    return ocp.Context(async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False))


def abstract_like(tree: PyTree) -> PyTree:
    """ShapeDtypeStructs with the shapes, dtypes and shardings of the arrays of `tree`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def without_optimizer(state: PyTree) -> PyTree:
    """Nested dicts of the fields of a (nested) state, less every `opt_state` and what is None."""
    if not dataclasses.is_dataclass(state):
        return state
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {
        name: without_optimizer(value) for name, value in fields.items() if name != "opt_state" and value is not None
    }


def find(directory: epath.PathLike, step: int | None = None) -> epath.Path:
    """The folder of one checkpoint.

    Args:
      directory: a workdir (its newest checkpoint), or a checkpoint or snapshot itself.
      step: a step of the workdir, looked for among its checkpoints, then its snapshots.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the checkpoint is damaged. An older one is not taken in its place: it is another model.
    """
    directory = _absolute(directory)
    if step is not None:
        candidates = [directory / CHECKPOINTS / str(step), directory / SNAPSHOTS / str(step)]
    else:
        candidates = [directory, *(directory / CHECKPOINTS / str(n) for n in reversed(_numbers(directory)))]
    for path in candidates:
        if path.name.isdigit() and path.is_dir():
            why = damage(path)
            if why:
                raise ValueError(f"{path} is damaged ({why})" + _instead(path))
            return path
    wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
    raise FileNotFoundError(f"{wanted} is not in {directory}")


def _instead(path: epath.Path) -> str:
    """What else there is, for the error about a damaged checkpoint."""
    if path.parent.name != CHECKPOINTS:
        return ""
    step, _ = newest(path.parent.parent)
    if step is None:
        return "; no other checkpoint there is whole"
    whole = path.parent / str(step)
    return f"; the newest whole one is {whole}: name it, or run its stage again, which goes on from there"


def steps(workdir: epath.PathLike, kind: str = CHECKPOINTS) -> list[int]:
    """Steps of the checkpoints (or, with kind 'snapshots', the snapshots) of a workdir, in rising order.

    Their saves were finished; whether all of their files are still there, `damage` says.
    """
    folder = _absolute(workdir) / kind
    return [n for n in _numbers(workdir, kind) if _is_committed(folder / str(n))]


def _numbers(workdir: epath.PathLike, kind: str = CHECKPOINTS) -> list[int]:
    """As `steps`, with the folders of a local workdir that have lost even the file that says that they were finished.

    In an object store such a folder is a save that never was.
    """
    folder = _absolute(workdir) / kind
    if not folder.is_dir():
        return []
    names = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return [n for n in names if "://" not in str(folder) or _is_committed(folder / str(n))]


def newest(workdir: epath.PathLike) -> tuple[int | None, dict[int, str]]:
    """Step of the newest whole checkpoint of a workdir, None without one; newer step -> what is wrong with it."""
    damaged = {}
    for step in reversed(_numbers(workdir)):
        why = damage(_absolute(workdir) / CHECKPOINTS / str(step))
        if not why:
            return step, damaged
        damaged[step] = why
    return None, damaged


def read_metadata(directory: epath.PathLike, step: int | None = None) -> dict:
    """What was saved beside the arrays: `step`, `data_index`, `num_steps` of the run, `config` (resolved), `data` that
    were read (see datasets.described) and what the run has `spent` (see ledger.Ledger).

    Args:
      directory, step: as for `find`.
    """
    return dict(ocp.metadata(find(directory, step), checkpointable_name=STATE).custom_metadata)


def read_shapes(directory: epath.PathLike, which: str = "", step: int | None = None) -> PyTree:
    """Nested dicts of ShapeDtypeStructs (no shardings) of a saved state, without reading an array.

    Args:
      directory, step: as for `find`.
      which: path of a subtree, such as 'params' or 'policy/ema'; '' = all.
    """
    path = find(directory, step)
    tree = ocp.metadata(path, checkpointable_name=STATE).metadata
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _subtree(tree, which, path))


def load_params(directory: epath.PathLike, abstract: PyTree, which: str = "params", step: int | None = None) -> PyTree:
    """One subtree of a saved state, straight into its shards; optimiser and everything else stay on disk.

    Args:
      directory, step: as for `find`.
      abstract: tree of ShapeDtypeStruct with shardings; dtypes may differ from the saved ones.
      which: path of the subtree, such as 'params', 'ema' or 'policy/params'; '' = all.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a damaged one, no such subtree, or its names or shapes are not those of `abstract`.
    """
    path = find(directory, step)
    saved, wanted = _shapes(read_shapes(path, which)), _shapes(abstract)
    names = sorted(saved.keys() | wanted.keys())
    differences = [
        f"  {name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"{which} of {path} must have the parameters of the model:\n" + "\n".join(differences))
    nested = abstract
    for key in filter(None, reversed(which.split("/"))):
        nested = {key: nested}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            restored = ocp.load(path, nested, checkpointable_name=STATE)
    except Exception as error:  # Orbax raises bare ones
        raise ValueError(f"{path} could not be read: {reason(error)}") from error
    return _subtree(restored, which, path)


def _is_committed(path: epath.Path) -> bool:
    """A save in progress, or one cut short, has a longer name (`5.orbax-checkpoint-tmp`); on gs:// no commit file."""
    return path.name.isdigit() and (path / STATE).is_dir() and (path / COMMITTED).exists()


def _subtree(tree: PyTree, which: str, path: epath.Path) -> PyTree:
    """`tree['a']['b']` for 'a/b'."""
    for key in filter(None, which.split("/")):
        if not isinstance(tree, dict) or key not in tree:
            known = sorted(tree) if isinstance(tree, dict) else "arrays"
            raise ValueError(f"{which!r} must be a part of {path}, got {known} where {key!r} was looked for")
        tree = tree[key]
    return tree


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax wants absolute paths; gs:// ones are."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().resolve()
