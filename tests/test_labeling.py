"""Questionnaires: what they show and hide, who gets which, and the way back from an export to records."""

import copy
import json
import random
import xml.etree.ElementTree as ET

import pytest
from etils import epath

from configs import common
from instructgpt_jax import main, simulated
from instructgpt_jax.data import sources
from instructgpt_jax.labeling import filling, instructions, kinds, make, pages, people, reading
from instructgpt_jax.stages import label

pytestmark = pytest.mark.usefixtures("one_device")
ANSWERS = [
    {"prompt": "Say <b>hi</b>.", "completions": ["hi", "Hello!", " hi\n", "<script>x</script>"], "user": 7,
     "policies": ["sft", "ppo", "gpt", "ppo_ptx"], "ended": [True, True, False, True],
     "tokens": [[1], [2], [3], [4]], "tokenizer": "h"},
    {"prompt": "Two?", "completions": ["", "2"], "policies": ["sft", "ppo"], "use_case": "open QA"},
]  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def crowd(path, count=3, group="training"):
    return write(path, [{"id": f"p{n}", "group": group, "email": f"P{n}@x.org"} for n in range(count)])


def configure(folder, kind="comparisons", records=None, **changes):
    config = common.labeling(kind)
    config.label.labelers = str(folder / "labelers.jsonl")
    if not (folder / "labelers.jsonl").exists():
        crowd(folder / "labelers.jsonl")
    if records is not None:
        config.label.source = (f"jsonl:{write(folder / 'source.jsonl', records)}",)
    config.label.update({"overlap": 2, "overlap_share": 1.0} | changes)
    return config


def step(config, workdir, name, **changes):
    config = copy.deepcopy(config)
    config.label.update({"step": name} | changes)
    main.run(config, str(workdir))


def fill(task, labeler):
    """Some answers to a page of comparisons: who reads them back knows which they must be."""
    rng = random.Random(f"{task.id} {labeler.id}")
    values = {kinds.RANKING: [rng.randint(1, 5) for _ in task.shown]}
    for n in range(len(task.shown)):
        values |= {
            f"rating_{n}": rng.randint(1, 7), f"hallucination_{n}": rng.choice(("yes", "no", "none")),
            f"satisfies_constraint_{n}": rng.choice(("yes", "no", "none")), f"notes_{n}": rng.choice(("", "a note")),
            f"fields_{n}": frozenset(rng.sample(sorted(kinds.NINE), rng.randint(0, 3))),
        }  # fmt: skip
    return values


def answered(config, workdir, fill=fill):
    """The export of everybody who was asked, as Label Studio writes it."""
    people_ = people.load(config.label.labelers)
    key = make.read_key(epath.Path(workdir))
    asked = [(task, people_.by_id[name]) for task in key.values() for name in task.labelers]
    answers = [(task, labeler, fill(task, labeler)) for task, labeler in asked]
    return filling.export(config.label.kind, kinds.page(config.label.kind, config.label.pairs), answers)


def minimal(tasks):
    """The same export as Label Studio's JSON-MIN."""
    found = []
    for task in tasks:
        for annotation in task["annotations"]:
            row = task["data"] | {"id": task["id"]}
            for result in annotation["result"]:
                value = result["value"]
                inner = next(iter(value.values()))
                plain = result["type"] in ("choices", "textarea")
                row[result["from_name"]] = (inner[0] if len(inner) == 1 else value) if plain else [value]
            who = {"annotator": annotation["completed_by"]["email"], "annotation_id": annotation["id"]}
            found.append(row | who | {"created_at": "2026-01-01", "updated_at": "2026-01-02", "lead_time": 3.5})
    return found


# --- what the pages show and hide ---


def test_nothing_tells_who_wrote_an_output(tmp_path):
    config = configure(tmp_path, records=ANSWERS)
    step(config, tmp_path / "run", "make")
    for file in (tmp_path / "run" / "projects").rglob("*.*"):
        told = file.read_text()
        for secret in ("policies", "sft", "ppo", "gpt", "ended", "tokenizer"):
            assert secret not in told, (file, secret)
    key = make.read_key(epath.Path(tmp_path / "run"))
    assert [task.record for task in key.values()] == ANSWERS


