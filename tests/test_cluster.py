"""Several processes as one job: what is refused at the start, and the one line where another process is lost."""

import os
import subprocess
import sys
import types

import jax
import jobs
import pytest

from instructgpt_jax.cluster import agreeing, ending, joining, last_line

TINY = [f"--config={jobs.ROOT}/configs/pretrain_tiny.py:tiny", "--config.mesh.fsdp=-1", "--join_seconds=5"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """name -> exit codes of the processes, and the lines that they have said."""
    folder, found = tmp_path_factory.mktemp("refused"), {}
    here = [*TINY, f"--workdir={folder}/run"]
    (folder / "elsewhere").mkdir()
    jobs_by_name = {
        "configurations": (here, {1: {"arguments": [*here, "--config.pretrain.optimizer.lr=0.5"]}}),
        "devices": (here, {1: {"devices": 2}}),
        # The same name, another folder: as on the disk of each machine.
        "workdirs": ([*TINY, "--workdir=own"], {0: {"folder": str(folder)}, 1: {"folder": str(folder / "elsewhere")}}),
        "nobody at the address": (here, {0: None}),
        "one does not come": (here, {1: None}),
    }
    for name, (arguments, changes) in jobs_by_name.items():
        with jobs.running(arguments, folder / name, 2, 2, changes) as processes:
            codes = [jobs.code(process, 100) for process in processes]
        numbers = [number for number in range(2) if changes.get(number, {}) is not None]
        found[name] = codes, [jobs.said(folder / name, number, "error: ").splitlines() for number in numbers]
    assert not (folder / "run" / "config.json").exists()
    return found


@pytest.mark.parametrize(
    "name, expected",
    [
        ("configurations", "must have the same configuration and packages, got config.pretrain.optimizer.lr = 0.5 in "),
        ("devices", "must have the same devices, got local.devices = 2 in process 1 ("),
        ("workdirs", "error: workdir own must be a folder that all processes of the job share, process 1 ("),
    ],
)
def test_unequal_processes_are_refused_in_one_line_by_all(refused, name, expected):
    codes, said = refused[name]
    assert codes[0] == 1 and codes[1] in (1, -6), said  # -6: the coordinator was gone first, under load
    for lines in said:
        assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], lines


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nobody at the address", r"error: no coordinator at localhost:"),
        ("one does not come", r"error: not every process has joined the coordinator at localhost:"),
    ],
)
def test_who_waits_for_others_in_vain_says_so_in_one_line(refused, name, expected):
    codes, (lines,) = refused[name]
    assert codes[0] not in (0, None)
    assert len(lines) == 1 and lines[0].startswith(expected) and "within 5 s" in lines[0], lines


def test_the_first_difference_is_named():
    first = {"config": {"a": 1, "b": {"c": (1, 2)}}, "packages": {"jax": "0.10.2"}}
    assert agreeing.difference(first, first, "process 3") == ""
    other = {"config": {"a": 1, "b": {"c": (1, 3)}}, "packages": {"jax": "0.10.1"}}
    assert agreeing.difference(other, first, "process 3") == "config.b.c = (1, 3) in process 3, (1, 2) in process 0"
    assert agreeing.difference({"config": first["config"]}, first, "process 3").startswith("packages.jax = 'nothing'")
    assert agreeing.versions()["jax"] == jax.__version__


@pytest.mark.parametrize("text, kind", [("DEADLINE_EXCEEDED: Timed out", ValueError), ("UNAVAILABLE", RuntimeError)])
def test_a_process_that_waits_in_vain_for_the_first_says_so(monkeypatch, text, kind):
    def nothing_comes(*_):
        raise jax.errors.JaxRuntimeError(text)

    client = types.SimpleNamespace(blocking_key_value_get=nothing_comes)
    monkeypatch.setattr(agreeing, "_state", lambda: types.SimpleNamespace(client=client, process_id=1))
    with pytest.raises(
        kind, match=r"^all .* go on together, got none of \[0\] in 3600 s" if kind is ValueError else text
    ):
        agreeing.same("data", {})


def test_processes_come_from_one_tree_and_one_set_of_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/x --xla_force_host_platform_device_count=8")
    mine = agreeing.versions()
    assert mine["XLA_FLAGS"] == "--xla_a=1" and mine["LIBTPU_INIT_ARGS"] == ""
    monkeypatch.setattr(agreeing.pathlib.Path, "read_bytes", lambda path: b"changed")
    other = agreeing.versions()
    assert [key for key in mine if mine[key] != other[key]] == ["files of instructgpt_jax"]


