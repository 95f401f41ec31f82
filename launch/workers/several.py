"""Worker processes on several machines, without Ray: those of the main machine, and those that others start for it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from ...errors import ConfigError, JobStopped, RankLost
from ...version import __version__
from .messages import GroupConfig, Identity, Kill, Order, StopRequest
from .network import REACH_SECONDS, End, Ended, Farewell, Hello, Line, Meeting, Post, Said, Start, environment_at, prove
from .process import LocalWorker, ThisMachine
from .watch import LOOK_SECONDS, Worker

_FAREWELL_SECONDS = 2.0


class Member:
    """Another machine, as the main one sees it.

    Attributes:
        number: in the order in which machines came.
        hello: what it said of itself.
    """

    def __init__(self, number: int, hello: Hello, line: Line) -> None:
        """Begin without processes."""
        self.number, self.hello, self._line = number, hello, line
        self._taken: dict[int, RemoteWorker] = {}

    @property
    def lost(self) -> bool:
        """Whether it is gone."""
        return self._line.lost

    @property
    def silent(self) -> bool:
        """Whether it is cut off or frozen: its connections may never be closed."""
        return self._line.silent

    @property
    def waiting(self) -> bool:
        """Whether it has sent something."""
        return self._line.waiting

    def send(self, message: object) -> None:
        """Send it a message."""
        self._line.send(message)

    def take(self, worker: RemoteWorker) -> bool:
        """Start a process for a worker, if a place is free."""
        slot = next((slot for slot in range(self.hello.nproc) if slot not in self._taken), None)
        if slot is None:
            return False
        self._taken[slot] = worker
        worker.member, worker.slot = self, slot
        self.send(Start(worker.number, slot))
        return True

    def free(self, worker: RemoteWorker) -> None:
        """End a worker's process, and give its place to the next one."""
        self.send(End(worker.number))
        if self._taken.get(worker.slot) is worker:
            del self._taken[worker.slot]

    def sort(self) -> None:
        """Hand what it has sent to the workers that it is of."""
        workers = {worker.number: worker for worker in self._taken.values()}
        for message in self._line.receive():
            worker = workers.get(message.number)
            if worker is not None:
                worker.mail += message.messages if isinstance(message, Said) else [message]

    def close(self, how: str = "done", text: str = "", seconds: float = 0.0) -> None:
        """Let it go."""
        self.send(Farewell(how, text))
        self._line.close(seconds)


class RemoteWorker(Worker):
    """A process on another machine.

    Attributes:
        number: no other worker ever has it.
        member: the machine; None while there is none.
        slot: the process's place on the machine.
        mail: what it has sent.
    """

    def __init__(self, seat: int, number: int, find_place: Callable[[RemoteWorker], bool]) -> None:
        """Wait for a place, which `find_place` may give."""
        super().__init__(seat)
        self.number, self._find_place = number, find_place
        self.member: Member | None = None
        self.slot = 0
        self.mail: list[Any] = []

    @property
    def alive(self) -> bool:
        """Whether its machine is there."""
        return self.member is not None and not self.member.lost

    @property
    def waiting(self) -> bool:
        """Whether `receive` has something to return or to raise."""
        return self.member is not None and (bool(self.mail) or self.member.waiting or self.member.lost)

    def post(self, message: Order | StopRequest | Kill) -> None:
        """Send it a message."""
        assert self.member is not None, "only a process that has started gets messages"
        self.member.send(Post(self.number, message))

    def receive(self) -> list[Any]:
        """What it sent since the last call."""
        if self.member is None and not self._find_place(self):
            return []
        assert self.member is not None
        self.member.sort()
        messages: list[Any] = []
        while self.mail:
            message = self.mail.pop(0)
            if isinstance(message, Ended):
                raise RankLost(message.cause, message.text)
            if isinstance(message, Identity):
                message = dataclasses.replace(message, node=f"{self.member.number:06}")
            messages.append(message)
        if not messages and self.member.lost:
            cause = "node" if self.member.silent else "died"
            raise RankLost(cause, f"was lost with its machine {self.member.hello.name}")
        return messages

    def kill(self, others: Sequence[Worker] = ()) -> None:
        """End it."""
        if self.member is not None:
            self.member.free(self)


