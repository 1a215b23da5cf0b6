"""The report: the page, its figures, its findings, and what it does with a report that is not one."""

import copy
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import matplotlib
import numpy as np
import pytest
from matplotlib import figure as mpl
from matplotlib import image

from instructgpt_jax import report as reports
from instructgpt_jax.report import figures, findings, page, style, words
from tests.report_example import example, interval

SECTIONS = {  # key of the report -> sections that the page has with it and the models alone
    "results": ["paper", "preferences", "metadata", "scores", "numbers"],
    "language": ["paper", "tax"],
    "reward_model": ["paper", "reward"],
    "curves": ["training"],
    "overoptimisation": ["overoptimisation"],
    "folds": ["paper", "reward"],
    "sweeps": ["paper", "settings"],
    "prompt_sets": ["prompts"],
    "prefix": ["prefix"],
    "samples": ["samples"],
}
HEAD = ("title", "models", "baseline")


class Reader(html.parser.HTMLParser):
    """Collects what a page consists of, and fails on tags that do not match."""

    VOID = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.text, self.tables = [], set(), [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[key] for key in ("src", "href", "xlink:href", "data", "srcset") if key in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open[-2:]):
            self.tables[-1][-1][-1] += ("|" if self.open[-1] == "small" else "") + data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The example's folder, its page as text and as read."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "likert.png").write_bytes(b"of an earlier report")
    reports.write(example(), folder)
    text = (folder / "index.html").read_text()
    return folder, text, Reader(text)


def figure(report: dict, name: str) -> style.Figure:
    return next(one for one in figures.all_figures(report) if one.name == name)


def part(*keys: str) -> dict:
    """The example with only these sections."""
    return {key: value for key, value in example().items() if key in HEAD + keys}


# The page -------------------------------------------------------------------------------------------------------------


def test_page_has_every_section_and_an_entry_for_each(written):
    _, _, found = written
    wanted = {name for names in SECTIONS.values() for name in names} | {"run"}
    assert wanted <= set(found.ids) and {f"#{name}" for name in wanted} <= set(found.links)
    assert {f"figure_{name}" for name in figures.NAMES} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_page_is_self_contained(written):
    _, text, found = written
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    beside = {"report.json"} | {f"{name}.png" for name in figures.NAMES}
    assert {link for link in found.links if not link.startswith("#")} == beside
    assert "http" not in text and "url(" not in text.replace("url(#", "") and "@import" not in text
    inner = {link[1:] for link in found.links if link.startswith("#")} | set(re.findall(r"url\(#(\w+)\)", text))
    assert inner <= set(found.ids)


def test_page_escapes_text(written):
    _, text, found = written
    assert "<script>" not in text and "<animals>" not in text
    whole = "".join(found.text)
    assert "<script>alert(3)</script>\u2404" in whole and "fox & hare" in whole and "Name 3 <animals>." in whole


@pytest.mark.filterwarnings("ignore:Glyph")
def test_text_of_anybody_is_text_wherever_it_stands(tmp_path):
    report, bad = example(), "</style><script>document.title = 'run'</script><img src=x onerror=\"document.title=1\">"
    bad += "'\"&amp;{{ 7 * 7 }}\x00\x1b\r\ud800$\\frac$"
    shown = bad.replace("\x00", "\u2400").replace("\x1b", "\u241b").replace("\r", "\u240d").replace("\ud800", "?")
    report["title"] = report["samples"][0]["prompt"] = report["samples"][0]["reference"] = bad
    report["models"]["sft_small"]["label"] = report["prefix"]["candidates"][0]["text"] = bad
    report["samples"][0]["responses"]["sft_small"]["text"] = report["perf"]["device"] = bad
    report["language"][bad] = {"tasks": {bad: interval(0.5, 0.1)}}
    report["curves"][bad] = report["curves"].pop("pretrain")
    reports.write(report, tmp_path)
    page_text = (tmp_path / "index.html").read_text()
    found = Reader(page_text)
    assert not found.tags & {"script", "img"} and page_text.count("</style>") == 1
    assert "".join(found.text).count(shown) > 8
    installed = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser = os.environ.get("CHROMIUM") or next(filter(None, installed), None)
    if browser is None:
        pytest.skip("no Chromium to open the page in: set $CHROMIUM, see .ci/run")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", (tmp_path / "index.html").as_uri()]
    opened = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "<script" not in opened and "<img" not in opened
    title = re.search("<title>(.*?)</title>", opened, re.DOTALL)[1]
    prompts = re.findall('<div class="prompt text">(.*?)</div>', opened, re.DOTALL)
    assert html.unescape(title) == shown and shown in [html.unescape(prompt) for prompt in prompts]


