"""Every layout over machines makes the video of one machine, and sends no more than its formula."""

import math
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import machines
import ranks
import tiny
from heterostep import HSAConfig, ParallelConfig, apply

TOLERANCE = 1e-4
CONFIG = HSAConfig(compute=0.5, policy="tokens")
ON_TWO = {
    "ulysses": {"ulysses": 2},
    "ring, gathered": {"ring": 2, "ring_cache": "gathered"},
    "ring, sharded": {"ring": 2, "ring_cache": "sharded"},
    "cfg": {"cfg": 2},
}
ON_THREE = {
    "ulysses": {"ulysses": 3},
    "ring, gathered": {"ring": 3, "ring_cache": "gathered"},
    "ring, sharded": {"ring": 3, "ring_cache": "sharded"},
}
# Headers and acknowledgements, and what ranks tell each other besides data, on videos as small as these.
OVERHEAD, BESIDES = 1.15, 400_000


def make(layout=None):
    """Latents, and the bytes that this rank counts as sent."""
    pipe = tiny.build("unipc", heads=6)
    parallel = ParallelConfig(**layout) if layout else None
    session = apply(pipe, CONFIG, parallel=parallel)
    latents = tiny.generate(pipe)
    steps = [step.parallel for step in session.report.steps if step.parallel is not None]
    return latents, sum(count.bytes for step in steps for count in step.sent.values())


def on_machines(bed, rendezvous, layouts):
    """Make the video in each layout, on a rank that moves to a machine of its own for as long."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    found = {}
    with bed[rank].entered():
        os.environ["GLOO_SOCKET_IFNAME"] = machines.INTERFACE
        try:
            for name, layout in layouts.items():
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{rendezvous}-{name}",
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=50),
                )
                dist.barrier()
                before = bed[rank].bytes_sent
                latents, counted = make(layout)
                dist.barrier()
                found[name] = latents, counted, bed[rank].bytes_sent - before
                dist.destroy_process_group()
        finally:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # The caller ends the process group that it made.
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}-end", rank=rank, world_size=size)
    dist.barrier()
    return found


@pytest.mark.parametrize("layouts", [ON_TWO, ON_THREE], ids=["two machines", "three machines"])
def test_machines_make_the_video_of_one(bed, tmp_path, layouts):
    alone, _ = make()
    size = max(math.prod(layout.get(axis, 1) for axis in ("cfg", "ring", "ulysses")) for layout in layouts.values())
    everyone = ranks.run_ranks(size, on_machines, bed, str(tmp_path / "rendezvous"), layouts)
    for name in layouts:
        for found in everyone:
            latents, counted, sent = found[name]
            assert (latents - alone).abs().max() < TOLERANCE, name
            assert torch.equal(latents, everyone[0][name][0]), name
            assert 0 < counted <= sent <= OVERHEAD * counted + BESIDES, name
