"""The command line: `python -m instructgpt_jax.main --config=configs/NAME.py [--workdir=DIR] [--config.KEY=VALUE]`."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import pathlib
import platform
import re
import signal
import sys
from importlib.machinery import ModuleSpec

import jax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from instructgpt_jax import errors, paths, pipeline, process, run_tokenizer, sharding
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.cluster import agreeing, ending, joining
from instructgpt_jax.plan import command
from instructgpt_jax.plan import flags as plan_flags
from instructgpt_jax.stages import (
    benchmark,
    collect,
    evaluate,
    evaluate_reward,
    export,
    label,
    ppo,
    pretrain,
    prompts,
    reward,
    reward_folds,
    sample,
    select,
    sft,
)
from instructgpt_jax.training import loop
from instructgpt_jax.validate import WITHOUT_TOKENIZER, inputs, validate

CONFIG = config_flags.DEFINE_config_file("config", None, "File of a get_config(); `:tiny` after it shrinks it.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where the run lives, local or gs://; runs/<config name> by default.")
PLAN = flags.DEFINE_string("plan", "", "Compile for this topology (v5p:4x4x4, gpu:h100x8, …) instead of running.")
PLAN_OUT = flags.DEFINE_string("plan_out", "", "Where plan.json goes; plans/<config>_<topology> by default.")
PLAN_SIZE = flags.DEFINE_string("plan_size", "", "Size of networks that are not there yet: SIZE, or policy=SIZE,…")
PLAN_RECORDS = flags.DEFINE_integer("plan_records", 0, "Records of the data that will be trained on.", lower_bound=0)
PLAN_PRICE = flags.DEFINE_float("plan_price", 0.0, "Dollars for a chip and hour.", lower_bound=0.0)
PLAN_SEARCH = flags.DEFINE_bool("plan_search", False, "Where it does not fit, look for the nearest setting that does.")
PLAN_HLO = flags.DEFINE_bool("plan_hlo", False, "Write the compiled programs beside plan.json.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other workers of a Cloud TPU slice, as launch/ does.")
PREEMPTIBLE = flags.DEFINE_bool("preemptible", False, "End with 143 after a signal, so that a scheduler starts anew.")
JOIN = flags.DEFINE_integer("join_seconds", 300, "How long to wait for the other processes of a job.", lower_bound=1)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 0, "After which silence a process of a job is lost; 0 = 30 on CPUs, else 100.", lower_bound=0
)


def train_reward(config, mesh, workdir: str) -> None:
    """The reward model, or one for each fold of the labeler groups."""
    if config.reward.folds:
        reward_folds.run(config, mesh, workdir)
    else:
        loop.train(reward.build, config, mesh, workdir)


STAGES = {  # name -> (config, mesh, workdir)
    "pretrain": functools.partial(loop.train, pretrain.build),
    "sft": functools.partial(loop.train, sft.build),
    "reward": train_reward,
    "collect": collect.run,
    "prompts": prompts.run,
    "label": label.run,
    "select": select.run,
    "ppo": functools.partial(loop.train, ppo.build),
    "evaluate": evaluate.run,
    "evaluate_reward": evaluate_reward.run,
    "benchmark": benchmark.run,
    "sample": sample.run,
    "export": export.run,
}
UNLOCKED = ("sample", "export")  # several people may ask one policy; what is exported has no file but its own


def check(config: ConfigDict, workdir: str, later: str = "") -> tuple[FrozenConfigDict, jax.sharding.Mesh]:
    """Refuses a configuration that cannot run, before a record is read.

    Args:
      workdir: of the stage.
      later: the folder of a pipeline: what lies in it need not be there yet.

    Returns:
      The configuration with its paths expanded, from here on only read, and the mesh it runs on.
    """
    config = paths.expanded(config)
    mesh = sharding.make_mesh(config.mesh)
    validate(config, mesh)
    inputs.check(config, workdir, later)
    return workdirs.frozen(config.to_dict()), mesh


def run(config: ConfigDict, workdir: str) -> None:
    """Runs the stage that a configuration names in its workdir, or the stages of a pipeline."""
    workdir = paths.expand(workdir)
    if config.get("stage", "") == "pipeline":
        pipeline.run(config, workdir, functools.partial(check, later=workdir), run)
        return
    config, mesh = check(config, workdir)
    if jax.process_count() > 1:
        paths.make_folder("workdir", workdir)
        agreeing.shared(workdir)
    with contextlib.ExitStack() as stack:
        if config.stage not in UNLOCKED:
            workdirs.check(epath.Path(workdir))
            stack.enter_context(agreeing.alone(workdir, process.say))
        if config.stage not in WITHOUT_TOKENIZER:
            workdirs.check_settings(config, epath.Path(workdir), without=("models",))  # known to the stage
            config = run_tokenizer.settled(config, workdir)
        stack.enter_context(jax.set_mesh(mesh))
        STAGES[config.stage](config, mesh, workdir)


def default_workdir(config_file: str) -> str:
    """`runs/ppo_6b` for `configs/ppo_6b.py`, `runs/ppo_6b_tiny` for `configs/ppo_6b.py:tiny`."""
    file, _, argument = config_file.partition(":")
    return f"runs/{pathlib.Path(file).stem}" + (f"_{argument}" if argument else "")


def find_configs(file: str) -> None:
    """Lets a configuration's file say `from configs import common` wherever the command was given.

    `configs` is the nearest folder of that name around the file, then the one in the current folder, then the
    project's own where it stands beside this package: a module that the first lacks is looked for in the next. An
    installed package of that name is none of them.
    """
    if "configs" in sys.modules:
        return
    root = pathlib.Path(__file__).resolve().parents[1]
    around = [folder for folder in pathlib.Path(file).resolve().parents if folder.name == "configs"][:1]
    own = [root / "configs"] if (root / "pyproject.toml").is_file() else []
    folders = [str(folder) for folder in dict.fromkeys([*around, pathlib.Path("configs").resolve(), *own])]
    folders = [folder for folder in folders if os.path.isdir(folder)]
    if not folders:
        return
    if os.path.isfile(f"{folders[0]}/__init__.py"):
        first = f"{folders[0]}/__init__.py"
        spec = importlib.util.spec_from_file_location("configs", first, submodule_search_locations=folders)
    else:
        spec = ModuleSpec("configs", None, is_package=True)
        spec.submodule_search_locations = folders
    sys.modules["configs"] = module = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, with one line for a key that the configuration does not have, or a file that is not there."""
    places = [n for n, argument in enumerate(arguments) if argument.partition("=")[0] in ("-config", "--config")]
    for n in places[-1:]:
        after = n + (1 if "=" in arguments[n] else 2)
        file = paths.expand("=".join(arguments[n:after]).partition("=")[2])
        arguments = [*arguments[:n], f"--config={file}", *arguments[after:]]
        find_configs(file.partition(":")[0])
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
    """Keeps compiled programs in the workdir: a run that goes on and a stage like another one need not compile.

    A job of several CPU processes keeps none and reads none, not even of JAX_COMPILATION_CACHE_DIR: a program that is
    read back has lost the order of those of its loops that communicate (jaxlib 0.10.2 and 0.12.0). The first process
    reads it, the others compile it (their keys differ), and they wait in different loops for ever.
    """
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR goes first
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / ".compiled"))
        # XLA's own cache of autotuning would lie inside, and its path in every key: a moved workdir would find nothing.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def plan() -> None:
    """`--plan`: the configuration compiled for a topology, no device and no workdir touched."""
    asked = plan_flags.Asked(
        PLAN.value, PLAN_OUT.value, PLAN_SIZE.value, PLAN_RECORDS.value, PLAN_PRICE.value, PLAN_SEARCH.value,
        plan_flags.options(os.environ.get("LIBTPU_INIT_ARGS", "")), PLAN_HLO.value,
    )  # fmt: skip
    name = default_workdir(config_flags.get_config_filename(flags.FLAGS["config"])).removeprefix("runs/")
    with errors.one_line():
        command.run(paths.expanded(CONFIG.value), name, asked)


def run_job(config: ConfigDict, named: str) -> None:
    """What the command line asks for, once all processes of the job agree on it; `named` is the workdir as given."""
    workdir = paths.expand(named)
    asked = {"config": config.to_dict(), "workdir": named, "packages": agreeing.versions()}
    agreeing.same("configuration and packages", asked)
    keep_programs(workdir)
    hardware = {"devices": jax.local_device_count(), "kind": jax.local_devices()[0].device_kind}
    agreeing.same("devices", {"local": hardware})
    run(config, workdir)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown arguments {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    if PLAN.value:
        plan()
        return
    keep_memory()
    with errors.one_line():
        joining.join(DISTRIBUTED.value, JOIN.value, HEARTBEAT.value)
    # A job of several processes catches signals from here on: JAX has just made SIGTERM its own.
    catching = process.catching_signals() if jax.distributed.is_initialized() else contextlib.nullcontext()
    named = WORKDIR.value or default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
    try:
        with catching, ending.at_once(), errors.one_line():
            run_job(CONFIG.value, named)
    except SystemExit as ended:  # with 0: a signal came, and the run has saved
        sys.exit(128 + signal.SIGTERM if PREEMPTIBLE.value and not ended.code else ended.code)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