def test_what_the_page_is_made_from_is_installed_with_the_package():
    root = pathlib.Path(__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path for path in (root / "instructgpt_jax/report").iterdir() if path.suffix in (".jinja", ".css")]
    assert len(files) == 3
    assert all(any(path.match(one) for one in patterns["instructgpt_jax.report"]) for path in files)


def test_page_shows_samples_of_each_distribution_first(written):
    assert re.findall(r"Name (\d) &lt;", written[1])[:4] == ["5", "0", "6", "1"]  # instruct and gpt in turn


def test_svg_follows_the_style_sheet(written):
    _, text, _ = written
    css, body = text.split("</style>")  # the only one: a figure's own would be the whole page's
    for name in style.PALETTE:
        assert css.count(f"--{name}: #") == 2  # light and dark
    assert not re.search(r"#[0-9a-f]{6}\b", body), "a colour that does not follow dark and light"


@pytest.mark.parametrize("key", SECTIONS)
def test_sections_without_numbers_are_left_out(key):
    report = part(key)
    if key == "results":
        del report["results"]["gpt"]
    found = Reader(page.render(report, figures.all_figures(report)))
    sections = [name for name in found.ids if name in {n for names in SECTIONS.values() for n in names}]
    assert sections == SECTIONS[key]


def test_numbers_of_the_page_are_those_of_the_report(written):
    report, found, seen = example(), written[2], 0
    names = words.model_names(report)
    tables = [table for table in found.tables if table[0][1:2] == [names["base_small"]]]
    public = tables.pop(1)
    assert len(tables) == 3  # the tax, and each distribution
    for name, cell in zip(report["models"], public[2][1:], strict=True):
        same(cell, report["benchmarks"]["task"][name]["acc_token"], 100)
    labels = {label: (key, 100 if form == "share" else 1) for key, (label, form, _) in words.METRICS.items()}
    for table, rows in zip(tables[1:], (report["results"]["instruct"], report["results"]["gpt"]), strict=True):
        quantity = ""
        assert table[0][1:] == list(names.values())
        for line in table[1:]:
            label = line[0].split("|")[0]
            if len(line) == 1:
                quantity = {"W": "win_rate", "R": "likert", "P": "metadata", "S": ""}[label[0]]
                continue
            for name, cell in zip(report["models"], line[1:], strict=True):
                if quantity:
                    inner = {words.name(k, words.GROUPS | words.METADATA): v for k, v in rows[name][quantity].items()}
                    value, scale = inner[label], 1 if quantity == "likert" else 100
                else:
                    key, scale = labels[label]
                    value = rows[name][key]
                same(cell, value, scale)
                seen += 1
    lines = [tables[0][number] for number in (1, 3, 5)]
    for line, key in zip(lines, ("pretraining_loss", "tasks", "tasks_per_token"), strict=True):
        for name, cell in zip(report["language"], line[1:], strict=True):
            value = report["language"][name][key]
            same(cell, value.get("cloze", value), 100 if "cloze" in value else 1)
            seen += 1
    assert seen == 2 * 11 * (2 + 2 + 5 + 9) + 3 * 10


def test_tables_of_the_prompts_and_of_the_folds(written):
    tables = {(table[0][1], len(table)): table for table in written[2].tables if len(table[0]) > 1}
    assert tables["long common prefix", 3][1:] == [["left out", "7,927", "801"], ["left", "10,073", "9,272"]]
    sets = tables["train", 12]
    assert sets[0] == ["", "train", "valid", "test"] and sets[1] == ["prompts, customer", "5,000", "–", "–"]
    assert sets[2:4] == [["prompts", "5,819", "718", "2,371"], ["prompts per user", "6.01", "31.6", "–"]]
    assert sets[4:7] == [["count", "1,234", "1,234", "–"], ["mean", "16.6", "18.6", "–"], ["std", "2.50", "2.50", "–"]]
    assert tables["open qa", 9][0] == ["", "open qa", "none named"] and tables["open qa", 9][-1] == ["max", "96", "96"]
    assert tables["prompt, customer", 9][0] == ["", "prompt, customer", "demonstration"]
    folds = tables["this run", 4]
    assert folds[0] == ["", "this run", "the paper"]
    assert folds[1][1:] == ["72.4|72.0 to 72.8", "72.4|72.0 to 72.8"] and folds[2][1:] == ["69.6|68.7 to 70.5"] * 2
    assert folds[3][1:] == ["−2.8|−3.5 to −2.1", "–"] or folds[3][1:] == ["-2.8|-3.5 to -2.1", "–"]


