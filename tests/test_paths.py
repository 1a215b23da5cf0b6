"""What a user names: `~`, files that are not there, folders that cannot be written, and where `configs` is."""

import functools
import importlib
import json
import os
import pathlib
import sys
import types

import jax
import pytest
import small_runs

from configs import e2e, export, prompts, sample
from instructgpt_jax import errors, main, models, paths, sharding
from instructgpt_jax.data import build, jsonl, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import hf
from instructgpt_jax.stages import evaluate
from instructgpt_jax.validate import inputs


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and another one to stand in; one device, so that a run compiles sooner."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    return tmp_path / "home"


def pretraining(folder, **changes):
    """One update on a small world."""
    config = small_runs.pretrain(folder)
    changes = {"pretrain__num_steps": 1, "pretrain__optimizer__warmup_steps": 0} | changes
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


# --- `~` ---


def test_the_home_folder(home):
    assert paths.expand("~/run") == f"{home}/run" and paths.expand("~") == str(home)
    for same in ("gs://bucket/~/run", "a/~/b", "owner/model", "", "train:400"):
        assert paths.expand(same) == same
    assert paths.expand_source("jsonl:~/x*.jsonl#1/2@0.3") == f"jsonl:{home}/x*.jsonl#1/2@0.3"
    assert paths.expand_source("tfds:~") == "tfds:~" and paths.expand_source("simulated:prompts:9") != "jsonl"


def test_every_path_of_a_configuration(home):
    evaluation = e2e.get_config().stages.evaluate.unlock()
    evaluation.sample = sample.get_config().sample
    places = {name for patterns in (paths.PATHS, paths.SOURCES) for name, *_ in paths.find(evaluation, patterns)}
    assert len(places) > 25 and "evaluate.curves.ppo" in places and "models.ppo_ptx.init_from" in places
    for patterns, value in ((paths.PATHS, "~/x"), (paths.SOURCES, ("jsonl:~/x#1/2", "simulated:prompts:9"))):
        for _, section, key in paths.find(evaluation, patterns):
            section[key] = value
    evaluation.sample.prompts = ("~/x",)  # a text
    evaluation = paths.expanded(evaluation)
    assert json.dumps(evaluation.to_dict(), default=str).count("~") == 1
    assert evaluation.evaluate.references == (f"jsonl:{home}/x#1/2", "simulated:prompts:9")


def test_nothing_goes_into_a_folder_called_tilde(home):
    small_runs.write(home)
    main.run(pretraining("~"), "~/run")
    resolved = json.loads((home / "run" / "config.json").read_text())
    assert resolved["data"]["pretraining"] == [f"jsonl:{home}/text.jsonl"]
    assert {"checkpoints", "metrics.jsonl", "tokenizer"} <= set(os.listdir(home / "run"))
    with pytest.raises(ValueError, match=r"workdir .*/home/run holds another run(.|\n)*pretrain.optimizer.lr: 0.01"):
        main.run(pretraining("~", pretrain__optimizer__lr=0.5), "~/run")

    config = export.get_config()
    config.models.model.init_from = "~/run"
    main.run(config, "~/hf")
    (home / "prompts.txt").write_text("the cat\n")
    config = sample.get_config()
    config.models.model.init_from, config.sample.file, config.sample.response_length = "~/hf", "~/prompts.txt", 2
    main.run(config, "~/answers")
    answer = json.loads((home / "answers" / "samples.jsonl").read_text())
    assert answer["prompt"] == "the cat" and answer["model"] == f"{home}/hf"
    shape, params = hf.load("~/hf")
    hf.save("~/again", shape, params)
    assert (home / "again" / "model.safetensors").exists()
    assert not os.listdir()  # of the folder where the commands were given


