import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heterostep.errors import ConfigError
from heterostep.parallel.config import ParallelConfig, Topology, check, choose, degrees, kv_bytes, read, resolve

GIB = 2**30


def sent(cfg, ring, ulysses, num_branches, out_of_islands_of=1):
    """Elements per layer and rank as a multiple of A d, all tokens equally cut: for all branches that a rank runs.

    With islands of that many ranks only what leaves an island counts.
    """
    ranks, island = ring * ulysses, out_of_islands_of
    total = 0.0
    for me in range(ranks):
        for other in range(ranks):
            if (other // island == me // island and island > 1) or other == me:
                continue
            if other // ulysses == me // ulysses:  # q, k, v there, the output back; A / ranks rows of d / ulysses
                total += 4 / ranks / ulysses
            elif other % ulysses == me % ulysses:  # the group's K and V rows, d / ulysses wide
                total += 2 / ring / ulysses
    return total / ranks * num_branches / cfg


@given(st.integers(1, 64), st.sampled_from([1, 8, 12, 24, 32, 40]), st.sampled_from([1, 2, 3, 4]))
def test_no_valid_degrees_send_less(world, heads, branches):
    config, reason = choose(world, heads, branches)
    check(config, world_size=world, num_heads=heads, num_branches=branches)
    best = sent(config.cfg, config.ring, config.ulysses, branches)
    for other in degrees(world_size=world, num_heads=heads, num_branches=branches):
        assert best <= sent(*other, branches) + 1e-9
    assert "\n" not in reason and str(heads) in reason


@pytest.mark.parametrize("island", [2, 4, 8])
def test_nor_do_they_out_of_an_island_when_links_between_are_slow(island):
    for world in (8, 16, 32):
        for branches in (1, 2):
            config, _ = choose(world, 32, branches)
            best = sent(config.cfg, config.ring, config.ulysses, branches, island)
            for other in degrees(world_size=world, num_heads=32, num_branches=branches):
                assert best <= sent(*other, branches, island) + 1e-9


def test_known_models():
    def shape(*args):
        config = choose(*args)[0]
        return config.cfg, config.ring, config.ulysses

    assert shape(2, 40, 2) == (2, 1, 1)
    assert shape(8, 40, 2) == (2, 1, 4)
    assert shape(8, 12, 1) == (1, 2, 4)  # 12 heads: 8 does not divide them
    assert shape(16, 12, 2) == (2, 2, 4)
    assert shape(7, 40, 2) == (1, 7, 1)
    assert shape(1, 40, 2) == (1, 1, 1)
    with pytest.raises(ConfigError, match="at least one rank"):
        choose(0, 40, 2)


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([1, 8, 12, 24, 32, 40]), st.sampled_from([1, 2, 4]))
def test_ulysses_stays_inside_a_machine(machines, each, heads, branches):
    config, reason = choose(machines * each, heads, branches, machines=(each,) * machines)
    check(config, world_size=machines * each, num_heads=heads, num_branches=branches)
    assert each % config.ulysses == 0
    assert (f"on {machines} machines" in reason) == (machines > 1)
    if machines == 1:
        assert config == choose(each, heads, branches)[0]


def test_what_goes_across_machines_is_said():
    config, reason = choose(4, 40, 2, machines=(2, 2))
    assert (config.cfg, config.ring, config.ulysses) == (2, 1, 2) and "inside a machine" in reason
    config, reason = choose(4, 40, 1, machines=(2, 2))
    assert (config.cfg, config.ring, config.ulysses) == (1, 2, 2)
    assert "ring 2: one exchange in a layer, as it goes across machines" in reason
    config, _ = choose(3, 40, 1, machines=(2, 1))  # one of four was lost
    assert (config.ring, config.ulysses) == (3, 1)


@pytest.mark.parametrize("each", [1, 2, 4, 8])
def test_on_two_machines_of_a_branch_ring_sends_no_more_than_ulysses_across(each):
    config = choose(2 * each, 32, 1, machines=(each, each))[0]
    island = max(each, 1)
    assert sent(1, config.ring, config.ulysses, 1, island) <= sent(1, 1, 2 * each, 1, island) + 1e-9


