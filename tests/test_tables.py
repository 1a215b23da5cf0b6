"""Records from parquet files, from data sets of the library datasets, and from TFDS sets of the public catalog."""

import datetime
import json
import re
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_tokenizer import FAMILIES

from instructgpt_jax import paths
from instructgpt_jax.data import batches, build, chats, encoding, sources, tables, tokenizer
from instructgpt_jax.validate import inputs

PAIR = ("chosen", "rejected")
USER = {"role": "user", "content": "Say hi."}


def pairs(count):
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "user": i % 3} for i in range(count)]


def compared(records):
    return [(record["prompt"], *record["completions"]) for record in records]


def write(path, rows, **options):
    names = {name: None for row in rows for name in row}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([names | row for row in rows]), path, **options)
    return f"parquet:{path}"


def expected(rows):
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


# --- parquet ---


def test_parquet_files_in_their_order_at_random_access(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_PAGE", 7)
    rows = pairs(100)
    write(tmp_path / "b.parquet", rows[40:], row_group_size=25)
    write(tmp_path / "a.parquet", rows[:40], row_group_size=1000)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows)[:0], tmp_path / "aa.parquet")
    records = sources.load((f"parquet:{tmp_path}/*.parquet",), "comparisons", 0)
    order = np.random.default_rng(0).permutation(100)
    assert compared(records[i] for i in order) == [expected(rows)[i] for i in order]
    assert records.origin(39) == f"{tmp_path}/a.parquet[39]" and records.origin(66) == f"{tmp_path}/b.parquet[26]"
    assert records[3] == {"prompt": "p3", "completions": ["c3", "r3"], "ranking": [1, 2], "user": 0}
    # Options, weights and parts as for JSONL.
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options in ("#1/3", "#!1/3#unique", "#chosen=prompt#2/3"):
        names = f"parquet:{tmp_path}/*.parquet{options}", f"jsonl:{tmp_path}/x.jsonl{options}"
        ours, theirs = (sources.load((name,), "comparisons", 0) for name in names)
        assert list(ours) == list(theirs) and np.array_equal(ours.keys, theirs.keys) and 20 < len(ours) < 80
    both = sources.load((f"parquet:{tmp_path}/a.parquet@1", f"jsonl:{tmp_path}/x.jsonl@3"), "prompts", 0)
    assert [(len(part), part.weight) for part in both.parts] == [(40, 1.0), (100, 3.0)]


def test_a_large_table_is_not_held(tmp_path, monkeypatch):
    """Each row group is read once for a pass, and again where a record is asked for that is no longer there."""
    rows = pairs(60)
    source, read = write(tmp_path / "a.parquet", rows, row_group_size=10), []
    original = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda self, k: read.append(k) or original(self, k)
    )
    records = sources.load((source,), "comparisons", 0)
    assert read == [0, 1, 2, 3, 4, 5]
    assert [records[i]["prompt"] for i in (0, 1, 59, 0)] == ["p0", "p1", "p59", "p0"]
    assert read[6:] == [0]  # the last pages are there still


def test_a_null_is_a_field_that_the_row_lacks(tmp_path):
    when, answer = datetime.date(2026, 1, 2), {"role": "assistant", "content": "Hi.", "name": "x"}
    rows = [
        {"prompt": "a", "completion": "b", "messages": None, "score": float("nan"), "day": when, "raw": b"\xff"},
        {"prompt": None, "completion": None, "messages": [USER | {"name": None}, answer], "score": 0.5, "raw": b"ab"},
    ]
    records = sources.load((write(tmp_path / "a.parquet", rows),), "demonstrations", 0)
    assert records[0] == {"prompt": "a", "completion": "b", "day": "2026-01-02"}
    assert records[1] == {"messages": [USER, answer], "score": 0.5, "raw": "ab"}
    json.dumps(list(records))


