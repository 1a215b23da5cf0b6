"""The paths that a user gives, as a command line or a configuration holds them.

One rule for all of them: `~` at the start of a local path is the home folder, as a shell has it; a shell leaves it as
it is behind `--workdir=`. A relative path is relative to the folder that the command was given in.
"""

import fnmatch
import os
from collections.abc import Iterator

from etils import epath
from ml_collections import ConfigDict

# Keys of a stage's configuration that hold a path, and those that hold data sources.
PATHS = (
    "models.*.init_from", "data.tokenizer", "data.template", "data.data_dir", "data.cache_dir", "sample.file",
    "evaluate.report", "evaluate.seconds", "evaluate.prompt_sets", "evaluate.folds", "evaluate.curves.*",
    "evaluate.sweep_report", "evaluate.overoptimisation.runs.*", "label.labelers", "label.instructions",
    "benchmark.data_dir", "benchmark.graders.*", "export.base",
)  # fmt: skip
SOURCES = (
    "data.demonstrations", "data.comparisons", "data.prompts", "data.pretraining", "evaluate.distributions.*",
    "evaluate.rankings", "evaluate.ratings", "evaluate.references", "evaluate.tasks.*", "evaluate.accuracy",
    "evaluate.prefix.prompts", "evaluate.overoptimisation.prompts", "evaluate_reward.comparisons",
    "evaluate_reward.bag_of_words", "label.source", "prompts.few_shot",
)  # fmt: skip


def expand(path: str | os.PathLike) -> str:
    """The path with its `~` or `~name` expanded; gs:// and other addresses as they are."""
    return os.path.expanduser(os.fspath(path))


def expand_source(source: str) -> str:
    """A data source with the `~` of its files expanded: `jsonl:~/x.jsonl#1/2@0.3`."""
    form, colon, name = source.partition(":")
    return f"{form}:{expand(name)}" if form in ("jsonl", "parquet", "hf", "tokens") and colon else source


def expanded(config: ConfigDict) -> ConfigDict:
    """A stage's configuration, a new one, with every path expanded; what has the wrong type is left to `validate`."""
    found = ConfigDict(config.to_dict())
    for _, section, key in find(found, PATHS):
        if isinstance(section[key], str):
            section[key] = expand(section[key])
    for _, section, key in find(found, SOURCES):
        if isinstance(section[key], tuple):
            section[key] = tuple(expand_source(part) if isinstance(part, str) else part for part in section[key])
    return found


def find(config: ConfigDict, patterns: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, ConfigDict, str]]:
    """The keys of a configuration that match one of the patterns: (whole name, section, key)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from find(value, patterns, f"{prefix}{key}.")
        elif any(fnmatch.fnmatchcase(prefix + key, pattern) for pattern in patterns):
            yield prefix + key, config, key


def make_folder(name: str, folder: str | os.PathLike) -> epath.Path:
    """Makes a folder that something will be written into.

    Args:
      name: what the user calls it, for the error.
      folder: local or gs://.

    Raises:
      ValueError: it cannot be made, or not be written.
    """
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be made, got {folder}: {error.strerror}") from None
    if "://" not in str(folder) and not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must be a folder that can be written, got {folder}")
    return folder


def copy_folder(source: str | os.PathLike, target: str | os.PathLike, last: str) -> None:
    """Copies a folder and those in it, local or gs://; the file `last` comes last: where it is, the others are."""
    target = epath.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(epath.Path(source).iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            copy_folder(path, target / path.name, last)
        else:
            path.copy(target / path.name, overwrite=True)
