"""The stages of a pipeline: in their order, some beside each other, and what ends them."""

import json
import pathlib
import signal
import threading
import time

import pytest
from ml_collections import ConfigDict

from configs import instruct
from instructgpt_jax import pipeline, process
from instructgpt_jax.report import progress


def make(stages, **settings):
    """A pipeline of stages that each name others: name -> strings."""
    configs = {name: {"stage": "pretrain", "sources": strings} for name, strings in stages.items()}
    whole = {"stage": "pipeline", "only": "", "parallel": 2, "order": tuple(stages), "stages": configs} | settings
    return ConfigDict(whole)


@pytest.fixture
def one_device(monkeypatch):
    """Stages run beside each other on one device only; tests have eight."""
    monkeypatch.setattr(pipeline.jax, "device_count", lambda: 1)


PAPER = {
    "pretrain": (),
    "sft": ("{workdir}/pretrain",),
    "round1/collect": ("{workdir}/sft",),
    "collect": ("{workdir}/sft", "{workdir}/later"),
    "reward": ("jsonl:{workdir}/collect/comparisons.jsonl#I/2", "{workdir}/pretrain/tokenizer"),
    "sft_large": ("{workdir}/pretrain_large", "{workdir}/round1/collect"),
    "later": (),
}


def test_sources_of_the_user_stand_where_a_stage_names_them():
    strings = ("{given}#1/2", "{given}@0.5", "simulated:x@0.5", "{base}/y")
    config = make({"pretrain": (), "sft": strings}, given=("jsonl:a", "jsonl:b@3"), base="{workdir}/pretrain")
    config.stages.sft.start = "{base}"
    found = pipeline.stage_config(config, "sft", "runs/w")
    assert found.start == "runs/w/pretrain"
    assert found.sources == (
        "jsonl:a#1/2", "jsonl:b#1/2@3", "jsonl:a@0.125", "jsonl:b@0.375", "simulated:x@0.5", "runs/w/pretrain/y",
    )  # fmt: skip
    assert pipeline.needed(config, "sft") == {"pretrain"}
    config.given = ()
    with pytest.raises(ValueError, match=r"config.given must be set, for example --config.given=jsonl:given.jsonl"):
        pipeline.stage_config(config, "sft", "runs/w")
    config.stages.sft.start, config.given = "{given}", ("jsonl:a",)
    with pytest.raises(ValueError, match="config.given must stand among data sources in stage sft"):
        pipeline.stage_config(config, "sft", "runs/w")


def test_a_stage_needs_those_that_its_strings_name():
    config = make(PAPER)
    assert {name: pipeline.needed(config, name) for name in config.order} == {
        "pretrain": set(),
        "sft": {"pretrain"},
        "round1/collect": {"sft"},
        "collect": {"sft"},  # not a stage that comes after it
        "reward": {"collect", "pretrain"},
        "sft_large": {"round1/collect"},  # `pretrain` is the beginning of another name
        "later": set(),
    }


def test_a_stage_needs_those_that_its_patterns_and_the_users_sources_lead_to():
    stages = {name: () for name in ("a", "b1", "b2/x", "b2/y")}
    stages |= {
        "own": ("{given}@0.5",),
        "one": ("jsonl:{workdir}/b?/x.jsonl", "jsonl:{workdir}/[c-z]/x.jsonl"),
        "two": ("jsonl:{workdir}/b*/x/*.jsonl#1/2",),
        "any": ("jsonl:{workdir}/b2/**/x.jsonl",),
    }
    config = make(stages, given=("jsonl:{workdir}/a/x.jsonl", "jsonl:{base}/x.jsonl"), base="{workdir}/b1")
    assert {name: pipeline.needed(config, name) for name in ("own", "one", "two", "any")} == {
        "own": {"a", "b1"},
        "one": {"b1"},
        "two": {"b1", "b2/x"},  # b1/x may be a folder of b1
        "any": {"b2/x", "b2/y"},
    }


def test_an_export_comes_after_all_that_its_card_may_tell():
    config = instruct.get_config("tiny")
    assert pipeline.needed(config, "export") == {name for name in config.order if not name.startswith("export")}


def test_a_stage_whose_source_was_left_out_is_refused(tmp_path):
    ran = []
    stages = {"sft": ("{workdir}/pretrain",), "reward": ("jsonl:{workdir}/sft/a.jsonl#1/2", "{workdir}/s*/b.jsonl")}
    message = "^stage sft of the pipeline: config.sources must name a stage that runs before it or has run in .*, got "
    with pytest.raises(ValueError, match=message + "{workdir}/pretrain$"):
        pipeline.run(make(stages), str(tmp_path), lambda *_: None, lambda stage, _: ran.append(stage))
    (tmp_path / "pretrain").mkdir()  # it has run
    pipeline.run(make(stages), str(tmp_path), lambda *_: None, lambda stage, _: ran.append(stage))
    assert len(ran) == 2
    later = make({"a": ("{base}/x",), "b": ()}, base="{workdir}/b")
    with pytest.raises(ValueError, match="stage a of the pipeline: config.sources must name .* got {workdir}/b/x$"):
        pipeline.run(later, str(tmp_path / "other"), lambda *_: None, lambda *_: None)
    later = make({"a": ("{given}",), "b": ()}, given=("jsonl:{workdir}/b/x",))
    with pytest.raises(ValueError, match="stage a of the pipeline: config.sources must name .* got {workdir}/b/x$"):
        pipeline.run(later, str(tmp_path / "other"), lambda *_: None, lambda *_: None)