def test_the_variables_of_a_job_come_together(monkeypatch):
    """A process that knows a part of them would begin a job of one, in the same workdir as the others."""
    for name in (*joining.BY_HAND, *joining.CLUSTER):
        monkeypatch.delenv(name, raising=False)
    joined = []
    monkeypatch.setattr(joining, "_listen", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: joined.append(given))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # joining sets it
    joining.join(False, 5, 0)
    assert not joined
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="^JAX_COORDINATOR_.* must be set together, got no JAX_PROCESS_ID$"):
        joining.join(False, 5, 0)
    for wrong in ("x", "2", "-1"):
        monkeypatch.setenv("JAX_PROCESS_ID", wrong)
        with pytest.raises(ValueError, match=f"^JAX_PROCESS_ID must be a number below JAX_.*, got '{wrong}' of '2'$"):
            joining.join(False, 5, 0)
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    joining.join(False, 5, 0)
    assert joined == [("localhost:1", 2, 1)]


def test_what_shows_that_a_workdir_is_shared_is_gone_before_anybody_goes_on(tmp_path, monkeypatch):
    """Else an export, which refuses files that are not its own, refuses it in the process that is the quickest."""
    there = []

    def exchange(text):
        there.append((tmp_path / agreeing.TOKEN).exists())
        return [text]

    monkeypatch.setattr(agreeing, "_state", lambda: types.SimpleNamespace(client=True, process_id=0))
    monkeypatch.setattr(agreeing, "exchange", exchange)
    agreeing.shared(tmp_path)
    assert there[0] and not there[-1]


SILENT = """\
E1127 10:21:10.149682 1336 coordination_service.cc:1549] [11] Use error polling to propagate the following: UNAVAILABLE:
1
The tasks have crashed. Check the task logs. [type.googleapis.com/tensorflow.CoordinationServiceError='']
E1127 10:21:10.150202    1347 coordination_service_agent.cc:289] Polled an error from coordination service.
E1127 10:21:10.150300    1347 other.cc:17] not of the service
with a second line
F1127 10:21:10.150344    1347 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
{tasks}
The tasks have crashed. Check the task logs for an earlier error.
*** Check failure stack trace: ***
    @     0x7fcf9ab40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
Fatal Python error: Aborted

Thread 0x00007fb18cff16c0 (most recent call first):
"""
GONE = """\
E1127 10:21:11.320344    1454 coordination_service_agent.cc:289] Polled an error from coordination service.
F1127 10:21:11.320384    1454 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted
*** Check failure stack trace: ***
"""


def passed_on(text: str) -> list[str]:
    command = [sys.executable, "-I", last_line.__file__, "1", "host:1", "300", "30"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60).stdout.splitlines()


def test_what_the_service_says_at_an_end_becomes_one_line():
    before = "W1127 10:21:10.149682    1336 cpu_client.cc:3] passed on\n50 %\rhalf a line"
    kept = ["E1127 10:21:10.150300    1347 other.cc:17] not of the service", "with a second line"]
    lost = {"1": "process 1", "/job:jax_worker/replica:0/task:3": "process 3", "2\n10": "processes 2, 10"}
    for tasks, name in lost.items():
        lines = passed_on(before + "\n" + SILENT.format(tasks=tasks))
        told = f"error: {name} of this job ended or cannot be reached: no heartbeat for 30 s{last_line.AGAIN}"
        assert lines == [*before.splitlines(), *kept, told]
    told = f"error: process 0 of this job, the coordinator, ended or cannot be reached{last_line.AGAIN}"
    assert passed_on(GONE) == [told]
    frozen = GONE.replace("UNAVAILABLE: Failed to send RPC", "DEADLINE_EXCEEDED: Deadline Exceeded").replace(
        "leader", ""
    )
    assert passed_on(frozen) == [told]
    assert passed_on(last_line.TOLD + GONE) == []  # the process has said it
    report = GONE.splitlines()[0]
    assert passed_on(f"{report}\nmore") == [report, "more"]  # nobody was ended


def test_only_what_comes_from_another_process_ends_in_one_line(capsys, monkeypatch):
    class Ended(BaseException):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(os, "write", lambda *_: 0)
    monkeypatch.setattr(ending, "_wait_for_others", lambda: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "excepthook", ending.excepthook)
    for text in ("RESOURCE_EXHAUSTED: out of memory", "UNKNOWN: Gloo AllGather failed: Connection reset by peer"):
        with pytest.raises(Ended), ending.at_once():
            raise jax.errors.JaxRuntimeError(text)
        said = capsys.readouterr().err
        assert text in said and ("error: another process" in said) == ("Traceback" not in said) == ("Gloo" in text)
    with pytest.raises(SystemExit), ending.at_once():  # stopped by a signal: all of them are
        raise SystemExit(0)
