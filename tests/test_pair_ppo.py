"""PPO-ptx by two processes of one job: what one process with as many devices does, also after one of them was killed.

They run the command line on two fake devices each. All processes are forks of one that has imported the program, and
nothing in them is different but that process 1 may be held up, so that it is killed between two checkpoints.
"""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import socket
import sys
import time
from typing import NamedTuple

import compiling
import jax
import numpy as np
import pytest
import small_runs
from absl import app
from saved_runs import arrays, lines

from instructgpt_jax import main
from instructgpt_jax.data import build_tokens, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.training import checkpoint, loop

ITERATIONS, SAVED = 6, 3  # of the run, and between checkpoints
HELD = 5  # process 1 stops before the iteration of this index: by then the other one has written the fourth's metrics
SETTINGS = {
    "mesh.fsdp": 2, "mesh.tensor": 2, "ppo.iterations": ITERATIONS, "checkpoint.every": SAVED, "eval_every": 0,
    "ppo.eval_batches": 0, "rollout.wave": 4,
    "ppo.policy_optimizer.eps": 1e-3, "ppo.value_optimizer.eps": 1e-3,  # else Adam makes steps of rounding errors
}  # fmt: skip
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["instructgpt_jax.main"])


def run(folder: pathlib.Path, name: str, devices: int, held: bool, variables: dict[str, str]) -> None:
    """The command line in a process of its own; what it says is in `folder/NAME_<process>.log`.

    The pair reads its text as token shards, one process as text.
    """
    with open(folder / f"{name}_{variables.get('JAX_PROCESS_ID', 0)}.log", "w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    os.chdir(small_runs.ROOT)
    os.environ |= variables | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {compiling.SOON}"}
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache" / name))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    following = loop._next

    def hold_up(data, index):
        while index == HELD:
            time.sleep(1)
        return following(data, index)

    if held:
        loop._next = hold_up
    sys.argv = ["main", f"--config=tests/small_runs.py:{folder}", f"--workdir={folder / name}"]
    sys.argv += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    sys.argv += [f"--config.data.tokenizer={folder}/bpe"]
    sys.argv += [f"--config.data.pretraining=tokens:{folder}/shards/*.tokens"] if name == "pair" else []
    try:
        app.run(main.main, flags_parser=main.parse)
    except Exception:  # as at the end of a program: multiprocessing would write the trace itself
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None


@contextlib.contextmanager
def running(folder, name, count, held=False):
    """As many processes of one job, four devices in all; leaves none behind."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(count)}
    processes = []
    for number in range(count):
        variables = job | {"JAX_PROCESS_ID": str(number)} if count > 1 else {}
        processes.append(FORKS.Process(target=run, args=(folder, name, 4 // count, held and number == 1, variables)))
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def code(process, seconds=300):
    """Exit code of a process; None where it has not ended in time."""
    process.join(seconds)
    return process.exitcode


def parameters(workdir):
    """Of the newest checkpoint: the policy, its average, and the value model."""
    state = arrays(workdir)
    return [state["policy"]["params"], state["policy"]["ema"], state["value"]["params"]]


class Runs(NamedTuple):
    """What there is after the runs.

    one, pair: workdirs of one process, and of the pair that was killed and started again.
    before: lines of the pair when its process 1 was killed.
    alone: exit code of the other process then, and what it had said.
    again: what process 0 of the second pair said.
    """

    one: pathlib.Path
    pair: pathlib.Path
    before: list[dict]
    alone: tuple[int, str]
    again: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    workdir, log = folder / "pair", folder / "pair_0.log"
    small_runs.write(folder)
    text = f"jsonl:{folder}/text.jsonl"
    texts = (record["text"] for record in sources.load((text,), "pretraining", 0))
    tokenizers.train(texts, small_runs.VOCAB_SIZE, folder / "bpe")
    build_tokens.build(text, f"{folder}/bpe", f"{folder}/shards", build_tokens.Part(1, 1), workers=1, skip_bad=0)
    with running(folder, "pair", 2, held=True) as processes:
        deadline = time.monotonic() + 300
        while len(lines(workdir)) <= SAVED or checkpoint.newest(workdir)[0] != SAVED:
            assert time.monotonic() < deadline and [p.exitcode for p in processes] == [None, None], log.read_text()
            time.sleep(0.05)
        before = lines(workdir)
        processes[1].kill()
        alone = code(processes[0], 120), log.read_text()
    with running(folder, "pair", 2) as processes:
        assert [code(process) for process in processes] == [0, 0], log.read_text()
    with running(folder, "one", 1) as processes:
        assert code(processes[0]) == 0, (folder / "one_0.log").read_text()
    return Runs(folder / "one", workdir, before, alone, log.read_text())


def test_a_pair_equals_one_process(runs):
    """Every metric of every iteration, and the parameters after the last, to rounding."""
    mine, theirs = lines(runs.pair), lines(runs.one)
    assert [line["step"] for line in mine] == list(range(1, ITERATIONS + 1)) and mine[0].keys() == theirs[0].keys()
    assert abs(mine[-1]["objective/kl"]) > 1e-3 and mine[-1]["ptx/loss"] < mine[0]["ptx/loss"]
    for left, right in zip(mine, theirs, strict=True):
        for key, value in right.items():
            assert left[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (left["step"], key)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(compare, parameters(runs.pair), parameters(runs.one))


def test_a_pair_goes_on_after_one_of_it_was_killed(runs):
    """To the very same lines: what came after the checkpoint is made again."""
    assert f"restored step {SAVED}" in runs.again and len(runs.before) > SAVED
    assert lines(runs.pair)[: len(runs.before)] == runs.before


def test_the_other_one_ends_by_itself(runs):
    """In one line where a transfer breaks off; where none is under way, the service of the job ends it."""
    exit_code, said = runs.alone
    assert exit_code not in (0, None), said
    assert "error: another process of this job has ended" in said or "stopped sending heartbeats" in said, said


def test_a_pair_keeps_no_programs(runs):
    """Those that were kept on disk made it hang: neither the workdir nor the user's own place may hold any."""
    cache = runs.pair.with_name("cache")
    assert any((cache / "one").iterdir()) and not (cache / "pair").exists() and not (runs.pair / ".compiled").exists()


def test_only_what_comes_from_another_process_ends_in_one_line(capsys, monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    for text in ("RESOURCE_EXHAUSTED: out of memory", "UNKNOWN: Gloo AllGather failed: Connection reset by peer"):
        error = jax.errors.JaxRuntimeError(text)
        main.end_without_peer(type(error), error, None)
        said = capsys.readouterr().err
        assert text in said and ("error: another process" in said) == bool(codes)
    assert codes == [1]
