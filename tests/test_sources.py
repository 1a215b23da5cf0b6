"""Reading records: sources, weights, schemas, and what every kind of damage is reported as."""

import collections
import gzip
import json
import random
import re
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from bucket import install

from instructgpt_jax.data import datasets, jsonl, records, schema, sources

DEMONSTRATION = {"prompt": "Say hi.", "completion": "Hi."}
COMPARISON = {"prompt": "Say hi.", "completions": ["Hi.", "No.", "Hey"], "ranking": [1, 3, 1]}


def write(path, records, newline="\n"):
    text = newline.join(record if isinstance(record, str) else json.dumps(record) for record in records)
    data = text.encode() + newline.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return f"jsonl:{path}"


def rows(count, tag="p"):
    return [{"prompt": f"{tag}{i}", "user": i % 3} for i in range(count)]


# --- what is read ---


def test_parse():
    assert sources.parse("jsonl:a/*.jsonl.gz@0.25") == ("jsonl", "a/*.jsonl.gz", 0.25, ())
    assert sources.parse("tfds:c4/en:3.0.1:train[:1%]") == ("tfds", "c4/en:3.0.1:train[:1%]", None, ())
    assert sources.parse("jsonl:me@home/x.jsonl") == ("jsonl", "me@home/x.jsonl", None, ())
    assert sources.parse("simulated:prompts:valid@2") == ("simulated", "prompts:valid", 2.0, ())
    assert sources.parse("jsonl:a#b.jsonl#1/2#text=completion@3") == (
        "jsonl", "a#b.jsonl", 3.0, ("1/2", "text=completion"),
    )  # fmt: skip
    for wrong in ("a.jsonl", "csv:a.csv", "jsonl:", "jsonl:a@0", "jsonl:a@-1", "jsonl:a@nan", "jsonl:@1", "jsonl:#1/2"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            sources.parse(wrong)
    assert sources.with_option("jsonl:a#unique@0.5", "!1/5") == "jsonl:a#unique#!1/5@0.5"
    for wrong in ("jsonl:a#0/2", "jsonl:a#!3/2"):
        with pytest.raises(ValueError, match="from 1 to N"):
            sources.parse(wrong)


def test_parts_have_every_prompt_once_and_do_not_follow_the_validation_split(tmp_path):
    write(tmp_path / "p.jsonl", [{"prompt": f"p{i % 600}", "n": i} for i in range(1200)])
    name = f"jsonl:{tmp_path}/p.jsonl"
    whole = sources.load((name,), "prompts", 0)
    first, second = (sources.load((f"{name}#{part}/2",), "prompts", 0) for part in (1, 2))
    assert sorted(record["n"] for part in (first, second) for record in part) == list(range(1200))
    prompts = [{record["prompt"] for record in part} for part in (first, second)]
    assert not prompts[0] & prompts[1] and 250 < len(prompts[0]) < 350
    rest = sources.load((f"{name}#!1/2",), "prompts", 0)
    assert [record["n"] for record in rest] == [record["n"] for record in second]
    both = sources.load((sources.with_option(f"{name}#!1/5@2", "unique"),), "prompts", 0)
    assert len(both) == len({record["prompt"] for record in both}) and 440 < len(both) < 520
    valid = {record["prompt"] for record in datasets.split(whole, 0.5)[1]}
    assert 0.4 < len(prompts[0] & valid) / len(prompts[0]) < 0.6
    assert [first.origin(i) for i in range(2)] == [f"{tmp_path}/p.jsonl:{first[i]['n'] + 1}" for i in range(2)]


def test_demonstrations_as_text_and_as_prompts(tmp_path):
    write(tmp_path / "d.jsonl", [{"prompt": f"p{i % 40}", "completion": f"c{i}"} for i in range(80)])
    text = sources.load((f"jsonl:{tmp_path}/d.jsonl#text=completion",), "pretraining", 0)
    assert [record["text"] for record in text] == [f"c{i}" for i in range(80)]
    prompts = sources.load((f"jsonl:{tmp_path}/d.jsonl#unique",), "prompts", 0)
    assert [record["completion"] for record in prompts] == [f"c{i}" for i in range(40)]
    held_out = {record["prompt"] for record in datasets.split(prompts, 0.3)[1]}
    assert held_out == {record["prompt"] for record in datasets.split(text, 0.3)[1]} and held_out
    odd = sources.load(
        (write(tmp_path / "o.jsonl", [{"text": f"{i}", "prompt": None} for i in range(9)]),), "pretraining", 0
    )
    assert sum(len(side) for side in datasets.split(odd, 0.5)) == 9
    simulated = sources.load(("simulated:demonstrations:5#text=prompt",), "pretraining", 0)
    assert all(record["text"] == record["prompt"] for record in simulated) and len(simulated) == 5
    with pytest.raises(ValueError, match="missing field 'text'"):
        sources.load((f"jsonl:{tmp_path}/d.jsonl#text=answer",), "pretraining", 0)


def test_plain_and_gzip_in_file_order_with_origins(tmp_path):
    write(tmp_path / "b.jsonl", rows(3, "b"))
    write(tmp_path / "a.jsonl.gz", rows(2, "a"))
    records = sources.load((f"jsonl:{tmp_path}/*.jsonl*",), "prompts", 0)
    assert [record["prompt"] for record in records] == ["a0", "a1", "b0", "b1", "b2"]
    assert records[-1] == records[4] == {"prompt": "b2", "user": 2}
    assert records.origin(3) == f"{tmp_path}/b.jsonl:2" and records.origin(0) == f"{tmp_path}/a.jsonl.gz:1"
    with pytest.raises(IndexError):
        records[5]


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz"])
def test_blank_lines_byte_order_mark_crlf_and_no_last_newline(tmp_path, name):
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "\xc3\xa9"}'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    records = sources.load((f"jsonl:{tmp_path}/{name}",), "prompts", 0)
    assert [record["prompt"] for record in records] == ["a", "é"]
    assert records.origin(1).endswith(f"{name}:4")