def same(cell: str, value: dict | float, scale: float) -> None:
    """`mean|low to high` is the value to the last digit that is shown, and at least two digits are."""
    shown = cell.replace("−", "-").replace("|", " to ").split(" to ")
    wanted = [value[key] for key in ("mean", "low", "high")] if isinstance(value, dict) else [value]
    for text, number in zip(shown, wanted, strict=True):
        decimals = len(text.partition(".")[2])
        assert decimals >= 1 and abs(float(text) - scale * number) <= 0.5001 * 10**-decimals, (cell, value)


def test_report_json_is_the_report(written):
    assert json.loads((written[0] / "report.json").read_text()) == example()


# Figures --------------------------------------------------------------------------------------------------------------


def test_every_figure_is_a_png(written):
    for name in figures.NAMES:
        pixels = image.imread(written[0] / f"{name}.png")
        assert pixels.shape[0] > 400 and pixels.shape[1] > 600 and pixels[..., :3].std() > 0.02


def test_figures_of_an_earlier_report_go(tmp_path):
    for name in ("likert.png", "mine.png"):
        (tmp_path / name).write_bytes(b"earlier")
    reports.write(part("prefix"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "mine.png", "report.json"]


def test_win_rates_are_drawn_as_they_are():
    report = example()
    panels = figure(report, "figure3_win_rate_by_group").panels
    assert [panel.title for panel in panels] == [
        f"{kind} prompts, {labelers} labelers" for kind in ("Instruct", "GPT") for labelers in ("training", "held-out")
    ]
    for panel, (kind, group) in zip(
        panels, [(k, g) for k in ("instruct", "gpt") for g in ("training", "heldout")], strict=True
    ):
        ax = mpl.Figure().add_subplot()
        panel.draw(ax)
        drawn = {round(float(y), 6) for line in ax.lines for y in line.get_ydata()}
        for row in report["results"][kind].values():
            assert {round(row["win_rate"][group][key], 6) for key in ("mean", "low", "high")} <= drawn
        assert ax.get_ylim()[1] >= 0.79 and [t.get_text() for t in ax.get_xticklabels()] == [
            "small\n1.4M",
            "medium\n3.6M",
        ]


def test_one_size_has_a_row_a_model():
    report = example()
    report["models"] = {name: model for name, model in report["models"].items() if model["size"] == "small"}
    report["results"] = {"instruct": {name: report["results"]["instruct"][name] for name in report["models"]}}
    ax = mpl.Figure().add_subplot()
    figure(report, "figure1_win_rate").panels[0].draw(ax)
    labels = ["GPT", "GPT (prompted)", "SFT", "PPO", "PPO-ptx", "FLAN", "T0", "PPO, shuffled\nrankings"]
    assert [t.get_text() for t in ax.get_yticklabels()] == labels
    drawn = {round(float(x), 6) for line in ax.lines for x in line.get_xdata()}
    for row in report["results"]["instruct"].values():
        assert {round(row["win_rate"]["training"][key], 6) for key in ("mean", "low", "high")} <= drawn


def test_public_tasks_stand_beside_the_models_of_their_size():
    report = example()
    ax = mpl.Figure().add_subplot()
    figure(report, "figure5_likert_flan_t0").panels[0].draw(ax)
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert [label.partition(",")[0] for label in labels] == [
        "GPT", "GPT (prompted)", "SFT", "PPO", "PPO-ptx", "FLAN", "T0",
    ]  # fmt: skip
    drawn = {round(float(x), 6) for line in ax.lines for x in line.get_xdata()}
    for name in ("base_small", "flan_small", "t0_small"):
        rated = report["results"]["instruct"][name]["likert"]["training"]
        assert {round(rated[key], 6) for key in ("mean", "low", "high")} <= drawn
    assert ax.get_xlim() == (0.9, 7.1)
    report["models"] = {name: m for name, m in report["models"].items() if m["method"] not in ("flan", "t0")}
    for rows in report["results"].values():
        del rows["flan_small"], rows["t0_small"]
    assert "figure5_likert_flan_t0" not in [one.name for one in figures.all_figures(report)]


def test_two_models_of_one_method_and_size_are_two_lines():
    report = example()
    report["models"]["again"] = report["models"]["ppo_ptx_small"] | {"label": "PPO-ptx, round 2"}
    lines = [line for line in words.lines(report, list(report["models"])) if line.color == "ppo_ptx"]
    assert [(line.label, line.dashes) for line in lines] == [("PPO-ptx", 0), ("PPO-ptx, round 2", 1)]
    assert lines[0].models == {"small": "ppo_ptx_small", "medium": "ppo_ptx_medium"} and lines[1].models == {
        "small": "again"
    }


def test_drawing_leaves_matplotlib_as_it_was_and_the_same_report_is_the_same_bytes():
    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    drawn = figure(example(), "reward_model")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):  # a user's own settings do not matter
        first = style.svg(drawn.panels[0], "one"), style.png(drawn)
    assert first == (style.svg(drawn.panels[0], "one"), style.png(drawn))
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == pyplot