def test_bad_rows_are_named_and_counted(tmp_path):
    rows = [*pairs(3), {"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    source = write(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError, match=r"1 bad record, .*\n  .*a\.parquet\[3\]: prompt must not be empty"):
        sources.load((source,), "comparisons", 0)
    records = sources.load((source,), "comparisons", 1)
    assert len(records) == 3 and len(records.skipped) == 1 and records.left_out == {"chosen equal to rejected": 1}


def test_missing_columns_are_told_once(tmp_path):
    source = write(tmp_path / "a.parquet", [{"question": "a", "chosen": "b"}] * 50)
    told = r"no row of parquet:.*a\.parquet is a record of kind comparisons: .*a\.parquet\[0\]: missing field 'prompt'"
    with pytest.raises(ValueError, match=told + r", the record has \['chosen', 'question'\]$"):
        sources.load((source,), "comparisons", 1000)
    with pytest.raises(ValueError, match="missing field 'completion', the record has"):
        sources.load((f"{source}#prompt=question",), "demonstrations", 0)
    assert len(sources.load((f"{source}#prompt=question#completion=chosen",), "demonstrations", 0)) == 50


@pytest.mark.parametrize("damage", ["cut", "empty", "jsonl", "page"])
def test_a_damaged_file_is_refused_whatever_is_allowed(tmp_path, damage):
    path = tmp_path / "x.parquet"
    write(path, pairs(2000), row_group_size=500, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    if damage == "page":
        data[len(data) // 2] ^= 0x10
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "jsonl": b'{"prompt": "a"}\n'}.get(damage, data))
    reason = r"must be whole, its rows from \d+ on are not, got" if damage == "page" else "must be a whole parquet file"
    with pytest.raises(ValueError, match=rf"x\.parquet {reason}.*"):
        sources.load((f"parquet:{path}",), "comparisons", 10_000)


# --- what is asked before a record is read ---


def stage(tmp_path, *names):
    from configs import common

    config = common.config("reward")
    config.reward = common.rankings(1e-5, 8)
    config.models.model = common.network(size="x")
    config.data.update(comparisons=names, tokenizer=str(tmp_path))
    return config


def test_names_and_places_are_checked_first(tmp_path, monkeypatch):
    parsed = sources.parse("hf:Anthropic/hh-rlhf:train[:10%]#1/2@0.5")
    assert parsed == ("hf", "Anthropic/hh-rlhf:train[:10%]", 0.5, ("1/2",))
    assert tables.is_hf("a/b:config-1.0:test") and tables.is_hf("folder/with.dots:train")
    for wrong in ("hf:Anthropic/hh-rlhf", "hf:a:b:c:d", "hf:gs://x/y:train", "hf:a:"):
        with pytest.raises(ValueError, match=r"must be hf:ID_OR_DIR\[:CONFIG\]:SPLIT, got"):
            sources.parse(wrong)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    for name, reason in (
        (f"hf:{tmp_path}/none:train", "must name a directory that exists or a data set of the Hub, got .*/none'"),
        ("hf:runs/none:train", "must name a directory that exists or a data set of the Hub"),
        ("hf:a/b/c:train", "must name a directory that exists or a data set of the Hub"),
        (f"hf:{tmp_path}:train", r"needs the extra 'hf' \(pip install 'instructgpt-jax\[hf\]'\)"),
        ("hf:Anthropic/hh-rlhf:train", "needs the extra 'hf'"),
        (f"parquet:{tmp_path}/*.parquet", r"parquet:.*\*\.parquet must name at least one file, got none"),
        (f"parquet:{tmp_path}", r"must name files, got a folder; .*/\*\.parquet names those in it"),
    ):
        with pytest.raises(ValueError, match=rf"^config\.data\.comparisons: .*{reason}"):
            inputs.check(stage(tmp_path, name), str(tmp_path / "run"))
        with pytest.raises(ValueError, match=reason):
            sources.load((name,), "comparisons", 0)
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.expand_source("hf:~/x:train#1/2") == "hf:/home/me/x:train#1/2"
    assert paths.expand_source("parquet:~/*.parquet") == "parquet:/home/me/*.parquet"


# --- the library datasets ---


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="the extra 'hf'")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def test_saved_sets_and_directories_of_files(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_PAGE", 16)
    rows = pairs(50)
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select(range(10, 20))}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train-0.parquet", rows[:30])
    write(tmp_path / "files" / "train-1.parquet", rows[30:])
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines" / "test.jsonl").write_text(json.dumps(rows[7]) + "\n")
    for place in ("one", "two", "files", "lines"):
        records = sources.load((f"hf:{tmp_path}/{place}:train",), "comparisons", 0)
        assert compared(records) == expected(rows) and records[40]["user"] == 1
        assert records.origin(40) == f"hf:{tmp_path}/{place}:train[40]"
        part = sources.load((f"hf:{tmp_path}/{place}:train[10:20]#!1/2",), "comparisons", 0)
        rest = sources.load((f"hf:{tmp_path}/{place}:train[20%:40%]#1/2",), "comparisons", 0)
        assert sorted(compared([*part, *rest])) == sorted(expected(rows[10:20])) and len(part) and len(rest)
    assert compared(sources.load((f"hf:{tmp_path}/two:test",), "comparisons", 0)) == expected(rows[10:20])
    assert compared(sources.load((f"hf:{tmp_path}/lines:test",), "comparisons", 0)) == expected(rows[7:8])
    # A legacy column of lists stands for lists of messages.
    turns = [[USER, {"role": "assistant", "content": text}] for text in ("Hi.", "No.")]
    features = datasets.Features(
        dict.fromkeys(("chosen", "rejected"), {"role": datasets.List(datasets.Value("string")),
                                               "content": datasets.List(datasets.Value("string"))})
    )  # fmt: skip
    columns = [{key: [turn[key] for turn in side] for key in ("role", "content")} for side in turns]
    datasets.Dataset.from_list([dict(zip(("chosen", "rejected"), columns, strict=True))], features).save_to_disk(
        tmp_path / "columns"
    )
    records = sources.load((f"hf:{tmp_path}/columns:train",), "comparisons", 0)
    assert records[0] == {"messages": [USER], "completions": ["Hi.", "No."], "ranking": [1, 2]}


def test_what_cannot_be_loaded_is_one_line(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    whole = datasets.Dataset.from_list(pairs(5))
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.parquet", pairs(3))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"prompt": "a\n')
    (tmp_path / "nothing").mkdir()
    for name, reason in (
        ("some-owner/no-such-set:train",
         r"must be in the cache of datasets, since HF_HUB_OFFLINE is set: load it once with a network, got \w+: .*"),
        (f"{tmp_path}/saved:valid", "with that configuration and split, got ValueError: Unknown split"),
        (f"{tmp_path}/saved:other:train", "no configurations, got 'other'"),
        (f"{tmp_path}/files:valid", "with that configuration and split, got ValueError: Unknown split"),
        (f"{tmp_path}/files:other:train", "with that configuration and split, got ValueError: BuilderConfig 'other'"),
        (f"{tmp_path}/broken:train", "must be a directory that datasets can read"),
        (f"{tmp_path}/nothing:train", "must be a directory that datasets can read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^hf:{re.escape(name)} .*{reason}") as error:
            sources.load((f"hf:{name}",), "comparisons", 10)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^no row of hf:.* is a record of kind tasks: hf:.*\[0\]: missing field"):
        sources.load((f"hf:{tmp_path}/files:train",), "tasks", 0)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def unreachable(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    expected = "^hf:a/b:train must be a directory, or a data set of the Hub that can be fetched from here, got Connec"
    with pytest.raises(ValueError, match=f"{expected}tionError: no route$"):
        sources.load(("hf:a/b:train",), "comparisons", 0)


# --- one preference set in five forms ---


def dialogues(count):
    """Messages that both answers have in common, and the two answers."""
    for i in range(count):
        said = [("user", f"Where is fox {i}?"), ("assistant", f"Near river {i}.\n\nWhy?"), ("user", "I ask.")]
        messages = [{"role": role, "content": content} for role, content in said[: 1 + 2 * (i % 2)]]
        yield messages, f"It is near the old river, {i}.", f"It is near{'' if i % 3 else ' the hen'}."


def rendered(messages):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages) + "\n\nAssistant:"


def in_form(form, folder):
    """A source with the same preference set in one of the forms."""
    sets = list(dialogues(24))
    texts = [(rendered(messages), f" {chosen}", f" {rejected}") for messages, chosen, rejected in sets]
    turns = [
        {name: [*messages, {"role": "assistant", "content": text}] for name, text in zip(PAIR, answers, strict=True)}
        for messages, *answers in sets
    ]
    rows = {
        "ours": [{"prompt": prompt, "completions": list(both), "ranking": [1, 2]} for prompt, *both in texts],
        "texts": [{"chosen": prompt + one, "rejected": prompt + two} for prompt, one, two in texts],
        "texts-with-prompt": [{"prompt": prompt, "chosen": one, "rejected": two} for prompt, one, two in texts],
        "messages": turns,
        "messages-with-prompt": [
            {"prompt": row["chosen"][:-1]} | {name: row[name][-1:] for name in PAIR} for row in turns
        ],
    }[form.partition("/")[2]]
    container = form.partition("/")[0]
    if container == "parquet":
        return write(folder / "x.parquet", rows, row_group_size=10)
    if container == "hf":
        pytest.importorskip("datasets", reason="the extra 'hf'").Dataset.from_list(rows).save_to_disk(folder / "saved")
        return f"hf:{folder}/saved:train"
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder}/x.jsonl"


def batches_of(source, folder):
    FAMILIES["byte-level"][0](folder / "tokenizer")
    own = tokenizer.load(folder / "tokenizer", chats.Chat("human_assistant", ()))
    records = sources.load((source,), "comparisons", 0)
    order, rows = batches.Order(7, 3, 6), batches.Rows(256, 2)
    made = batches.comparisons(records, own, order, rows, encoding.Allowed(0, 0), 2, True)
    return [made[i] for i in range(len(made))], made.read["comparisons"].fingerprint


@pytest.mark.parametrize(
    "form",
    ["jsonl/texts", "jsonl/texts-with-prompt", "jsonl/messages", "jsonl/messages-with-prompt"]
    + ["parquet/texts", "parquet/messages", "hf/texts", "hf/messages"],
)
def test_the_same_preferences_in_any_form_are_the_same_batches(form, tmp_path):
    (tmp_path / "ours").mkdir()
    expected, fingerprint = batches_of(in_form("jsonl/ours", tmp_path / "ours"), tmp_path)
    found, same = batches_of(in_form(form, tmp_path), tmp_path)
    assert len(found) == len(expected) == 12 and same == fingerprint
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)
    assert sum(int((one["tokens"] > 0).sum()) for one in found) > 1000


# --- TFDS ---


def prepare(name, version, features, rows, data_dir):
    """Writes a TFDS set of that name as ArrayRecord, as `tfds build --file_format=array_record` would."""
    import tensorflow_datasets as tfds
    from etils import epath

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=features)

    def generate(self, manager):
        return {"train": enumerate(rows)}

    content = {
        "VERSION": tfds.core.Version(version), "name": name, "code_path": epath.Path(__file__), "_info": info,
        "_split_generators": generate, "_generate_examples": None,
    }  # fmt: skip
    builder = type(name, (tfds.core.GeneratorBasedBuilder,), content, skip_registration=True)
    builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


