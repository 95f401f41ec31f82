import pytest

from heterostep.errors import ConfigError
from heterostep.parallel.attention import placement_for
from heterostep.parallel.config import ParallelConfig, check, degrees
from heterostep.parallel.mesh import ParallelMesh


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(cfg=0), "cfg must be a whole number of at least 1, not 0"),
        (dict(ring=1.5), r"ring must be a whole number.*not 1\.5"),
        (dict(ulysses=True), "ulysses must be a whole number.*not True"),
        (dict(ring_cache="whole"), "ring_cache must be one of auto, gathered, sharded, not 'whole'"),
        (dict(kernel="flash9"), "kernel must be one of auto, sdpa.*not 'flash9'"),
        (dict(cut="random"), "cut must be one of equal.*not 'random'"),
        (dict(weights="fast"), "weights='fast': a tuple of numbers"),
        (dict(ulysses=2, weights=(1.0,)), "2 number"),
        (dict(ulysses=2, weights=(1.0, 0.0)), "above 0"),
        (dict(ulysses=2, weights=(1.0, float("nan"))), "above 0"),
        (dict(ulysses=2, weights=(1.0, 2.0), cut="measured"), "only the cut 'equal'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)


def test_sizes_and_weights():
    config = ParallelConfig(cfg=2, ring=3, ulysses=4, weights=[1] * 12)
    assert (config.world_size, config.sequence_size, config.weights) == (24, 12, (1.0,) * 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ulysses=8), r"ulysses=8 with 12 attention heads.*one of 1, 2, 3, 4, 6, 12; ring takes any"),
        (dict(cfg=4, ulysses=2), r"cfg=4 with 2 guidance branch\(es\).*one of 1, 2\."),
        (dict(ulysses=4), r"makes 4 rank\(s\) of a job of 8.*may be 2 x 1 x 4, 2 x 2 x 2, 2 x 4 x 1, 1 x 2 x 4, 1 x 4"),
    ],
)
def test_wrong_degrees_are_refused_with_the_valid_ones(settings, message):
    with pytest.raises(ConfigError, match=message):
        check(ParallelConfig(**settings), world_size=8, num_heads=12, num_branches=2)


def test_every_listed_choice_is_valid_and_none_is_missing():
    for world in range(1, 25):
        listed = list(degrees(world_size=world, num_heads=12, num_branches=2))
        for cfg, ring, ulysses in listed:
            check(ParallelConfig(cfg=cfg, ring=ring, ulysses=ulysses), world_size=world, num_heads=12, num_branches=2)
        every = {
            (c, r, u) for c in (1, 2) for u in (1, 2, 3, 4, 6, 12) for r in range(1, world + 1) if c * r * u == world
        }
        assert len(listed) == len(set(listed)) and set(listed) == every


def test_mesh_without_a_job():
    mesh = ParallelMesh.create(ParallelConfig())
    assert (mesh.world.size, mesh.sequence.rank, mesh.sequence.group) == (1, 0, None)
    with pytest.raises(ConfigError, match=r"needs torch.distributed.*torchrun"):
        ParallelMesh.create(ParallelConfig(ulysses=2))
    with pytest.raises(ConfigError, match="the degrees must be the same"):
        placement_for(mesh, ParallelConfig(ring=2))