def test_several_sources_are_one_sequence_with_parts(tmp_path):
    first, second = write(tmp_path / "a.jsonl", rows(3, "a")), write(tmp_path / "b.jsonl", rows(2, "b"))
    records = sources.load((first, second), "prompts", 0)
    assert [r["prompt"] for r in records] == ["a0", "a1", "a2", "b0", "b1"]
    assert records.origin(3) == f"{tmp_path}/b.jsonl:1"
    weighted = sources.load((first + "@3", second + "@1"), "prompts", 0)
    assert [(len(part), part.weight) for part in weighted.parts] == [(3, 3.0), (2, 1.0)]
    with pytest.raises(ValueError, match="either every data source or none"):
        sources.load((first + "@3", second), "prompts", 0)


def test_a_name_with_glob_characters_is_taken_literally(tmp_path):
    write(tmp_path / "a[1].jsonl", rows(2))
    assert len(sources.load((f"jsonl:{tmp_path}/a[1].jsonl",), "prompts", 0)) == 2


def test_bucket_files_are_found_and_read(tmp_path, monkeypatch):
    bucket = install(monkeypatch)
    bucket.makedirs("/data/raw", exist_ok=True)
    for name, data in (("b.jsonl", b'{"prompt": "b"}\n'), ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n'))):
        bucket.pipe_file(f"/data/raw/{name}", data)
    records = sources.load(("jsonl:gs://data/raw/*.jsonl*",), "prompts", 0)
    assert [record["prompt"] for record in records] == ["a", "b"]
    assert records.origin(1) == "gs://data/raw/b.jsonl:1"
    assert len(sources.load(("jsonl:gs://data/raw/b.jsonl",), "prompts", 0)) == 1
    with pytest.raises(ValueError, match="gs://data/none.jsonl must name at least one file"):
        sources.load(("jsonl:gs://data/none.jsonl",), "prompts", 0)
    table = pyarrow.Table.from_pylist([{"prompt": f"p{i}"} for i in range(30)])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=10)
    bucket.pipe_file("/data/raw/c.parquet", (tmp_path / "c.parquet").read_bytes())
    records = sources.load(("parquet:gs://data/raw/*.parquet",), "prompts", 0)
    assert [record["prompt"] for record in records] == [f"p{i}" for i in range(30)]
    assert records.origin(12) == "gs://data/raw/c.parquet[12]"
    with pytest.raises(ValueError, match="parquet:gs://data/none must name at least one file, got none"):
        sources.load(("parquet:gs://data/none",), "prompts", 0)


