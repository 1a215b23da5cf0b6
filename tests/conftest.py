"""Fixtures of the suite: eight fake devices on the CPU, and the folder of real public data where there is one."""

import functools
import os
import pathlib
import shutil
import tempfile

import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    own = f"{compiling.SOON} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {own}"
# Many tests run the same stages: all workers and what they start share what is compiled, in a folder of this run.
_folder = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = pathlib.Path(tempfile.mkdtemp(prefix="compiled_"))
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # where no module is compiled, every process would do it again
        os.environ["PYTHONPYCACHEPREFIX"] = str(_folder / "modules")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_folder / "programs")
        compiling.fetch(_folder / "programs")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real public data (`INSTRUCTGPT_DATA`, or `../shared/data` beside the checkout)."""
    default = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("INSTRUCTGPT_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set INSTRUCTGPT_DATA")
    return folder


@pytest.fixture(scope="module")
def one_device():
    """For small runs of the command line: one of the suite's eight devices compiles them sooner."""
    import jax

    from instructgpt_jax import sharding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
        yield


LONGEST = (
    "notebook", "ppo_learning", "ppo", "pair_ppo", "resume", "reward", "instruct", "chat_stages", "rollout", "sft",
    "use", "evaluate", "loop",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end together."""
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is one worker's, so that its fixtures are made once; in the order of the collection."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_sessionfinish(exitstatus):
    if _folder and (_folder / "programs").is_dir() and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        compiling.keep(_folder / "programs")


def pytest_unconfigure():
    if _folder:
        shutil.rmtree(_folder, ignore_errors=True)
