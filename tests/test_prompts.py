"""The paper's prompt pipeline: each step alone, their report together, and the personal-information patterns."""

import collections
import gzip
import json
import pathlib
import random
import time

import pytest
from bucket import install

from configs import prompts as prompts_config
from instructgpt_jax import main, splits
from instructgpt_jax.data import pii, prompt_tables, prompts, sources

LABELLED = pathlib.Path(__file__).with_name("pii_labelled.jsonl")
SETTINGS = dict(
    prefix_chars=40,
    max_per_user=3,
    split=prompts.Split("key", 0.3, 0.1),
    max_tokens=12,
    count_tokens=lambda texts: [len(text.split()) for text in texts],
    language_sample=100,
)


def as_records(texts, user=None):
    return [{"prompt": text} | ({} if user is None else {"user": user}) for text in texts]


# --- deduplicate ---


def test_a_shared_prefix_of_the_length_asked_for_is_a_duplicate():
    texts = ["0123456789 a", "0123456789 b", "012345678X c", "0123456789", "012345678"]
    kept = prompts.deduplicate(as_records(texts), 10)
    assert [record["prompt"] for record in kept] == ["0123456789 a", "012345678X c", "012345678"]
    assert len(prompts.deduplicate(as_records(texts), 12)) == 5


def test_space_and_case_do_not_count_and_equal_short_prompts_are_duplicates():
    kept = prompts.deduplicate(as_records(["Hi  there", "hi\nthere ", "hi there you"]), 50)
    assert [record["prompt"] for record in kept] == ["Hi  there", "hi there you"]


