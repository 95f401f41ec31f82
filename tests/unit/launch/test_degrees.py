"""The degrees that flags ask for, and the sentence that says why they were chosen."""

from __future__ import annotations

import pytest
import torch

from heterostep.errors import ConfigError
from heterostep.launch.workers import rendezvous as degrees
from heterostep.launch.workers.rendezvous import parallel_from
from heterostep.parallel.config import Topology

PAIRS = Topology(islands=((0, 1), (2, 3)), free_bytes=(1, 1, 1, 1))


def reason(ranks, device="cuda"):
    given = {"kernel": "sdpa", "ring_cache": "gathered"}
    return parallel_from(given, ranks, 4, 1, 0, torch.device(device))[1]


def test_the_reason_names_the_links_of_this_machines_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(degrees, "read_topology", lambda: PAIRS)
    assert "a ulysses group has NVLink inside" in reason(2)
    assert "a ulysses group spans GPUs without NVLink" in reason(4)
    assert "NVLink" not in reason(4, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # the others are on another machine
    assert "NVLink" not in reason(4)


def test_without_nvml_the_choice_is_the_same(monkeypatch):
    def missing():
        raise ConfigError("no driver")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(degrees, "read_topology", missing)
    assert "ulysses 4" in reason(4) and "NVLink" not in reason(4)


@pytest.mark.parametrize("given", [{"kernel": "sdpa"}, {"cut": "measured"}])
def test_settings_of_many_ranks_are_refused_on_one(given):
    with pytest.raises(ConfigError, match=f"--{next(iter(given))} needs several ranks; start them with --nproc"):
        parallel_from(given, 1, 4, 1, 0, torch.device("cpu"))
