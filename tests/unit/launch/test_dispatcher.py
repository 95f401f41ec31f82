"""What the dispatcher does with a job whose runner is lost: again, where it was saved, or no more."""

from __future__ import annotations

import itertools

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
from heterostep.launch.workers.files import FILES
from heterostep.launch.workers.messages import Outcome
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
