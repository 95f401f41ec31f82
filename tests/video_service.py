"""A video service that answers as it is told: for clients that measure one."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeService:
    """Videos that take `seconds`; `behaviours` says what becomes of the first requests, all later ones are made.

    A behaviour is "ok", "500", "429", "text" (no JSON), "list" (JSON, but no video), "failed", "cancelled", "stall"
    (never answers the request), "slow" (is never completed), "hang up" (closes the connection), or "lost" (closes it
    at every later question).
    """

    def __init__(self, seconds: float = 0.05, behaviours: Sequence[str] = ()) -> None:
        self.seconds, self.behaviours = seconds, list(behaviours)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.deleted: list[str] = []
        self.most = 0
        self._videos: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def submit(self, body: dict[str, Any]) -> tuple[str, str]:
        """A new video: its id and behaviour."""
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            behaviour = self.behaviours[number] if number < len(self.behaviours) else "ok"
            self._videos[str(number)] = (behaviour, time.monotonic())
            running = [begun for kind, begun in self._videos.values() if kind == "ok"]
            self.most = max(self.most, sum(time.monotonic() - begun < self.seconds for begun in running))
            return str(number), behaviour

    def state(self, id: str) -> tuple[dict[str, Any], str]:
        """What is said of a video, and its behaviour."""
        behaviour, begun = self._videos[id]
        passed = time.monotonic() - begun
        status = "completed" if passed > self.seconds else "in_progress" if passed > self.seconds / 2 else "queued"
        found: dict[str, Any] = {"id": id, "object": "video", "status": status}
        if behaviour in ("failed", "cancelled"):
            found |= {"status": behaviour, "error": {"message": "the disk is full"}}
        elif behaviour == "slow":
            found["status"] = "in_progress"
        elif status == "completed":
            found |= {
                "timing": {"queued": 0.25, "total": 2.0},
                "inference_time_s": 2.0,
                "peak_memory_mb": 100.0 + int(id),
            }
            found |= {"stage_durations": {"denoise": 1.5, "decode": 0.5}}
        return found, behaviour

    def close(self) -> None:
        """Die."""
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["content-length"])).decode()
                service.headers.append(dict(self.headers))
                id, behaviour = service.submit(json.loads(text) if text.startswith("{") else {"form": text})
                if behaviour in ("500", "429"):
                    self._send(int(behaviour), b'{"error": {"message": "no"}}')
                elif behaviour in ("text", "list"):
                    self._send(200, b"<html>" if behaviour == "text" else b"[1]")
                elif behaviour == "stall":
                    service.closing.wait(20)
                elif behaviour == "hang up":
                    self.close_connection = True
                else:
                    self._send(200, json.dumps({"id": id, "status": "queued"}).encode())

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self._send(200, b'{"data": [{"id": "fake"}]}')
                    return
                if self.path.endswith("/content"):
                    self._send(200, b"video" * 1000)
                    return
                found, behaviour = service.state(self.path.split("/")[-1])
                if behaviour == "lost":
                    self.close_connection = True
                else:
                    self._send(200, json.dumps(found).encode())

            def do_DELETE(self) -> None:
                service.deleted.append(self.path.split("/")[-1])
                self._send(200, b"{}")

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

        return Handler


@contextlib.contextmanager
def fake_service(seconds: float = 0.05, behaviours: Sequence[str] = ()) -> Iterator[FakeService]:
    """A `FakeService` that dies at the end, if it has not before."""
    service = FakeService(seconds, behaviours)
    try:
        yield service
    finally:
        if not service.closing.is_set():
            service.close()
