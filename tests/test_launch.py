"""The launch scripts against a gcloud that notes its arguments and has two workers: folders for its ssh and scp."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ("create", "install", "run", "logs", "stop", "delete")
HERE = ["--name=pod", "--zone=us-east5-a"]
RUN = ["--config=configs/ppo_ptx_6b.py", "--workdir=gs://bucket/run"]

GCLOUD = r"""#!PYTHON
import json, os, pathlib, shutil, subprocess, sys

here, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\n")
flags = dict(argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--"))
verb = arguments[3]
if verb == "list":
    states = here / "states"  # one line for each time it is asked
    lines = states.read_text().splitlines() if states.exists() else []
    print((lines or [""])[0])
    states.write_text("\n".join(lines[1:] or lines[:1]))
elif verb == "describe":
    print(2)
elif verb in ("ssh", "scp"):
    chosen = [0, 1] if flags["worker"] == "all" else [int(flags["worker"])]
    codes = []
    for home in (here / f"worker{index}" for index in chosen):
        if verb == "ssh":
            shell = ["bash", "-c", flags["command"]]
            codes.append(subprocess.run(shell, cwd=home, env=os.environ | {"HOME": str(home)}).returncode)
        else:
            source, target = (path.replace("pod:", f"{home}/") for path in arguments[4:6])
            shutil.copy(source, target)
    sys.exit(max(codes, default=0))
"""

MAIN = r"""#!PYTHON
import json, os, pathlib, signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as after a save
print("python", *sys.argv[1:], os.environ.get("LIBTPU_INIT_ARGS"), flush=True)
with open(pathlib.Path.home() / "runs.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")
while "--config.hold=True" in sys.argv:
    time.sleep(0.05)
sys.exit(3 if "--config.fail=True" in sys.argv else 0)
"""


class Cloud:
    """Runs the scripts, and knows what gcloud was asked and what the workers ran."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        program(folder / "gcloud", GCLOUD)
        for worker in ("worker0", "worker1"):
            (folder / worker).mkdir()

    def launch(self, script, *arguments):
        """The finished process of one script, started from another folder."""
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.run(
            [ROOT / "launch" / f"{script}.sh", *arguments],
            cwd=self.folder,
            env=os.environ | {"PATH": path, "INSTRUCTGPT_POLL_SECONDS": "0"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def install(self):
        """What install.sh leaves on the workers, with a Python that only notes its arguments."""
        for worker in ("worker0", "worker1"):
            scripts = self.folder / worker / "instructgpt_jax" / "launch"
            scripts.mkdir(parents=True)
            shutil.copy(ROOT / "launch" / "worker.sh", scripts)
            program(self.folder / worker / "instructgpt_jax_env" / "bin" / "python", MAIN)

    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def runs(self, worker="worker0"):
        return [json.loads(line) for line in (self.folder / worker / "runs.jsonl").read_text().splitlines()]


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("PYTHON", sys.executable, 1))
    path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for pids in tmp_path.glob("worker*/instructgpt_jax_logs/pids"):
        for pid in pids.read_text().split():
            subprocess.run(["kill", "-KILL", pid], stderr=subprocess.DEVNULL)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shellcheck_has_nothing_to_say():
    binary = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if binary is None:
        pytest.skip("no shellcheck")
    files = [*ROOT.glob("launch/*.sh"), *ROOT.glob(".ci/*"), ROOT / "benchmarks" / "gpu.sh"]
    files = sorted(map(str, files))
    checked = subprocess.run([binary, *files], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script_and_asks_nothing(cloud, script):
    done = cloud.launch(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"launch/{script}.sh --name=pod" in done.stdout
    assert "--dry_run" in done.stdout and "set -e" not in done.stdout
    assert cloud.calls() == []


@pytest.mark.parametrize("script, more", [
    ("create", ["--type=v5p-128", "--spot"]), ("install", []), ("run", ["--", *RUN]), ("logs", ["--to=logs"]),
    ("stop", []), ("delete", ["--yes"]),
])  # fmt: skip
def test_a_dry_run_prints_the_command_and_asks_nothing(cloud, script, more):
    done = cloud.launch(script, *HERE, "--project=mine", "--dry_run", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gcloud compute tpus ")
    assert done.stdout.rstrip().endswith("--zone=us-east5-a --project=mine")
    assert cloud.calls() == [] and not (cloud.folder / "logs").exists()


@pytest.mark.parametrize("script, arguments, message", [
    ("create", ["--zone=z", "--type=v5p-8"], "--name must be given; --help shows an example"),
    ("create", ["--name=pod", "--zone", "z"],
     "unknown argument --zone; a flag is written --flag=value, --help lists them"),
    ("create", HERE, "--type must be given; --help shows an example"),
    ("create", [*HERE, "--type=h200"],
     "--type must begin with v2-, v3-, v4-, v5litepod-, v5p- or v6e-, or --runtime be given, got --type=h200"),
    ("run", HERE, "--config=FILE must be given, after --; --help shows an example"),
    ("run", [*HERE, "--", "--config=configs/none.py", "--workdir=gs://b/w"],
     "--config must be a file of this checkout, got configs/none.py"),
    ("run", [*HERE, "--", RUN[0], "--workdir=runs/x"],
     "--workdir must be gs://… (or an absolute path on storage that all workers share), after --, got 'runs/x'; "
     "a worker's own disk goes with its machine"),
    ("logs", [*HERE, "--lines=many"], "--lines must be a whole number, got many"),
    ("stop", ["--name=pod"], "--zone must be given; --help shows an example"),
    ("delete", [*HERE, "--force"], "unknown argument --force; a flag is written --flag=value, --help lists them"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_asked(cloud, script, arguments, message):
    done = cloud.launch(script, *arguments)
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"
    assert cloud.calls() == []


CREATE = ["compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", "--accelerator-type=v5p-128",
          "--runtime-version=v2-alpha-tpuv5", "--spot", "--zone=us-east5-a"]  # fmt: skip
DELETE = ["compute", "tpus", "queued-resources", "delete", "pod", "--force", "--quiet", "--zone=us-east5-a"]


@pytest.mark.parametrize("states, changes, code", [
    (["other\tACTIVE", "pod\tWAITING_FOR_RESOURCES", "pod\tPROVISIONING", "pod\tACTIVE"], [CREATE], 0),
    (["pod\tACTIVE"], [], 0),
    (["pod\tSUSPENDED", "", "pod\tACTIVE"], [DELETE, CREATE], 0),  # was preempted
    (["", "pod\tFAILED"], [CREATE], 1),  # no quota, say: not asked again and again
])  # fmt: skip
def test_create_waits_until_the_slice_is_there(cloud, states, changes, code):
    (cloud.folder / "states").write_text("\n".join(states))
    done = cloud.launch("create", *HERE, "--type=v5p-128", "--spot")
    assert done.returncode == code, done.stderr
    assert [call for call in cloud.calls() if call[3] != "list"] == changes
    if code:
        assert done.stderr.startswith("error: the request ended as FAILED")
    else:
        assert done.stdout.endswith("pod is ready\n")


def test_create_now_and_flags_of_gcloud(cloud):
    done = cloud.launch("create", *HERE, "--type=v6e-8", "--now", "--", "--network=my net")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [["compute", "tpus", "tpu-vm", "create", "pod", "--accelerator-type=v6e-8",
                              "--version=v2-alpha-tpuv6e", "--network=my net", "--zone=us-east5-a"]]  # fmt: skip


def test_install_unpacks_the_commit_on_every_worker_once(cloud):
    for worker in ("worker0", "worker1"):  # uv, and what it would make
        home = cloud.folder / worker
        program(home / ".local" / "bin" / "uv", '#!PYTHON\nimport sys\nopen("uv", "a").write(f"{sys.argv[1:]}\\n")\n')
        program(home / "instructgpt_jax_env" / "bin" / "python", '#!PYTHON\nprint("Python, JAX")\n')
    done = cloud.launch("install", *HERE)
    assert done.returncode == 0, done.stderr
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    for worker in ("worker0", "worker1"):
        home = cloud.folder / worker
        assert (home / "instructgpt_jax" / "instructgpt_jax" / "main.py").exists()
        assert (home / "instructgpt_jax" / ".commit").read_text() == commit
        assert f"-e', '{home}/instructgpt_jax[tpu,gcs]'" in (home / "uv").read_text()
    assert cloud.launch("install", *HERE).stdout == "already installed\n" * 2


def test_flags_arrive_unchanged_and_the_run_completes(cloud):
    cloud.install()
    odd = [
        "--config.a=two  words",
        '--config.b=it\'s "so"',
        "--config.c=$HOME `id` \\ * ;&|",
        "--config.d=",
        "--config.e=a\nb",
    ]
    variables = ["--env=LIBTPU_INIT_ARGS=--xla_a=1 --xla_b='2'", "--env=OTHER="]
    done = cloud.launch("run", *HERE, *variables, "--wait", "--", *RUN, *odd)
    assert done.returncode == 0, done.stderr
    for worker in ("worker0", "worker1"):
        assert cloud.runs(worker) == [["-m", "instructgpt_jax.main", "--distributed", *RUN, *odd]]
    assert cloud.launch("logs", *HERE).stdout.count(": ended with exit code 0\n") == 2
    assert cloud.launch("logs", *HERE, "--to=fetched").returncode == 0
    for index in range(2):
        log = (cloud.folder / "fetched" / f"worker{index}.log").read_text()
        assert "python -m instructgpt_jax.main" in log and "--xla_a=1 --xla_b='2'\n" in log


def test_the_same_command_leaves_a_run_alone_and_resumes_a_stopped_one(cloud):
    cloud.install()
    hold = [*RUN, "--config.hold=True"]
    started = cloud.launch("run", *HERE, "--", *hold)  # returns though the run goes on
    assert started.returncode == 0 and started.stdout.count("started") == 2
    until(lambda: all((cloud.folder / worker / "runs.jsonl").exists() for worker in ("worker0", "worker1")))

    again = cloud.launch("run", *HERE, "--", *hold)
    assert again.returncode == 0 and again.stdout.count("already running") == 2
    other = cloud.launch("run", *HERE, "--", *RUN)
    assert other.returncode == 1 and "another run is going on (launch/stop.sh ends it)" in other.stderr
    assert cloud.launch("install", *HERE).returncode == 1  # not under a run
    assert cloud.launch("logs", *HERE, "--lines=1").stdout.count(": running\n") == 2

    stopped = cloud.launch("stop", *HERE)
    assert stopped.returncode == 0 and stopped.stdout.count("stopped by a signal") == 2
    assert cloud.launch("run", *HERE, "--", *hold).stdout.count("started") == 2
    until(lambda: len(cloud.runs("worker0")) == len(cloud.runs("worker1")) == 2)
    assert cloud.runs("worker0") == [cloud.runs("worker0")[0]] * 2
    assert cloud.launch("stop", *HERE).returncode == 0


def test_wait_fails_if_a_worker_fails(cloud):
    cloud.install()
    done = cloud.launch("run", *HERE, "--wait", "--", *RUN, "--config.fail=True")
    assert done.returncode == 3
    assert "ended with exit code 3" in done.stdout


def test_delete(cloud):
    assert cloud.launch("delete", *HERE, "--yes").returncode == 0
    assert cloud.launch("delete", *HERE, "--now").returncode == 0
    assert cloud.calls() == [DELETE, ["compute", "tpus", "tpu-vm", "delete", "pod", "--zone=us-east5-a"]]
