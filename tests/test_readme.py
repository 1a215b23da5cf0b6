"""Each command of the documents is run, or where that is dear, checked in everything up to the first computation.

Commands stand in blocks that are indented by four spaces, all else in fences, and in the column `command` of tables.
The first words of a command decide what is done with it; words that are not known here fail. test_notebook.py runs the
two commands at the top of the README, .ci/run those of CONTRIBUTING.
"""

import ast
import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from instructgpt_jax import main, pipeline, sweep
from instructgpt_jax.labeling import server
from instructgpt_jax.plan import command, shapes, topology
from instructgpt_jax.sharding import make_mesh
from instructgpt_jax.validate import validate

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md"))
)


def blocks(document: str) -> list[str]:
    """The indented blocks of a document, outside of fences and lists, without their indentation."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?:\A|\n\n)((?: {4}.*\n?)+)", text)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def commands(block: str) -> list[list[str]]:
    """The words of each command of a block; lines that are continued, or end inside a quote, are joined."""
    found, begun = [], ""
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        begun += line
        if begun.count("'") % 2:
            begun += "\n"
            continue
        line, begun = begun, ""
        parts = (shlex.split(part, comments=True) for part in re.split(r"\s*(?:&&|;)\s*", line))
        found += [words for words in parts if words]
    return found


def is_launch(block: str) -> bool:
    return "launch/" in block or re.match(r"\w+=\(", block) is not None


ALL = [(document, block) for document in DOCUMENTS for block in blocks(document)]
PLAIN = [
    pytest.param(words, id=f"{document}: {' '.join(words)[:90]}")
    for document, block in ALL
    if not is_launch(block)
    for words in commands(block)
]


def table_commands(document: str) -> list[list[str]]:
    """The words of the commands in the tables that have a column of them, of which each row has at least one.

    A cell that begins with --config is that of `main`.
    """
    found, column = [], None
    for line in (ROOT / document).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if column is None:
            column = cells.index("command") if "command" in cells else None
        elif not cells:
            column = None
        elif not re.fullmatch(r":?-+:?", cells[column]):
            written = re.findall(r"`([^`]+)`", cells[column])
            assert written, f"{document}: no command in {line}"
            before = ["python", "-m", "instructgpt_jax.main"]
            found += [before * text.startswith("--config") + shlex.split(text) for text in written]
    return found


IN_TABLES = [
    pytest.param(words, id=f"{document}: {' '.join(words)[:90]}")
    for document in DOCUMENTS
    for words in table_commands(document)
]
LAUNCHES = {document: [block for name, block in ALL if name == document and is_launch(block)] for document in DOCUMENTS}


def check_main(arguments: list[str]) -> None:
    """The configuration exists, has every key that is set, and every stage of it could run on one device."""
    values = flags.FlagValues()
    arguments = ["main", *arguments]
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    for name in ("workdir", "plan", "plan_out", "plan_size", "plan_records", "plan_price"):
        assert name in flags.FLAGS
        flags.DEFINE_string(name, "", "", flag_values=values)
    for name in ("plan_search", "plan_hlo"):
        assert name in flags.FLAGS
        flags.DEFINE_bool(name, False, "", flag_values=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)  # where overrides are looked for
        rest = values(arguments)
    assert rest == ["main"], rest
    config, workdir = values.config, values.workdir or "runs/x"
    mesh = make_mesh(dict(data=1, fsdp=-1, tensor=1), jax.devices()[:1])
    if values.plan:  # no source need be there
        assert topology.FORM.fullmatch(values.plan), values.plan
        shapes.parse_sizes(values.plan_size)
        config = config if config.stage == "pipeline" else command.without_sources(config)
    if config.stage == "pipeline":
        for name in (name for name in config.order if pipeline.wanted(config, name)):
            validate(pipeline.stage_config(config, name, workdir), mesh)
    else:
        assert config.stage in main.STAGES
        validate(config, mesh)


def check_sweep(arguments: list[str]) -> None:
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    values = sweep.grid(given.pop("values"))
    assert given.pop("metric")
    config, key = given.pop("config"), given.pop("key")
    check_main([f"--config={config}", f"--config.{key}={values[0]}", *(f"--{k}={v}" for k, v in given.items())])


@functools.cache
def help_of(script: str) -> str:
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_script(script: str, arguments: list[str]) -> None:
    """The script has each flag that is given."""
    for argument in arguments:
        if argument.startswith("--") and not argument.startswith("--config."):
            assert re.search(rf"{re.escape(argument.split('=')[0])}\b", help_of(script)), argument


def check_install(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments:
        assert re.fullmatch(r"-e|\.|\.\[[a-z,]+\]|torch", argument), argument
        for extra in re.findall(r"[a-z]+", argument.partition("[")[2]):
            assert extra in extras


@pytest.mark.parametrize("words", PLAIN + IN_TABLES)
def test_a_command_of_the_documents(words):
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["python", "-m", "instructgpt_jax.main", *rest]:
            check_main(rest)
        case ["python", "-m", "instructgpt_jax.sweep", *rest]:
            check_sweep(rest)
        case ["python", "-c", code, *_]:
            ast.parse(code)
        case ["python", "-m", module, *rest]:
            check_script(str((ROOT / module.replace(".", "/")).with_suffix(".py")), rest)
        case ["python", script, *rest]:
            check_script(script, rest)
        case ["pip", "install", *rest]:
            check_install(rest)
        case (
            ["python3", "-m", "venv", ".venv"]
            | [".", ".venv/bin/activate"]
            | ["ruff", "check", "."]
            | ["pytest", "-n", "2"]
        ):
            pass  # .ci/run does these
        case ["python3", "-m", "venv", ".venv-studio"] | [".venv-studio/bin/pip", "install", _]:
            ci = (ROOT / ".ci" / "run").read_text()
            assert words[-1] in (".venv-studio", re.search(r"install (label-studio==\S+)", ci)[1])
        case [".venv-studio/bin/label-studio", "start", *rest]:
            used = (ROOT / "tests" / "test_label_studio.py").read_text()  # starts one with these
            assert all(f'"{option.partition("=")[0]}"' in used for option in rest) and "_LEGACY_API_TOKEN" in used
        case ["export", setting]:
            assert setting.partition("=")[0] == server.TOKEN
        case ["git", "clone", _] | ["cd", _]:
            pass
        case _:
            raise AssertionError(f"no check for {words}")


def test_the_paper_is_commands():
    """docs/paper.md has a command in every row but those that say why there is none."""
    sections = re.split(r"^## ", (ROOT / "docs" / "paper.md").read_text(), flags=re.MULTILINE)[1:]
    without = [section.splitlines()[0] for section in sections if "| command |" not in section]
    assert without == ["What has no command"] and len(table_commands("docs/paper.md")) > 40


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if LAUNCHES[name]])
def test_the_launch_commands(document, tmp_path):
    """Run from top to bottom in a clone, with tools that do nothing and a slice that is ready.

    test_launchers.py has the real xpk and sky read their lines, where they are installed.
    """
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        "#!/bin/sh\ncase \"$*\" in *' list '*) printf 'pod\\tACTIVE\\n';; *' describe '*) echo 1;; esac\n"
    )
    for name in ("xpk", "sky", "sbatch", "docker", "python"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    gcloud.chmod(0o755)
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    script = "\n".join(LAUNCHES[document])
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path / "clone", capture_output=True, text=True, timeout=60,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    joined = re.sub(r"\\\n", " ", script)
    for text in re.findall(r"=\((--config=.*?)\)", joined, re.DOTALL) + re.findall(r" -- (--config=.*)", joined):
        check_main(shlex.split(text))


def test_the_tree_names_every_module():
    """The tree of the README has a line for each module of the package, and none for what is not there."""
    tree = re.search(r"^```\n(instructgpt_jax/.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    listed = [re.match(r"( *)(\S+)", line).groups() for line in tree.splitlines()]
    inside = {name for indent, name in listed if indent}
    package = ROOT / "instructgpt_jax"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert inside == modules | folders
    for indent, name in listed:
        assert (ROOT / name if not indent else package / name).exists(), name


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
            if "://" not in target:
                assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"


def test_every_configuration_is_named():
    text = (ROOT / "README.md").read_text()
    names = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"ablations", "common", "measured"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", text)] == []
