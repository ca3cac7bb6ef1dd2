"""The code stays formatted, and what the scripts share says what it does."""

import ast
import subprocess
import sys

import pytest

from .conftest import ROOT

SCRIPTS = [path for folder in (".", "data", "results") for path in (ROOT / folder).glob("*.py")]


@pytest.mark.parametrize("command", [["format", "--check"], ["check", "--extend-select", "E501"]])
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *SCRIPTS, "tests"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_functions_of_common_say_what_they_do():
    """A name with an underscore, and the parts of a class, may go without."""
    tree = ast.parse((ROOT / "common.py").read_text())
    assert ast.get_docstring(tree)
    shared = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = [node for node in shared if not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
