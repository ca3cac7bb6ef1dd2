"""The code stays as readable as the README asks: formatted, short, nothing nested."""

import ast
import subprocess
import sys

import pytest

from .conftest import ROOT

SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("results/*.py"))]
NESTING = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize("command", [["format", "--check"], ["check", "--extend-select", "E501"]])
def test_ruff(command):
    call = [sys.executable, "-m", "ruff", *command, *SCRIPTS, "tests"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_functions_fit_on_a_screen_and_those_shared_say_what_they_do(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (100 if node.name == "main" else 50), node.name
        if isinstance(node, NESTING):
            inner = [child for child in ast.walk(node) if isinstance(child, NESTING)]
            assert len(inner) == 1, f"{path.name}:{node.lineno}"
    for node in tree.body if path.name == "common.py" else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
