"""The HTTP API: OpenAI's video API, and beside it events, cancelling, waiting, health, metrics and the web page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

from ...errors import RequestError, StoreUnavailable
from ...version import __version__
from ..workers.messages import FILES
from .access import AccessMiddleware, PrefixMiddleware
from .bodies import (
    DeletedVideo,
    ErrorBody,
    Generated,
    Generation,
    Health,
    ModelCard,
    ModelInfo,
    ModelList,
    Status,
    Video,
    VideoList,
    add_error_answers,
    openapi_body,
)
from .requests import Asked, read_create
from .rows import FINISHED
from .service import Version, VideoService

# The job store is asked, not a queue in memory: the runner may be in another process.
_POLL_SECONDS = 0.1
_PAGE = StaticFiles(directory=Path(__file__).parent / "page")
# The page needs nothing from anywhere else; whatever gets into it can load nothing and send nothing.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
# Where answers have another type, FastAPI would give it to the model of the errors too.
_JSON_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}} for code in _ERRORS
}
_BEARER = HTTPBearer(auto_error=False, description="A key of the service's key file.")

router = APIRouter(responses=_ERRORS)


def service_of(request: Request) -> VideoService:
    """The service behind this application."""
    service: VideoService = request.app.state.service
    return service


Service = Annotated[VideoService, Depends(service_of)]


def owner_of(
    request: Request, service: Service, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> str:
    """Whose key a request brings; the empty name where the service has no keys."""
    if service.keys is None:
        return ""
    owner = service.keys.owner(request.headers.get("authorization"))
    if owner is None:
        raise HTTPException(401, "a valid API key is needed: Authorization: Bearer KEY", {"www-authenticate": "Bearer"})
    return owner


Owner = Annotated[str, Depends(owner_of)]


def video_of(video_id: str, service: Service, owner: Owner) -> Video:
    """The video that a path names, if it is the caller's."""
    return _found(service.find(video_id, owner), video_id)


Found = Annotated[Video, Depends(video_of)]
IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=255, description="Repeating a key returns the same video.")
]


@router.post("/v1/videos", response_model=Video, openapi_extra=openapi_body())
async def create(
    request: Request, service: Service, owner: Owner, response: Response, idempotency_key: IdempotencyKey = None
) -> Video:
    """Queue a video. The header `x-ignored-fields` names fields of the request that do nothing."""
    asked = await read_create(request, service.takes_images)
    video, _ = await run_in_threadpool(service.submit, asked, owner, idempotency_key)
    response.headers.update(_ignored(asked))
    return video


