"""What watches a run: a step that stands still, copies that differ, a notice of the cloud, what a restart costs."""

import http.server
import re
import socket
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax import process, sharding
from instructgpt_jax.cluster import notices
from instructgpt_jax.training import checkpoint, copies, loop
from instructgpt_jax.training.watchdog import FIRST, KNOWN, Watchdog


def one_device(**changes):
    settings = toy_stage.config(**changes)
    return settings, toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))


def test_a_step_that_stands_still_is_told_with_all_threads(tmp_path, capfd):
    settings, stage = one_device(**{"watch.seconds": 0.4, "toy.num_steps": 10, "eval_every": 0, "checkpoint.every": 99})

    def waits_for_a_peer():
        time.sleep(3.0)

    def data(start):
        for index, batch in enumerate(stage.data(start)):
            if index == 8:
                waits_for_a_peer()
            yield batch

    loop.run(stage._replace(data=data), settings, tmp_path)
    told = capfd.readouterr().err
    found = re.findall(r"toy: step 9 has taken \d s, the median is 0\.\d s; threads:", told)
    assert 1 <= len(found) <= 3 and "in waits_for_a_peer" in told and told.count(" has taken ") == len(found)


def test_what_takes_too_long_is_known_from_what_it_took_before():
    watchdog = Watchdog("toy", factor=0.0, seconds=2.0)
    assert watchdog.limit("step") == FIRST
    watchdog._took["step"].extend([1.0] * (KNOWN - 1))
    assert watchdog.limit("step") == FIRST  # the first of them compile
    watchdog._took["step"].append(9.0)
    watchdog._factor = 10.0
    assert watchdog.limit("step") == 10.0 and watchdog.limit("other") == FIRST
    watchdog._factor = 0.1
    assert watchdog.limit("step") == 2.0


