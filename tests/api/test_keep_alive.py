"""A stream on which nothing comes for long is begun and kept alive: readers do not notice, and errors still tell."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import APIStatusError as AnthropicError
from anthropic import AsyncAnthropic
from openai import APIError, AsyncOpenAI

from api import sse
from api.errors import EngineFailure
from api.messages.format import PING
from server.protocol import Cancel, Submit
from tests.api.served_app import Served, run, served

HELLO = {"role": "user", "content": "hello"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [HELLO]},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": [HELLO], "max_tokens": 9},
}
every_endpoint = pytest.mark.parametrize("path", BODIES)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)


def keep_alive(path: str) -> bytes:
    return PING if path == "/v1/messages" else sse.COMMENT


def asked(path: str) -> dict[str, Any]:
    return {"model": "tiny", "stream": True, **BODIES[path]}


class Reader:
    """A client that reads a stream's bytes as they come."""

    def __init__(self, app: Served, path: str) -> None:
        self.received = b""
        self.status = 0
        self.task = asyncio.create_task(self._read(app, path))

    async def _read(self, app: Served, path: str) -> None:
        async with app.http.stream("POST", path, json=asked(path)) as response:
            self.status = response.status_code
            async for data in response.aiter_raw():
                self.received += data


@every_endpoint
def test_a_stream_that_waits_is_begun_and_never_silent(tmp_path: Path, tiny_chat_model: Path, path: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            reader = Reader(app, path)
            alive = keep_alive(path)
            await app.until(lambda: reader.received.count(alive) >= 2)
            assert reader.status == 200
            assert reader.received == alive * reader.received.count(alive), "nothing else before the first token"
            submit = await app.answer("one", finish_reason=None)
            await app.until(lambda: reader.received.replace(alive, b"") != b"")
            count = reader.received.count(alive)
            await app.until(lambda: reader.received.count(alive) >= count + 2)
            app.engine.step(submit.request_id, *app.ids(" two"), submit.stop_token_ids[0], finish_reason="stop")
            await reader.task
            parts = reader.received.split(b"\n\n")
            assert all(part.startswith((b"data: ", b"event: ", b": ")) for part in parts if part), "events stay whole"

    run(test())


@every_endpoint
def test_what_goes_wrong_in_a_begun_stream_is_an_event(tmp_path: Path, tiny_chat_model: Path, path: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, request_timeout=0.01) as app:
            reader = Reader(app, path)
            await app.until(lambda: bool(reader.received))
            app.client.suspend()
            await asyncio.sleep(0.02)
            app.client.expire("waiting for mac2")
            await reader.task
            assert reader.status == 200
            data = [line for line in reader.received.decode().splitlines() if line.startswith("data: ")]
            written = [json.loads(line.removeprefix("data: ")) for line in data]
            (error,) = [event["error"] for event in written if "error" in event]
            assert "waiting for mac2" in error["message"]
            if path == "/v1/responses":
                assert [event["type"] for event in written] == ["error", "response.failed"]
            app.client.serve(app.client.ready)  # pyright: ignore[reportArgumentType]
            assert isinstance(await app.engine.read(), Submit)

    run(test())


@pytest.mark.parametrize("has_ring", [True, False], ids=["queued", "no ring"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_frees_its_place(
    tmp_path: Path, tiny_chat_model: Path, has_ring: bool, stream: bool
):
    async def test() -> None:
        path = "/v1/chat/completions"
        async with served(tmp_path, tiny_chat_model) as app:
            if not has_ring:
                app.client.suspend()
                app.supervisor.state = "restarting"
            asking = asyncio.create_task(app.http.post(path, json={**asked(path), "stream": stream}))
            await app.until(lambda: bool(app.client.generations))
            await asyncio.sleep(3 * sse.KEEP_ALIVE_S)  # the stream has begun, or would have
            asking.cancel()
            await app.until(lambda: not app.client.generations)
            if has_ring:
                assert isinstance(await app.engine.read(), Submit)
                assert isinstance(await app.engine.read(), Cancel)

    run(test())


def test_openai_s_sdk_reads_a_stream_that_was_kept_alive(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with (
            served(tmp_path, tiny_chat_model) as app,
            AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as sdk,
        ):
            stream = await sdk.chat.completions.create(model="tiny", messages=[HELLO], stream=True)  # type: ignore[list-item]
            await app.answer("one", " two")
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "one two"
            stream = await sdk.responses.create(model="tiny", input="hello", stream=True)
            await app.answer("one", " two")
            assert [event.type async for event in stream][-1] == "response.completed"
            stream = await sdk.completions.create(model="tiny", prompt="hello", stream=True)
            app.client.fail_all(EngineFailure("the ring is lost"))
            with pytest.raises(APIError, match="is lost"):
                [chunk async for chunk in stream]

    run(test())


def test_anthropic_s_sdk_reads_a_stream_that_was_kept_alive(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with (
            served(tmp_path, tiny_chat_model) as app,
            AsyncAnthropic(base_url=app.url, api_key="none", max_retries=0) as sdk,
        ):
            about: Any = {"model": "tiny", "max_tokens": 9, "messages": [HELLO]}
            async with sdk.messages.stream(**about) as stream:  # returns with the headers: the stream has begun
                await app.answer("one", " two")
                assert "".join([text async for text in stream.text_stream]) == "one two"
            async with sdk.messages.stream(**about) as stream:
                app.client.fail_all(EngineFailure("the ring is lost"))
                with pytest.raises(AnthropicError, match="is lost"):
                    await stream.get_final_message()

    run(test())


def test_what_goes_wrong_soon_is_still_an_http_status(
    tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 60)

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, request_timeout=0.01) as app:
            asking = asyncio.create_task(app.http.post("/v1/completions", json=asked("/v1/completions")))
            await app.until(lambda: bool(app.client.generations))
            app.client.suspend()
            await asyncio.sleep(0.02)
            app.client.expire("waiting for mac2")
            answer: httpx.Response = await asking
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert "waiting for mac2" in answer.json()["error"]["message"]

    run(test())