def test_how_far_a_pipeline_is():
    ppo = {"stage": "ppo", "ppo": {"iterations": 10, "batch_size": 4, "ptx_ratio": 3, "ptx_coef": 0.0}}
    stages = {
        "base": {"stage": "pretrain", "pretrain": {"num_steps": 5, "batch_size": 2}},
        "a": ppo,
        "b": ppo | {"ppo": ppo["ppo"] | {"ptx_coef": 1.0}},
        "c": ppo | {"ppo": ppo["ppo"] | {"iterations": 5}},
        "end": {"stage": "evaluate"},
    }
    stages = {name: ConfigDict(stage) for name, stage in stages.items()}
    found = progress.rows(stages, {"base", "a"}, {"b"}, {"base": 40.0, "a": 20.0, "b": 15.0})
    assert found == [
        ("base", "done", 40.0, 0.0),
        ("a", "done", 20.0, 0.0),
        ("b", "running", 15.0, 65.0),  # of 80: one episode and three sequences are four times as much as an episode
        ("c", "to come", 0.0, 10.0),
        ("end", "to come", 0.0, None),
    ]
    # 75 s of stages in 50 s: what is left takes two thirds of 75 s too.
    said = "pipeline: 2 of 5 stages done in 50 s, about 50 s left and 1 stage of a kind that none is done of"
    assert progress.summary(found, 50.0) == said
    lines = progress.table(found, 50.0).splitlines()
    assert lines[3].split() == ["b", "running", "15", "s", "1", "min", "5", "s"] and lines[5].split()[-1] == "?"
    assert lines[6] == said and progress.summary(found[:2], 9.0) == "pipeline: 2 of 2 stages done in 9.0 s"
    assert progress.summary(found[4:], 0.0).endswith("none of the others is of a kind that is done")


def test_a_pipeline_says_how_far_it_is_also_when_it_goes_on(tmp_path, capsys, monkeypatch):
    def run_stage(stage, workdir):
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
        time.sleep(0.06)  # seconds.json has tenths
        if fails and workdir.endswith("b"):
            raise ValueError("b")

    fails, stages = True, make({"a": (), "b": ("{workdir}/a",)}, parallel=1)
    with pytest.raises(ValueError, match="^b$"):
        pipeline.run(stages, str(tmp_path), lambda *_: None, run_stage)
    assert "pipeline: 1 of 2 stages done in " in capsys.readouterr().err
    assert json.loads((tmp_path / "done.json").read_text()) == ["a"]
    fails = False
    monkeypatch.setattr(pipeline.sys.stderr, "isatty", lambda: True, raising=False)
    pipeline.run(stages, str(tmp_path), lambda *_: None, run_stage)
    first, *_, last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pipeline: ")]
    assert "pipeline: 1 of 2 stages done" in first and "pipeline: 2 of 2 stages done" in last
    (tmp_path / "done.json").write_text("[")
    assert progress.read(tmp_path) == set()


def test_two_stages_run_at_once_and_none_before_those_it_needs(tmp_path, one_device):
    together, started = threading.Barrier(2, timeout=30), []

    def run_stage(stage, workdir):
        started.append(workdir.rpartition("/")[2])
        if started[-1] in ("b", "c"):
            together.wait()  # passes only when both run

    stages = {"a": (), "b": ("{workdir}/a",), "c": ("{workdir}/a",), "d": ("{workdir}/b", "{workdir}/c")}
    pipeline.run(make(stages), str(tmp_path), lambda *_: None, run_stage)
    assert started[0] == "a" and sorted(started[1:3]) == ["b", "c"] and started[3] == "d"


def test_one_stage_fails_and_the_one_beside_it_saves(tmp_path, one_device):
    ends = {}

    def run_stage(stage, workdir):
        name = workdir.rpartition("/")[2]
        if name == "b":
            raise ValueError("config.b must be better")
        with process.catching_signals() as stop:
            ends[name] = stop.wait(timeout=30)
        process.end_if_stopped()

    with pytest.raises(ValueError, match=r"config\.b must be better"):
        pipeline.run(make({"a": (), "b": (), "c": ()}), str(tmp_path), lambda *_: None, run_stage)
    assert ends == {"a": True}  # c did not start
    process.end_if_stopped()  # over: the next run is not stopped


def test_a_signal_ends_all_stages_with_code_0(tmp_path, one_device):
    ended = []

    def run_stage(stage, workdir):
        time.sleep(0.2)
        if len(ended) == 0 and workdir.endswith("a"):
            signal.raise_signal(signal.SIGTERM)  # the main thread's handler takes it
        with process.catching_signals() as stop:
            assert stop.wait(timeout=30)
        ended.append(workdir)
        process.end_if_stopped()

    with pytest.raises(SystemExit) as end:
        pipeline.run(make({"a": (), "b": (), "c": ()}), str(tmp_path), lambda *_: None, run_stage)
    assert end.value.code == 0 and len(ended) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(ValueError, match=r"config\.parallel must be an integer of at least 1, got 0"):
        pipeline.run(make({"a": ()}, parallel=0), str(tmp_path), lambda *_: None, run_stage)
