"""The forms that people publish records in, as records of ours: what each becomes, and what cannot be told."""

import gzip
import json

import pytest
from test_tokenizer import FAMILIES

from instructgpt_jax.data import batches, datasets, encoding, forms, schema, sources, tokenizer
from instructgpt_jax.data.batches import Order

USER = {"role": "user", "content": "What color is the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": text} for text in ("It is blue.", "It is green."))
SYSTEM = {"role": "system", "content": "Be brief."}
MORE = {"role": "user", "content": "And the sea?"}
PAIR = {"completions": ["It is blue.", "It is green."], "ranking": [1, 2]}
SKY = "\n\nHuman: What color is the sky?\n\nAssistant:"
SEA = f"{SKY} It is blue.\n\nHuman: And the sea?\n\nAssistant:"
TEXT = USER["content"]


def understood(row, kind="comparisons"):
    """The record of a row, which must be a valid one that is used."""
    before = json.dumps(row)
    record, why = forms.understood(row, kind)
    schema.validate(record, kind)
    assert not why and json.dumps(row) == before
    return record


# fmt: off
COMPARISONS = [  # the row, the prompt or the messages of its record, and its completions
    # texts
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", ["b", "c"]),
    ({"prompt": "a", "chosen": "", "rejected": "a"}, "a", ["", "a"]),
    ({"chosen": f"{SKY} It is blue.", "rejected": f"{SKY} It is green."}, SKY, [" It is blue.", " It is green."]),
    ({"chosen": f"{SEA} Yes.", "rejected": f"{SEA} Yes, yes."}, SEA, [" Yes.", " Yes, yes."]),
    ({"chosen": f"{SKY} Blue.", "rejected": f"{SKY} Blue.\n\nHuman: Is it?\n\nAssistant: Yes."}, SKY,
     [" Blue.", " Blue.\n\nHuman: Is it?\n\nAssistant: Yes."]),
    ({"chosen": "Q: sky?\nA: blue", "rejected": "Q: sky?\nA: black"}, "Q: sky?\nA:", [" blue", " black"]),
    ({"chosen": "Sky?\nBlue", "rejected": "Sky?\nGreen"}, "Sky?\n", ["Blue", "Green"]),
    ({"chosen": "Sky? Blue", "rejected": "Sky?\nGreen"}, "Sky?", [" Blue", "\nGreen"]),
    ({"chosen": "The sky is deep", "rejected": "The sky is deeply blue"}, None, "one is the beginning of the other"),
    ({"chosen": "sky", "rejected": "skies"}, None, "must begin with the same prompt, or have a prompt beside them"),
    ({"chosen": SKY + " a", "rejected": SKY.replace("sky", "sea") + " b"}, None,
     r"share the turns up to an '\\n\\nAssistant:'"),
    ({"prompt": [USER], "chosen": "It is blue.", "rejected": "It is green."}, [USER], PAIR["completions"]),
    ({"messages": [USER], "chosen": "It is blue.", "rejected": "It is green."}, [USER], PAIR["completions"]),
    # lists of messages
    ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER], PAIR["completions"]),
    ({"chosen": [SYSTEM, USER, BLUE, MORE, BLUE], "rejected": [SYSTEM, USER, BLUE, MORE, GREEN]},
     [SYSTEM, USER, BLUE, MORE], PAIR["completions"]),
    ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, [USER], PAIR["completions"]),
    ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER], PAIR["completions"]),
    ({"prompt": TEXT, "chosen": [BLUE], "rejected": [GREEN]}, [USER], PAIR["completions"]),
    ({"prompt": f"{TEXT}\n", "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}, [SYSTEM, USER],
     PAIR["completions"]),
    # as HuggingFaceH4/ultrafeedback_binarized has it
    ({"prompt": TEXT, "chosen": [USER, BLUE], "rejected": [USER, GREEN], "messages": [USER, BLUE]}, [USER],
     PAIR["completions"]),
    # columns of lists in place of lists of messages; single messages
    ({"chosen": {"role": ["user", "assistant"], "content": [TEXT, "It is blue."]},
      "rejected": {"role": ["user", "assistant"], "content": [TEXT, "It is green."]}}, [USER], PAIR["completions"]),
    ({"prompt": USER, "chosen": BLUE, "rejected": GREEN}, [USER], PAIR["completions"]),
    ({"prompt": None, "messages": None, "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER],
     PAIR["completions"]),
    ({"prompt": [USER], "completions": [[BLUE], [GREEN]], "ranking": [1, 2]}, [USER], PAIR["completions"]),
    ({"prompt": TEXT, "completions": [BLUE, GREEN], "ranking": [1, 2]}, [USER], PAIR["completions"]),
    # what cannot be told
    ({"chosen": [USER, BLUE, MORE], "rejected": [USER, BLUE, MORE, GREEN]}, None,
     r"chosen, behind the messages that both share, must be one message of the assistant, got \['user'\]"),
    ({"chosen": [USER, BLUE, MORE, BLUE], "rejected": [USER, GREEN, MORE, BLUE]}, None,
     r"chosen, .* must be one message of the assistant, got \['assistant', 'user', 'assistant'\]"),
    ({"chosen": [USER, BLUE], "rejected": [USER]}, None, "must begin with the same messages"),
    ({"chosen": [BLUE], "rejected": [GREEN]}, None, "must begin with the same messages, or have a prompt beside them"),
    ({"prompt": "Why?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, None,
     "prompt must be the text of one of the messages that chosen and rejected share where a record has both, got 'Why"),
    ({"messages": [MORE, BLUE], "prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, None,
     "messages must be those of prompt, or of chosen"),
    ({"prompt": [USER], "messages": [MORE], "completions": ["a", "b"], "ranking": [1, 2]}, None,
     "messages must begin with those of prompt where a record has both"),
    ({"prompt": "a", "chosen": "b", "rejected": [GREEN]}, None, "both be texts or both lists of messages, got str and"),
    ({"prompt": "a", "chosen": 1, "rejected": 0}, None, "both be texts or both lists of messages, got int and int"),
    ({"prompt": "a", "chosen": "b"}, None, "missing field 'completions', the record has"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, None, "missing field 'completions', the record has"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, None, "prompt must not be empty"),
    ({"chosen": [USER, {"role": "assistant"}], "rejected": [USER, BLUE]}, None, r"completions\[0\] must be a string"),
]
# fmt: on


@pytest.mark.parametrize("row, prompt, found", COMPARISONS, ids=range(len(COMPARISONS)))
def test_comparisons(tmp_path, row, prompt, found):
    row = {**row, "margin": 0.5, "score_chosen": 9, "group": "g"}
    if prompt is None:
        (tmp_path / "x.jsonl").write_text(f'\n{{"prompt": "a", "chosen": "b", "rejected": "c"}}\n{json.dumps(row)}\n')
        with pytest.raises(ValueError, match=rf"1 bad record, .*\n.*x\.jsonl:3: .*{found}"):
            sources.load((f"jsonl:{tmp_path}/x.jsonl",), "comparisons", 0)
        return
    opening = {"messages": prompt} if isinstance(prompt, list) else {"prompt": prompt}
    same = {"margin": 0.5, "score_chosen": 9, "group": "g"}
    assert understood(row) == opening | {"completions": found, "ranking": [1, 2]} | same


# fmt: off
OTHERS = [  # kind, the row, its record
    ("demonstrations", {"messages": [USER, BLUE]}, {"messages": [USER, BLUE]}),
    ("demonstrations", {"prompt": TEXT, "messages": [USER, BLUE]}, {"messages": [USER, BLUE]}),
    ("demonstrations", {"prompt": [USER], "messages": [USER, BLUE]}, {"messages": [USER, BLUE]}),
    ("demonstrations", {"prompt": [USER], "completion": [BLUE]}, {"messages": [USER], "completion": "It is blue."}),
    ("demonstrations", {"prompt": [USER], "completion": "Blue."}, {"messages": [USER], "completion": "Blue."}),
    ("demonstrations", {"prompt": TEXT, "completion": [BLUE]}, {"messages": [USER], "completion": "It is blue."}),
    ("demonstrations", {"chosen": f"{SKY} a", "rejected": f"{SKY} b"}, {"prompt": SKY, "completion": " a"}),
    ("demonstrations", {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "completion": "b"}),
    ("demonstrations", {"prompt": "a", "completion": "d", "chosen": "b", "rejected": "c"},
     {"prompt": "a", "completion": "d", "chosen": "b", "rejected": "c"}),
    ("demonstrations", {"prompt": [USER], "completion": [BLUE, MORE, GREEN]},
     r"completion must be one message of the assistant, got \['assistant', 'user', 'assistant'\]"),
    ("demonstrations", {"prompt": [USER], "completion": [MORE]}, r"completion must be one .* got \['user'\]"),
    ("demonstrations", {"prompt": "Why?", "messages": [USER, BLUE]}, "prompt must be the text of one of messages"),
    ("demonstrations", {"messages": [USER, BLUE, MORE]}, "messages must end with the assistant's turn, got role 'us"),
    ("prompts", {"messages": [USER, BLUE, MORE]}, {"messages": [USER, BLUE, MORE]}),
    ("prompts", {"messages": [USER, BLUE, MORE, BLUE]}, {"messages": [USER, BLUE, MORE, BLUE]}),
    ("prompts", {"prompt": TEXT, "messages": [USER, BLUE], "user": 3}, {"messages": [USER, BLUE], "user": 3}),
    ("prompts", {"prompt": "a", "chosen": 1, "rejected": 0}, {"prompt": "a", "chosen": 1, "rejected": 0}),
    ("prompts", {"prompt": TEXT, "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, {"messages": [USER]}),
    ("prompts", {"prompt": [SYSTEM, USER]}, {"messages": [SYSTEM, USER]}),
    ("prompts", {"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, {"messages": [USER]}),
    ("prompts", {"chosen": f"{SEA} a", "rejected": f"{SEA} b"}, {"prompt": SEA}),
    ("prompts", {"messages": [BLUE]}, "messages must begin with another's turn"),
    ("prompts", {"messages": []}, "messages must be a list of at least one message"),
    ("tasks", {"prompt": [USER], "choices": ["a", "b"], "answer": 1},
     {"messages": [USER], "choices": ["a", "b"], "answer": 1}),
    ("pretraining", {"text": "a", "chosen": 1, "messages": "x", "prompt": [2]},
     {"text": "a", "chosen": 1, "messages": "x", "prompt": [2]}),
]
# fmt: on


@pytest.mark.parametrize("kind, row, record", OTHERS, ids=range(len(OTHERS)))
def test_other_kinds(kind, row, record):
    if isinstance(record, dict):
        assert understood(row, kind) == record
    else:
        with pytest.raises(ValueError, match=record):
            understood(row, kind)


def test_a_record_of_ours_is_itself():
    rows = {
        "demonstrations": {"prompt": "a", "completion": "b"},
        "comparisons": {"prompt": "a", "completions": ["", "b"], "ranking": [1, 1]},
        "prompts": {"prompt": "a", "n": [{}]},
        "pretraining": {"text": "a"},
    }
    for kind, row in rows.items():
        assert forms.understood(row, kind)[0] is row


def test_equal_answers_are_left_out_and_counted_once(tmp_path):
    equal = [
        {"prompt": "p0", "chosen": "b", "rejected": "b"},
        {"chosen": f"{SKY} a", "rejected": f"{SKY} a"},
        {"chosen": "the same", "rejected": "the same"},
        {"chosen": [USER, BLUE], "rejected": [USER, BLUE]},
        {"prompt": [USER], "chosen": [BLUE], "rejected": [BLUE]},
    ]
    good = [{"prompt": f"p{i}", "chosen": "b", "rejected": "c"} for i in range(40)]
    lines = [json.dumps(row) + "\n" for row in [*equal, *good, equal[0]]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = f"jsonl:{tmp_path}/a.jsonl"
    records = sources.load((source, source), "comparisons", 0)
    assert len(records) == 80 and records.left_out == {forms.EQUAL: 12} and records.skipped == ()
    assert records.origin(0) == f"{tmp_path}/a.jsonl:6"
    # Another's prompt is not taken by one that is left out, and parts count theirs alone.
    assert [r["prompt"] for r in sources.load((f"{source}#unique",), "comparisons", 0)][0] == "p0"
    parts = [sources.load((f"{source}#{part}/2",), "comparisons", 0).left_out[forms.EQUAL] for part in (1, 2)]
    assert sum(parts) == 6 and min(parts) > 0
    train, valid = datasets.split(records, 0.3)
    assert train.left_out == {forms.EQUAL: 12} and valid.left_out == {} and len(valid)
    with pytest.raises(ValueError, match="has no valid record of kind comparisons"):
        (tmp_path / "b.jsonl").write_text(lines[0])
        sources.load((f"jsonl:{tmp_path}/b.jsonl",), "comparisons", 0)
    # As demonstrations and as prompts they are as good as others, where the prompt can be told.
    assert len(sources.load((source,), "demonstrations", 0)) == len(sources.load((source,), "prompts", 0)) == 45


def test_what_is_left_out_is_in_what_a_run_tells(tmp_path):
    rows = [{"prompt": f"Fox {i}:", "chosen": " yes", "rejected": " no" if i % 4 else " yes"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    FAMILIES["byte-level"][0](tmp_path / "tokenizer")
    own = tokenizer.load(tmp_path / "tokenizer")
    records = sources.load((f"jsonl:{tmp_path}/a.jsonl",), "comparisons", 0)
    sets = [
        batches.comparisons(part, own, Order(None, 1, 4), batches.Rows(64, 2), encoding.Allowed(0, 0), 2, True).read
        for part in datasets.split(records, 0.3)
    ]
    told = datasets.described(sets)["comparisons"]
    assert told["records"] == 40 and told["left_out"] == {forms.EQUAL: 10}
    assert told["examples"] + told["validation"] == 30 and told["validation"]


def test_fields_are_copied_before_the_form_is_looked_for(tmp_path):
    row = {"question": "a", "better": "b", "worse": "c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    source = f"jsonl:{tmp_path}/a.jsonl#prompt=question#chosen=better#rejected=worse"
    records = sources.load((source,), "comparisons", 0)
    assert records[0] == row | {"prompt": "a", "completions": ["b", "c"], "ranking": [1, 2]}


def test_the_prompts_of_real_dialogues_are_found(shared_data):
    """Those of hh-rlhf, joined to what they were published as."""
    found = 0
    for path in sorted(shared_data.glob("comparisons/hh_rlhf_*.gz")):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            record = json.loads(line)
            best = record["ranking"].index(1)
            first, second = record["completions"][best], record["completions"][1 - best]
            row = {"chosen": record["prompt"] + first, "rejected": record["prompt"] + second}
            made, why = forms.understood(row, "comparisons")
            assert made == {"prompt": record["prompt"], "completions": [first, second], "ranking": [1, 2]} and not why
            found += 1
    assert found == 6708