def flipped(array, device):
    """An array whose part on one device has another bit."""
    parts = []
    for shard in array.addressable_shards:
        own = np.array(shard.data)
        if shard.device == device:
            own.reshape(-1).view(np.uint8)[1] ^= 1
        parts.append(jax.device_put(own, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_copies_that_differ_in_one_bit_are_found(sizes):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    specs = {"whole": P(), "rows": P("tensor", None), "half": P(None, ("fsdp", "tensor")), "step": P()}
    specs["with nf4"] = P(None, "tensor")
    values = {
        "whole": np.linspace(0, 1, 6, dtype=np.float32), "rows": np.ones((4, 3), jnp.bfloat16),
        "half": np.arange(32, dtype=np.float32).reshape(4, 8), "step": np.int32(7),
        "with nf4": np.arange(16).reshape(4, 4).astype(jnp.uint4),
    }  # fmt: skip
    state = {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in values.items()}
    bits_of, groups = copies.make_sums(state)
    sums = np.asarray(bits_of(state))
    assert sums.shape == (len(groups.axes), *sizes) and sums.any() and copies.unequal(sums, groups) == ""
    # The first group is split over nothing; a dict's leaves come in the order of their names, and count 1, 3, 5, 7, 9.
    by_hand = 5 * 7 + 7 * int(values["whole"].view(np.uint32).astype(np.uint64).sum())
    assert groups.axes[0] == frozenset() and (sums[0] == by_hand % 2**32).all()

    for name, device in (("whole", 5), ("half", 7), ("rows", 2), ("with nf4", 2)):
        altered = flipped(state[name], mesh.devices.flat[device])
        where = copies.unequal(np.asarray(bits_of(state | {name: altered})), groups)
        if name == "half" and sizes == (2, 2, 2):
            assert "cpu:3 " in where.lower()  # the device at the other place along `data` has its copy
        assert str(mesh.devices.flat[device]) in where, (name, where)


@pytest.mark.parametrize("what", ["state", "frozen", "neither"])
def test_a_run_of_several_processes_ends_where_copies_differ(tmp_path, monkeypatch, what):
    """A bit of the state flips in step 5, or one of a frozen network before the first; sums are due at 3, 6, 9."""
    monkeypatch.setattr(loop, "jax", types.SimpleNamespace(**vars(jax) | {"process_count": lambda: 2}))
    monkeypatch.setattr(process, "agreed", lambda received: received.is_set)  # there is no other process to ask
    settings = toy_stage.config(**{"mesh.fsdp": 2, "checkpoint.every": 1, "checkpoint.keep_last": 99})
    stage = toy_stage.build(settings, toy_stage.make_mesh(settings.mesh.to_dict(), jax.devices()[:2]))

    def frozen():
        found = stage.frozen()
        return {"scale": flipped(found["scale"], jax.devices()[1])} if what == "frozen" else found

    def update(*arguments):
        state, found = stage.update(*arguments)
        if what == "state" and state.step == 5:
            state.params["in"]["bias"] = flipped(state.params["in"]["bias"], jax.devices()[1])
        return state, found

    altered, step = stage._replace(frozen=frozen, update=update), {"state": 6, "frozen": 3, "neither": 13}[what]
    if what == "neither":
        loop.run(altered, settings, tmp_path)
    else:
        with pytest.raises(FloatingPointError) as error:
            loop.run(altered, settings, tmp_path)
        one, other = (f"{device} (process 0)" for device in jax.devices()[:2])
        assert f"toy: the copies of {one} and {other} differ at step {step}; the last good" in str(error.value)
        assert f"is of step {step - 1}" in str(error.value)
    assert checkpoint.steps(tmp_path) == list(range(1, step))


class Metadata(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        type(self).asked += 1
        assert self.headers["Metadata-Flavor"] == "Google"
        preempted = self.path == "/computeMetadata/v1/instance/preempted" and self.asked > 4
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"TRUE" if preempted else b"NONE")

    def log_message(self, *_):
        pass


def test_a_notice_of_the_cloud_saves_and_exits_0(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(notices, "EVERY", 0.05)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    changes = {"toy.num_steps": 10_000, "eval_every": 0, "checkpoint.every": 9999, "toy.sleep": 0.01}
    settings, stage = one_device(**changes)
    with pytest.raises(SystemExit) as stopped:
        loop.run(stage, settings, tmp_path)
    server.shutdown()
    told = capfd.readouterr().err
    assert stopped.value.code == 0 and "this machine will be taken (preempted: TRUE): saving after this step" in told
    assert 0 < checkpoint.steps(tmp_path)[-1] < 10_000
    asked = Metadata.asked
    time.sleep(0.3)
    assert Metadata.asked == asked  # nobody asks any more
    with process.catching_signals() as stop:
        assert not stop.is_set()


def test_an_answer_that_cannot_be_read_is_asked_for_again(monkeypatch):
    """A server that starts again may say anything."""
    monkeypatch.setattr(notices, "EVERY", 0.01)
    told, over, listening = [], threading.Event(), socket.create_server(("127.0.0.1", 0))

    def answer():
        for said in (
            b"garbage\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nTR",
            b"HTTP/1.1 200 OK\r\n\r\nTRUE",
        ):
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

    threading.Thread(target=answer, daemon=True).start()
    monkeypatch.setattr(notices, "_NOTICES", {"preempted": "TRUE"})
    thread = threading.Thread(target=notices.watch, args=(f"127.0.0.1:{listening.getsockname()[1]}", told.append, over))
    thread.start()
    thread.join(timeout=20)
    over.set()
    assert told == ["preempted: TRUE"]


def test_a_server_of_the_cloud_that_is_away_is_no_notice(monkeypatch):
    told, over = [], threading.Event()
    monkeypatch.setattr(notices, "EVERY", 0.01)
    thread = threading.Thread(target=notices.watch, args=("127.0.0.1:9", told.append, over))
    thread.start()
    time.sleep(0.1)
    over.set()
    thread.join(timeout=10)
    assert told == [] and not thread.is_alive()


def test_a_restart_is_measured(tmp_path, capfd):
    changes = {"toy.num_steps": 4, "checkpoint.every": 2, "eval_every": 0}
    settings, stage = one_device(**changes)
    loop.run(stage, settings, tmp_path)
    settings, stage = one_device(**changes | {"toy.num_steps": 6})
    loop.run(stage, settings, tmp_path)
    told = capfd.readouterr().err
    form = r"toy: step (\d) was made [\d.]+ s after the process began: [\d.]+ before the stage, (.*) [\d.]+; of these "
    form += r"[\d.]+ s to compile \d+ programs, \d+ of them kept from before\n"
    assert [(step, re.sub(r" [\d.]+", "", parts)) for step, parts in re.findall(form, told)] == [
        ("1", "networks on the devices, first batch and step"), ("5", "restore, frozen networks, first batch and step"),
    ]  # fmt: skip


def test_a_save_that_is_due_while_one_is_running_is_not_lost(tmp_path, monkeypatch):
    """Every step is due, and each takes longer to be written than the next one to be made."""
    started, written = [], []
    wait, save = checkpoint.Checkpoints.wait, checkpoint.Checkpoints.save

    def slow(self):
        time.sleep(0.1 if self._saving is not None else 0.0)
        wait(self)
        written.append(self._saving)

    def noted(self, step, *rest):
        started.append(step)
        save(self, step, *rest)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", slow)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
    toy_stage.run(tmp_path, jax.devices()[:1], **{"toy.num_steps": 6, "checkpoint.every": 1, "checkpoint.keep_last": 9})
    assert started == checkpoint.steps(tmp_path) == [1, 2, 3, 4, 5, 6] and written == [None, 1, 2, 3, 4, 5]
