"""PPO-ptx by two processes of one job: what one process with as many devices does, also after one of them was killed.

They run the command line on two fake devices each. Nothing in them is different but that process 1 may be held up: it
hangs between two checkpoints, all watchdogs say so, and then it is killed.
"""

import functools
import pathlib
import re
import time
from typing import NamedTuple

import jax
import jobs
import numpy as np
import pytest
import small_runs
from saved_runs import arrays, lines

from instructgpt_jax.data import build_tokens, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.training import checkpoint

ITERATIONS, SAVED = 6, 3  # of the run, and between checkpoints
HELD = 5  # process 1 stops before the iteration of this index: by then the other one has written the fourth's metrics
SETTINGS = {
    "mesh.fsdp": 2, "mesh.tensor": 2, "ppo.iterations": ITERATIONS, "checkpoint.every": SAVED, "eval_every": 0,
    "ppo.eval_batches": 0, "rollout.wave": 4, "watch.seconds": 1.0, "watch.factor": 2.0,
    "ppo.policy_optimizer.eps": 1e-3, "ppo.value_optimizer.eps": 1e-3,  # else Adam makes steps of rounding errors
}  # fmt: skip


def arguments(folder: pathlib.Path, name: str) -> list[str]:
    """Of the command line; the pair reads its text as token shards, one process as text."""
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    settings += [f"--config.data.tokenizer={folder}/bpe"]
    settings += [f"--config.data.pretraining=tokens:{folder}/shards/*.tokens"] if name == "pair" else []
    return [f"--config=tests/small_runs.py:{folder}", f"--workdir={folder / name}", *settings]


def parameters(workdir):
    """Of the newest checkpoint: the policy, its average, and the value model."""
    state = arrays(workdir)
    return [state["policy"]["params"], state["policy"]["ema"], state["value"]["params"]]


class Runs(NamedTuple):
    """What there is after the runs.

    one, pair: workdirs of one process, and of the pair that was killed and started again.
    before: lines of the pair when its process 1 was killed.
    hanging: what each process had said until then.
    alone: exit code of the other process then, seconds until it had ended, and what it had said.
    again: what process 0 of the second pair said.
    """

    one: pathlib.Path
    pair: pathlib.Path
    before: list[dict]
    hanging: list[str]
    alone: tuple[int, float, str]
    again: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    workdir, asked = folder / "pair", arguments(folder, "pair")
    small_runs.write(folder)
    text = f"jsonl:{folder}/text.jsonl"
    texts = (record["text"] for record in sources.load((text,), "pretraining", 0))
    tokenizers.train(texts, small_runs.VOCAB_SIZE, folder / "bpe")
    build_tokens.build(text, f"{folder}/bpe", f"{folder}/shards", build_tokens.Part(1, 1), workers=1, skip_bad=0)
    with jobs.running(asked, workdir, 2, 4, {1: {"held": HELD}}) as processes:
        deadline = time.monotonic() + 300
        while len(lines(workdir)) <= SAVED or checkpoint.newest(workdir)[0] != SAVED:
            alive = [process.exitcode for process in processes] == [None, None]
            assert time.monotonic() < deadline and alive, jobs.said(workdir)
            time.sleep(0.05)
        hanging = ["", ""]
        while not all(" has taken " in said for said in hanging) and time.monotonic() < deadline:
            time.sleep(0.05)
            hanging = [jobs.said(workdir, number) for number in range(2)]
        before = lines(workdir)
        processes[1].kill()
        killed = time.monotonic()
        exit_code = jobs.code(processes[0], 120)
        alone = exit_code, time.monotonic() - killed, jobs.said(workdir, awaited="error: ")
    with jobs.running(asked, workdir, 2, 4) as processes:
        assert [jobs.code(process) for process in processes] == [0, 0], jobs.said(workdir)
    with jobs.running(arguments(folder, "one"), folder / "one", 1, 4) as processes:
        assert jobs.code(processes[0]) == 0, jobs.said(folder / "one")
    return Runs(folder / "one", workdir, before, hanging, alone, jobs.said(workdir))


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


def test_all_say_who_hangs(runs):
    """The one that is not in a program is the one that holds up the others; nothing has been ended."""
    for number, said in enumerate(runs.hanging):
        told = rf"ppo: step \d in process {number} has taken \d+ s, the median is .* s; threads:\n"
        assert re.search(told, said), said
        assert "thread MainThread:" in said and ("in hold_up" in said) == (number == 1) and "error: " not in said, said


def test_the_other_one_ends_by_itself_in_one_line(runs):
    """At once where a transfer breaks off; where none is under way, when the heartbeats have been missed."""
    exit_code, seconds, said = runs.alone
    assert exit_code not in (0, None) and seconds < 60, said
    last = said.splitlines()[-1]
    assert last.startswith(("error: another process of this job ended", "error: process 1 of this job ended")), said
    assert last.endswith("the same command on all processes goes on from what was saved")
    assert "Traceback" not in said and "coordination" not in said and "most recent call" not in said, said


def test_a_pair_keeps_no_programs(runs):
    """Those that were kept on disk made it hang: neither the workdir nor the user's own place may hold any."""
    kept = {name: runs.pair.with_name(f"{name}_cache") for name in ("one", "pair")}
    assert any(kept["one"].iterdir()) and not kept["pair"].exists() and not (runs.pair / ".compiled").exists()