class SeveralMachines:
    """This machine and those that connect to it, as the places of a group's workers.

    Ranks of this machine come first: rank 0 is always here, and with it the job.
    """

    def __init__(
        self,
        meeting: Meeting,
        nproc: int,
        least: int,
        key: bytes,
        show: Callable[[int | None, str], None],
        say: Callable[[str], None],
    ) -> None:
        """Listen for the others.

        Args:
            meeting: where.
            nproc: ranks of each machine.
            least: ranks without which there is no start.
            key: see `network.prove`.
            show: as in `ThisMachine`.
            say: is told which machines come.

        Raises:
            ConfigError: the port is taken.
        """
        self._meeting, self._nproc, self._least, self._key, self._say = meeting, nproc, least, key, say
        self._here = ThisMachine(show=show, address=meeting.address, environment=environment_at(meeting.address))
        self._size = nproc
        self._members: list[Member] = []
        self._end: tuple[str, str] | None = None
        self._remote: dict[int, RemoteWorker] = {}
        self._numbers, self._machine_numbers = itertools.count(), itertools.count(1)
        self._waited = False
        try:
            self._listener = socket.create_server((meeting.address, meeting.port))
        except OSError as error:
            raise ConfigError(
                f"port {meeting.port} of {meeting.address} cannot be listened on ({error.strerror}); give another one "
                "with --master HOST:PORT, the same on all machines"
            ) from error
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> SeveralMachines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Tell the other machines how it ended."""
        how = "done" if error is None else "stopped" if isinstance(error, JobStopped) else "failed"
        text = "" if error is None else str(error) or type(error).__name__
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
        self._listener.close()
        with self._here.arrived:  # a machine that is being admitted hears of the end too
            self._end, members = (how, text), list(self._members)
        for member in members:
            member.close(how, text, _FAREWELL_SECONDS)

    @property
    def complete(self) -> bool:
        """Whether as many machines are here as were asked for."""
        return self._room >= self._size

    def reserve(self, config: GroupConfig, attend: Callable[[], None]) -> None:
        """Wait for the other machines, the first time.

        Raises:
            ConfigError: too few have come.
        """
        self._size = config.size
        deadline = time.monotonic() + config.start_seconds
        while not self._waited and not self.complete and time.monotonic() < deadline:
            attend()
            self._here.wait([], LOOK_SECONDS)
        self._waited = True
        if self._room < self._least:
            raise ConfigError(
                f"{self._room} of {self._size} ranks are here after {config.start_seconds:.0f} s; give the same "
                "command on each of the other machines, which must reach "
                f"{self._meeting.address}:{self._meeting.port}"
            )

    def start(self, seat: int | None) -> LocalWorker | RemoteWorker:
        """Start a process here, or ask for one elsewhere."""
        if seat is None or seat < self._nproc:
            return self._here.start(seat)
        self._remote[seat] = worker = RemoteWorker(seat, next(self._numbers), self._find_place)
        return worker

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        """Return when one of some workers has sent something, or after some seconds."""
        self._here.wait(workers, seconds)

    def near(self, identity: Identity) -> bool:
        """Whether a process is on this machine."""
        return not identity.node

    def rank_key(self, worker: Worker) -> tuple[str, int]:
        """Ranks of one machine are consecutive; those of this one come first."""
        assert worker.identity is not None and worker.seat is not None
        return worker.identity.node, self.gpu(worker.seat)

    def gpu(self, seat: int) -> int:
        """One GPU of a machine after the other."""
        return seat if seat < self._nproc else self._remote[seat].slot

    def release(self) -> None:
        """Machines stay until the end of the context."""

    @property
    def _room(self) -> int:
        return self._nproc + sum(member.hello.nproc for member in self._members if not member.lost)

    def _find_place(self, worker: RemoteWorker) -> bool:
        for member in [member for member in self._members if member.lost]:
            self._members.remove(member)
            member.close()
        return any(member.take(worker) for member in self._members)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                stream, _ = self._listener.accept()
                # A thread for each: one that says nothing must not keep the others out.
                threading.Thread(target=self._admit, args=(stream,), daemon=True).start()

    def _admit(self, stream: socket.socket) -> None:
        stream.settimeout(REACH_SECONDS)
        try:
            if not prove(stream, self._key, b"main", b"other"):
                return stream.close()
        except OSError:
            return stream.close()
        line = Line(stream, self._here.arrived)
        with self._here.arrived:
            self._here.arrived.wait_for(lambda: line.waiting, REACH_SECONDS)
        hello = next(iter(line.receive()), None)
        if not isinstance(hello, Hello):
            return line.close()
        member = Member(next(self._machine_numbers), hello, line)
        refusal = self._refusal(hello)
        if refusal is not None:
            return member.close("refused", refusal, _FAREWELL_SECONDS)
        with self._here.arrived:
            if self._end is None:
                self._members.append(member)
            self._here.arrived.notify_all()
        if self._end is not None:
            return member.close(*self._end, _FAREWELL_SECONDS)
        self._say(f"machine {hello.name} is here")
        return None

    def _refusal(self, hello: Hello) -> str | None:
        """Why a machine cannot take part."""
        if hello.version != __version__:
            return f"heterostep is {hello.version} here and {__version__} on the main machine; install the same version"
        if hello.nproc != self._nproc:
            return f"--nproc is {hello.nproc} here and {self._nproc} on the main machine; give all the same command"
        return None
