import itertools

import pytest
import torch
import torch.distributed as dist

from heterostep.errors import ConfigError
from heterostep.launch.workers.rendezvous import measure_link
from heterostep.parallel.config import ParallelConfig
from heterostep.parallel.mesh import ParallelMesh
from ranks import run_ranks

AXES = ("cfg", "ring", "ulysses", "sequence", "world")


def members(degrees):
    """Global ranks on each axis of this rank, as its group sees them, in the order of the group's ranks."""
    mesh = ParallelMesh.create(ParallelConfig(**degrees))
    found = {}
    for name in AXES:
        axis = getattr(mesh, name)
        if axis.size == 1:
            assert axis.group is None and axis.rank == 0
            found[name] = [dist.get_rank()]
            continue
        ranks = torch.zeros(axis.size, dtype=torch.int64)
        ranks[axis.rank] = dist.get_rank()
        dist.all_reduce(ranks, group=axis.group)
        found[name] = ranks.tolist()
    return found


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 3), (2, 2, 2)]
)
def test_ranks_are_numbered_cfg_ring_ulysses(shape):
    cfg, ring, ulysses = shape
    world = list(range(cfg * ring * ulysses))
    number = {p: i for i, p in enumerate(itertools.product(range(cfg), range(ring), range(ulysses)))}
    found = run_ranks(len(world), members, dict(cfg=cfg, ring=ring, ulysses=ulysses))
    for (c, r, u), rank in number.items():
        assert found[rank] == {
            "cfg": [number[i, r, u] for i in range(cfg)],
            "ring": [number[c, i, u] for i in range(ring)],
            "ulysses": [number[c, r, i] for i in range(ulysses)],
            "sequence": [number[c, i, j] for i in range(ring) for j in range(ulysses)],
            "world": world,
        }


def mismatch():
    with pytest.raises(ConfigError, match=r"makes 3 rank\(s\), but the job has 2"):
        ParallelMesh.create(ParallelConfig(ring=3))


def test_a_job_of_another_size_is_refused_on_every_rank():
    run_ranks(2, mismatch)


def test_the_link_between_machines_is_measured_by_two_ranks_alone():
    found = run_ranks(3, measure, (2, 1))
    assert found[1:] == [None, None]
    seconds, rate = found[0]
    assert 0 < seconds < 10 and rate > 0
    assert run_ranks(3, measure, (3,)) == [None, None, None]


def measure(machines):
    link = measure_link(dist.get_rank(), machines)
    dist.barrier()  # the others have nothing else to wait for
    return link
