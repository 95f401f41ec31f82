"""A measurement from its first to its last request, whatever the service does and whenever it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from ...errors import ConfigError
from .client import ANSWER_SECONDS, Client, Outcome
from .settings import LoadSettings
from .workload import arrivals, bodies, warmups

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Measured:
    """What happened.

    Attributes:
        warmup: outcomes of the requests before.
        outcomes: of those that were sent.
        seconds: from the first request to the last end.
        unsent: requests that a stop kept from being sent.
        interrupted: whether it was stopped.
        server: what the service says of its models; None: nothing.
    """

    warmup: list[Outcome] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    unsent: int = 0
    interrupted: bool = False
    server: Any = None


def measure(settings: LoadSettings, say: Say, transport: httpx2.AsyncBaseTransport | None = None) -> Measured:
    """Send all requests; SIGINT or SIGTERM end the measurement early.

    Args:
        settings: which service, which requests.
        say: shows a line of progress.
        transport: in place of the network, for tests.

    Raises:
        ConfigError: a file of the settings cannot be used.
    """
    return asyncio.run(_measure(settings, say, transport))


async def _measure(settings: LoadSettings, say: Say, transport: httpx2.AsyncBaseTransport | None) -> Measured:
    made, times, headers = bodies(settings), arrivals(settings), _headers(settings)
    measured = Measured()
    limits = httpx2.Limits(max_connections=None)
    patience = httpx2.Timeout(min(ANSWER_SECONDS, settings.timeout), pool=None)
    async with httpx2.AsyncClient(
        base_url=settings.url, headers=headers, timeout=patience, limits=limits, transport=transport
    ) as http:
        client = Client(settings, http)
        work = asyncio.ensure_future(_all(settings, client, http, measured, made, times, say))
        with _stoppable(work):
            try:
                await work
            except asyncio.CancelledError:
                measured.interrupted = True
    measured.unsent = len(made) - len(measured.outcomes)
    return measured


async def _all(
    settings: LoadSettings,
    client: Client,
    http: httpx2.AsyncClient,
    measured: Measured,
    made: list[dict[str, Any]],
    times: list[float],
    say: Say,
) -> None:
    measured.server = await _server(http)
    for body in warmups(settings, made[0]):
        outcome = Outcome(body=body)
        measured.warmup.append(outcome)
        await client.ask(outcome)
        say(f"warm-up: {outcome.error or 'done'} in {outcome.latency or 0.0:.1f} s {outcome.message}".rstrip())
    gate = asyncio.Semaphore(settings.at_a_time)
    client.start()
    begun = time.perf_counter()

    async def one(body: dict[str, Any], at: float) -> None:
        await asyncio.sleep(max(begun + at - time.perf_counter(), 0.0))
        async with gate:
            outcome = Outcome(body=body)
            measured.outcomes.append(outcome)
            try:
                await client.ask(outcome)
            finally:
                measured.seconds = time.perf_counter() - begun
                ended = [other for other in measured.outcomes if other.latency is not None]
                failed = sum(bool(other.error) for other in ended)
                say(f"{len(ended)} of {len(made)} requests ended, {failed} failed")

    async with asyncio.TaskGroup() as group:
        for body, at in zip(made, times, strict=True):
            group.create_task(one(body, at))


async def _server(http: httpx2.AsyncClient) -> Any:
    """What the service says of its models, if it says anything."""
    try:
        answer = await asyncio.wait_for(http.get("/v1/models"), 10.0)
        return answer.json() if answer.status_code == 200 else None
    except (TimeoutError, httpx2.HTTPError, ValueError):
        return None


def _headers(settings: LoadSettings) -> dict[str, str]:
    if settings.api_key_file is None:
        return {}
    try:
        key = Path(settings.api_key_file).read_text(encoding="utf-8").strip().splitlines()[0]
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"api_key_file {settings.api_key_file!r} has no key to read: {error}") from error
    return {"Authorization": f"Bearer {key}"}


@contextlib.contextmanager
def _stoppable(work: asyncio.Future[None]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end the work; a second one ends the program as usual."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        restore()
        work.cancel()

    def restore() -> None:
        for number in signals:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(number)

    for number in signals:
        # Only the main thread of a Unix program can do this; elsewhere Ctrl-C ends it as usual.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        restore()
