"""A service without a model: its videos are made at once, by a runner that writes a line into each file."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

httpx2 = pytest.importorskip("httpx2", reason="the extra 'dev' is not installed")

from heterostep.engine.request import Started, StepDone
from heterostep.launch.service.app import create_app
from heterostep.launch.service.bodies import CreateVideo
from heterostep.launch.service.requests import Asked
from heterostep.launch.workers.messages import FILES, Outcome
from waiting import until

STEPS = 4
SECONDS = {"decode": 0.1, "write": 0.1, "checkpoint": 0.0, "total": 1.0}


class Quick:
    """A runner that makes files at once, or step by step where `gate` holds it back."""

    ready, trouble, hopeless, heartbeat_age = True, None, False, 0.0

    def __init__(self, settings, index):
        self.gate, self.abandoned = None, False

    def tend(self):
        pass

    def run(self, task):
        try:
            yield Started(request=task.request, num_tokens=10)
            for step in range(1, STEPS + 1):
                if self.gate is not None:
                    assert self.gate.acquire(timeout=20)
                yield StepDone(step=step, num_steps=STEPS, sigma=0.5, active=5, total=10, seconds=0.01, eta_seconds=1.0)
        except GeneratorExit:
            self.abandoned = True
            raise
        for name, _ in FILES.values():
            (task.folder / name).write_text(f"{name} of {task.id}")
        yield Outcome(hsa={"steps": []}, seconds=SECONDS)

    def cancel(self):
        pass

    stop = close = cancel


def submit(service, prompt="x"):
    asked = Asked(CreateVideo(prompt=prompt, num_inference_steps=STEPS, compute=0.5), "")
    return service.submit(asked, "", None)[0].id


def finished(service, id):
    until(lambda: service.find(id, "").status not in ("queued", "in_progress"))
    return service.find(id, "")


def listed(service):
    """All videos, as the API lists them, by id."""
    both = [service.list("", after=None, limit=100, newest_first=newest)[0] for newest in (True, False)]
    assert [video.id for video in both[0]] == [video.id for video in both[1]][::-1]
    return {video.id: video for video in both[0]}


def answers(service, *requests):
    """What the HTTP API answers, in order."""

    async def ask():
        transport = httpx2.ASGITransport(app=create_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [await client.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(ask())


def full_database(self):
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error
