"""Server-sent events as OpenAI's clients read them.

It knows how an event is written, that a stream is never silent for long, and that whatever is behind it is ended the
moment its client has left; nothing of what the events say. Called by `api.delivery` and by what writes answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import ApiError, error_object
from api.schemas.base import Sent

DONE = b"data: [DONE]\n\n"
# Proxies end a connection on which nothing comes for a minute, some for half of one. A comment is something to them and
# nothing to whoever reads events.
KEEP_ALIVE_S = 10.0
COMMENT = b": keep-alive\n\n"


def event(message: Sent) -> bytes:
    """One message; JSON has no line breaks of its own, so it is one `data:` line."""
    return b"data: " + message.to_json().encode() + b"\n\n"


def named_event(name: str, message: Sent) -> bytes:
    """One message under its name, for clients that tell events apart by it."""
    return f"event: {name}\n".encode() + event(message)


def error_event(error: ApiError) -> bytes:
    """What a stream that has begun ends with where something goes wrong."""
    return b"data: " + json.dumps(error_object(error), ensure_ascii=False).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events, which come as whole events. Starlette stops it when the client leaves."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        end: Callable[[], Awaitable[None]],
        headers: Mapping[str, str] | None = None,
        keep_alive: bytes = COMMENT,
    ) -> None:
        """`end` is awaited when the stream is over, also where not one event was sent; `keep_alive` is sent when none
        came for KEEP_ALIVE_S."""
        # Proxies such as nginx would collect the events before they pass them on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._end = end
        self._keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()

    async def stream_response(self, send: Send) -> None:
        """A timer beside the events and not a timeout around each: there are thousands a second of them."""
        clock = asyncio.get_running_loop().time
        sent_at = clock()

        async def send_body(body: bytes, *, more: bool = True) -> None:
            nonlocal sent_at
            await send({"type": "http.response.body", "body": body, "more_body": more})
            sent_at = clock()

        async def break_silence() -> None:
            while True:
                left_s = sent_at + KEEP_ALIVE_S - clock()
                await (asyncio.sleep(left_s) if left_s > 0 else send_body(self._keep_alive))

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        breaking_silence = asyncio.create_task(break_silence(), name="keep-alive")
        try:
            async for event in self.body_iterator:
                assert isinstance(event, bytes)
                await send_body(event)
        finally:
            breaking_silence.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await breaking_silence
        await send_body(b"", more=False)
