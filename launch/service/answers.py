"""Answers that are not videos: errors in OpenAI's form, and the description of a body that FastAPI cannot see."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from ...errors import BadField, FileGone, QueueFull, RequestError, StoreUnavailable
from .logs import say
from .schemas import CreateVideo

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# Calls of OpenAI's client by the end of their path, and what to do instead.
_NOT_SERVED = {
    "remix": "videos are not remixed here; make a new one with POST /v1/videos: with the same seed it stays alike",
    "edits": "videos are not edited here; make a new one with POST /v1/videos: with the same seed it stays alike",
    "extensions": "videos are not extended here; make a longer one with POST /v1/videos (num_frames or seconds)",
    "characters": "characters are not kept here; describe them in the prompt of POST /v1/videos",
}
_CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 408: "timeout"}


def error_answer(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """One sentence for people and a code for programs, as the openai client expects them."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}
    return JSONResponse({"error": error}, status, headers)


def add_error_answers(app: FastAPI, retry_after: Callable[[], int]) -> None:
    """Turn every exception into an answer of that form.

    Args:
        app: the application.
        retry_after: seconds after which a place in the queue should be free.
    """

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405 or "endpoint" not in request.scope:
            return _no_route(request)
        return error_answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return error_answer(400, f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}", param=name)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_answer(400, str(error), param=error.param if isinstance(error, BadField) else None)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        headers = {"retry-after": str(retry_after())}
        return error_answer(429, str(error), code="queue_full", headers=headers)

    @app.exception_handler(StoreUnavailable)
    async def unavailable(request: Request, error: StoreUnavailable) -> Response:
        # Not logged: the store has said it, once.
        return error_answer(503, str(error), headers={"retry-after": "5"})

    @app.exception_handler(FileGone)
    async def gone(request: Request, error: FileGone) -> Response:
        return error_answer(410, str(error), code="file_gone")

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # to nobody

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        say("request failed", logging.ERROR, error=type(error).__name__)
        return error_answer(500, "the service failed; its log says more")


def _no_route(request: Request) -> JSONResponse:
    """404 where nothing has this path, else 405 and what it takes."""
    routes, scope, path = request.app.router.routes, request.scope, request.url.path
    allowed = [
        method
        for method in _METHODS
        if any(
            route.matches({**scope, "method": "GET" if method == "HEAD" else method})[0] is Match.FULL
            for route in routes
        )
    ]
    missing = _NOT_SERVED.get(path.rpartition("/")[2]) if "/v1/videos/" in path else None
    if not allowed:
        return error_answer(404, missing or f"there is nothing at {path[:80]!r}; /docs lists what there is")
    message = f"{path[:80]!r} takes {', '.join(allowed)}, not {request.method[:20]}"
    return error_answer(405, missing or message, headers={"allow": ", ".join(allowed)})


def openapi_body() -> dict[str, Any]:
    """The body of a request for a video, as JSON or as a form with an image."""
    schema = CreateVideo.model_json_schema()
    form = {**schema, "properties": {**schema["properties"], "input_reference": {"type": "string", "format": "binary"}}}
    kinds = {
        "application/json": {"schema": schema},
        "multipart/form-data": {"schema": form},
        "application/x-www-form-urlencoded": {"schema": schema},
    }
    return {"requestBody": {"required": True, "content": kinds}}
