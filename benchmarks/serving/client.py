"""One request to a service with OpenAI's video API: sent, followed until it ends, and never an exception."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx2

from .settings import LoadSettings
from .workload import Body

ANSWER_SECONDS = 60.0
"""A service that takes longer for one answer is taken to have stalled."""
FORGET_SECONDS = 2.0
LOST = 3
"""Questions for a video's state that may fail one after the other."""
WAITING = ("queued", "pending")
RUNNING = ("in_progress", "processing", "running", "generating")


@dataclass(kw_only=True)
class Outcome:
    """What became of a request; seconds.

    Attributes:
        body: what was sent.
        started: since the start of the measurement.
        latency: until it ended; None if it was not sent.
        error: kind of the failure; empty where the video was made.
        message: what was said of it.
        queue: until work began, as the service says or else as was seen; None: not known.
        inference: what the service says that it worked; None: it does not.
        stages: seconds by stage, as the service says.
        peak_memory_mb: as the service says.
    """

    body: Body
    started: float = 0.0
    latency: float | None = None
    error: str = ""
    message: str = ""
    id: str = ""
    queue: float | None = None
    inference: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float | None = None

    def fail(self, error: str, message: str = "") -> None:
        """Say why there is no video."""
        self.error, self.message = error, " ".join(message.split())[:200]


class Client:
    """Sends requests to one service."""

    def __init__(self, settings: LoadSettings, http: httpx2.AsyncClient) -> None:
        """Use `http`, whose base is the service's address."""
        self._settings, self._http = settings, http
        self._begin = time.perf_counter()

    def start(self) -> None:
        """The measurement begins now."""
        self._begin = time.perf_counter()

    async def ask(self, outcome: Outcome) -> None:
        """Send a request and fill in what became of it; a cancelled task leaves it `interrupted`."""
        begun = time.perf_counter()
        outcome.started = begun - self._begin
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._follow(outcome, begun)
        except TimeoutError:
            outcome.fail("timeout", f"no video after {self._settings.timeout:g} s")
        except httpx2.TimeoutException as error:
            outcome.fail("stalled", f"{type(error).__name__}: no answer within {ANSWER_SECONDS:g} s")
        except httpx2.HTTPError as error:
            outcome.fail("connection", f"{type(error).__name__}: {error}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # an answer that is none of a video service
            outcome.fail("bad answer", f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            outcome.fail("interrupted", "the measurement was stopped")
            raise
        finally:
            outcome.latency = time.perf_counter() - begun
            if outcome.error in ("timeout", "interrupted", "stalled") and outcome.id:
                await self._forget(outcome.id)

    async def _follow(self, outcome: Outcome, begun: float) -> None:
        sent: dict[str, Any] = {"data" if self._settings.form else "json": dict(outcome.body)}
        answer = await self._http.post("/v1/videos", **sent)
        state = self._read(answer, outcome)
        if state is None:
            return
        outcome.id = str(state["id"])
        lost = 0
        while True:
            status = str(state["status"])
            if status not in WAITING and outcome.queue is None:
                outcome.queue = time.perf_counter() - begun
            if status not in (*WAITING, *RUNNING):
                break
            await asyncio.sleep(self._settings.poll_interval)
            try:
                answer = await self._http.get(_path(outcome.id))
            except httpx2.TransportError:
                lost += 1
                if lost == LOST:
                    raise
                continue
            if answer.status_code >= 500 and lost < LOST - 1:
                lost += 1
                continue
            found = self._read(answer, outcome)
            if found is None:
                return
            state, lost = found, 0
        if status != "completed":
            problem = state.get("error")
            said = problem.get("message") if isinstance(problem, dict) else problem
            outcome.fail("cancelled" if status == "cancelled" else "failed", str(said or status))
            return
        self._learn(outcome, state)
        if self._settings.download:
            await self._download(outcome)

    def _read(self, answer: httpx2.Response, outcome: Outcome) -> dict[str, Any] | None:
        """The state of the video, or None where the answer is an error, which the outcome then has."""
        if answer.status_code >= 400:
            outcome.fail(f"http {answer.status_code}", answer.text)
            return None
        state = answer.json()
        if not isinstance(state, dict) or not {"id", "status"} <= state.keys():
            raise ValueError(f"{answer.text:.100} has no id or status")
        return state

    @staticmethod
    def _learn(outcome: Outcome, state: dict[str, Any]) -> None:
        """Keep what the service says of a finished video."""
        outcome.queue = _numbers(state.get("timing")).get("queued", outcome.queue)
        outcome.stages = _numbers(state.get("stage_durations"))
        numbers = _numbers(state)
        outcome.inference, outcome.peak_memory_mb = numbers.get("inference_time_s"), numbers.get("peak_memory_mb")

    async def _download(self, outcome: Outcome) -> None:
        async with self._http.stream("GET", f"{_path(outcome.id)}/content") as answer:
            if answer.status_code >= 400:
                await answer.aread()
                outcome.fail(f"http {answer.status_code}", answer.text)
                return
            async for _ in answer.aiter_bytes():
                pass

    async def _forget(self, id: str) -> None:
        """Let the service drop a video that nobody waits for any more; it may not be able to."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._http.delete(_path(id)), FORGET_SECONDS)


def _path(id: str) -> str:
    return f"/v1/videos/{quote(id, safe='')}"


def _numbers(found: Any) -> dict[str, float]:
    """The numbers of an answer's object, by name; other values are left out."""
    pairs = found.items() if isinstance(found, dict) else ()
    return {
        str(name): float(value)
        for name, value in pairs
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
