"""Faults of disks, files and numbers, again and again: what a run says, and whether it then ends with the same bits.

    python benchmarks/fault_drill.py [--times=10] [--faults=full,readonly,truncated,halved,record,shard,nan,hang,frozen]

full       the disk fills up during a save: a file system in memory of a size that does not hold the next checkpoint
readonly   the folder of the checkpoints becomes read-only while the run goes on
truncated  an array file of the newest checkpoint is cut short at a random place
halved     half of the files of the newest checkpoint, drawn at random, are deleted
record     a line of the training data is spoilt while the run is down; all lines are read at the start
shard      a token shard is cut or overwritten while the run reads it: of all sources these alone are read as it trains
nan        the gradient of one step is not a number, the loss that it logs is one
hang       one of two processes stands still before a batch, and its heartbeats go on: the watchdog of each says so, and
           that of the one says where it stands; nobody ends until somebody kills that one, then the other one does
frozen     one of two processes is stopped by SIGSTOP, as on a machine that is dead: the other one ends by itself

The run is the toy stage of tests/ (for the last two and `record` SFT of tests/tiny_supervised.py, for `shard` the
pretraining of tests/small_runs.py), with a checkpoint after every third of 12 steps, or second of 6. After the fault
comes its repair (a larger disk, a writable one, the data put back), where the run does not help itself, and the same
run again; every line but perf/* and every array must be those of a run without a fault. Disks need the right to mount
(root). Prints a row a fault, and exits 1 where anything differs or more than one line was said.
"""

import argparse
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import jobs  # noqa: E402
import small_runs  # noqa: E402
import tiny_supervised  # noqa: E402
import toy_stage  # noqa: E402
from saved_runs import arrays, lines  # noqa: E402

from instructgpt_jax import errors, sharding  # noqa: E402
from instructgpt_jax import workdir as workdirs  # noqa: E402
from instructgpt_jax.data import build_tokens  # noqa: E402
from instructgpt_jax.stages import pretrain, sft  # noqa: E402
from instructgpt_jax.training import checkpoint, loop  # noqa: E402

BAD = ("differs", "then", "ended", "not found", "the line")  # how what is told of a run begins that went wrong
PATIENCE = 600  # seconds for a job of two processes, on a loaded machine
SILENT = 10  # seconds without a heartbeat after which a process counts as lost
TOY = {"checkpoint.every": 3, "checkpoint.keep_last": 9, "eval_every": 4}


def run(workdir: pathlib.Path, stage: str = "toy", world: pathlib.Path | None = None, **changes) -> str:
    """A run to its end in this process; the one line that it ended with instead, '' = none."""
    try:
        if stage == "toy":
            toy_stage.run(workdir, jax.devices()[:1], **TOY | changes)
        else:
            settings = on_shards(world) if stage == "pretrain" else tiny_supervised.config("sft", world)
            mesh = sharding.make_mesh(settings.mesh.to_dict(), jax.devices()[:1])
            with jax.set_mesh(mesh):
                loop.train(pretrain.build if stage == "pretrain" else sft.build, settings, mesh, workdir)
    except SystemExit:
        return "stopped by a signal"
    except Exception as error:
        told = errors.describe(error)
        if told is None:
            raise
        return told
    return ""


def on_shards(world: pathlib.Path):
    """Pretraining on the shards that `make_shards` has made."""
    settings = small_runs.pretrain(world)
    settings.update_from_flattened_dict({"pretrain.num_steps": 12, "checkpoint.every": 3, "log_every": 1})
    settings.mesh = dict(data=1, fsdp=1, tensor=1)
    settings.data.tokenizer = str(world / "bpe")
    settings.data.pretraining = (f"tokens:{world}/shards/*.tokens",)
    settings.models.model.vocab_size = 300
    return settings


def make_shards(world: pathlib.Path) -> None:
    small_runs.write(world)
    source, tokenizer = f"jsonl:{world}/text.jsonl", f"{world}/bpe"
    build_tokens.build(source, tokenizer, f"{world}/shards", build_tokens.Part(1, 1), workers=1, skip_bad=0)


def same(left: pathlib.Path, right: pathlib.Path) -> bool:
    equal = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), arrays(left), arrays(right))
    logs = all(lines(left, name) == lines(right, name) for name in ("metrics.jsonl", "samples.jsonl"))
    return logs and all(jax.tree.leaves(equal))


def mount(*arguments: str | pathlib.Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def full(workdir: pathlib.Path, whole: pathlib.Path, rng: random.Random) -> str:
    """The disk fills up while a checkpoint is written; then it is a larger one."""
    workdir.mkdir()
    pages = sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file())
    mount("-t", "tmpfs", "-o", f"size={int(pages * rng.uniform(0.3, 0.9)) * 4}k", "tmpfs", workdir)
    try:
        return ended_and_again(workdir, whole, lambda: mount("-o", "remount,size=64m", workdir))
    finally:
        subprocess.run(["umount", workdir], check=True)


