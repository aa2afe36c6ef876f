"""Who comes in before anything of a request is read: ASGI middlewares around the application."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_READS = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::[0-9]{1,5})?")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach, or come from, `host`: a name or an address without a port."""
    if host in ("127.0.0.1", "::1", "localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class Loopback:
    """While `active()`, that is while no keys are required, only programs of this machine are served; others get 403.

    Three ways in are closed. Other machines: the peer must have a loopback address. A page of another site whose name
    was rebound to 127.0.0.1 (DNS rebinding): the Host header must name this machine. A page of another site that sends
    forms here, which browsers allow without asking: what is not a read must have no Origin, that of Host, or one of
    `origins`, the allowed origins of CORS.

    The peer is `scope["client"]`. Under direct ingress (behind HAProxy) that is what the replica's uvicorn saw: HAProxy
    on the same machine, which listens on loopback itself, or whoever came past it to the replica's port, which Ray
    binds to all interfaces. Behind the Python proxy it is what the proxy's uvicorn saw; Serve hands the scope on
    unchanged. uvicorn replaces a loopback peer by the one that a forwarding proxy names in X-Forwarded-For. A peer that
    is not told (None, as on Unix sockets) is refused: it cannot be shown to be local.
    """

    def __init__(self, app: ASGIApp, active: Callable[[], bool], origins: Collection[str] = ()):
        self.app, self.active = app, active
        self.origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] != "lifespan" and self.active() else None
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await JSONResponse({"detail": problem}, 403)(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        peer = scope.get("client")
        if peer is None or not is_loopback(peer[0]):
            return "without API keys only this machine is served: make one with 'osml keys'"
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not is_loopback(_host_name(hosts[0].lower())):
            return "without API keys the Host header must be localhost, 127.0.0.1 or [::1]"
        if scope.get("method") not in _READS:  # opening a WebSocket has no method, and is no read
            for origin in headers.getlist("origin"):
                if origin.lower().partition("://")[2] != hosts[0].lower() and origin.lower() not in self.origins:
                    return "pages of other sites may not change anything here: allow their origin under cors"
        return None


def _host_name(host: str) -> str:
    """Of a Host header: without the port, and without the brackets of IPv6."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]) if match else ""


class Admission:
    """At most `limit` requests of /v1 in this process at once; above it 503 with Retry-After, the body unread.

    What is not of /v1 (/healthz, /readyz, /metrics) always passes.
    """

    def __init__(self, app: ASGIApp, limit: int, retry_after_s: int = 1):
        self.app, self.limit, self.retry_after_s = app, limit, retry_after_s
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(scope.get("root_path", "") + "/v1/"):
            await self.app(scope, receive, send)
        elif self.active >= self.limit:
            problem = f"{self.limit} requests are under way: try again after {self.retry_after_s} s"
            headers = {"Retry-After": str(self.retry_after_s)}
            await JSONResponse({"detail": problem}, 503, headers)(scope, receive, send)
        else:
            self.active += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.active -= 1
