"""Checkpoints: whole or not at all, into any mesh, in part, and the right ones kept."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax.sharding import make_mesh
from instructgpt_jax.training import checkpoint, state

TX = optax.adam(1e-3)


class Pair(flax.struct.PyTreeNode):
    step: jax.Array
    policy: state.TrainState
    value: state.TrainState
    kl_coef: jax.Array


def params(seed, rows=8):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"up": {"kernel": jax.random.normal(keys[0], (rows, 4)), "bias": jax.random.normal(keys[1], (4,))}}


def pair(seed, rows=8):
    policy = state.create(params(seed, rows), TX, with_ema=True)
    value = state.create(params(seed + 1, rows), TX, with_ema=False)
    return Pair(step=jnp.int32(seed), policy=policy, value=value, kl_coef=jnp.float32(0.02))


def opened(tmp_path, keep_last=2, best_metric="", best_mode="min"):
    return checkpoint.Checkpoints(tmp_path, keep_last, best_metric, best_mode)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def test_save_and_restore_on_another_mesh(tmp_path):
    def placed(tree, shape):
        mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
        spec = lambda x: NamedSharding(mesh, P("fsdp", "tensor") if x.ndim == 2 else P())  # noqa: E731
        return jax.tree.map(lambda x: jax.device_put(x, spec(x)), tree)

    saved = placed(pair(3), (8, 1, 1))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, saved, {"step": 3, "config": {"data": {"rows": (1, 2)}}}, {})
    abstract = checkpoint.abstract_like(placed(pair(0), (1, 2, 4)))
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert_same(restored, saved)
    kernel = restored.policy.opt_state[0].mu["up"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tensor") and kernel.sharding.mesh.shape["tensor"] == 4
    assert checkpoint.read_metadata(tmp_path) == {"step": 3, "config": {"data": {"rows": [1, 2]}}}


def test_donated_buffers_do_not_reach_a_save_in_progress(tmp_path):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    live = update({"w": jnp.zeros((32, 512, 512)), "n": jnp.zeros(())})  # 32 MiB, so that writing takes a while
    abstract = checkpoint.abstract_like(live)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, live, {}, {})
        for _ in range(5):
            live = update(live)
        checkpoints.wait()
        restored = checkpoints.restore(abstract)
    assert float(live["n"]) == 6.0
    assert np.unique(np.asarray(restored["w"])).tolist() == [1.0] and float(restored["n"]) == 1.0


def test_runs_beside_each_other_save_at_once(tmp_path):
    """Stages of a pipeline are threads of one process, and may save the same step in the same moment."""
    together, wrong = threading.Barrier(4), []

    def run(name):
        try:
            with checkpoint.Checkpoints(tmp_path / name, 1, "", "min") as checkpoints:
                for step in range(1, 6):
                    together.wait(60)
                    tree = {f"{name}{i}": jnp.full(10, step) for i in range(8)}
                    checkpoints.save(step, tree, {}, {})
                    checkpoints.snapshot(step, tree, {})
        except Exception as error:
            wrong.append(error)
            together.abort()

    threads = [threading.Thread(target=run, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for name in "abcd":
        saved = {f"{name}{i}": jax.ShapeDtypeStruct((10,), jnp.int32, sharding=jnp.zeros(1).sharding) for i in range(8)}
        with checkpoint.Checkpoints(tmp_path / name, 1, "", "min") as checkpoints:
            assert checkpoints.restore(saved)[f"{name}7"].tolist() == [5] * 10


@pytest.mark.parametrize("mode, best", [("min", 2), ("max", 4)])
def test_keeps_the_last_and_the_best(tmp_path, mode, best):
    losses = {1: 3.0, 2: 1.0, 4: 5.0, 5: 2.0, 7: 2.5}
    with opened(tmp_path, keep_last=2, best_metric="loss", best_mode=mode) as checkpoints:
        for step in range(1, 9):  # steps 3, 6, 8 have no evaluation
            checkpoints.save(step, pair(step), {}, {"loss": losses[step], "x": 0.0} if step in losses else {})
    assert checkpoint.steps(tmp_path) == [best, 7, 8]
    # The metrics are on disk: a run that takes over keeps the same best.
    with opened(tmp_path, keep_last=2, best_metric="loss", best_mode=mode) as checkpoints:
        for step in (9, 10, 11):
            checkpoints.save(step, pair(step), {}, {"loss": 2.6})
    assert checkpoint.steps(tmp_path) == [best, 10, 11]
    # By another metric from here on: what has none of it loses to what has.
    with opened(tmp_path, keep_last=1, best_metric="score", best_mode=mode) as checkpoints:
        checkpoints.save(12, pair(12), {}, {"score": 1.0})
        checkpoints.save(13, pair(13), {}, {})
    assert checkpoint.steps(tmp_path) == [12, 13]


def test_parameters_alone(tmp_path):
    saved = pair(5)
    with opened(tmp_path) as checkpoints:
        checkpoints.snapshot(4, pair(4), {"step": 4})
        checkpoints.snapshot(4, pair(4), {"step": 4})  # a resumed run writes it again
        checkpoints.save(5, saved, {"step": 5}, {})
    abstract = checkpoint.abstract_like(params(0))
    assert_same(checkpoint.load_params(tmp_path, abstract, "policy/params"), saved.policy.params)
    assert_same(checkpoint.load_params(tmp_path, abstract, "policy/ema"), saved.policy.ema)
    assert_same(checkpoint.load_params(tmp_path, abstract, "policy/params", step=4), pair(4).policy.params)
    assert_same(checkpoint.load_params(tmp_path / "snapshots" / "4", abstract, "value/params"), pair(4).value.params)
    assert checkpoint.read_metadata(tmp_path, step=4) == {"step": 4}
    assert checkpoint.steps(tmp_path, "snapshots") == [4]
    # A snapshot has no optimiser.
    assert set(checkpoint.read_shapes(tmp_path, "policy", step=4)) == {"step", "params", "ema"}
    assert "opt_state" in checkpoint.read_shapes(tmp_path, "policy")
    assert checkpoint.read_shapes(tmp_path, "value/params")["up"]["kernel"].shape == (8, 4)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), abstract)
    assert checkpoint.load_params(tmp_path, half, "policy/params")["up"]["bias"].dtype == jnp.bfloat16


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, pair(1), {}, {})
    abstract = checkpoint.abstract_like(params(0))
    wrong = {"up": {"kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32)}, "head": abstract["up"]["bias"]}
    with pytest.raises(ValueError) as error:
        checkpoint.load_params(tmp_path, wrong, "value/params")
    text = str(error.value)
    assert "up/kernel: saved (8, 4), wanted (8, 5)" in text
    assert "up/bias: saved (4,), wanted nothing" in text and "head: saved nothing, wanted (4,)" in text
    with pytest.raises(ValueError, match="'params' must be a part of"):
        checkpoint.load_params(tmp_path, abstract, "params")
    with pytest.raises(FileNotFoundError, match="a checkpoint is not in"):
        checkpoint.load_params(tmp_path / "elsewhere", abstract)
    with pytest.raises(FileNotFoundError, match="the checkpoint of step 9"):
        checkpoint.read_metadata(tmp_path, step=9)


def test_save_cut_short_leaves_the_one_before(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        import jax.numpy as jnp
        from instructgpt_jax.training import checkpoint
        with checkpoint.Checkpoints(sys.argv[1], 1, "", "min") as checkpoints:
            tree = {str(i): jnp.full((512, 512), 7.0) for i in range(32)}
            checkpoints.save(1, tree, {"step": 1}, {})
            checkpoints.wait()
            checkpoints.save(2, tree, {"step": 2}, {})
            while not any(name.startswith("2") for name in os.listdir(sys.argv[1] + "/checkpoints")):
                pass  # a thread makes the folder
            os.kill(os.getpid(), signal.SIGKILL)  # the arrays of step 2 are being written
        """
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = [name for name in os.listdir(tmp_path / "checkpoints") if name.startswith("2")]
    assert left and left != ["2"], left  # the half-written save is there, under another name
    assert checkpoint.steps(tmp_path) == [1] and checkpoint.read_metadata(tmp_path) == {"step": 1}
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {str(i): jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=one_device) for i in range(32)}
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        restored = checkpoints.restore(abstract)
        assert np.unique(np.stack([np.asarray(x) for x in restored.values()])).tolist() == [7.0]
        checkpoints.save(2, restored, {"step": 2}, {})
    assert checkpoint.steps(tmp_path) == [1, 2] and sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