CATALOG = [  # name, options, kind, a row in the features of the catalog's own builder, fields of its record
    ("databricks_dolly", "#prompt=instruction#completion=response", "demonstrations",
     {"instruction": "Say hi.", "context": "", "response": "Hi.", "category": "chat"},
     {"prompt": "Say hi.", "completion": "Hi."}),
    ("natural_instructions", "#prompt=input#completion=output", "demonstrations",
     {"input": "Say hi.", "output": "Hi.", "definition": "d", "id": "i", "source": "s", "task_name": "t"},
     {"prompt": "Say hi.", "completion": "Hi.", "definition": "d"}),
    ("samsum", "#prompt=dialogue#unique", "prompts", {"dialogue": "A: Hi.", "summary": "Hi.", "id": "i"},
     {"prompt": "A: Hi.", "id": "i"}),
    ("tiny_shakespeare", "", "pretraining", {"text": "To be."}, {"text": "To be."}),
]  # fmt: skip


@pytest.mark.parametrize("name, options, kind, row, record", CATALOG, ids=[case[0] for case in CATALOG])
def test_sets_of_the_catalog(tmp_path, name, options, kind, row, record):
    import tensorflow_datasets as tfds

    catalog = tfds.builder(name, data_dir=str(tmp_path / "none"))
    prepare(name, str(catalog.version), catalog.info.features, [row, row], tmp_path)
    records = sources.load((f"tfds:{name}:train{options}",), kind, 0, data_dir=str(tmp_path))
    assert len(records) == (1 if "unique" in options else 2)
    assert records[0] == records[0] | record and records.origin(0) == f"tfds:{name}:train[0]"


