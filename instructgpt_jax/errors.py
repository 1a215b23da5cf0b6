"""Which errors are a person's to mend: they are told in one line; all others are bugs and show where they came from."""

import contextlib
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator

_PACKAGE = pathlib.Path(__file__).parent


def describe(error: BaseException) -> str | None:
    """What a person must know of an error, or None for a bug.

    Two kinds are theirs: what this package refused or reports itself (ValueError, OSError, FloatingPointError), and
    what the system said of a file, wherever it was opened.
    """
    if isinstance(error, OSError) and error.filename is not None:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return f"{' -> '.join(names) or error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError | FloatingPointError):
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        return str(error) if pathlib.Path(innermost).is_relative_to(_PACKAGE) else None
    return None


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends the process with `error: …` and exit code 1 where the block raises what a person can mend."""
    try:
        yield
    except Exception as error:
        told = describe(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr, flush=True)
        sys.exit(1)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the path on an error of the system that has none: a full disk is noticed when an open file is written.

    What is written in Rust, as tokenizers are, raises a bare Exception that ends in `(os error 28)`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None:
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), os.fspath(path)) from error
