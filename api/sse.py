"""Server-sent events as OpenAI's clients read them.

It knows how an event is written and that whatever is behind a stream is ended the moment its client has left, and
nothing of what the events say. Called by the routes that stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import ApiError, error_object
from api.schemas.base import Sent

DONE = b"data: [DONE]\n\n"


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
    """A stream of events. Starlette stops it when the client leaves."""

    def __init__(
        self, events: AsyncIterator[bytes], end: Callable[[], Awaitable[None]], headers: Mapping[str, str] | None = None
    ) -> None:
        """`end` is awaited when the stream is over, also where not one event was sent."""
        # Proxies such as nginx would collect the events before they pass them on.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()
