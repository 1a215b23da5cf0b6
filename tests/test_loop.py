"""The loop on a toy stage: killed, interrupted, moved to another mesh, poisoned, resumed."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import compiling
import jax
import numpy as np
import pytest
import toy_stage
from etils import epath
from tensorboardX.proto import event_pb2

from instructgpt_jax import process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.training import checkpoint, ledger, loop, metrics, tracking

SLOW = {"toy.sleep": 0.05, "toy.num_steps": 40, "checkpoint.every": 7, "checkpoint.best_metric": "validation/loss"}


def start(workdir, overrides, *arguments, limit=None):
    """The toy stage in a process of its own; no file of it may grow past `limit` bytes, as on a full disk."""
    environment = os.environ | {"XLA_FLAGS": compiling.SOON, "JAX_PLATFORMS": "cpu"}  # one device a process
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a process that is killed may leave half a program there
    begin = [sys.executable]
    if limit:
        program = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        begin += ["-c", program + "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"]
    command = [*begin, toy_stage.__file__, str(workdir), json.dumps(overrides), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def lines(workdir, name="metrics.jsonl"):
    """Lines of a .jsonl file as text, less perf/*, so that equality is equality of what is written."""
    path = pathlib.Path(workdir) / name
    if not path.exists():
        return []
    parsed = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.dumps({k: v for k, v in line.items() if not k.startswith("perf/")}) for line in parsed]


def wait_for_lines(process, workdir, count):
    deadline = time.monotonic() + 60
    while len(lines(workdir)) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_run(left, right):
    assert lines(left) == lines(right)
    assert lines(left, "samples.jsonl") == lines(right, "samples.jsonl")
    assert_same_state(toy_stage.final_state(left), toy_stage.final_state(right))
    assert checkpoint.steps(left) == checkpoint.steps(right)


def assert_same_state(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of SLOW to its end, by a process of its own like the ones it is compared with."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    process = start(workdir, SLOW | {"toy.sleep": 0.0})
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "tokens/s" in log and "left 0:00:00" in log
    return workdir


# toy.sleep differs between the two: it stands for the speed of the machine, not for the experiment.
@pytest.fixture(autouse=True)
def sleep_is_free(monkeypatch):
    monkeypatch.setattr(workdirs, "FREE", (*workdirs.FREE, "sleep"))


def test_killed_twice_and_resumed_is_bit_identical(tmp_path, uninterrupted):
    moments = random.Random(time.time_ns())
    for least in (9, 22):  # lines on disk before the blow: after the first checkpoint, after the third
        process = start(tmp_path, SLOW)
        wait_for_lines(process, tmp_path, least)
        time.sleep(moments.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(tmp_path, SLOW)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "restored step" in log
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_0(tmp_path, uninterrupted, capfd, number):
    settings = toy_stage.config(**SLOW | {"toy.sleep": 0.0})
    stage = toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def data(start):
        for index, batch in enumerate(stage.data(start)):
            if index == 10:
                os.kill(os.getpid(), number)
            yield batch

    with pytest.raises(SystemExit) as stopped:
        loop.run(stage._replace(data=data), settings, tmp_path)
    assert stopped.value.code == 0 and "saved step 11" in capfd.readouterr().err
    assert checkpoint.steps(tmp_path)[-1] == 11 == max(json.loads(line)["step"] for line in lines(tmp_path))
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    loop.run(stage, settings, tmp_path)
    assert lines(tmp_path) == lines(uninterrupted)
    assert_same_state(toy_stage.final_state(tmp_path), toy_stage.final_state(uninterrupted))
    stopped, whole = (checkpoint.read_metadata(folder)["spent"] for folder in (tmp_path, uninterrupted))
    steps = checkpoint.steps(tmp_path)[-1]
    for spent in (stopped, whole):  # 32 tokens and 1e4 FLOPs a step, see toy_stage
        assert (spent["from_step"], spent["tokens"], spent["flops"]) == (0, 32.0 * steps, 1e4 * steps)
        assert spent["seconds"] > 0 and spent["versions"]["jax"] == jax.__version__
        assert spent["devices"] == [f"{jax.device_count() if spent is stopped else 1} x cpu"]


def test_a_run_from_before_there_was_a_ledger_is_counted_from_where_it_goes_on():
    begun = ledger.Ledger(None, 7)
    begun.count({"perf/tokens": 3.0, "perf/flops": 5.0, "loss": 1.0})
    before = begun.so_far() | {"seconds": 100.0, "devices": ["4 x other"]}
    after = ledger.Ledger(before, 9)
    after.count({"perf/tokens": 2.0})
    found = after.so_far()
    assert (found["from_step"], found["tokens"], found["flops"]) == (7, 5.0, 5.0)
    assert 100.0 <= found["seconds"] < 101.0 and found["devices"] == ["4 x other", f"{jax.device_count()} x cpu"]


def test_two_processes_stop_at_the_same_step(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    overrides = SLOW | {"mesh.fsdp": 2}
    processes = [start(tmp_path, overrides, str(index), port) for index in range(2)]
    wait_for_lines(processes[0], tmp_path, 9)
    processes[1].send_signal(signal.SIGTERM)  # only one of them is told
    logs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    stopped = checkpoint.steps(tmp_path)[-1]
    assert 7 < stopped < 40 and f"saved step {stopped}" in logs[0]
    # What two processes saved, one takes over.
    toy_stage.run(tmp_path, jax.devices()[:1], **SLOW | {"toy.sleep": 0.0})
    assert [json.loads(line)["step"] for line in lines(tmp_path) if "toy/loss" in line] == list(range(1, 41))


def test_continues_on_another_mesh(tmp_path):
    mesh = lambda *shape: dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))  # noqa: E731
    toy_stage.run(tmp_path / "whole", **mesh(8, 1, 1))
    toy_stage.run(tmp_path / "moved", **mesh(8, 1, 1), **{"toy.num_steps": 6})
    final = toy_stage.run(tmp_path / "moved", **mesh(1, 2, 4))
    kernel = final.opt_state[1].mu["in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 4)
    whole, moved = ([json.loads(line) for line in lines(tmp_path / name)] for name in ("whole", "moved"))
    losses = [[line["toy/loss"] for line in run if "toy/loss" in line] for run in (whole, moved)]
    assert losses[0][:6] == losses[1][:6] and len(losses[1]) == 12
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        toy_stage.final_state(tmp_path / "whole").params,
        toy_stage.final_state(tmp_path / "moved").params,
    )


@pytest.mark.parametrize("poison", [7, 8])  # found while running, and at the step of a checkpoint
def test_a_gradient_that_alone_is_nan_stops_and_leaves_the_last_good_checkpoint(tmp_path, poison):
    with pytest.raises(FloatingPointError) as error:
        toy_stage.run(tmp_path, jax.devices()[:1], **{"toy.poison_step": poison - 1})
    assert f"toy/gradient_norm is nan at step {poison}" in str(error.value) and "of step 4" in str(error.value)
    assert checkpoint.steps(tmp_path) == [4]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(toy_stage.final_state(tmp_path)))
    assert max(json.loads(line)["step"] for line in lines(tmp_path)) == poison - 1
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_metrics_are_read_one_step_late(tmp_path, monkeypatch):
    events = []
    settings = toy_stage.config(**{"toy.num_steps": 5, "eval_every": 0, "checkpoint.every": 100})
    stage = toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))

    def update(*arguments):
        events.append("update")
        return stage.update(*arguments)

    to_host = metrics.to_host
    monkeypatch.setattr(metrics, "to_host", lambda values: (events.append("read"), to_host(values))[1])
    loop.run(stage._replace(update=update), settings, tmp_path)
    assert events == ["update", *["update", "read"] * 4, "read"]


def test_what_a_run_leaves(tmp_path, capfd):
    finished = []
    overrides = {"snapshot_every": 6, "checkpoint.best_metric": "validation/loss", "checkpoint.best_mode": "max"}
    overrides |= {"eval_every": 4, "log_every": 3, "checkpoint.keep_last": 1}
    settings = toy_stage.config(**overrides)
    stage = toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))

    def finish(state, frozen):
        finished.append(int(state.step))
        return state.replace(ema=jax.tree.map(lambda x: 0 * x, state.ema))

    final = loop.run(stage._replace(finish=finish), settings, tmp_path)
    assert finished == [12] and not np.any(final.ema["out"]["kernel"])
    parsed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in parsed if "toy/loss" in line]
    evaluated = {line["step"]: line["validation/loss"] for line in parsed if "validation/loss" in line}
    assert [line["step"] for line in trained] == [3, 6, 9, 12] and list(evaluated) == [4, 8, 12]
    assert [key for key in trained[0] if not key.startswith("perf/")] == [
        "step", "toy/gradient_norm", "toy/loss", "toy/parameter_norm", "toy/update_norm",
    ]  # fmt: skip
    assert "perf/tokens" not in trained[0] and trained[1]["perf/tokens_per_s"] > 0 and "perf/mfu" not in trained[1]
    np.testing.assert_allclose(evaluated[12], np.mean(np.linspace(-1, 1, 8) ** 2), rtol=1e-6)  # of finish's state
    best = max(evaluated, key=evaluated.get)
    assert checkpoint.steps(tmp_path) == sorted({best, 12}) and checkpoint.steps(tmp_path, "snapshots") == [6, 12]
    assert not np.any(toy_stage.final_state(tmp_path).ema["out"]["kernel"])  # finish came before the save
    saved = checkpoint.read_metadata(tmp_path)
    assert saved["step"] == saved["data_index"] == saved["num_steps"] == 12
    assert saved["config"] == json.loads((tmp_path / "config.json").read_text()) and saved["config"]["seed"] == 1
    assert json.loads(lines(tmp_path, "samples.jsonl")[0])["prompt"] == "é"
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))

    # Complete: nothing is trained, evaluated or written again.
    def refuse(*_):
        raise AssertionError("a complete run must not train")

    again = loop.run(stage._replace(init=refuse, data=refuse, update=refuse, finish=refuse), settings, tmp_path)
    assert_same_state(jax.tree.map(np.asarray, again), jax.tree.map(np.asarray, final))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(parsed)
    assert "complete" in capfd.readouterr().err


def test_restores_without_an_update_program(tmp_path):
    settings = toy_stage.config(**{"toy.num_steps": 4})
    stage = toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))
    first = loop.run(stage, settings, tmp_path)
    again = loop.run(stage._replace(programs=lambda: {"learn": ()}), settings, tmp_path)
    assert_same_state(jax.tree.map(np.asarray, again), jax.tree.map(np.asarray, first))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run of 12 steps with its three newest checkpoints, of steps 6, 9 and 12."""
    workdir = tmp_path_factory.mktemp("complete")
    toy_stage.run(workdir, jax.devices()[:1], **THREE)
    return workdir


THREE = {"checkpoint.every": 3, "checkpoint.keep_last": 3, "eval_every": 4}


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(complete, tmp_path, capfd):
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "12" / "state" / "manifest.ocdbt").unlink()
    toy_stage.run(tmp_path, jax.devices()[:1], **THREE)
    log = capfd.readouterr().err
    told = f"checkpoint 12 in {tmp_path} is damaged (state/manifest.ocdbt is missing): going on from step 9"
    assert log.splitlines()[0] == told and "restored step 9" in log and "toy 10/12" in log and "toy 9/12" not in log
    assert_same_run(tmp_path, complete)


def test_two_processes_go_round_the_same_damaged_checkpoint(complete, tmp_path):
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    for step in ("9", "12"):
        (tmp_path / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text("{")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    processes = [start(tmp_path, THREE | {"mesh.fsdp": 2}, str(index), port) for index in range(2)]
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert "checkpoint 9 in" in logs[0] and "checkpoint 12 in" in logs[0] and "restored step 6" in logs[0]
    assert checkpoint.steps(tmp_path) == [6, 9, 12] and checkpoint.newest(tmp_path) == (12, {})
    assert [json.loads(line)["step"] for line in lines(tmp_path) if "toy/loss" in line] == list(range(1, 13))


def test_a_longer_run_says_how_its_schedule_jumps(tmp_path, capfd):
    linear = {"toy.optimizer.schedule": "linear", "toy.optimizer.final_fraction": 0.0, "checkpoint.every": 100}
    toy_stage.run(tmp_path / "a", jax.devices()[:1], **linear, **{"toy.num_steps": 6})
    assert "steps, it was" not in capfd.readouterr().err
    toy_stage.run(tmp_path / "a", jax.devices()[:1], **linear, **{"toy.num_steps": 9})
    told = "toy: 9 steps, it was 6 when step 6 was saved; the schedule is stretched: toy/lr 0 is now 0.00333\n"
    assert told in capfd.readouterr().err
    toy_stage.run(tmp_path / "b", jax.devices()[:1], **{"toy.num_steps": 6})
    toy_stage.run(tmp_path / "b", jax.devices()[:1], **{"toy.num_steps": 9})
    assert "toy: 9 steps, it was 6 when step 6 was saved\n" in capfd.readouterr().err  # the rate is constant


def test_a_full_disk_is_one_line(tmp_path):
    """A limit that the log meets and no checkpoint does."""
    process = start(tmp_path, {"toy.num_steps": 400, "checkpoint.every": 7, "eval_every": 0}, limit=20_000)
    try:
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    step, _ = checkpoint.newest(tmp_path)
    last = f"OSError: toy: {tmp_path}/metrics.jsonl: File too large; the last good checkpoint in "
    assert log.splitlines()[-1] == last + f"{tmp_path} is of step {step}" and step % 7 == 0
    assert lines(tmp_path)[-1:] and json.loads(lines(tmp_path)[-1])["step"] >= step


def test_no_process_adds_to_a_workdir_before_all_have_looked(tmp_path, monkeypatch):
    """Else a slow one finds files without a config.json, and refuses the workdir as a stranger's."""
    seen = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(workdirs.multihost_utils, "sync_global_devices", lambda _: seen.append(os.listdir(tmp_path)))
    workdirs.claim(workdirs.resolved(toy_stage.config(), {}), epath.Path(tmp_path))
    assert seen == [["config.json"]]


def test_a_workdir_that_vanishes_ends_the_run(tmp_path):
    settings = toy_stage.config(**{"checkpoint.every": 8})
    stage = toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))

    def data(start):
        for index, batch in enumerate(stage.data(start)):
            if index == 6:
                shutil.rmtree(tmp_path / "run")
            yield batch

    gone = "metrics.jsonl: No such file or directory; the last good checkpoint in .* of step none"
    with pytest.raises(OSError, match=gone):
        loop.run(stage._replace(data=data), settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # and is not made anew, without its first steps


def test_an_error_while_the_disk_is_full_is_not_hidden(tmp_path, monkeypatch):
    settings = toy_stage.config(**{"toy.poison_step": 5})
    stage = toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))

    def full(_):
        raise OSError(28, "No space left on device")

    def data(start):
        for index, batch in enumerate(stage.data(start)):
            if index == 5:
                monkeypatch.setattr(metrics.os, "fsync", full)
            yield batch

    with pytest.raises(FloatingPointError, match="toy/gradient_norm is nan at step 6"):
        loop.run(stage._replace(data=data), settings, tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"stage": "to', b"[1]", b"\xff"])
def test_a_damaged_config_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^.*config\.json must be the JSON of a run's configuration, got [^\n]*$"):
        toy_stage.run(tmp_path, jax.devices()[:1])
    assert (tmp_path / "config.json").read_bytes() == content


def test_another_experiment_is_refused(tmp_path):
    workdir = tmp_path / "run"
    one = jax.devices()[:1]
    toy_stage.run(workdir, one, **{"toy.num_steps": 4})
    with pytest.raises(ValueError) as error:
        toy_stage.run(workdir, one, **{"models.model.size": "large", "data.demonstrations": ("jsonl:b",), "seed": 2})
    text = str(error.value)
    assert "models.model.size: 'toy' in the workdir, 'large' asked for" in text
    assert "data.demonstrations: ['simulated:toy'] in the workdir, ['jsonl:b'] asked for" in text and "seed: 1" in text
    with pytest.raises(ValueError, match="toy.optimizer.lr: 0.01 in the workdir, 0.02 asked for"):
        toy_stage.run(workdir, one, **{"toy.optimizer.lr": 0.02})
    toy_stage.run(workdir, one, **{"toy.num_steps": 5, "data.cache_dir": "c", "log_every": 2, "checkpoint.every": 2})
    assert json.loads((workdir / "config.json").read_text())["toy"]["num_steps"] == 5
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="must be empty or hold a run's config.json, got \\['thesis.tex'\\]"):
        toy_stage.run(foreign, one)


def test_jsonl_is_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2}\n{"step": 2, "b": 0.5}\n{"step": 3}\n{"step": 4, "a"')
    file = metrics.JsonLines(path, 2)
    file.write(3, {"a": float("nan"), "b": metrics.to_host({"b": np.float32(0.1)})["b"]})
    file.close()
    kept = '{"step": 1, "a": 1}\n{"step": 2}\n{"step": 2, "b": 0.5}\n'
    assert path.read_text() == kept + '{"step": 3, "a": null, "b": 0.1}\n'
    # A line is complete only with its end: without it the write was cut short, whatever the step says.
    path.write_text('{"step": 1}\n{"step": 2}')
    metrics.JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n'


def test_a_damaged_line_is_named_and_left_out(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    good = ['{"step": 1}\n', '{"step": 3, "text": "a\u2028b\x85c"}\n']
    for bad in ('{"step": 2, "a"\n', '{"a": 2}\n', "7\n", "\n"):
        path.write_text(good[0] + bad + good[1] + '{"step": 4', encoding="utf-8")
        with pytest.raises(ValueError, match=rf"^{path}:2 must be a line of JSON with a step, got "):
            metrics.read_lines(path)
        metrics.JsonLines(path, 3).close()
        assert capfd.readouterr().err == f"{path}:2 is damaged, the line is left out\n"
        assert path.read_text(encoding="utf-8") == "".join(good)
    path.write_bytes(good[0].encode() + b"\xff\n" + good[1].encode())
    metrics.JsonLines(path, 3).close()
    assert metrics.read_lines(path) == [{"step": 1}, {"step": 3, "text": "a\u2028b\x85c"}]
    assert metrics.read_lines(tmp_path / "none.jsonl") == []


def test_an_object_store_gets_whole_files(tmp_path):
    def local(path):
        return str(path).replace("gs://bucket", str(tmp_path))

    def opened(original, path, mode):
        assert "a" not in mode, "an object store cannot append"
        return original(local(path), mode)

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    with epath.testing.mock_epath(open=opened, exists=lambda original, path: original(local(path))):
        file = metrics.JsonLines("gs://bucket/metrics.jsonl", 2)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
        file.write(3, {"a": 1.5})
        file.flush()
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "a": 1.5}\n'


def test_tensorboard_gets_every_scalar(tmp_path):
    """Records of an event file are: 8 bytes of length, 4 of checksum, an event, 4 of checksum."""
    with metrics.Writer(tmp_path, 4, 9, "toy", tracking.Run("", tmp_path, {})) as writer:
        writer.scalars(5, {"a": 1.5, "b": 2.0})
        writer.flush()
        writer.scalars(6, {"a": float("nan")})
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content, events = file.read_bytes(), []
    while content:
        end = 12 + struct.unpack("<Q", content[:8])[0]
        events.append(event_pb2.Event.FromString(content[12:end]))
        content = content[end + 4 :]
    assert [event.step for event in events if event.session_log.status] == [5]  # what came after step 4 is superseded
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found[:2] == [(5, "a", 1.5), (5, "b", 2.0)] and found[2][:2] == (6, "a") and np.isnan(found[2][2])


def test_floats_are_written_exactly():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 10.0 ** np.arange(-20, 20).repeat(25)
    values = values.astype(np.float32)
    on_host = metrics.to_host({str(i): value for i, value in enumerate(values)})
    read = np.array([json.loads(json.dumps(on_host[str(i)])) for i in range(1000)]).astype(np.float32)
    np.testing.assert_array_equal(read.view(np.int32), values.view(np.int32))


def test_rates(monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 9.0, 11.0])  # made, step, step, skip, step
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e3)
    meter = metrics.Meter()
    step = {"perf/tokens": 50.0, "perf/flops": 8e3, "loss": 1.0}
    assert meter.step_done(step) == {"loss": 1.0}
    meter.step_done(step)
    expected = {"perf/step_seconds": 2.5, "perf/tokens_per_s": 20.0, "perf/mfu": 16e3 / 5 / 1e3 / jax.device_count()}
    assert meter.rates() == pytest.approx(expected)
    meter.skip()
    meter.step_done(step)
    assert meter.rates()["perf/step_seconds"] == 2.0


def test_votes_arrive_one_call_late():
    received = threading.Event()
    vote = process.agreed(received)
    assert [vote(), vote()] == [False, False]
    received.set()
    assert [vote(), vote()] == [False, True]
