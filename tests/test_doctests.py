"""The examples in docstrings give what they show."""

import doctest
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "instructgpt_jax"
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    try:
        found = doctest.testmod(importlib.import_module(name))
    except ImportError as error:  # of an extra
        pytest.skip(str(error))
    assert found.attempted and not found.failed
