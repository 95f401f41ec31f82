"""Machines that work together without Ray: where they meet, and the connection between two of them.

One of them, the main machine, has the address that all were given. It starts the ranks, makes the decisions and keeps
the job; every other one connects to it and starts ranks when it is told to.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import ipaddress
import logging
import os
import pickle
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .messages import Kill, Order, StopRequest

PORT = 29500
"""Where the main machine listens, unless it is told otherwise."""
WAIT_SECONDS = 300.0
"""How long machines wait for each other before they give up."""
REACH_SECONDS = 5.0
"""How long a machine may take to answer when a connection is made."""
SILENT_SECONDS = 8.0
"""A machine that was silent for so long is lost; less than the time after which a rank is taken for frozen."""
_BEAT_SECONDS = 0.5
_NONCE_BYTES = _DIGEST_BYTES = 32
_END = object()


@dataclass(frozen=True)
class Hello:
    """The first thing that another machine says.

    Attributes:
        version: of heterostep.
        name: of the machine, for people.
        nproc: how many ranks it takes.
    """

    version: str
    name: str
    nproc: int


@dataclass(frozen=True)
class Start:
    """Start a process; `slot` counts those of the machine from 0, and no other process ever has its `number`."""

    number: int
    slot: int


@dataclass(frozen=True)
class Post:
    """A message for a process."""

    number: int
    message: Order | StopRequest | Kill


@dataclass(frozen=True)
class End:
    """Kill a process."""

    number: int


@dataclass(frozen=True)
class Said:
    """What a process sent."""

    number: int
    messages: list[Any]


@dataclass(frozen=True)
class Ended:
    """A process is gone; cause and words as in `RankLost`."""

    number: int
    cause: str
    text: str


@dataclass(frozen=True)
class Farewell:
    """The main machine needs the others no more.

    Attributes:
        how: "done", "stopped": the job is saved, "failed", or "refused": the other machine cannot take part.
        text: why, in one sentence; empty for "done".
    """

    how: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where machines meet.

    Attributes:
        address: of the main machine, in numbers.
        port: where it listens.
        ours: whether this machine is the main one.
    """

    address: str
    port: int
    ours: bool

    @classmethod
    def at(cls, given: str) -> Meeting:
        """Find the meeting that HOST or HOST:PORT names.

        Raises:
            ConfigError: there is no such host, or only this machine itself could reach it.
        """
        host, _, digits = given.partition(":")
        if not host or (digits and not digits.isdecimal()) or (digits and not 0 < int(digits) < 65536):
            raise ConfigError(f"--master {given}: give HOST or HOST:PORT, such as node0:{PORT}")
        port = int(digits or PORT)
        try:
            address = str(socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--master {given}: no host {host!r} is known here; give the name or the address of the main machine, "
                "the same on all machines"
            ) from error
        if ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"--master {given}: {host} is {address} on this machine, which other machines cannot reach; give its "
                "address in their network, as `ip address` shows it"
            )
        return cls(address=address, port=port, ours=_is_ours(address))


def _is_ours(address: str) -> bool:
    """Whether an address is one of this machine's: only those can be listened on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has an address; None where the system does not say."""
    if sys.platform != "linux":
        return None
    import fcntl

    wanted = socket.inet_aton(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                # SIOCGIFADDR; the answer has the address after 20 bytes.
                if fcntl.ioctl(asked, 0x8915, struct.pack("256s", name.encode()))[20:24] == wanted:
                    return name
    return None


def environment_at(address: str) -> dict[str, str]:
    """Environment variables that let gloo and NCCL use the network of an address, unless the user's name another."""
    name = interface_of(address)
    wanted = {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {variable: value for variable, value in wanted.items() if variable not in os.environ}


def key_of(path: Path | None) -> bytes:
    """The secret that all machines share; without a file, a word that keeps out mere accidents.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    if path is None:
        return b"heterostep"
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--cluster-key-file {path}: {error.strerror}") from error
    if not key:
        raise ConfigError(f"--cluster-key-file {path} is empty; write a secret into it, the same on all machines")
    return key


def prove(stream: socket.socket, key: bytes, own: bytes, other: bytes) -> bool:
    """Whether the other end of a connection has the same key; nothing that it sends is unpickled before that.

    Args:
        stream: new, with a time limit.
        key: the secret.
        own: what this end is, so that nobody can send an answer back.
        other: what the other one is.
    """
    question = secrets.token_bytes(_NONCE_BYTES)
    stream.sendall(question)
    stream.sendall(hmac.digest(key, own + _exactly(stream, _NONCE_BYTES), "sha256"))
    return hmac.compare_digest(_exactly(stream, _DIGEST_BYTES), hmac.digest(key, other + question, "sha256"))


def _exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the connection was closed")
        data += part
    return data


class _Listened(io.RawIOBase):
    """What a connection receives; each part of a message is a sign of life, so that a long one may take its time."""

    def __init__(self, stream: socket.socket, note: Callable[[], None]) -> None:
        self._stream, self._note = stream, note

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.recv_into(buffer)
        self._note()
        return count


class Line:
    """A connection to another machine: pickled messages in both directions, and a sign of life where there are none.

    Attributes:
        address: of this machine, as the other one sees it.
    """

    def __init__(self, stream: socket.socket, arrived: threading.Condition) -> None:
        """Take over a connection whose other end has proved itself.

        Args:
            stream: the connection.
            arrived: notified when something was received.
        """
        self.address = str(stream.getsockname()[0])
        stream.settimeout(None)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._arrived = stream, arrived
        self._received: list[Any] = []
        self._sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = False
        self._heard = time.monotonic()
        # Threads, as a machine that was cut off takes nothing and says nothing; they end with the connection.
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether there will be nothing more."""
        return (self._ended and not self._received) or self.silent

    @property
    def silent(self) -> bool:
        """Whether nothing came for too long, not even the news of its end."""
        return not self._ended and time.monotonic() - self._heard > SILENT_SECONDS

    @property
    def waiting(self) -> bool:
        """Whether there is something to receive, or to be noticed."""
        return bool(self._received) or self._ended

    def send(self, message: object) -> None:
        """Send a message; never waits, and does nothing if the line is lost."""
        self._sent.put(message)

    def receive(self) -> list[Any]:
        """The messages since the last call; never waits."""
        with self._arrived:
            received, self._received = self._received, []
        return received

    def close(self, seconds: float = 0.0) -> None:
        """Close the connection; what was sent has so many seconds to leave."""
        self._sent.put(_END)
        self._writer.join(seconds)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the threads

    def _write(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("wb") as stream:
            while True:
                try:
                    message = self._sent.get(timeout=_BEAT_SECONDS)
                except queue.Empty:
                    message = None
                if message is _END:
                    return
                pickle.dump(message, stream)
                stream.flush()

    def _note(self) -> None:
        self._heard = time.monotonic()

    def _read(self) -> None:
        try:
            with io.BufferedReader(_Listened(self._socket, self._note)) as stream:
                while True:
                    message = pickle.load(stream)
                    with self._arrived:
                        if message is not None:
                            self._received.append(message)
                            self._arrived.notify_all()
        except (OSError, EOFError):
            pass
        except Exception as error:  # half a message, or one of another version
            logging.getLogger("heterostep").debug("a message could not be read: %s", error)
        finally:
            with self._arrived:
                self._ended = True
                self._arrived.notify_all()
