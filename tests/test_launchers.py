"""The launchers for GKE, SkyPilot and Slurm: what they ask, what the run then receives, and the tools' own opinion.

The tools are stand-ins that note their arguments. Where `SKY` and `XPK` name the real programs, their own parsers and
schemas read the same arguments; neither needs a network for it.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = ("docker", "xpk", "sky", "sbatch", "srun", "scancel", "scontrol")
RUN = ["--config=configs/ppo_ptx_6b.py", "--workdir=gs://bucket/run"]
ODD = ["--config.a=two  words", '--config.b=it\'s "so"', "--config.c=$HOME `id` \\ * ;&|{x}", "--config.d=", "--e=a\nb"]
GKE = ["--name=sft-6b", "--cluster=tpus", "--zone=us-east5-a", "--type=v5p-128", "--image=registry/image:tpu"]
COMPLETE = {  # script -> the least that it wants
    "gke": [*GKE, "--", *RUN],
    "sky": ["--name=sft", "--type=tpu-v6e-8", "--", *RUN],
    "slurm": ["--name=sft", "--gpus=8", f"--python={sys.executable}", "--", *RUN],
    "image": ["--image=registry/image:tpu"],
}

NOTE = r"""#!PYTHON
import json, os, pathlib, signal, subprocess, sys
here, tool, arguments = pathlib.Path(__file__).parent, pathlib.Path(__file__).name, sys.argv[1:]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps([tool, *arguments]) + "\n")
if tool == "docker" and arguments[0] == "build":
    (here / "context.tar").write_bytes(sys.stdin.buffer.read())
elif tool == "scancel":
    os.kill(int((here / "pid").read_text()), signal.SIGTERM)
elif tool == "srun":
    while arguments[0].startswith("--"):
        del arguments[0]
    sys.exit(subprocess.run(arguments).returncode)
