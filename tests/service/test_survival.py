"""What must outlive a kill: of everything, of a worker, of a worker that only froze; and an orderly stop."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import time

import pytest

from serving import PROMPT, alive
from waiting import until

LONG = {"num_inference_steps": 50, "compute": 1, "num_frames": 5}


def completions(server):
    """How often each job was completed, over all lives of the service."""
    ids = [record["job"] for record in server.logged("job completed")]
    return {id: ids.count(id) for id in ids}


def test_kill_everything_with_five_queued_and_one_running(start):
    first = start().healthy()
    running = first.create(seed=7, **LONG)
    queued = [first.create(prompt=f"{PROMPT} {n}", num_frames=5, seed=n) for n in range(5)]
    first.running(running, 10)
    workers = first.workers()
    assert len(workers) == 1
    first.kill_everything()
    until(lambda: not any(map(alive, workers)), 5)

    second = start()
    # Everything is there before any model is.
    listed = second.http.get("/v1/videos", params={"order": "asc"}).json()["data"]
    assert [video["id"] for video in listed] == [running, *queued]
    assert {video["status"] for video in listed} == {"queued"} and listed[0]["queue_position"] == 0
    videos = [second.finished(id) for id in (running, *queued)]
    assert [video["status"] for video in videos] == ["completed"] * 6
    (fault,) = videos[0]["faults"]
    assert fault["cause"] == "restart" and fault["step"] >= 10 and fault["saved"] >= 5  # it went on there
    assert all(video["faults"] == [] for video in videos[1:])
    # None twice: each was completed once, in the order of the queue, and each has its own file.
    until(lambda: len(completions(second)) == 6, 10)  # the line comes after the row
    assert completions(second) == dict.fromkeys((running, *queued), 1)
    assert [record["job"] for record in second.logged("job completed")] == [running, *queued]
    begun = [record["job"] for record in second.logged("job begun")]
    assert sorted(begun) == sorted([running, running, *queued])
    assert {path.name for path in (second.data_dir / "results").iterdir()} == {running, *queued}
    assert len({second.http.get(f"/v1/videos/{id}/content").content for id in (running, *queued)}) == 6
    metrics = second.http.get("/metrics").text
    assert 'heterostep_requests_total{status="completed"} 6.0' in metrics
    assert 'heterostep_recoveries_total{cause="restart"} 1.0' in metrics


def test_a_kill_between_the_files_and_the_row_is_not_made_twice(start):
    server = start().healthy()
    id = server.create(num_frames=5)
    server.finished(id)
    server.kill_everything()
    # What the file holds when the process dies after the files are complete, but before the row says so.
    with sqlite3.connect(server.data_dir / "jobs.sqlite3") as db:
        db.execute(
            "UPDATE jobs SET status = 'in_progress', lease = 'gone', hsa = NULL, timing = NULL, completed_at = NULL"
        )
    db.close()
    made = (server.data_dir / "results" / id / "video.mp4").stat().st_mtime_ns
    again = start()
    video = again.video(id)
    assert video["status"] == "completed" and video["timing"]["total"] > 0 and video["faults"] == []
    assert (again.data_dir / "results" / id / "video.mp4").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("ranks", "number", "cause", "says"),
    [(2, signal.SIGKILL, "died", "rank 1 of 2 was killed by SIGKILL"), (1, signal.SIGSTOP, "frozen", "was silent for")],
)
def test_a_rank_is_replaced_and_the_video_has_the_bits_of_an_unbroken_one(start, ranks, number, cause, says):
    server = start("--ranks", ranks).healthy()
    whole, broken = (server.create(seed=7, **LONG) for _ in range(2))
    server.running(broken, 8)
    os.kill(server.workers()[-1], number)
    assert [server.finished(id)["status"] for id in (whole, broken)] == ["completed"] * 2
    (fault,) = server.video(broken)["faults"]
    assert fault["cause"] == cause and says in fault["message"] and fault["step"] >= fault["saved"] >= 5
    videos = [server.http.get(f"/v1/videos/{id}/content").content for id in (whole, broken)]
    assert videos[0] == videos[1] and server.video(whole)["faults"] == []


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_its_job_made(start):
    server = start(popen=subprocess.Popen).healthy()  # whose next worker takes its time
    id = server.create(**LONG)
    server.running(id, 8)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    until(lambda: server.http.get("/health").status_code == 503, 5)
    assert server.http.get("/ready").status_code == 200  # jobs are taken meanwhile
    video = server.finished(id)
    assert video["status"] == "completed"
    (fault,) = video["faults"]
    assert fault["cause"] == "died" and "SIGKILL" in fault["message"] and fault["step"] >= fault["saved"] >= 5
    assert server.workers() != [worker] and server.http.get("/health").status_code == 200


@pytest.mark.slow
def test_a_job_that_kills_its_worker_is_given_up(start):
    server = start().healthy()
    id = server.create(num_inference_steps=100, compute=1, num_frames=33)
    for _ in range(2):  # each time as soon as it begins, before anything new is saved
        until(lambda: server.video(id)["stage"] == "denoising", 120)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        until(lambda pid=worker: not alive(pid) and server.video(id)["status"] != "in_progress", 10)
    video = server.video(id)
    assert video["status"] == "failed" and len(video["faults"]) == 2
    assert video["error"]["code"] == "runner_lost" and "given up after 2 attempts" in video["error"]["message"]
    assert server.finished(server.create(), timeout=120)["status"] == "completed"  # the service goes on


def test_an_orderly_stop_keeps_the_jobs(start):
    server = start().healthy()
    id = server.create(**LONG)
    waiting = server.create(num_frames=5)
    server.running(id, 5)
    with server.http.stream("GET", f"/v1/videos/{id}/events") as events:
        lines = events.iter_lines()
        next(lines)
        begin = time.monotonic()
        server.process.terminate()
        list(lines)  # the stream ends by itself, in order
        assert time.monotonic() - begin < 8
    assert server.stop() == 0
    assert time.monotonic() - begin < 25
    assert server.workers() == [] and server.logged("job saved")[0]["job"] == id
    again = start()
    videos = [again.finished(job) for job in (id, waiting)]
    assert [video["status"] for video in videos] == ["completed"] * 2
    assert videos[0]["faults"] == []  # to be stopped is no fault


def test_a_model_that_cannot_be_loaded_ends_the_service(start, tmp_path):
    from folders import broken_copies, complete_pipeline

    complete_pipeline().save_pretrained(tmp_path / "tiny")
    broken = broken_copies(tmp_path / "tiny", tmp_path / "broken")["truncated weights"]
    server = start("--model", broken)
    assert server.process.wait(60) == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("heterostep: model") and "cannot be loaded" in last


def test_two_services_share_one_data_directory(start):
    first, second = start(), start()
    ids = [server.create(prompt=f"{PROMPT} {n}", num_frames=5) for n in range(3) for server in (first, second)]
    for id in ids:
        assert second.finished(id)["status"] == "completed"
    until(lambda: completions(first) == dict.fromkeys(ids, 1), 20)  # one log file for both; a line may come late
    texts = [server.http.get("/metrics").text for server in (first, second)]
    counts = [re.findall(r'requests_total{status="completed"} (\d)', text) for text in texts]
    assert sum(int(count) for found in counts for count in found) == 6
