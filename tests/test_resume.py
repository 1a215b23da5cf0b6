"""SFT and the reward model through the command line: kill -9 loses nothing, SIGTERM saves, another mesh goes on."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import compiling
import jax
import numpy as np
import pytest
import tiny_supervised
from saved_runs import arrays, lines

from instructgpt_jax import sharding
from instructgpt_jax.stages import reward as reward_stage
from instructgpt_jax.stages import sft
from instructgpt_jax.training import checkpoint, loop

STEPS = 6
# Compiling is most of these runs: quick code, and kept on disk from one run to the next.
QUICK = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": compiling.SOON,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_supervised.make_world(tmp_path_factory.mktemp("world"))


def start(stage, world, workdir, *flags):
    command = [sys.executable, "-m", "instructgpt_jax.main", f"--workdir={workdir}", *flags]
    command.append(f"--config=tests/tiny_supervised.py:{stage},{world}")
    environment = os.environ | QUICK | {"JAX_COMPILATION_CACHE_DIR": str(world / "cache")}
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=tiny_supervised.ROOT, env=environment, stdout=log, stderr=log)


def finish(process, workdir, code=0):
    assert process.wait(timeout=300) == code, pathlib.Path(f"{workdir}.log").read_text()


def state(workdir):
    """The bytes of every array of the last checkpoint, optimiser included."""
    return jax.tree.map(lambda x: x.tobytes(), arrays(workdir))


def kill_after(process, workdir, count, delay):
    """kill -9, `delay` seconds after the log has `count` lines."""
    deadline = time.monotonic() + 300
    while len(lines(workdir)) < count:
        assert process.poll() is None and time.monotonic() < deadline, pathlib.Path(f"{workdir}.log").read_text()
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    return process.wait()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_kill_9_loses_nothing(stage, world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(stage, world, whole), whole)
    assert [line["step"] for line in lines(whole)] == [1, 2, 3, 3, 4, 5, 6, 6]  # with evaluations at 3 and 6
    rng = random.Random()
    for _ in range(2):
        already = len(lines(killed))
        moment = rng.randint(already + 1, max(already + 1, STEPS - 1)), rng.uniform(0.0, 0.1)
        print(f"{stage}: killed {moment[1]:.3f} s after line {moment[0]}")
        if kill_after(start(stage, world, killed), killed, *moment) == 0:
            break  # it was faster
    finish(start(stage, world, killed), killed)
    assert lines(killed) == lines(whole)
    assert lines(killed, "samples.jsonl") == lines(whole, "samples.jsonl")
    assert state(killed) == state(whole)


@pytest.mark.parametrize("flags, code", [((), 0), (("--preemptible",), 143)])
def test_sigterm_saves_and_exits(flags, code, world, tmp_path):
    workdir = tmp_path / "run"
    process = start("reward", world, workdir, *flags)
    while not lines(workdir):
        assert process.poll() is None, pathlib.Path(f"{workdir}.log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process, workdir, code)
    (step,) = checkpoint.steps(workdir)
    assert lines(workdir)[-1]["step"] == step <= STEPS


@pytest.mark.parametrize("stage, build", [("sft", sft.build), ("reward", reward_stage.build)])
def test_another_mesh_goes_on(stage, build, world, tmp_path):
    """The last two updates of six done again on (1, 2, 4), from the checkpoint that (8, 1, 1) left: the same losses."""

    def run(workdir, *shape):
        changes = {"data.valid_fraction": 0.0, "checkpoint.keep_last": 2}
        config = tiny_supervised.config(
            stage, world, **changes | ({"data.demonstrations": ()} if stage != "sft" else {})
        )
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
        with jax.set_mesh(mesh):
            loop.run(build(config, mesh), config, workdir)
        return [line[f"{stage}/loss"] for line in lines(workdir) if f"{stage}/loss" in line]

    whole = run(tmp_path / "whole", 8, 1, 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    assert checkpoint.steps(tmp_path / "moved") == [4, 6]
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "6")
    moved = run(tmp_path / "moved", 1, 2, 4)
    assert len(moved) == STEPS and moved[:4] == whole[:4]
    np.testing.assert_allclose(moved[4:], whole[4:], rtol=2e-4)