def test_the_order_is_the_seeds(tmp_path):
    many = [ANSWERS[0] | {"prompt": f"prompt {n}"} for n in range(30)]

    def made(name, seed):
        config = configure(tmp_path, records=many)
        config.seed = seed
        step(config, tmp_path / name, "make")
        folder = tmp_path / name / "projects"
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}

    assert made("one", 0) == made("two", 0) and made("one", 0) != made("three", 1)
    tasks = json.loads(made("one", 0)["p0/tasks.json"])
    order = [task["data"]["prompt"] for task in tasks]
    assert order != sorted(order, key=lambda prompt: int(prompt.split()[1]))
    first = [next(output["body"].strip() for output in task["data"]["outputs"]) for task in tasks]
    assert set(first) == {"hi", "Hello!", "<script>x</script>"}  # each of the three distinct ones comes first somewhere


def test_equal_outputs_stand_once_and_get_one_rank(tmp_path):
    config = configure(tmp_path, records=ANSWERS)
    step(config, tmp_path / "run", "make")
    task = next(iter(make.read_key(epath.Path(tmp_path / "run")).values()))
    assert sorted(task.shown) == [(0, 2), (1,), (3,)]
    data = json.loads((tmp_path / "run/projects/p0/tasks.json").read_text())
    assert {len(one["data"]["outputs"]) for one in data} <= {2, 3}
    ranks = [3, 1, 1]
    answers = answered(config, tmp_path / "run", lambda task, _: fill(task, _) | {"ranking": ranks[: len(task.shown)]})
    (tmp_path / "e.json").write_text(filling.dump(answers))
    step(config, tmp_path / "run", "read", export=(str(tmp_path / "e.json"),))
    line = read(tmp_path / "run" / "comparisons.jsonl")[0]
    assert line["ranking"][0] == line["ranking"][2] and sorted(set(line["ranking"])) == [1, 2]  # dense
    assert {name: line[name] for name in ANSWERS[0]} == ANSWERS[0]  # ended, tokens and tokenizer too
    ratings = read(tmp_path / "run" / "ratings.jsonl")[:4]
    assert [one["policy"] for one in ratings] == ANSWERS[0]["policies"]
    assert [one["answer"] for one in ratings] == ANSWERS[0]["completions"]
    assert [one["index"] for one in ratings] == [0, 1, 2, 3] and ratings[0]["rating"] == ratings[2]["rating"]
    assert set(ratings[0]["fields"]) == set(kinds.FIELDS) and len(kinds.FIELDS) == 11 and ratings[0]["user"] == 7


def test_more_than_nine_outputs_are_refused(tmp_path):
    texts = [str(n) for n in range(10)]
    config = configure(tmp_path, records=[{"prompt": "a", "completions": texts}])
    with pytest.raises(ValueError, match=r"source.jsonl:1: completions must be at most 9 different texts .* got 10"):
        step(config, tmp_path / "run", "make")
    config = configure(tmp_path, records=[{"prompt": "a", "completions": texts[:9] + ["1 "]}])
    step(config, tmp_path / "nine", "make")


def test_outputs_that_are_all_equal_teach_nothing_but_count_in_an_evaluation(tmp_path):
    records = [{"prompt": "a", "completions": ["x", "x"]}, ANSWERS[1]]
    for purpose, count in (("training", 1), ("evaluation", 2)):
        config = configure(tmp_path, records=records, purpose=purpose)
        step(config, tmp_path / purpose, "make")
        assert len(make.read_key(epath.Path(tmp_path / purpose))) == count
    (tmp_path / "e.json").write_text(filling.dump(answered(config, tmp_path / "evaluation")))
    step(config, tmp_path / "evaluation", "read", export=(str(tmp_path / "e.json"),))
    assert read(tmp_path / "evaluation" / "comparisons.jsonl")[0]["ranking"] == [1, 1]


