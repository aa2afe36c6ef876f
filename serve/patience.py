"""Who sends too slowly is not waited for: an ASGI middleware around the application."""

from __future__ import annotations

import asyncio

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GRACE_S = 20
BYTES_PER_S = 16_384


class Patience:
    """A body has to come within `grace_s` seconds and one more for every `bytes_per_s` bytes of it; else 408.

    A request under way has a place that others wait for. A client that stops in the middle of its body, or sends a byte
    now and then, would keep it for as long as the proxy keeps the connection, which is an hour. How long the
    application thinks, and what comes after the body, is not timed.
    """

    def __init__(self, app: ASGIApp, grace_s: float = GRACE_S, bytes_per_s: float = BYTES_PER_S):
        self.app, self.grace_s, self.bytes_per_s = app, grace_s, bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        waited, count, more = 0.0, 0, True

        async def timed() -> Message:
            nonlocal waited, count, more
            if not more:
                return await receive()
            clock = asyncio.get_running_loop().time
            began = clock()
            try:
                async with asyncio.timeout(self.grace_s + count / self.bytes_per_s - waited):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, "the body comes too slowly: send it at once, or less of it", {"Connection": "close"}
                ) from None
            waited += clock() - began
            count += len(message.get("body", b""))
            more = message.get("more_body", False)
            return message

        await self.app(scope, timed, send)
