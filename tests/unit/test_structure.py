"""Rules of the code that no other tool checks: short files and functions, one tree of errors, one home of flags."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("engine", "hsa", "launch", "parallel") for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_flags_end_where_they_are_read(path):
    if path.name not in ("cli.py", "options.py"):
        assert "argparse" not in path.read_text()