@pytest.mark.parametrize("kind", kinds.PAGES)
def test_every_kind_has_a_page_and_instructions(kind):
    root = ET.fromstring(pages.config(kinds.page(kind, 3)))
    names = [element.get("name") for element in root.iter() if element.get("name") and element.tag != "Bucket"]
    assert len(names) == len(set(names))
    for element in root.iter():
        if element.get("toName"):
            assert element.get("toName") in names
    assert len(list(root.iter("Bucket"))) == (5 if kinds.PAGES[kind].asks_of_each else 0)
    training, evaluation = (instructions.text(kind, purpose, "") for purpose in ("training", "evaluation"))
    assert training.startswith("# ") and (training != evaluation) == (kind in instructions.CRITERIA)
    if kind == "comparisons":
        assert "helpful to the person comes first" in training and "harmless comes first" in evaluation


def test_instructions_of_ones_own_are_shown_as_text(tmp_path):
    (tmp_path / "own.md").write_text("# Mine\n\n<script>alert(1)</script>\n\n* one\n")
    config = configure(tmp_path, records=ANSWERS, instructions=str(tmp_path / "own.md"))
    step(config, tmp_path / "run", "make")
    html = (tmp_path / "run/projects/p0/instructions.html").read_text()
    assert "&lt;script&gt;" in html and "<script>" not in html and "<li>one</li>" in html


# --- who gets which ---


# No overlap means all five.
@pytest.mark.parametrize("overlap, share, copies", [(1, 1.0, 40), (3, 1.0, 120), (3, 0.25, 60), (0, 0.5, 120)])
def test_the_overlap_is_what_was_asked_for_and_work_is_even(overlap, share, copies):
    asked = [people.Labeler(f"p{n}", "training") for n in range(5)]
    tasks = [make.Task(str(n), {}, (), (), 1) for n in range(40)]
    found = make.distribute(tasks, asked, overlap or len(asked), share, 0)
    assert [task.id for task in found] == [task.id for task in tasks]
    assert all(len(set(task.labelers)) == len(task.labelers) == task.copies for task in found)
    load = [sum(one.id in task.labelers for task in found) for one in asked]
    assert sum(load) == copies and max(load) - min(load) <= 1
    if overlap == 3 and share == 1.0:
        pairs = {(a, b) for task in found for a in task.labelers for b in task.labelers if a < b}
        assert len(pairs) == 10  # every two share a task


def test_shared_projects_tell_label_studio_how_many(tmp_path):
    many = [ANSWERS[1] | {"prompt": f"prompt {n}"} for n in range(20)]
    config = configure(tmp_path, records=many, projects="shared", overlap=3, overlap_share=0.25)
    step(config, tmp_path / "run", "make")
    found = {p.name: json.loads((p / "project.json").read_text()) for p in (tmp_path / "run/projects").iterdir()}
    assert {name: (one["labelers_per_task"], one["tasks"]) for name, one in found.items()} == {
        "once": (1, 15), "several": (3, 5)
    }  # fmt: skip