"""

MAIN = r"""#!PYTHON
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
variables = {name: value for name, value in os.environ.items() if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROC"))}
(here / "ran.json").write_text(json.dumps([sys.argv[1:], variables, os.getpid()]))
(here / "pid").write_text(str(os.getpid()))
while "--config.hold=True" in sys.argv:
    time.sleep(0.02)
sys.exit(3 if "--config.fail=True" in sys.argv else 0)
"""


class Tools:
    """A folder of stand-ins, first on PATH."""

    def __init__(self, folder):
        self.folder = folder
        for name in TOOLS:
            self.program(folder / name, NOTE)
        self.python = self.program(folder / "python", MAIN)
        self.environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}

    def program(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("PYTHON", sys.executable, 1))
        path.chmod(0o755)
        return path

    def launch(self, script, *arguments):
        return subprocess.run(
            [ROOT / "launch" / f"{script}.sh", *arguments], cwd=self.folder, env=self.environment, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip

    def calls(self):
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ran(self):
        """What Python was given: arguments, variables that join processes, and its id."""
        return json.loads((self.folder / "ran.json").read_text())


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


@pytest.mark.parametrize("script", COMPLETE)
def test_help_is_the_head_of_the_script_and_asks_nothing(tools, script):
    done = tools.launch(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"launch/{script}.sh --" in done.stdout and "--dry_run" in done.stdout and "set -e" not in done.stdout
    assert tools.calls() == []


@pytest.mark.parametrize("script", COMPLETE)
def test_a_dry_run_prints_what_is_asked_otherwise(tools, script):
    arguments = COMPLETE[script]
    if "--" in arguments:
        arguments = [*arguments, *ODD]
    printed = tools.launch(script, "--dry_run", *arguments)
    assert printed.returncode == 0, printed.stderr
    assert tools.calls() == []
    asked = tools.launch(script, *arguments)
    assert asked.returncode == 0, asked.stderr
    assert tools.calls() == [shlex_bash(printed.stdout)]


def shlex_bash(line):
    """The words of a line that bash's %q wrote."""
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout
    return words.split("\0")[:-1]


@pytest.mark.parametrize("script, arguments, message", [
    ("gke", GKE, "--config=FILE must be given, after --; --help shows an example"),
    ("gke", [*GKE[:3], "--", *RUN], "--type must be given; --help shows an example"),
    ("gke", [*GKE, "--name=SFT_6B", "--", *RUN],
     "--name must be small letters, digits and -, at most 40 of them, got SFT_6B"),
    ("gke", [*GKE, "--restarts=-1", "--", *RUN], "--restarts must be a whole number, got -1"),
    ("sky", ["--name=x", "--type=tpu-v6e-8", "--nodes=2", "--", *RUN],
     "--nodes must be 1 for a TPU: --type names the whole slice, got 2"),
    ("sky", ["--name=x", "--type=H100:8", "--nodes=0", "--", *RUN],
     "--nodes must be a whole number of at least 1, got 0"),
    ("sky", ["--name=x", "--type=H100:8", "--", RUN[0], "--workdir=runs/x"],
     "--workdir must be gs://… (or an absolute path on storage that all workers share), after --, got 'runs/x'; "
     "a worker's own disk goes with its machine"),
    ("slurm", ["--name=x", "--", *RUN], "--gpus must be given; --help shows an example"),
    ("slurm", ["--name=x", "--gpus=all", "--", *RUN], "--gpus must be a whole number of at least 1, got all"),
    ("slurm", ["--name=x", "--gpus=8", "--python=/none", "--", *RUN],
     "--python must be the Python of the project's environment, got /none"),
    ("slurm", ["--name=x", "--gpus=8", "--", "--config=configs/none.py", *RUN[1:]],
     "--config must be a file of this checkout, got configs/none.py"),
    ("image", [], "--image must be given; --help shows an example"),
    ("image", ["--image=x", "--extra=npu"], "--extra must be tpu, gpu or none, got npu"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_asked(tools, script, arguments, message):
    done = tools.launch(script, *arguments)
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"
    assert tools.calls() == []


@pytest.mark.parametrize("script, tool", [("gke", "xpk"), ("sky", "sky"), ("slurm", "sbatch"), ("image", "docker")])
def test_a_tool_that_is_not_there_is_named(tools, script, tool):
    for name in ("bash", "dirname", "sed"):
        (tools.folder / "few" / name).parent.mkdir(exist_ok=True)
        (tools.folder / "few" / name).symlink_to(shutil.which(name))
    tools.environment["PATH"] = str(tools.folder / "few")
    done = tools.launch(script, *COMPLETE[script])
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tool} must be on PATH: install ")


def test_the_command_of_gke_runs_in_the_container(tools):
    """In XPK's own frame: a subshell whose process gets the signal of a preemption, so Python must be that process."""
    done = tools.launch("gke", *GKE, "--project=mine", "--priority=high", "--env=JAX_PROCESS_X=1 2", "--", *RUN, *ODD)
    assert done.returncode == 0, done.stderr
    (call,) = tools.calls()
    command = call.pop().removeprefix("--command=")
    assert call == [
        "xpk", "workload", "create", "--workload=sft-6b", "--cluster=tpus", "--zone=us-east5-a", "--project=mine",
        "--tpu-type=v5p-128", "--docker-image=registry/image:tpu", "--max-restarts=20", "--restart-on-exit-codes=1",
        "--termination-grace-period-seconds=300", "--priority=high",
    ]  # fmt: skip
    assert "\n" not in command  # it becomes a line of YAML
    frame = f"({command}) & PID=$!\nwait $PID; echo $? $PID"
    done = subprocess.run(["bash", "-c", frame], env=tools.environment, capture_output=True, text=True)
    arguments, variables, pid = tools.ran()
    assert variables == {"JAX_PROCESS_X": "1 2"}
    assert arguments == ["-m", "instructgpt_jax.main", "--preemptible", *RUN, *ODD]
    assert done.stdout == f"0 {pid}\n", done.stderr


@pytest.mark.parametrize("managed", [False, True])
def test_what_sky_is_asked(tools, managed):
    more = ["--managed", "--spot", "--infra=gcp/us-east5", "--yes"] if managed else ["--nodes=2"]
    type = "tpu-v5p-128" if managed else "H100:8"
    done = tools.launch("sky", "--name=sft", f"--type={type}", "--env=A=1 2", *more, "--", *RUN)
    assert done.returncode == 0, done.stderr
    settings = ["--env", f"FLAGS={' '.join(RUN)}", "--env", "A=1 2"]
    assert tools.calls() == [
        ["sky", "jobs", "launch", "launch/sky_tpu.yaml", "--name=sft", *settings, "--gpus=tpu-v5p-128", "--num-nodes=1",
         "--use-spot", "--infra=gcp/us-east5", "--detach-run", "--yes"]
        if managed else
        ["sky", "launch", "launch/sky_gpu.yaml", "--cluster=sft", *settings, "--gpus=H100:8", "--num-nodes=2",
         "--detach-run"]
    ]  # fmt: skip


@pytest.mark.parametrize("type, nodes, own, variables", [
    ("tpu-v6e-8", 1, ["--preemptible", "--distributed"], {}),
    ("H100:8", 1, ["--preemptible"], {}),
    ("H100:8", 2, ["--preemptible"],
     {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}),
])  # fmt: skip
def test_the_task_of_sky_runs_with_the_flags(tools, type, nodes, own, variables):
    assert tools.launch("sky", "--name=x", f"--type={type}", f"--nodes={nodes}", "--", *RUN, *ODD).returncode == 0
    (call,) = tools.calls()
    task = yaml.safe_load((ROOT / call[2]).read_text())
    given = call[call.index("--env") + 1].partition("=")[2]
    tools.python.rename(tools.program(tools.folder / "instructgpt_jax_env" / "bin" / "python", ""))
    node = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", task["run"]], env=tools.environment | node | task["envs"] | {"FLAGS": given})
    assert done.returncode == 0
    arguments, found, _ = json.loads((tools.folder / "instructgpt_jax_env" / "bin" / "ran.json").read_text())
    assert arguments == ["-m", "instructgpt_jax.main", *own, *RUN, *ODD]
    assert found == variables
    extra = "tpu" if type.startswith("tpu") else "gpu"
    assert task["setup"] == f"bash launch/worker.sh install {extra}\n"


def test_what_slurm_is_asked(tools):
    more = ["--nodes=2", "--time=12:00:00", "--partition=a100", "--account=lab", "--constraint=hbm", "--cpus=12"]
    done = tools.launch("slurm", "--name=sft", "--gpus=8", *more, "--", *RUN, *ODD)
    assert done.returncode == 0, done.stderr
    assert tools.calls() == [[
        "sbatch", "--job-name=sft", f"--output={tools.folder}/sft_%j.log", f"--chdir={ROOT}", "--nodes=2",
        "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--time=12:00:00", "--partition=a100",
        "--account=lab", "--constraint=hbm", "--requeue", "--open-mode=append", "--signal=B:USR1@300",
        f"{ROOT}/launch/slurm_job.sh", str(tools.python), *RUN, *ODD,
    ]]  # fmt: skip


def job(tools, *flags):
    environment = tools.environment | {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    return subprocess.Popen([ROOT / "launch" / "slurm_job.sh", tools.python, *RUN, *flags], env=environment)


@pytest.mark.parametrize("flags, code", [((), 0), (("--config.fail=True",), 3)])
def test_a_slurm_job_ends_as_its_run(tools, flags, code):
    assert job(tools, *flags).wait(timeout=60) == code
    assert tools.ran()[0] == ["-m", "instructgpt_jax.main", "--preemptible", *RUN, *flags]
    assert [call[:3] for call in tools.calls()] == [["srun", "--kill-on-bad-exit=1", "--cpus-per-task=12"]]


def test_a_slurm_job_at_its_time_limit_is_queued_again(tools):
    running = job(tools, "--config.hold=True")
    while not (tools.folder / "pid").exists():
        assert running.poll() is None
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=60) == 143
    assert tools.calls()[1:] == [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]


def test_the_image_is_the_last_commit(tools):
    done = tools.launch("image", "--image=registry/image:gpu", "--extra=gpu", "--push")
    assert done.returncode == 0, done.stderr
    build, push = tools.calls()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert build == ["docker", "build", "--file=launch/Dockerfile", "--build-arg=EXTRAS=gpu,gcs",
                     f"--label=commit={commit}", "--tag=registry/image:gpu", "-"]  # fmt: skip
    assert push == ["docker", "push", "registry/image:gpu"]
    archived = subprocess.run(
        ["tar", "-tf", tools.folder / "context.tar"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    known = subprocess.run(["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert {name for name in archived if not name.endswith("/")} == set(known.stdout.splitlines())


def test_the_dockerfile_installs_what_the_project_has():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"EXTRAS=([a-z,]+)", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    minor = int(re.search(r"^FROM python:3\.(\d+)-slim$", text, re.MULTILINE)[1])
    assert minor >= int(re.fullmatch(r">=3\.(\d+)", project["requires-python"])[1])
    for name in shlex.split(re.search(r"^COPY (.*) \./$", text, re.MULTILINE)[1]):
        assert (ROOT / name).exists()


def real(variable):
    """The Python beside the real program that a variable names."""
    if not os.environ.get(variable):
        pytest.skip(f"no {variable.lower()}: {variable} names the program where it is installed")
    return pathlib.Path(os.environ[variable]).parent / "python"


def ask(python, code, argument, home):
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run([python, "-c", code, argument], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


XPK_WRITES = """
import argparse, json, sys
from xpk.core.config import FileSystemConfig, set_config
from xpk.parser.core import set_parser
from xpk.utils.execution_context import set_context
parser = argparse.ArgumentParser(prog="xpk")
set_parser(parser=parser)
known = parser.parse_args(json.loads(sys.argv[1]))
known.enable_ray_cluster = False
set_config(FileSystemConfig())
set_context(dry_run_value=True, quiet_value=True)
try:
    known.func(known)
except SystemExit as ended:
    assert not ended.code
print("0")
"""


def test_xpk_writes_what_kubernetes_runs(tools):
    """Its parser, and with --dry-run its manifest: the command stands in it whole, and 143 and 1 begin again."""
    python = real("XPK")
    done = tools.launch("gke", *GKE, "--project=mine", "--priority=low", '--env=A="1\n', "--", *RUN, *ODD)
    assert done.returncode == 0, done.stderr
    (call,) = tools.calls()
    manifest = tools.folder / "manifest.yaml"
    more = ["--dry-run", "--skip-validation", f"--output-manifest-file={manifest}"]
    ask(python, XPK_WRITES, json.dumps([*call[1:], *more]), tools.folder)
    spec = yaml.safe_load(manifest.read_text())["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 20
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 16  # hosts of a v5p-128
    assert {1, 143} <= set(job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"])
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    (container,) = pod["containers"]
    assert container["image"] == "registry/image:tpu"
    assert f"({call[-1].removeprefix('--command=')}) & PID=$!;" in container["command"][2]


SKY_PARSES = """
import json, sys
import sky
from sky.client.cli import command as cli
path, *words = json.loads(sys.argv[1])
group = cli.cli
while words[0] in group.commands:
    group, words = group.commands[words[0]], words[1:]
    if not hasattr(group, "commands"):
        break
options = group.make_context("sky", words).params
settings = dict(options["env"])
task = sky.Task.from_yaml(path)
task.update_envs(settings)
task.set_resources_override({"accelerators": options["gpus"], "use_spot": options["use_spot"]})
(resources,) = task.resources
print(json.dumps({
    "entrypoint": options["entrypoint"], "envs": task.envs, "nodes": options["num_nodes"], "spot": resources.use_spot,
    "accelerators": resources.accelerators, "recovery": resources.job_recovery, "infra": options["infra"],
}))
"""


@pytest.mark.parametrize("type, more", [
    ("tpu-v5p-128", ["--managed", "--spot", "--infra=gcp/us-east5"]), ("tpu-v6e-8", []), ("H100:8", ["--nodes=2"]),
])  # fmt: skip
def test_skypilot_understands_what_it_is_asked(tools, type, more):
    python = real("SKY")
    done = tools.launch("sky", "--name=sft", f"--type={type}", "--env=A=1 2", *more, "--", *RUN, *ODD[:4])
    assert done.returncode == 0, done.stderr
    (call,) = tools.calls()
    task = call[call.index("launch") + 1]
    known = ask(python, SKY_PARSES, json.dumps([str(ROOT / task), *call[1:]]), tools.folder)
    name, _, count = type.partition(":")
    assert known.pop("envs") == {"FLAGS": call[call.index("--env") + 1].removeprefix("FLAGS="), "A": "1 2"}
    assert known.pop("recovery")["recover_on_exit_codes"] == [143]
    assert known == {
        "entrypoint": [task], "nodes": 2 if more == ["--nodes=2"] else 1, "spot": "--spot" in more,
        "accelerators": {name: int(count or 1)}, "infra": "gcp/us-east5" if len(more) == 3 else None,
    }  # fmt: skip


def documented(tool):
    """The commands of launch/README.md that begin with a tool's name, as words."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "launch" / "README.md").read_text())
    return [shlex.split(line) for line in re.findall(rf"^    ({tool} .*)$", text, re.MULTILINE)]


XPK_READS = """
import argparse, json, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser(prog="xpk")
set_parser(parser=parser)
for words in json.loads(sys.argv[1]):
    parser.parse_args(words[1:])
print(0)
"""
SKY_READS = """
import json, sys
from sky.client.cli.command import cli
for words in json.loads(sys.argv[1]):
    group, words = cli, words[1:]
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    group.make_context("sky", words)
print(0)
"""


@pytest.mark.parametrize("variable, code", [("XPK", XPK_READS), ("SKY", SKY_READS)])
def test_the_tools_understand_the_document(variable, code, tmp_path):
    commands = documented(variable.lower())
    assert len(commands) >= 4
    ask(real(variable), code, json.dumps(commands), tmp_path)
