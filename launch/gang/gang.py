"""The driver of a gang: it starts the ranks, watches them, lets them make videos, and replaces those that are lost."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...engine.request import EngineConfig
from ...errors import Cancelled, ConfigError, RequestError
from .actor import rank_actor
from .cluster import place
from .config import GangConfig
from .member import Member, cause_of, line_of
from .messages import Closed, Outcome, Place, Progress, RankLost, Work
from .together import Together

REBUILDS = 3
"""How often in a row a gang may fail to become whole."""
_LOOK_SECONDS = 0.25
# The first import of a large library from a slow disk leaves no time for heartbeats.
_LOADING_SECONDS = 60.0


class Gang:
    """W ranks that make one video at a time.

    One thread may call `heal`, `watch` and `run`; `wish` and `close` may be called from any other meanwhile.

    Attributes:
        config: as given.
        lives: how often the ranks have met; more than one means that some were replaced.
    """

    def __init__(self, config: GangConfig, engine: EngineConfig) -> None:
        """Prepare; `heal` starts the ranks. Ray is initialised already.

        Args:
            config: of the gang.
            engine: what each rank loads; `parallel` is chosen for each video.
        """
        self.config, self._engine = config, engine
        self._actor = rank_actor()
        self._group: PlacementGroup | None = None
        self._members: list[Member] = []
        self._coming: dict[int, Member] = {}
        self._spare: Member | None = None
        self._spare_ready: Any = None
        # Places that the cluster had not given when the gang went on without them.
        self._without: set[int] = set()
        self._work: str | None = None
        self._wished: str | None = None
        self._runs = 0
        self._whole = self._closed = False
        self.lives = 0

    @property
    def ready(self) -> bool:
        """Whether a video could be made now."""
        return self._whole and not self._closed

    @property
    def working(self) -> bool:
        """Whether a video is being made."""
        return self._work is not None

    @property
    def size(self) -> int:
        """How many ranks it has now."""
        return len(self._members)

    @property
    def spared(self) -> bool:
        """Whether a spare process is ready to take the place of the next rank that dies."""
        return self._spare is not None and bool(ray.wait([self._spare_ready], timeout=0)[0])

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, by rank, each on its own machine."""
        return [member.identity.pid for member in self._members if member.identity is not None]

    @property
    def near(self) -> bool:
        """Whether rank 0 is on this machine, and can use this process's folders."""
        identity = self._members[0].identity if self._members else None
        return identity is not None and identity.node == ray.get_runtime_context().get_node_id()

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the rank that was silent longest was heard of."""
        return max((member.silent for member in self._members), default=0.0)

    def heal(self, work: Work | None = None) -> None:
        """Start what is missing and let the ranks meet, if they are not together already.

        A place that the cluster has no more is done without after a while; should it come back, it is taken up the
        next time that the gang heals, or when `watch` sees it.

        Args:
            work: what comes next, if that is known.

        Raises:
            ConfigError: every rank refuses the settings or the model.
            RankLost: the gang cannot be made whole.
            Closed: by `close`.
        """
        if self._whole:
            return
        for left in reversed(range(REBUILDS)):
            try:
                self._gather()
                self._meet(work)
                break
            except (RankLost, RayError) as error:
                if isinstance(error, RayError):  # of the cluster, not of a rank
                    error = RankLost(cause_of(error), f"the Ray cluster does not answer ({line_of(error)})")
                if not left:
                    raise error from None
        self._whole = True
        self._keep_spare()

    def watch(self) -> None:
        """Look after the ranks while there is no work; never waits.

        Raises:
            RankLost: one of them died or is frozen; `heal` replaces it.
        """
        for rank, member in enumerate(self._members):
            name, cause = f"rank {rank} of {self.size}", member.trouble(self.config.frozen_after)
            if cause is not None:
                self._lose([rank])
                raise RankLost(cause, f"{name} was lost while it was idle")
        if self._coming and self._arrived():
            self._whole = False

    def run(self, work: Work) -> Generator[Progress, None, Outcome]:
        """Make a video; the generator's value is rank 0's outcome. Closing it early ends the work within a step.

        Raises:
            RequestError: the request cannot be served, or ends with the same error on every rank; the gang stays.
            Cancelled: after `wish`.
            RankLost: a rank was lost; `heal` makes the gang whole.
            Closed: by `close`.
        """
        assert self._whole, "heal comes before run"
        # A name of its own, so that no rank takes what it said of an earlier attempt for news of this one.
        self._runs += 1
        work = replace(work, id=f"{work.id}.{self._runs}")
        self._work, self._wished = work.id, None
        calls = [member.actor.make.remote(work) for member in self._members]
        together = self._watched(calls, work=work.id)
        try:
            yield from together.messages()
        except (GeneratorExit, KeyboardInterrupt):
            self.wish("stop")
            with contextlib.suppress(Closed):
                together.wait()
            self._settle(together)
            raise
        finally:
            self._work = None
        return self._judge(together)

    def wish(self, verb: str) -> None:
        """Let the running video end within one step: "cancel", or "stop" after saving it. Harmless when idle.

        Nothing is sent here: a signal handler may call it, in the midst of what this thread does with Ray.
        """
        if self._work is not None:
            self._wished = verb

    def close(self) -> None:
        """End all processes and give back their places."""
        self._closed, self._whole = True, False
        everybody = [*self._members, *self._coming.values(), *([self._spare] if self._spare else [])]
        for member in everybody:
            member.end(everybody)
        self._members, self._coming, self._spare = [], {}, None
        if self._group is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(self._group)
            self._group = None

    # How it becomes whole.

    def _gather(self) -> None:
        """Have a process in every place that the cluster gives."""
        if self._group is None:
            self._group = place(self.config, self._attend)
        self._take_spare()
        taken = {member.bundle for member in self._members}
        for bundle in range(self.config.size):
            if bundle not in taken and bundle not in self._coming:
                self._coming[bundle] = self._start(bundle)
        begin = missing_since = time.monotonic()
        while self._coming.keys() - self._without:
            self._arrived()
            now = time.monotonic()
            if self._placed():
                missing_since = now
            late = now - begin > self.config.start_seconds
            if late and not self._members:
                raise RankLost("timeout", f"the cluster started no process in {self.config.start_seconds:.0f} s")
            if late or (now - missing_since > self.config.patience and self._members):
                self._without |= self._coming.keys()
            elif self._coming:
                self._pause([member.started for member in self._coming.values()])

    def _arrived(self) -> bool:
        """Take in the processes that have started; whether there were any."""
        waiting = {member.started: bundle for bundle, member in self._coming.items()}
        ready = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0] if waiting else []
        for reference in ready:
            self._without.discard(waiting[reference])
            member = self._coming.pop(waiting[reference])
            member.arrive()
            self._members.append(member)
        return bool(ready)

    def _start(self, bundle: int) -> Member:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        need = {"num_cpus": 0, "num_gpus": 1} if self.config.gpus else {"num_cpus": 1}
        return Member(self._actor.options(scheduling_strategy=strategy, **need).remote(), bundle)

    def _placed(self) -> bool:
        """Whether the cluster has all places, also those whose processes are still starting."""
        assert self._group is not None
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def _meet(self, work: Work | None) -> None:
        """Number the ranks, let them meet, and have the model loaded.

        Neighbours in the order are neighbours in the machine, as those are who share heads.
        """
        self._attend()
        self._members.sort(key=_order)
        self.lives += 1
        nodes = [member.identity.node for member in self._members if member.identity is not None]
        try:
            address, port = ray.get(self._members[0].actor.open_store.remote(), timeout=_LOADING_SECONDS)
        except RayError as error:
            self._lose([0])
            raise RankLost(cause_of(error), f"rank 0 of {len(nodes)} died before the others met it") from error
        calls = []
        for rank, member in enumerate(self._members):
            here = Place(
                rank=rank,
                size=len(nodes),
                neighbours=nodes.count(nodes[rank]),
                life=self.lives,
                address=address,
                port=port,
                threads=self.config.threads,
                collective_seconds=self.config.collective_seconds,
            )
            calls.append(member.actor.prepare.remote(here, self._engine, work))
        together = self._watched(calls, max(self.config.frozen_after, _LOADING_SECONDS))
        together.wait()
        refused = {outcome.message for outcome in together.outcomes.values() if outcome.ended == "refused"}
        root = together.root()
        if root is not None:
            self._settle(together)
            raise RankLost(*root)
        if refused:
            raise ConfigError("; ".join(sorted(refused)))
        if len(nodes) < self.config.size:
            _log("the gang goes on with %d of %d ranks", len(nodes), self.config.size)

    def _keep_spare(self) -> None:
        if self.config.spare and self._spare is None:
            self._spare = Member(self._actor.options(num_cpus=0).remote(), None)
            self._spare_ready = self._spare.actor.warm.remote(self._engine, self.config.threads)

    def _take_spare(self) -> None:
        """Put the spare process into the first place that is empty; it has begun to load before any new one could."""
        empty = sorted(set(range(self.config.size)) - {member.bundle for member in self._members} - self._coming.keys())
        if self._spare is None or not empty:
            return
        spare, self._spare = self._spare, None
        spare.renew()
        while not ray.wait([self._spare_ready], timeout=0)[0]:
            if spare.trouble(_LOADING_SECONDS) is not None:
                break
            self._pause([self._spare_ready])
        with contextlib.suppress(RayError, RankLost):
            if ray.get(self._spare_ready, timeout=0).ended == "done":
                spare.arrive()
                spare.bundle = empty[0]
                self._members.append(spare)
                return
        spare.end()

    # How work ends.

    def _judge(self, together: Together) -> Outcome:
        """Rank 0's outcome, or what the outcomes of all ranks mean."""
        outcomes = list(together.outcomes.values())
        same = len(outcomes) == len(self._members) and len({(o.ended, o.cause, o.message) for o in outcomes}) == 1
        if same and outcomes[0].ended == "failed" and outcomes[0].cause in ("error", "memory"):
            self._whole = False  # each of them has left its groups; they meet anew
            raise RequestError(outcomes[0].message)
        root = together.root()
        if root is not None:
            self._settle(together)
            raise RankLost(*root)
        leading = together.outcomes[0]
        if leading.ended == "refused":
            raise RequestError(leading.message)
        if leading.ended == "stopped":
            raise Cancelled(leading.message)
        return leading

    def _settle(self, together: Together) -> None:
        """Part with the ranks that are lost, or whose memory an error of their own has left in any state."""
        if together.root() is not None:
            failed = [rank for rank, end in together.outcomes.items() if end.ended == "failed" and end.cause != "peer"]
            self._lose([*together.lost, *failed])

    def _lose(self, ranks: Sequence[int]) -> None:
        """End ranks that are dead, frozen or stuck.

        Of NCCL's, and of those that share the weights, none can be kept: the others wait in a collective for ever, or
        hold parts of what is no more.
        """
        self._whole = False
        everybody = self._members
        gone = set(range(len(everybody))) if self.config.gpus or self._engine.shard_weights else set(ranks)
        for rank in gone:
            everybody[rank].end(everybody)
        self._members = [member for rank, member in enumerate(everybody) if rank not in gone]

    # How it waits.

    def _watched(self, calls: list[Any], frozen_after: float | None = None, work: str = "") -> Together:
        return Together(self._members, calls, frozen_after or self.config.frozen_after, self._attend, work)

    def _attend(self) -> None:
        """What is due while the driver waits: to end, or to pass a wish on."""
        if self._closed:
            raise Closed("the gang was closed")
        verb, self._wished = self._wished, None
        if verb is not None and self._work is not None:
            for member in self._members:
                member.actor.wish.remote(self._work, verb)

    def _pause(self, references: list[Any]) -> None:
        self._attend()
        ray.wait(references, num_returns=1, timeout=_LOOK_SECONDS)


def _order(member: Member) -> tuple[bool, str, int, int]:
    """Ranks of one machine are consecutive, by their GPUs; those of the driver's machine come first."""
    assert member.identity is not None and member.bundle is not None
    node, device = member.identity.node, member.identity.device
    far = node != ray.get_runtime_context().get_node_id()
    return far, node, int(device) if device.isdigit() else 0, member.bundle


def _log(message: str, *values: object) -> None:
    logging.getLogger("heterostep").warning("heterostep: " + message, *values)
