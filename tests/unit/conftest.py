from __future__ import annotations

import pytest

from folders import broken_copies, complete_pipeline


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random Wan 2.1 model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    complete_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def broken_models(tiny_model, tmp_path_factory):
    """Folders with one thing wrong, by a name that says what."""
    return broken_copies(tiny_model, tmp_path_factory.mktemp("broken"))
