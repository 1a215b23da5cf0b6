"""The command line: `python -m instructgpt_jax.main --config=configs/NAME.py [--workdir=DIR] [--config.KEY=VALUE]`."""

import ctypes
import functools
import os
import pathlib
import platform
import re
import sys
import traceback

import jax
from absl import app, flags, logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_flags

from instructgpt_jax import (
    collect,
    evaluate,
    export,
    pipeline,
    ppo_stage,
    pretrain,
    reward,
    reward_folds,
    sample,
    selection,
    sft,
    sharding,
)
from instructgpt_jax.data import tokenizer
from instructgpt_jax.training import loop, resume
from instructgpt_jax.validate import validate

CONFIG = config_flags.DEFINE_config_file("config", None, "File of a get_config(); `:tiny` after it shrinks it.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where the run lives, local or gs://; runs/<config name> by default.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other workers of a Cloud TPU slice, as launch/ does.")

# What the launchers of a cluster set; jax.distributed.initialize() reads the rest from them.
CLUSTER = ("COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")


def train(build, config, mesh, workdir: str) -> None:
    """A stage of the training loop."""
    resume.recall(config, workdir)
    loop.run(build(config, mesh), config, workdir)


def train_reward(config, mesh, workdir: str) -> None:
    """The reward model, or one for each fold of the labeler groups."""
    if config.reward.folds:
        reward_folds.run(config, mesh, workdir)
    else:
        train(reward.build, config, mesh, workdir)


STAGES = {  # name -> (config, mesh, workdir)
    "pretrain": functools.partial(train, pretrain.build),
    "sft": functools.partial(train, sft.build),
    "reward": train_reward,
    "collect": collect.run,
    "select": selection.run,
    "ppo": functools.partial(train, ppo_stage.build),
    "evaluate": evaluate.run,
    "sample": sample.run,
    "export": export.run,
}


def check(config) -> jax.sharding.Mesh:
    """Refuses a configuration that cannot run; returns the mesh it runs on."""
    mesh = sharding.make_mesh(config.mesh)
    validate(config, mesh)
    return mesh


def run(config, workdir: str) -> None:
    """Runs the stage that a configuration names in its workdir, or the stages of a pipeline."""
    if config.get("stage", "") == "pipeline":
        pipeline.run(config, workdir, check, run)
        return
    mesh = check(config)
    if config.stage not in ("sample", "export"):  # whose workdir is no model's
        loop.check_workdir(epath.Path(workdir))
        if jax.process_index() > 0:  # the first process makes the tokenizer, the others find it
            multihost_utils.sync_global_devices("tokenizer")
        tokenizer.prepare(config, workdir)
        if jax.process_index() == 0 and jax.process_count() > 1:
            multihost_utils.sync_global_devices("tokenizer")
    with jax.set_mesh(mesh):
        STAGES[config.stage](config, mesh, workdir)


def default_workdir(config_file: str) -> str:
    """`runs/ppo_6b` for `configs/ppo_6b.py`, `runs/ppo_6b_tiny` for `configs/ppo_6b.py:tiny`."""
    file, _, argument = config_file.partition(":")
    return f"runs/{pathlib.Path(file).stem}" + (f"_{argument}" if argument else "")


def join_cluster() -> None:
    """Joins the other processes of a job: a TPU slice, Slurm, Open MPI, or by hand with three variables.

    By hand: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the last one different in each.
    The workers of a Cloud TPU VM do not know of each other by their environment: there it takes `--distributed`.
    """
    by_hand = [os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")]
    if all(by_hand):
        jax.distributed.initialize(by_hand[0], int(by_hand[1]), int(by_hand[2]))
    elif DISTRIBUTED.value or any(map(os.environ.get, CLUSTER)) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, with one line for a key that the configuration does not have, or a file that is not there."""
    try:
        remaining = app.parse_flags_with_usage(arguments)
        if CONFIG.value is not None:
            CONFIG.value.to_dict  # noqa: B018  a file that failed to load raises here
        return remaining
    except (AttributeError, KeyError) as error:
        name = re.search(r"\w+", str(error))[0]
        keys = (argument.partition("=")[0].lstrip("-") for argument in arguments[1:])
        wrong = [key for key in keys if key.startswith("config.") and name in key.split(".")]
        if not wrong:
            raise  # a mistake in the configuration's file
        meant = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"; did you mean {meant[1]!r}?" if meant else ""
        sys.exit(f"error: {wrong[0]} must be a key of the configuration, it has no {name!r}{hint}")
    except OSError as error:
        sys.exit(f"error: --config must be a file that can be read: {str(error).splitlines()[-1].strip()}")


def keep_memory() -> None:
    """Lets glibc keep what a step has freed: asking the system again at the next costs a tenth of it on CPUs."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, size in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, size)


def keep_programs(workdir: str) -> None:
    """Keeps compiled programs in the workdir: a run that goes on and a stage like another one need not compile."""
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR goes first
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / ".compiled"))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown arguments {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    keep_memory()
    join_cluster()
    workdir = WORKDIR.value or default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
    keep_programs(workdir)
    try:
        run(CONFIG.value, workdir)
    except (ValueError, OSError, FloatingPointError) as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if not pathlib.Path(innermost).is_relative_to(pathlib.Path(__file__).parent):
            raise  # not one of our own refusals: show where it came from
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