def readonly(workdir: pathlib.Path, whole: pathlib.Path, rng: random.Random) -> str:
    """The folder of the checkpoints becomes read-only before a random step, and is mended afterwards."""
    folder = workdir / "checkpoints"

    def lock():
        mount("--bind", folder, folder)
        while subprocess.run(["mount", "-o", "remount,bind,ro", folder], stderr=subprocess.DEVNULL).returncode:
            time.sleep(0.05)  # a save is writing

    with at_batch(rng.randint(2, 8), lock):
        return ended_and_again(workdir, whole, lambda: subprocess.run(["umount", folder], check=True))


def ended_and_again(workdir: pathlib.Path, whole: pathlib.Path, mend: Callable[[], object]) -> str:
    """What the run said as it ended; the same run again, after it was mended, must be whole."""
    try:
        told = run(workdir)
    finally:
        mend()
    if not told:
        return "not found: the run did not end"
    again = run(workdir)
    return f"then {again}" if again else told if same(whole, workdir) else "differs"


class at_batch:
    """While it is entered, something happens before the batch of an index."""

    def __init__(self, index: int, what: Callable[[], None]):
        self._index, self._what, self._following = index, what, loop._next

    def __enter__(self):
        def following(data, index):
            if index == self._index:
                self._index = -1  # once
                self._what()
            return self._following(data, index)

        loop._next = following

    def __exit__(self, *_):
        loop._next = self._following