# Findings -------------------------------------------------------------------------------------------------------------


def verdicts(report: dict) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in findings.findings(report)}


def test_findings_hold_where_the_numbers_say_so():
    found = findings.findings(example())
    assert {finding.verdict for finding in found} == {findings.HOLDS} and len(found) == 37
    texts = {finding.claim: finding.here for finding in found}
    assert texts["PPO-ptx (InstructGPT) is preferred to SFT"] == "small: 50 % → 70 ± 3 %\nmedium: 53 ± 3 % → 73 ± 3 %"
    assert texts["PPO pays an alignment tax: its pretraining loss is more than 2 % above GPT's"] == (
        "small: 1.620 → 1.800 nats (+11.1 %)"
    )


@pytest.mark.parametrize(
    "claim, path, mean, verdict",
    [
        ("A few-shot prefix", "results instruct prefix_small win_rate training", 0.07, findings.FAILS),
        ("A few-shot prefix", "results instruct prefix_small win_rate training", 0.1, findings.UNCLEAR),
        ("PPO-ptx (Ins", "results instruct ppo_ptx_medium win_rate training", 0.55, findings.UNCLEAR),
        ("PPO-ptx (Ins", "results instruct ppo_ptx_small win_rate training", 0.4, findings.FAILS),
        (
            "The smallest PPO-ptx beats the largest GPT",
            "results instruct base_medium win_rate training",
            0.8,
            findings.FAILS,
        ),
        ("SFT is preferred to FLAN", "results instruct flan_small win_rate training", 0.6, findings.FAILS),
        ("T0 is rated above GPT", "results instruct t0_small likert training", 1.9, findings.UNCLEAR),
        ("FLAN is rated no higher", "results instruct flan_small likert training", 4.0, findings.FAILS),
        ("The pretraining mix costs", "results instruct ppo_small win_rate training", 0.76, findings.FAILS),
        ("Held-out", "results instruct ppo_small win_rate heldout", 0.6, findings.FAILS),
        ("PPO-ptx hallucinates", "results instruct ppo_ptx_small metadata hallucination", 0.3, findings.FAILS),
        ("PPO-ptx attempts", "results instruct ppo_ptx_medium metadata fails_instruction", 0.9, findings.FAILS),
        ("PPO pays", "language ppo_small pretraining_loss", 1.63, findings.FAILS),
        ("The pretraining mix keeps", "language ppo_ptx_medium pretraining_loss", 1.6, findings.FAILS),
        ("The reward model is", "reward_model accuracy training", 0.8, findings.FAILS),
        ("It is no more accurate", "reward_model accuracy heldout", 0.72, findings.UNCLEAR),
        ("It is no more accurate", "reward_model accuracy heldout", 0.8, findings.FAILS),
        ("It is no more accurate", "folds held_out_groups", 0.73, findings.UNCLEAR),
        ("It is no more accurate", "folds held_out_groups", 0.8, findings.FAILS),
        ("With shuffled", "results instruct control_small win_rate training", 0.6, findings.FAILS),
    ],
)
def test_a_finding_follows_its_number_and_no_other(claim, path, mean, verdict):
    report = example()
    if "heldout" in path:  # what the finding is of where there are no folds
        del report["folds"]
    *place, last = path.split()
    at = report
    for key in place:
        at = at[key]
    at[last] = interval(mean, 0.03)
    changed = {c: v for c, v in verdicts(report).items() if v != findings.HOLDS}
    assert {v for c, v in changed.items() if c.startswith(claim)} == {verdict}
    if "win_rate" not in path:  # a win rate is in several findings
        assert len(changed) == 1


