"""Ranks on this machine: `heterostep generate --nproc P` starts them, watches them and, for jobs, starts them again."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, Std, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_ELSEWHERE = 1, 130, 75, 73
FINAL = frozenset({2, EXIT_ELSEWHERE, EXIT_STOPPED, EXIT_INTERRUPTED})
"""Exit codes that starting again would not change: bad input, written elsewhere, saved and stopped, Ctrl-C."""
STOP_SECONDS = 30
_TAIL = 12


def run_ranks(arguments: Sequence[str], nproc: int, *, restarts: int = 0, log_dir: Path | None = None) -> int:
    """Run `heterostep.launch.torchrun` with `arguments` on `nproc` ranks of this machine.

    Rank 0 writes to this terminal; what the others print goes to a file each. SIGTERM, SIGUSR1 and Ctrl-C are
    passed on.

    Args:
        arguments: flags of `generate`.
        nproc: number of ranks.
        restarts: how often all ranks are started again after one has failed.
        log_dir: where the others' output is kept; a temporary folder without it.

    Returns:
        0, or the exit code of the rank that failed first.
    """
    # Of a rank that fails it would print more than the rank itself says.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="heterostep-") as temporary:
        # Hosted here, it outlives every attempt, and its port is free for sure.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        for attempt in range(restarts + 1):
            logs = Path(log_dir or temporary) / f"attempt-{attempt}"
            code, failure = _attempt(arguments, nproc, attempt, store.port, logs)
            if code == 0 or code in FINAL:
                return code
            _explain(failure, logs, again=attempt < restarts)
        return EXIT_FAILED


def _attempt(
    arguments: Sequence[str], nproc: int, attempt: int, port: int, logs: Path
) -> tuple[int, tuple[int, ProcessFailure] | None]:
    """Run all ranks once: the exit code, and (rank, failure) of the rank that failed first."""
    logs.mkdir(parents=True, exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    envs = {
        rank: {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "OMP_NUM_THREADS": threads,
        }
        for rank in range(nproc)
    }
    command = ("-m", "heterostep.launch.torchrun", *arguments)
    ranks = start_processes(
        name="rank",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(nproc), command),
        envs=envs,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, nproc), Std.ALL)),
    )
    with _signals_passed_on(ranks):
        try:
            result = ranks.wait()
        finally:
            ranks.close(signal.SIGTERM, STOP_SECONDS)
    if result is None or not result.is_failed():
        return 0, None
    rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
    return failure.exitcode, (rank, failure)


class _signals_passed_on:  # noqa: N801 (used like a function)
    """While the ranks run, this process's signals are theirs."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, ranks: PContext) -> None:
        self._ranks = ranks

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._pass_on) for number in self.SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for pid in self._ranks.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def _explain(failure: tuple[int, ProcessFailure] | None, logs: Path, *, again: bool) -> None:
    """Say which rank failed, and show the end of what it printed where that went to a file."""
    if failure is None:
        return
    rank, cause = failure
    how = f"signal {-cause.exitcode}" if cause.exitcode < 0 else f"exit code {cause.exitcode}"
    print(f"heterostep: rank {rank} ended with {how}" + ("; starting again" if again else ""), file=sys.stderr)
    for file in logs.rglob(f"{rank}/stderr.log"):
        for line in file.read_text(errors="replace").splitlines()[-_TAIL:]:
            print(f"  rank {rank}: {line}", file=sys.stderr)
