"""What HTTP clients send, and what the service's application answers before any video is made."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import socket

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
testclient = pytest.importorskip("starlette.testclient", reason="the extra 'dev' is not installed")

from heterostep.engine.config import EngineConfig
from heterostep.errors import ConfigError
from heterostep.hsa.config import HSAConfig
from heterostep.launch.serve import _addresses
from heterostep.launch.service.app import create_app, router
from heterostep.launch.service.bodies import Generation
from heterostep.launch.service.requests import Asked, to_request
from heterostep.launch.service.service import VideoService
from heterostep.launch.service.settings import ServiceSettings

PLAIN = {"content-type": "application/x-www-form-urlencoded"}
PROMPT = "a red disc moves right"


def service_of(folder, **facts):
    """A service that takes requests and makes no video: it is not started."""
    service = VideoService(ServiceSettings(data_dir=folder, max_queue=1000))
    service._facts = dataclasses.replace(service._facts, **facts)
    return service


@pytest.fixture
def client(tmp_path):
    service = service_of(tmp_path)
    yield testclient.TestClient(create_app(service), raise_server_exceptions=False)
    service.close()


def png():
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    return stream.getvalue()


def multipart(**fields):
    """The arguments of a request with a form as `curl -F` and the openai client send it."""
    return {"files": {name: (None, text) for name, text in fields.items()}}


# What clients send.


@pytest.mark.parametrize(
    ("sent", "made"),
    [
        # curl -d, and forms of other libraries without a file
        ({"content": "prompt=a+red%20disc%2C+caf%C3%A9", "headers": PLAIN}, {"prompt": "a red disc, café"}),
        ({"data": {"prompt": PROMPT, "num_frames": "9", "seed": "3"}}, {"num_frames": 9, "seed": 3}),
        # openai: seconds and size are texts; extra_body is sent beside them
        ({"json": {"prompt": PROMPT, "model": "demo", "seconds": "1", "size": "64x48", "seed": 3, "compute": 0.5}},
         {"size": "64x48", "num_frames": 9, "seed": 3}),
        (multipart(prompt=PROMPT, model="demo", seconds="1", size="64x48"), {"size": "64x48", "num_frames": 9}),
        # SGLang's bench_serving
        ({"json": {"prompt": PROMPT, "model": "demo", "size": "64x64", "num_frames": 9, "fps": 8,
                   "num_outputs_per_prompt": 1, "num_inference_steps": 4}},
         {"num_frames": 9, "num_inference_steps": 4}),
        (multipart(prompt=PROMPT, model="demo", size="64x64", num_outputs_per_prompt="1", num_frames="9", fps="8",
                   extra_body=json.dumps({"num_inference_steps": 4, "seed": 3, "fps": 8, "negative_prompt": None})),
         {"num_frames": 9, "num_inference_steps": 4, "seed": 3}),
        # vLLM-Omni's serving benchmarks
        ({"data": {"model": "demo", "prompt": PROMPT, "size": "64x48", "num_frames": "9", "fps": "8", "seed": "42",
                   "num_inference_steps": "4", "guidance_scale": "2.0", "negative_prompt": ""}},
         {"size": "64x48", "seed": 42, "guidance_scale": 2.0}),
        (multipart(prompt=PROMPT, width="64", height="48", num_frames="9"), {"size": "64x48", "num_frames": 9}),
        # SGLang's bench_serving where nobody names a model
        ({"json": {"prompt": PROMPT, "model": "default", "num_outputs_per_prompt": 1}}, {"model": "demo"}),
        # AIPerf, whose extra inputs are what its user says
        ({"json": {"prompt": PROMPT, "model": "demo"}}, {}),
        (multipart(prompt=PROMPT, model="demo", size="64x64", seconds="1", seed="7"), {"num_frames": 9, "seed": 7}),
        # numbers and nothing in the ways in which languages write them
        ({"json": {"prompt": PROMPT, "fps": 8.0, "seed": 1.0, "num_frames": 9.0, "num_inference_steps": 4.0, "n": 1.0}},
         {"fps": 8, "seed": 1, "num_frames": 9, "num_inference_steps": 4}),
        ({"data": {"prompt": PROMPT, "fps": "8.0", "seed": "1.0", "n": "1"}}, {"fps": 8, "seed": 1}),
        ({"json": {"prompt": PROMPT} | dict.fromkeys(
            ("model", "seconds", "size", "width", "height", "negative_prompt", "num_frames", "fps", "seed", "compute",
             "num_inference_steps", "guidance_scale", "guidance_scale_2", "input_reference", "n", "extra_body", "user"),
        )}, {"size": "64x64", "negative_prompt": "", "fps": 8}),
        ({"data": {"prompt": PROMPT} | dict.fromkeys(
            ("model", "seconds", "size", "width", "negative_prompt", "fps", "seed", "compute", "n", "extra_body"), ""
        )}, {"size": "64x64", "negative_prompt": "", "fps": 8}),
        ({"json": {"prompt": PROMPT, "size": "64x48", "width": 64, "height": 48}}, {"size": "64x48"}),
        ({"json": {"prompt": PROMPT, "extra_body": {"seed": 3, "fps": 8, "n": None}, "fps": 8, "n": 1}},
         {"seed": 3, "fps": 8}),
    ],
)  # fmt: skip
def test_what_clients_send_is_taken(client, sent, made):
    answer = client.post("/v1/videos", **sent)
    assert answer.status_code == 200, answer.text
    video = answer.json()
    assert {name: video[name] for name in made} == made
    assert video["status"] == "queued" and "x-ignored-fields" not in answer.headers


@pytest.mark.parametrize("kind", ["json", "data"])
def test_a_drawn_seed_is_told(client, kind):
    videos = [client.post("/v1/videos", **{kind: {"prompt": PROMPT, "seed": -1}}).json() for _ in range(2)]
    assert videos[0]["seed"] != videos[1]["seed"] and min(video["seed"] for video in videos) >= 0


def test_a_default_that_so_few_steps_cannot_meet_is_not_asked_for(client):
    # SGLang's warm-up.
    assert client.post("/v1/videos", json={"prompt": PROMPT, "num_inference_steps": 1}).json()["compute"] == 1.0
    assert client.post("/v1/videos", json={"prompt": PROMPT, "num_inference_steps": 20}).json()["compute"] == 0.5
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "num_inference_steps": 1, "compute": 0.5})
    assert answer.status_code == 400 and "compute=0.5 cannot be met with 1 step" in answer.json()["error"]["message"]


def test_windows_that_roll_are_refused_beside_skipped_tokens(tmp_path):
    service = VideoService(ServiceSettings(data_dir=tmp_path, engine=EngineConfig(hsa=HSAConfig(policy="tokens"))))
    asked = {"prompt": PROMPT, "num_frames": 49, "window": 17, "num_inference_steps": 60, "compute": 0.9}
    client = testclient.TestClient(create_app(service))
    assert client.post("/v1/videos", json=asked).status_code == 200
    answer = client.post("/v1/videos", json={**asked, "roll_windows": True})
    service.close()
    assert answer.status_code == 400 and "policy='tokens'" in answer.json()["error"]["message"]


def test_sglang_asks_what_is_served(client):
    assert client.get("/v1/model_info").json() == {"model_path": "demo"}


def test_boundary_ratio_must_be_the_models_own(tmp_path):
    own, single = service_of(tmp_path / "two", boundary_ratio=0.875), service_of(tmp_path / "one")
    two, one = (testclient.TestClient(create_app(service)) for service in (own, single))
    assert two.post("/v1/videos", json={"prompt": PROMPT, "boundary_ratio": 0.875}).status_code == 200
    answer = two.post("/v1/videos", json={"prompt": PROMPT, "boundary_ratio": 0.9})
    assert answer.status_code == 400 and "0.9 is not the model's own (0.875)" in answer.text
    answer = one.post("/v1/videos", json={"prompt": PROMPT, "boundary_ratio": 0.875})
    assert answer.status_code == 400 and "the model's own (none: it has one expert)" in answer.text
    own.close()
    single.close()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"output_format": "avi"}, "output_format: input should be 'mp4' or 'auto'"),
        ({"response_format": "url"}, "response_format: input should be 'video_bytes' or 'video_path'"),
        ({"latent_path": "/noise.pt"}, "there is no file of noise 'noise.pt' here; the operator names a folder by"),
    ],
)
def test_what_mlperf_may_not_ask(client, fields, says):
    answer = client.post("/v1/videos/generations", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_mlperfs_noise_is_a_file_of_the_operators(tmp_path):
    service = VideoService(ServiceSettings(data_dir=tmp_path / "data", noise_dir=tmp_path))
    engine, limits = service.settings.engine, service._limits
    shared = {"model": "demo", "limits": limits, "share": {"compute": 1.0}, "engine": engine, "every": 5}
    facts = service._facts
    frames, side = (17 - 1) // facts.vae_temporal + 1, 64 // facts.vae_spatial
    torch.save(torch.zeros(1, 16, frames, side, side), tmp_path / "f.pt")
    asked = Asked(Generation(prompt=PROMPT, latent_path="/their/data/f.pt"), "", None)
    request, _ = to_request(asked, facts=facts, noises=service.settings.noises, **shared)
    assert request.noise == str(tmp_path / "f.pt")
    client = testclient.TestClient(create_app(service))
    for path, says in (
        ("/x/other.pt", "there is no file of noise 'other.pt' here; there are"),
        ("..", "there is no file"),
    ):
        answer = client.post("/v1/videos/generations", json={"prompt": PROMPT, "latent_path": path})
        assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    # Nobody but MLPerf's clients may name one, and no setting of a request is a path.
    for field in ("latent_path", "noise"):
        assert client.post("/v1/videos", json={"prompt": PROMPT, field: "f.pt"}).status_code == 400
    service.close()
    with pytest.raises(ConfigError, match=r"noise-dir .* is not a folder"):
        ServiceSettings(data_dir=tmp_path / "data", noise_dir=tmp_path / "absent")


@pytest.mark.parametrize(("plain", "status"), [(False, "cancelled"), (True, "failed")])
def test_clients_that_know_no_cancelled_video_stop_waiting(tmp_path, plain, status):
    service = VideoService(ServiceSettings(data_dir=tmp_path, openai_statuses=plain))
    client = testclient.TestClient(create_app(service))
    id = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    video = client.post(f"/v1/videos/{id}/cancel").json()
    assert (video["status"], video["error"]["code"]) == (status, "cancelled")
    assert client.get(f"/v1/videos/{id}").json()["status"] == status
    service.close()


def test_what_cannot_change_a_video_is_ignored_and_named(client):
    given = {"response_format": "url", "metadata": {"order": 17}, "user": "u-1", "safety_identifier": None}
    answer = client.post("/v1/videos", json={"prompt": PROMPT, **given})
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "user, metadata, response_format"
    answer = client.post("/v1/videos", data={"prompt": PROMPT, "user": "u-1", "metadata": ""})
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == "user"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "one request makes one video; send a request for each"),
        ({"n": 0}, "n", "one request makes one video"),
        ({"num_outputs_per_prompt": 4}, "num_outputs_per_prompt", "one request makes one video"),
        ({"n": True}, "n", "integer"),
        ({"width": 64}, "height", "width was given without height"),
        ({"height": 64}, "width", "height was given without width"),
        ({"width": 64, "size": "64x64"}, "height", "give both, or size"),
        ({"width": 64, "height": 48, "size": "64x64"}, "size", "size 64x64 is not width x height 64x48"),
        ({"width": 64.5, "height": 48}, "width", "integer"),
        ({"fps": 8.5}, "fps", "integer"),
        ({"seed": -2}, "seed", "-1"),
        ({"num_frames": 10**400}, None, "num_frames must be"),
        ({"sigma_shift": 3.0}, "sigma_shift", "there is no field 'sigma_shift'"),
        ({"extra_body": {"fps": 8}, "fps": 9}, "fps", "another value in extra_body"),
        ({"extra_body": {"sigma_shift": 3.0}}, "sigma_shift", "there is no field 'sigma_shift'"),
        ({"extra_body": {"extra_body": {}}}, "extra_body", "extra_body must be an object"),
        ({"extra_body": [1]}, "extra_body", "extra_body must be an object"),
        ({"extra_body": {"n": 2}}, "n", "one request makes one video"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(client, fields, param, says):
    answer = client.post("/v1/videos", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and says in error["message"]
    if True in fields.values():  # a form knows no truth
        return
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    for sent in ({"data": {"prompt": PROMPT, **texts}}, multipart(prompt=PROMPT, **texts)):
        answer = client.post("/v1/videos", **sent)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "x"}', "Content-Type: application/json"),
        ("prompt=x&prompt=y", "prompt was given twice"),
        ("&".join(f"f{n}=1" for n in range(40)), "Too many fields"),
        ("", "prompt"),
        ("prompt=", "prompt"),
        ("prompt=x&input_reference=https://example.com/cat.png", "text alone"),
        ("prompt=x&extra_body=seed%3D3", "extra_body is not valid JSON"),
        ("prompt=x&extra_body=3", "extra_body must be a JSON object"),
    ],
)
def test_forms_that_are_no_request(client, content, says):
    answer = client.post("/v1/videos", content=content, headers=PLAIN)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_a_form_of_any_kind_may_be_no_larger_than_json(client):
    answer = client.post("/v1/videos", content="prompt=" + "x" * 300_000, headers=PLAIN)
    assert answer.status_code == 413


def test_an_image_may_come_with_the_options_of_a_benchmark(tmp_path):
    service = service_of(tmp_path, image="optional")
    client = testclient.TestClient(create_app(service))
    texts = {"prompt": PROMPT, "num_outputs_per_prompt": "1", "extra_body": '{"num_inference_steps": 4}'}
    answer = client.post("/v1/videos", data=texts, files={"input_reference": ("cat.png", png(), "image/png")})
    assert answer.status_code == 200 and answer.json()["num_inference_steps"] == 4
    service.close()


def test_the_same_request_in_other_words_is_the_same(client):
    same = [
        {"json": {"prompt": PROMPT, "size": "64x48", "fps": 8}},
        {"json": {"prompt": PROMPT, "width": 64, "height": 48.0, "fps": 8.0, "n": 1, "seed": None}},
        {"json": {"prompt": PROMPT, "extra_body": {"size": "64x48"}, "fps": 8, "seed": -1, "user": "u-1"}},
        {"data": {"prompt": PROMPT, "size": "64x48", "fps": "8", "negative_prompt": ""}},
        multipart(prompt=PROMPT, width="64", height="48", size="64x48", fps="8.0", num_outputs_per_prompt="1"),
    ]
    for sent in same:
        answer = client.post("/v1/videos", **{"headers": {"idempotency-key": "order-17"}, **sent})
        assert answer.status_code == 200, answer.text
    assert len(client.get("/v1/videos").json()["data"]) == 1
    other = {"json": {"prompt": PROMPT, "size": "64x48"}, "headers": {"idempotency-key": "order-17"}}
    assert client.post("/v1/videos", **other).status_code == 400


@pytest.mark.parametrize(
    ("fields", "guidance"),
    [({}, (4.0, 3.0)), ({"guidance_scale": 6}, (6.0, None)), ({"guidance_scale_2": 2}, (4.0, 2.0)),
     ({"guidance_scale": 6, "guidance_scale_2": 2}, (6.0, 2.0))],
)  # fmt: skip
def test_a_video_can_be_made_again_from_its_answer(tmp_path, fields, guidance):
    service = service_of(tmp_path, experts=2, family="Wan 2.2 A14B")
    client = testclient.TestClient(create_app(service))
    body = {"prompt": PROMPT, "negative_prompt": "blurry", "size": "64x48", "num_frames": 9, **fields}
    first = client.post("/v1/videos", json=body).json()
    assert (first["guidance_scale"], first["guidance_scale_2"]) == guidance
    taken = client.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    names = set(taken["application/json"]["schema"]["properties"]) - {"seconds"}  # says what num_frames says
    client.post("/v1/videos", json={name: value for name, value in first.items() if name in names})
    again, made = (service._store.get(video["id"], "") for video in client.get("/v1/videos").json()["data"])
    assert again.request == made.request
    service.close()


@pytest.mark.parametrize(
    ("name", "bounds"),
    [("fps", {"minimum": 1, "maximum": 1000}), ("seed", {"minimum": -1, "exclusiveMaximum": 2**63}),
     ("width", {"minimum": 1, "maximum": 16384}), ("guidance_scale", {"minimum": 0, "maximum": 1000})],
)  # fmt: skip
def test_the_description_has_the_bounds_of_a_number(client, name, bounds):
    taken = client.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    for body in taken.values():
        kinds = body["schema"]["properties"][name]["anyOf"]
        number = next(kind for kind in kinds if kind["type"] in ("integer", "number"))
        assert number == bounds | {"type": number["type"]}


# The page, HEAD, and what is not there.


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/docs", "text/html"), ("/page/app.js", "/javascript"), ("/page/style.css", "text/css"),
     ("/page/icon.svg", "image/svg+xml")],
)  # fmt: skip
def test_files_of_the_page(client, path, kind):
    answer = client.get(path)
    assert answer.status_code == 200 and kind in answer.headers["content-type"]
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize("name", ["x.js", "%00", "%2e%2e", ".", "a" * 300, "%2e%2e%5capp.py"])
def test_what_is_no_file_of_the_page(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404 and answer.json()["error"]["message"], answer.text


def test_head_answers_as_get_does_without_a_body(client):
    id = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    paths = {route.path for route in router.routes if "GET" in route.methods} | {"/openapi.json", "/nothing", "/page/x"}
    assert len(paths) >= 14
    for path in paths:
        values = {"video_id": id, "model": "demo", "name": "app.js"}
        path = re.sub(r"\{(\w+)(:path)?\}", lambda match, values=values: values[match[1]], path)
        head = client.head(path)
        assert head.content == b""
        if path.endswith("/events"):  # GET would last as long as the video
            assert head.status_code == 200 and head.headers["content-type"].startswith("text/event-stream")
            continue
        get = client.get(path)
        assert head.status_code == get.status_code
        varying = {"x-request-id"} | ({"content-length"} if path == "/metrics" else set())
        for name in get.headers.keys() - varying:
            assert head.headers[name] == get.headers[name], (path, name)
    assert client.head(f"/v1/videos/{id}/content", headers={"host": "x", "origin": "http://y"}).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "status", "allow", "says"),
    [
        ("POST", "/v1/videos/ID/remix", 404, None, "POST /v1/videos"),
        ("POST", "/v1/videos/characters", 405, "GET, HEAD, DELETE", "in the prompt"),
        ("GET", "/v1/videos/characters/char_1", 404, None, "/docs"),
        ("POST", "/v1/videos/edits", 405, "GET, HEAD, DELETE", "POST /v1/videos"),
        ("POST", "/v1/videos/extensions", 405, "GET, HEAD, DELETE", "num_frames"),
        ("PUT", "/v1/videos", 405, "GET, HEAD, POST", "'/v1/videos' takes GET, HEAD, POST, not PUT"),
        ("PATCH", "/v1/videos/ID", 405, "GET, HEAD, DELETE", "not PATCH"),
        ("GET", "/v1/videos/ID/cancel", 405, "POST", "takes POST, not GET"),
        ("DELETE", "/openapi.json", 405, "GET, HEAD", "takes GET, HEAD"),
        ("POST", "/health", 405, "GET, HEAD", "not POST"),
        ("POST", "/v1/images/generations", 404, None, "'/v1/images/generations'"),
        ("GET", "/favicon.ico", 404, None, "/docs lists what there is"),
        ("GET", "/" + "x" * 500, 404, None, "xxx"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_one_sentence(client, method, path, status, allow, says):
    answer = client.request(method, path.replace("ID", "video_1"))
    assert answer.status_code == status and answer.headers.get("allow") == allow
    error = answer.json()["error"]
    assert says in error["message"] and len(error["message"]) < 200
    assert error["type"] == "invalid_request_error"
    assert error["code"] == ("not_found" if status == 404 else "method_not_allowed")


def test_the_same_under_a_path_of_a_site(client):
    there = {"headers": {"x-forwarded-prefix": "/studio"}}
    assert client.head("/v1/videos", **there).status_code == 200
    assert "remixed" in client.post("/v1/videos/video_1/remix", **there).json()["error"]["message"]
    answer = client.put("/v1/videos", **there)
    assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD, POST"


# Where the service says that it is.


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/"),
        ("192.0.2.7", "http://192.0.2.7:8000/"),
        ("videos.example", "http://videos.example:8000/"),
        ("::1", "http://[::1]:8000/"),
        ("0.0.0.0", "http://HOST:8000/ and, on this machine, http://127.0.0.1:8000/"),
        ("::", "http://HOST:8000/ and, on this machine, http://[::1]:8000/"),
    ],
)
def test_the_address_that_is_told_can_be_opened(host, says):
    assert _addresses(host, 8000) == says.replace("HOST", socket.gethostname())