def test_deduplicate_agrees_with_comparing_all_pairs():
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab", k=rng.randrange(1, 12))) for _ in range(300)]

    def common(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    for threshold in (3, 5, 8):
        expected = []
        for text in texts:
            if not any(text == other or common(text, other) >= threshold for other in expected):
                expected.append(text)
        assert [record["prompt"] for record in prompts.deduplicate(as_records(texts), threshold)] == expected


def test_deduplicate_takes_linear_time():
    def seconds(count):
        words = [" ".join(random.Random(i % (count // 2)).choices("abcdefgh", k=100)) for i in range(count)]
        start = time.perf_counter()
        assert len(prompts.deduplicate(as_records(words), 200)) == count // 2
        return time.perf_counter() - start

    seconds(1000)
    small, large = min(seconds(2000) for _ in range(3)), min(seconds(16_000) for _ in range(3))
    assert large < 8 * 4 * small  # a quadratic method takes 64 times as long


# --- users ---


def test_at_most_so_many_prompts_a_user_and_the_first_stay():
    records = (
        as_records(["a", "b", "c"], 7)
        + as_records(["d", "e"], "8")
        + as_records(["f", "g", "h"])
        + as_records("i", "7")
    )
    kept = prompts.cap_per_user(records, 2)
    assert [record["prompt"] for record in kept] == list("abdefgh")


def test_a_user_is_in_one_split_and_stays_there():
    shares = dict(valid_share=0.3, test_share=0.1)
    users = [f"u{i}" for i in range(4000)]
    first = {user: splits.split_of({"prompt": "a", "user": user}, "key", **shares) for user in users}
    again = {user: splits.split_of({"prompt": "another", "user": user}, "key", **shares) for user in reversed(users)}
    assert first == again
    counts = collections.Counter(first.values())
    for name, share in (("train", 0.6), ("valid", 0.3), ("test", 0.1)):
        assert abs(counts[name] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    other = {user: splits.split_of({"prompt": "a", "user": user}, "other key", **shares) for user in users}
    moved = sum(first[user] != other[user] for user in users) / 4000
    assert abs(moved - (1 - 0.36 - 0.09 - 0.01)) < 0.04  # as two independent draws differ
    larger = {user: splits.split_of({"prompt": "a", "user": user}, "key", 0.4, 0.1) for user in users}
    assert {(first[u], larger[u]) for u in users if first[u] != larger[u]} == {("train", "valid")}


PINNED = ["valid" if i in (3, 6, 9) else "train" for i in range(12)]


def test_the_split_of_a_user_is_the_same_in_every_release():
    pinned = [splits.split_of({"prompt": "a", "user": i}, "key", 0.32, 0.06) for i in range(12)]
    assert pinned == PINNED
    assert splits.split_of({"prompt": "a", "user": "5"}, "key", 0.32, 0.06) == PINNED[5]


# --- personal information ---


def test_patterns_on_the_labelled_texts():
    rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    hits = misses = false = 0
    for row in rows:
        found = {finding.kind for finding in pii.find(row["text"])}
        hits += len(found & set(row["kinds"]))
        misses += len(set(row["kinds"]) - found)
        false += len(found - set(row["kinds"]))
    assert len(rows) >= 90 and sum(not row["kinds"] for row in rows) >= 40
    precision, recall = hits / (hits + false), hits / (hits + misses)
    print(f"precision {precision:.3f} recall {recall:.3f}")
    assert precision >= 0.94 and recall >= 0.92  # 0.945 and 0.929, as the docstring of data/pii.py states


def test_findings_tell_where():
    text = "mail a.b@example.org or call +1 212 555 0147"
    assert [(f.kind, text[f.start : f.end]) for f in pii.find(text)] == [
        ("email", "a.b@example.org"),
        ("phone", "+1 212 555 0147"),
    ]


def test_every_one_digit_error_breaks_the_check_sums():
    card, account = "4539578763621486", "DE89370400440532013000"
    assert pii.luhn(card) and pii.iban(account)
    for i in range(len(card)):
        assert sum(pii.luhn(card[:i] + digit + card[i + 1 :]) for digit in "0123456789") == 1
    for i in range(2, len(account)):
        assert sum(pii.iban(account[:i] + digit + account[i + 1 :]) for digit in "0123456789") == 1


@pytest.mark.parametrize(
    "text", ["a", "1 ", "A1", "1", "1:", "Aa ", "a@", "+1 ", "12 Aa ", "(0", "DE12", "call ", "a.b@c."]
)
def test_patterns_take_linear_time_on_hostile_text(text):
    start = time.perf_counter()
    pii.find(text * (100_000 // len(text)) + " 1 @")
    assert time.perf_counter() - start < 2


# --- length, language, few-shot ---


def test_long_prompts_are_dropped_over_chunk_borders():
    records = as_records([" ".join("x" * (i % 20 + 1)) for i in range(2500)])
    kept = prompts.drop_long(records, 12, SETTINGS["count_tokens"])
    assert kept == [record for i, record in enumerate(records) if i % 20 + 1 <= 12]


def test_language_shares():
    english = [
        "Write a short story about a dragon who learns to cook.",
        "What is the capital city of France today?",
    ] * 3
    other = ["Schreibe bitte einen kurzen Brief an meine Großmutter.", "¿Cuál es la mejor manera de aprender español?"]
    shares = prompts.language_shares(as_records(english + other), 100)
    assert shares == {"en": 0.75, "de": 0.125, "es": 0.125} and list(shares)[0] == "en"
    assert prompts.language_shares(as_records(english[:1] + other[:1]), 1) == {"en": 1.0}


def test_k_pairs_give_k_demonstrations():
    record = {"instruction": "Opposites.", "pairs": [["hot", "cold"], ["{up}", "down"], ["big", "small"]], "user": "u"}
    first, second, third = prompts.few_shot(record, "Word: {query}\nOpposite: {response}", 0, 1)
    assert second == {
        "prompt": "Opposites.\n\nWord: hot\nOpposite: cold\n\nWord: big\nOpposite: small\n\nWord: {up}\nOpposite:",
        "completion": " down",
        "user": "u",
    }
    assert first["completion"] == " cold" and "cold" not in first["prompt"] and third["completion"] == " small"
    alone = prompts.few_shot({"instruction": "Add.", "pairs": [["1+1", "2"]]}, "{query}\n{response}", 0, 1)
    assert alone == [{"prompt": "Add.\n\n1+1\n", "completion": "2"}]
    with pytest.raises(ValueError, match="example must hold"):
        prompts.few_shot(record, "{query} {response}!", 0, 1)


# --- together ---


def raw_prompts():
    """Prompts with one planted reason to drop each: repeats, a heavy user, personal information, length."""
    clean = [{"prompt": f"Tell me about subject number {i}.", "user": f"u{i % 40}"} for i in range(80)]
    repeats = [{"prompt": record["prompt"].upper() + "  ", "user": "someone"} for record in clean[:10]]
    heavy = [{"prompt": f"{i} questions about the sea", "user": "heavy"} for i in range(10)]
    private = [{"prompt": f"Reply to a{i}@b.org", "user": f"p{i}"} for i in range(30)]
    long = [{"prompt": f"{i} " + "word " * 12, "user": f"l{i}"} for i in range(5)]
    return clean + repeats + heavy + private + long


def test_prepare_reports_what_each_step_dropped():
    records = raw_prompts()
    prepared = prompts.prepare(records, **SETTINGS)
    report = prepared.report
    dropped = {step["step"]: step["dropped"] for step in report["steps"]}
    in_train = [r for r in records if r["user"].startswith("p") and splits.split_of(r, "key", 0.3, 0.1) == "train"]
    assert 0 < len(in_train) < 30
    assert dropped == {
        "long common prefix": 10,
        "over 3 a user": 7,
        "personal information (train)": len(in_train),
        "over 12 tokens": 5,
    }
    assert report["read"] == len(records) and report["steps"][-1]["left"] == len(records) - sum(dropped.values())
    sides = {name: getattr(prepared, name) for name in ("train", "valid", "test")}
    assert report["splits"] == {name: len(side) for name, side in sides.items()}
    assert sum(report["splits"].values()) == report["steps"][-1]["left"] and all(report["splits"].values())
    assert report["steps"][2]["kinds"] == {"email": len(in_train)}
    users = [{record["user"] for record in side} for side in sides.values()]
    assert not (users[0] & users[1] or users[0] & users[2] or users[1] & users[2])
    assert sum(report["languages"].values()) == pytest.approx(1)
    assert not any(pii.find(record["prompt"]) for record in prepared.train)
    assert prompts.prepare(records, **SETTINGS) == prepared


def test_more_data_leaves_every_user_where_they_were():
    records = raw_prompts()
    before = prompts.prepare(records[:90], **SETTINGS)
    after = prompts.prepare(records, **SETTINGS)
    for name in ("train", "valid", "test"):
        assert {r["user"] for r in getattr(before, name)} <= {r["user"] for r in getattr(after, name)}


def test_prepare_of_nothing_and_of_wrong_shares():
    assert prompts.prepare([], **SETTINGS).report["languages"] == {}
    with pytest.raises(ValueError, match="must leave a training share"):
        prompts.prepare([], **(SETTINGS | {"split": prompts.Split("key", 0.9, 0.1)}))
    with pytest.raises(ValueError, match="prefix_chars must be at least 1"):
        prompts.prepare([], **(SETTINGS | {"prefix_chars": 0}))
    with pytest.raises(ValueError, match="max_per_user must be at least 1"):
        prompts.prepare([], **(SETTINGS | {"max_per_user": 0}))


def test_real_prompts_with_users_through_the_stage(shared_data, tmp_path):
    source = shared_data / "restricted" / "oasst2_animals_prompts_with_users.jsonl.gz"
    config = prompts_config.get_config()
    config.data.update({"prompts": (f"jsonl:{source}",), "tokenizer": str(shared_data / "gpt2_bpe")})
    config.prompts.update({"split_key": "oasst", "max_per_user": 5})
    main.run(config, str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    read = {name: list(sources.load((f"jsonl:{tmp_path}/{name}.jsonl.gz",), "prompts", 0)) for name in report["splits"]}
    assert {name: len(records) for name, records in read.items()} == report["splits"]
    assert sum(report["splits"].values()) == report["steps"][-1]["left"] < report["read"] == 549
    users = [collections.Counter(record["user"] for record in records) for records in read.values()]
    assert not set(users[0]) & set(users[1]) and max(max(counts.values()) for counts in users) <= 5
    with gzip.open(source) as file:
        by_language = collections.Counter(json.loads(line)["lang"] for line in file)
    assert abs(report["languages"]["en"] - by_language["en"] / 549) < 0.1  # the labels of the set's own authors


def test_a_malformed_prompt_stops_the_stage(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    config = prompts_config.get_config("tiny")
    config.data.prompts = (f"jsonl:{tmp_path}/raw.jsonl",)
    with pytest.raises(ValueError, match="raw.jsonl:2: missing field 'prompt'"):
        main.run(config, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "train.jsonl.gz").exists()


# --- shot sets, tables, the stage ---


def test_sets_of_shots_differ_and_follow_from_the_instruction():
    pairs = [[f"q{i}", f"r{i}"] for i in range(5)]
    record = {"instruction": "Answer.", "pairs": pairs, "use_case": "open_qa"}
    made = prompts.few_shot(record, "Input: {query}\nOutput: {response}", 2, 3)
    assert made == prompts.few_shot(record, "Input: {query}\nOutput: {response}", 2, 3)
    assert len(made) == 15 and len({one["prompt"] for one in made}) == 15
    for number, one in enumerate(made):
        own = number // 3
        *shots, question = one["prompt"].removeprefix("Answer.\n\n").split("\n\n")
        shown = [shot.removeprefix("Input: q").split("\nOutput: r") for shot in shots]
        assert len({a for a, _ in shown}) == 2 and all(a == b != str(own) for a, b in shown)
        assert question == f"Input: q{own}\nOutput:" and one["completion"] == f" r{own}"
    few = prompts.few_shot({"instruction": "Add.", "pairs": pairs[:2]}, "{query} {response}", 3, 9)
    assert len(few) == 2  # one other pair, one set


def test_tables_equal_counting_by_hand():
    def words(texts):
        return [len(text.split()) for text in texts]

    splits = {
        "train": [
            {"prompt": "a b", "user": 1, "use_case": "chat", "source": "customer"},
            {"prompt": "a b c d", "user": 1, "use_case": "chat", "source": "labeler"},
            {"prompt": "a", "user": 2},
        ],
        "valid": [{"prompt": "a b c", "user": 3, "use_case": "other", "source": "labeler"}],
        "test": [],
    }
    found = prompt_tables.tables(splits, [{"prompt": "a b", "completion": "c", "source": "labeler"}], words)
    assert found["sizes"]["train"] == {"customer": 1, "labeler": 1, "total": 3} and found["sizes"]["test"]["total"] == 0
    assert found["prompts_per_user"] == {"train": 1.5, "valid": 1.0} and set(found["lengths"]) == {"train", "valid"}
    assert found["lengths"]["train"] == {
        "count": 3, "mean": 2.33, "std": 1.25, "min": 1, "25%": 1.5, "50%": 2, "75%": 3, "max": 4
    }  # fmt: skip
    assert {name: row["count"] for name, row in found["lengths_by_use_case"].items()} == {"chat": 2, "": 1, "other": 1}
    assert found["lengths_of_demonstrations"]["demonstration"]["labeler"]["mean"] == 1


def test_stage_writes_the_sets_that_the_functions_give(tmp_path, capsys):
    config = prompts_config.get_config("tiny")
    main.run(config, str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    raw = sources.load(("simulated:prompts:600",), "prompts", 0)
    assert report["read"] == len(raw) == 600
    written = {name: sources.load((f"jsonl:{tmp_path}/{name}.jsonl.gz",), "prompts", 0) for name in prompts.SPLITS}
    assert {name: len(split) for name, split in written.items()} == report["splits"]
    assert 600 - sum(step["dropped"] for step in report["steps"]) == sum(report["splits"].values())
    assert all(step["dropped"] for step in report["steps"] if "a user" not in step["step"])
    users = [{record["user"] for record in split} for split in written.values()]
    assert not users[0] & users[1] and not users[0] & users[2]
    shots = sources.load((f"jsonl:{tmp_path}/few_shot.jsonl.gz",), "demonstrations", 0)
    assert len(shots) == report["few_shot"]["left"] < report["few_shot"]["made"]

    before = (tmp_path / "report.json").stat().st_mtime_ns
    main.run(config, str(tmp_path))
    assert "nothing to do" in capsys.readouterr().err and (tmp_path / "report.json").stat().st_mtime_ns == before


def test_stage_without_few_shot_instructions(tmp_path, monkeypatch):
    bucket = install(monkeypatch)
    config = prompts_config.get_config("tiny")
    config.data.prompts = ("simulated:prompts:20",)
    config.prompts.few_shot = ()
    main.run(config, str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["few_shot"] == {"instructions": 0, "made": 0, "left": 0}
    assert report["tables"]["lengths_of_demonstrations"] == {"prompt": {}, "demonstration": {}}
    assert not (tmp_path / "few_shot.jsonl.gz").exists() and (tmp_path / "train.jsonl.gz").exists()
    main.run(config, "gs://bucket/run")
    for name in ("train.jsonl.gz", "valid.jsonl.gz", "test.jsonl.gz", "report.json"):
        assert bucket.cat_file(f"/bucket/run/{name}") == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts.max_per_user": 0}, "config.prompts.max_per_user must be an integer of at least 1, got 0"),
        ({"prompts.test_share": 0.7}, "config.prompts.valid_share \\+ test_share must be below 1, got 0.32 \\+ 0.7"),
        ({"prompts.shots": 0}, "config.prompts.shots must be at least 1 with several sets of shots"),
        ({"prompts.example": "{query}"}, "config.prompts.example must be a text that holds"),
        ({"data.tokenizer": ""}, "config.data.tokenizer must be set"),
    ],
)
def test_stage_refuses(changes, message, tmp_path):
    config = prompts_config.get_config("tiny")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        main.run(config, str(tmp_path))


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([["1+1", "2"]], r"pairs must be at least 2 pairs \[query, response\]"),
        ([["1+1", "2"], [3, 4]], r"pairs\[1\]\[0\] must be a string, got 3"),
        ([["1+1", ""], ["2+2", "4"]], r"pairs\[0\]\[1\] must not be empty"),
    ],
)
def test_an_instruction_without_pairs_is_named(tmp_path, pairs, message):
    (tmp_path / "few.jsonl").write_text(json.dumps({"instruction": "Add.", "pairs": pairs}) + "\n")
    with pytest.raises(ValueError, match=f"few.jsonl:1: {message}"):
        sources.load((f"jsonl:{tmp_path}/few.jsonl",), "few_shot", 0)
