"""The same run with several values of one key, one after another, and a table of how they ended.

    python -m instructgpt_jax.sweep --config=configs/ppo_1b3.py --key=ppo.policy_optimizer.lr \
        --values=2.55e-6:2.55e-5:7 --metric=valid/score [--workdir=runs/sweep] [--config.KEY=VALUE …]

`--values` is a list (`1e-6,3e-6`, `(0.9,0.95),(0.8,0.99)`) or a geometric grid `FIRST:LAST:COUNT`; the one above is
the paper's (appendix E.9: seven values from 2.55e-6 to 2.55e-5). Each run lives in `WORKDIR/<last part of the
key>_<value>` and resumes there: an interrupted sweep is continued by the same command. A run that fails, as those with
too high a rate do, is reported and the sweep goes on. `WORKDIR/sweep.json` has the table.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from etils import epath
from rich.console import Console
from rich.table import Table

from instructgpt_jax import errors, paths
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.training import metrics

NO_KEY = "must be a key of the configuration"  # what main says of an override that names none
INTERRUPTED = (-2, -15, 130, 143)  # exit codes after a signal


def grid(text: str) -> list[str]:
    """The values of `--values` as they are written on a command line.

    Raises:
      ValueError: neither a list nor FIRST:LAST:COUNT with positive ends and a count of at least 2.
    """
    values = split(text)
    if not all(values):
        raise ValueError(f"--values must be a list or FIRST:LAST:COUNT, got {text!r}")
    try:
        numbers = [float(number) for number in text.split(":")]
    except ValueError:  # what has a colon of its own, as a data source has, is a value
        return values
    if len(numbers) == 1:
        return values
    if len(numbers) != 3 or not numbers[2].is_integer():
        raise ValueError(f"--values must be a list or FIRST:LAST:COUNT, got {text!r}")
    first, last, count = *numbers[:2], int(numbers[2])
    if not (first > 0 and last > 0 and count >= 2):
        raise ValueError(f"--values must have positive ends and a count of at least 2, got {text!r}")
    ratio = (last / first) ** (1 / (count - 1))
    return [f"{first * ratio**i:.3g}" for i in range(count)]


def split(text: str) -> list[str]:
    """The parts between the commas that stand outside of brackets: a value may be a tuple."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def last_value(workdir: epath.Path, metric: str) -> tuple[int, float | None]:
    """The newest step of a run's metrics.jsonl, and the newest value of a metric there."""
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    values = [line[metric] for line in lines if metric in line]
    return max((line["step"] for line in lines), default=0), values[-1] if values else None


def run(config: str, key: str, values: list[str], metric: str, workdir: epath.Path, overrides: list[str]) -> list[dict]:
    """Runs every value to its end.

    Returns:
      A row a value: `value, workdir, ended` (the exit code was 0), `step`, the metric, and `error`, the last line of a
      failed run's log.

    Raises:
      ValueError: the configuration has no such key.
    """
    table = []
    for value in values:
        folder = workdir / f"{key.rpartition('.')[2]}_{value}"
        command = [sys.executable, "-m", "instructgpt_jax.main", "--preemptible"]  # a signal must not look like the end
        command += [f"--config={config}", f"--workdir={folder}"]
        process = subprocess.Popen(
            [*command, f"--config.{key}={value}", *overrides], stderr=subprocess.PIPE, text=True, errors="replace"
        )
        last = ""
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
            code = process.wait()
        except KeyboardInterrupt:  # the run got it too: it saves and ends
            process.wait()
            raise
        if code in INTERRUPTED:
            sys.exit(code)
        if code and NO_KEY in last:  # nor has it with any other value
            raise ValueError(last.removeprefix("error: "))
        step, result = last_value(folder, metric)
        row = {"value": value, "workdir": str(folder), "ended": code == 0, "step": step, metric: result}
        table.append(row if code == 0 else row | {"error": last})
        workdirs.write_atomically(workdir / "sweep.json", json.dumps(table, indent=2) + "\n")
    return table


def show(key: str, metric: str, table: list[dict]) -> None:
    """Prints the table."""
    shown = Table(key, "step", metric, "")
    for row in table:
        value = "" if row[metric] is None else f"{row[metric]:.4g}"
        shown.add_row(row["value"], str(row["step"]), value, "" if row["ended"] else row["error"])
    Console().print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="file of the configuration, as for instructgpt_jax.main")
    parser.add_argument("--key", required=True, help="what changes, such as ppo.policy_optimizer.lr")
    parser.add_argument("--values", required=True, help="a list 1e-6,3e-6 or a geometric grid FIRST:LAST:COUNT")
    parser.add_argument("--metric", required=True, help="shown in the table, such as valid/score")
    parser.add_argument("--workdir", default="", help="runs/sweep_<config name> by default")
    arguments, overrides = parser.parse_known_args()
    name, _, argument = pathlib.PurePath(arguments.config).name.partition(":")
    name = name.removesuffix(".py") + (f"_{argument}" if argument else "")
    with errors.one_line():
        values = grid(arguments.values)
        workdir = paths.make_folder("--workdir", paths.expand(arguments.workdir or f"runs/sweep_{name}"))
        table = run(arguments.config, arguments.key, values, arguments.metric, workdir, overrides)
    show(arguments.key, arguments.metric, table)
    sys.exit(0 if any(row["ended"] for row in table) else 1)


if __name__ == "__main__":
    main()
