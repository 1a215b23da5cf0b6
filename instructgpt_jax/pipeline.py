"""Several stages in one workdir: steps 0 to 3 of the paper, one command.

`config.stages` is a dict of stage configurations by name, `config.order` says in which order they run. A stage lives in
the folder of its name (`sft/`, `round0/reward/`) and is the same run as if it had been started alone there. `{workdir}`
in any string of a stage is the pipeline's own, so that one stage starts from another: `init_from="{workdir}/sft"`.
`{NAME}` of a string `config.NAME` beside `stages` is that string. Where `config.NAME` is a tuple of data sources,
`{NAME}` among a stage's sources is all of them, each with the options that follow: one place for what the user gives.
A stage that is complete is skipped, one that was interrupted resumes. A stage of `config.only_with` is left out where
the key that stands there is ''.

`config.parallel` stages run at once where they are the programs of one CPU device, each in a thread of its own, as soon
as the stages that they name have ended: small networks leave a core idle between their products. What a stage computes
does not depend on its company. Elsewhere a stage has all the devices, and they run one by one.
"""

import contextlib
import ctypes
import fnmatch
import gc
import glob
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from instructgpt_jax import process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import sources
from instructgpt_jax.report import card, progress
from instructgpt_jax.validate import validate_pipeline

SECONDS = "seconds.json"  # in the pipeline's workdir: stage -> seconds it has run
WRITTEN = ("evaluate.report", "evaluate.seconds")  # keys of what lies in the workdir and no stage reads
TOGETHER = "together"  # in it: seconds of the pipeline, less than the sum where stages run beside each other


def run(
    config: ConfigDict,
    workdir: str,
    check_stage: Callable[[ConfigDict, str], object],
    run_stage: Callable[[ConfigDict, str], None],
) -> None:
    """Runs the stages in their order, or `config.only` of them, and writes `model_card.md` of what there is.

    Args:
      config: `stages`, `order`, `only`: the name of one stage to run alone, or '', and `parallel`.
      workdir: of the pipeline.
      check_stage: (config, workdir) of one stage: refuses what cannot run; all are checked before the first one starts.
      run_stage: (config, workdir) of one stage.

    Raises:
      ValueError: `order` does not name the stages, `only` none of them, or a stage cannot run.
    """
    validate_pipeline(config)
    names = [config.only] if config.only else [name for name in config.order if wanted(config, name)]
    check_sources(config, names, workdir)
    stages = {name: stage_config(config, name, workdir) for name in names}
    for name, stage in stages.items():
        try:
            check_stage(stage, os.path.join(workdir, name))
        except ValueError as error:
            raise ValueError(f"stage {name} of the pipeline: {error}") from error
    lock, path = threading.Lock(), epath.Path(workdir) / SECONDS
    begun, before = time.perf_counter(), read_seconds(path).get(TOGETHER, 0.0)
    done, running = progress.read(path.parent), {}  # running: stage -> when it began

    def tell() -> None:
        """How far it is: by stage on a terminal, else in a line."""
        now, spent = time.perf_counter(), read_seconds(path)
        together = before + now - begun
        spent |= {name: spent.get(name, 0.0) + now - since for name, since in running.items()}
        show = progress.table if sys.stderr.isatty() else progress.summary
        process.say(show(progress.rows(stages, done, running, spent), together))

    def run_one(name: str) -> None:
        if jax.process_count() > 1:  # what the first process wrote for the stage before is there
            multihost_utils.sync_global_devices(f"pipeline {name}")
            process.end_if_stopped()
        process.say(f"pipeline: stage {names.index(name) + 1} of {len(names)}, {name}")
        started, ended = time.perf_counter(), False
        with lock:
            running[name] = started
        try:
            run_stage(stages[name], os.path.join(workdir, name))
            ended = True
        finally:  # also when a signal ended it: it will go on from there
            with lock:
                del running[name]
                now, spent = time.perf_counter(), read_seconds(path)
                spent |= {name: spent.get(name, 0.0) + now - started, TOGETHER: before + now - begun}
                if jax.process_index() == 0 and path.parent.exists():
                    rounded = {key: round(value, 1) for key, value in spent.items()}
                    workdirs.write_atomically(path, json.dumps(rounded) + "\n")
                if ended and name not in done:  # else it was complete before, and passed by
                    done.add(name)
                    if jax.process_index() == 0 and path.parent.exists():
                        progress.write(path.parent, done)
                    tell()
            release_memory()

    if before:  # it goes on
        tell()

    process.run_together({name: needed(config, name) & set(names) for name in names}, run_one, config.parallel)
    if jax.process_index() == 0 and path.parent.exists():
        workdirs.write_atomically(path.parent / card.FILE, card.of_pipeline(path.parent, config.order))


