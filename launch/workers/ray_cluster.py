"""Worker processes on a Ray cluster, one that runs already or one of this machine alone: each is an actor."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...engine.facts import first_line
from ...errors import ConfigError, RankLost
from .messages import GroupConfig, Identity, Kill, Order, StopRequest
from .network import environment_at
from .process import BEAT_SECONDS, WorkerLoop
from .watch import Worker

_REACH_SECONDS = 5.0
_OBJECT_STORE_BYTES = 2**30
"""Of a cluster of our own: room for a video on its way, not for a third of the machine's memory."""
_LANES = 8


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
        raise ConfigError(
            f"{where} ({first_line(error)}); start one with `ray start --head`, or leave out the address"
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
    """Raise ConfigError unless the cluster could hold a worker group if it were idle."""
    kind = "GPU" if gpus else "CPU"
    found = int(ray.cluster_resources().get(kind, 0.0))
    if found < size:
        hint = "" if not gpus else ", or compute on its CPUs with --device cpu"
        raise ConfigError(f"{size} ranks need {size} {kind}s, but the cluster has {found}: ask for fewer ranks{hint}")


class WorkerActor:
    """A worker's process, which runs a `WorkerLoop`.

    Threaded, and with sync methods only: one `async def` would make it an asyncio actor, in which a step blocks the
    heartbeat.
    """

    def __init__(self) -> None:
        """Start; nothing is loaded."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        address, device = ray.util.get_node_ip_address(), gpus[0] if gpus else ""
        # Ranks meet in the network in which Ray does. A host's own name often leads to 127.0.1.1.
        os.environ.update(environment_at(address))
        self._loop = WorkerLoop(Identity(pid=os.getpid(), node=context.get_node_id(), address=address, device=device))
        threading.Thread(target=self._loop.run, name="work", daemon=True).start()

    def take(self, seconds: float) -> list[Any]:
        """The heartbeat, with what is new; see `Outbox.take`."""
        return self._loop.outbox.take(seconds)

    def post(self, message: Order | StopRequest | Kill) -> None:
        """Take a message of the driver."""
        self._loop.post(message)


class RayWorker(Worker):
    """An actor, as its driver sees it."""

    def __init__(self, seat: int | None, actor: Any) -> None:
        """Look at an actor that was just asked for."""
        super().__init__(seat)
        self._actor = actor
        self.beat = actor.take.remote(BEAT_SECONDS)
        """The answer to the heartbeat that is on its way."""

    def post(self, message: Order | StopRequest | Kill) -> None:
        """Send it a message."""
        self._actor.post.remote(message)

    def receive(self) -> list[Any]:
        """What it sent since the last call."""
        try:
            if not ray.wait([self.beat], timeout=0)[0]:
                return []
            messages = ray.get(self.beat)
        except RayError as error:
            cause = _cause_of(error, self.identity.node if self.identity is not None else None)
            words = {"died": "died", "node": "was lost with its machine", "memory": "was killed for lack of memory"}
            raise RankLost(cause, words.get(cause, f"ended ({first_line(error)})")) from error
        self.beat = self._actor.take.remote(BEAT_SECONDS)
        return messages or [None]

    def kill(self, others: Sequence[Worker] = ()) -> None:
        """End it: at once on this machine, and where another worker is on its machine; else Ray takes its time."""
        if self.identity is not None:
            if self.identity.node == ray.get_runtime_context().get_node_id():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(self.identity.pid, signal.SIGKILL)
            else:
                for other in others:
                    if other is not self and other.identity and other.identity.node == self.identity.node:
                        other.post(Kill(self.identity.pid))
                        break
        with contextlib.suppress(RayError):
            ray.kill(self._actor, no_restart=True)


class RayCluster:
    """The cluster, as the place of a group's workers: a placement group with a bundle for each seat."""

    def __init__(self, gpus: bool) -> None:
        """Reserve nothing yet. Ray is initialised already.

        Args:
            gpus: whether each rank gets a GPU; else each gets a CPU, as Ray counts them.
        """
        self._gpus = gpus
        self._group: PlacementGroup | None = None
        self._actor = ray.remote(max_concurrency=_LANES, max_restarts=0, max_task_retries=0)(WorkerActor)

    @property
    def complete(self) -> bool:
        """Whether the cluster has all places, also those whose processes are still starting."""
        assert self._group is not None
        with _answering():
            return bool(placement_group_table(self._group)["state"] == "CREATED")

    def reserve(self, config: GroupConfig, attend: Callable[[], None]) -> None:
        """Reserve a place for each rank: on one machine where one is large enough, else on as few as will do.

        Raises:
            ConfigError: the cluster is too small.
            RankLost: its places were not free in time.
        """
        if self._group is not None:
            return
        with _answering():
            check_room(config.size, self._gpus)
            kind = "GPU" if self._gpus else "CPU"
            largest = max((node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
            strategy = "STRICT_PACK" if largest >= config.size else "PACK"
            self._group = placement_group([{kind: 1.0}] * config.size, strategy=strategy)
            deadline = time.monotonic() + config.start_seconds
            try:
                while not self._group.wait(0.5):
                    attend()
                    if time.monotonic() > deadline:
                        found = f"the cluster had no {config.size} {kind}s free in {config.start_seconds:.0f} s"
                        raise RankLost("timeout", found)
            except BaseException:
                self.release()
                raise

    def start(self, seat: int | None) -> RayWorker:
        """Ask for an actor."""
        with _answering():
            if seat is None:
                return RayWorker(None, self._actor.options(num_cpus=0).remote())
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=seat)
            need = {"num_cpus": 0, "num_gpus": 1} if self._gpus else {"num_cpus": 1}
            return RayWorker(seat, self._actor.options(scheduling_strategy=strategy, **need).remote())

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        """Return when one of some workers may have sent something, or after some seconds."""
        beats = [worker.beat for worker in workers if isinstance(worker, RayWorker)]
        with _answering():
            ray.wait(beats, num_returns=1, timeout=seconds)

    def near(self, identity: Identity) -> bool:
        """Whether a process is on this machine."""
        return identity.node == ray.get_runtime_context().get_node_id()

    def rank_key(self, worker: Worker) -> tuple[bool, str, int, int]:
        """Ranks of one machine are consecutive, by their GPUs; those of the driver's machine come first."""
        assert worker.identity is not None and worker.seat is not None
        identity = worker.identity
        device = int(identity.device) if identity.device.isdigit() else 0
        return not self.near(identity), identity.node, device, worker.seat

    def gpu(self, seat: int) -> None:
        """Ray shows each rank its own GPU alone."""

    def release(self) -> None:
        """Give the places back."""
        if self._group is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(self._group)
            self._group = None


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turn an error of the cluster itself into RankLost."""
    try:
        yield
    except RayError as error:
        raise RankLost(_cause_of(error), f"the Ray cluster does not answer ({first_line(error)})") from error


def _cause_of(error: RayError, node: str | None = None) -> str:
    """What Ray's error says of an actor's end, in one of `messages.CAUSES`.

    Args:
        error: Ray's.
        node: machine of the actor.
    """
    text = str(error)
    if isinstance(error, GetTimeoutError):
        return "timeout"
    # Of every process that is killed Ray says that the kernel may have done it for lack of memory.
    if isinstance(error, OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in text or "running low on memory" in text:
        return "memory"
    if node is not None and not any(found["NodeID"] == node and found["Alive"] for found in ray.nodes()):
        return "node"
    return "died" if isinstance(error, RayActorError) else "error"
