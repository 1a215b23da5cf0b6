"""The data of a stage: what is parsed, which side of the split a record is on, and batches from a config."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_batches import KINDS, make_world, write
from test_sources import rows
from test_sources import write as write_lines

from instructgpt_jax import sharding
from instructgpt_jax.data import datasets, encoding, records, schema, sources
from instructgpt_jax.data import tokenizer as tokenizers


def test_a_line_is_parsed_once_and_those_beyond_what_memory_keeps_again(tmp_path, monkeypatch):
    """Whatever asks: the parts of a source, the split, a pass over the records; all read the same."""
    names = (
        write_lines(tmp_path / "a.jsonl", rows(40, "a")),
        write_lines(tmp_path / "b.jsonl.gz", rows(20, "b")) + "#!1/3#unique",
    )
    parsed, parse_line = [], schema.parse_line
    monkeypatch.setattr(schema, "parse_line", lambda line: parsed.append(line) or parse_line(line))

    def read():
        parsed.clear()
        sides = datasets.split(sources.load(names, "prompts", 0), 0.3)
        return [([*side], [side.origin(i) for i in range(len(side))], side.keys.tolist()) for side in sides]

    kept = read()
    count = sum(len(found) for found, *_ in kept)
    assert len(parsed) == 60 and 40 < count < 60
    for found, _, keys in kept:
        assert [list(records.keys_of(record)) for record in found] == keys
    monkeypatch.setattr(sources, "_KEPT", 0)
    assert read() == kept and len(parsed) == 60 + count
    monkeypatch.setattr(sources, "_KEPT", 200)
    assert read() == kept and 60 < len(parsed) < 60 + count


def test_split_keeps_prompts_together_and_in_place(tmp_path):
    prompts = [f"question {i}" for i in range(400)]
    small = sources.load((write(tmp_path / "s.jsonl", [{"prompt": p} for p in prompts[:200]]),), "prompts", 0)
    twice = [{"prompt": p, "completion": c} for p in prompts for c in "ab"]
    large = sources.load((write(tmp_path / "l.jsonl", twice),), "demonstrations", 0)
    sides = [[{r["prompt"] for r in half} for half in datasets.split(records, 0.2)] for records in (small, large)]
    assert not sides[1][0] & sides[1][1]
    assert sides[0][0] <= sides[1][0] and sides[0][1] <= sides[1][1]
    assert 50 < len(sides[1][1]) < 110 and sum(map(len, sides[1])) == 400
    train, valid = datasets.split(large, 0.2)
    assert len(train) + len(valid) == 800
    assert train.origin(0).endswith(f"l.jsonl:{1 + twice.index(train[0])}")
    assert len(datasets.split(large, 0.0)[1]) == 0


def test_validation_has_no_prompt_that_training_has(tmp_path):
    """Users are held out whole, and a prompt of theirs that others or nobody wrote too is no held-out prompt."""
    rng = np.random.default_rng(0)
    popular = [f"question {i}" for i in range(60)]
    records = [{"prompt": popular[rng.integers(60)], "user": f"u{i % 40}"} for i in range(300)]
    records += [{"prompt": prompt} for prompt in popular[:30]]
    records += [{"prompt": f"own {i}", "user": f"u{i % 40}"} for i in range(80)]
    loaded = sources.load((write(tmp_path / "p.jsonl", records),), "prompts", 0)
    train, valid = datasets.split(loaded, 0.2)
    held_out = {f"u{i}" for i in range(40)} - {record.get("user") for record in train}
    assert held_out and {record["user"] for record in valid if "user" in record} <= held_out
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in valid}
    lost = len(records) - len(train) - len(valid)
    assert lost > 0 and valid.left_out == {"prompt that is in training too, by another user": lost}
    tokenizer = tokenizers.train(["question own 1 2 3"] * 9, 300, tmp_path / "bpe")
    sides = (encoding.prompts(side, tokenizer, encoding.Allowed(0, 0), max_prompt_length=40) for side in (train, valid))
    sets = [{"prompts": side} for side in sides]
    told = datasets.described(sets)["prompts"]
    assert told["records"] == len(records) == told["examples"] + told["validation"] + sum(told["left_out"].values())


def test_prompts_that_an_earlier_stage_trained_on_are_counted(tmp_path):
    """Demonstrations without users are split by prompt, prompts by user: some are on different sides."""
    demonstrations = [{"prompt": f"question {i}", "completion": "x"} for i in range(200)]
    earlier = {"demonstrations": [write(tmp_path / "d.jsonl", demonstrations)], "valid_fraction": 0.3}
    earlier |= {"skip_bad": 0, "data_dir": ""}
    asked = [{"prompt": f"question {i}", "user": f"u{i % 20}"} for i in range(100, 300)]
    _, valid = datasets.split(sources.load((write(tmp_path / "p.jsonl", asked),), "prompts", 0), 0.3)
    trained_on = datasets.split(sources.load((*earlier["demonstrations"],), "demonstrations", 0), 0.3)[0]
    trained_on = {record["prompt"] for record in trained_on}
    assert datasets.count_trained_on(valid, earlier) == sum(record["prompt"] in trained_on for record in valid) > 5
    with pytest.raises(ValueError, match="gone.jsonl must name at least one file"):
        datasets.count_trained_on(valid, earlier | {"demonstrations": [f"jsonl:{tmp_path}/gone.jsonl"]})


def test_data_of_a_stage_from_its_config(tmp_path):
    files, tokenizer = make_world(tmp_path)
    config = ConfigDict(
        {
            "seed": 0,
            "data": {kind: (files[kind],) for kind in KINDS}
            | dict(
                tokenizer=str(tmp_path / "bpe"),
                skip_bad=0,
                skip_long=False,
                data_dir="",
                cache_dir="",
                max_prompt_tokens=0,
                valid_fraction=0.2,
            ),
            "options": dict(batch_size=8, num_epochs=2, row_length=64, microbatch_rows=8, loss_on_prompt=False)
            | dict(pretraining_fraction=0.1, pretraining_fraction_of="loss")
            | dict(max_completions=4, shared_prompt=True, max_prompt_length=40)
            | dict(held_out_groups=()),
        }
    )
    mesh = sharding.make_mesh(dict(data=-1, fsdp=2, tensor=1))
    for kind in KINDS:
        data = datasets.load(config, config.options, kind, mesh)
        batch = next(data.train(1))
        want = data.train_batches[1]
        jax.tree.map(np.testing.assert_array_equal, batch, want)
        assert jax.tree.map(lambda x: x.shape, data.abstract_batch()) == jax.tree.map(lambda x: x.shape, batch)
        assert list(data.valid["valid"]())
        assert data.num_steps == len(data.train_batches) and data.tokenizer.hash == tokenizer.hash
