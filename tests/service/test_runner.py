"""A runner of one rank by itself: what it says, and what becomes of it when its process dies, freezes or is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import av
import pytest

import forked
from heterostep.engine.config import EngineConfig
from heterostep.engine.facts import read_facts
from heterostep.engine.request import Decoding, GenerateRequest, Started, StepDone, resolve
from heterostep.errors import Cancelled, Interrupted, RankLost, RequestError
from heterostep.launch.service.runner import Runner, Task
from heterostep.launch.service.settings import ServiceSettings
from heterostep.launch.workers.messages import FILES, Outcome
from serving import alive
from waiting import until

FROZEN = 5.0


@pytest.fixture(autouse=True, scope="module")
def quick_starts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forked.Popen)
        yield


@pytest.fixture(scope="module")
def runner(tmp_path_factory, quick_starts):
    runner = Runner(ServiceSettings(data_dir=tmp_path_factory.mktemp("runner")), frozen_after=FROZEN)
    yield runner
    (pid,) = runner.pids
    runner.close()
    assert not alive(pid)


@pytest.fixture
def task(tmp_path, runner):
    until_ready(runner)

    def make(**fields):
        request = resolve(GenerateRequest(prompt="a red disc moves right", num_frames=5, **fields), read_facts("demo"))
        (tmp_path / "files").mkdir(exist_ok=True)
        return Task(id="video_1", request=request, folder=tmp_path / "files", state=tmp_path / "state")

    return make


def until_ready(runner):
    def ready():
        runner.tend()
        return runner.ready

    until(ready, 90)


def test_from_a_task_to_files(runner, task):
    asked = task(num_inference_steps=6)
    events = list(runner.run(asked))
    assert events[0] == Started(request=asked.request, num_tokens=3 * 8 * 8)
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6] and all(0 <= event.share <= 1 for event in steps)
    assert isinstance(events[-2], Decoding) and isinstance(events[-1], Outcome)
    folder = task().folder
    assert {path.name for path in folder.iterdir()} == {name for name, _ in FILES.values()}
    with av.open(str(folder / "video.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    with av.open(str(folder / "heatmap.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.width >= 320  # enlarged, so that tokens can be told apart
    assert runner.heartbeat_age < 5


def test_a_request_that_the_engine_refuses_leaves_it_usable(runner, task):
    pids = runner.pids
    with pytest.raises(RequestError, match=r"compute=0\.5 cannot be met with 1 step:"):
        list(runner.run(task(num_inference_steps=1)))
    assert isinstance(list(runner.run(task(num_inference_steps=6)))[-1], Outcome) and runner.pids == pids


def test_cancel_and_stop_within_a_step(runner, task):
    for ask, error in ((runner.cancel, Cancelled), (runner.stop, Interrupted)):
        seen = []
        with pytest.raises(error):
            for event in runner.run(task(num_inference_steps=500, compute=1.0)):
                seen.append(event)
                if isinstance(event, StepDone) and len(seen) == 7:
                    ask()
        # The step that ran when the stop request came is the last one; some may have been on their way to us.
        assert 7 <= len(seen) <= 20
    # What was stopped was saved: the next attempt goes on there.
    stopped = seen[-1].step
    with pytest.raises(Cancelled):
        for event in runner.run(task(num_inference_steps=500, compute=1.0)):
            if isinstance(event, Started):
                assert stopped <= event.resumed_at <= stopped + 1
                runner.cancel()
    # A stop request without a task does nothing.
    runner.cancel()
    assert isinstance(list(runner.run(task(num_inference_steps=6)))[-1], Outcome)


def test_a_wish_that_comes_before_the_first_step(runner, task):
    with pytest.raises(Cancelled):
        for event in runner.run(task(num_inference_steps=500, compute=1.0)):
            assert isinstance(event, Started) or event.step <= 10
            if isinstance(event, Started):
                runner.cancel()


def test_pictures_on_the_way(runner, task):
    list(runner.run(task(num_inference_steps=6)))  # to learn from
    pictures = [e.preview for e in runner.run(task(num_inference_steps=20)) if isinstance(e, StepDone) and e.preview]
    assert len(pictures) >= 5 and all(picture[:4] == b"RIFF" for picture in pictures)


def test_killed_and_gone_on_with(runner, task):
    with pytest.raises(RankLost, match="killed by SIGKILL") as caught:
        for event in runner.run(task(num_inference_steps=30, compute=1.0)):
            if isinstance(event, StepDone) and event.step >= 7:
                os.kill(runner.pids[0], signal.SIGKILL)
    assert caught.value.cause == "died" and not runner.ready and runner.pids == []
    until_ready(runner)
    events = list(runner.run(task(num_inference_steps=30, compute=1.0)))
    assert events[0].resumed_at in (5, 10) and events[1].step == events[0].resumed_at + 1
    assert isinstance(events[-1], Outcome) and len(events[-1].hsa["steps"]) == 30
    # The same folder, another job: as after an update, it is made anew.
    events = list(runner.run(task(num_inference_steps=6)))
    assert events[0].resumed_at is None and isinstance(events[-1], Outcome)


def test_killed_while_idle(runner):
    until_ready(runner)
    (old,) = runner.pids
    os.kill(old, signal.SIGKILL)
    until(lambda: not runner.ready, 5)
    until_ready(runner)
    assert runner.pids != [old]


def test_frozen(runner, task):
    begin = None
    with pytest.raises(RankLost, match="silent") as caught:
        for event in runner.run(task(num_inference_steps=500, compute=1.0)):
            if isinstance(event, StepDone) and begin is None:
                begin, frozen = time.monotonic(), runner.pids[0]
                os.kill(frozen, signal.SIGSTOP)
    assert caught.value.cause == "frozen" and FROZEN - 1 < time.monotonic() - begin < FROZEN + 8
    assert not alive(frozen)


def test_a_task_that_nobody_follows_any_more_is_ended(runner, task):
    pids = runner.pids
    events = runner.run(task(num_inference_steps=500, compute=1.0))
    next(events)
    events.close()
    assert isinstance(list(runner.run(task(num_inference_steps=6)))[-1], Outcome) and runner.pids == pids


def test_a_worker_outlives_its_service_by_no_moment(tmp_path):
    code = (
        "import time; from heterostep.launch.service.runner import Runner\n"
        "from heterostep.launch.service.settings import ServiceSettings\n"
        f"runner = Runner(ServiceSettings(data_dir={str(tmp_path)!r}))\n"
        "runner.tend(); print(runner.pids[0], flush=True); time.sleep(600)"
    )
    service = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(service.stdout.readline())
    assert alive(worker)
    service.kill()
    service.wait()
    until(lambda: not alive(worker), 5)


def test_an_unusable_model_says_why(tmp_path):
    runner = Runner(ServiceSettings(data_dir=tmp_path, engine=EngineConfig(model=str(tmp_path / "none"))))
    try:

        def given_up():
            runner.tend()
            return runner.hopeless

        until(given_up, 60)
        assert "neither 'demo'" in runner.trouble and not runner.ready
    finally:
        runner.close()
