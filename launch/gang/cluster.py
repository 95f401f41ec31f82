"""The Ray cluster: one that runs already, or one of this machine alone; and the places of a gang in it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ...errors import ConfigError
from .config import GangConfig
from .messages import RankLost

_REACH_SECONDS = 5.0
_OBJECT_STORE_BYTES = 2**30
"""Of a cluster of our own: room for a video on its way, not for a third of the machine's memory."""


@contextlib.contextmanager
def connected(address: str | None, ranks: int, device: str) -> Iterator[None]:
    """Be a driver of a cluster while the context lasts.

    Args:
        address: of a cluster that runs, "auto" for the one of this machine; None starts one, which ends with the
            context. It has no dashboard, sends no usage statistics, and asks for Ray's own token as every cluster does.
        ranks: how many a cluster of one's own must have room for.
        device: "cpu" hides the GPUs from it.

    Raises:
        ConfigError: there is no cluster at the address, or it does not let this process in.
    """
    init(address, ranks, device)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_address(given: str | None) -> str | None:
    """The cluster that is meant: the one given, else Ray's own variable's, else none."""
    return given or os.environ.get("RAY_ADDRESS") or None


def init(address: str | None, ranks: int, device: str) -> None:
    """Connect as `connected` does, for as long as the process lives."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        # Ray counts CPUs, it does not bind to them: more ranks than cores are slow, but allowed.
        options |= {"num_cpus": max(ranks, os.cpu_count() or 1) + 1}
        if device == "cpu":
            options["num_gpus"] = 0
    else:
        _check_reachable(address)
        options["address"] = address
    _be_quiet()
    try:
        ray.init(**options)
    except (RayError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = "a Ray cluster cannot be started here" if address is None else f"no Ray cluster answers at {address!r}"
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"{where} ({first[:200]}); start one with `ray start --head`, or leave out the address"
        ) from error


def _check_reachable(address: str) -> None:
    """Refuse what Ray would try for minutes."""
    if "://" in address:
        raise ConfigError(f"Ray address {address!r}: name HOST:PORT of the cluster's head, from one of its machines")
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({reason}); start one with `ray start --head`, or leave out the "
            "address"
        ) from error


def _be_quiet() -> None:
    """Keep Ray's own account of a process that dies, ten lines on stdout, off the screen: ours is one sentence.

    Ray has no setting for it; this is what its debugger does.
    """
    from ray._private import worker

    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = False


def has_gpus() -> bool:
    """Whether the cluster has any GPU."""
    return float(ray.cluster_resources().get("GPU", 0.0)) > 0.0


def check_room(size: int, gpus: bool) -> None:
    """Raise ConfigError unless the cluster could hold a gang if it were idle."""
    kind = "GPU" if gpus else "CPU"
    found = int(ray.cluster_resources().get(kind, 0.0))
    if found < size:
        hint = "" if not gpus else ", or compute on its CPUs with --device cpu"
        raise ConfigError(f"{size} ranks need {size} {kind}s, but the cluster has {found}: ask for fewer ranks{hint}")


def place(config: GangConfig, attend: Callable[[], None]) -> PlacementGroup:
    """Reserve a place for each rank: on one machine where one is large enough, else on as few as will do.

    Args:
        config: of the gang.
        attend: called again and again meanwhile; what it raises ends the wait.

    Raises:
        ConfigError: the cluster is too small.
        RankLost: its places were not free in time.
    """
    check_room(config.size, config.gpus)
    kind = "GPU" if config.gpus else "CPU"
    largest = max((node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    strategy = "STRICT_PACK" if largest >= config.size else "PACK"
    group = placement_group([{kind: 1.0}] * config.size, strategy=strategy)
    deadline = time.monotonic() + config.start_seconds
    try:
        while not group.wait(0.5):
            attend()
            if time.monotonic() > deadline:
                raise RankLost(
                    "timeout", f"the cluster had no {config.size} {kind}s free in {config.start_seconds:.0f} s"
                )
    except BaseException:
        with contextlib.suppress(RayError):
            remove_placement_group(group)
        raise
    return group
