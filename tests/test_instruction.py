"""Instruction collections: what is read of each layout, how sets are mixed, and FLAN and T0 trained on real ones."""

import collections
import gzip
import importlib
import json
import math
import random

import pyarrow
import pyarrow.parquet
import pytest

from configs import pretrain_tiny
from instructgpt_jax import main
from instructgpt_jax.data import instruction, sources
from instructgpt_jax.data.instruction import Mixing

ALL = Mixing(cap=10_000, rate=0, total=0)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def flan(name, count, **more):
    return [{"inputs": f"{name} {i}?", "targets": f"{i}", "task": name} | more for i in range(count)]


def read(out):
    return [sources.load((f"jsonl:{out}",), "demonstrations", 0)[i] for i in range(sum(1 for _ in open(out, "rb")))]


# --- mixing ---


def by_search(sizes, rates, total):
    """The exact shares, by bisection on x."""
    low, high = 0.0, 1e6
    for _ in range(200):
        x = (low + high) / 2
        low, high = (x, high) if sum(map(min, sizes, [x * rate for rate in rates])) < total else (low, x)
    return list(map(min, sizes, [high * rate for rate in rates]))


def test_shares_are_those_that_a_search_finds():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(1, 60) for _ in range(draw.randint(1, 9))]
        rates = [min(size, draw.randint(1, 30)) for size in sizes]
        total = draw.randint(1, sum(sizes) + 3)
        found = instruction.shares(sizes, rates, total)
        assert sum(found) == min(total, sum(sizes)) and all(n <= size for n, size in zip(found, sizes, strict=True))
        for n, exact in zip(found, by_search(sizes, rates, min(total, sum(sizes))), strict=True):
            assert math.floor(exact - 1e-6) <= n <= math.ceil(exact + 1e-6)


def test_a_cap_is_of_a_set_and_divided_among_its_templates():
    sizes = {"large": {"a": 500, "b": 500, "c": 10}, "small": {"": 40}}
    assert instruction.plan(sizes, Mixing(100, 0, 0)) == {"large": {"a": 45, "b": 45, "c": 10}, "small": {"": 40}}
    # by sizes up to 60 and 40, until the small one is used up
    assert sum(instruction.plan(sizes, Mixing(100, 60, 50))["large"].values()) == 30
    assert instruction.plan(sizes, Mixing(100, 10, 120))["small"] == {"": 40}


def test_the_report_counts_what_became_of_every_record(tmp_path):
    records = flan("a", 9) + flan("a", 2) + flan("b", 3) + flan("c", 2) + flan("b", 1, targets=" ")
    records += [{"inputs": [1], "targets": "x"}]
    given, out = write(tmp_path / "f.jsonl", records), str(tmp_path / "out.jsonl.gz")
    report = instruction.make([given], out, Mixing(5, 0, 6), wanted=("a", "b"), skip_bad=1)
    assert report == json.loads((tmp_path / "out.sets.json").read_text())
    assert (report["read"], report["written"], report["bad"]) == (17, 6, 1)
    assert report["dropped"] == {
        "empty prompt or completion": 1, "not in --sets": 2, "repeated": 2, "over the cap": 4, "over the total": 2,
    }  # fmt: skip
    assert report["written"] + sum(report["dropped"].values()) == report["read"]
    assert {name: (own["read"], own["taken"]) for name, own in report["sets"].items()} == {
        "a": (11, 4), "b": (4, 2), "c": (2, 0),
    }  # fmt: skip
    found = sources.load((f"jsonl:{out}",), "demonstrations", 0)
    assert collections.Counter(record["dataset"] for record in found) == {"a": 4, "b": 2}
    assert len({record["prompt"] for record in found}) == 6


def test_the_order_of_files_and_lines_changes_nothing_of_what_is_taken(tmp_path):
    records = flan("a", 30) + flan("b", 30)
    first = [write(tmp_path / "1.jsonl", records[:40]), write(tmp_path / "2.jsonl", records[40:])]
    other = [write(tmp_path / "3.jsonl", records[::-1])]
    texts = []
    for number, given in enumerate((first, first[::-1], other)):
        out = str(tmp_path / f"{number}.out.jsonl")
        instruction.make(given, out, Mixing(20, 0, 15))
        texts.append({(record["prompt"], record["completion"]) for record in read(out)})
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 15


# --- layouts ---


