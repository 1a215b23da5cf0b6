"""Exports that are not as they should be, those of other projects, a server that fails half way, and the screening."""

import copy
import json
import random
import re
import sys
import types

import pytest
from etils import epath
from test_labeling import ANSWERS, answered, configure, fill, minimal, step, write

from instructgpt_jax import errors
from instructgpt_jax.data import sources
from instructgpt_jax.evaluation import screening
from instructgpt_jax.labeling import exports, foreign, make, people, reading, server

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A questionnaire, and the export of three labelers who have all answered its tasks."""
    folder = tmp_path_factory.mktemp("asked")
    records = [*ANSWERS, ANSWERS[0] | {"prompt": "Once more."}]
    config = configure(folder, records=records, overlap=3)
    step(config, folder / "run", "make")
    return config, make.read_key(epath.Path(folder / "run")), answered(config, folder / "run")


def read(asked, path):
    config, key, _ = asked
    return reading.read(config, key, people.load(config.label.labelers), [str(path)], {})


# --- 200 corruptions ---

JUNK = (None, 5, -1, 2.5, True, "x", "", [], {}, ["x"], {"x": 1}, [None])


def damage_node(rng, tasks):
    """Something else in the place of any value of the export; what the place is called."""
    node, path = tasks, []
    while isinstance(node, list | dict) and node and (not path or rng.random() < 0.93):
        parent, place = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node, path = node[place], [*path, place]
    parent[place] = rng.choice([junk for junk in JUNK if junk != node or type(junk) is not type(node)])
    return path


def one_annotation(rng, tasks):
    task = rng.choice(tasks)
    return task, rng.choice(task["annotations"])


def no_region(rng, tasks):
    results = one_annotation(rng, tasks)[1]["result"]
    return results.pop(rng.randrange(len(results)))["from_name"]


def wrong_type(rng, tasks):
    result = rng.choice(one_annotation(rng, tasks)[1]["result"])
    result["type"] = rng.choice([form for form in (*exports.FORMS, "labels", None) if form != result["type"]])


def emptied_bucket(rng, tasks):
    columns = one_annotation(rng, tasks)[1]["result"][-1]["value"]["ranker"]
    full = [name for name in columns if columns[name]]
    columns["_"] = columns.pop(rng.choice(full))


def in_two_buckets(rng, tasks):
    columns = one_annotation(rng, tasks)[1]["result"][-1]["value"]["ranker"]
    full = next(name for name in columns if columns[name])
    columns[rng.choice([name for name in columns if name != full])] += columns[full][:1]


def foreign_task(rng, tasks):
    rng.choice(tasks)["data"]["task"] = rng.choice(["0123456789ab", None, 3, []])


def another_text(rng, tasks):
    rng.choice(rng.choice(tasks)["data"]["outputs"])["body"] += " and more"


def unknown_labeler(rng, tasks):
    one_annotation(rng, tasks)[1]["completed_by"] = rng.choice([None, 77, "nobody@x.org", {"id": 77}, []])


def second_region(rng, tasks):
    results = one_annotation(rng, tasks)[1]["result"]
    results.append(copy.deepcopy(rng.choice(results)))


def twice(rng, tasks):
    """The labeler answered again, the same: harmless."""
    task, annotation = one_annotation(rng, tasks)
    task["annotations"].append(copy.deepcopy(annotation) | {"id": 1000})


def whole_task_twice(rng, tasks):
    tasks.append(copy.deepcopy(rng.choice(tasks)))


DAMAGES = (
    no_region, wrong_type, emptied_bucket, in_two_buckets, foreign_task, another_text, unknown_labeler, second_region,
    twice, whole_task_twice,
)  # fmt: skip
HARMLESS = (twice, whole_task_twice)
OPTIONAL = re.compile(r"(fields|notes)_\d")
# What may be anything: nobody reads it.
UNREAD = {"id", "origin", "to_name", "predictions", "lead_time"}


def told(error, tasks):
    """One message for a person, which says file and task, and labeler where the damage is in an annotation."""
    line = errors.describe(error)
    assert line is not None and "e.json" in line, error
    return line


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_answer_is_reported_with_its_task_and_labeler_or_harmless(asked, tmp_path, damage):
    whole, _ = read(asked, write_json(tmp_path, asked[2]))
    for seed in range(10):
        tasks, rng = copy.deepcopy(asked[2]), random.Random(seed)
        what = damage(rng, tasks)
        path = write_json(tmp_path, tasks)
        if damage in HARMLESS:
            assert read(asked, path)[0] == whole
        elif what is not None and OPTIONAL.fullmatch(what):  # not ticked, not written
            assert read(asked, path)[0]["comparisons"] == whole["comparisons"]
        else:
            with pytest.raises(ValueError) as refused:
                read(asked, path)
            line = told(refused.value, tasks)
            assert re.search(r"e\.json\[\d\]: task (\w+|without id|\[\])", line), line
            assert re.search(r"labeler (p\d|null|77|\[\]|\"nobody|\{\"id\")", line), line


def test_anything_in_any_place_is_reported_or_harmless(asked, tmp_path):
    whole, _ = read(asked, write_json(tmp_path, asked[2]))
    refused = 0
    for seed in range(80):
        tasks = copy.deepcopy(asked[2])
        path = damage_node(random.Random(f"any {seed}"), tasks)
        try:
            found, report = read(asked, write_json(tmp_path, tasks))
        except ValueError as error:
            refused += 1
            line = told(error, tasks)
            if "annotations" in path[:-2]:
                assert re.search(r"task \w{12}, labeler ", line), (path, line)
            continue
        kept = [line for line in whole["comparisons"] if line in found["comparisons"]]
        if path[-1] in UNREAD or path[-1] == "annotations" or found == whole:
            assert len(kept) + (path[-1] in ("annotations", "lead_time")) * 99 >= len(whole["comparisons"]), path
        else:  # a tick or a note may be another one, a column left empty
            assert found["comparisons"] == whole["comparisons"], path
    assert refused > 40


@pytest.mark.parametrize("form", ["JSON", "JSON-MIN"])
def test_a_truncated_file_is_refused(asked, tmp_path, form):
    text = json.dumps(asked[2] if form == "JSON" else minimal(asked[2]))
    for seed in range(10):
        (tmp_path / "e.json").write_text(text[: random.Random(seed).randrange(len(text))])
        with pytest.raises(ValueError, match="e.json must be an export of Label Studio in JSON or JSON-MIN, whole"):
            read(asked, tmp_path / "e.json")


def test_bad_answers_may_be_allowed(asked, tmp_path):
    config, key, tasks = asked
    config, tasks = copy.deepcopy(config), copy.deepcopy(tasks)
    emptied_bucket(random.Random(0), tasks)
    config.label.skip_answers = 1
    lines, report = read((config, key, tasks), write_json(tmp_path, tasks))
    assert len(lines["comparisons"]) == 8 and report["kept"] == 8


def write_json(folder, tasks):
    (folder / "e.json").write_text(json.dumps(tasks))
    return folder / "e.json"


# --- other projects ---


def test_label_studios_own_samples(shared_data, tmp_path, capsys):
    (one,) = exports.read(str(shared_data / "label_studio/choices_export.json")).annotations
    assert one.values == {"sentiment": ("Positive",)} and one.seconds == 1.849 and not one.skipped
    assert one.labeler["email"] == "sergei@heartex.test"
    assert foreign.ranked(one.values["sentiment"], ("Negative", "Positive"), ()) == [2, 1]
    (one,) = exports.read(str(shared_data / "label_studio/ranker_list_example.json")).annotations
    assert exports.ranks(one.values["rank"], ("123", "1234", "12345", "123456", "1234567")) == [2, 1, 3, 4, 5]

    path = shared_data / "restricted/label_studio_export_pairwise.json"
    raw = json.loads(path.read_text())
    foreign.main([f"--export={path}", "--completions=answer1,answer2", f"--output={tmp_path}/c.jsonl"])
    assert "15 comparisons in" in capsys.readouterr().out
    found = sources.load((f"jsonl:{tmp_path}/c.jsonl",), "comparisons", 0)
    for record, task in zip(found, raw, strict=True):
        side = task["annotations"][0]["result"][0]["value"]["selected"]
        assert record["completions"] == [task["data"]["answer1"], task["data"]["answer2"]]
        assert record["ranking"] == ([1, 2] if side == "left" else [2, 1]) and record["labeler"] == 2


@pytest.mark.parametrize("form", ["JSON", "JSON-MIN"])
@pytest.mark.parametrize("ranking", [{"1": [2], "2": [1, 3]}, {"1": ["2"], "2": ["1", "3"]}, [2, 1, 3]])
def test_a_ranker_beside_lists_and_objects_of_the_task(tmp_path, form, ranking):
    items = [{"id": number, "body": text} for number, text in ((1, "a"), (2, "b"), (3, "c"))]
    data = {"prompt": "?", "items": items, "tags": ["x", "y"], "meta": {"source": "z"}, "one": [{"k": 1}], "none": []}
    result = {"from_name": "rank", "to_name": "items", "type": "ranker", "value": {"ranker": ranking}}
    task = {"id": 7, "data": data, "annotations": [{"id": 1, "completed_by": 3, "result": [result]}]}
    if form == "JSON-MIN":
        task = {"id": 7, **data, "rank": [{"ranker": ranking}], "annotator": 3, "annotation_id": 1}
    path, out = write_json(tmp_path, [task]), tmp_path / "c.jsonl"
    foreign.main([f"--export={path}", "--completions=items", f"--output={out}"])
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["completions"] == ["a", "b", "c"] and record["labeler"] == 3
    assert record["ranking"] == ([2, 1, 3] if isinstance(ranking, list) else [2, 1, 2])


@pytest.mark.parametrize(
    "value, ranks",
    [
        ("left", [1, 2]), ("right", [2, 1]), (("a",), [1, 2]), (("b",), [2, 1]), (("same",), [1, 1]), (("good",), None),
        (("a", "b"), None), (["b", "a"], [2, 1]), ({"1": ["a"], "3": ["b"]}, [1, 2]), ({"1": ["a", "b"]}, [1, 1]),
        (4, None),
    ],
)  # fmt: skip
def test_what_ranks(value, ranks):
    assert foreign.ranked(value, ("a", "b"), ("same",)) == ranks


# --- the way to the server ---


class Server:
    """What `label-studio-sdk` speaks to: it keeps projects and tasks, and dies after so many requests."""

    def __init__(self):
        self.stored, self.requests_left = {}, 10**9
        self.projects = types.SimpleNamespace(
            list=lambda: [one.project for one in self.stored.values()], create=self.create, update=self.update,
            import_tasks=self.import_tasks, exports=types.SimpleNamespace(as_json=lambda number: self.export(number)),
        )  # fmt: skip
        self.tasks = types.SimpleNamespace(list=lambda project, page_size: self.stored[project].tasks)
        self.users = types.SimpleNamespace(list=lambda: [types.SimpleNamespace(id=3, email="p0@x.org")])

    def request(self):
        self.requests_left -= 1
        if self.requests_left < 0:
            raise sys.modules["httpx"].HTTPError("connection lost")

    def create(self, **given):
        self.request()
        number = len(self.stored) + 1
        project = types.SimpleNamespace(id=number, description=given["description"], given=given)
        self.stored[number] = types.SimpleNamespace(project=project, tasks=[])
        return project

    def update(self, id, **given):
        self.stored[id].project.given |= given

    def import_tasks(self, id, request):
        for task in request:  # one after another: some are there when it dies
            self.request()
            self.stored[id].tasks.append(types.SimpleNamespace(data=task["data"]))

    def export(self, number):
        return [{"data": task.data, "annotations": []} for task in self.stored[number].tasks]


@pytest.fixture
def fake(monkeypatch):
    made = Server()
    sdk, core, httpx = (types.ModuleType(name) for name in ("label_studio_sdk", "label_studio_sdk.core", "httpx"))
    httpx.HTTPError = type("HTTPError", (Exception,), {})
    core.ApiError = type("ApiError", (Exception,), {"status_code": 403, "body": {"detail": "No\nrights"}})
    sdk.LabelStudio = lambda base_url, api_key: made
    for module in (sdk, core, httpx):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv(server.TOKEN, "t")
    made.refused = core.ApiError
    return made


@pytest.fixture
def sent(tmp_path):
    many = [ANSWERS[1] | {"prompt": f"prompt {n}"} for n in range(8)]
    config = configure(tmp_path, records=many, overlap=1)
    step(config, tmp_path / "run", "make")
    return epath.Path(tmp_path / "run")


def test_a_server_that_dies_half_way_gets_the_rest_once(fake, sent):
    for left in range(5):
        fake.requests_left = left
        with pytest.raises(ValueError, match="must be a Label Studio server that can be reached, got http://x: .*lo"):
            list(server.push("http://x", sent))
    fake.requests_left = 99
    list(server.push("http://x", sent))
    assert [name for name, count, _ in server.push("http://x", sent) if count] == []
    names = [task.data["task"] for one in fake.stored.values() for task in one.tasks]
    assert sorted(names) == sorted(make.read_key(sent)) and len(fake.stored) == 3  # a project a labeler
    assert all(one.project.given["maximum_annotations"] == 1 for one in fake.stored.values())
    assert all(one.project.given["label_config"].startswith("<View>") for one in fake.stored.values())
    fetched, users = server.pull("http://x", sent)
    assert sorted(fetched) == ["p0", "p1", "p2"] and users == {3: "p0@x.org"}


def test_a_token_without_rights_is_one_line(fake, sent):
    def refuse():
        raise fake.refused

    fake.projects.list = refuse
    for call in (lambda: list(server.push("http://x", sent)), lambda: server.pull("http://x", sent)):
        with pytest.raises(ValueError) as refused:
            call()
        assert errors.describe(refused.value) == (
            '$LABEL_STUDIO_API_KEY must be a token with the right to make projects at http://x, got 403: {"detail": '
            '"No\\nrights"}'
        )


def test_a_project_that_was_never_sent(fake, sent):
    with pytest.raises(ValueError, match="must have the project 'p0 .*', which config.label.step=push makes, got none"):
        server.pull("http://x", sent)


def test_without_the_extra_or_a_token(monkeypatch):
    monkeypatch.delenv(server.TOKEN, raising=False)
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need the extra 'label' \(pip install 'instructgpt-jax\[label\]'\), got"):
        server.check()
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"\$LABEL_STUDIO_API_KEY must be the token of a Label Studio account, got"):
        server.check()


# --- the screening ---


def test_scores_by_hand(tmp_path, capsys):
    groups = {"r": "researcher", "s": "researcher", "a": "training", "b": "heldout"}
    crowd = [{"id": name, "group": group, "email": f"{name}@x"} for name, group in groups.items()]
    flags = [
        {"task": str(n), "labeler": who, "sensitive": value == "1"}
        for who, values in {"r": "1100", "s": "1110", "a": "1100"}.items()
        for n, value in enumerate(values)
    ]
    texts = ["p", "q", "s", "q "]  # the last is the second once more: one item on the page, judged once
    rankings = {"r": [1, 2, 3, 2], "a": [1, 1, 2, 1], "b": [3, 2, 1, 2]}
    comparisons = [
        {"task": "t", "labeler": who, "completions": texts, "ranking": ranks} for who, ranks in rankings.items()
    ]
    grades = [{"author": "a", "labeler": who, "grade": grade} for who, grade in (("r", 7), ("s", 5), ("b", 1))]
    names = {"labelers": crowd, "flags": flags, "comparisons": comparisons, "grades": grades}
    files = [f"--{name}={write(tmp_path / f'{name}.jsonl', lines)}" for name, lines in names.items()]
    screening.main([*files, f"--output={tmp_path}/screening.json"])
    found = json.loads((tmp_path / "screening.json").read_text())
    assert found["a"] == {
        "group": "training", "flags": 7 / 8, "rankings": 1.0, "grade": 6.0, "n_flags": 8, "n_rankings": 2, "n_grade": 2,
        "passed": True,
    }  # fmt: skip
    assert (found["b"]["flags"], found["b"]["rankings"], found["b"]["passed"]) == (None, 0.0, False)
    assert "r" not in found and re.search(r"^a +0\.88 +1\.00 +6\.00 +yes$", capsys.readouterr().out, re.MULTILINE)
    screening.main([*files, "--least_grade=6.5", f"--output={tmp_path}/screening.json"])
    assert not json.loads((tmp_path / "screening.json").read_text())["a"]["passed"]


def test_a_line_without_its_field_is_named(tmp_path, capsys):
    write(tmp_path / "l.jsonl", [{"id": "a", "group": "training", "email": "a@x"}])
    write(tmp_path / "f.jsonl", [{"labeler": "a", "task": "t"}])
    with pytest.raises(SystemExit):
        screening.main([f"--labelers={tmp_path}/l.jsonl", f"--flags={tmp_path}/f.jsonl"])
    assert "f.jsonl:1: a line of label must have ['sensitive'], got" in capsys.readouterr().err


def test_what_fill_gives_is_what_a_page_asks(asked):
    """The damages above begin from an export that is whole."""
    _, key, tasks = asked
    assert len(tasks) == 3 and sum(len(task["annotations"]) for task in tasks) == 9
    assert all(len(fill(task, people.Labeler("p0", ""))) == 5 * len(task.shown) + 1 for task in key.values())
