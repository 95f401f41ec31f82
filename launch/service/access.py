"""What a request passes before the application sees it: who may call, from where, how much and how slowly.

API keys, the middleware, and connections that do not wait forever for a slow client.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import ConfigError
from ..logs import say
from .settings import is_path_prefix

# Shorter ones can be guessed.
_MIN_KEY = 16
_MAX_JSON = 256 * 1024
# An image to start from.
_MAX_FORM = 16 * 1024 * 1024
_BODY_SECONDS = 60.0

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
_QUIET = ("/health", "/ready", "/metrics")


class ApiKeys:
    """The keys that open the service, kept only as hashes.

    A line of the file is a key, or a name and a key; `#` begins a comment. Jobs belong to the name, so a key that is
    replaced under its name keeps them; a key without one is named by its hash.
    """

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        """Take (name, key) pairs."""
        self._hashes = [(name, hashlib.sha256(key.encode()).digest()) for name, key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Read a key file.

        Raises:
            ConfigError: it cannot be read, has no key, a short one, or one twice.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api-key-file {str(path)!r} cannot be read ({type(error).__name__})") from error
        keys = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            # The line itself is not shown: it may hold a key.
            if len(words) > 2 or len(words[-1]) < _MIN_KEY:
                raise ConfigError(
                    f"api-key-file {str(path)!r}, line {number}: a line is a key of at least {_MIN_KEY} characters, "
                    "optionally after a name"
                )
            key = words[-1]
            keys.append((words[0] if len(words) == 2 else hashlib.sha256(key.encode()).hexdigest()[:16], key))
        if not keys:
            raise ConfigError(f"api-key-file {str(path)!r} holds no key; write one key on a line")
        if len({key for _, key in keys}) < len(keys):
            raise ConfigError(f"api-key-file {str(path)!r} holds a key twice; each key belongs to one owner")
        return cls(keys)

    def owner(self, authorization: str | None) -> str | None:
        """The name behind an Authorization header; None if it opens nothing.

        Takes the same time whether a key is nearly right or all wrong.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, digest in self._hashes:
            if hmac.compare_digest(digest, given):
                found = name
        return found if scheme.lower() == "bearer" else None


def check_origin(host: str, origin: str | None, allowed_hosts: Sequence[str]) -> str | None:
    """Why a request comes from where it must not, in one sentence; None if it may.

    A browser sends requests wherever a page tells it to. Another site's page is known by its Origin; one that has
    pointed its own name at this machine, by the name in Host.

    Args:
        host: the Host header.
        origin: the Origin header.
        allowed_hosts: names under which the service may be called; empty allows all.
    """
    if allowed_hosts and _name(host) not in allowed_hosts:
        return f"this service does not answer to the name {_name(host)[:80]!r}"
    if origin is not None and origin.lower().partition("://")[2] != host.lower():
        return "pages of other sites may not call this service"
    return None