def damaged(workdir: pathlib.Path, whole: pathlib.Path, rng: random.Random, halve: bool) -> str:
    """Files of the newest checkpoint are cut or deleted; the run goes round it by itself."""
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / str(checkpoint.steps(workdir)[-1])
    found = sorted(path for path in newest.rglob("*") if path.is_file())
    if halve:
        for path in rng.sample(found, len(found) // 2):
            path.unlink()
    else:
        path = rng.choice([path for path in found if path.parent.name == "d" and path.stat().st_size > 1])
        with open(path, "r+b") as file:
            file.truncate(rng.randrange(path.stat().st_size))
    needed = checkpoint.newest(workdir)[1]
    told = run(workdir)
    if not needed and same(whole, workdir):
        return "nothing that is read: complete as before"
    return f"ended: {told}" if told else "goes on from the checkpoint before" if same(whole, workdir) else "differs"


def go_down() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def record(workdir: pathlib.Path, whole: pathlib.Path, rng: random.Random, world: pathlib.Path) -> str:
    """A line of the data is spoilt between two halves of a run."""
    path = world / "demonstrations.jsonl"
    good = path.read_text()
    rows = good.splitlines(keepends=True)
    number = rng.randrange(len(rows))
    with at_batch(rng.randint(3, 5), go_down):
        run(workdir, "sft", world)
    cut = rows[number][: rng.randrange(1, len(rows[number]) - 2)] + "\n"
    try:
        path.write_text("".join([*rows[:number], cut, *rows[number + 1 :]]))
        told = run(workdir, "sft", world)
    finally:
        path.write_text(good)
    if f"demonstrations.jsonl:{number + 1}" not in told:
        return f"the line is not named: {told}"
    again = run(workdir, "sft", world)
    return f"then {again}" if again else " ".join(told.split()) if same(whole, workdir) else "differs"  # a list of one


def shard(workdir: pathlib.Path, whole: pathlib.Path, rng: random.Random, world: pathlib.Path) -> str:
    """A token shard is cut, or a half of it overwritten, before a random batch, and copied again afterwards."""
    (path,) = (world / "shards").glob("*.tokens")
    good = path.read_bytes()
    half, first = len(good) // 2, rng.randrange(len(good) // 2)

    def spoil():
        with open(path, "r+b") as file:
            if rng.random() < 0.5:
                file.truncate(first)
            else:
                file.seek(first)
                file.write(b"\xff" * half)

    try:
        with at_batch(rng.randint(2, 8), spoil):
            told = run(workdir, "pretrain", world)
    finally:
        path.write_bytes(good)
    if str(path) not in told:
        return f"not found: {told}"
    again = run(workdir, "pretrain", world)
    return f"then {again}" if again else told if same(whole, workdir) else "differs"


def nan(workdir: pathlib.Path, whole: pathlib.Path, rng: random.Random) -> str:
    """The gradient of one step is not a number."""
    step = rng.randint(4, 12)
    told = run(workdir, **{"toy.poison_step": step - 1})
    if f"toy/gradient_norm is nan at step {step}" not in told:
        return f"not found: {told}"
    again = run(workdir, **{"toy.poison_step": -1})
    return f"then {again}" if again else told if same(whole, workdir) else "differs"


def pair(workdir: pathlib.Path, world: pathlib.Path, changes: dict[int, dict] | None = None):
    """A job of two processes with a device each."""
    settings = {"mesh.fsdp": 2, "watch.seconds": 1.0, "watch.factor": 3.0}
    asked = [f"--config=tests/tiny_supervised.py:sft,{world}", f"--workdir={workdir}", f"--heartbeat_seconds={SILENT}"]
    return jobs.running(asked + [f"--config.{key}={value}" for key, value in settings.items()], workdir, 2, 2, changes)


def pair_to_the_end(workdir: pathlib.Path, world: pathlib.Path) -> str:
    with pair(workdir, world) as processes:
        codes = [jobs.code(process, PATIENCE) for process in processes]
    return f"exit codes {codes}: {jobs.said(workdir)}" if codes != [0, 0] else ""


def peer(workdir: pathlib.Path, whole: pathlib.Path, rng: random.Random, world: pathlib.Path, frozen: bool) -> str:
    """A process stands still; the same command again must be whole."""
    victim, until = rng.randrange(2), time.monotonic() + PATIENCE
    other = 1 - victim
    changes = {n: {"slow": 1.0} for n in range(2)} if frozen else {victim: {"held": 5}}  # 5 steps are known by then

    def due():
        if frozen:
            return len(lines(workdir)) > 2
        return all(" has taken " in jobs.said(workdir, n) for n in range(2))

    with pair(workdir, world, changes) as processes:
        while not (pathlib.Path(f"{workdir}_1.log").exists() and (workdir / "metrics.jsonl").exists() and due()):
            if time.monotonic() > until or not all(process.is_alive() for process in processes):
                return f"not found: {jobs.said(workdir)}"
            time.sleep(0.05)
        hanging = [jobs.said(workdir, n) for n in range(2)]
        if not frozen and (any("error: " in text for text in hanging) or "in hold_up" in hanging[other]):
            return f"not found: {hanging}"
        if not frozen and "in hold_up" not in hanging[victim]:
            return f"not found: where it stands: {hanging[victim]}"
        os.kill(processes[victim].pid, signal.SIGSTOP if frozen else signal.SIGKILL)
        begin = time.monotonic()
        code = jobs.code(processes[other], PATIENCE)
        seconds = time.monotonic() - begin
    told = jobs.said(workdir, other, "error: ")[len(hanging[other]) :].splitlines()
    if not code or sum(line.startswith("error: ") for line in told) != 1 or any("Traceback" in line for line in told):
        return f"ended with {code}: {told}"
    again = pair_to_the_end(workdir, world)
    if again or not same(whole, workdir):
        return f"then {again}" if again else "differs"
    words = [line for line in hanging[victim].splitlines() if " has taken " in line and not frozen]
    return " … ".join(words[:1] + [f"{line}, {seconds:.0f} s later" for line in told if line.startswith("error: ")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--faults", default="full,readonly,truncated,halved,record,shard,nan,hang,frozen")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, failed = random.Random(options.seed), 0
    workdirs.FREE = (*workdirs.FREE, "poison_step")  # it is no part of the experiment
    with tempfile.TemporaryDirectory() as made:
        root = pathlib.Path(made)
        world = tiny_supervised.make_world(root / "world")
        make_shards(world)
        for name, stage in (("toy", "toy"), ("sft", "sft"), ("shards", "pretrain")):
            assert not run(root / name, stage, world)
        if {"hang", "frozen"} & set(options.faults.split(",")):
            assert not pair_to_the_end(root / "pair", world)
        faults = {
            "full": full,
            "readonly": readonly,
            "truncated": functools.partial(damaged, halve=False),
            "halved": functools.partial(damaged, halve=True),
            "record": functools.partial(record, world=world),
            "shard": functools.partial(shard, world=world),
            "nan": nan,
            "hang": functools.partial(peer, world=world, frozen=False),
            "frozen": functools.partial(peer, world=world, frozen=True),
        }
        print("| fault | times | equal to the bit afterwards | what was said |\n|---|---|---|---|")
        for fault in options.faults.split(","):
            good, bad = [], []
            for number in range(options.times):
                whole = root / {"record": "sft", "shard": "shards", "hang": "pair", "frozen": "pair"}.get(fault, "toy")
                told = faults[fault](root / f"{fault}{number}", whole, rng).replace(str(root), "DIR")
                (bad if told.startswith(BAD) or "\n" in told else good).append(told)
            failed += len(bad)
            kinds = [f"{(bad or good).count(told)} times: {told}" for told in sorted({*bad, *good})]
            said = "; ".join(kinds) if fault in ("truncated", "halved") else (bad or good)[-1]
            print(f"| {fault} | {options.times} | {len(good)} | {said} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
