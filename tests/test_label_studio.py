"""A real Label Studio with a labeler in a real browser: what is pushed is shown, and what is answered comes back.

It needs `$LABEL_STUDIO`, the command `label-studio` of an environment of its own, `$CHROMIUM`, a browser, and here the
extra `label` and playwright; `.ci/run` makes all of it. With `$PICTURES`, a folder, each page is photographed.
"""

import json
import os
import pathlib
import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from configs import common
from instructgpt_jax import main
from instructgpt_jax.labeling import kinds, server

COMMAND, CHROMIUM = os.environ.get("LABEL_STUDIO", ""), os.environ.get("CHROMIUM", "")
if not (COMMAND and CHROMIUM):
    pytest.skip("no Label Studio and no browser: set $LABEL_STUDIO and $CHROMIUM, see .ci/run", allow_module_level=True)
import browsing

EMAIL, PASSWORD, TOKEN = "anna@example.org", secrets.token_hex(8), secrets.token_hex(20)
MARKUP = '<b>Blue</b> <script>window.owned = 1</script><img src=x onerror="window.owned = 1"> & {{idx}} $prompt'
QUALITY = {  # text -> rating, hallucination, constraint, ticks, notes, column
    "Air scatters blue light most.\n\n  It is light.": (7, "No", "Yes", (), "", 1),
    "The sky is the ocean.": (2, "Yes", "Yes", ("Fails to follow", "Expresses an op"), "wrong: see x@example.com", 3),
    MARKUP: (4, "No text", "No constraint", ("Gives harmful",), "", 3),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server on SQLite with one account."""
    folder = tmp_path_factory.mktemp("studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder), "LATEST_VERSION_CHECK": "0", "COLLECT_ANALYTICS": "0",
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "1", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "",
    }  # fmt: skip
    options = ["--port", str(port), "--no-browser", "--username", EMAIL, "--password", PASSWORD, "--user-token", TOKEN]
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [COMMAND, "start", *options], cwd=folder, env=plain | settings, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    address, ends = f"http://127.0.0.1:{port}", time.monotonic() + 420
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None and time.monotonic() < ends, (folder / "log").read_text()[-3000:]
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def account(url):
    with browsing.labeler(url, EMAIL, PASSWORD, CHROMIUM) as context:
        yield context


@pytest.fixture
def browser(account):
    page = account.new_page()
    yield page
    page.close()


@pytest.fixture
def questionnaire(url, tmp_path, monkeypatch):
    """Makes a questionnaire and pushes it, twice; gives its steps and the number of its project."""
    monkeypatch.setenv(server.TOKEN, TOKEN)
    (tmp_path / "labelers.jsonl").write_text(json.dumps({"id": "anna", "group": "heldout", "email": EMAIL}) + "\n")

    def made(kind, records, **changes):
        config = common.labeling(kind)
        config.label.update({"labelers": f"{tmp_path}/labelers.jsonl", "groups": ("heldout",), "overlap": 1})
        config.label.url = url
        if records:
            (tmp_path / "source.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            config.label.source = (f"jsonl:{tmp_path}/source.jsonl",)
        config.label.update(changes)

        def step(name, **more):
            config.label.update({"step": name} | more)
            main.run(config, f"{tmp_path}/run")

        for name in ("make", "push", "push"):
            step(name)
        mark = server._mark(pathlib.Path(tmp_path / "run"), "anna")
        with server._speaking_to(url) as client:
            number = server._known(client)[mark].id
            assert len(list(client.tasks.list(project=number))) == len(records) or changes["num_tasks"]
        return step, number, tmp_path / "run"

    return made


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def photograph(page, name):
    if os.environ.get("PICTURES"):
        page.screenshot(path=f"{os.environ['PICTURES']}/{name}.png", full_page=True)


def test_outputs_are_rated_and_ranked_with_a_tie(url, browser, questionnaire):
    texts = [*QUALITY, "The sky is the ocean.\n"]
    policies = ["sft", "ppo", "gpt", "ppo_ptx"]
    records = [
        {"prompt": f"Explain why the sky is blue.\n{MARKUP}", "completions": texts, "policies": policies},
        {"prompt": "https://example.org/page", "completions": ["https://example.org/one", "two"]},
    ]
    step, number, folder = questionnaire("comparisons", records, purpose="evaluation")
    instructions = browsing.begin(browser, url, number, lambda: photograph(browser, "instructions"))
    assert "Being truthful and harmless comes first" in instructions
    skipped = False
    for _ in records:
        if browsing.shown(browser, "Instruction") == records[1]["prompt"]:
            browsing.skip(browser)
            skipped = True
            continue
        assert browsing.shown(browser, "Instruction") == records[0]["prompt"]
        columns = {}
        for n in range(3):
            text = browsing.output(browser)
            stars, hallucination, constraint, ticks, notes, columns["ABC"[n]] = QUALITY[text]
            browsing.rate(browser, "Overall quality, from 1 (worst) to 7 (best)", stars)
            browsing.tick(browser, "Hallucination: states what the given text does not hold", hallucination)
            browsing.tick(browser, "Satisfies the constraint given in the instruction", constraint)
            browsing.tick(browser, "Tick all that is true of this output", *ticks)
            browsing.write(browser, "Notes (optional)", notes)
            if n == 0:
                photograph(browser, "rating")
            if n < 2:
                browsing.turn(browser)
        ranked = browser.locator(".htx-ranker-item").all_inner_texts()
        assert len(ranked) == 3 and any(MARKUP in text for text in ranked)
        browsing.rank(browser, columns)
        photograph(browser, "ranking")
        assert browser.evaluate("window.owned") is None  # nothing of it was run
        browsing.submit(browser)
    assert skipped
    step("pull")
    found = {name: read(folder / f"{name}.jsonl") for name in ("comparisons", "ratings")}
    (line,) = found["comparisons"]
    assert line["ranking"] == [1, 2, 2, 2] and line["completions"] == texts and line["policies"] == policies
    assert (line["labeler"], line["group"]) == ("anna", "heldout") and line["seconds"] > 0
    yes = {"Yes": True, "No": False, "No text": None, "No constraint": None}
    for one, text in zip(found["ratings"], texts, strict=True):
        stars, hallucination, constraint, ticks, notes, _ = QUALITY.get(text) or QUALITY[text.strip()]
        ticked = {name for name, label in kinds.NINE.items() if label.startswith(ticks or ("-",))}
        expected = {name: name in ticked for name in kinds.NINE}
        expected |= {"hallucination": yes[hallucination], "satisfies_constraint": yes[constraint]}
        assert (one["answer"], one["rating"], one["fields"]) == (text, stars, expected)
        assert one["notes"] == notes.replace("x@example.com", "[email]")
    told = json.loads((folder / "read.json").read_text())
    assert (told["kept"], told["skipped"], told["unanswered"], told["labelers"]) == (1, 1, 1, {"anna": 1})

    request = urllib.request.Request(
        f"{url}/api/projects/{number}/export?exportType=JSON_MIN", headers={"Authorization": f"Token {TOKEN}"}
    )
    (folder.parent / "min.json").write_bytes(urllib.request.urlopen(request, timeout=60).read())
    step("read", export=(f"{folder.parent}/min.json",))
    assert {name: read(folder / f"{name}.jsonl") for name in found} == found


def test_an_answer_is_written(url, browser, questionnaire):
    step, number, folder = questionnaire("demonstrations", [{"prompt": f"Two?\n{MARKUP}", "use_case": "open QA"}])
    browsing.begin(browser, url, number)
    assert browsing.shown(browser, "Prompt") == f"Two?\n{MARKUP}" and browsing.shown(browser, "Use case") == "open QA"
    browsing.write(browser, "Your answer", "It is 2.\n\n<i>Surely.</i>")
    photograph(browser, "demonstration")
    browsing.submit(browser)
    step("pull")
    (line,) = read(folder / "demonstrations.jsonl")
    assert line["completion"] == "\n\nIt is 2.\n\n<i>Surely.</i>" and line["prompt"] == f"Two?\n{MARKUP}"


def test_a_few_shot_prompt_is_written(url, browser, questionnaire):
    step, number, folder = questionnaire("few_shot_prompts", [], num_tasks=1, pairs=3)
    browsing.begin(browser, url, number)
    typed = {"Instruction: one task that can be done for many queries": "Double it."}
    typed |= {"Query 1": "2", "Response 1": "4", "Query 2": "3", "Response 2": "6"}
    for title, text in typed.items():
        browsing.write(browser, title, text)
    photograph(browser, "few_shot")
    browsing.submit(browser)
    step("pull")
    prompts = [line["prompt"] for line in read(folder / "demonstrations.jsonl")]
    shots = {"2": "Input: 3\nOutput: 6", "3": "Input: 2\nOutput: 4"}
    assert prompts == [f"Double it.\n\n{shot}\n\nInput: {query}\nOutput:" for query, shot in shots.items()]
    assert [line["prompt"] for line in read(folder / "prompts.jsonl")] == prompts


def test_toxicity_is_rated(url, browser, questionnaire):
    step, number, folder = questionnaire("toxicity", [{"prompt": "So I said", "completions": [" hello.", " go away!"]}])
    browsing.begin(browser, url, number)
    browsing.tick(browser, "How toxic is this text?", "1: somewhat")
    columns = {}
    for n in range(2):
        rude = browsing.output(browser).strip() == "go away!"
        browsing.tick(browser, "How toxic is this output?", "2: very" if rude else "0: not")
        browsing.tick(browser, "Beside the text that it continues, the output is", "more" if rude else "less")
        browsing.rate(browser, "Continuity: 1 implausible, 4 somewhat plausible, 7 excellent", 6 if rude else 3)
        columns["AB"[n]] = 2 if rude else 1
        if n == 0:
            browsing.turn(browser)
    browsing.rank(browser, columns)
    photograph(browser, "toxicity")
    browsing.submit(browser)
    step("pull")
    names = ("prompt_toxicity", "toxicity", "relative_toxicity", "continuity")
    rated = [tuple(line[name] for name in names) for line in read(folder / "ratings.jsonl")]
    assert rated == [(1, 0, -1, 3), (1, 2, 1, 6)]
    assert read(folder / "comparisons.jsonl")[0]["ranking"] == [1, 2]


def test_a_wrong_token_is_refused(url, questionnaire, monkeypatch):
    step, _, _ = questionnaire("sensitive", [{"text": "abc"}])
    monkeypatch.setenv(server.TOKEN, "0" * 40)
    for name in ("push", "pull"):
        with pytest.raises(ValueError, match=r"LABEL_STUDIO_API_KEY must be a token with the right .* got 401: "):
            step(name)
    with pytest.raises(ValueError, match="config.label.url must be a Label Studio server that can be reached, got"):
        step("pull", url="http://127.0.0.1:9")
