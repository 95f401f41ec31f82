"""Clients that are slow on purpose, against a server whose patience is a second."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from heterostep.launch.service import access
from heterostep.launch.service.access import BoundedConnection
from waiting import until


class Hasty(BoundedConnection):
    header_seconds = 1.0
    stall_seconds = 1.0


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(access, "_BODY_SECONDS", 1.0)
    app = FastAPI()
    app.add_middleware(access.AccessMiddleware, allowed_hosts=(), counted=lambda *_: None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException):
        return PlainTextResponse(error.detail, error.status_code)

    @app.post("/")
    async def post(request: Request):
        return {"bytes": len(await request.body())}

    @app.get("/flood")
    async def flood():
        async def stream():
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)  # where nobody receives, sending does not wait

        return StreamingResponse(stream())

    config = uvicorn.Config(app, http=Hasty, ws="none", port=0, log_config=None, timeout_keep_alive=30)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started, 10)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = server.force_exit = True
    thread.join(10)


def lifetime(connection, drop=b""):
    """Seconds until the server ends the connection, while `drop` is sent every 0.2 s."""
    start = time.monotonic()
    connection.settimeout(0.2)
    with contextlib.suppress(ConnectionError, BrokenPipeError):
        while time.monotonic() - start < 10:
            if drop:
                connection.sendall(drop)
            try:
                if connection.recv(65536) == b"":
                    break
            except TimeoutError:
                continue
            time.sleep(0.2)
    return time.monotonic() - start


def answer(connection):
    received = b""
    while b'{"bytes":2}' not in received:
        received += (chunk := connection.recv(65536))
        assert chunk, received


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


def test_nothing_at_all(address):
    with socket.create_connection(address) as connection:
        assert 0.8 < lifetime(connection) < 3


def test_headers_in_drops(address):
    with socket.create_connection(address) as connection:
        connection.sendall(HEAD)
        assert 0.8 < lifetime(connection, b"X: y\r\n") < 3


def test_headers_in_drops_after_a_good_request(address):
    with socket.create_connection(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 2\r\n\r\nab")
        answer(connection)
        time.sleep(1.5)  # the pause between two requests may be longer
        connection.sendall(HEAD)
        assert 0.8 < lifetime(connection, b"X: y\r\n") < 3


def test_a_body_in_drops(address):
    with socket.create_connection(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        start = time.monotonic()
        connection.settimeout(5)
        for _ in range(4):
            connection.sendall(b"x")
            time.sleep(0.1)
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        assert 0.8 < time.monotonic() - start < 3


def test_a_client_that_does_not_read(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1000)
        time.sleep(4)
        # The connection was ended: after what the buffers hold comes the end, not more.
        connection.settimeout(5)
        received = 0
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(1 << 20):
                received += len(chunk)
                assert received < 1 << 28, "it goes on and on"


def test_a_client_in_no_hurry_is_served(address):
    with socket.create_connection(address) as connection:
        for part in (HEAD[:10], HEAD[10:], b"Content-Length: 2\r\n\r\n", b"a", b"b"):
            connection.sendall(part)
            time.sleep(0.1)
        answer(connection)
