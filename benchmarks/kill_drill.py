"""Kills a run again and again at random moments and checks that nothing but time was lost.

    python benchmarks/kill_drill.py --config=configs/sft_1b3.py:tiny --kills=20 [--config.KEY=VALUE …]

Runs the configuration once without interruption; then in other workdirs, with kill -9, half of the blows at a random
moment of the process's life and half just after a random new line of metrics. Every run that reaches its end must
have the same metrics.jsonl (but `perf/*`), the same samples and bit for bit the same final state, optimiser included.
Exits 1 with the differences. On a GPU set XLA's deterministic flags.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from instructgpt_jax import paths
from instructgpt_jax.training import checkpoint

LOGS = ("metrics.jsonl", "samples.jsonl")


def start(config: str, overrides: list[str], workdir: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "instructgpt_jax.main", f"--config={config}", f"--workdir={workdir}", *overrides]
    log = open(f"{workdir}.log", "a", encoding="utf-8")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    if process.wait() != 0:
        sys.exit(f"the run failed with {process.returncode}:\n" + pathlib.Path(f"{workdir}.log").read_text()[-4000:])


def run_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The folders with a metrics.jsonl: the workdir itself, or the stages of a pipeline."""
    found = []
    for folder, inside, files in os.walk(workdir):  # passes over what vanishes while it looks
        inside[:] = [name for name in inside if name not in ("checkpoints", "snapshots", "tensorboard")]
        found += [pathlib.Path(folder)] if "metrics.jsonl" in files else []
    return sorted(found)


def count_lines(workdir: pathlib.Path) -> int:
    return sum((folder / "metrics.jsonl").read_bytes().count(b"\n") for folder in run_folders(workdir))


def read_log(path: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def read_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by path."""
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    shapes = checkpoint.read_shapes(workdir)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint.load_params(workdir, abstract, which=""))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def differences(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """What differs between two complete workdirs."""
    found = []
    for folder in (path.relative_to(whole) for path in run_folders(whole)):
        for name in LOGS:
            left, right = (read_log(root / folder / name) for root in (whole, killed))
            pairs = enumerate(zip(left, right, strict=False), start=1)
            found += [f"{folder / name}:{n}: {a} is now {b}" for n, (a, b) in pairs if a != b][:1]
            if len(left) != len(right):
                found.append(f"{folder / name}: {len(left)} lines are now {len(right)}")
        left, right = (read_state(root / folder) for root in (whole, killed))
        if left.keys() != right.keys():
            found.append(f"{folder}: other arrays: {sorted(left.keys() ^ right.keys())[:3]}")
        else:
            found += [f"{folder}: {name} differs" for name in left if left[name].tobytes() != right[name].tobytes()][:3]
    return found


def strike(process: subprocess.Popen, workdir: pathlib.Path, lifetime: float, lines: int, rng: random.Random) -> bool:
    """Kills the process at a random moment; False if it ended before."""
    begin = time.monotonic()
    if rng.random() < 0.5:
        moment = rng.uniform(0.0, lifetime)
        due = lambda: time.monotonic() - begin >= moment  # noqa: E731
    else:
        have = count_lines(workdir)
        target = rng.randint(have + 1, max(lines, have + 1))
        due = lambda: count_lines(workdir) >= target  # noqa: E731
    while not due():
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, 0.05))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workdir", default="", help="where the runs go; a temporary folder by default")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    arguments, overrides = parser.parse_known_args()
    root = pathlib.Path(paths.expand(arguments.workdir) or tempfile.mkdtemp(prefix="kill_drill_"))
    root.mkdir(parents=True, exist_ok=True)
    rng = random.Random(arguments.seed)

    whole = root / "whole"
    begin = time.monotonic()
    finish(start(arguments.config, overrides, whole), whole)
    lifetime, lines = time.monotonic() - begin, count_lines(whole)
    print(f"uninterrupted: {lifetime:.0f} s, {lines} lines", flush=True)

    kills, rounds, failed = 0, 0, []
    while kills < arguments.kills:
        rounds += 1
        killed = root / f"killed{rounds}"
        blows = 0
        while kills < arguments.kills:
            process = start(arguments.config, overrides, killed)
            if not strike(process, killed, lifetime, lines, rng):
                finish(process, killed)
                break
            kills, blows = kills + 1, blows + 1
        else:
            finish(start(arguments.config, overrides, killed), killed)
        found = differences(whole, killed)
        failed += found
        print(f"run {rounds}: {blows} kills, " + ("identical" if not found else "\n  ".join(found)), flush=True)
    print(f"{kills} kills in {rounds} runs: " + ("all identical" if not failed else f"{len(failed)} differences"))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
