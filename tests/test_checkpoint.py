"""Checkpoints: whole or not at all, into any mesh, in part, and the right ones kept."""

import os
import signal
import subprocess
import sys
import textwrap

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


def params(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"up": {"kernel": jax.random.normal(keys[0], (8, 4)), "bias": jax.random.normal(keys[1], (4,))}}


def pair(seed):
    policy = state.create(params(seed), TX, with_ema=True)
    value = state.create(params(seed + 1), TX, with_ema=False)
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
    with pytest.raises(ValueError, match="best_mode must be 'min' or 'max', got 'least'"):
        opened(tmp_path, best_metric="loss", best_mode="least")


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
