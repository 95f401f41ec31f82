"""What the dispatcher does with a job whose runner is lost: again, where it was saved, or no more."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os

import pytest

pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")

from heterostep.engine.facts import read_facts
from heterostep.engine.media.files import checkpoint_name
from heterostep.engine.request import GenerateRequest, Started, StepDone, resolve
from heterostep.errors import ConfigError, Interrupted, RankLost, RequestError
from heterostep.launch.service import dispatcher, results
from heterostep.launch.service.dispatcher import Dispatcher
from heterostep.launch.service.metrics import Metrics
from heterostep.launch.service.settings import ServiceSettings
from heterostep.launch.service.store import JobStore
from heterostep.launch.workers import video
from heterostep.launch.workers.messages import FILES, Outcome
from waiting import until

REQUEST = resolve(GenerateRequest(prompt="x", num_inference_steps=20, compute=0.5), read_facts("demo"))


class Scripted:
    """A runner that is lost after the steps of a script, one an attempt, and saves every five."""

    ready, trouble, hopeless, heartbeat_age = True, None, False, 0.5

    def __init__(self, *script, cause="died"):
        self.script, self.cause, self.begun, self.tended = list(script), cause, [], 0

    def tend(self):
        self.tended += 1

    def run(self, task):
        saved = [int(path.stem[-6:]) for path in task.state.iterdir()]
        step = max(saved, default=0)
        self.begun.append(step)
        yield Started(request=REQUEST, num_tokens=10, resumed_at=step or None)
        end = self.script.pop(0) if self.script else 20
        while step < end:
            step += 1
            if step % 5 == 0:
                (task.state / f"{checkpoint_name(step)}.json").touch()
            yield StepDone(step=step, num_steps=20, sigma=0.5, active=5, total=10, seconds=0.01, eta_seconds=1.0)
        if step < 20:
            raise RankLost(self.cause, f"it died after step {step}") if self.cause != "stop" else Interrupted("", 0)
        for name, _ in FILES.values():
            (task.folder / name).touch()
        seconds = {"decode": 0.1, "write": 0.1, "checkpoint": 0.2, "total": 1.0}
        yield Outcome(hsa={"steps": []}, seconds=seconds, imbalances=(1.0, 1.04))

    def cancel(self):
        pass

    stop = close = cancel


@pytest.fixture
def ended(tmp_path):
    """Run one job to its end on a runner; returns the job and the metrics."""

    def run(runner):
        settings = ServiceSettings(data_dir=tmp_path)
        store, counted = JobStore(settings.database), Metrics()
        counted.watch(store, [runner])
        store.create(id="a", owner="", model="demo", request=REQUEST, max_queue=9)
        service = Dispatcher(settings, "demo", store, [runner], counted)
        service.start()
        until(lambda: store.get("a", "").status not in ("queued", "in_progress"))
        job = store.get("a", "")
        service.stop()
        text = counted.text().decode()
        assert not (settings.state / "a").exists()
        store.close()
        return job, text

    return run


def test_it_goes_on_where_it_was_saved(ended):
    runner = Scripted(7, 11, 16)
    job, metrics = ended(runner)
    assert job.status == "completed" and runner.begun == [0, 5, 10, 15]
    assert [(fault["cause"], fault["step"], fault["saved"]) for fault in job.faults] == [
        ("died", 7, 5), ("died", 11, 10), ("died", 16, 15),
    ]  # fmt: skip
    assert 'heterostep_recoveries_total{cause="died"} 3.0' in metrics
    assert 'heterostep_recovery_seconds_count{cause="died"} 3.0' in metrics
    assert "heterostep_rank_imbalance_count 2.0" in metrics
    assert 'heterostep_stage_seconds_sum{stage="checkpoint"} 0.2' in metrics
    assert 'heterostep_heartbeat_age_seconds{runner="0"} 0.5' in metrics


def test_two_losses_without_a_step_saved_between_them_are_enough(ended):
    runner = Scripted(7, 8, 20)
    job, metrics = ended(runner)
    assert job.status == "failed" and runner.begun == [0, 5]
    assert job.error["code"] == "runner_lost"
    assert job.error["message"] == (
        "given up after 2 attempts (two losses in a row without a new step saved); the last time, it died after step 8"
    )
    assert len(job.faults) == 2 and 'heterostep_recoveries_total{cause="died"} 1.0' in metrics


def test_losses_are_bounded_in_any_case(ended, monkeypatch):
    monkeypatch.setattr(video, "MAX_LOSSES", 3)
    job, _ = ended(Scripted(6, 11, 16, 20))
    assert job.status == "failed" and "given up after 3 attempts (3 losses)" in job.error["message"]


def test_a_job_removed_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch):
    settings = ServiceSettings(data_dir=tmp_path)
    store = JobStore(settings.database)
    store.create(id="a", owner="", model="demo", request=REQUEST, max_queue=9)

    def complete(folder, target, manifest):
        results.complete(folder, target, manifest)
        store.delete("a", "")
        assert target.is_dir()

    monkeypatch.setattr(dispatcher, "complete", complete)
    service = Dispatcher(settings, "demo", store, [Scripted(20)], Metrics())
    service.start()
    # Far below the time between two sweeps.
    until(lambda: not (store.known() or list(settings.results.iterdir())), 20)
    service.stop()
    assert list(settings.state.iterdir()) == []
    store.close()


class Encoding(Scripted):
    """Is lost while it encodes the video, which it has stored, a number of times."""

    def __init__(self, losses):
        super().__init__(11)
        self.losses = losses

    def run(self, task):
        if len(self.begun) == 0:
            yield from super().run(task)
        for path in task.state.iterdir():
            path.unlink()
        (task.state / "result.json").write_text(json.dumps({"step": 20}))
        self.begun.append(20)
        if len(self.begun) < 2 + self.losses:
            raise RankLost("died", "it died while encoding")
        for name, _ in FILES.values():
            (task.folder / name).touch()
        yield Outcome(hsa={"steps": []}, seconds={"decode": 0.1, "write": 0.1, "total": 1.0})


def test_a_loss_after_the_last_step_does_not_end_a_job(ended):
    job, _ = ended(Encoding(1))
    assert job.status == "completed" and [fault["saved"] for fault in job.faults] == [10, 20]


@pytest.fixture
def service(tmp_path):
    """A dispatcher of one job for a runner; both are closed at the end."""
    settings = ServiceSettings(data_dir=tmp_path)
    store = JobStore(settings.database)
    begun = []

    def start(runner):
        store.create(id="a", owner="", model="demo", request=REQUEST, max_queue=9)
        begun.append(Dispatcher(settings, "demo", store, [runner], Metrics()))
        begun[0].start()
        until(lambda: store.get("a", "").status not in ("queued", "in_progress"))
        until(lambda: not begun[0]._running)
        return settings, store

    yield start
    begun[0].stop()
    store.close()


def test_a_stored_video_outlasts_a_job_that_is_given_up(service, caplog):
    settings, store = service(Encoding(2))
    job, state = store.get("a", ""), settings.state / "a"
    assert job.status == "failed" and "two losses in a row" in job.error["message"]
    assert list(results.clean_up(settings, store)) == [] and (state / "result.json").exists()
    (record,) = [record for record in caplog.records if record.getMessage() == "stored video kept"]
    assert record.fields["folder"] == str(state)
    store.delete("a", "")
    results.clean_up(settings, store)
    assert not state.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_a_video_whose_result_cannot_be_completed_is_kept_elsewhere(service, tmp_path, monkeypatch, caplog, number):
    def complete(folder, target, manifest):
        (folder / "video.mp4").write_bytes(b"content")
        raise OSError(number, os.strerror(number))

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "kept"))
    monkeypatch.setattr(dispatcher, "complete", complete)
    runner = Scripted(20)
    _, store = service(runner)
    job = store.get("a", "")
    assert job.status == "failed" and job.faults == () and runner.begun == [0]
    assert f"is made, but its files could not be written ({os.strerror(number)})" in job.error["message"]
    (path,) = (tmp_path / "kept").iterdir()
    assert path.read_bytes() == b"content"
    (record,) = [record for record in caplog.records if record.getMessage() == "results cannot be written"]
    assert record.levelno == logging.ERROR and record.fields["video"] == str(path)


def test_a_disk_that_fails_after_the_result_is_visible_costs_nothing(service, monkeypatch):
    def complete(folder, target, manifest):
        results.complete(folder, target, manifest)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(dispatcher, "complete", complete)
    _, store = service(Scripted(20))
    job = store.get("a", "")
    assert job.status == "completed" and job.faults == ()


def test_a_file_system_that_cannot_flush_folders_will_do(service, monkeypatch):
    fsync = os.fsync

    def refuse_folders(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    _, store = service(Scripted(20))
    assert store.get("a", "").status == "completed"


def test_to_be_stopped_is_no_fault(ended):
    runner = Scripted(3, 4, 6, cause="stop")
    job, _ = ended(runner)
    assert job.status == "completed" and job.faults == () and runner.begun == [0, 0, 0, 5]


@pytest.mark.parametrize("error", [RequestError, ConfigError])
def test_what_cannot_work_is_not_tried_again(ended, error):
    class Refusing(Scripted):
        def run(self, task):
            yield from itertools.islice(super().run(task), 3)
            raise error("the VAE produced NaN")

    runner = Refusing()
    job, metrics = ended(runner)
    assert job.status == "failed" and job.error == {"code": "invalid_request", "message": "the VAE produced NaN"}
    assert not job.faults and runner.begun == [0] and "heterostep_recoveries_total{" not in metrics
