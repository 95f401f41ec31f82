"""Hostile requests: whatever comes, no 500, no crash, no stray file, and a good request works afterwards."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import httpx2
import hypothesis
import pytest

from serving import KEYS, PROMPT

schemathesis = pytest.importorskip("schemathesis", reason="the extra 'dev' is not installed")
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

AUTHORIZED = {"authorization": f"Bearer {KEYS['alice']}"}
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
)
OPERATIONS = [
    ("POST", "/v1/videos"),
    ("POST", "/v1/videos/sync"),
    ("POST", "/v1/videos/generations"),
    ("GET", "/v1/videos"),
    ("GET", "/v1/videos/{video_id}"),
    ("DELETE", "/v1/videos/{video_id}"),
    ("POST", "/v1/videos/{video_id}/cancel"),
    ("GET", "/v1/videos/{video_id}/events"),
    ("GET", "/v1/videos/{video_id}/content"),
    ("GET", "/v1/models/{model}"),
]


@pytest.fixture(autouse=True, scope="module")
def nothing_is_harmed(server, request):
    """At the end: the same processes, no file where none belongs, no 500, and a good request still works."""
    workers = server.workers()
    yield
    assert server.process.poll() is None and server.workers() == workers
    sweep(server)
    good = server.create(num_frames=5)
    assert server.finished(good)["status"] == "completed"
    server.http.delete(f"/v1/videos/{good}")
    assert server.logged("request failed") == []
    assert [record for record in server.logged("request") if record["status"] == 500] == []
    assert list(server.scratch.iterdir()) == []
    files = {path.name.partition("-")[0] for path in server.data_dir.iterdir()}
    assert files == {"jobs.sqlite3", "results", "state", "leases"}
    assert list((server.data_dir / "results").iterdir()) == []
    if sum(item.module is request.module for item in request.session.items) > 100:  # all of them
        assert sum(len(server.logged(event)) for event in ("request", "Invalid HTTP request received.")) > 1000
    for place in ("/etc/cron.d/evil", "/evil", "/tmp/evil"):
        assert not Path(place).exists()


def sweep(server):
    for video in server.http.get("/v1/videos", params={"limit": 100}).json()["data"]:
        server.http.delete(f"/v1/videos/{video['id']}")


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_described(schema):
    described = {(o.ok().method.upper(), o.ok().path) for o in schema.get_all_operations()}
    quiet = {("GET", path) for path in ("/v1/models", "/v1/model_info", "/health", "/ready", "/metrics")}
    assert described == {*OPERATIONS} | quiet


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[f"{method} {path}" for method, path in OPERATIONS])
def test_what_the_description_allows_and_forbids(server, schema, method, path):
    # Wrong queries are made that are empty once they are in an address; those below are written by hand.
    modes = [] if (method, path) == ("GET", "/v1/videos") else [schemathesis.GenerationMode.NEGATIVE]
    if path not in ("/v1/videos/sync", "/v1/videos/generations"):  # a valid one takes as long as its video
        modes.append(schemathesis.GenerationMode.POSITIVE)
    for mode in modes:

        @hypothesis.settings(
            max_examples=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
        def call(case):
            response = case.call(headers=AUTHORIZED, timeout=20)
            case.validate_response(response, checks=CHECKS, headers=AUTHORIZED)
            if response.status_code == 200 and (method, path) == ("POST", "/v1/videos"):
                server.http.delete(f"/v1/videos/{response.json()['id']}")

        call()


def deep(levels):
    return "[" * levels + "]" * levels


NUMBERS = [
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-0",
    "9" * 400,
    "1e-400",
    "0.1",
    "true",
    '"8"',
    "null",
    "[]",
    "{}",
    '""',
]
FIELDS = [
    "prompt", "negative_prompt", "seconds", "size", "num_frames", "fps", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "seed", "compute", "model", "input_reference", "width", "height", "n", "extra_body", "metadata",
]  # fmt: skip


def test_wrong_values_in_every_field(server):
    for field in FIELDS:
        for value in NUMBERS:
            body = f'{{"prompt": "x", "num_inference_steps": 2, {json.dumps(field)}: {value}}}'
            answer = server.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 400, 429), (field, value, answer.text)
            if answer.status_code == 200:
                server.http.delete(f"/v1/videos/{answer.json()['id']}")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"prompt"', b"\x00", b"\xff\xfe{}", b"{}" * 1000, b'{"prompt": "x"} trailing',
        deep(100_000).encode(), b'{"prompt": ' + deep(60_000).encode() + b"}", b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "\\u0000"}', b'{"prompt": "' + b"x" * 250_000 + b'"}',
        b'{"prompt": "x", "prompt": 5}', b'{"__proto__": {"a": 1}, "prompt": "x"}',
        b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",  # a pickle
        "{\"prompt\": \"x\"}".encode("utf-16"), b'{"prompt": "x", "size": "64x64\\n"}',
        b'{"prompt": "x", "size": "\xd9\xa6\xd9\xa4x64"}',
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_bodies_that_are_no_request(server, body):
    answer = server.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 413), answer.text
    assert answer.json()["error"]["message"].count("\n") == 0


def pixel_bomb():
    """A PNG of 60,000 x 60,000 pixels in some kilobytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\x00" * 7501 * 2000, 9)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def zip_bomb():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 10_000_000)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("../../../../etc/cron.d/evil", b"x", "image/png"),
        ("/etc/passwd", b"x", "image/png"),
        ("C:\\windows\\evil.exe", b"x", "image/png"),
        ("a\x00.png", b"x", "image/png"),
        ("n" * 5000, b"x", "image/png"),
        ("%2e%2e%2fevil", b"x", "image/png"),
        ("bomb.png", pixel_bomb(), "image/png"),
        ("bomb.zip", zip_bomb(), "application/zip"),
        ("page.svg", b"<svg onload='alert(1)'/>", "image/svg+xml"),
        ("model.pkl", b"\x80\x04\x95", "application/octet-stream"),
        ("big.png", b"\0" * 8_000_000, "image/png"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_uploads(server, name, content, kind):
    files = {"input_reference": (name, content, kind)}
    answer = server.http.post("/v1/videos", data={"prompt": PROMPT}, files=files)
    assert answer.status_code == 400
    assert "from text alone" in answer.text or "the form cannot be read" in answer.text


def test_an_upload_that_is_too_large(server):
    files = {"input_reference": ("big.png", b"\0" * (17 << 20), "image/png")}
    # Or the connection is closed while the rest is on its way.
    with contextlib.suppress(httpx2.TransportError):
        assert server.http.post("/v1/videos", data={"prompt": PROMPT}, files=files).status_code == 413
    assert server.http.get("/ready").status_code == 200


def form(*parts, boundary=b"b"):
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


PART = b'Content-Disposition: form-data; name="prompt"\r\n\r\nx'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", form(PART)),
        ("multipart/form-data; boundary=", form(PART)),
        ("multipart/form-data; boundary=" + "b" * 5000, form(PART)),
        ("multipart/form-data; boundary=\xff", form(PART)),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", form(PART)[:-8]),
        ("multipart/form-data; boundary=b", form(PART, PART)),
        ("multipart/form-data; boundary=b", form(*[PART.replace(b"prompt", b"p%d" % n) for n in range(500)])),
        ("multipart/form-data; boundary=b", form(PART.replace(b' name="prompt"', b""))),
        ("multipart/form-data; boundary=b", form(PART.replace(b"prompt", b"\xff\xfe"))),
        ("multipart/form-data; boundary=b", form(PART.replace(b"\r\n\r\n", b"\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"))),
        ("multipart/form-data; boundary=b", form(PART.replace(b"x", b"x" * 300_000))),
        ("multipart/form-data; boundary=b", form(PART, PART.replace(b'"prompt"', b'"prompt"; filename="a"'))),
        ("multipart/form-data; boundary=b", random.Random(0).randbytes(10_000)),
        ("application/json; charset=utf-7", b'{"prompt": 1}'),
        ("application/x-www-form-urlencoded", b"prompt"),
        ("application/x-www-form-urlencoded", b"prompt=x&" + b"&" * 1000 + b"%"),
        ("application/x-www-form-urlencoded", random.Random(0).randbytes(10_000)),
        ("application/x-www-form-urlencoded", b"prompt=x&extra_body=" + b"[" * 100_000),
        ("a/b/c;;;=", b"x"),
    ],
)
def test_forms_that_are_none(server, kind, body):
    answer = server.http.post("/v1/videos", content=body, headers={"content-type": kind.encode("latin-1")})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("charset", ["hex", "idna", "zlib", "undefined", "utf-7", "none/../such"])
