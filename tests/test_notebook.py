"""The Colab notebook, run from top to bottom with `:tiny`; with it the quickstart itself, from base model to report."""

import json
import pathlib

import compiling
import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = pathlib.Path(__file__).resolve().parents[1] / "launch" / "colab_tpu.ipynb"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook after its run, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"HARDWARE": "cpu", "SIZE": ":tiny", "RUNS": str(folder), "JAX_PLATFORMS": "cpu"}
    settings["XLA_FLAGS"] = compiling.SOON
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    return notebook, folder


def outputs(notebook, kind):
    return [
        output["data"][kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


def test_it_shows_figures_the_table_and_answers(ran):
    notebook, folder = ran
    report = folder / "quickstart_tiny" / "report"
    numbers = json.loads((report / "report.json").read_text())
    assert len(outputs(notebook, "image/png")) == len(list(report.glob("*.png"))) >= 4
    table = outputs(notebook, "text/markdown")[0]
    assert {model["method"] for model in numbers["models"].values()} >= {"base", "prefix", "sft", "ppo", "ppo_ptx"}
    for model in numbers["models"].values():
        assert f"| {model['label']}, {model['size']} |" in table
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    for sample in numbers["samples"][:5]:
        assert sample["prompt"] in printed


def test_a_model_of_ones_own_answers(ran):
    _, folder = ran
    answers = [json.loads(line) for line in (folder / "answers" / "samples.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Say river twice.\n", "Say boat twice.\n"]


def test_no_output_is_committed():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
