from __future__ import annotations

import pytest

from folders import broken_copies, complete_pipeline
from tiny import IMAGE_KINDS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny random Wan 2.1 model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    complete_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_models(tmp_path_factory):
    """Folders of tiny models that start from an image, by kind; and of TI2V saved as a text-to-video pipeline."""
    folder = tmp_path_factory.mktemp("image-models")
    made = {kind: folder / kind.replace(" ", "-") for kind in (*IMAGE_KINDS, "ti2v5b")}
    for kind, path in made.items():
        complete_pipeline(kind).save_pretrained(path)
    return made


@pytest.fixture(scope="session")
def broken_models(tiny_model, tmp_path_factory):
    """Folders with one thing wrong, by a name that says what."""
    return broken_copies(tiny_model, tmp_path_factory.mktemp("broken"))