WAN_14B_720P = dict(num_tokens=75_600, num_layers=40, width=5_120, itemsize=2)


def test_kv_bytes_of_wan_14b():
    assert round(kv_bytes(num_branches=1, **WAN_14B_720P) / GIB, 1) == 57.7
    assert kv_bytes(num_branches=2, history=True, **WAN_14B_720P) == 4 * kv_bytes(num_branches=1, **WAN_14B_720P)


def test_memory_decides_what_a_ring_rank_keeps():
    needed = kv_bytes(num_branches=1, **WAN_14B_720P)  # 57.7 GiB; 14.4 on each of 4 ulysses ranks, half on ring 2
    config, reason = choose(8, 12, 1, kv_bytes=needed, free_bytes=40 * GIB)
    assert config == ParallelConfig(ring=2, ulysses=4, ring_cache="gathered")
    assert "ring cache gathered: K/V 14.42 GiB per rank, room for 28.00 GiB" in reason
    config, reason = choose(8, 12, 1, kv_bytes=needed, free_bytes=20 * GIB)
    assert config.ring_cache == "sharded"
    assert "ring cache sharded: K/V 7.21 GiB per rank, room for 14.00 GiB, not for 14.42 GiB gathered" in reason
    config, reason = choose(8, 12, 1, kv_bytes=needed, free_bytes=10 * GIB)
    assert config.ring_cache == "sharded" and reason.endswith("take more ranks or a narrower kv_dtype")
    assert choose(8, 12, 1)[0].ring_cache == "sharded"


def test_what_was_asked_for_is_kept():
    asked = ParallelConfig(ring=2, ring_cache="gathered")
    assert resolve(asked, kv_bytes=100 * GIB, free_bytes=GIB)[0] == asked
    assert "too little" in resolve(asked, kv_bytes=100 * GIB, free_bytes=GIB)[1]
    assert resolve(asked) == (asked, "")
    alone = ParallelConfig(ulysses=4)
    assert resolve(alone) == (alone, "")
    assert resolve(alone, kv_bytes=4 * GIB, free_bytes=80 * GIB) == (
        alone,
        "K/V 1.00 GiB per rank, room for 56.00 GiB",
    )


class Nvml:
    """The part of pynvml that is asked, with four GPUs of which NVLink joins two and two."""

    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, links, broken=False):
        self.links, self.broken, self.open = links, broken, 0

    def nvmlInit(self):
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid.startswith("GPU-")
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(free=handle * GIB)

    def nvmlDeviceGetP2PStatus(self, one, other, index):
        if 9 in (one, other):
            raise self.NVMLError("Not Supported")
        return 0 if {one, other} in self.links else 5


def test_topology_joins_what_nvlink_joins():
    nvml = Nvml([{0, 2}, {1, 3}])
    topology = read(["0", "1", "GPU-2", "3"], nvml)
    assert topology == Topology(islands=((0, 2), (1, 3)), free_bytes=(0, GIB, 2 * GIB, 3 * GIB))
    assert topology.order == (0, 2, 1, 3)
    assert not topology.split(2) and topology.split(4)
    assert nvml.open == 0
    assert read(["3", "2"], nvml).islands == ((0,), (1,))
    assert read(["0", "9"], nvml).islands == ((0,), (1,))
    assert read(["0", "1", "2"], Nvml([{0, 2}, {1, 2}])).islands == ((0, 1, 2),)


def test_topology_is_clear_where_there_is_nothing_to_ask(monkeypatch):
    with pytest.raises(ConfigError, match="Driver Not Loaded"):
        read(["0"], Nvml([], broken=True))
    with pytest.raises(ConfigError, match="no NVIDIA GPU is visible"):
        read([], Nvml([]))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match=r"install heterostep\[gpu\]"):
        read(["0"])


def test_the_reason_names_the_links():
    pairs = Topology(islands=((0, 1), (2, 3)), free_bytes=(1, 1, 1, 1))
    assert "a ulysses group has NVLink inside" in choose(4, 40, 2, topology=pairs)[1]
    assert "a ulysses group spans GPUs without NVLink" in choose(4, 40, 1, topology=pairs)[1]
    assert "NVLink" not in choose(2, 40, 2, topology=pairs)[1]
