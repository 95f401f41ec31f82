"""The service under a path of a site, such as https://host/video/, behind a proxy."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .settings import is_path_prefix


class Prefix:
    """ASGI middleware that tells the application under which path clients reach it.

    The path is `root_path`, or else what the proxy says in X-Forwarded-Prefix. A header that is no path is ignored.
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