def test_the_command_lines_of_the_data(home):
    (home / "raw.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    tokenizers.train(["some text"] * 9, 300, "~/bpe")
    build.main(["--kind=prompts", "--input=~/raw.jsonl", "--data_dir=~/sets"])
    config = prompts.get_config()
    config.data.update({"prompts": ("jsonl:~/raw.jsonl",), "tokenizer": "~/bpe"})
    main.run(config, "~/split")
    assert (home / "sets" / "prompts").is_dir() and (home / "split" / "report.json").exists()
    assert not os.listdir()


# --- another folder ---


@pytest.fixture
def no_configs(monkeypatch):
    """A process that has not imported `configs` yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]


def test_configs_is_the_folder_around_the_file_and_no_installed_package(tmp_path, no_configs, monkeypatch):
    for folder, text in (("mine", "mine"), ("site", "installed"), ("here", "here")):
        (tmp_path / folder / "configs").mkdir(parents=True)
        (tmp_path / folder / "configs" / f"{folder}.py").write_text(f"name = {text!r}")
    (tmp_path / "site" / "configs" / "__init__.py").write_text("")
    (tmp_path / "mine" / "configs" / "part").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path / "here")
    main.find_configs(f"{tmp_path}/mine/configs/part/run.py")
    names = [importlib.import_module(f"configs.{name}").name for name in ("mine", "here")]
    assert names == ["mine", "here"]
    assert pathlib.Path(importlib.import_module("configs.common").__file__) == small_runs.ROOT / "configs/common.py"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("configs.site")


def test_a_package_of_configurations_is_one(tmp_path, no_configs):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("width = 7")
    main.find_configs(f"{tmp_path}/configs/run.py")
    assert importlib.import_module("configs").width == 7


# --- before a record is read ---


@pytest.fixture
def unread(monkeypatch):
    """No record may be read."""

    def refuse(*_):
        raise AssertionError("records were read")

    monkeypatch.setattr(sources, "load", refuse)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pretrain__optimizer__warmup_steps": 2},
         r"config.pretrain.optimizer.warmup_steps must be at most config.pretrain.num_steps = 1, got 2"),
        ({"pretrain__row_length": 65}, r"config.pretrain.row_length must be at most the model's context of 64 tokens"),
        ({"models__model__size": "huge"}, r"config.models.model.size must be one of .* got 'huge'"),
        ({"models__model__num_heads": 3}, r"config.models.model: width must be a multiple of num_heads, got 32 and 3"),
        ({"data__pretraining": ("jsonl:nowhere.jsonl",)},
         r"config.data.pretraining: jsonl:nowhere.jsonl must name at least one file, got none"),
        ({"data__pretraining": ("jsonl:.",)}, r"config.data.pretraining: jsonl:. must name files, got a folder"),
        ({"data__template": "~/no.jinja"}, r"config.data.template must be one of .* got '.*/no.jinja': No such file"),
        ({"data__tokenizer": "no/such/folder"}, r"config.data.tokenizer must be a directory that exists, a Hub id or "),
    ],
)  # fmt: skip
def test_a_mistake_is_found_before_a_record_is_read(home, unread, changes, message):
    small_runs.write(home)
    with pytest.raises(ValueError, match=message):
        main.run(pretraining(home, **changes), str(home / "run"))
    assert not (home / "run").exists()


def test_another_runs_workdir_is_refused_before_a_record_is_read(home, unread):
    small_runs.write(home)
    (home / "run").mkdir()
    stored = json.loads(json.dumps(pretraining(home).to_dict(), default=str))
    (home / "run" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(AssertionError, match="records were read"):
        main.run(pretraining(home), str(home / "run"))
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*pretrain.batch_size: 16 in the workdir, 8 asked"):
        main.run(pretraining(home, pretrain__batch_size=8), str(home / "run"))


@pytest.mark.parametrize("entry", ["models__model__init_from", "data__tokenizer"])
def test_a_hub_id_without_a_network_is_one_line(home, unread, entry, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    small_runs.write(home)
    config = pretraining(home, **{entry: "no-such-owner/model"})
    if entry == "models__model__init_from":
        config.models.model = {"init_from": "no-such-owner/model"}
    with pytest.raises(ValueError, match="Hub id that can be fetched from here") as refused:
        main.run(config, str(home / "run"))
    assert "\n" not in errors.describe(refused.value) and "no-such-owner/model" in str(refused.value)


def test_what_the_networks_say_comes_before_the_data(home, unread):
    tokenizers.train(["some text"] * 9, 300, home / "bpe")
    config = small_runs.get_config(home)
    small_runs.write(home)
    config.data.tokenizer = str(home / "bpe")
    config.models.reward = small_runs.common.network("tiny", **small_runs.MODEL)
    config.models.value = small_runs.common.network("tiny", **small_runs.MODEL | {"num_layers": 2})
    with pytest.raises(ValueError, match="config.models.value must have the architecture of config.models.reward"):
        main.run(config, str(home / "run"))


def test_a_pipeline_looks_for_what_no_stage_of_it_will_make(home, monkeypatch):
    small_runs.write(home)
    stages = {"base": small_runs.pretrain(home), "more": small_runs.pretrain(home)}
    stages["more"].models.model = small_runs.common.network(init_from="{workdir}/base")
    stages["more"].data.tokenizer = "{workdir}/base/tokenizer"
    stages["more"].data.pretraining = ("jsonl:{workdir}/base/made.jsonl", f"jsonl:{home}/text.jsonl")
    whole = {"stage": "pipeline", "only": "", "parallel": 1, "order": ("base", "more"), "stages": stages}
    ran = []
    monkeypatch.setitem(main.STAGES, "pretrain", lambda config, mesh, workdir: ran.append(workdir))
    monkeypatch.setattr(main.run_tokenizer, "settled", lambda config, _: config)
    with pytest.raises(ValueError, match="^config.data.pretraining: jsonl:.*/run/base/made.jsonl must name at least"):
        main.run(small_runs.common.ConfigDict(whole), f"{home}/run")  # when its turn comes, it must be there
    assert ran == [f"{home}/run/base"]
    stages["more"].data.pretraining = (f"jsonl:{home}/gone.jsonl",)
    with pytest.raises(ValueError, match="stage more of the pipeline: config.data.pretraining: .*gone.jsonl must name"):
        main.run(small_runs.common.ConfigDict(whole), f"{home}/other")
    assert ran == [f"{home}/run/base"] and not (home / "other").exists()


def test_a_run_that_goes_on_needs_no_network_that_it_began_with(home, monkeypatch):
    small_runs.write(home)
    config = pretraining(home)
    config.models.model = small_runs.common.network(init_from=str(home / "gone"))
    with pytest.raises(ValueError, match="config.models.model.init_from must exist"):
        inputs.check(config, str(home / "run"))
    monkeypatch.setattr(inputs.checkpoint, "steps", lambda workdir: [3])
    inputs.check(config, str(home / "run"))


# --- folders and files that fail ---


def test_which_errors_are_one_line(tmp_path):
    def told(make):
        with pytest.raises(Exception) as raised:
            make()
        return errors.describe(raised.value)

    assert told(lambda: open(tmp_path / "no" / "file")) == f"{tmp_path}/no/file: No such file or directory"
    assert told(lambda: os.replace(tmp_path / "a", tmp_path / "b")) == (
        f"{tmp_path}/a -> {tmp_path}/b: No such file or directory"
    )
    assert told(lambda: sources.parse("x")).startswith("a data source must be")
    for bug in (lambda: int("x"), lambda: [][1], lambda: json.loads("{")):
        assert told(bug) is None

    def full():
        with errors.naming(tmp_path / "x"), open("/dev/full", "w") as file:
            file.write("text")

    assert told(full) == f"{tmp_path}/x: No space left on device"


@pytest.mark.parametrize("stage", ["sample", "export"])
def test_a_workdir_that_cannot_be_made(home, stage):
    (home / "file").write_text("")
    tokenizer = tokenizers.train(["some text"] * 9, 300, home / "bpe")
    shape = models.SIZES["tiny"].replace(**small_runs.MODEL, vocab_size=300)
    hf.save(home / "model", shape, models.init(shape, jax.random.key(0)), tokenizer.pretrained(pad=False))
    config = {"sample": sample, "export": export}[stage].get_config()
    config.models.model.init_from = str(home / "model")
    made = "workdir must be a folder that can be made, got {}: {}"
    told = {home / "file" / "new": made.format(home / "file" / "new", "Not a directory")}
    told[home / "file"] = {
        "sample": made.format(home / "file", "File exists"),
        "export": f"workdir must be a directory, got the file {home}/file",
    }[stage]
    for place, line in told.items():
        with pytest.raises(ValueError, match=f"^{line}$"):
            main.run(config, str(place))


def test_a_report_that_cannot_be_written_is_refused_before_the_evaluation(home, monkeypatch):
    (home / "file").write_text("")
    config = e2e.get_config("tiny").stages.evaluate
    config.evaluate.report = f"{home}/file/report"
    monkeypatch.setattr(evaluate.tokenizers, "load", lambda name: types.SimpleNamespace(vocab_size=1))
    monkeypatch.setattr(evaluate, "build_networks", lambda *_: {})
    with pytest.raises(ValueError, match="config.evaluate.report must be a folder that can be made, got .*/file/repo"):
        evaluate.run(config, None, str(home / "run"))


def test_a_command_line_of_the_data_that_cannot_write(home, capsys):
    (home / "raw.jsonl").write_text('{"prompt": "a"}\n')
    (home / "file").write_text("")
    with pytest.raises(SystemExit, match="1"):
        build.main([f"--input={home}/raw.jsonl", "--kind=prompts", f"--data_dir={home}/file/sets"])
    last = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert last.startswith(f"error: data_dir must be a folder that can be made, got {home}/file")


def test_a_file_that_vanishes_or_is_no_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must name files, got a folder; .*/\*.jsonl names those in it"):
        sources.load((f"jsonl:{tmp_path}",), "prompts", 0)
    monkeypatch.setattr(jsonl, "match", lambda pattern, form: [pattern])
    with pytest.raises(ValueError, match="/gone.jsonl must be readable, got No such file or directory$"):
        sources.load((f"jsonl:{tmp_path}/gone.jsonl",), "prompts", 0)
