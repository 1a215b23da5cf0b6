"""Beside a process of a job: passes its stderr on, with one line for what JAX's coordination service says at an end.

    python -I last_line.py PROCESS ADDRESS JOIN_SECONDS HEARTBEAT_SECONDS <pipe

The service ends a process from C++, in no thread of Python: a report of several lines, the stack of the thread, and the
stacks of all others. What is known of the cause stands in the report. Everything else passes unchanged, also a report
after which the process went on.

Only the standard library is imported, and nothing of the package: it must be there in an instant.
"""

import os
import re
import select
import signal
import sys
import time

TOLD = "\0told\n"  # from the process: it has said itself why it ends
PATIENCE = 15.0  # seconds after which a report that ended nobody is passed on
_HEADER = re.compile(r"[IWEF]\d{4} \S+ +\d+ (\S+):\d+\] ")  # of a line of absl's log
_REPORTS = ("coordination_service", "preemption_sync_manager")
_FATAL = "Terminating process because the JAX distributed service detected"
AGAIN = "; the same command on all processes goes on from what was saved"


def is_report(line: str) -> bool:
    """Whether a line begins a report of the service."""
    header = _HEADER.match(line)
    return bool(header) and (_FATAL in line or header[1].startswith(_REPORTS))


def cause(text: str, process: int, address: str, join: int, heartbeat: int) -> str:
    """The one line about the reports of a process that the service ended.

    Args:
      text: the reports.
      process: number of the process that was ended.
      address: of the coordinator; '' = not known.
      join, heartbeat: seconds that it waited for the others, and after which one without a heartbeat is lost.
    """
    if "RegisterTask" in text:
        at = f" at {address}" if address else ""
        if process:
            return f"error: no coordinator{at} within {join} s: process 0 must run there, and be reached from here"
        return f"error: not every process has joined the coordinator{at} within {join} s"
    silent = re.search(r"stopped sending heartbeats\):\s*\n((?:.*\d[ \t]*\n)+)", text)
    lost = re.findall(r"(\d+)[ \t]*\n", silent[1]) if silent else re.findall(r"[Tt]ask (\d+) heartbeat timeout", text)
    if lost:
        who = ("process " if len(set(lost)) == 1 else "processes ") + ", ".join(sorted(set(lost), key=int))
        return f"error: {who} of this job ended or cannot be reached: no heartbeat for {heartbeat} s{AGAIN}"
    # Only process 0 is asked anything: where it stands still, nobody answers in time.
    if "Failed to send RPC" in text or "leader" in text or (process and "DEADLINE_EXCEEDED" in text):
        return f"error: process 0 of this job, the coordinator, ended or cannot be reached{AGAIN}"
    found = re.search(r"absl::Status: (.*)", text)
    return f"error: another process of this job failed: {found[1] if found else text.splitlines()[0]}{AGAIN}"


def rest(lines: list[str]) -> list[str]:
    """What of the lines of an end is not the service's: reports of others, up to the stack of the thread."""
    kept, own = [], True
    for line in lines:
        if line.startswith("*** Check failure stack trace"):
            break
        if _HEADER.match(line):
            own = is_report(line)
        if not own:
            kept.append(line)
    return kept


def main(process: str, address: str, join: str, heartbeat: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # it ends with its process, and after it
        signal.signal(number, signal.SIG_IGN)
    begun, held, since, told = "", [], 0.0, False

    def write(lines: list[str]) -> None:
        sys.stdout.write("".join(lines))
        sys.stdout.flush()

    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        if held and time.monotonic() - since > PATIENCE and not any(_FATAL in line for line in held):
            write(held)
            held = []
        if not ready:
            continue
        piece = os.read(0, 1 << 16)
        *lines, begun = (begun + piece.decode("utf-8", "replace")).split("\n") if piece else (begun, "")
        for line in [line + "\n" * bool(piece) for line in lines]:
            if line == TOLD:
                told = True
            elif held or is_report(line):
                since = since if held else time.monotonic()
                held.append(line)
            else:
                write([line])
        if not piece:
            break
    if any(_FATAL in line for line in held):
        own = [] if told else [cause("".join(held), int(process), address, int(join), int(heartbeat)) + "\n"]
        write([*rest(held), *own])
    elif not told:
        write(held)


if __name__ == "__main__":
    main(*sys.argv[1:])
