"""The stages of a pipeline: in their order, some beside each other, and what ends them."""

import signal
import threading
import time

import pytest
from ml_collections import ConfigDict

from configs import instruct
from instructgpt_jax import pipeline, process


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


def test_an_export_comes_after_all_that_its_card_may_tell():
    config = instruct.get_config("tiny")
    assert pipeline.needed(config, "export") == {name for name in config.order if not name.startswith("export")}


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
