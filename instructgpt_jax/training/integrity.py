"""Whether the files of a checkpoint are all there, and what an error of Orbax says in one line."""

import json
import logging
import os
import re

import tensorstore
from absl import logging as absl_logging
from etils import epath

STATE = "state"  # name of the one array tree in a checkpoint
COMMITTED = "commit_success.txt"  # Orbax writes it last


def _once(record: logging.LogRecord) -> bool:
    """Orbax's threads log an error with its traceback, each of them, and it is raised all the same."""
    return absl_logging.get_verbosity() > absl_logging.WARNING or "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_once)


def damage(path: epath.Path) -> str:
    """Why a checkpoint or snapshot cannot be read; '' of a whole one.

    Looks at every table of contents (they carry checksums), and at the length of every file that these name; it does
    not read the arrays, so it costs the same for a large model, and a byte that changed inside one is not seen.
    """
    state = path / STATE
    required = [path / "_CHECKPOINT_METADATA", state / "_METADATA", state / "manifest.ocdbt", path / COMMITTED]
    for file in required:
        if not file.exists():
            return f"{file.relative_to(path)} is missing"
    optional = [state / "_sharding", *sorted((state / "array_metadatas").glob("*"))]
    for file in (*required[:2], *(file for file in optional if file.exists())):
        try:
            content = json.loads(file.read_text())
        except ValueError:  # also what is no UTF-8
            content = None
        if not isinstance(content, dict):
            return f"{file.relative_to(path)} is not JSON"
    base = tensorstore.KvStore.open(
        f"{state}/" if "://" in str(path) else {"driver": "file", "path": f"{state}/"}
    ).result()
    sizes: dict[str, int] = {}

    def lacks(location: str) -> str:
        """What is missing of `<type>:<file>:<offset>:<length>`, see tensorstore.ocdbt.dump."""
        name, offset, length = location.split(":", 1)[1].rsplit(":", 2)
        name = name.replace(":", "", 1)  # between the folder of a process and what it calls the file
        if name not in sizes:
            sizes[name] = (state / name).stat().length if (state / name).exists() else -1
        if sizes[name] < 0:
            return f"{STATE}/{name} is missing"
        needed = int(offset) + int(length)
        return f"{STATE}/{name} has {sizes[name]} of at least {needed} bytes" if sizes[name] < needed else ""

    try:
        manifest = tensorstore.ocdbt.dump(base).result()
        roots = [version["root"] for version in manifest["versions"][-1:]]
        waiting = [root["location"] for root in roots if "location" in root]
        while waiting:
            location = waiting.pop()
            if why := lacks(location):
                return why
            for entry in tensorstore.ocdbt.dump(base, location).result()["entries"]:
                if "indirect_value" in entry and (why := lacks(entry["indirect_value"])):
                    return why
                if "location" in entry:
                    waiting.append(entry["location"])
    except ValueError as error:
        return f"{STATE}/manifest.ocdbt and its tables cannot be read: {reason(error)}"
    return ""


def reason(error: BaseException, outer: BaseException | None = None) -> str:
    """What is behind an error of Orbax, in one line: the first line of the error that it began with.

    Args:
      outer: an error that was on its way already, and has nothing to do with this one.
    """
    while (behind := error.__cause__ or error.__context__) not in (None, outer):
        error = behind
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if match := re.search(r"\"([^\"]+)\": .*\[os_error_code='(\d+)'", text):  # of TensorStore
        return f"{os.strerror(int(match[2]))}: {match[1]}"
    return text[:300]
