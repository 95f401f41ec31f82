"""A worker group, here and on Ray: what it makes, and what becomes of it when ranks are killed, frozen or wrong."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import subprocess
import time

import psutil
import pytest
import torch

import forked
from heterostep.engine.config import EngineConfig
from heterostep.engine.engine import Engine
from heterostep.engine.facts import read_facts
from heterostep.engine.job import JobConfig
from heterostep.engine.media.files import checkpoint_steps
from heterostep.engine.request import GenerateRequest, Started, StepDone, resolve
from heterostep.errors import Cancelled, ConfigError, GroupClosed, RankFailure, RankLost, RequestError
from heterostep.hsa.config import HSAConfig
from heterostep.launch.cli import main
from heterostep.launch.workers.group import WorkerGroup
from heterostep.launch.workers.messages import GroupConfig, Work
from heterostep.launch.workers.process import ThisMachine
from heterostep.launch.workers.video import make_video
from said import errors
from waiting import until

ENGINE = EngineConfig(model="demo", device="cpu", dtype="float32", hsa=HSAConfig(compute=0.5, policy="tokens"))
REQUEST = GenerateRequest(prompt="a red disc moves right", seed=7, num_frames=5, num_inference_steps=16)
FACTS = read_facts("demo")
FROZEN = 6.0


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from heterostep.launch.workers.ray_cluster import connected

    with connected(None, 4, "cpu"):
        yield


@pytest.fixture(scope="module", params=["here", pytest.param("ray", marks=pytest.mark.slow)])
def where(request):
    """Where the ranks are."""
    if request.param == "ray":
        request.getfixturevalue("cluster")
        yield "ray"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forked.Popen)
        yield "here"


@pytest.fixture(scope="module")
def shared(where):
    if where == "ray":
        from heterostep.launch.workers.ray_cluster import RayCluster
    machines = RayCluster(gpus=False) if where == "ray" else ThisMachine()
    config = GroupConfig(size=2, threads=1, standby=True, frozen_after=FROZEN, patience=1.0)
    group = WorkerGroup(config, ENGINE, machines)
    yield group
    group.close()


@pytest.fixture
def group(shared):
    """Complete, whatever the test before it left."""
    with contextlib.suppress(RankLost):
        shared.watch()
    shared.recover()
    return shared


here_only = pytest.mark.parametrize("where", ["here"], indirect=True, scope="module")
"""For what the group decides alone, wherever its ranks are: new ranks on Ray take many seconds to start."""


class Run:
    """A video through a group: what was seen on the way."""

    def __init__(self, group, folder, request=REQUEST, at=None, do=None):
        """Call `do` once for each step of `at` when it is done."""
        self.losses, self.begun, self.steps, self.seconds = [], [], [], []
        due, stamp = list(at or ()), None
        work = Work(request=request)
        run = make_video(group, work, folder, self.losses.append)
        while True:
            try:
                event = next(run)
            except StopIteration as end:
                self.outcome = end.value
                return
            if isinstance(event, Started):
                self.begun.append(event.resumed_at or 0)
            if isinstance(event, StepDone):
                self.steps.append(event.step)
                if stamp is not None:
                    self.seconds.append(time.monotonic() - stamp)
                    stamp = None
                if due and event.step == due[0]:
                    due.pop(0)
                    stamp = time.monotonic()
                    do()

    @property
    def latents(self):
        return self.outcome.output.latents


@pytest.fixture(scope="module")
def unbroken(shared, tmp_path_factory):
    return Run(shared, tmp_path_factory.mktemp("unbroken"))


def killing(group, rank, number=signal.SIGKILL):
    return lambda: os.kill(group.pids[rank], number)


def test_it_makes_the_video_of_one_rank(unbroken, tmp_path):
    assert unbroken.steps == list(range(1, 17)) and unbroken.begun == [0] and unbroken.losses == []
    record = unbroken.outcome.record
    assert len(record["ranks"]) == 2 and record["parallel"]["cfg"] == 2
    assert len(unbroken.outcome.imbalances) > 5 and all(1.0 <= each < 1.1 for each in unbroken.outcome.imbalances)
    alone = Engine(ENGINE).generate(REQUEST, JobConfig(folder=tmp_path))
    torch.testing.assert_close(alone.latents, unbroken.latents, rtol=0, atol=1e-4)


def test_a_killed_rank_is_replaced(group, unbroken, tmp_path):
    before, rendezvous = group.pids, group.rendezvous
    run = Run(group, tmp_path, at=[7], do=killing(group, 0))
    assert [lost.cause for lost in run.losses] == ["died"]
    assert str(run.losses[0]) in ("rank 0 of 2 died", "rank 0 of 2 was killed by SIGKILL")
    assert run.begun == [0, 5] and run.steps[-11:] == list(range(6, 17))
    assert torch.equal(run.latents, unbroken.latents)
    # The other process was kept, with its model.
    assert len(set(group.pids) & set(before)) == 1 and group.rendezvous == rendezvous + 1
    assert run.outcome.output.report.evaluations.equal(unbroken.outcome.output.report.evaluations)


@here_only
def test_a_long_video_whose_windows_are_dealt_survives_a_killed_rank(group, tmp_path):
    asked = GenerateRequest(
        prompt="a red disc moves right", seed=7, num_frames=15, window=9, width=32, height=32, num_inference_steps=12
    )
    unbroken = Run(group, tmp_path / "unbroken", asked)
    assert unbroken.outcome.record["parallel"]["windows"] == 2 and unbroken.losses == []
    alone = Engine(ENGINE).generate(asked, JobConfig(folder=tmp_path / "alone"))
    torch.testing.assert_close(alone.latents, unbroken.latents, rtol=0, atol=1e-4)
    for rank, step in ((1, 7), (0, 9)):
        run = Run(group, tmp_path / str(rank), asked, at=[step], do=killing(group, rank))
        assert [lost.cause for lost in run.losses] == ["died"] and torch.equal(run.latents, unbroken.latents)
        group.recover()


def test_a_frozen_rank_is_named_and_replaced(group, unbroken, tmp_path):
    run = Run(group, tmp_path, at=[8], do=killing(group, 1, signal.SIGSTOP))
    assert [lost.cause for lost in run.losses] == ["frozen"] and "rank 1 of 2 was silent" in str(run.losses[0])
    assert torch.equal(run.latents, unbroken.latents)
    assert run.seconds[0] > FROZEN


@here_only
def test_without_a_folder_a_video_is_begun_again(group, tmp_path):
    whole = Run(group, None)
    run = Run(group, None, at=[7], do=killing(group, 1))
    assert len(run.losses) == 1 and run.begun == [0, 0] and torch.equal(run.latents, whole.latents)
    # No step was saved for it, and its plan is that of one rank without a job.
    torch.testing.assert_close(Engine(ENGINE).generate(REQUEST).latents, run.latents, rtol=0, atol=1e-4)


def test_what_is_wrong_for_all_ranks_alike_ends_the_request_only(group, unbroken, tmp_path):
    pids, rendezvous = group.pids, group.rendezvous
    few = GenerateRequest(prompt="x", num_frames=5, num_inference_steps=1)
    with pytest.raises(RequestError, match="cannot be met with 1 step:"):
        Run(group, None, few)
    # The folder of another job, which only rank 0 looks into.
    (tmp_path / "job").mkdir()
    Run(group, tmp_path / "job", GenerateRequest(prompt="x", num_frames=5, num_inference_steps=6))
    with pytest.raises(RequestError, match="holds another job"):
        Run(group, tmp_path / "job")
    # Without guidance there is one branch, which the ranks share otherwise.
    single = Run(group, None, GenerateRequest(prompt="x", num_frames=5, num_inference_steps=6, guidance_scale=1.0))
    assert single.outcome.record["parallel"]["ulysses"] == 2
    assert (group.pids, group.rendezvous) == (pids, rendezvous)


def test_cancel_and_stop_within_a_step(group, unbroken, tmp_path):
    long = GenerateRequest(prompt="x", num_frames=5, num_inference_steps=300, compute=1.0)
    for verb in ("cancel", "stop"):
        seen = []
        work = Work(request=long)
        with pytest.raises(Cancelled), contextlib.closing(make_video(group, work, tmp_path, pytest.fail)) as run:
            for event in run:
                if isinstance(event, StepDone):
                    seen.append(event.step)
                    if len(seen) == 3:
                        group.request_stop(verb)
        assert len(seen) <= 15
    # Saved where it stopped; steps may have been on their way to us.
    assert seen[-1] <= checkpoint_steps(tmp_path)[0] <= seen[-1] + 9
    assert not group.working
    group.request_stop("cancel")  # of nothing
    # One that nobody listens to any more is stopped, too, and the ranks are free again.
    run = make_video(group, Work(request=long), None, pytest.fail)
    next(run)
    run.close()
    assert torch.equal(Run(group, tmp_path / "next").latents, unbroken.latents)


@here_only
def test_a_request_that_kills_twice_is_given_up_and_the_group_goes_on(group, unbroken, tmp_path):
    with pytest.raises(
        RankFailure, match=r"given up after two losses in a row without a new step saved.*(died|SIGKILL)"
    ):
        Run(group, tmp_path / "bad", at=[2, 2], do=killing(group, 1))
    assert torch.equal(Run(group, tmp_path / "good").latents, unbroken.latents)


def test_a_folder_that_rank_0_cannot_reach(group, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(WorkerGroup, "near", False)
    run = Run(group, tmp_path, at=[12], do=killing(group, 0))
    assert run.begun == [0, 10] and torch.equal(run.latents, unbroken.latents)
    names = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert names == {"result", "result.json", "frames", "frames.json", "progress.jsonl"}
    again = Run(group, tmp_path)
    assert again.steps == [] and torch.equal(again.latents, unbroken.latents)


def test_a_place_that_the_cluster_has_no_more(where, group, unbroken, tmp_path, monkeypatch):
    if where == "here":
        pytest.skip("this machine always has a place")
    from heterostep.launch.workers.ray_cluster import RayCluster, RayWorker

    nowhere = group._machines._actor.options(resources={"nowhere": 1})
    monkeypatch.setattr(group._machines, "start", lambda seat: RayWorker(seat, nowhere.remote()))
    monkeypatch.setattr(RayCluster, "complete", False)
    monkeypatch.setattr(group, "_take_standby", lambda: None)
    run = Run(group, tmp_path, at=[7], do=killing(group, 0))
    assert group.size == 1 and run.begun == [0, 5]
    torch.testing.assert_close(run.latents, unbroken.latents, rtol=0, atol=1e-4)
    monkeypatch.undo()
    # The place is there again.
    for worker in group._coming.values():
        worker.kill()
    group._coming.clear()
    group._complete = False
    assert torch.equal(Run(group, tmp_path / "again").latents, unbroken.latents) and group.size == 2


def test_a_rank_that_dies_while_it_is_idle(group, unbroken):
    group.watch()
    os.kill(group.pids[1], signal.SIGKILL)
    with pytest.raises(RankLost, match="rank 1 of 2 was lost while it was idle"):
        while True:
            group.watch()
            time.sleep(0.05)
    assert not group.ready


@here_only  # tests/service/test_ray.py has the whole service on Ray.
def test_the_service_drives_a_group(shared, tmp_path):
    pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")
    from heterostep.launch.service.bodies import CreateVideo
    from heterostep.launch.service.requests import Asked
    from heterostep.launch.service.runner import Runner
    from heterostep.launch.service.service import VideoService
    from heterostep.launch.service.settings import ServiceSettings

    settings = ServiceSettings(data_dir=tmp_path, ranks=2, threads=1, engine=ENGINE, max_steps=400)
    service = VideoService(settings, functools.partial(Runner, frozen_after=FROZEN))
    (runner,) = service._dispatcher.runners
    service.start()

    def submit(**fields):
        body = CreateVideo(prompt="a red disc moves right", seed=7, num_frames=5, **fields)
        return service.submit(Asked(body, "", None), "", None)[0].id

    killed = submit(num_inference_steps=40, compute=1.0)
    # Past the API, which knows it too: no plan of one step costs half of it.
    impossible = GenerateRequest(prompt="x", num_frames=5, num_inference_steps=1, compute=0.5)
    service._store.create(id="refused", owner="", model=service.model, request=resolve(impossible, FACTS), max_queue=9)
    waiting, cancelled = submit(num_inference_steps=6), submit(num_inference_steps=400, compute=1.0)
    until(lambda: service.find(killed, "").step >= 7)
    os.kill(runner.pids[1], signal.SIGKILL)
    until(lambda: service.find(waiting, "").status == "completed")
    until(lambda: service.find(cancelled, "").step >= 2)
    assert runner._group.working
    service.cancel(cancelled, "")
    until(lambda: service.find(cancelled, "").status == "cancelled", 20)
    video = service.find(killed, "")
    (fault,) = video.faults
    assert video.status == "completed" and fault.cause == "died" and fault.step >= fault.saved >= 5
    assert fault.message.startswith("rank 1 of 2")
    assert len(video.hsa["steps"]) == 40 and video.timing["checkpoint"] > 0
    assert service.find("refused", "").error.code == "invalid_request"
    assert {path.name for path in (tmp_path / "results" / waiting).iterdir()} >= {"video.mp4", "report.json"}
    metrics = service.metrics.text().decode()
    assert 'heterostep_recoveries_total{cause="died"} 1.0' in metrics
    assert 'heterostep_recovery_seconds_count{cause="died"} 1.0' in metrics
    assert 'heterostep_rank_imbalance_bucket{le="1.1"}' in metrics and service.trouble is None
    # An orderly stop saves the step that runs.
    running = submit(num_inference_steps=400, compute=1.0)
    until(lambda: service.find(running, "").step >= 2)
    service.stop()
    assert checkpoint_steps(tmp_path / "state" / running)[0] >= 2
    with pytest.raises(GroupClosed):
        runner._group.recover()


def test_a_cluster_that_is_too_small(cluster):
    from heterostep.launch.workers.ray_cluster import RayCluster

    with pytest.raises(ConfigError, match="99 ranks need 99 CPUs, but the cluster has"):
        RayCluster(gpus=False).reserve(GroupConfig(size=99), lambda: None)


@here_only  # Ray's own threads would meet the limit.
def test_a_rank_without_memory_for_a_request_refuses_it_and_all_keep_their_models(group, unbroken, tmp_path):
    pids = group.pids
    used = psutil.Process(pids[1]).memory_info().vms
    resource.prlimit(pids[1], resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
    # Without guidance the ranks meet in every layer, so that the other one notices soon.
    size = dict(width=256, height=256, num_frames=33, num_inference_steps=2)
    large = GenerateRequest(prompt="x", **size, guidance_scale=1.0, compute=1.0)
    with pytest.raises(RequestError, match="memory is too small for this request"):
        Run(group, None, large)
    resource.prlimit(pids[1], resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert torch.equal(Run(group, tmp_path).latents, unbroken.latents) and group.pids == pids


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nproc", "2", "--ray-address", "127.0.0.1:1"), "no Ray cluster answers at '127.0.0.1:1'"),
        (("--ray-address", "ray://head:10001"), "name HOST:PORT"),
        (("--ray", "--nproc", "2", "--device", "cuda:1"), "Ray chooses the GPUs"),
        (("--ray", "--nproc", "3", "--ulysses", "3"), "one of 1, 2, 4"),
        (("--ray", "--nproc", "2", "--kernel", "flash"), "needs a CUDA device"),
        (("--ray", "--ulysses", "2"), "job of 1"),
    ],
)
def test_bad_input_is_one_sentence_before_ray_starts(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    assert main(["generate", "--prompt", "x", *flags]) == 2
    err = capsys.readouterr().err
    assert says in err and errors(err).count("\n") == 1


@pytest.mark.parametrize("fields", [{"size": 0}, {"size": True}, {"size": 2, "frozen_after": 0.0}])
def test_settings_are_checked(fields):
    with pytest.raises(ConfigError, match="of a worker group"):
        GroupConfig(**fields)
