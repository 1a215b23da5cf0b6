"""JSONL to ArrayRecord and back: nothing lost, nothing needs TensorFlow."""

import json
import subprocess
import sys

import pytest

from instructgpt_jax.data import build, sources

RECORDS = {
    "demonstrations": [{"prompt": f"p{i}", "completion": f"é {i}", "source": "s" * (i % 2)} for i in range(20)],
    "comparisons": [
        {
            "prompt": f"p{i}\n\u2028",
            "completions": [f"c{k}" * (k % 3) for k in range(2 + i % 8)],
            "ranking": [1 + k // 2 for k in range(2 + i % 8)],
            "user": i,
            **({"group": "held-out", "ratings": [[1.5, None], []], "extra_fields_json": {"x": "😀"}} if i % 3 else {}),
        }
        for i in range(40)
    ],
    "prompts": [{"prompt": f"p{i}", "user": f"u{i % 4}"} for i in range(15)],
    "pretraining": [{"text": f"t{i}\n\nü", "source": "web"} for i in range(10)],
}


def canonical(records):
    return sorted(json.dumps(record, sort_keys=True) for record in records)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("kind", sorted(RECORDS))
def test_what_goes_in_comes_out(tmp_path, kind):
    half = len(RECORDS[kind]) // 2
    write(tmp_path / "a-0.jsonl", RECORDS[kind][:half])
    write(tmp_path / "a-1.jsonl", RECORDS[kind][half:])
    write(tmp_path / "b.jsonl", RECORDS[kind][:3])
    options = ["--shards=3", f"--data_dir={tmp_path}/sets"]
    build.main([f"--kind={kind}", f"--input={tmp_path}/a-*.jsonl", f"--valid={tmp_path}/b.jsonl", *options])
    files = sorted(path.name for path in (tmp_path / "sets" / kind / "1.0.0").glob(f"{kind}-train*"))
    assert files == [f"{kind}-train.array_record-{i:05}-of-00003" for i in range(3)]
    train = sources.load((f"tfds:{kind}",), kind, 0, data_dir=str(tmp_path / "sets"))
    valid = sources.load((f"tfds:{kind}:valid",), kind, 0, data_dir=str(tmp_path / "sets"))
    assert canonical(train) == canonical(RECORDS[kind])
    assert canonical(valid) == canonical(RECORDS[kind][:3])
    assert train[5] == train[5] == train[5 - len(train)] and train.origin(5) == f"tfds:{kind}:train[5]"
    first_half = sources.load((f"tfds:{kind}:train[:50%]",), kind, 0, data_dir=str(tmp_path / "sets"))
    assert list(first_half) == list(train)[: len(first_half)] and abs(len(first_half) - len(RECORDS[kind]) / 2) < 1


def test_the_same_input_gives_the_same_order(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS["comparisons"])
    read = []
    for name in ("one", "two"):
        build.build("comparisons", {"train": f"{tmp_path}/a.jsonl"}, str(tmp_path / name), 2, 0)
        read.append(list(sources.load(("tfds:comparisons",), "comparisons", 0, data_dir=str(tmp_path / name))))
    assert read[0] == read[1]


def test_malformed_input_is_refused_before_anything_is_written(tmp_path, capsys):
    write(
        tmp_path / "a.jsonl", RECORDS["comparisons"][:2] + [{"prompt": "p", "completions": ["a", "b"], "ranking": [1]}]
    )
    options = ["--kind=comparisons", f"--input={tmp_path}/a.jsonl", f"--data_dir={tmp_path}/sets"]
    with pytest.raises(SystemExit):
        build.main(options)
    assert "a.jsonl:3: ranking must give one rank for each of 2" in capsys.readouterr().err
    assert not (tmp_path / "sets").exists()
    build.main([*options, "--skip_bad=1"])
    assert "tfds:comparisons:train has 2 records" in capsys.readouterr().out


def test_an_existing_set_is_not_silently_kept(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS["prompts"])
    build.build("prompts", {"train": f"{tmp_path}/a.jsonl"}, str(tmp_path / "sets"), 0, 0)
    with pytest.raises(ValueError, match="data_dir must not hold prompts yet"):
        build.build("prompts", {"train": f"{tmp_path}/a.jsonl"}, str(tmp_path / "sets"), 0, 0)


def test_a_wrong_split_or_kind_is_named(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS["prompts"])
    build.build("prompts", {"train": f"{tmp_path}/a.jsonl"}, str(tmp_path), 0, 0)
    with pytest.raises(ValueError, match="must .* have the split 'valid'"):
        sources.load(("tfds:prompts:valid",), "prompts", 0, data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"tfds:prompts:train\[0\]: missing field 'completion'"):
        sources.load(("tfds:prompts",), "demonstrations", 0, data_dir=str(tmp_path))


def test_writing_and_reading_need_no_tensorflow_and_reading_no_more_than_the_environment_variable(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS["prompts"])
    program = f"""
import sys
from instructgpt_jax.data import build, sources
build.main(["--kind=prompts", "--input={tmp_path}/a.jsonl", "--data_dir={tmp_path}"])
records = sources.load(("tfds:prompts:train",), "prompts", 0)
print(len(records), records[3]["user"][0], "tensorflow" in sys.modules)
"""
    environment = {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.endswith("15 u False\n"), result.stderr


@pytest.mark.parametrize(
    "kind, files", [("comparisons", "comparisons/*.gz"), ("demonstrations", "demonstrations/d*.gz")]
)
def test_real_sets_survive(shared_data, tmp_path, kind, files):
    source = f"{shared_data}/{files}"
    build.build(kind, {"train": source}, str(tmp_path), 4, 0)
    read = sources.load((f"tfds:{kind}",), kind, 0, data_dir=str(tmp_path))
    assert canonical(read) == canonical(sources.load((f"jsonl:{source}",), kind, 0))
