"""The command line: `python -m instructgpt_jax.main --config=configs/NAME.py [--workdir=DIR] [--config.KEY=VALUE …]`."""

import os
import pathlib
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from instructgpt_jax import ppo, pretrain, reward, sft, sharding
from instructgpt_jax.data import tokenizer
from instructgpt_jax.training import loop

CONFIG = config_flags.DEFINE_config_file("config", None, "File of a get_config(); `:tiny` after it shrinks it.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where the run lives, local or gs://; runs/<config name> by default.")

STAGES = {"pretrain": pretrain.build, "sft": sft.build, "reward": reward.build, "ppo": ppo.build}

# What the launchers of a cluster set; jax.distributed.initialize() reads the rest from them.
CLUSTER = ("COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")


def run(config, workdir: str) -> None:
    """Runs the stage that a configuration names, in its workdir."""
    if config.stage not in STAGES:
        raise ValueError(f"config.stage must be one of {sorted(STAGES)}, got {config.stage!r}")
    mesh = sharding.make_mesh(config.mesh)
    tokenizer.prepare(config, workdir)
    with jax.set_mesh(mesh):
        loop.run(STAGES[config.stage](config, mesh), config, workdir)


def default_workdir(config_file: str) -> str:
    """`runs/ppo_6b` for `configs/ppo_6b.py`, `runs/ppo_6b_tiny` for `configs/ppo_6b.py:tiny`."""
    file, _, argument = config_file.partition(":")
    return f"runs/{pathlib.Path(file).stem}" + (f"_{argument}" if argument else "")


def join_cluster() -> None:
    """Joins the other processes of a job: a TPU pod, Slurm, Open MPI, or by hand with three variables.

    By hand: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, the last one different in each.
    """
    by_hand = [os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")]
    if all(by_hand):
        jax.distributed.initialize(by_hand[0], int(by_hand[1]), int(by_hand[2]))
    elif any(map(os.environ.get, CLUSTER)) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    join_cluster()
    try:
        run(CONFIG.value, WORKDIR.value or default_workdir(config_flags.get_config_filename(flags.FLAGS["config"])))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if not pathlib.Path(innermost).is_relative_to(pathlib.Path(__file__).parent):
            raise  # not one of our own refusals: show where it came from
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
