"""Fixtures of the suite: eight fake devices on the CPU, and the folder of real public data where there is one."""

import functools
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Many tests run the same stages: all workers share what they compile.
_made = not os.environ.get("JAX_COMPILATION_CACHE_DIR")
if _made:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

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


def pytest_collection_modifyitems(items):
    """The longest file first, so that with two workers it is not what both end with."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is one worker's, so that its fixtures are made once; in the order of the collection."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_unconfigure():
    if _made:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
