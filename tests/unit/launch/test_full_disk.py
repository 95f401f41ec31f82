"""A disk that is full for a while: the running job, its worker, what the service says meanwhile, and the log."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from heterostep.launch.logs import LOGGER
from heterostep.launch.service import dispatcher
from heterostep.launch.service.database import Condition, Database
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings
from quick import STEPS, Quick, answers, finished, full_database, submit
from waiting import until


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while this event is set."""
    full = threading.Event()
    transaction, fill, complete = Database._transaction, Condition._fill, dispatcher.complete

    def no_space(act):
        def checked(*values):
            if full.is_set():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return act(*values)

        return checked

    monkeypatch.setattr(
        Database, "_transaction", lambda self: full_database(self) if full.is_set() else transaction(self)
    )
    monkeypatch.setattr(Condition, "_fill", no_space(fill))
    monkeypatch.setattr(dispatcher, "complete", no_space(complete))
    monkeypatch.setattr(dispatcher, "_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(dispatcher, "_RETRY_SECONDS", 0.05)
    return full


def test_a_full_disk_costs_neither_the_job_nor_its_worker(tmp_path, disk, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    service = VideoService(ServiceSettings(data_dir=tmp_path), Quick)
    (runner,) = service._dispatcher.runners
    runner.gate = threading.Semaphore(0)
    service.start()
    id, later = submit(service), submit(service)
    runner.gate.release()
    until(lambda: service.find(id, "").step == 1)
    disk.set()
    runner.gate.release(STEPS)
    until(lambda: service.trouble is not None)
    requests = [("GET", path, {}) for path in ("/health", "/ready", "/metrics", "/v1/videos", f"/v1/videos/{id}")]
    requests += [("POST", "/v1/videos", {"json": {"prompt": "x"}})] * 3
    health, ready, metrics, videos, video, *created = answers(service, *requests)
    assert health.status_code == ready.status_code == 503
    assert (
        health.json()["reason"]
        == ready.json()["reason"]
        == ("the job store cannot be used now (database or disk is full); jobs wait until it can be written")
    )
    assert metrics.status_code == videos.status_code == 200 and video.json()["status"] == "in_progress"
    assert all("disk is full" in answer.json()["error"]["message"] for answer in created)
    assert [answer.status_code for answer in created] == [503] * 3
    time.sleep(0.5)  # many times what it waits between two tries
    disk.clear()
    runner.gate.release(2 * STEPS)
    for job in (id, later):
        done = finished(service, job)
        assert done.status == "completed" and done.faults == []
    assert not runner.abandoned and service._store.get(id, "").attempt == 1
    until(lambda: answers(service, ("GET", "/ready", {}))[0].status_code == 200)
    service.stop()
    events = [record.getMessage() for record in caplog.records]
    # Twice where a write that had failed before was told of when another had succeeded already.
    assert 1 <= events.count("store unavailable") == events.count("store available again") <= 2
    assert not any(record.exc_info for record in caplog.records) and len(events) < 20


def test_a_service_that_stops_while_the_disk_is_full_ends(tmp_path, disk):
    service = VideoService(ServiceSettings(data_dir=tmp_path), Quick)
    service._dispatcher.runners[0].gate = gate = threading.Semaphore(0)
    service.start()
    id = submit(service)
    until(lambda: service.find(id, "").status == "in_progress")
    disk.set()
    gate.release(STEPS)
    time.sleep(0.2)
    begin = time.monotonic()
    service._dispatcher.stop(grace_seconds=0.5)
    assert time.monotonic() - begin < 8
    service.close()
    disk.clear()
    again = VideoService(ServiceSettings(data_dir=tmp_path), Quick)
    again.start()
    assert finished(again, id).status == "completed"
    again.stop()
