"""Every stage by several processes of one job, undisturbed and disturbed, against one process of eight devices.

    python benchmarks/process_drill.py --workdir=DIR [--cells=2in,2across,4in,4across] [--faults=kill,term,mesh]
                                       [--stages=sft,reward,ppo] [--times=1]

The pipeline of tests/every_stage.py on fake devices of a CPU, two to a process; they talk over the loopback interface.
A cell is a number of processes, and where the tensor axis lies: `in` each process, or `across` two of them.

whole   the pipeline, undisturbed: the same files as of one process, numbers and arrays equal to rounding
kill    kill -9 of a random process at a random moment of a stage: the others end by themselves, each in one line; the
        same command again: lines and arrays equal to the bit to those of the undisturbed cell
term    SIGTERM to a random process: all save the same step and exit 0; the same command again: equal to the bit
mesh    a stage that was ended by SIGTERM goes on in one process on a mesh of its own: equal to rounding

What is there already in DIR is not run again. Prints a line a row, and the table in the end; exits 1 with differences.
"""

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import jobs  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from saved_runs import arrays  # noqa: E402

from instructgpt_jax.training import checkpoint  # noqa: E402

CONFIG = "tests/every_stage.py"
PATIENCE = 1800  # seconds for a run
RELATIVE, ABSOLUTE = 2e-3, 2e-4  # "to rounding", over all stages one after the other
CLOCK = ("perf", "seconds", "command", "config", "versions", "workdir", "hash")  # keys that need not be the same


class Cell(NamedTuple):
    """processes of two devices each; tensor: size of that axis."""

    processes: int
    tensor: int

    @property
    def devices(self) -> int:
        return 2 * self.processes if self.processes > 1 else 8


CELLS = {"2in": Cell(2, 2), "2across": Cell(2, 4), "4in": Cell(4, 2), "4across": Cell(4, 4)}


def start(cell: Cell, workdir: pathlib.Path, only: str, benchmark: pathlib.Path | None, slow: float = 0.0):
    """A job of a cell on the pipeline, or on one stage of it; `slow` seconds for each batch."""
    argument = f":{benchmark}" if benchmark else ""
    asked = [f"--config={CONFIG}{argument}", f"--workdir={workdir}", f"--config.tensor={cell.tensor}"]
    asked += [f"--config.only={only}", "--join_seconds=60"]
    changes = {number: {"slow": slow} for number in range(cell.processes)}
    return jobs.running(asked, workdir, cell.processes, cell.devices, changes)


def finish(cell: Cell, workdir: pathlib.Path, only: str = "", benchmark: pathlib.Path | None = None) -> None:
    """Runs to the end."""
    with start(cell, workdir, only, benchmark) as processes:
        codes = [jobs.code(process, PATIENCE) for process in processes]
    if any(codes):
        sys.exit(f"{workdir} ended with {codes}:\n" + jobs.said(workdir)[-4000:])


def lines(workdir: pathlib.Path, stage: str) -> int:
    path = workdir / stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def disturbed(cell: Cell, workdir: pathlib.Path, stage: str, number: int, rng: random.Random):
    """Ends a stage early by a signal to a random process: what is told, seconds until the last one had ended, codes.

    A kill comes as often at any moment of the first 20 s, in which the processes join and compile, as after a line of
    metrics; SIGTERM comes after a line, from where on it saves.
    """
    target, victim, begin = rng.randint(1, 2), rng.randrange(cell.processes), time.monotonic()
    moment = rng.uniform(0, 20) if number == signal.SIGKILL and rng.random() < 0.5 else math.inf
    with start(cell, workdir, stage, None, slow=1.0) as processes:
        while lines(workdir, stage) < target and time.monotonic() - begin < moment:
            if not all(process.is_alive() for process in processes):
                sys.exit(f"{workdir} ended by itself:\n" + jobs.said(workdir)[-4000:])
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        when = f"line {lines(workdir, stage)}"
        processes[victim].is_alive() and os.kill(processes[victim].pid, number)
        begin = time.monotonic()
        codes = [jobs.code(process, PATIENCE) for process in processes]
        seconds = time.monotonic() - begin
    others = [n for n in range(cell.processes) if n != victim]
    told = [jobs.said(workdir, n, "error: " if number == signal.SIGKILL else "").splitlines() for n in others]
    if number == signal.SIGKILL and all(codes):
        wrong = [text for text in told if sum(line.startswith("error: ") for line in text) != 1 or "Traceback" in text]
        return f"process {victim} after {when}" + f"; {len(wrong)} not in one line" * bool(wrong), seconds, codes
    return f"process {victim} after {when}", seconds, codes


def numbers(node, path: str = "") -> dict[str, object]:
    """The leaves of JSON by their paths, without what depends on the clock or the place."""
    if isinstance(node, dict):
        parts = [(key, value) for key, value in node.items() if not str(key).startswith(CLOCK)]
    elif isinstance(node, list):
        parts = list(enumerate(node))
    else:
        return {path: node}
    return {name: leaf for key, value in parts for name, leaf in numbers(value, f"{path}/{key}").items()}


def read(path: pathlib.Path, root: pathlib.Path) -> dict[str, object]:
    """A file of a run as numbers and texts."""
    if path.suffix == ".safetensors":
        return load_file(path)
    text = path.read_text().replace(str(root), "WORKDIR")
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return numbers(rows)