def test_pairs_in_tfds_are_all_read_first(tmp_path):
    import tensorflow_datasets as tfds

    turns = tfds.features.Sequence({"role": tfds.features.Text(), "content": tfds.features.Text()})
    features = tfds.features.FeaturesDict({"chosen": turns, "rejected": turns})
    answers = {text: [USER, {"role": "assistant", "content": text}] for text in ("Hi.", "No.", "Yes.")}
    compared = (("Hi.", "No."), ("Hi.", "Hi."), ("Yes.", "No."))
    rows = [{"chosen": answers[one], "rejected": answers[two]} for one, two in compared]
    prepare("dialogue_pairs", "1.0.0", features, rows, tmp_path)
    records = sources.load(("tfds:dialogue_pairs",), "comparisons", 0, data_dir=str(tmp_path))
    assert sorted(r["completions"] for r in records) == [["Hi.", "No."], ["Yes.", "No."]]
    assert records[0]["messages"] == [USER] and records.left_out == {"chosen equal to rejected": 1}


def test_array_record_of_any_source(tmp_path):
    answer = {"role": "assistant", "content": "Hi."}
    rows = {
        "comparisons": [
            {"prompt": "a", "chosen": "b", "rejected": ""},
            {"messages": [USER], "chosen": "Hi.", "rejected": "c", "margin": 0.5},
        ],
        "demonstrations": [{"prompt": "a", "completion": "b"}, {"messages": [USER, answer], "user": 3}],
    }
    for kind in rows:
        source = write(tmp_path / f"{kind}.parquet", rows[kind])
        build.main([f"--kind={kind}", f"--input={source}", f"--data_dir={tmp_path}/sets"])
        sets = (sources.load((name,), kind, 0, data_dir=f"{tmp_path}/sets") for name in (source, f"tfds:{kind}"))
        written, read = (sorted(json.dumps(record, sort_keys=True) for record in records) for records in sets)
        assert written == read and len(read) == len(rows[kind])
