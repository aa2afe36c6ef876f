"""The path under which clients see the endpoint, where a proxy stands before it: an ASGI middleware."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OWN = ("v1", "docs", "redoc", "openapi.json", "static-offline-docs", "healthz", "readyz", "metrics", "-")
"""First parts of the endpoint's own paths, which no prefix may begin with: a request could be read in two ways. "-" is
Ray Serve's."""


class Prefix:
    """Puts every request below `root_path`: with and without it in front the same path is meant.

    One proxy takes the prefix away before it passes a request on, another leaves it there. Ray Serve's `route_prefix`
    is a prefix that is left there; where `root_path` is empty it is the one that clients see.

    The application finds the prefix in `scope["root_path"]`, and all of the path, prefix included, in `scope["path"]`,
    as ASGI has it. Redirects of the application name a path alone: which host, port and scheme clients see, only the
    proxy knows, and a Host header that somebody made up leads nowhere.
    """

    def __init__(self, app: ASGIApp, root_path: str = ""):
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        mounted = scope.get("root_path", "").rstrip("/")
        prefix = self.root_path or mounted
        path, raw = _below(prefix, scope["path"]), scope.get("raw_path")
        if path is None:  # the proxy took the prefix away
            path = _below(mounted, scope["path"]) or scope["path"]
            raw = raw and prefix.encode() + raw.removeprefix(mounted.encode())
        scope = {**scope, "root_path": prefix, "path": prefix + path, "raw_path": raw}

        async def relative(message: Message) -> None:
            if message["type"] == "http.response.start" and 300 <= message["status"] < 400:
                message["headers"] = [
                    (name, _path_of(value) if name.lower() == b"location" else value)
                    for name, value in message.get("headers", ())
                ]
            await send(message)

        await self.app(scope, receive, relative)


def route_path(scope: Scope) -> str:
    """The path of a request without the prefix: the same however the endpoint was reached."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _below(prefix: str, path: str) -> str | None:
    """What follows `prefix` in `path`, beginning with a slash; None where the path is not below it."""
    if path == prefix or path.startswith(prefix + "/"):
        return path[len(prefix) :] or "/"
    return None


def _path_of(location: bytes) -> bytes:
    """Without scheme and host; nor can what follows them be taken for a host."""
    return b"/" + re.sub(rb"^[a-z]+://[^/]*", b"", location).lstrip(b"/")
