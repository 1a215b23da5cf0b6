"""SFT and the reward model by two processes of one job: what one process does, and a signal to either saves on both."""

import functools
import os
import signal
import time

import jax
import jobs
import numpy as np
import pytest
import tiny_supervised
from saved_runs import arrays, lines

from instructgpt_jax.training import checkpoint

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_supervised.make_world(tmp_path_factory.mktemp("world"))


def arguments(world, stage, name, **changes):
    settings = {"mesh.tensor": 2, "mesh.fsdp": -1, "watch.copies_every": 2, f"{stage}.optimizer.eps": 1e-3} | changes
    settings["models.model.residual_dropout"] = 0.0  # its masks belong to rows, and processes pack rows of their own
    keys = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config=tests/tiny_supervised.py:{stage},{world}", f"--workdir={world / name}", *keys]


def start(world, stage, name, count, **options):
    return jobs.running(arguments(world, stage, name), world / name, count, 4, **options)


# The tensor axis lies within each process; sft is told to end and goes on, the reward model runs without a break.
@pytest.mark.parametrize("stage, stopped", [("sft", True), ("reward", False)])
def test_a_pair_equals_one_process(world, stage, stopped):
    pair, one = world / f"{stage}_pair", world / f"{stage}_one"
    if stopped:
        with start(world, stage, pair.name, 2, changes={0: {"held": 3}, 1: {"held": 4}}) as processes:
            deadline = time.monotonic() + 200
            while len(lines(pair)) < 2:
                assert time.monotonic() < deadline and processes[1].is_alive(), jobs.said(pair)
                time.sleep(0.05)
            os.kill(processes[0].pid, signal.SIGKILL)
            assert jobs.code(processes[1], 60) not in (0, None), jobs.said(pair, 1)
        last = jobs.said(pair, 1, awaited="error: ").splitlines()[-1]
        assert last.startswith(("error: process 0 of this job", "error: another process of this job")), last
        with start(world, stage, pair.name, 2, changes={number: {"slow": 0.5} for number in range(2)}) as processes:
            deadline = time.monotonic() + 200
            while len(lines(pair)) < 4:
                assert time.monotonic() < deadline and processes[1].is_alive(), jobs.said(pair)
                time.sleep(0.05)
            os.kill(processes[1].pid, signal.SIGTERM)  # only one of them is told
            assert [jobs.code(process, 100) for process in processes] == [0, 0], jobs.said(pair)
        step = checkpoint.newest(pair)[0]
        assert f"stopped by a signal, saved step {step}" in jobs.said(pair) and 3 < step < STEPS
    for name, count in ((pair.name, 2), (one.name, 1)):
        with start(world, stage, name, count) as processes:
            assert [jobs.code(process) for process in processes] == [0] * count, jobs.said(world / name)
    mine, theirs = lines(pair), lines(one)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] and mine[-1]["step"] == STEPS
    for left, right in zip(mine, theirs, strict=True):
        for key, value in right.items():
            assert left[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (left["step"], key)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-6)
    jax.tree.map(compare, arrays(pair, "params"), arrays(one, "params"))
