"""Several machines on one: network namespaces on a bridge, each with an address, a host name and a folder of its own.

A link has the speed that it is given (tbf, in both directions), and a delay where the kernel has netem. A machine can
be cut off, frozen, or lose all its processes at once. Needs Linux, root and iproute2; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PREFIX = "heterostep"
RAY_PORT = 6379
RAY_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
"""Of nodes of a Ray cluster, and of commands that use it."""
INTERFACE = "eth0"
_NETWORK = "10.77.0"
_KINDS = {"net": 0x40000000, "uts": 0x04000000}
# tbf cannot send faster than its burst in each tick of the kernel; less than a packet of 64 KiB blocks it.
_TICKS, _LEAST_BURST = 250, 256 * 1024


class Machine:
    """One of them.

    Attributes:
        name: of its namespace, and its host name.
        address: in the network of the machines.
        folder: its local storage.
    """

    def __init__(self, number: int, switch: str, folder: Path) -> None:
        """Use `running`."""
        self.name = f"{PREFIX}-{os.getpid()}-{number}"
        self.address, self.folder = f"{_NETWORK}.{number + 1}", folder
        self._switch, self._port = switch, f"port{number}"
        folder.mkdir(parents=True, exist_ok=True)

    def plug(self, rate: str | None, delay: str | None) -> None:
        """Connect it to the switch."""
        _ip("netns", "add", self.name)
        _ip("-n", self._switch, "link", "add", "name", self._port, "type", "veth", "peer", "name", "peer")
        _ip("-n", self._switch, "link", "set", "peer", "netns", self.name, "name", INTERFACE)
        _ip("-n", self._switch, "link", "set", self._port, "master", "switch", "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", INTERFACE)
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "link", "set", INTERFACE, "up")
        self.shape(rate, delay)

    def shape(self, rate: str | None, delay: str | None = None) -> None:
        """Give its link a speed such as "100mbit" and a delay such as "1ms"; None: as fast as the kernel copies.

        Raises:
            RuntimeError: the kernel has no tbf, or for a delay no netem.
        """
        for space, device in ((self.name, INTERFACE), (self._switch, self._port)):
            subprocess.run(["tc", "-n", space, "qdisc", "del", "dev", device, "root"], capture_output=True)
            if rate is not None:
                burst = str(max(_LEAST_BURST, bits_of(rate) // 8 // _TICKS))
                limits = ("rate", rate, "burst", burst, "latency", "50ms")
                _tc("-n", space, "qdisc", "add", "dev", device, "root", "handle", "1:", "tbf", *limits)
        if delay is not None:
            where = ("parent", "1:") if rate is not None else ("root",)
            _tc("-n", self.name, "qdisc", "add", "dev", INTERFACE, *where, "netem", "delay", delay)

    def command(self, *words: str) -> list[str]:
        """What runs a command on it."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *named, *words]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread be on the machine: sockets that it opens and processes that it starts are the machine's."""
        libc = ctypes.CDLL(None, use_errno=True)
        with contextlib.ExitStack() as files:
            before = {kind: files.enter_context(open(f"/proc/thread-self/ns/{kind}")) for kind in _KINDS}
            inside = files.enter_context(open(f"/run/netns/{self.name}"))
            _check(libc.unshare(_KINDS["uts"]))
            try:
                name = self.name.encode()
                _check(libc.sethostname(name, len(name)))
                _check(libc.setns(inside.fileno(), _KINDS["net"]))
                yield
            finally:
                for kind, file in before.items():
                    _check(libc.setns(file.fileno(), _KINDS[kind]))

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    @property
    def bytes_sent(self) -> int:
        """What left it so far, with all headers."""
        found = json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", INTERFACE))
        return int(found[0]["stats64"]["tx"]["bytes"])

    def kill(self) -> None:
        """End all its processes at once."""
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop all its processes."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def cut(self) -> None:
        """Pull its cable: nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def unplug(self) -> None:
        """End all its processes and remove it."""
        if Path("/run/netns", self.name).exists():
            self.kill()
            _ip("netns", "del", self.name)

    def _signal(self, number: int) -> None:
        for pid in self.pids:
            # This process may be inside, in one of its threads.
            with contextlib.suppress(ProcessLookupError):
                if pid != os.getpid():
                    os.kill(pid, number)


@contextlib.contextmanager
def running(count: int, folder: Path, rate: str | None = None, delay: str | None = None) -> Iterator[list[Machine]]:
    """Machines that are gone at the end, with all their processes.

    Args:
        count: how many.
        folder: where their own folders are made.
        rate: of each link, such as "1gbit"; None: as fast as the kernel copies.
        delay: of each link, such as "1ms".
    """
    _clear_away()
    switch = f"{PREFIX}-{os.getpid()}-switch"
    machines = [Machine(number, switch, folder / f"machine{number}") for number in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "name", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for machine in machines:
            machine.plug(rate, delay)
        yield machines
    finally:
        for machine in machines:
            machine.unplug()
        if Path("/run/netns", switch).exists():
            _ip("netns", "del", switch)


def start_ray(machine: Machine, head: Machine) -> Path:
    """Start a node, with one CPU, of the Ray cluster that has its head on a machine; returns the node's log."""
    joins = ["--address", f"{head.address}:{RAY_PORT}"]
    if machine is head:
        joins = ["--head", "--port", str(RAY_PORT), "--include-dashboard", "false"]
    # Paths of sockets are short.
    place = ["--temp-dir", f"/tmp/{machine.name}", "--node-ip-address", machine.address]
    size = ["--num-cpus", "1", "--object-store-memory", "100000000"]
    command = [Path(sys.executable).with_name("ray"), "start", *joins, *place, *size, "--block"]
    log = machine.folder / "ray.log"
    with machine.entered(), open(log, "a") as out:
        subprocess.Popen(command, env=os.environ | RAY_ENVIRONMENT, stdout=out, stderr=out)
    return log


def has_started(log: Path) -> bool:
    """Whether the node of Ray that writes this log has joined its cluster."""
    return "Ray runtime started" in log.read_text()


def why_not() -> str | None:
    """Why there can be no machines here; None where there can."""
    if sys.platform != "linux":
        return "machines are network namespaces, which are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; install iproute2 and util-linux"
    name = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        try:
            # In a namespace of the test's own: what the kernel has is the same in all.
            _ip("-n", name, "link", "add", "name", "switch", "type", "bridge")
            _ip("-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "other")
            _tc(
                "-n",
                name,
                "qdisc",
                "add",
                "dev",
                "one",
                "root",
                "tbf",
                *["rate", "1gbit", "burst", "500kb", "latency", "9ms"],
            )
        finally:
            _ip("netns", "del", name)
    except RuntimeError as error:
        return f"network namespaces are not permitted here, or lack something: {error}"
    return None


def bits_of(rate: str) -> int:
    """Bits in a second, of "100mbit" or "1gbit"."""
    units = {"gbit": 10**9, "mbit": 10**6}
    unit = next(unit for unit in units if rate.endswith(unit))
    return int(float(rate.removesuffix(unit)) * units[unit])


def _clear_away() -> None:
    """Remove what a process that was killed left behind."""
    for name in _ip("netns", "list").split():
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == PREFIX and pid.isdecimal() and not Path("/proc", pid).exists():
            for inside in _ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(inside), signal.SIGKILL)
            _ip("netns", "del", name)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _tc(*words: str) -> str:
    return _run("tc", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _check(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