def release_memory() -> None:
    """Gives the pages that nothing lies in any more back to the system, where the C library can: glibc keeps them.

    Without it a pipeline of a 135M model on a CPU holds 2 GB more after each stage, and grows until it is killed.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def wanted(config: ConfigDict, name: str) -> bool:
    """Whether a stage runs: some do only where a key of the pipeline is set, see `config.only_with`."""
    only_with = config.get("only_with", {})
    return name not in only_with or bool(config[only_with[name]])


def needed(config: ConfigDict, name: str) -> set[str]:
    """The stages before this one in the order whose workdirs its configuration names.

    For an export all before it: its model card has what they measured.

    Raises:
      ValueError: a key that the stage needs is empty.
    """
    earlier = config.order[: config.order.index(name)]
    if config.stages[name].get("stage") == "export":
        return set(earlier)
    places = places_in(stage_config(config, name, "{workdir}"))
    return {other for other in earlier if any(leads_to(place, other) for _, place in places)}


def places_in(stage: ConfigDict) -> list[tuple[str, str]]:
    """The places in the pipeline's workdir that a stage names, patterns among them, each with its dotted key."""
    found = ((key, re.findall(r"\{workdir\}/([^\s\"#@]+)", text)) for key, text in strings(stage.to_dict()))
    return [(key, place) for key, places in found for place in places]


def leads_to(place: str, name: str) -> bool:
    """Whether a place, or a file that its pattern fits, may lie in the folder of the stage `name`."""
    patterns, parts = place.split("/"), name.split("/")
    if "**" in patterns:  # any folders
        before = patterns.index("**")
        patterns, parts = patterns[:before], parts[:before]
    return len(patterns) >= len(parts) and all(map(fnmatch.fnmatchcase, parts, patterns))


def check_sources(config: ConfigDict, names: list[str], workdir: str) -> None:
    """Refuses a stage that starts from a folder of the pipeline's workdir that is not there and that none makes before.

    Args:
      names: the stages that run.

    Raises:
      ValueError: names the stage, the key, and the stage that is missing; or a key that a stage needs is empty.
    """
    for name in names:
        earlier = names[: names.index(name)]
        for key, place in places_in(stage_config(config, name, "{workdir}")):
            made = any(leads_to(place, other) for other in earlier)
            if not (key in WRITTEN or made or glob.has_magic(place) or (epath.Path(workdir) / place).exists()):
                raise ValueError(
                    f"stage {name} of the pipeline: config.{key} must name a stage that runs before it or has run in "
                    f"{workdir}, got {{workdir}}/{place}"
                )


def strings(tree, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a configuration with its dotted key."""
    if isinstance(tree, str):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from strings(value, f"{path}.{key}" if path else key)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from strings(value, path)


def read_seconds(path: epath.Path) -> dict[str, float]:
    """What a pipeline's seconds.json holds; {} where there is none, or a damaged one: no result depends on it."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:  # also what is no UTF-8
        return {}


def stage_config(config: ConfigDict, name: str, workdir: str) -> ConfigDict:
    """The configuration of one stage, `{workdir}` and the `{NAME}`s of the pipeline's own keys filled in.

    Raises:
      ValueError: a key that the stage needs is empty.
    """
    texts = {key: text.replace("{workdir}", str(workdir)) for key, text in config.items() if isinstance(text, str)}
    given = {key: value for key, value in config.items() if isinstance(value, tuple) and key != "order"}
    own = texts | given | {"workdir": str(workdir)}

    def keys_in(text: str) -> list[str]:
        """The keys that a text names."""
        found = [key for key in own if f"{{{key}}}" in text]
        for key in found:
            if not own[key]:
                example = f"--config.{key}=" + (f"jsonl:{key}.jsonl" if isinstance(own[key], tuple) else key.upper())
                raise ValueError(f"config.{key} must be set, for example {example}, got {own[key]!r}")
        return found

    def fill(value):
        if isinstance(value, str):
            for key in keys_in(value):
                if isinstance(own[key], tuple):
                    raise ValueError(f"config.{key} must stand among data sources in stage {name}, got it in {value!r}")
                value = value.replace(f"{{{key}}}", own[key])
            return value
        if isinstance(value, dict):
            return {key: fill(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(one for part in value for one in several(part))
        return value

    def several(part) -> tuple:
        """What an element of a list becomes: as many as a tuple of sources has, or one."""
        match = re.match(r"\{(\w+)\}", part) if isinstance(part, str) else None
        if match and isinstance(own.get(match[1], None), tuple):
            keys_in(part)
            return tuple(map(fill, sources.extended(own[match[1]], part[match.end() :])))
        return (fill(part),)

    return ConfigDict(fill(config.stages[name].to_dict())).lock()