def test_simulated_records_are_checked_too(monkeypatch):
    made = [{"prompt": "a"}, {"prompt": 3}, {"prompt": "b"}]
    simulated = types.SimpleNamespace(records=lambda name: made if name == "prompts:train" else [])
    monkeypatch.setitem(sys.modules, "instructgpt_jax.simulated", simulated)
    monkeypatch.setattr("instructgpt_jax.simulated", simulated, raising=False)
    records = sources.load(("simulated:prompts:train",), "prompts", 1)
    assert [record["prompt"] for record in records] == ["a", "b"]
    assert records.origin(1) == "simulated:prompts:train[2]"
    with pytest.raises(ValueError, match=r"simulated:prompts:train\[1\]: prompt must be a string, got 3"):
        sources.load(("simulated:prompts:train",), "prompts", 0)


def test_optional_fields_pass_through_and_the_last_of_equal_keys_counts(tmp_path):
    record = {**COMPARISON, "group": "held-out", "user": "u7", "metadata": {"toxic": [False, None, 2.5]}}
    source = write(
        tmp_path / "a.jsonl", [record, '{"prompt": 1, "prompt": "x", "completions": ["", "b"], "ranking": [2, 1]}']
    )
    records = sources.load((source,), "comparisons", 0)
    assert records[0] == record and records[1]["prompt"] == "x"


# --- what is refused ---

# fmt: off
BAD_LINES = [
    ("demonstrations", '{"prompt": "a", "completion": "b"', "invalid JSON"),
    ("demonstrations", '{"prompt": "a", "completion": NaN}', "NaN is not a JSON value"),
    ("demonstrations", "[" * 100_000, "nested too deeply"),
    ("demonstrations", '["a", "b"]', "a record must be a JSON object, got list"),
    ("demonstrations", {"prompt": "a"}, "missing field 'completion'"),
    ("demonstrations", {"prompt": "a", "completion": ""}, "completion must not be empty"),
    ("demonstrations", {"prompt": ["a"], "completion": "b"}, r"prompt must be a string, got \['a'\]"),
    ("demonstrations", '{"prompt": "\\ud800", "completion": "b"}', "half of a surrogate pair"),
    ("prompts", '{"prompt": "a", "user": "\\ud83d"}', "user holds half of a surrogate pair"),
    ("prompts", '{"prompt": "a", "m": [{"x": ["b", "\\uDE00"]}]}', r"m\[0\]\.x\[1\] holds half of a surrogate pair"),
    ("prompts", '{"prompt": "a", "x\\udfff": 1}', r"the name of field 'x\\udfff' holds half of a surrogate pair"),
    ("comparisons", '{"prompt": "a", "completions": ["b", "c"], "ranking": [1, 2], "group": "\\uDBFF\\uD83D"}',
     "group holds half of a surrogate pair"),
    ("prompts", {"prompt": None}, "prompt must be a string, got None"),
    ("prompts", {"prompt": "a", "user": 1.5}, "user must be a string or an integer, got 1.5"),
    ("prompts", '{"prompt": "a", "n": ' + "9" * 5000 + "}", "integer string conversion"),
    ("pretraining", {"prompt": "a"}, "missing field 'text'"),
    ("comparisons", {**COMPARISON, "completions": "Hi"}, "completions must be a list, got 'Hi'"),
    ("comparisons", {**COMPARISON, "completions": ["Hi"], "ranking": [1]}, "at least 2 texts, got 1"),
    ("comparisons", {**COMPARISON, "completions": ["a", "b", 7]}, r"completions\[2\] must be a string, got 7"),
    ("comparisons", {**COMPARISON, "ranking": [1, 2]}, "one rank for each of 3 completions, got 2"),
    ("comparisons", {**COMPARISON, "ranking": [0, 1, 2]}, r"ranking\[0\] must be a positive integer"),
    ("comparisons", {**COMPARISON, "ranking": [1, 2.0, 3]}, r"ranking\[1\] must be a positive integer .* got 2.0"),
    ("comparisons", {**COMPARISON, "ranking": [1, True, 3]}, r"ranking\[1\] must be a positive integer"),
    ("comparisons", {**COMPARISON, "ranking": [2, 3, 3]}, r"must lie in 1\.\.3 and hold a 1"),
    ("comparisons", {**COMPARISON, "ranking": [1, 2, 9]}, r"must lie in 1\.\.3 and hold a 1"),
]
# fmt: on


