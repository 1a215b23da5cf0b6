"""The command line: one clear line for each mistake, and no file before it."""

import os
import pathlib
import shutil
import subprocess
import sys

import compiling
import jax
import pytest
import toy_stage
from jax.experimental.compilation_cache import compilation_cache

from configs import ppo_6b
from instructgpt_jax import main, networks

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """The folder of their workdirs, and the ends of processes with one mistake each: name -> (stderr, exit code)."""
    folder = tmp_path_factory.mktemp("workdirs")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("mine")
    (folder / "file").write_text("")
    tiny = "--config=configs/pretrain_tiny.py:tiny"
    commands = {
        "unknown key": [tiny, f"--workdir={folder}/new", "--config.pretrain.batchsize=4"],
        "wrong type": [tiny, f"--workdir={folder}/new", "--config.pretrain.batch_size=many"],
        "no such file": ["--config=configs/pretrain_small.py", f"--workdir={folder}/new"],
        "foreign": [tiny, f"--workdir={folder}/foreign"],
        "not a folder": [tiny, f"--workdir={folder}/file/new"],
        "no sources": [tiny, f"--workdir={folder}/new", "--config.data.pretraining=()"],
        # From another folder, where the project is installed beside a package that is also called configs.
        "elsewhere": [f"--config={ROOT}/configs/pretrain_tiny.py:tiny", "--config.pretrain.batch_size=0"],
        "elsewhere, a file of one's own": ["--config", "~/mine.py", "--config.pretrain.batch_size=0"],
    }
    (folder / "site" / "configs").mkdir(parents=True)
    (folder / "site" / "configs" / "__init__.py").write_text("")
    (folder / "site" / "instructgpt_jax").symlink_to(ROOT / "instructgpt_jax")
    (folder / "mine.py").write_text("from configs import pretrain_tiny\nget_config = pretrain_tiny.get_config\n")
    environment = os.environ | {"XLA_FLAGS": compiling.SOON, "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
    places = {True: (folder / "foreign", {"PYTHONPATH": str(folder / "site")}), False: (ROOT, {})}
    command = [sys.executable, "-m", "instructgpt_jax.main"]
    processes = {}
    for name, flags in commands.items():
        cwd, more = places[name.startswith("elsewhere")]
        pipes = dict(stderr=subprocess.PIPE, text=True)
        processes[name] = subprocess.Popen([*command, *flags], cwd=cwd, env=environment | more, **pipes)
    ends = {name: (process.communicate(timeout=300)[1], process.returncode) for name, process in processes.items()}
    return folder, ends


@pytest.mark.parametrize(
    "name, line",
    [
        (
            "unknown key",
            "error: config.pretrain.batchsize must be a key of the configuration, it has no "
            "'batchsize'; did you mean 'batch_size'?",
        ),
        ("wrong type", "FATAL Flags parsing error: flag --config.pretrain.batch_size=many: invalid literal for int()"),
        ("no such file", "error: --config must be a file that can be read: [Errno 2] No such file or directory"),
        ("foreign", "error: workdir FOLDER/foreign must be empty or hold a run's config.json, got ['thesis.tex']"),
        ("not a folder", "error: workdir must be a folder that can be made, got FOLDER/file/new: Not a directory"),
        ("no sources", "error: config.data.pretraining must name at least one source, got ()"),
        ("elsewhere", "error: config.pretrain.batch_size must be an integer of at least 1, got 0"),
        ("elsewhere, a file of one's own", "error: config.pretrain.batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(refusals, name, line):
    folder, ends = refusals
    log, code = ends[name]
    assert code == 1, log
    assert line.replace("FOLDER", str(folder)) in log
    assert "Traceback" not in log


def test_mistakes_leave_nothing_behind(refusals):
    folder, _ = refusals
    assert os.listdir(folder / "foreign") == ["thesis.tex"]
    assert not (folder / "new" / "checkpoints").exists()


def test_a_network_that_is_missing_names_the_command_that_makes_it():
    config = ppo_6b.get_config()
    for name, made_by in (("policy", "rlhf_init_6b"), ("reward", "reward_6b")):
        message = rf"config.models.{name}.init_from must exist.* --config=configs/{made_by}.py$"
        with pytest.raises(ValueError, match=message):
            networks.shape(f"config.models.{name}", config.models[name])


@pytest.mark.parametrize(
    "file, workdir",
    [
        ("configs/ppo_6b.py", "runs/ppo_6b"),
        ("/somewhere/configs/ppo_6b.py:tiny", "runs/ppo_6b_tiny"),
    ],
)
def test_default_workdir(file, workdir):
    assert main.default_workdir(file) == workdir


@pytest.fixture
def programs():
    """The settings of the cache as they are without the environment's, and as they were when the test has ended."""
    names = [f"jax_{name}" for name in ("compilation_cache_dir", "enable_compilation_cache")]
    names += [f"jax_persistent_cache_{name}" for name in ("enable_xla_caches", "min_compile_time_secs")]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compiled_programs_stay_in_the_workdir_unless_the_user_has_a_place_for_them(tmp_path, programs):
    for own, place in ((None, f"{tmp_path}/.compiled"), ("elsewhere", "elsewhere")):
        jax.config.update("jax_compilation_cache_dir", own)
        main.keep_programs(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == place and jax.config.jax_enable_compilation_cache
    assert not any(tmp_path.iterdir())  # a refused run leaves nothing


@pytest.mark.parametrize("own", [None, "elsewhere"])
def test_a_job_of_several_cpu_processes_keeps_no_programs(tmp_path, programs, monkeypatch, own):
    jax.config.update("jax_compilation_cache_dir", own)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    main.keep_programs(str(tmp_path))
    assert not jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    main.keep_programs(str(tmp_path))
    assert jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir


def test_a_moved_workdir_finds_its_programs(tmp_path, programs):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def run(workdir):
        """Runs a stage there; the names of the programs that are kept then."""
        jax.config.update("jax_compilation_cache_dir", None)
        main.keep_programs(str(workdir))
        compilation_cache.reset_cache()  # as in a new process
        toy_stage.run(workdir, jax.devices()[:1])
        return {path.name for path in (workdir / ".compiled").glob("*-cache")}

    first = run(tmp_path / "first")
    assert any("update_fn" in name for name in first)
    shutil.copytree(tmp_path / "first" / ".compiled", tmp_path / "second" / ".compiled")
    assert run(tmp_path / "second") == first
