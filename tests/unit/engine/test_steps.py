"""What happens between two steps: on many ranks, all take as many votes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from heterostep.engine.steps import StepEvents, Stop

PIPELINE = SimpleNamespace(scheduler=SimpleNamespace(sigmas=torch.tensor([1.0, 0.5, 0.0])))


@pytest.mark.parametrize("others", [False, True])
def test_a_rank_that_was_told_to_stop_votes_as_often_as_one_that_was_not(others):
    """A stop request reaches the ranks one after another; a vote that one of them leaves out would hang the rest."""
    counts = []
    for told in (False, True):
        votes = []

        def vote(flag, votes=votes):
            votes.append(flag)
            return flag or others  # what any rank says

        stop = Stop()
        stop.asked = stop.save = told
        events = StepEvents(2, 4, 8.0, None, lambda event: None, stop, lambda: 0.0, vote)
        events(PIPELINE, 0, None, {"latents": torch.zeros(1)})
        counts.append(len(votes))
        assert events.stopping == (told or others) and stop.save == (told or others)
    assert others is False or counts[0] == counts[1]


def test_the_stop_of_another_rank_saves_here_too():
    stop, said = Stop(), iter([True, True])
    events = StepEvents(2, 4, 8.0, None, lambda event: None, stop, lambda: 0.0, lambda flag: next(said))
    events(PIPELINE, 0, None, {"latents": torch.zeros(1)})
    assert events.stopping and stop.save
