"""Several stages in one workdir: steps 0 to 3 of the paper, one command.

`config.stages` is a dict of stage configurations by name, `config.order` says in which order they run. A stage lives in
the folder of its name (`sft/`, `round0/reward/`) and is the same run as if it had been started alone there. `{workdir}`
in any string of a stage is the pipeline's own, so that one stage starts from another: `init_from="{workdir}/sft"`.
`{NAME}` of a string `config.NAME` beside `stages` is that string: one place for the user's sources. A stage that is
complete is skipped, one that was interrupted resumes.
"""

import json
import os
import time
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from instructgpt_jax.training import metrics

SECONDS = "seconds.json"  # in the pipeline's workdir: stage -> seconds it has run


def run(
    config: ConfigDict,
    workdir: str,
    check_stage: Callable[[ConfigDict], object],
    run_stage: Callable[[ConfigDict, str], None],
) -> None:
    """Runs the stages in their order, or `config.only` of them.

    Args:
      config: `stages`, `order`, and `only`: the name of one stage to run alone, or ''.
      workdir: of the pipeline.
      check_stage: refuses a configuration that cannot run; all stages are checked before the first one starts.
      run_stage: (config, workdir) of one stage.

    Raises:
      ValueError: `order` does not name the stages, `only` none of them, or a stage cannot run.
    """
    if sorted(config.order) != sorted(config.stages):
        raise ValueError(f"config.order must name the stages {sorted(config.stages)}, got {tuple(config.order)}")
    if config.only and config.only not in config.stages:
        raise ValueError(f"config.only must be one of {tuple(config.order)}, got {config.only!r}")
    names = [config.only] if config.only else list(config.order)
    for name in names:
        try:
            check_stage(stage_config(config, name, workdir))
        except ValueError as error:
            raise ValueError(f"stage {name} of the pipeline: {error}") from error
    for number, name in enumerate(names, start=1):
        metrics.say(f"pipeline: stage {number} of {len(names)}, {name}")
        started = time.perf_counter()
        try:
            run_stage(stage_config(config, name, workdir), os.path.join(workdir, name))
        finally:  # also when a signal ended it: it will go on from there
            _add_seconds(epath.Path(workdir) / SECONDS, name, time.perf_counter() - started)


def _add_seconds(path: epath.Path, name: str, seconds: float) -> None:
    """Counts the time of a stage in the pipeline's workdir, over all runs of it."""
    if jax.process_index() == 0 and path.parent.exists():
        spent = json.loads(path.read_text()) if path.exists() else {}
        spent[name] = round(spent.get(name, 0.0) + seconds, 1)
        metrics.write_atomically(path, json.dumps(spent) + "\n")


def stage_config(config: ConfigDict, name: str, workdir: str) -> ConfigDict:
    """The configuration of one stage, `{workdir}` and the `{NAME}`s of the pipeline's own strings filled in.

    Raises:
      ValueError: a string that the stage needs is empty.
    """
    own = {key: value for key, value in config.items() if isinstance(value, str)} | {"workdir": str(workdir)}

    def fill(value):
        if isinstance(value, str):
            for key, text in own.items():
                if f"{{{key}}}" in value and not text:
                    raise ValueError(f"config.{key} must be set, for example --config.{key}=jsonl:{key}.jsonl, got ''")
                value = value.replace(f"{{{key}}}", text)
            return value
        if isinstance(value, dict):
            return {key: fill(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(fill, value))
        return value

    return ConfigDict(fill(config.stages[name].to_dict())).lock()
