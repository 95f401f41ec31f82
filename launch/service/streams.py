"""Waiting for a video: a stream of server-sent events, and the wait for its end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator

from fastapi.concurrency import run_in_threadpool
from starlette.requests import Request

from .condition import StoreUnavailable
from .schemas import Video
from .service import Version, VideoService

# The job store is asked, not a queue in memory: the runner may be in another process, and a slow client gets the
# newest state instead of a backlog.
_POLL_SECONDS = 0.1
_KEEP_ALIVE_SECONDS = 15.0
FINISHED = ("completed", "failed", "cancelled")


async def video_events(service: VideoService, id: str, owner: str) -> AsyncIterator[str]:
    """Tell how a video goes, until it is finished, deleted, or the service stops.

    Event names: `queued`, `starting`, `step`, `decoding`, then `completed`, `failed` or `cancelled`. The data is the
    video, and in a `step` the field `preview` where there is a new picture (a data URL). Steps that are quicker than
    ten in a second are told together.
    """
    version: Version = (-1, None)
    shown, quiet = -1, 0.0
    while not service.stopping:
        try:
            change = await run_in_threadpool(service.changed, id, owner, version)
        except KeyError:
            return
        except StoreUnavailable:
            change = None
        if change is None:
            quiet += _POLL_SECONDS
            if quiet >= _KEEP_ALIVE_SECONDS:
                quiet = 0.0
                yield ": still here\n\n"
        else:
            quiet = 0.0
            video, version = change
            data = video.model_dump()
            picture = None
            with contextlib.suppress(StoreUnavailable):
                if video.status == "in_progress":
                    picture = await run_in_threadpool(service.preview, id, shown)
            if picture is not None:
                shown = picture[0]
                data["preview"] = f"data:image/webp;base64,{base64.b64encode(picture[1]).decode()}"
            name = video.status if video.status != "in_progress" else video.stage
            yield f"event: {'step' if name == 'denoising' else name}\ndata: {json.dumps(data)}\n\n"
            if video.status in FINISHED:
                return
        await asyncio.sleep(_POLL_SECONDS)


async def wait_for(service: VideoService, request: Request, id: str, owner: str) -> Video | None:
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
        finished = True  # it goes on when the service starts again
        return None
    finally:
        if not finished:
            # Not awaited: where the server cancels this task there is no time left.
            with contextlib.suppress(StoreUnavailable):
                service.cancel(id, owner)
