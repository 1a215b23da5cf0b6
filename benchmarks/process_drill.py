"""Every stage by several processes of one job, undisturbed and disturbed, against one process of eight devices.

    python benchmarks/process_drill.py --workdir=DIR [--cells=one,2in,2across,2of4,4in,4across]
        [--faults=kill,term,mesh,mesh:4in] [--stages=sft,reward,ppo,collect,evaluate] [--times=1]

The pipeline of tests/every_stage.py on fake devices of a CPU, two to a process; they talk over the loopback interface.
A cell is a number of processes, and where the tensor axis lies: `in` each process, or `across` two of them. `2of4` has
two processes of four devices, with the tensor axis inside each; `one` is one process of eight.

whole   the pipeline, undisturbed: the same files as of one process, numbers and arrays equal to rounding
kill    kill -9 of a random process at a random moment of a stage: the others end by themselves, each in one line and
        in the time that docs/reliability.md says; the same command again: lines and arrays equal to the bit to those of
        the undisturbed cell
term    SIGTERM to a random process: all save the same step and exit 0; the same command again: equal to the bit
mesh    a stage that was ended by SIGTERM goes on in one process on a mesh of its own, with `mesh:CELL` in that cell:
        equal to rounding

`--blows=N` signals N times in a row, each to a job that goes on from the blow before. `--part=pretrain` takes that
stage alone, `--part=short` pretraining, SFT and PPO-ptx, `--part=measured` pretraining, collect and evaluate,
`--part=adapters` pretraining, and SFT, reward model and PPO-ptx on adapters. `--benchmark=FOLDER` adds the stage
`benchmark` (extra `eval`), its records are written into FOLDER. A run that has not ended after `--patience` seconds
counts as one that hangs, and as a difference. Every case is written into DIR/cases.jsonl; what is there already is not
run again. Prints a line a case, and the table in the end; exits 1 where anything differs.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import every_stage  # noqa: E402
import jobs  # noqa: E402
from compared import compare  # noqa: E402

from instructgpt_jax.training import checkpoint  # noqa: E402

CONFIG = "tests/every_stage.py"
MOMENTS = {"evaluate": 6, "benchmark": 1}  # of a stage's work, see `done`, after the last of which it is disturbed
PARTS = ("all", "pretrain", "short", "adapters", "measured")
JOIN = 60  # seconds that a process waits for the others
SILENT = 30  # seconds without a heartbeat after which a process counts as lost: on CPUs the default
LATE = 15  # seconds more that the others may take to end, on a loaded machine


class Cell(NamedTuple):
    """processes of `each` devices; tensor: size of that axis."""

    processes: int
    tensor: int
    each: int = 2


CELLS = {
    "one": Cell(1, 2, each=8), "2in": Cell(2, 2), "2across": Cell(2, 4), "2of4": Cell(2, 4, each=4),
    "4in": Cell(4, 2), "4across": Cell(4, 4),
}  # fmt: skip
MESH = {"mesh": Cell(1, 1, each=8)} | {f"mesh:{name}": cell for name, cell in CELLS.items()}  # where a stage goes on


class Plan(NamedTuple):
    """What a drill is asked.

    argument: of the configuration.
    patience: seconds after which a run counts as one that hangs.
    first: seconds in which the processes join and compile.
    blows: signals before the run to the end.
    seed: of the moments.
    """

    argument: str
    patience: float
    first: float
    blows: int
    seed: int


class Case(NamedTuple):
    """One disturbed stage.

    name: cell, stage, fault and a number.
    wrong: what differs, or is not as documented.
    blows: what each signal was, for people.
    ended: seconds after each of them until all had ended.
    again: seconds of the run to the end.
    went_on: jobs that were started after a blow and made a step at least.
    phases: what the last run says about its start, '' = it made no step.
    """

    name: str
    wrong: list[str]
    blows: list[str]
    ended: list[float]
    again: float
    went_on: int
    phases: str


def start(plan: Plan, cell: Cell, workdir: pathlib.Path, only: str, slow: float = 0.0):
    """A job of a cell on the pipeline, or on one stage of it; `slow` seconds for each batch or part."""
    asked = [f"--config={CONFIG}:{plan.argument}", f"--workdir={workdir}", f"--config.tensor={cell.tensor}"]
    asked += [f"--config.only={only}", f"--join_seconds={JOIN}", f"--heartbeat_seconds={SILENT}"]
    changes = {number: {"slow": slow} for number in range(cell.processes)}
    return jobs.running(asked, workdir, cell.processes, cell.processes * cell.each, changes)


def finish(plan: Plan, cell: Cell, workdir: pathlib.Path, only: str = "") -> list[str]:
    """Runs to the end: what went wrong, where it did not get there."""
    with start(plan, cell, workdir, only) as processes:
        codes = ended(plan, processes)
    if None in codes:
        return [f"the run hung, exit codes {codes}"]
    return [f"the run ended with {codes}: {jobs.said(workdir)[-2000:]}"] if any(codes) else []


def ended(plan: Plan, processes: list) -> list[int | None]:
    """Exit codes; None of those that have not ended in time."""
    until = time.monotonic() + plan.patience
    return [jobs.code(process, max(0.0, until - time.monotonic())) for process in processes]


def done(workdir: pathlib.Path, stage: str, since: float = 0.0) -> int:
    """What of a stage's work is done: lines of metrics, parts of an evaluation, lines of progress of the others.

    Args:
      since: time before which lines of metrics do not count: the next run has not taken out yet what it makes anew.
    """
    folder, log = workdir / stage, pathlib.Path(f"{workdir}_0.log")
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        return metrics.read_bytes().count(b"\n") if metrics.stat().st_mtime >= since else 0
    if (folder / "parts").exists():
        return len(list((folder / "parts").glob("*.json")))
    return len(re.findall(rf"^{stage} \d+/\d+ ", log.read_text(), re.MULTILINE)) if log.exists() else 0


class Blow(NamedTuple):
    """A signal: for people, seconds until all had ended, what was wrong, and whether the job had made a step."""

    text: str
    seconds: float
    wrong: list[str]
    went_on: bool


def strike(plan: Plan, cell: Cell, workdir: pathlib.Path, stage: str, number: int, rng: random.Random) -> Blow | None:
    """Ends a stage early by a signal to a random process; None where the stage was complete before.

    A kill comes as often at any moment of the first seconds, in which the processes join and compile, as after a line
    of metrics; SIGTERM after a line, or, where nothing is saved yet, when the stage has claimed its workdir: all save a
    step or two later, and some must be left of the four of a stage.
    """
    saved = checkpoint.newest(workdir / stage)[0] or 0 if (workdir / stage / "checkpoints").exists() else 0
    target, victim = saved + rng.randint(1, MOMENTS.get(stage, 3)), rng.randrange(cell.processes)
    claimed = workdir / stage / "config.json"
    early = number == signal.SIGTERM and stage not in MOMENTS and not claimed.exists()
    moment = rng.uniform(0, plan.first) if number == signal.SIGKILL and rng.random() < 0.5 else plan.patience
    begin, since = time.monotonic(), time.time()
    with start(plan, cell, workdir, stage, slow=1.0) as processes:
        while time.monotonic() - begin < moment:
            if claimed.exists() if early else done(workdir, stage, since) >= target:
                break
            if not all(process.is_alive() for process in processes):
                codes = ended(plan, processes)
                said = jobs.said(workdir)[-2000:]
                return Blow("none", 0.0, [f"ended by itself with {codes}: {said}"], False) if any(codes) else None
            time.sleep(0.02)
        time.sleep(rng.uniform(0.1, 0.3))
        age, reached = time.monotonic() - begin, done(workdir, stage, since)
        processes[victim].is_alive() and os.kill(processes[victim].pid, number)
        begin = time.monotonic()
        codes = ended(plan, processes)
        seconds = round(time.monotonic() - begin, 1)
    went_on = reached > saved
    text = f"process {victim} after " + (f"line {reached}" if went_on else f"{age:.0f} s, before its first line")
    if moment == plan.patience <= age:
        return Blow(text, seconds, [f"hung: no line {target} in {age:.0f} s"], went_on)
    if None in codes:
        return Blow(text, seconds, [f"hung after the signal, exit codes {codes}"], went_on)
    if number == signal.SIGTERM:
        return Blow(text, seconds, [f"exit codes {codes}"] if any(codes) else [], went_on)
    allowed = (SILENT if went_on else JOIN) + LATE  # before its first line it may have been joining
    if seconds > allowed:
        return Blow(text, seconds, [f"the others ended {seconds} s after the kill, not in {allowed} s"], went_on)
    told = [jobs.said(workdir, n, "error: ").splitlines() for n in range(cell.processes) if n != victim and codes[n]]
    bad = [lines for lines in told if sum(x.startswith("error: ") for x in lines) != 1 or "Traceback" in "".join(lines)]
    return Blow(text, seconds, [f"not one line: {bad[0][-5:]}"] if bad else [], went_on)


def drill(plan: Plan, cell: Cell, whole: pathlib.Path, stage: str, fault: str, number: int) -> Case:
    """A stage that is disturbed and started again, after the stages before it as the undisturbed cell has them.

    What the runs have said and written stays only where something is wrong. A drill that was ended goes on after the
    last blow that it has noted.
    """
    name = f"{whole.name} {stage} {fault} {number}"
    copy, kind = whole.with_name(re.sub("[ :]", "_", name)), signal.SIGKILL if fault == "kill" else signal.SIGTERM
    noted, other = copy / "blows.json", MESH.get(fault)
    if not noted.exists():
        remove(copy)
        shutil.copytree(whole, copy, ignore=lambda folder, _: {stage, "complete"} if folder == str(whole) else ())
    blows = [Blow(*one) for one in json.loads(noted.read_text())] if noted.exists() else []
    while len(blows) < plan.blows:
        rng = random.Random(f"{plan.seed} {name} {len(blows)}")
        if (blow := strike(plan, cell, copy, stage, kind, rng)) is None:
            break
        blows.append(blow)
        noted.write_text(json.dumps(blows))
    wrong, begin = sum((blow.wrong for blow in blows), []), time.monotonic()
    wrong += finish(plan, other or cell, copy, stage)
    again = round(time.monotonic() - begin, 1)
    wrong += compare(whole, copy, other is None, stage)[0]
    went_on = sum(blow.went_on for blow in blows[1:]) + bool(blows)
    phases = re.findall(rf"{stage}: step \d+ was made .*", jobs.said(copy))
    if kind == signal.SIGTERM and not phases and (copy / stage / "metrics.jsonl").exists():
        wrong.append("the stage was complete when it was ended, and nothing went on")
    if not wrong:
        remove(copy)
    told = [[blow.text for blow in blows], [blow.seconds for blow in blows]]
    return Case(name, wrong, *told, again, went_on, "".join(phases[:1]))


def remove(workdir: pathlib.Path) -> None:
    """A workdir, and what its processes have said and kept."""
    logs = workdir.parent.glob(f"{workdir.name}_[0-9].log")
    for path in [workdir, *logs, workdir.with_name(f"{workdir.name}_cache")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def table(cases: dict[str, Case]) -> list[str]:
    """Lines of the table: the cases of a cell, stage and fault together."""
    lines = ["| cell | what | signals | restarts that went on | ends as it must | all ended after | to the end again |"]
    lines.append("|---|---|---|---|---|---|---|")
    groups: dict[str, list[Case]] = {}
    for name, case in cases.items():
        groups.setdefault(name.rpartition(" ")[0], []).append(case)
    for name, group in groups.items():
        cell, _, what = name.partition(" ")
        times = sum((case.ended for case in group), []), [case.again for case in group]
        shown = [f"{min(x):.0f} to {max(x):.0f} s, median {statistics.median(x):.0f}" if x else "" for x in times]
        good = f"{sum(not case.wrong for case in group)} of {len(group)}"
        counts = f"{len(times[0])} | {sum(case.went_on for case in group)} | {good}"
        lines.append(f"| {cell} | {what} | {counts} | {shown[0]} | {shown[1]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--cells", default=",".join(CELLS), help="whose stages are disturbed")
    parser.add_argument("--faults", default="kill,term,mesh", help=f"of kill, term, {', '.join(MESH)}")
    parser.add_argument("--stages", default="sft,reward,ppo", help="that are disturbed")
    parser.add_argument("--times", type=int, default=1, help="that each of them is")
    parser.add_argument("--blows", type=int, default=1, help="in a row, each time")
    parser.add_argument("--part", default="all", choices=PARTS, help="of the pipeline")
    parser.add_argument("--benchmark", default="", help="folder for records: the stage `benchmark` too")
    parser.add_argument("--patience", type=float, default=900, help="seconds after which a run counts as hanging")
    parser.add_argument("--first", type=float, default=20, help="seconds in which a job joins and compiles")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    for key, known in (("cells", CELLS), ("faults", {"kill", "term", *MESH})):
        if unknown := [name for name in getattr(options, key).split(",") if name and name not in known]:
            parser.error(f"--{key} must be of {', '.join(known)}, got {unknown[0]!r}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no process behind
    root, argument = pathlib.Path(options.workdir).resolve(), options.part
    root.mkdir(parents=True, exist_ok=True)
    if options.benchmark:
        folder = pathlib.Path(options.benchmark).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        every_stage.write_benchmark(folder)
        argument += f",{folder}"
    plan = Plan(argument, options.patience, options.first, options.blows, options.seed)
    kept = root / "cases.jsonl"
    known = [Case(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    cases, differ, one = {case.name: case for case in known if not case.wrong}, 0, root / "one"
    for name in dict.fromkeys(["one", *options.cells.split(",")]):
        cell, whole = CELLS[name], root / name
        if not (whole / "complete").exists():
            if wrong := finish(plan, cell, whole):
                sys.exit(f"{whole}: {wrong[0]}")
            (whole / "complete").touch()
        for stage in filter(None, options.stages.split(",")):
            if not (whole / stage).exists():
                sys.exit(f"--stages must be of {whole}, which has no {stage}: other stages need another --workdir")
        if name not in options.cells.split(","):
            continue
        found, far = compare(one, whole, exact=False)
        differ += len(found)
        print(f"{name} whole: " + ("; ".join(found[:3]) or f"largest difference {far:.1e}"), flush=True)
        disturbed = itertools.product(options.stages.split(","), options.faults.split(","), range(options.times))
        for stage, fault, number in disturbed:
            if f"{name} {stage} {fault} {number}" in cases or not (stage and fault) or MESH.get(fault) == cell:
                continue
            case = drill(plan, cell, whole, stage, fault, number)
            cases[case.name] = case
            differ += len(case.wrong)
            with kept.open("a") as file:
                file.write(json.dumps(case._asdict()) + "\n")
            told = "; ".join(case.wrong[:3]) or "as it must be"
            print(f"{case.name}: {', '.join(case.blows)}; {case.ended} and {case.again} s; {told}", flush=True)
    print("\n".join(table(cases)))
    print(f"{differ} differences" if differ else "no differences")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
