"""Two processes of one job on the CPU: one is killed, the other ends by itself, and both go on as if nothing had been.

They run the toy stage, after what the command line does first: `join_cluster` and `keep_programs`; or they sample.
"""

import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from instructgpt_jax import main, models, rollout, sharding

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import sys
sys.path.insert(0, "tests")
import toy_stage
from instructgpt_jax import main
from instructgpt_jax import workdir as workdirs
workdirs.FREE = (*workdirs.FREE, "sleep")
workdir, sleep = sys.argv[1:]
main.join_cluster()
main.keep_programs(workdir)
overrides = {"toy.num_steps": 24, "checkpoint.every": 4, "mesh.fsdp": 4, "toy.sleep": float(sleep)}
toy_stage.run(workdir, **overrides)
"""


SAMPLING = """
import sys
sys.path.insert(0, "tests")
import jax
import numpy as np
import test_pair
from instructgpt_jax import main
main.join_cluster()
np.save(f"{sys.argv[1]}_{jax.process_index()}.npy", test_pair.sampled(jax.devices()))
"""


def sampled(devices):
    """(12, 5) tokens by a small network with random weights, its slots on all the devices; more prompts than slots."""
    config = models.ModelConfig(vocab_size=64, num_layers=1, width=16, num_heads=2, mlp_width=32, max_length=16)
    mesh = sharding.make_mesh({"data": 1, "fsdp": len(devices), "tensor": 1}, devices)
    rng, whole = np.random.default_rng(0), sharding.replicated(mesh)
    prompts, lengths = rng.integers(0, 64, (12, 7)), rng.integers(1, 8, 12)

    def sample(key, prompts, lengths):
        params = models.init(config, key)
        return rollout.generate(config, params, prompts, lengths, 5, 0, eos_id=(3, 4, 5), wave=4).tokens

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(sample, out_shardings=whole)(jax.random.key(0), prompts, lengths))


class Pair:
    """The stage by two processes of two devices each; their logs are beside the workdir. Leaves no process behind."""

    def __init__(self, workdir, sleep=0.0, program=PROGRAM, **variables):
        self.workdir = workdir
        self.logs = [workdir.with_name(f"{workdir.name}_{number}.log") for number in range(2)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
        } | variables  # fmt: skip
        self.processes = []
        for number, log in enumerate(self.logs):
            command, own = [sys.executable, "-c", program, str(workdir), str(sleep)], {"JAX_PROCESS_ID": str(number)}
            with open(log, "a") as file:
                process = subprocess.Popen(command, cwd=ROOT, env=environment | own, stdout=file, stderr=file)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, number, seconds=90):
        """Exit code of one process; the test fails where it does not end."""
        try:
            return self.processes[number].wait(seconds)
        except subprocess.TimeoutExpired:
            logs = "\n".join(log.read_text() for log in self.logs)
            pytest.fail(f"process {number} has not ended in {seconds} s:\n{logs}")

    def wait_for_lines(self, count):
        deadline = time.monotonic() + 90
        while len(lines(self.workdir)) < count:
            assert time.monotonic() < deadline and [p.poll() for p in self.processes] == [None, None], self.logs
            time.sleep(0.01)


def lines(workdir):
    """metrics.jsonl without what depends on the clock; nothing before it exists."""
    path = workdir / "metrics.jsonl"
    rows = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(row).items() if not key.startswith("perf/")} for row in rows]


def test_a_pair_goes_on_after_one_of_it_was_killed(tmp_path):
    """Programs kept on disk made it hang here: neither the workdir nor the user's own place may hold any."""
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    with Pair(whole, JAX_COMPILATION_CACHE_DIR=str(cache)) as pair:
        assert [pair.wait(number) for number in range(2)] == [0, 0]
    assert not cache.exists()

    with Pair(killed, sleep=0.05) as pair:
        pair.wait_for_lines(random.randint(10, 16))  # after the first checkpoint, long before the end
        time.sleep(random.uniform(0.0, 0.2))
        pair.processes[1].kill()
        assert pair.wait(0, seconds=60) not in (0, None)
        said = pair.logs[0].read_text()
    # One line, but in the middle of a save: there the service of the job ends the process.
    assert "error: another process of this job has ended" in said or "stopped sending heartbeats" in said, said
    assert lines(killed)[-1]["step"] < 24

    with Pair(killed) as pair:
        assert [pair.wait(number) for number in range(2)] == [0, 0]
    assert "restored step" in pair.logs[0].read_text()
    assert not (killed / ".compiled").exists()
    assert lines(killed) == lines(whole) and lines(whole)[-1]["step"] == 24


def test_a_pair_samples_what_one_device_does(tmp_path):
    with Pair(tmp_path / "tokens", program=SAMPLING) as pair:
        assert [pair.wait(number) for number in range(2)] == [0, 0]
    expected = sampled(jax.devices()[:1])
    assert np.isin(expected, (3, 4, 5)).any() and not np.isin(expected, (3, 4, 5)).any(axis=1).all()
    for number in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"tokens_{number}.npy"), expected)


def test_only_what_comes_from_another_process_ends_in_one_line(capsys, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    for text in ("RESOURCE_EXHAUSTED: out of memory", "UNKNOWN: Gloo AllGather failed: Connection reset by peer"):
        error = jax.errors.JaxRuntimeError(text)
        main.end_without_peer(type(error), error, None)
        said = capsys.readouterr().err
        assert text in said and ("error: another process" in said) == bool(codes)
    assert codes == [1]
