"""Rules of the code that no other tool checks: short files and functions, one tree of errors, one home of flags."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = tuple(f"benchmarks/{name}" for name in ("baselines", "quality", "results", "serving", "speed"))
FOLDERS = (*BENCHMARKS, "engine", "hsa", "launch", "parallel")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if path.name != "CHANGELOG.md"]
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


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_files_that_a_page_names_exist(path):
    known = {file.name for file in ROOT.rglob("*.py") if ".venv" not in file.parts}
    code = " ".join(re.findall(r"`([^`\n]+)`", path.read_text()))
    named = set(re.findall(r"(?<![*\w])\w+\.py\b", code))
    assert named - {"utils.py"} <= known  # CONTRIBUTING.md: there is none


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/reports").rglob("*.md")), ids=lambda path: path.name)
def test_every_report_names_the_command_that_makes_it_again(path):
    text = path.read_text()
    scripts = re.findall(r"`python (benchmarks/\w+\.py)", text)
    assert scripts or re.search(r"^    heterostep bench [a-z-]+ ", text, re.MULTILINE)
    assert all((ROOT / script).is_file() for script in scripts)


def test_every_module_has_a_test_file_or_is_named_in_one():
    tests = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    text = "\n".join(tests.values())
    for path in FILES:
        folder, name = ".".join(("heterostep", *path.relative_to(ROOT).parts[:-1])), path.stem
        imported = rf"{folder}\.{name}\b|from {re.escape(folder)} import [^\n]*\b{name}\b|\b{name}\.py\b"
        product = not folder.startswith("heterostep.benchmarks") and name != "__init__"
        assert not product or f"test_{name}" in tests or re.search(imported, text), path