def test_odd_charsets(server, charset):
    body = form(PART.replace(b"x", b"\xff+AAA-" * 100))
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    assert server.http.post("/v1/videos", content=body, headers=headers).status_code in (200, 400, 429)


PATHS = [
    "/v1/videos/../../../etc/passwd", "/v1/videos/%2e%2e%2f%2e%2e%2fjobs.sqlite3/content", "/page/../app.py",
    "/page/%2e%2e/app.py", "/page/..%2f..%2fjobs.py", "/page//etc/passwd", "/page/%00", "/v1/videos/%ff%fe",
    "/v1/videos/" + "a" * 8000, "/v1/videos/x/content?variant=video&variant=../x", "/v1/videos?limit=0",
    "/v1/videos?limit=-1", "/v1/videos?limit=99999999999999999999", "/v1/videos?limit=1e3", "/v1/videos?order=up",
    "/v1/videos?after=' OR 1=1 --", "/v1/videos?after=" + "%00" * 10, "/v1/videos/' OR '1'='1", "/v1/videos/\u202e",
    "/v1/models/../../x", "/docs/../x", "//evil.example/%2f..", "/v1/videos/x/events/x", "/v1/videos/sync",
    "/favicon.ico",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_paths(server, path):
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        if (method, path) != ("POST", "/v1/videos/sync"):
            answer = server.http.request(method, server.url + path)
            assert answer.status_code in (200, 400, 404, 405, 307), (method, path, answer.text)
            assert b"SQLite format" not in answer.content and b"root:" not in answer.content
            assert b"import annotations" not in answer.content


RAW = [
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET /" + b"a" * 100_000,
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000,
    b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\nx",
    b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\r\nA\x00: b\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", RAW, ids=lambda data: repr(data[:30]))
def test_bytes_that_are_no_http(server, data):
    received = raw(server, data)
    assert b" 500 " not in received.partition(b"\r\n")[0]


def raw(server, data, wait=0.2):
    host, _, port = server.url.removeprefix("http://").partition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=wait) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_half_uploads(server):
    head = (
        f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['alice']}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
    ).encode()
    body = form(PART, b'Content-Disposition: form-data; name="input_reference"; filename="x"\r\n\r\n' + b"y" * 90_000)
    for end in (0, 10, 60, 100, 1000, 90_000):
        raw(server, head + body[:end], wait=0.1)


def test_compressed_bodies_are_refused(server):
    for encoding, body in (
        ("gzip", gzip.compress(b"\0" * 10_000_000)),
        ("br", b"x"),
        ("deflate", zlib.compress(b"{}")),
    ):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        assert server.http.post("/v1/videos", content=body, headers=headers).status_code == 415
