"""A copy of the package in which two classes have a field more: all that such a change may need."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIELD = '    {}: int | None = setting(None, least=3, help="a setting for this test")\n'
# The name of the new field, the file, and the line before which it stands.
EDITS = (
    ("eng_dummy", "engine/request.py", "    prompt: str = setting("),
    ("hsa_dummy", "hsa/config.py", "    warmup: int"),
)


def with_new_fields(folder: Path) -> dict[str, str]:
    """Make the copy in a folder; returns the environment of processes that use it."""
    package = folder / "heterostep"
    package.mkdir()
    for name in ("__init__.py", "__main__.py", "errors.py", "settings.py", "version.py"):
        shutil.copy(ROOT / name, package)
    for name in ("engine", "hsa", "launch", "parallel"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    (package / "engine" / "demo_model").symlink_to(ROOT / "engine" / "demo_model")
    for field, path, before in EDITS:
        text = (package / path).read_text()
        assert text.count(before) == 1, path
        (package / path).write_text(text.replace(before, FIELD.format(field) + before))
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