def _name(host: str) -> str:
    """A Host header without its port."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


class AccessMiddleware:
    """ASGI middleware that refuses requests from foreign pages and bodies that are too large or too slow.

    It also answers HEAD, adds the headers that every answer has, and logs and counts every request.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: Sequence[str], counted: Callable[[str, str, int], None]) -> None:
        """Wrap an application.

        Args:
            app: the application.
            allowed_hosts: as in `check_origin`.
            counted: called with method, route and status of every answer.
        """
        self._app, self._allowed_hosts, self._counted = app, allowed_hosts, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        request_id, method = uuid.uuid4().hex, scope["method"]
        if method == "HEAD":  # is answered as GET is, whatever the route, as far as the headers
            scope = {**scope, "method": "GET"}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if status in (408, 413):  # what is still to come of the body is not read
                    headers["connection"] = "close"
            elif method == "HEAD":
                if not answering.cancel_called:
                    await send({"type": "http.response.body"})
                    answering.cancel()
                return
            await send(message)

        try:
            with anyio.CancelScope() as answering:
                refusal = self._refusal(Headers(scope=scope))
                if refusal is not None:
                    await _answer(sending, *refusal)
                else:
                    await self._app(scope, _bounded(receive, Headers(scope=scope)), sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._counted(method, route, status)
            if route not in _QUIET or status >= 400:
                video = scope.get("path_params", {}).get("video_id")
                fields = {"job": video[:80]} if video is not None else {}
                milliseconds = round(1e3 * (time.perf_counter() - start), 1)
                say("request", method=method, route=route, status=status, id=request_id, ms=milliseconds, **fields)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        foreign = check_origin(headers.get("host", ""), headers.get("origin"), self._allowed_hosts)
        if foreign is not None:
            return 403, foreign
        if headers.get("content-encoding", "identity").lower() != "identity":
            return 415, "compressed bodies are not taken; send it as it is"
        return None


def _bounded(receive: Receive, headers: Headers) -> Receive:
    """Limit size and time of a request's body."""
    form = headers.get("content-type", "").lower().startswith("multipart/form-data")
    limit = _MAX_FORM if form else _MAX_JSON
    length = headers.get("content-length", "0")
    announced = int(length) if length.isdecimal() and len(length) < 20 else limit + 1
    deadline = asyncio.get_running_loop().time() + _BODY_SECONDS
    size, complete = 0, False

    async def receiving() -> Message:
        nonlocal size, complete
        if complete:  # then it is the end of the connection that is waited for, which may take hours
            return await receive()
        if announced > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS:g} seconds") from error
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        complete = not message.get("more_body", False)
        return message

    return receiving


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than the {limit // 1024} KiB that are taken")


async def _answer(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


class PrefixMiddleware:
    """ASGI middleware that tells the application under which path clients reach it.

    The path is `root_path`, or else what the proxy says in X-Forwarded-Prefix. A header that is not a path is ignored.
    """

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        """Wrap an application; `root_path` is empty where no setting gives it."""
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            prefix = self._root_path or _forwarded(Headers(scope=scope))
            path = scope["path"]
            # Most proxies take the path off. Where a setting gives it, a proxy may as well leave it on.
            if not (self._root_path and f"{path}/".startswith(f"{prefix}/")):
                path = prefix + path
            # Ray Serve may have put the application under a path of its own.
            scope = {**scope, "path": path, "root_path": prefix + scope.get("root_path", "")}
        await self._app(scope, receive, send)


def _forwarded(headers: Headers) -> str:
    given = headers.get("x-forwarded-prefix", "").rstrip("/")
    return given if is_path_prefix(given) else ""


class BoundedConnection(H11Protocol):
    """uvicorn's connection, closed when its request headers take too long or its client stops reading.

    uvicorn bounds only the pause between two requests. Bodies are bounded by `AccessMiddleware`.
    """

    header_seconds = 15.0
    stall_seconds = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As uvicorn makes it."""
        super().__init__(*arguments, **options)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait("headers", self.header_seconds)

    def data_received(self, data: bytes) -> None:
        """Take some bytes: they may complete a request's headers, or be a drop of them."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("headers")
        else:
            self._wait("headers", self.header_seconds)

    def on_response_complete(self) -> None:
        """After an answer uvicorn's own timer runs, until the first byte of the next request."""
        super().on_response_complete()
        self._stop("headers")

    def pause_writing(self) -> None:
        """More is to be sent than the client takes."""
        super().pause_writing()
        self._wait("reader", self.stall_seconds)

    def resume_writing(self) -> None:
        """It has taken some."""
        super().resume_writing()
        self._stop("reader")

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for any more."""
        self._stop("headers")
        self._stop("reader")
        super().connection_lost(exc)

    def _wait(self, what: str, seconds: float) -> None:
        """Close the connection when `what` has not come in time; a timer that runs already keeps running."""
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()
