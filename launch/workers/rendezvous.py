"""How ranks meet: the process group of one rendezvous, and the ranks that torchrun starts itself."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from ...errors import ConfigError

JOIN_SECONDS = 120.0
"""How long ranks wait for each other at a rendezvous."""
COLLECTIVE_SECONDS = 1800.0
"""How long a collective may take before its rank gives up."""
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 2.0
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
        seconds: as `COLLECTIVE_SECONDS`.
    """
    shared = PrefixStore(name, store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=shared, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    return shared


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
