"""The harness itself: a distributed test that cannot fail is worse than none."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from ranks import RankError, run_ranks


def add_up(start):
    total = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(total)
    return int(total), dist.get_world_size(), os.getpid()


def raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("the salt is missing")
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def sleep_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)


def test_results_come_by_rank_and_processes_stay():
    first, second = run_ranks(2, add_up, 10), run_ranks(2, add_up, 20)
    assert [r[:2] for r in first] == [(21, 2)] * 2
    assert [r[:2] for r in second] == [(41, 2)] * 2
    assert [r[2] for r in first] == [r[2] for r in second]
    assert first[0][2] != first[1][2]


def test_failures_are_shown_and_do_not_hang():
    with pytest.raises(RankError, match=r"rank 1 of 2\n(.*\n)*.*ValueError: the salt is missing"):
        run_ranks(2, raise_on, 1)
    with pytest.raises(RankError, match="rank 0 of 2 died with exit code 3"):
        run_ranks(2, die_on, 0)
    with pytest.raises(RankError, match=r"no result within 1.0 s\nrank 0: finished\nrank 1: (.*\n)*.*sleep_on"):
        run_ranks(2, sleep_on, 1, timeout=1.0)
    assert [r[0] for r in run_ranks(2, add_up, 0)] == [1, 1]
