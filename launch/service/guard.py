"""What every HTTP request passes first: who may call from where, how much and how slowly, and what is logged of it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .logs import say
from .security import stranger

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


class Guard:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: Sequence[str], counted: Callable[[str, str, int], None]) -> None:
        """Wrap an application.

        Args:
            app: the application.
            allowed_hosts: as in `security.stranger`.
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
        strange = stranger(headers.get("host", ""), headers.get("origin"), self._allowed_hosts)
        if strange is not None:
            return 403, strange
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