def test_head_to_head_with_public_tasks():
    report = example()
    against = {"flan_small": interval(0.78, 0.04), "t0_small": interval(0.5, 0.04)}
    report["head_to_head"] = {"instruct": {"training": {"ppo_ptx_small": against}}}
    found = {f.claim: (f.paper, f.here, f.verdict) for f in findings.findings(report)}
    claim = "Head to head, PPO-ptx is preferred to"
    assert found[f"{claim} FLAN"] == ("175B: 78 ± 4 %", "small: 78 ± 4 %", findings.HOLDS)
    assert found[f"{claim} T0"] == ("175B: 79 ± 4 %", "small: 50 ± 4 %", findings.FAILS)


def test_tax_is_against_the_start_of_ppo_where_that_is_known():
    report = example()
    report["language"]["ref_policy"] = {"pretraining_loss": interval(1.5, 0.01)}
    found = {f.claim: f for f in findings.findings(report)}
    kept = found["The pretraining mix keeps the loss within 2 % of its start's"]
    assert (kept.here, kept.verdict) == ("small: 1.500 → 1.640 nats (+9.3 %)", findings.FAILS)


def test_headline_says_the_main_result():
    report = example()
    assert findings.headline(report) == "PPO-ptx is preferred to SFT in 70 ± 3 % of cases."
    for name in ("ppo_ptx_small", "ppo_ptx_medium"):
        del report["models"][name], report["results"]["instruct"][name], report["results"]["gpt"][name]
    assert findings.headline(report) == "PPO is preferred to SFT in 72 ± 3 % of cases."
    for rows in report["results"].values():
        for row in rows.values():
            del row["win_rate"], row["gold"]
    assert findings.headline(report) == "PPO raises the judge's score of SFT from 0.00 to 0.44."
    assert findings.headline(part("prefix")) == ""


def test_numbers_as_words():
    assert [words.number(x) for x in (0, -0.123, 0.00123, 1.234, 12.34, 1234.5, 1e-9)] == [
        *("0.00", "−0.12", "0.0012", "1.23", "12.3", "1234", "1.0e−09")
    ]
    assert words.percent({"mean": 0.714, "low": 0.684, "high": 0.744, "n": 9}) == "71 ± 3 %"
    assert words.percent({"mean": 0.714, "low": 0.71, "high": 0.718, "n": 9}) == "71.4 ± 0.4 %"
    assert words.percent({"mean": 0.02, "low": 0.0, "high": 0.09, "n": 9}) == "2 % (0 to 9)"
    assert [words.seconds(s) for s in (5.25, 59, 200, 7300)] == ["5.2 s", "59 s", "3 min 20 s", "2 h 1 min"]


# A report that is not one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("title", None, r"report\['title'\] must be a string, got None"),
        ("models", {}, r"report\['models'\] must have at least one model"),
        ("models base_small label", 3, r"\['base_small'\]\['label'\] must be a string, got 3"),
        ("baseline", "sfd", r"report\['baseline'\] must be one of .*, got 'sfd'"),
        ("results instruct other", {}, r"has the model 'other': it must be one of"),
        (
            "results instruct sft_small score",
            {"mean": 1.0},
            r"\['score'\] must be an interval with mean, low, high and n",
        ),
        ("results instruct sft_small win_rate training", interval(0.5, -0.1), "must have low <= mean <= high"),
        ("results instruct sft_small gold", float("nan"), r"\['gold'\] must be a finite number, .*got nan"),
        ("language sft_small tasks", [1], r"\['tasks'\] must be a dict, got \[1\]"),
        ("reward_model accuracy training", 0.7, r"\['training'\] must be an interval"),
        ("curves ppo_ptx objective/score", [1, 2], r"\['objective/score'\]\[0\] must be \[step, value\], got 1"),
        ("overoptimisation ppo", [{"step": 1}], r"\['ppo'\]\[0\] must have 'kl', got {'step': 1}"),
        ("prefix candidates", [{"text": ""}], r"\['candidates'\]\[0\] must have 'score'"),
        ("reward_model calibration", [{}], r"\['calibration'\]\[0\] must have 'predicted', got {}"),
        ("perf seconds ppo", "long", r"\['seconds'\]\['ppo'\] must be a finite number, got 'long'"),
        ("samples", [{"responses": {}}], r"report\['samples'\]\[0\] must have 'prompt'"),
    ],
)
def test_a_bad_report_is_one_clear_error_and_nothing_is_written(tmp_path, path, value, message):
    report = copy.deepcopy(example())
    *place, last = path.split()
    at = report
    for key in place:
        at = at[key]
    at[last] = value
    with pytest.raises(ValueError, match=message):
        reports.write(report, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    assert np.isfinite(example()["results"]["gpt"]["sft_small"]["gold"]["mean"])  # the example itself is untouched