def files(root: pathlib.Path) -> set[str]:
    """What a run leaves, by its name under the workdir; checkpoints as a whole."""
    found = set()
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in ("tensorboard", "parts", ".compiled")]
        here = pathlib.Path(folder).relative_to(root)
        if here.name == "checkpoints":
            found.add(str(here))
            inside[:] = []
        elif here.name != "snapshots":
            found |= {str(here / name) for name in names if name != "seconds.json"}
        else:
            inside[:] = []
    return found


def compare(left: pathlib.Path, right: pathlib.Path, exact: bool, stage: str = "") -> tuple[list[str], float]:
    """What differs between two workdirs or one stage of them, and the largest difference of numbers, relative to 1."""
    names = [files(root / stage) for root in (left, right)]
    found, largest = [f"{name} is in one alone" for name in sorted(names[0] ^ names[1])], 0.0
    for name in sorted(names[0] & names[1]):
        pair = [root / stage / name for root in (left, right)]
        if name.endswith("checkpoints"):
            leaves = [jax.tree_util.tree_leaves_with_path(arrays(path.parent)) for path in pair]
            values = [{jax.tree_util.keystr(path): leaf for path, leaf in each} for each in leaves]
        elif name.endswith((".json", ".jsonl", ".safetensors")) and "tokenizer" not in name and "config" not in name:
            values = [read(path, root) for path, root in zip(pair, (left, right), strict=True)]
        else:
            continue
        keys = values[0].keys() ^ values[1].keys()
        found += [f"{name}: {sorted(keys)[:2]} in one alone"] if keys else []
        for key in values[0].keys() & values[1].keys():
            far, same = _unlike(values[0][key], values[1][key], exact)
            largest = max(largest, far)
            if not same:
                found.append(f"{name}{key}: {str(values[0][key])[:40]!r} is now {str(values[1][key])[:40]!r}")
                break
    return found, largest


def _unlike(left, right, exact: bool) -> tuple[float, bool]:
    """The difference of two leaves, relative to the larger of 1 and the right one, and whether they are the same."""
    if isinstance(left, np.ndarray):
        if exact or left.dtype.kind not in "f" or left.shape != right.shape:
            return 0.0, left.shape == right.shape and left.tobytes() == right.tobytes()
        left, right = left.astype(np.float64), right.astype(np.float64)
        far = np.abs(left - right) / np.maximum(1.0, np.abs(right))
        return float(far.max(initial=0.0)), bool(np.allclose(left, right, rtol=RELATIVE, atol=ABSOLUTE))
    if isinstance(left, float) and isinstance(right, float) and not exact:
        return abs(left - right) / max(1.0, abs(right)), math.isclose(left, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return 0.0, left == right


def drill(cell: Cell, whole: pathlib.Path, stage: str, fault: str, rng: random.Random) -> tuple[list[str], str]:
    """A stage that is disturbed and started again, after the stages before it as the undisturbed cell has them.

    Returns:
      What differs, and a text for the table.
    """
    copy = whole.with_name(f"{whole.name}_{stage}_{fault}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy, ignore=lambda folder, _: {stage, "complete"} if folder == str(whole) else ())
    killed, other = fault == "kill", fault == "mesh"
    text, seconds, codes = disturbed(cell, copy, stage, signal.SIGKILL if killed else signal.SIGTERM, rng)
    wrong = [f"exit codes {codes}"] if any(codes) and not killed else []
    saved = checkpoint.newest(copy / stage)[0] if (copy / stage).exists() else None
    text += f", step {saved or 0} was saved"
    finish(Cell(1, 1) if other else cell, copy, stage)
    found, far = compare(whole, copy, not other, stage)
    same = "" if found else f", largest difference {far:.1e}" if other else ", equal to the bit"
    return wrong + found, f"{text}, all ended after {seconds:.1f} s{same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--faults", default="kill,term,mesh")
    parser.add_argument("--stages", default="sft,reward,ppo", help="that are disturbed")
    parser.add_argument("--times", type=int, default=1, help="that each of them is")
    parser.add_argument("--benchmark", default="", help="folder of records: the stage `benchmark` too (extra `eval`)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    root, rng = pathlib.Path(options.workdir).resolve(), random.Random(options.seed)
    root.mkdir(parents=True, exist_ok=True)
    benchmark = pathlib.Path(options.benchmark).resolve() if options.benchmark else None
    failed, table = [], ["| cell | what | result |", "|---|---|---|"]

    def told(cell: str, what: str, found: list[str], text: str) -> None:
        failed.extend(found)
        table.append(f"| {cell} | {what} | {text}{': ' * bool(found)}{'; '.join(found[:3])} |")
        print(table[-1], flush=True)

    one = root / "one"
    if not (one / "complete").exists():
        finish(Cell(1, 2), one, "", benchmark)
        (one / "complete").touch()
    for name in options.cells.split(","):
        cell, whole = CELLS[name], root / name
        if not (whole / "complete").exists():
            shutil.rmtree(whole, ignore_errors=True)
            finish(cell, whole, "", benchmark)
            (whole / "complete").touch()
        found, far = compare(one, whole, exact=False)
        told(name, "whole", found, f"largest difference {far:.1e}")
        for stage in filter(None, options.stages.split(",")):
            for fault in filter(None, options.faults.split(",")):
                for _ in range(options.times):
                    told(name, f"{stage}, {fault}", *drill(cell, whole, stage, fault, rng))
    print("\n".join(table))
    print(f"{len(failed)} differences" if failed else "no differences")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