def test_each_layout_becomes_demonstrations(tmp_path):
    texts = {"inputs_pretokenized": "Good or bad?\nFine.", "targets_pretokenized": " good"}
    p3 = {"inputs": [1, 2], "targets": [3]} | texts
    ours = {"prompt": "Say hi.\n", "completion": "Hi.", "dataset": "d", "template": "t", "source": "s"}
    task = {
        "Definition": ["Name the colour."], "Positive Examples": [],
        "Instances": [{"input": "snow", "output": ["white", "White"]}, {"input": "grass", "output": "green"}],
    }  # fmt: skip
    folder = tmp_path / "natural-instructions" / "tasks"
    write(folder / "task1_colour.json", [task])
    table = pyarrow.Table.from_pylist([{"inputs": "2 + 2 =\n", "targets": "4", "task_name": "sums"}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    scoring = [p3 | {"is_correct": True, "idx": [0, 0]}, p3 | {"targets_pretokenized": "bad", "is_correct": False}]
    given = [
        write(tmp_path / "imdb_positive.jsonl.gz", scoring), write(tmp_path / "o.jsonl", [ours]),
        str(folder.parent), f"parquet:{tmp_path}/x.parquet",
    ]  # fmt: skip
    out = str(tmp_path / "out.jsonl")
    report = instruction.make(given, out, ALL)
    assert report["dropped"] == {"a wrong choice of a scoring set": 1}
    taken = [{key: record[key] for key in ("prompt", "completion", "dataset")} for record in read(out)]
    assert taken == [
        {"prompt": "Good or bad?\nFine.", "completion": " good", "dataset": "imdb_positive"},
        {"prompt": "Say hi.\n", "completion": "Hi.", "dataset": "d"},
        {"prompt": "Name the colour.\n\nInput: snow\n\nOutput:", "completion": " white", "dataset": "task1_colour"},
        {"prompt": "Name the colour.\n\nInput: grass\n\nOutput:", "completion": " green", "dataset": "task1_colour"},
        {"prompt": "2 + 2 =\n", "completion": "4", "dataset": "sums"},
    ]
    assert [record["source"] for record in read(out)] == ["p3", "s", *["super_natural_instructions"] * 2, "flan"]


# --- what is refused, in one line ---


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        instruction.main(list(arguments))
    text = capsys.readouterr().err
    assert stopped.value.code == 1 and text.startswith("error: ") and text.count("\n") == 1
    return text


def test_bad_input_is_one_line(tmp_path, capsys):
    good, out = write(tmp_path / "f.jsonl", flan("a", 3)), f"--out={tmp_path}/o.jsonl"
    odd = write(tmp_path / "odd.jsonl", [{"question": "?", "answer": "!"}])
    (tmp_path / "empty").mkdir()
    write(tmp_path / "tasks" / "task1.json", [{"Definition": "x"}])
    (tmp_path / "names").write_text("a\nz\n")
    assert "--cap must be at least 1, got 0" in refused(capsys, f"--input={good}", out, "--cap=0")
    assert "--total must be at least 1, or 0" in refused(capsys, f"--input={good}", out, "--cap=1", "--total=-1")
    said = refused(capsys, f"--input={odd}", out, "--cap=1", "--skip_bad=9")
    assert f"{odd}:1: a record of an instruction collection must have" in said and "['answer', 'question']" in said
    assert "folder of task files (*.json)" in refused(capsys, f"--input={tmp_path}/empty", out, "--cap=1")
    said = refused(capsys, f"--input={tmp_path}/tasks", out, "--cap=1")
    assert "task1.json: a task of Super-NaturalInstructions must have a Definition and a list of Instances" in said
    assert "must name at least one file" in refused(capsys, f"--input={tmp_path}/none*.jsonl", out, "--cap=1")
    assert "such as 'z'" in refused(capsys, f"--input={good}", out, "--cap=1", f"--sets={tmp_path}/names")
    assert "alone, got 'simulated:flan'" in refused(capsys, "--input=simulated:flan", out, "--cap=1")
    assert "local file" in refused(capsys, f"--input={good}", "--out=gs://b/o.jsonl", "--cap=1")
    assert not list(tmp_path.glob("o.*"))


def test_a_malformed_record_is_told_with_file_and_line(tmp_path):
    given = write(tmp_path / "f.jsonl", [*flan("a", 2), {"inputs": "x", "targets": 3}])
    with pytest.raises(ValueError, match=r"--skip_bad allows 0:\n  .*f.jsonl:3: targets must be a text, got int"):
        instruction.make([given], str(tmp_path / "o.jsonl"), ALL)


# --- the baselines, on real collections ---


@pytest.fixture(scope="module")
def collections_of(shared_data, tmp_path_factory):
    """The real files as FLAN's and T0's demonstrations, and a base model that knows their letters."""
    folder, data = tmp_path_factory.mktemp("instruction"), shared_data / "demonstrations"
    names = {"flan": ("flan_cot", "super_natural_instructions"), "t0": ("p3_t0_templates",)}
    for name, files in names.items():
        given = [f"--input={data}/{files[0]}.jsonl.gz"] if len(files) == 1 else ["--input"]
        given += [f"{data}/{file}.jsonl.gz" for file in files if len(files) > 1]
        instruction.main([*given, "--cap=20", f"--out={folder}/{name}.jsonl.gz"])
    base = pretrain_tiny.get_config("tiny")
    base.data.tokenizer = "train:700"
    base.data.pretraining = (f"jsonl:{folder}/t0.jsonl.gz#text=prompt",)
    base.pretrain.num_steps = 2
    base.eval_every = 0
    main.run(base, str(folder / "base"))
    return folder


@pytest.mark.parametrize("name", ["flan", "t0"])
def test_a_baseline_trains_on_real_collections(collections_of, one_device, name):
    folder = collections_of
    report = json.loads((folder / f"{name}.sets.json").read_text())
    counts = {"flan": (901, 768), "t0": (500, 25)}
    assert (report["written"], len(report["sets"])) == counts[name]
    assert max(own["taken"] for own in report["sets"].values()) <= 20
    config = importlib.import_module(f"configs.{name}_175b").get_config("tiny")
    config.models.model.init_from = str(folder / "base")
    config.data.demonstrations = (f"jsonl:{folder}/{name}.jsonl.gz",)
    config.data.update({"valid_fraction": 0.2, "max_prompt_tokens": 200})
    config.sft.optimizer.lr = 3e-3  # the paper's is for large models: nothing would be seen in 8 updates
    main.run(config, str(folder / name))
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    losses = [line["sft/loss"] for line in lines if "sft/loss" in line]
    assert len(losses) == 8 and losses[-1] < losses[0] and all(map(math.isfinite, losses))
    assert any("sft/valid_loss" in line for line in lines)
    assert sorted(int(path.name) for path in (folder / name / "snapshots").iterdir()) == [4, 8]  # for select
    data = json.loads((folder / name / "data.json").read_text())["demonstrations"]
    assert data["records"] == report["written"]
    assert data["examples"] + data["validation"] + sum(data["left_out"].values()) == data["records"]
