"""The code stays as readable as the README asks: formatted, short, nothing nested."""

import ast
import subprocess
import sys

import pytest

from .conftest import ROOT

SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("results/*.py"))]
FILES = [*SCRIPTS, *sorted(ROOT.glob("tests/*.py"))]
NESTING = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]])
def test_ruff(command):
    call = [sys.executable, "-m", "ruff", *command, *FILES]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_functions_fit_on_a_screen(path):
    text = path.read_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (100 if node.name == "main" else 60), node.name
        if isinstance(node, NESTING):
            inner = [child for child in ast.walk(node) if isinstance(child, NESTING)]
            assert len(inner) == 1, f"{path.name}:{node.lineno}"


def test_public_functions_say_what_they_do():
    for node in ast.parse((ROOT / "common.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
