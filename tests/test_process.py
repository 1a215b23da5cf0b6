"""Signals and what is said, in processes of their own."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

UNHEARD = """
import os, pathlib, signal, sys
from instructgpt_jax import process
with process.catching_signals() as stop:
    print("ready", flush=True)
    stop.wait(60)
    process.say("saved")
    pathlib.Path(sys.argv[1]).write_text("saved")
"""
TAKEN = """
import os, signal, sys, time
import jax
from instructgpt_jax import process
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 1, 0)
asked = [process.will_be_taken(step) for step in (501, 502, 503)]  # a run that goes on
assert not any(asked), asked
os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler has it: ours are not there
until = time.monotonic() + 60
step = 0  # the next stage of a pipeline
while not process.will_be_taken(step := step + 1):
    assert time.monotonic() < until
    time.sleep(0.1)
print("taken", flush=True)
os._exit(0)
"""


def test_a_stop_is_heeded_though_nobody_reads_what_is_said(tmp_path):
    """Ctrl-C of `... 2>&1 | tee log` ends `tee` too."""
    kept = tmp_path / "kept"
    command = [sys.executable, "-c", UNHEARD, str(kept)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        child.stderr.close()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 0
    assert kept.read_text() == "saved"


def test_a_notice_of_jax_itself_is_heard_in_any_stage():
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    root = str(pathlib.Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TAKEN, str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "taken\n", done.stderr
