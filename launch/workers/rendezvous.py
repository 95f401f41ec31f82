"""How ranks meet: the process group of one rendezvous, the ranks that torchrun starts, and the degrees they take."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from ...errors import ConfigError
from ...parallel.config import ParallelConfig, Topology, check, choose, degrees, divisors, resolve
from ...parallel.config import read as read_topology
from ...parallel.kernels import pick

JOIN_SECONDS = 120.0
"""How long ranks wait for each other at a rendezvous."""
COLLECTIVE_SECONDS = 1800.0
"""How long a collective may take before its rank gives up."""
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 2.0
# Enough to fill a link of 100 Gbit/s for longer than a message takes, little enough for one of 100 Mbit/s.
_LINK_BYTES = 1 << 20
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join_group(store: Store, name: str, rank: int, size: int, *, cuda: bool, seconds: float) -> Store:
    """Initialise the process group of one rendezvous; return the store that its ranks share.

    Args:
        store: at which the ranks meet.
        name: of the rendezvous. A store may outlive one: without a name of their own, ranks that meet again would find
            the addresses of dead ones.
        rank: of this process.
        size: number of ranks.
        cuda: whether NCCL is wanted beside gloo.
        seconds: how long a collective may take before its rank gives up.
    """
    shared = PrefixStore(name, store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=shared, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    return shared


def measure_link(rank: int, machines: Sequence[int]) -> tuple[float, float] | None:
    """Measure the link between the first machine and the last one; every rank of the group calls it.

    Gloo over TCP carries it, also where NCCL has a faster way.

    Args:
        rank: of this process.
        machines: how many ranks each machine has, in the order of the ranks.

    Returns:
        On rank 0, the seconds of one message without content, and the bytes in a second; None on all others, and where
        there is one machine.
    """
    other = sum(machines[:-1])
    if len(machines) < 2 or rank not in (0, other):
        return None
    seconds = []
    for count in (1, 1, _LINK_BYTES):  # the first one makes the connection
        rows = torch.zeros(count, dtype=torch.uint8)
        begin = time.perf_counter()
        if rank == 0:
            dist.send(rows, other)
            dist.recv(rows, other)
        else:
            dist.recv(rows, 0)
            dist.send(rows, 0)
        seconds.append((time.perf_counter() - begin) / 2)
    return (seconds[1], _LINK_BYTES / max(seconds[2] - seconds[1], 1e-9)) if rank == 0 else None


@dataclass(frozen=True, kw_only=True)
class TorchrunRank:
    """This process's place among the ranks.

    Attributes:
        rank: its number.
        world_size: how many ranks there are.
        store: what all ranks of this attempt can read and write.
    """

    rank: int
    world_size: int
    store: Store

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all, and writes the files."""
        return self.rank == 0

    def decide(self, question: str, make: Callable[[], bool]) -> bool:
        """Ask rank 0: `make` is called there alone, and all ranks get its answer."""
        if self.leads:
            self.store.set(question, str(int(make())))
        return self.store.get(question) == b"1"

    def fail(self, reason: str) -> None:
        """Tell the other ranks why this one ends; the first to say so is believed."""
        with contextlib.suppress(RuntimeError):  # the store may be gone already
            self.store.compare_set("failure", "", reason)

    def failure(self) -> str | None:
        """Return what a failed rank said, if one did."""
        with contextlib.suppress(RuntimeError):
            if self.store.check(["failure"]):
                return self.store.get("failure").decode()
        return None

    def wait_for_failure(self, seconds: float = 1.0) -> str | None:
        """Return why another rank failed, given it a moment to say so: a broken connection is seldom the cause."""
        deadline = time.monotonic() + seconds
        while (reason := self.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return reason


@contextlib.contextmanager
def joined(device: str) -> Iterator[TorchrunRank]:
    """Join the job that torchrun started this process for; leave it at the end.

    A rank that hangs in a collective because another one failed is ended within seconds, with exit code 1.

    Args:
        device: "auto", "cpu" or "cuda"; says whether NCCL is needed.

    Raises:
        ConfigError: the process was not started as a rank.
    """
    absent = [name for name in _NEEDED if name not in os.environ]
    if absent:
        raise ConfigError(
            f"{', '.join(absent)} not set: start ranks by `torchrun --nproc-per-node P -m heterostep.launch.torchrun`, "
            "or let `heterostep generate --nproc P ...` start them."
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=JOIN_SECONDS)
    base = TCPStore(address, port, world_size, is_master=rank == 0 and not hosted, timeout=wait)
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store = join_group(base, f"attempt_{attempt}", rank, world_size, cuda=cuda, seconds=COLLECTIVE_SECONDS)
    here = TorchrunRank(rank=rank, world_size=world_size, store=store)
    done = threading.Event()
    threading.Thread(target=_watch, args=(here, done), name="heterostep-watch", daemon=True).start()
    try:
        yield here
        # The rank that hosts the store must outlive the others' last look at it.
        dist.barrier()
    finally:
        done.set()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _watch(rank: TorchrunRank, done: threading.Event) -> None:
    """End this process when another rank has failed and this one has not noticed by itself."""
    while not done.wait(_WATCH_SECONDS):
        reason = rank.failure()
        if reason is None:
            continue
        if not done.wait(_GRACE_SECONDS):
            # Inside a collective there is no other way out: an exception cannot reach the main thread.
            print(f"heterostep: rank {rank.rank} stops: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
        return


_AXES = ("windows", "cfg", "ring", "ulysses")


def parallel_from(
    given: Mapping[str, Any],
    size: int,
    num_heads: int,
    num_branches: int,
    kv_bytes: int,
    device: torch.device,
    *,
    num_windows: int = 1,
    shard_weights: bool = False,
    machines: Sequence[int] = (),
    decide: Callable[[str, Callable[[], bool]], bool] | None = None,
) -> tuple[ParallelConfig | None, str]:
    """Return the degrees for a job, and a sentence that says why; None for one rank.

    Args:
        given: settings of `ParallelConfig` that were asked for.
        size: number of ranks.
        num_heads: attention heads of the model.
        num_branches: guidance branches of the request, 1 or 2.
        kv_bytes: K/V of all tokens, layers and branches of the request.
        device: where the ranks compute.
        num_windows: of the request's video.
        shard_weights: whether the weights are to be shared too.
        machines: how many ranks each machine has, in the order of the ranks; empty: all are on one.
        decide: in a process that is a rank already, asks rank 0.

    Raises:
        ConfigError: no degrees fit; the message lists those that do.
    """
    asked: dict[str, Any] = {axis: given[axis] for axis in _AXES if axis in given}
    how: dict[str, Any] = {name: value for name, value in given.items() if name not in _AXES}
    # Ranks that gather each other's weights must make the same number of passes, and groups of windows may not.
    num_windows = 1 if shard_weights else num_windows
    if asked.get("windows", 1) > num_windows:
        reason = "whose weights are shared" if shard_weights else f"of {num_windows} window(s)"
        raise ConfigError(f"windows={asked['windows']} for a video {reason}: at most windows={num_windows} is possible")
    fitting = _fitting(asked, size, num_heads, num_branches, num_windows, machines)
    if not fitting:
        check(ParallelConfig(**asked, **how), world_size=size, num_heads=num_heads, num_branches=num_branches)
        raise ConfigError(f"{size} ranks cannot be {' x '.join(f'{a} {n}' for a, n in asked.items())}")
    if size == 1:
        how |= {"shard_weights": True} if shard_weights else {}
        if how:
            raise ConfigError(f"--{next(iter(how)).replace('_', '-')} needs several ranks; start them with --nproc P")
        return None, ""
    links = _links(device, size)
    config, reason = choose(size, num_heads, num_branches, num_windows=num_windows, topology=links, machines=machines)
    if asked:
        config = ParallelConfig(**dict(zip(_AXES, fitting[0], strict=True)))  # type: ignore[arg-type]
        reason = f"{size} ranks: {config.product}"
    config = replace(config, **{"ring_cache": "auto"} | how)
    pick(config.kernel, device)
    if config.ring > 1 and config.ring_cache == "auto":
        config, why = resolve(config, kv_bytes=kv_bytes, free_bytes=_free_bytes(device, max(machines, default=size)))
        if decide is not None:  # free memory differs from rank to rank, the form must not
            gathered = decide("gathered", lambda: config.ring_cache == "gathered")
            config = replace(config, ring_cache="gathered" if gathered else "sharded")
        reason = f"{reason}; {why}"
    return config, reason


def refit(
    asked: Mapping[str, Any],
    size: int,
    num_heads: int,
    num_branches: int,
    num_windows: int = 1,
    machines: Sequence[int] = (),
) -> ParallelConfig | None:
    """Return the degrees for a number of ranks that may have changed; None for one rank.

    Args:
        asked: settings of `ParallelConfig`, all or some. Where the degrees among them do not fit, others are chosen,
            with the same kernel, cut and ring cache.
        size: how many ranks there are.
        num_heads: attention heads of the model.
        num_branches: guidance branches of the request.
        num_windows: of its video.
        machines: as in `parallel_from`.
    """
    if size == 1:
        return None
    axes = {axis: asked[axis] for axis in _AXES if axis in asked}
    how = {
        name: value for name, value in asked.items() if name not in _AXES and (name, value) != ("ring_cache", "auto")
    }
    fitting = _fitting(axes, size, num_heads, num_branches, num_windows, machines) if axes else []
    if fitting:
        return ParallelConfig(**dict(zip(_AXES, fitting[0], strict=True)), **how)  # type: ignore[arg-type]
    how.pop("weights", None)  # of other ranks
    return replace(choose(size, num_heads, num_branches, num_windows=num_windows, machines=machines)[0], **how)


def _fitting(
    axes: Mapping[str, int], size: int, num_heads: int, num_branches: int, num_windows: int, machines: Sequence[int]
) -> list[tuple[int, ...]]:
    """The degrees (windows, cfg, ring, ulysses) that fit, and have the given ones on their axes; the best first.

    Windows need least exchange, then branches, then heads if their ranks are on one machine. A degree of windows that
    does not divide their number leaves ranks without work, and is taken only where it is given.
    """
    asked = axes.get("windows")
    outer = divisors(math.gcd(size, num_windows))[::-1] if asked is None else [asked] if asked <= num_windows else []
    found = [
        (windows, *inside)
        for windows in outer
        if size % windows == 0
        for inside in degrees(world_size=size // windows, num_heads=num_heads, num_branches=num_branches, asked=axes)
    ]
    return sorted(found, key=lambda one: math.gcd(*machines) % one[-1] > 0)


def _links(device: torch.device, ranks: int) -> Topology | None:
    """What NVML says of this machine's GPUs, where the ranks are on them; None where it cannot be asked."""
    if device.type != "cuda" or ranks > torch.cuda.device_count():
        return None
    try:
        return read_topology()
    except ConfigError:  # they would only be named in the reason
        return None


def _free_bytes(device: torch.device, ranks: int) -> int | None:
    """Memory that a rank of this machine may take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // ranks
    except (ValueError, OSError, AttributeError):
        return None
