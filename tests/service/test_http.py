"""What the API has beyond OpenAI's: events, cancelling, waiting, parts of files, health, metrics, and who may call."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx2
import pytest
from PIL import Image

from serving import KEYS, PROMPT, STEPS
from waiting import until

ENDLESS = {"num_inference_steps": 2000, "compute": 1}


@pytest.fixture
def made(server):
    """A completed video."""
    video = server.finished(server.create(seed=3))
    assert video["status"] == "completed"
    yield video
    server.http.delete(f"/v1/videos/{video['id']}")


def events_of(server, id):
    """(name, data, seconds since the first) of each event of a video, to its end."""
    start, name = time.monotonic(), None
    with server.http.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: ")), time.monotonic() - start


@pytest.fixture(autouse=True, scope="module")
def dripping(server):
    """Seconds that a client is borne whose headers come in drops, while the other tests run."""

    def drip():
        with connect(server) as slow:
            slow.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: x\r\n")
            start = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - start < 30:
                    slow.sendall(b"X-Drop: 1\r\n")
                    time.sleep(1)
            return time.monotonic() - start

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(drip)


def test_what_benchmark_clients_read(server, made):
    assert made["inference_time_s"] == made["timing"]["total"] > 0 and made["peak_memory_mb"] > 50
    stages = made["stage_durations"]
    assert stages.keys() >= {"encode_text", "denoise", "decode"} and not stages.keys() & {"queued", "total"}
    assert sum(stages.values()) == pytest.approx(made["inference_time_s"])
    assert server.http.get(made["url"]).headers["content-type"] == "video/mp4"


@pytest.mark.parametrize("kind", [None, "video_bytes", "video_path"])
def test_mlperfs_clients_get_the_file_or_its_path(server, made, kind):
    body = {"prompt": PROMPT, "seed": 3, "num_inference_steps": STEPS, "seconds": 2.0, "fps": 8}
    answer = server.http.post("/v1/videos/generations", json=body | {"output_format": "auto", "response_format": kind})
    assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers, answer.text
    found = answer.json()
    if kind == "video_path":
        content = server.http.get(found["video_path"]).content
    else:
        content = base64.b64decode(found["video_bytes"])
    assert content == server.http.get(f"/v1/videos/{made['id']}/content").content
    server.http.delete(f"/v1/videos/{found['video_id']}")


def test_events_tell_steps_time_left_and_pictures(server, made):
    id = server.create(num_inference_steps=40)
    told = list(events_of(server, id))
    names = [name for name, _, _ in told]
    assert names[0] in ("queued", "starting", "step") and names[-2:] == ["decoding", "completed"]
    steps = [data for name, data, _ in told if name == "step"]
    assert len(steps) >= 5 and steps[-1]["step"] >= 35  # the last ones may be told with the decoding
    assert [data["step"] for data in steps] == sorted(data["step"] for data in steps)
    assert [data["progress"] for _, data, _ in told] == sorted(data["progress"] for _, data, _ in told)
    # At half of the way the estimate is not off by more than the half that is left.
    (at, eta) = next((at, data["eta_seconds"]) for name, data, at in told if name == "step" and data["step"] >= 20)
    left = told[-1][2] - at
    assert left / 5 < eta < 5 * left
    # `made` was a video to learn from: pictures are cheap then, and come with most steps.
    pictures = [data["preview"] for data in steps if "preview" in data]
    assert len(pictures) >= 3
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[-1].removeprefix("data:image/webp;base64,"))))
    assert picture.format == "WEBP" and picture.size == (64, 64)
    assert told[-1][1]["timing"]["total"] > 0
    server.http.delete(f"/v1/videos/{id}")


def test_events_of_a_finished_video_end_at_once(server, made):
    ((name, data, _),) = events_of(server, made["id"])
    assert name == "completed" and data["id"] == made["id"]


def test_cancel_stops_within_a_step(server):
    id = server.create(**ENDLESS)
    server.running(id, 3)
    answer = server.http.post(f"/v1/videos/{id}/cancel").json()
    assert answer["status"] == "in_progress" and answer["cancel_requested"]
    at = answer["step"]
    video = server.finished(id, timeout=5)
    assert video["status"] == "cancelled" and video["error"]["code"] == "cancelled"
    # The request takes up to a fifth of a second to be seen, in which a small model does a few steps.
    stopped = int(re.search(r"after step (\d+)", video["error"]["message"]).group(1))
    assert at <= stopped <= at + 40
    assert server.http.get(f"/v1/videos/{id}/content").status_code == 400
    # The runner is free again, and still the same process.
    workers = server.workers()
    again = server.create()
    assert server.finished(again)["status"] == "completed" and server.workers() == workers
    for video in (id, again):
        server.http.delete(f"/v1/videos/{video}")


def test_cancel_a_queued_and_a_finished_video(server, made):
    blocker, queued = server.create(**ENDLESS), server.create()
    assert server.video(queued)["queue_position"] in (0, 1)
    assert server.http.post(f"/v1/videos/{queued}/cancel").json()["status"] == "cancelled"
    assert server.http.post(f"/v1/videos/{made['id']}/cancel").json()["status"] == "completed"
    for id in (blocker, queued):
        server.http.delete(f"/v1/videos/{id}")


def test_delete_a_running_video(server):
    id = server.create(**ENDLESS)
    server.running(id)
    assert server.http.delete(f"/v1/videos/{id}").json()["deleted"]
    assert server.http.get(f"/v1/videos/{id}").status_code == 404
    again = server.create()
    assert server.finished(again)["status"] == "completed"  # the runner was freed
    server.http.delete(f"/v1/videos/{again}")


def test_sync_answers_with_the_file(server):
    body = {"prompt": PROMPT, "num_inference_steps": STEPS, "num_frames": 5}
    answer = server.http.post("/v1/videos/sync", json=body)
    assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
    assert answer.content[4:8] == b"ftyp" and float(answer.headers["x-inference-time-s"]) > 0
    id = answer.headers["x-video-id"]
    assert server.http.get(f"/v1/videos/{id}/content").content == answer.content
    server.http.delete(f"/v1/videos/{id}")


def test_a_sync_client_that_goes_away_cancels_its_video(server):
    before = {video["id"] for video in server.http.get("/v1/videos").json()["data"]}
    with contextlib.suppress(httpx2.TimeoutException):
        server.http.post("/v1/videos/sync", json={"prompt": PROMPT, **ENDLESS}, timeout=1.5)
    (id,) = {video["id"] for video in server.http.get("/v1/videos").json()["data"]} - before
    assert server.finished(id, timeout=5)["status"] == "cancelled"
    server.http.delete(f"/v1/videos/{id}")


def test_parts_of_a_file(server, made):
    path = f"/v1/videos/{made['id']}/content"
    whole = server.http.get(path)
    assert whole.status_code == 200 and whole.headers["accept-ranges"] == "bytes"
    part = server.http.get(path, headers={"range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == b"ftyp"
    assert part.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
    tail = server.http.get(path, headers={"range": "bytes=-100"})
    assert tail.status_code == 206 and tail.content == whole.content[-100:]
    assert server.http.get(path, headers={"range": f"bytes={len(whole.content)}-"}).status_code == 416
    for wanted in (None, "bytes=4-7", "bytes=-100", "bytes=0-1,4-7", f"bytes={len(whole.content)}-"):
        headers = {"range": wanted} if wanted else {}
        get, head = server.http.get(path, headers=headers), server.http.head(path, headers=headers)
        assert head.status_code == get.status_code and head.content == b"", wanted
        for name in ("content-length", "content-range", "accept-ranges", "etag", "content-disposition"):
            assert head.headers.get(name) == get.headers.get(name), (wanted, name)
    report = server.http.get(path, params={"variant": "report"}).json()
    assert report["compute"] == made["hsa"]["achieved"] and report["request"]["seed"] == 3
    heatmap = server.http.get(path, params={"variant": "heatmap"})
    assert heatmap.headers["content-type"] == "video/mp4" and heatmap.content != whole.content
    assert server.http.get(path, params={"variant": "../../jobs.sqlite3"}).status_code == 400


def test_an_idempotency_key_makes_one_video(server):
    body, headers = {"prompt": PROMPT, "num_inference_steps": STEPS}, {"idempotency-key": "order-17"}
    first, second = (server.http.post("/v1/videos", json=body, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"] and first["seed"] == second["seed"]
    other = server.http.post("/v1/videos", json={**body, "seed": 1}, headers=headers)
    assert other.status_code == 400 and "Idempotency-Key" in other.json()["error"]["message"]
    bob = {"authorization": f"Bearer {KEYS['bob']}"}
    his = server.http.post("/v1/videos", json=body, headers={**headers, **bob}).json()
    assert his["id"] != first["id"]
    server.http.delete(f"/v1/videos/{first['id']}")
    server.http.delete(f"/v1/videos/{his['id']}", headers=bob)
    fresh = server.http.post("/v1/videos", json=body, headers=headers).json()
    assert fresh["id"] != first["id"]
    server.http.delete(f"/v1/videos/{fresh['id']}")


def test_health_and_readiness_need_no_key(server):
    for path in ("/health", "/ready"):
        answer = httpx2.get(server.url + path)
        assert answer.status_code == 200 and answer.json() == {"status": "healthy", "reason": None}


def test_metrics(server, made):
    text = httpx2.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['heterostep_requests_total{status="completed"}']) >= 1
    assert float(values["heterostep_queue_depth"]) == 0 and float(values["heterostep_running"]) == 0
    assert float(values['heterostep_runner_ready{runner="0"}']) == 1
    assert float(values['heterostep_heartbeat_age_seconds{runner="0"}']) < 5
    for stage in ("encode_text", "denoise", "decode", "write", "total"):
        assert float(values[f'heterostep_stage_seconds_count{{stage="{stage}"}}']) >= 1
    assert float(values["heterostep_step_seconds_count"]) >= STEPS
    share = float(values["heterostep_active_fraction_sum"]) / float(values["heterostep_active_fraction_count"])
    assert 0 < share <= 1
    assert float(values['heterostep_step_seconds_bucket{le="+Inf"}']) == float(values["heterostep_step_seconds_count"])
    assert float(values['heterostep_http_requests_total{code="200",method="POST",route="/v1/videos"}']) >= 1
    assert float(values["heterostep_result_bytes"]) > 1000
    assert float(values["process_resident_memory_bytes"]) > 0


def test_head_ends_where_events_would_begin(server):
    id = server.create(**ENDLESS)
    start = time.monotonic()
    head = server.http.head(f"/v1/videos/{id}/events")
    assert head.status_code == 200 and head.headers["content-type"].startswith("text/event-stream")
    assert time.monotonic() - start < 5
    until(lambda: [record for record in server.logged("request") if record["method"] == "HEAD"], 5)
    assert server.video(id)["status"] in ("queued", "in_progress")
    server.http.delete(f"/v1/videos/{id}")


def test_logs_are_json_with_the_job(server, made):
    for event in ("job begun", "job completed"):  # the line comes after the row
        until(lambda event=event: made["id"] in [record["job"] for record in server.logged(event)], 10)
    for line in server.log.read_text().splitlines():
        record = json.loads(line)
        assert {"time", "level", "event"} <= record.keys()
        # The job of a request is what a client put into the path: a number is none of ours.
        ours = [value for name, value in record.items() if (record["event"], name) != ("request", "job")]
        assert not any(isinstance(value, str) and re.fullmatch(r"[0-9.]+", value) for value in ours), record
    started, ready = server.logged("runner started")[0], server.logged("runner ready")[0]
    took = datetime.fromisoformat(ready["time"]) - datetime.fromisoformat(started["time"])
    assert ready["seconds"] == pytest.approx(took.total_seconds(), abs=0.5)


def test_the_service_itself_does_not_load_pytorch():
    # It must start at once, stay small, and never be where a model crashes.
    code = "import sys, heterostep.launch.service.app; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-encoding": "gzip"}, 415),
        ({"content-type": "text/plain"}, 400),
        ({"authorization": "Basic YWxpY2U6eA=="}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer \xff\xfe"}, 401),
    ],
)
def test_refused_by_its_headers(server, headers, status):
    body = json.dumps({"prompt": PROMPT}).encode()
    raw = {name: value.encode("latin-1") for name, value in {"content-type": "application/json", **headers}.items()}
    answer = server.http.post("/v1/videos", content=body, headers=raw)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_the_page_of_the_service_itself_may_call(server):
    answer = server.http.get("/v1/videos", headers={"origin": server.url})
    assert answer.status_code == 200
    page = server.http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["x-request-id"]


def connect(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_a_thousand_connections_do_not_stop_the_service(server):
    idle = []
    with contextlib.suppress(OSError):
        for _ in range(600):
            idle.append(connect(server))
    assert len(idle) > 400
    for connection in idle:
        connection.close()
    until(lambda: httpx2.get(f"{server.url}/ready").status_code == 200, 10)


def test_slow_headers_are_not_waited_for(server, dripping):
    assert 10 < dripping.result() < 25
    assert server.http.get("/ready").status_code == 200
