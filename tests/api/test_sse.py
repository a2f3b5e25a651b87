import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from api.errors import Stalled
from api.schemas.base import Sent
from api.sse import EventStream, error_event, event


class Said(Sent):
    text: str


def test_an_event_is_one_data_line_and_a_blank_one():
    encoded = event(Said(text="line\nbreak ü"))
    assert encoded.startswith(b"data: {")
    assert encoded.endswith(b"}\n\n")
    assert encoded.count(b"\n") == 2
    assert json.loads(encoded.removeprefix(b"data: "))["text"] == "line\nbreak ü"


def test_an_error_in_a_stream_is_openai_s_error_object():
    error = json.loads(error_event(Stalled("no progress")).removeprefix(b"data: "))["error"]
    assert error == {"message": "no progress", "type": "server_error", "param": None, "code": "timeout"}


@pytest.mark.parametrize("leaves", ["at once", "after an event"])
def test_what_is_behind_a_stream_is_ended_when_the_client_leaves(leaves: str):
    ended = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"data: 1\n\n"
            await asyncio.sleep(0)

    async def end() -> None:
        ended.set()

    async def run() -> None:
        sent = asyncio.Event()

        async def receive() -> Any:
            if leaves == "after an event":
                await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.set()

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        async with asyncio.timeout(5):
            await EventStream(endless(), end)(scope, receive, send)

    asyncio.run(run())
    assert ended.is_set()
