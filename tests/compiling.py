"""How the suite makes its programs: code that is compiled soon, and kept from one run of the suite to the next.

Nearly all of the suite's processor time is XLA's on programs that run once, so nothing is spent on making those fast.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform

# For XLA_FLAGS, on any number of devices; a process that a test starts needs them too.
SOON = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SOON += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones know no other emitters
    SOON += " --xla_cpu_use_fusion_emitters=false"

LIMIT = 500e6  # bytes that are kept


def kept() -> pathlib.Path:
    """The folder for this machine's processor and jaxlib, in the user's cache."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    made_by = f"{importlib.metadata.version('jaxlib')} {platform.machine()} {processor}"
    return cache / "instructgpt_jax_tests" / hashlib.sha256(made_by.encode()).hexdigest()[:16]


def place(source: pathlib.Path, target: pathlib.Path) -> None:
    """A file under a second name, whole or not at all; on another disk a copy."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        part = target.with_name(f"{target.name}.{os.getpid()}")
        part.write_bytes(source.read_bytes())
        os.replace(part, target)


def fetch(folder: pathlib.Path) -> None:
    """Puts what earlier runs have kept into the folder of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    if kept().is_dir():
        for path in kept().glob("*-cache"):
            place(path, folder / path.name)


def keep(folder: pathlib.Path) -> None:
    """Keeps the programs of a run that has ended by itself, and of all no more than the newest within the limit."""
    kept().mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*-cache"):
        place(path, kept() / path.name)
    size = 0
    found = [(path.stat(), path) for path in kept().iterdir()]
    for stat, path in sorted(found, key=lambda each: -each[0].st_mtime):
        size += stat.st_size
        if size > LIMIT:
            path.unlink(missing_ok=True)
