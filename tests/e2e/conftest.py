from __future__ import annotations

import pytest

from folders import complete_pipeline


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random Wan 2.1 model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    complete_pipeline().save_pretrained(folder)
    return folder
