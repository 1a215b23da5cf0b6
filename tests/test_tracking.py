"""Weights & Biases has the same numbers as metrics.jsonl, from runs without a network; skipped without the package."""

import importlib.util
import json
import pathlib
import struct
import time

import jax
import pytest
import toy_stage
from report_example import example

from configs import common
from instructgpt_jax import report
from instructgpt_jax.training import tracking
from instructgpt_jax.validate import inputs

BLOCK, HEADER = 32_768, 7  # bytes of a file of records, as LevelDB writes its log


def records(path: pathlib.Path) -> list:
    """The records of a file up to the last that is whole: another process writes the file, block by block."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, found = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the end of a block holds no header
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + HEADER])
        if kind == 0 or at + HEADER + size > len(content):  # not written yet
            break
        parts += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def history(workdir: pathlib.Path) -> list[dict]:
    """What was logged, run after run. On a busy machine a file is still being written when its run has ended."""
    found, patience = [], time.monotonic() + 60
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        while not (whole := records(path)) or whole[-1].WhichOneof("record_type") != "exit":
            assert time.monotonic() < patience, f"{path} does not end with the exit of its run"
            time.sleep(0.1)
        for record in whole:
            logged = {}
            for item in record.history.item:
                first, *rest = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if rest:  # a part of a table or an image
                    logged.setdefault(first, {})[rest[0]] = value
                else:
                    logged[first] = value
            found += [logged] if logged else []
    return found


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_scalars_and_samples_of_a_run_that_goes_on(offline, tmp_path):
    toy_stage.run(tmp_path / "run", jax.devices()[:1], **{"log.wandb": "project", "toy.num_steps": 6})
    toy_stage.run(tmp_path / "run", jax.devices()[:1], **{"log.wandb": "project", "toy.num_steps": 9})
    logged = history(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert any(line.items() <= one.items() for one in logged), line
    tables = [one["samples"] for one in logged if "samples" in one]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert sum(table["nrows"] for table in tables) == len(samples) > 0
    assert len({path.name.split("-")[-1] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}) == 1


def test_figures_of_a_report(offline, tmp_path):
    report.write(example(), tmp_path / "report")
    with tracking.run("team/project", tmp_path, {"seed": 0}) as tracked:
        tracked.figures(tmp_path / "report")
    names = {key for one in history(tmp_path) for key in one if not key.startswith("_")} - {"step"}
    assert names == {path.stem for path in (tmp_path / "report").glob("*.png")} != set()


def test_a_project_that_cannot_be_opened_is_one_line(offline, monkeypatch, tmp_path):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="^config.log.wandb='project' could not be opened: no API key"):
        tracking.Run("project", tmp_path, {})


def test_without_a_project_nothing_is_written(tmp_path):
    with tracking.run("", tmp_path, {}) as tracked:
        tracked.scalars(1, {"loss": 2.0})
        tracked.samples(1, [{"prompt": "a"}])
        tracked.figures(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_project_needs_the_package(monkeypatch, tmp_path):
    settings = common.config("sft")
    settings.log.wandb = "project"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^config.log.wandb must be '' without the package wandb .*, got 'project'"):
        inputs.check(settings, str(tmp_path))
