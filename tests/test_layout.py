"""The shape of the package: imports go downwards, the root is the method, no file is too long to read."""

import ast
import graphlib
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "instructgpt_jax"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
BELOW_STAGES = ("data", "labeling", "models", "simulated", "training")  # packages that know nothing of stages


def imports(path: pathlib.Path) -> set[str]:
    """The modules of the package that a module imports, at its head or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return found


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({name: imports(path) - {name} for name, path in FILES.items()}).prepare()


def test_what_lies_below_the_stages_does_not_know_them():
    for name, path in FILES.items():
        parts = name.split(".")
        if parts[1:2] and parts[1] in BELOW_STAGES or len(parts) == 2 and parts[1] in ("ppo", "reward", "rollout"):
            assert not {other for other in imports(path) if ".stages" in other or other.endswith(".main")}, name


def test_the_root_is_short_and_so_is_every_file():
    assert len([name for name in FILES if name.count(".") == 1 and FILES[name].parent == PACKAGE]) <= 19
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: length for name, length in lengths.items() if length > 380}
