"""The notebooks, run from top to bottom with `:tiny`; with them the quickstart itself, from base model to report.

The longest of them is run: the others have the same cells, see below, and a first one that the test sets in its place.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import compiling
import pytest
import test_readme

from instructgpt_jax.plan import topology

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parents[1] / "launch").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
RUN = max(NOTEBOOKS, key=lambda path: len(json.loads(path.read_text())["cells"]))
SETTINGS = {"HARDWARE": "cpu", "SIZE": ":tiny", "RECIPE": ":tiny", "TOPOLOGY": "cpu:1", "JAX_PLATFORMS": "cpu"}


def read(path):
    return nbformat.read(path, as_version=4)


def codes(path):
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def parameters(path):
    """The names of the first cell, as a reader finds them."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in (*SETTINGS, "RUNS"):
            patch.delenv(name, raising=False)
        exec(codes(path)[0], names)
    return names


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook after its run, and the folder of the runs."""
    folder, notebook = tmp_path_factory.mktemp("runs"), read(RUN)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SETTINGS | {"RUNS": str(folder), "XLA_FLAGS": compiling.SOON}).items():
            patch.setenv(name, value)
        resources = {"metadata": {"path": str(RUN.parent)}}
        nbclient.NotebookClient(notebook, timeout=3000, resources=resources).execute()
    return notebook, folder


def outputs(notebook, kind):
    return [
        output["data"][kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


def test_it_shows_figures_the_tables_and_answers(ran):
    notebook, folder = ran
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    tables, figures = outputs(notebook, "text/markdown"), 0
    for run, text in zip(("quickstart_tiny", "instruct_tiny"), tables, strict=True):
        report = folder / run / "report"
        numbers = json.loads((report / "report.json").read_text())
        figures += len(list(report.glob("*.png")))
        assert {model["method"] for model in numbers["models"].values()} >= {"base", "sft", "ppo", "ppo_ptx"}
        for model in numbers["models"].values():
            assert re.search(rf"\| {re.escape(model['label'])}, {model['size']} \|.* to ", text)
        for sample in numbers["samples"][:5]:
            assert sample["prompt"] in printed
    assert len(outputs(notebook, "image/png")) == figures >= 8
    plan = json.loads((folder / "plan" / "plan.json").read_text())
    assert list(plan["stages"]) == ["ppo_ptx"] and "instruct_tiny on cpu:1" in printed
    assert "'fsdp': 1" in printed  # where the mesh is shown


def test_the_model_answers(ran):
    _, folder = ran
    lines = (folder / "answers" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines].count("How do I boil an egg?") == 1


def test_the_recipe_has_its_model_cards(ran):
    """What each stage has cost was written down by itself; the card of an export has the evaluation beside it."""
    _, folder = ran
    card = (folder / "instruct_tiny" / "model_card.md").read_text()
    assert "not recorded" not in card and "| ppo_ptx | 4 |" in card and "1 x cpu" in card
    card = (folder / "instruct_tiny" / "export" / "model_card.md").read_text()
    assert "| rlhf_init | 8 |" in card and "| Pretraining loss" in card


def test_no_output_is_committed():
    for path in NOTEBOOKS:
        cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
        assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_they_differ_in_their_first_cell_alone():
    """And in the cell on sharding, for which one chip is too few."""
    shorter, longest = sorted((codes(path)[1:] for path in NOTEBOOKS), key=len)[::2]
    assert [code for code in longest if code not in shorter] == [code for code in longest if "SHARDS" in code]
    assert [code for code in longest if "SHARDS" not in code] == shorter
    assert [codes(path)[1:] for path in NOTEBOOKS].count(shorter) == len(NOTEBOOKS) - 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_a_reader_runs_is_a_configuration(path):
    """The flags on a TPU, where the test above takes `:tiny`: public data, a public model, a topology that exists."""
    names = parameters(path)
    assert topology.FORM.fullmatch(names["TOPOLOGY"]) and names["HARDWARE"] == "tpu"
    said = io.StringIO()
    (cell,) = [code for code in codes(path) if "--plan=" in code]
    names["run"] = lambda *flags: print(json.dumps(flags), file=said)
    exec(cell, names)
    flags = [flag for flag in json.loads(said.getvalue()) if not flag.startswith("--plan")]
    assert f"--config.base={names['GIVEN']['base']}" in flags and len(names["GIVEN"]) == 5
    with contextlib.chdir(test_readme.ROOT):
        test_readme.check_main([flag for flag in flags if flag != "--config.only=ppo_ptx"])


@pytest.mark.parametrize("path", NOTEBOOKS[:1], ids=NAMES[:1])
def test_the_address_of_the_code_must_be_set(path, tmp_path):
    code = "\n".join(codes(path)[:2])
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ValueError: REPOSITORY, in the first cell, must be the address of the code, got "
        "https://github.com/OWNER/instructgpt_jax"
    )