LARGE = 512  # rows of a parameter that is too long to stand in the table itself
DAMAGES = {  # what is done to a checkpoint's folder, and what the line says of it
    "manifest": (lambda f: (f / "state/manifest.ocdbt").unlink(), "state/manifest.ocdbt is missing"),
    "manifest cut": (lambda f: cut(f / "state/manifest.ocdbt"), "state/manifest.ocdbt and its tables cannot be read"),
    "table": (lambda f: next((f / "state/d").iterdir()).unlink(), "state/d/.* is missing"),
    "data": (lambda f: largest(f / "state").unlink(), "state/ocdbt.process_0/d/.* is missing"),
    "data cut": (lambda f: cut(largest(f / "state")), r"state/ocdbt.process_0/d/.* has \d+ of at least \d+ bytes"),
    "metadata": (lambda f: (f / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is missing"),
    "metadata empty": (lambda f: (f / "_CHECKPOINT_METADATA").write_text(""), "_CHECKPOINT_METADATA is not JSON"),
    "tree": (lambda f: cut(f / "state/_METADATA"), "state/_METADATA is not JSON"),
    "shardings": (lambda f: (f / "state/_sharding").write_bytes(b"\xff"), "state/_sharding is not JSON"),
    "all of it": (lambda f: shutil.rmtree(f / "state"), "state/_METADATA is missing"),
    "its end": (lambda f: (f / "commit_success.txt").unlink(), "commit_success.txt is missing"),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A workdir with checkpoints of steps 1, 2 and 3, and a snapshot of step 3."""
    workdir = tmp_path_factory.mktemp("three")
    with opened(workdir, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, pair(step, LARGE), {"step": step}, {})
        checkpoints.snapshot(3, pair(3, LARGE), {"step": 3})
    return workdir


@pytest.mark.parametrize("name", DAMAGES)
def test_goes_on_from_the_one_before_a_damaged_checkpoint(three, tmp_path, name, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    assert checkpoint.newest(workdir) == (3, {})
    do, said = DAMAGES[name]
    do(workdir / "checkpoints" / "3")
    where = re.escape(str(workdir / "checkpoints"))
    told = rf"^{where}/3 is damaged \({said}.*\); the newest whole one is {where}/2: name it"
    for read in (checkpoint.read_metadata, lambda w: checkpoint.load_params(w, params(0, LARGE), "policy/params")):
        with pytest.raises(ValueError, match=told):
            read(workdir)
    with opened(workdir, keep_last=1) as checkpoints:
        assert_same(checkpoints.restore(checkpoint.abstract_like(pair(0, LARGE))), pair(2, LARGE))
        assert checkpoints.latest == 2
        checkpoints.save(3, pair(3, LARGE), {"step": 3}, {})
    log = capfd.readouterr().err
    assert re.search(rf"^checkpoint 3 in .* is damaged \({said}.*\): going on from step 2$", log, re.MULTILINE)
    assert len(log.splitlines()) == 1, log
    assert checkpoint.steps(workdir) == [3] and checkpoint.read_metadata(workdir) == {"step": 3}
    assert sorted(os.listdir(workdir / "checkpoints")) == ["3", "3.damaged"]


def test_no_whole_checkpoint_is_one_line_and_nothing_is_lost(three, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    for step in "123":
        (workdir / "checkpoints" / step / "state/manifest.ocdbt").unlink()
    before = sorted(workdir.rglob("*"))
    with opened(workdir, keep_last=1) as checkpoints, pytest.raises(ValueError, match=r"damaged ones alone \(step 3: "):
        checkpoints.restore(checkpoint.abstract_like(pair(0)))
    assert sorted(workdir.rglob("*")) == before
    with pytest.raises(ValueError, match="checkpoints/3 is damaged .*; no other checkpoint there is whole"):
        checkpoint.read_metadata(workdir)


def test_a_damaged_snapshot_is_named(three, tmp_path):
    shutil.copytree(three / "snapshots", tmp_path / "snapshots")
    largest(tmp_path / "snapshots" / "3" / "state").unlink()
    with pytest.raises(ValueError, match=r"snapshots/3 is damaged \(state/.* is missing\)$"):
        checkpoint.load_params(tmp_path / "snapshots" / "3", params(0), "policy/params")


@pytest.mark.parametrize("first", ["", "ValueError('the data must be good')", "SystemExit(0)"])
def test_a_save_that_fails_is_one_line_and_hides_no_error(tmp_path, first):
    script = textwrap.dedent(
        """
        import os, resource, sys
        import jax, jax.numpy as jnp
        from instructgpt_jax.training import checkpoint
        tree = lambda size: {"w": jax.random.normal(jax.random.key(0), (size,))}
        try:
            with checkpoint.Checkpoints(sys.argv[1], 2, "", "min") as checkpoints:
                checkpoints.save(1, tree(100), {"step": 1}, {})
                checkpoints.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: writing ends there
                checkpoints.save(2, tree(100_000), {"step": 2}, {})
                if sys.argv[2]:
                    raise eval(sys.argv[2])
        except (OSError, ValueError) as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # threads of the failed save may still be in C++, where Python's own end aborts (one in forty)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path), first]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    failed = f"the checkpoint of step 2 could not be saved: File too large: {tmp_path}/checkpoints/2"
    lines = result.stderr.splitlines()
    if first.startswith("ValueError"):
        assert lines[0].startswith(failed) and lines[1:] == ["error: ValueError: the data must be good"]
    else:
        assert len(lines) == 1 and lines[0].startswith(f"error: OSError: {failed}")
    assert checkpoint.newest(tmp_path) == (1, {})