@pytest.mark.parametrize("kind, line, reason", BAD_LINES, ids=[reason[:40] for _, _, reason in BAD_LINES])
def test_a_malformed_record_is_named_with_file_and_line(tmp_path, kind, line, reason):
    good = {"demonstrations": DEMONSTRATION, "comparisons": COMPARISON, "prompts": {"prompt": "a"}}.get(
        kind, {"text": "a"}
    )
    source = write(tmp_path / "x.jsonl", [good, "", line, good])
    with pytest.raises(ValueError, match=rf"x\.jsonl:3: .*{reason}"):
        sources.load((source,), kind, 0)
    records = sources.load((source,), kind, 1)
    assert len(records) == 2 and records.origin(1).endswith("x.jsonl:4")
    assert len(records.skipped) == 1 and re.search(rf"x\.jsonl:3: .*{reason}", records.skipped[0])


def test_invalid_utf8_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: invalid UTF-8 at byte 12"):
        sources.load((f"jsonl:{tmp_path}/x.jsonl",), "prompts", 0)


def test_whole_pairs_and_what_only_looks_like_an_escape_are_text(tmp_path):
    lines = [r'{"prompt": "\ud83d\ude00", "\uD83D\uDE00": 1}', r'{"prompt": "C:\\ud800", "user": "a"}']
    write(tmp_path / "x.jsonl", lines)
    records = sources.load((f"jsonl:{tmp_path}/x.jsonl",), "prompts", 0)
    assert list(records) == [{"prompt": "😀", "😀": 1}, {"prompt": r"C:\ud800", "user": "a"}]


@pytest.mark.parametrize("name", ["f.txt", "f.txt.gz"])
def test_plain_text_is_read_as_jsonl_is(tmp_path, name):
    data = b"\xef\xbb\xbfone\r\n\n  \ntwo\xe2\x80\xa8three\x0cfour\rfive\n caf\xc3\xa9 "
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert list(jsonl.texts(f"{tmp_path}/{name}")) == [(1, "one"), (4, "two\u2028three\x0cfour\rfive"), (5, " café ")]


@pytest.mark.parametrize("ranking", [[1, 3, 3], [1, 1, 3], [1, 2, 2], [2, 1, 3], [1, 1, 1]])
def test_ranks_with_ties_and_gaps_are_fine(ranking):
    schema.validate({**COMPARISON, "ranking": ranking}, "comparisons")


@pytest.mark.parametrize(
    "name, data",
    [("e.jsonl", b""), ("e.jsonl", b"\n \n"), ("e.jsonl.gz", gzip.compress(b"", mtime=0)), ("e.jsonl.gz", b"")],
)
def test_an_empty_file_is_an_error(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}:1: the file is empty"):
        sources.load((f"jsonl:{tmp_path}/{name}",), "prompts", 0)
    with pytest.raises(ValueError, match="has no valid record"):
        sources.load((f"jsonl:{tmp_path}/{name}",), "prompts", 9)


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none-\\*.jsonl must name at least one file"):
        sources.load((f"jsonl:{tmp_path}/none-*.jsonl",), "prompts", 9)


