"""Adopting xfuser's groups. xfuser itself cannot be imported without a GPU (tests/gpu does): here stands a module with
its getters, over groups numbered as xfuser numbers them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch.distributed as dist

from heterostep.errors import ConfigError
from heterostep.parallel.mesh import ParallelMesh
from ranks import run_ranks


def group_of(groups):
    """Make all groups and return this rank's."""
    mine = None
    for ranks in groups:
        group = dist.new_group(ranks)
        mine = group if dist.get_rank() in ranks else mine
    return mine


def xfuser_state(cfg, ring, ulysses, pipeline=1, tensor=1, swapped=False, initialised=True):
    """xfuser's parallel_state: ulysses innermost, then ring, cfg and data-parallel replicas."""
    world, sequence = dist.get_world_size(), ring * ulysses
    blocks = [list(range(i, i + sequence)) for i in range(0, world, sequence)]
    each = [list(range(i, i + sequence * cfg)) for i in range(0, world, sequence * cfg)]
    ulysses_ranks = [b[i : i + ulysses] for b in blocks for i in range(0, sequence, ulysses)]
    ring_ranks = [b[i::ulysses] for b in blocks for i in range(ulysses)]
    if swapped:
        ulysses_ranks, ring_ranks = ring_ranks, ulysses_ranks
    shards = SimpleNamespace(device_group=group_of(blocks), device="cpu")
    if swapped is not None:  # without yunchang xfuser has neither
        shards.ulysses_group, shards.ring_group = group_of(ulysses_ranks), group_of(ring_ranks)
    across = group_of([r[i::sequence] for r in each for i in range(sequence)])
    replica = group_of(each)
    state = ModuleType("xfuser.core.distributed.parallel_state")
    state.model_parallel_is_initialized = lambda: initialised
    state.get_pipeline_parallel_world_size = lambda: pipeline
    state.get_tensor_model_parallel_world_size = lambda: tensor
    state.get_sp_group = lambda: shards
    state.get_cfg_group = lambda: SimpleNamespace(device_group=across)
    state.get_model_replica_group = lambda: SimpleNamespace(device_group=replica)
    return state


def adopted(shape, options):
    parents = ("xfuser", "xfuser.core", "xfuser.core.distributed")
    state = xfuser_state(*shape, **options)
    sys.modules.update({name: ModuleType(name) for name in parents} | {state.__name__: state})
    try:
        mesh = ParallelMesh.from_xfuser()
    except ConfigError as error:
        return str(error)
    finally:
        for name in (*parents, state.__name__):
            del sys.modules[name]
    return [
        (axis.size, axis.rank, [] if axis.group is None else dist.get_process_group_ranks(axis.group))
        for axis in (mesh.cfg, mesh.ring, mesh.ulysses, mesh.sequence, mesh.world)
    ]


ALONE = (1, 0, [])


def test_groups_are_adopted():
    assert run_ranks(4, adopted, (1, 2, 2), {})[2] == [
        ALONE,
        (2, 1, [0, 2]),
        (2, 0, [2, 3]),
        (4, 2, [0, 1, 2, 3]),
        (4, 2, [0, 1, 2, 3]),
    ]
    assert run_ranks(4, adopted, (2, 1, 2), {})[3] == [
        (2, 1, [1, 3]),
        ALONE,
        (2, 1, [2, 3]),
        (2, 1, [2, 3]),
        (4, 3, [0, 1, 2, 3]),
    ]


def test_each_data_parallel_replica_is_a_job_of_its_own():
    for rank, axes in enumerate(run_ranks(4, adopted, (1, 1, 2), {})):
        mine = [0, 1] if rank < 2 else [2, 3]
        assert axes == [ALONE, ALONE, *[(2, rank % 2, mine)] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(initialised=False), "call its initialize_model_parallel"),
        (dict(tensor=2), "a tensor parallel degree of 2"),
        (dict(pipeline=2), "a pipeline parallel degree of 2"),
        (dict(swapped=None), "with yunchang installed"),
        (dict(swapped=True), "ulysses innermost"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    answers = run_ranks(4, adopted, (1, 2, 2), options)
    # Ranks on the diagonal cannot see that two axes were swapped; the others do.
    told = answers[1:3] if options == dict(swapped=True) else answers
    assert all(message in answer for answer in told)


def test_xfuser_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "xfuser", None)
    with pytest.raises(ConfigError, match="xfuser cannot be imported"):
        ParallelMesh.from_xfuser()
