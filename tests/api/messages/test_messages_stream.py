"""The stream of /v1/messages in front of a scripted rank 0: its events in Anthropic's order, and its errors."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.protocol import Cancel, SequenceOutput, StepOutput
from tests.api.messages.test_messages import ROOM_FOR_TOOLS, WEATHER, WEATHER_CALL, assert_anthropic_error, post
from tests.api.served_app import run, served

Event = dict[str, Any]


def events(text: str) -> list[Event]:
    """Their data; each is named as its type is."""
    found = []
    for written in text.removesuffix("\n\n").split("\n\n"):
        name, data = written.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def blocks(stream: list[Event]) -> list[list[Event]]:
    """The events of each content block, in the order of their indices and between their start and their stop."""
    start, *inner, message_delta, stop = stream
    assert (start["type"], message_delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    found: list[list[Event]] = []
    for event in inner:
        if event["type"] == "content_block_start":
            assert not found or found[-1][-1]["type"] == "content_block_stop"
            found.append([])
        found[-1].append(event)
        assert event["index"] == len(found) - 1
    assert all(block[-1]["type"] == "content_block_stop" for block in found)
    return found


def told(block: list[Event], field: str) -> str:
    return "".join(event["delta"][field] for event in block if field in event.get("delta", {}))


def test_a_stream_has_anthropic_s_events_in_anthropic_s_order(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            submit = await app.answer("one", " two", num_cached_tokens=3)
            response = await asking
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["request-id"] == response.headers["x-request-id"]
            stream = events(response.text)
            message = stream[0]["message"]
            assert (message["id"], message["role"], message["content"]) == (submit.request_id, "assistant", [])
            assert (message["stop_reason"], message["stop_sequence"]) == (None, None)
            usage = {"input_tokens": len(submit.prompt_token_ids) - 3, "cache_read_input_tokens": 3, "output_tokens": 0}
            assert message["usage"] | usage == message["usage"]
            (block,) = blocks(stream)
            assert block[0]["content_block"] == {"type": "text", "text": ""}
            assert {event["delta"]["type"] for event in block[1:-1]} == {"text_delta"}
            assert told(block, "text") == "one two"
            assert stream[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
            num_output = len(app.ids("one")) + len(app.ids(" two")) + 1
            assert stream[-2]["usage"]["output_tokens"] == num_output

    run(test())


def test_a_stop_sequence_ends_the_stream_and_frees_the_place(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True, stop_sequences=["o th"])
            submit = await app.answer("one", " two", " three", finish_reason=None)
            assert await app.engine.read() == Cancel(submit.request_id)
            stream = events((await asking).text)
            assert told(blocks(stream)[0], "text") == "one tw"
            assert stream[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "o th"}

    run(test())


def test_an_empty_answer_streams_no_block(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            await app.answer()
            stream = events((await asking).text)
            assert [event["type"] for event in stream] == ["message_start", "message_delta", "message_stop"]

    run(test())


def test_calls_are_streamed_as_pieces_of_their_input(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, ROOM_FOR_TOOLS) as app:
            asking = post(app, stream=True, tools=[WEATHER])
            # A step for every few letters: neither a marker's border nor a string's is a step's.
            pieces = [WEATHER_CALL[place : place + 5] for place in range(0, len(WEATHER_CALL), 5)]
            await app.answer("one moment", *pieces, WEATHER_CALL)
            stream = events((await asking).text)
            text, *calls = blocks(stream)
            assert told(text, "text") == "one moment"
            for call in calls:
                assert (
                    call[0]["content_block"] | {"type": "tool_use", "name": "weather", "input": {}}
                    == call[0]["content_block"]
                )
                assert json.loads(told(call, "partial_json")) == {"city": "Oslo"}
            assert len({call[0]["content_block"]["id"] for call in calls}) == 2
            assert len([event for event in calls[0] if event["type"] == "content_block_delta"]) > 1
            assert stream[-2]["delta"]["stop_reason"] == "tool_use"

    run(test())


def test_an_error_before_the_first_token_is_an_http_status(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            submit = await app.submitted()
            output = SequenceOutput(submit.request_id, finish_reason="error", error="the prompt cannot be held")
            app.engine.send(StepOutput([output]))
            assert assert_anthropic_error(await asking, 500, "api_error") == "the prompt cannot be held"

    run(test())


def test_an_error_after_the_first_token_is_the_last_event(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            submit = await app.answer("one", finish_reason=None)
            await app.until(lambda: len(app.client.generations[submit.request_id].output_token_ids) > 0)
            output = SequenceOutput(submit.request_id, finish_reason="error", error="it broke")
            app.engine.send(StepOutput([output]))
            response = await asking
            *_, last = events(response.text)
            assert response.status_code == 200
            error = {"type": "api_error", "message": "it broke"}
            assert last == {"type": "error", "error": error, "request_id": response.headers["request-id"]}

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(
    tmp_path: Path, tiny_chat_model: Path, stream: bool, caplog: pytest.LogCaptureFixture
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            caplog.set_level("INFO")
            asking = post(app, stream=stream)
            submit = await app.answer("one", finish_reason=None)
            asking.cancel()
            assert await app.engine.read() == Cancel(submit.request_id)
            await app.until(lambda: "the client left" in caplog.text)
            await asyncio.gather(asking, return_exceptions=True)

    run(test())