@pytest.mark.parametrize(
    "records, message",
    [
        ([{"id": "a", "group": "boss", "email": "a@x"}], r":1: group must be one of .*, got 'boss'"),
        ([{"id": "a", "group": "training"}], ":1: labeler 'a' must have an email or a label_studio_id, got neither"),
        ([{"id": "a/b", "group": "training", "email": "a@x"}], ":1: id must be letters, digits"),
        ([{"id": "a", "group": "training", "mail": "a@x"}], r":1: a labeler must have no fields but .*\['mail'\]"),
        ([{"id": "a", "group": "training", "email": "a@x"}, {"id": "b", "group": "heldout", "email": "A@X"}],
         ":2: email must be one labeler's, got 'a@x' as in line 1"),
        ([{"id": "a", "group": "training", "label_studio_id": True}], ":1: label_studio_id must be an integer"),
        ([], "must name at least one labeler"),
    ],
)  # fmt: skip
def test_a_bad_file_of_labelers_is_named(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        people.load(str(write(tmp_path / "l.jsonl", records)))


# --- there and back ---


@pytest.mark.parametrize("form", ["JSON", "JSON-MIN"])
def test_simulated_rankings_come_back_as_the_direct_ones(tmp_path, form):
    """Ranked through the questionnaire, file to file, and ranked directly: the same comparisons."""
    crowd_ = {one.name: one for one in simulated.labelers("training")[:4]}
    rows = [{"id": name, "group": "training", "email": f"{name}@x.org"} for name in crowd_]
    write(tmp_path / "labelers.jsonl", rows)
    source = [
        {name: value for name, value in record.items() if name not in ("ranking", "labeler", "group")}
        for record in simulated.records("comparisons:train:25")
    ]
    source[3]["completions"][1] = source[3]["completions"][0]
    config = configure(tmp_path, records=source, overlap=3, overlap_share=0.5)

    def by_the_world(task, labeler):
        texts = [task.record["completions"][group[0]] for group in task.shown]
        ranks = simulated.rank(crowd_[labeler.id], task.record["prompt"], texts, 5)
        return fill(task, labeler) | {kinds.RANKING: ranks}

    step(config, tmp_path / "run", "make")
    tasks = answered(config, tmp_path / "run", by_the_world)
    (tmp_path / "e.json").write_text(json.dumps(tasks if form == "JSON" else minimal(tasks)))
    step(config, tmp_path / "run", "read", export=(str(tmp_path / "e.json"),))
    direct = []
    for task in make.read_key(epath.Path(tmp_path / "run")).values():
        for name in task.labelers:
            ranking = simulated.rank(crowd_[name], task.record["prompt"], task.record["completions"], 5)
            direct.append(task.record | {"ranking": ranking, "labeler": name, "group": "training"})
    found = sources.load((f"jsonl:{tmp_path}/run/comparisons.jsonl",), "comparisons", 0)
    assert len(direct) == len(found) == 25 + 2 * 12
    assert [{name: line[name] for name in one} for line, one in zip(found, direct, strict=True)] == direct
    assert {line["seconds"] for line in found} == ({None} if form == "JSON" else {3.5})
    told = json.loads((tmp_path / "run" / "read.json").read_text())
    assert told["kept"] == told["annotations"] == 49 and told["unanswered"] == told["skipped"] == 0
    key = make.read_key(epath.Path(tmp_path / "run"))
    for line in read(tmp_path / "run" / "ratings.jsonl"):
        task = key[line["task"]]
        given = fill(task, people.Labeler(line["labeler"], ""))
        n = next(n for n, group in enumerate(task.shown) if line["index"] in group)
        assert line["rating"] == given[f"rating_{n}"] and line["notes"] == given[f"notes_{n}"]
        where = {"yes": True, "no": False, "none": None}
        assert line["fields"]["hallucination"] is where[given[f"hallucination_{n}"]]
        assert {name for name in kinds.NINE if line["fields"][name]} == given[f"fields_{n}"]


def test_skips_are_counted_and_the_last_edit_holds(tmp_path):
    config = configure(tmp_path, records=ANSWERS[1:])
    step(config, tmp_path / "run", "make")
    tasks = answered(config, tmp_path / "run", lambda task, _: fill(task, _) | {"ranking": [1, 2]})
    first, second = tasks[0]["annotations"]
    second |= {"was_cancelled": True}
    later = copy.deepcopy(first) | {"id": 99, "updated_at": "2026-02-01T00:00:00Z", "lead_time": 12.5}
    later["result"][-1]["value"]["ranker"] = {"1": ["B"], "2": ["A"], "_": []}
    tasks[0]["annotations"].insert(0, later)
    (tmp_path / "e.json").write_text(json.dumps(tasks))
    step(config, tmp_path / "run", "read", export=(str(tmp_path / "e.json"),))
    (line,) = read(tmp_path / "run" / "comparisons.jsonl")
    task = next(iter(make.read_key(epath.Path(tmp_path / "run")).values()))
    assert [line["ranking"][k] for (k,) in task.shown] == [2, 1]
    assert (line["seconds"], line["at"]) == (12.5, "2026-02-01T00:00:00Z")
    told = json.loads((tmp_path / "run" / "read.json").read_text())
    assert (told["annotations"], told["kept"], told["skipped"], told["edited"]) == (3, 1, 1, 1)


def test_labelers_by_number_by_mail_and_by_what_pull_noted(tmp_path):
    rows = [{"id": "a", "group": "training", "label_studio_id": 4}, {"id": "b", "group": "heldout", "email": "B@x.org"}]
    found = people.load(str(write(tmp_path / "l.jsonl", rows)))
    assert found.find(4, {}).id == found.find({"id": 4, "email": "x"}, {}).id == "a"
    assert found.find("b@X.org", {}).id == found.find(9, {9: "b@x.org"}).id == "b"
    for unknown in (5, None, True, "c@x", {"id": 9}):
        with pytest.raises(ValueError, match="labeler must be in .*l.jsonl by email or label_studio_id, got"):
            found.find(unknown, {})


def test_demonstrations_and_prompts_are_records_of_their_kinds(tmp_path):
    def typed(**values):
        return lambda task, labeler: values | ({} if labeler.id == "p0" else {"written": "Call +1 202-555-0143 now."})

    config = configure(tmp_path, "demonstrations", [{"prompt": "Two?", "use_case": "open QA"}], overlap=3)
    step(config, tmp_path / "d", "make")
    (tmp_path / "e.json").write_text(json.dumps(answered(config, tmp_path / "d", typed(written=" It is 2.\n"))))
    step(config, tmp_path / "d", "read", export=(str(tmp_path / "e.json"),))
    (line,) = sources.load((f"jsonl:{tmp_path}/d/demonstrations.jsonl",), "demonstrations", 0)
    assert (line["prompt"], line["completion"], line["labeler"]) == ("Two?", "\n\nIt is 2.", "p0")
    assert json.loads((tmp_path / "d/read.json").read_text())["personal"] == {"phone": 2}

    config = configure(tmp_path, "few_shot_prompts", num_tasks=2, overlap=1, pairs=3)
    pairs = {"instruction": "Double it.", "query_1": "2", "response_1": "4", "query_2": "3", "response_2": "6"}
    step(config, tmp_path / "f", "make")
    (tmp_path / "e.json").write_text(json.dumps(answered(config, tmp_path / "f", lambda *_: pairs)))
    step(config, tmp_path / "f", "read", export=(str(tmp_path / "e.json"),))
    lines = read(tmp_path / "f" / "demonstrations.jsonl")
    assert [line["completion"] for line in lines] == [" 4", " 6"] * 2
    assert lines[0]["prompt"] == "Double it.\n\nInput: 3\nOutput: 6\n\nInput: 2\nOutput:"
    prompts = sources.load((f"jsonl:{tmp_path}/f/prompts.jsonl",), "prompts", 0)
    assert [one["written"] for one in prompts] == ["few_shot"] * 4 and prompts[0]["use_case"] in kinds.USE_CASES
    assert all("completion" not in one and one["user"] == one["labeler"] for one in prompts)


def test_toxicity_flags_and_grades(tmp_path):
    def toxic(task, labeler):
        each = {"toxicity": "2", "relative_toxicity": "-1", "continuity": 5, "notes": "mail me: x@example.com"}
        values = {f"{name}_{n}": value for n in range(len(task.shown)) for name, value in each.items()}
        return values | {"prompt_toxicity": "1", kinds.RANKING: list(range(1, len(task.shown) + 1))}

    cases = {
        "toxicity": (ANSWERS, toxic, "ratings", {"prompt_toxicity": 1, "toxicity": 2, "relative_toxicity": -1,
                     "continuity": 5, "notes": "mail me: [email]"}),
        "sensitive": ([{"text": "abc"}], lambda *_: {"sensitive": "yes"}, "flags", {"text": "abc", "sensitive": True}),
        "grades": ([{"prompt": "a", "completion": "b", "labeler": "carl"}], lambda *_: {"grade": 6}, "grades",
                   {"author": "carl", "grade": 6, "labeler": "p0", "completion": "b"}),
    }  # fmt: skip
    for kind, (records, fill_, name, expected) in cases.items():
        config = configure(tmp_path, kind, records, overlap=0)
        step(config, tmp_path / kind, "make")
        (tmp_path / "e.json").write_text(json.dumps(answered(config, tmp_path / kind, fill_)))
        step(config, tmp_path / kind, "read", export=(str(tmp_path / "e.json"),))
        line = read(tmp_path / kind / f"{name}.jsonl")[0]
        assert {field: line[field] for field in expected} == expected
        assert set(reading.FILES[kind]) <= {file.stem for file in (tmp_path / kind).glob("*.jsonl")}


def test_dialogues_are_read_as_text_and_come_back_as_messages(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Two?"}]  # fmt: skip
    config = configure(tmp_path, records=[{"messages": talk, "completions": ["a", "b"]}], overlap=1)
    step(config, tmp_path / "c", "make")
    tasks = answered(config, tmp_path / "c")
    assert tasks[0]["data"]["prompt"] == "user: Hi\n\nassistant: Yes?\n\nuser: Two?"
    (tmp_path / "e.json").write_text(json.dumps(tasks))
    step(config, tmp_path / "c", "read", export=(str(tmp_path / "e.json"),))
    (line,) = sources.load((f"jsonl:{tmp_path}/c/comparisons.jsonl",), "comparisons", 0)
    assert line["messages"] == talk and "prompt" not in line
    assert read(tmp_path / "c" / "ratings.jsonl")[0]["prompt"].endswith("user: Two?")

    config = configure(tmp_path, "demonstrations", [{"messages": talk}], overlap=1)
    step(config, tmp_path / "d", "make")
    (tmp_path / "e.json").write_text(json.dumps(answered(config, tmp_path / "d", lambda *_: {"written": "2"})))
    step(config, tmp_path / "d", "read", export=(str(tmp_path / "e.json"),))
    (line,) = sources.load((f"jsonl:{tmp_path}/d/demonstrations.jsonl",), "demonstrations", 0)
    assert (line["messages"], line["completion"]) == (talk, "2") and "prompt" not in line


# --- wrong input ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "essays"}, "config.label.kind must be one of"),
        ({"source": ()}, "config.label.source must name at least one source of answers"),
        ({"source": ("x",)}, "config.label.source: a data source must be"),
        ({"labelers": "gone.jsonl"}, "config.label.labelers must name a file that exists, got 'gone.jsonl'"),
        ({"groups": ("heldout",)}, "must name somebody of the groups .*heldout.* got none"),
        ({"overlap": 4}, "config.label.overlap must be at most the 3 labelers"),
        ({"step": "push"}, "config.label.url must be the address of a Label Studio server for step 'push', got ''"),
        ({"step": "read"}, "config.label.export must name an export of Label Studio, got none"),
        ({"step": "read", "export": ("gone.json",)}, "config.label.export must name a file that exists"),
        ({"kind": "plain_prompts"}, "config.label.source must be .* and num_tasks above 0 for kind 'plain_prompts'"),
        ({"example": "{query}"}, "config.label.example must be a text that holds {query} and ends in {response}"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, message):
    config = configure(tmp_path, records=ANSWERS, **changes)
    with pytest.raises(ValueError, match=message):
        main.run(config, str(tmp_path / "run"))


def test_another_questionnaire_needs_another_workdir_and_a_step_does_not(tmp_path, capsys):
    config = configure(tmp_path, records=ANSWERS)
    step(config, tmp_path / "run", "make")
    step(config, tmp_path / "run", "make")
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*label.overlap: 2 in the workdir, 1 asked for"):
        step(config, tmp_path / "run", "make", overlap=1)
    with pytest.raises(ValueError, match="key.jsonl must be there: config.label.step=make writes it"):
        (tmp_path / "run" / make.KEY).unlink()
        (tmp_path / "e.json").write_text("[]")
        step(config, tmp_path / "run", "read", export=(str(tmp_path / "e.json"),))
    assert label.READ not in {file.name for file in (tmp_path / "run").iterdir()}
