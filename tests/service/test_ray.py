"""The same application as a Ray Serve deployment of groups: the same API, a killed replica and rank, an orderly end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

import httpx2
import psutil
import pytest

from serving import PROMPT, STEPS
from waiting import until

pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.slow


class Deployment:
    """`heterostep serve` on a Ray cluster of its own."""

    def __init__(self, folder, *flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "heterostep", "serve", "--data-dir", folder / "data", "--port", str(port), *flags],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
            cwd=folder,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0)

    def healthy(self):
        until(lambda: self.status("/health") == 200, 180)
        return self

    def status(self, path):
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(httpx2.TransportError):
            return self.http.get(path).status_code

    def create(self, **fields):
        return self.http.post("/v1/videos", json={"prompt": PROMPT, "num_inference_steps": STEPS, **fields}).json()[
            "id"
        ]

    def video(self, id):
        return self.http.get(f"/v1/videos/{id}").json()

    def replicas(self):
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if "ServeReplica" in " ".join(process.cmdline())]

    def ranks(self):
        """Processes of the ranks, the busiest last."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        found = [process for process in family if "WorkerActor" in " ".join(process.cmdline())]
        return sorted(found, key=lambda process: sum(process.cpu_times()[:2]))


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("ray"), "--gpus-per-replica", "2")
    family = []
    try:
        yield deployment.healthy()
        family = psutil.Process(deployment.process.pid).children(recursive=True)
        deployment.process.send_signal(signal.SIGTERM)
        assert deployment.process.wait(60) == 0, deployment.log.read_text()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
    finally:
        deployment.process.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_the_same_api(deployment):
    id = deployment.create(num_frames=5)
    with deployment.http.stream("GET", f"/v1/videos/{id}/events") as events:
        names = [line.split()[1] for line in events.iter_lines() if line.startswith("event:")]
    assert names[-1] == "completed" and "step" in names
    part = deployment.http.get(f"/v1/videos/{id}/content", headers={"range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == b"ftyp"
    assert deployment.http.post("/v1/videos", json={"prompt": ""}).status_code == 400
    assert "heterostep_requests_total" in deployment.http.get("/metrics").text
    assert "<title>heterostep</title>" in deployment.http.get("/").text
    assert deployment.http.get("/v1/videos", headers={"host": "evil.example"}).status_code == 403


def test_a_sync_client_that_goes_away(deployment):
    with contextlib.suppress(httpx2.TimeoutException):
        body = {"prompt": PROMPT, "num_inference_steps": 150, "compute": 1}
        deployment.http.post("/v1/videos/sync", json=body, timeout=1.5)
    id = deployment.http.get("/v1/videos").json()["data"][0]["id"]
    until(lambda: deployment.video(id)["status"] == "cancelled", 10)


def test_lost_ranks_are_replaced_and_the_video_has_the_bits_of_an_unbroken_one(deployment):
    whole, broken = (deployment.create(num_inference_steps=50, compute=1, num_frames=5, seed=7) for _ in range(2))
    for number, step in ((signal.SIGKILL, 8), (signal.SIGSTOP, 24)):
        until(lambda step=step: deployment.video(broken)["step"] >= step, 120)
        deployment.ranks()[-1].send_signal(number)
    for id in (whole, broken):
        until(lambda id=id: deployment.video(id)["status"] == "completed", 120)
    faults = deployment.video(broken)["faults"]
    assert [fault["cause"] for fault in faults] == ["died", "frozen"]
    assert all(fault["step"] >= fault["saved"] >= 5 for fault in faults)
    videos = [deployment.http.get(f"/v1/videos/{id}/content").content for id in (whole, broken)]
    assert videos[0] == videos[1] and deployment.video(whole)["faults"] == []


def test_a_killed_replica_loses_nothing(deployment):
    running = deployment.create(num_inference_steps=50, compute=1, num_frames=5)
    waiting = deployment.create(num_frames=5)
    until(lambda: deployment.video(running)["step"] >= 5, 60)
    (replica,) = deployment.replicas()
    replica.kill()
    # Ray holds back what is asked meanwhile, and starts another one.
    for id in (running, waiting):
        until(lambda id=id: deployment.video(id)["status"] == "completed", 120)
    assert [fault["cause"] for fault in deployment.video(running)["faults"]] == ["restart"]
    assert deployment.video(waiting)["faults"] == []
    assert [process.pid for process in deployment.replicas()] != [replica.pid]