@pytest.mark.parametrize("damage", ["cut", "flip", "not gzip", "tail"])
def test_a_damaged_gzip_file_is_refused_whatever_is_allowed(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    source = write(path, [{"prompt": str(random.Random(i).random())} for i in range(2000)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 0x10
    elif damage == "not gzip":
        data = b'{"prompt": "plain"}\n'
    else:
        data += b"rubbish"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz:\d+: the gzip data is damaged or cut"):
        sources.load((source,), "prompts", 10_000)


def test_the_allowance_is_for_all_sources_together_and_the_error_lists_ten(tmp_path):
    first = write(tmp_path / "a.jsonl", ["{", {"prompt": "a"}])
    second = write(tmp_path / "b.jsonl", [{"prompt": "b"}] + ["{"] * 14)
    with pytest.raises(ValueError, match=r"15 bad records, .* allows 14") as error:
        sources.load((first, second), "prompts", 14)
    assert str(error.value).count(".jsonl:") == 10 and "… and 5 more" in str(error.value)
    records = sources.load((first, second), "prompts", 15)
    assert len(records) == 2 and len(records.skipped) == 15 and len(records.parts[0].skipped) == 1


def test_calls_that_make_no_sense_are_refused(tmp_path):
    source = write(tmp_path / "a.jsonl", rows(1))
    for wrong in ((), source):
        with pytest.raises(ValueError, match="must be a non-empty tuple of strings"):
            sources.load(wrong, "prompts", 0)
    with pytest.raises(ValueError, match="kind must be one of"):
        sources.load((source,), "prompt", 0)
    with pytest.raises(ValueError, match=r"tfds:no_such_set must be prepared as ArrayRecord"):
        sources.load(("tfds:no_such_set",), "prompts", 0, data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="a tfds source must be"):
        sources.load(("tfds:no such set",), "prompts", 0, data_dir=str(tmp_path))


# --- real data ---

REAL = [  # kind, files, records, some fact of the set
    ("comparisons", "comparisons/hh_rlhf_*.gz", 6708, lambda r: {len(x["ranking"]) for x in r} == {2}),
    ("comparisons", "comparisons/oasst_kwise*.gz", 143, lambda r: {len(x["ranking"]) for x in r} <= set(range(2, 10))),
    ("comparisons", "comparisons/pandalm*.gz", 600, lambda r: all(len(x["annotators"]) == 3 for x in r)),
    ("comparisons", "comparisons/gsm8k*.gz", 973, lambda r: any(len(set(x["ranking"])) == 1 for x in r)),
    ("demonstrations", "demonstrations/dolly*.gz", 4187, lambda r: all(x["source"] == "dolly" for x in r)),
    ("demonstrations", "demonstrations/e2e*.gz", 7040, lambda r: r[0]["prompt"].startswith("name[")),
    ("pretraining", "pretrain/wikitext2*.gz", 60, lambda r: max(len(x["text"]) for x in r) > 10_000),
    ("pretraining", "pretrain/c4*.gz", 1000, lambda r: all(x["text"].strip() for x in r)),
    ("prompts", "restricted/oasst2_animals*.gz", 549, lambda r: all(x["user"].startswith("u") for x in r)),
]


@pytest.mark.parametrize("kind, files, count, fact", REAL, ids=[files for _, files, _, _ in REAL])
def test_real_files_are_read_whole(shared_data, kind, files, count, fact):
    records = sources.load((f"jsonl:{shared_data}/{files}",), kind, 0)
    lines = sum(len(gzip.decompress(path.read_bytes()).splitlines()) for path in shared_data.glob(files))
    assert len(records) == count == lines and fact(records)
    assert not records.skipped


def corrupt(rng, data, count):
    """`data` (the bytes of `count` lines) damaged in one way; the way, and the lines that may be reported for it."""
    lines = data.split(b"\n")[:count]
    line = rng.randrange(count)
    way = rng.choice(["flip", "cut", "remove", "gzip"])
    if way == "flip":  # any bit of any byte, the newline among them: then two lines become one
        place = rng.randrange(len(lines[line]) + 1)
        whole = bytearray(b"\n".join(lines) + b"\n")
        whole[sum(len(before) + 1 for before in lines[:line]) + place] ^= 1 << rng.randrange(8)
        return way, bytes(whole), {line + 1, line + 2}
    if way == "cut":
        lines[line] = lines[line][: rng.randrange(len(lines[line]))]
    elif way == "remove":
        record = json.loads(lines[line])
        del record[rng.choice(sorted(record))]
        lines[line] = json.dumps(record).encode()
    whole = b"\n".join(lines) + b"\n"
    if way == "gzip":
        packed = bytearray(gzip.compress(whole))
        if rng.random() < 0.5:
            packed = packed[: rng.randrange(3, len(packed))]
        else:
            packed[rng.randrange(10, len(packed))] ^= 1 << rng.randrange(8)
        return way, bytes(packed), set(range(1, count + 2))
    return way, whole, {line + 1}


def well_formed(record, kind):
    """The schema once more, in other words."""
    texts = [record[field] for field in ("prompt", "completion", "text") if field in record]
    if kind == "comparisons":
        completions, ranks = record["completions"], record["ranking"]
        texts += completions
        assert len(completions) == len(ranks) >= 2 and set(map(type, ranks)) == {int}
        assert 1 in ranks and all(1 <= rank <= len(ranks) for rank in ranks)
    assert texts and all(type(text) is str and text.encode("utf-8") is not None for text in texts)


def test_two_hundred_damaged_files_are_reported_or_harmless(shared_data, tmp_path):
    outcomes = collections.Counter()
    path = tmp_path / "damaged.jsonl"
    for seed in range(200):
        rng = random.Random(seed)
        kind, files, _, _ = rng.choice(REAL)
        original = gzip.decompress(rng.choice(sorted(shared_data.glob(files))).read_bytes())
        count = 12
        way, data, lines = corrupt(rng, b"\n".join(original.split(b"\n")[:count]), count)
        path.write_bytes(data)
        try:
            records = sources.load((f"jsonl:{path}",), kind, 0)
        except ValueError as error:
            reported = [int(line) for line in re.findall(re.escape(str(path)) + r":(\d+):", str(error))]
            assert reported and set(reported) <= lines, (seed, way, lines, str(error))
            outcomes[way, "reported"] += 1
        else:
            assert len(records) >= count - 1, (seed, way)
            for record in records:
                well_formed(record, kind)
            outcomes[way, "harmless"] += 1
    assert sum(outcomes.values()) == 200
    assert outcomes["cut", "harmless"] <= 2, outcomes  # only a cut at the very start leaves a blank line
    assert outcomes["gzip", "harmless"] <= 3, outcomes  # only bits of the header that nobody reads
    assert outcomes["flip", "reported"] > 5 and outcomes["remove", "reported"] > 20, outcomes


# --- dialogues ---

USER, ANSWER = {"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}


@pytest.mark.parametrize(
    "kind, record, complaint",
    [
        ("demonstrations", {"messages": [USER]}, "must end with the assistant's turn, got role 'user'"),
        ("demonstrations", {"messages": [USER, ANSWER], "completion": "Hi."}, "must end with another's turn"),
        ("demonstrations", {"messages": [USER, ANSWER | {"content": ""}]}, r"messages\[1\] must have a role, and as"),
        ("prompts", {"messages": [ANSWER]}, "must begin with another's turn"),
        ("tasks", {"messages": [USER, ANSWER]}, "must end with another's turn"),
        ("prompts", {"messages": [USER], "prompt": "Say hi."}, "prompt or messages, got both"),
        ("prompts", {"messages": []}, "at least one message"),
        ("prompts", {"messages": [{"role": "user"}]}, r"messages\[0\] must have the field 'content'"),
        ("prompts", {"messages": ["Say hi."]}, r"messages\[0\] must be an object"),
        ("prompts", {"messages": [USER | {"content": ["hi"]}]}, r"messages\[0\].content must be a string"),
        ("comparisons", {"messages": [USER]}, "missing field 'completions'"),
    ],
)
def test_messages_that_are_refused(kind, record, complaint):
    with pytest.raises(ValueError, match=complaint):
        schema.validate(record, kind)


def test_a_dialogue_and_its_parts_are_split_by_their_opening():
    system, more = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Again."}
    schema.validate({"messages": [system, USER, ANSWER | {"mood": "glad"}]}, "demonstrations")
    schema.validate({"messages": [USER], "completions": ["Hi.", "No."], "ranking": [1, 2]}, "comparisons")
    forms = (
        {"messages": [USER, ANSWER, more]},
        {"messages": [USER, ANSWER, more, ANSWER]},
        {"messages": [system | {"content": ""}, USER], "completion": "Hi."},
        {"prompt": "Say hi."},
    )
    assert len({records.keys_of(form) for form in forms}) == 1
    assert records.about({"messages": [system, USER]}) not in ("Say hi.", "Be brief.")
    assert records.about({"messages": "a column of a crawl", "text": "Once."}) == "Once."
