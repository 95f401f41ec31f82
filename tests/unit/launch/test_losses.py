"""The rule for losses, and that the documentation has its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heterostep.launch.workers.video import (
    MAX_LOSSES,
    MAX_RESTARTS,
    reason_to_give_up,
    reason_to_give_up_restarts,
    saved_step,
)

WORDS = {10: "ten", 20: "twenty"}


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        ([0], None),
        ([5, 10], None),
        ([5, 5], "two losses in a row"),
        ([0, 5, 5], "two losses in a row"),
        ([5, 0], "two losses in a row"),
        (list(range(MAX_LOSSES - 1)), None),
        (list(range(MAX_LOSSES)), f"{MAX_LOSSES} losses"),
    ],
)
def test_a_video_is_given_up_after_two_losses_in_vain_or_too_many(saved, reason):
    said = reason_to_give_up(saved)
    assert said is None if reason is None else reason in said


def test_of_a_stored_video_no_step_need_be_done_again(tmp_path):
    assert saved_step(None) == saved_step(tmp_path / "gone") == saved_step(tmp_path) == 0
    (tmp_path / "checkpoint-000010.json").touch()
    assert saved_step(tmp_path) == 10
    for damaged in ("{", "[]", '{"step": null}'):
        (tmp_path / "result.json").write_text(damaged)
        assert saved_step(tmp_path) == 10
    (tmp_path / "result.json").write_text(json.dumps({"step": 20}))
    assert saved_step(tmp_path) == 20
    (tmp_path / "result.json").rename(tmp_path / "latents.json")
    assert saved_step(tmp_path) == 20
    assert reason_to_give_up([10, saved_step(tmp_path)]) is None


def test_restarts_of_the_service_are_bounded():
    assert reason_to_give_up_restarts(MAX_RESTARTS - 1) is None
    assert f"{MAX_RESTARTS} restarts" in reason_to_give_up_restarts(MAX_RESTARTS)


def test_the_documentation_has_the_numbers():
    text = " ".join((Path(__file__).parents[3] / "docs" / "serving.md").read_text().split())
    assert f"or {WORDS[MAX_LOSSES]} times in all" in text
    assert f"if it loses ranks {WORDS[MAX_LOSSES]} times in all" in text
    assert f"running at {WORDS[MAX_RESTARTS]} crashes of the whole service" in text