@router.post(
    "/v1/videos/sync",
    response_class=FileResponse,
    openapi_extra=openapi_body(),
    responses={200: {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def create_and_wait(
    request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Make a video and answer with its file. When the client goes away, the video is cancelled."""
    asked = await read_create(request, service.takes_images)
    video = await _made(service, request, asked, owner, idempotency_key)
    path, media_type = service.file(video.id, "video")
    assert video.timing is not None, "a completed video has times"
    headers = {"x-video-id": video.id, "x-inference-time-s": f"{video.timing['total']:.3f}", **_ignored(asked)}
    return FileResponse(path, media_type=media_type, headers=headers)


@router.post("/v1/videos/generations", response_model=Generated, openapi_extra=openapi_body(Generation))
async def generate_and_wait(request: Request, service: Service, owner: Owner, response: Response) -> Generated:
    """The same for MLPerf's and TensorRT-LLM's clients, which take the file in base64, or only the path of its URL."""
    asked = await read_create(request, service.takes_images, Generation)
    video = await _made(service, request, asked, owner)
    response.headers.update(_ignored(asked))
    if asked.body.response_format == "video_path":
        return Generated(video_id=video.id, video_path=request.url_for("content", video_id=video.id).path)
    path, _ = service.file(video.id, "video")
    file = await run_in_threadpool(path.read_bytes)
    return Generated(video_id=video.id, video_bytes=base64.b64encode(file).decode())


@router.get("/v1/videos")
def list_videos(
    service: Service,
    owner: Owner,
    after: Annotated[
        str | None, Query(max_length=200, description="Id of the last video of the previous page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    status: Annotated[
        list[Status] | None, Query(description="Only videos of this status; may be repeated for several.")
    ] = None,
) -> VideoList:
    """List your videos, newest first unless told otherwise."""
    newest_first = order == "desc"
    videos, more = service.list(owner, after=after, limit=limit, newest_first=newest_first, statuses=status or ())
    ids = [video.id for video in videos]
    return VideoList(data=videos, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=more)


@router.get("/v1/videos/{video_id}")
def retrieve(video: Found, response: Response) -> Video:
    """Tell how a video goes."""
    # The openai client asks again after this time.
    response.headers["openai-poll-after-ms"] = "500"
    return video


@router.delete("/v1/videos/{video_id}")
def delete(video_id: str, service: Service, owner: Owner) -> DeletedVideo:
    """Remove a video and its files; one that is still being made is cancelled first."""
    if not service.delete(video_id, owner):
        raise _missing(video_id)
    return DeletedVideo(id=video_id)


@router.post("/v1/videos/{video_id}/cancel")
def cancel(video_id: str, service: Service, owner: Owner) -> Video:
    """Cancel a video: at once while it is queued, within one step while it is made; a finished one stays as it is."""
    return _found(service.cancel(video_id, owner), video_id)


@router.get("/v1/videos/{video_id}/events", response_class=EventSourceResponse, responses=_JSON_ERRORS)
async def events(video: Found, service: Service, owner: Owner) -> AsyncIterator[ServerSentEvent]:
    """Follow a video by server-sent events: queued, starting, step, decoding, then completed, failed or cancelled.

    The data is the video, and in a `step` the field `preview` where there is a new picture (a data URL). Steps that are
    quicker than ten in a second are told together.
    """
    version: Version = (-1, None)
    shown, id = -1, video.id
    while not service.stopping:
        change = picture = None
        with contextlib.suppress(StoreUnavailable):
            try:
                change = await run_in_threadpool(service.changed, id, owner, version)
            except KeyError:
                return
            if change is not None and change[0].status == "in_progress":
                picture = await run_in_threadpool(service.preview, id, shown)
        if change is not None:
            video, version = change
            data = video.model_dump()
            if picture is not None:
                shown = picture[0]
                data["preview"] = f"data:image/webp;base64,{base64.b64encode(picture[1]).decode()}"
            name = video.status if video.status != "in_progress" else video.stage
            yield ServerSentEvent(event="step" if name == "denoising" else name, data=data)
            if video.status in FINISHED:
                return
        await asyncio.sleep(_POLL_SECONDS)


@router.api_route(
    "/v1/videos/{video_id}/content",
    methods=["GET"],
    response_class=FileResponse,
    responses={
        code: {
            "content": {kind: {"schema": {"type": "string", "format": "binary"}} for _, kind in FILES.values()},
            "description": text,
        }
        for code, text in ((200, "The file."), (206, "The part of it that Range asked for."))
    },
)
def content(
    video: Found,
    service: Service,
    variant: Literal["video", "thumbnail", "spritesheet", "heatmap", "report"] = "video",
) -> FileResponse:
    """Download a completed video, or a picture, map or report of it; Range requests are honoured."""
    if video.status != "completed":
        raise RequestError(f"video {video.id} is {video.status}; its content is available when it is completed")
    path, media_type = service.file(video.id, variant)
    return FileResponse(
        path,
        media_type=media_type,
        filename=f"{video.id}-{path.name}",
        content_disposition_type="inline",
        headers={"cache-control": "private, max-age=3600"},
    )


@router.get("/v1/models")
def list_models(service: Service, owner: Owner) -> ModelList:
    """List the model that is served."""
    return ModelList(data=[service.card()])


@router.get("/v1/models/{model:path}")
def retrieve_model(model: str, service: Service, owner: Owner) -> ModelCard:
    """Describe the model that is served."""
    if model != service.model:
        raise HTTPException(404, f"model {model[:80]!r} is not served here; this service has {service.model!r}")
    return service.card()


@router.get("/v1/model_info")
def model_info(service: Service, owner: Owner) -> ModelInfo:
    """Name the model that is served, for SGLang's clients."""
    return ModelInfo(model_path=service.model)


@router.get("/health", responses={503: {"model": Health}})
def health(service: Service, response: Response) -> Health:
    """Say whether a job could run now."""
    trouble = service.trouble
    response.status_code = 200 if trouble is None else 503
    return Health(status="healthy" if trouble is None else "unhealthy", reason=trouble)


@router.get("/ready", responses={503: {"model": Health}})
def ready(service: Service, response: Response) -> Health:
    """Say whether jobs are taken; they may have to wait until one can run."""
    reason = service.refusal
    response.status_code = 200 if reason is None else 503
    return Health(status="healthy" if reason is None else "unhealthy", reason=reason)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(service: Service) -> Response:
    """All metrics, for Prometheus."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The web page."""
    return await page_file("index.html", request)


@router.get("/docs", include_in_schema=False)
async def documentation(request: Request) -> Response:
    """The description of the API, for people; for programs it is at /openapi.json."""
    return await page_file("docs.html", request)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    """What the web page is made of."""
    try:
        response = await _PAGE.get_response(name, request.scope)
    except HTTPException as error:
        raise HTTPException(404, "there is no such file") from error
    response.headers.update({"content-security-policy": _PAGE_POLICY, "cache-control": "no-cache"})
    return response


async def _made(
    service: VideoService, request: Request, asked: Asked, owner: str, idempotency_key: str | None = None
) -> Video:
    """Make a video and wait for it.

    Raises:
        HTTPException: it was not completed.
    """
    queued, _ = await run_in_threadpool(service.submit, asked, owner, idempotency_key)
    video = await _finished(service, request, queued.id, owner)
    if video is None:
        raise HTTPException(503, f"the wait for video {queued.id} was interrupted; fetch it by its id")
    if video.status != "completed":
        assert video.error is not None, "a video that is not completed says why"
        raise HTTPException(400 if video.error.code == "invalid_request" else 500, video.error.message)
    return video


async def _finished(service: VideoService, request: Request, id: str, owner: str) -> Video | None:
    """Wait until a video is finished; cancel it when the client goes away.

    Returns:
        The video; None if the client is gone, the video was deleted or the service stops.
    """
    finished = False
    try:
        while not service.stopping:
            with contextlib.suppress(StoreUnavailable):
                video = await run_in_threadpool(service.find, id, owner)
                if video is None or video.status in FINISHED:
                    finished = True
                    return video
            if await request.is_disconnected():
                return None
            await asyncio.sleep(_POLL_SECONDS)
        finished = True  # it resumes when the service starts again
        return None
    finally:
        if not finished:
            # Not awaited: where the server cancels this task there is no time left.
            with contextlib.suppress(StoreUnavailable):
                service.cancel(id, owner)


def _ignored(asked: Asked) -> dict[str, str]:
    return {"x-ignored-fields": ", ".join(asked.ignored)} if asked.ignored else {}


def _found(video: Video | None, video_id: str) -> Video:
    if video is None:
        raise _missing(video_id)
    return video


def _missing(video_id: str) -> HTTPException:
    return HTTPException(404, f"there is no video {video_id[:80]!r}")


def create_app(service: VideoService) -> FastAPI:
    """The application of a service, which it starts and stops with itself.

    Under uvicorn and as a Ray Serve ingress alike.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(service.start)
        try:
            yield
        finally:
            await run_in_threadpool(service.stop)

    app = FastAPI(
        title="heterostep",
        version=__version__,
        description="Videos from text. Compatible with OpenAI's video API.",
        lifespan=lifespan,
        # FastAPI's own page loads scripts of others from elsewhere, into the origin that holds the user's key.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    add_error_answers(app, service.retry_after)

    def counted(method: str, route: str, status: int) -> None:
        service.metrics.count("heterostep_http_requests", method=method, route=route, code=str(status))

    app.add_middleware(AccessMiddleware, allowed_hosts=service.settings.allowed_hosts, counted=counted)
    app.add_middleware(PrefixMiddleware, root_path=service.settings.root_path)
    return app
