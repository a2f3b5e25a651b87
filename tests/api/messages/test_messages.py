"""/v1/messages in front of a scripted rank 0: what Anthropic's clients send, and the one object that they get."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.protocol import SequenceOutput, StepOutput, Submit
from tests.api.served_app import Served, run, served

MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
BODY = {"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}
COUNTED = {"model": "tiny", "messages": BODY["messages"]}
WEATHER = {
    "name": "weather",
    "description": "How the weather is",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ROOM_FOR_TOOLS = {"max_sequence_length": 2000}
WEATHER_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def post(app: Served, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(app.http.post(MESSAGES, json={**BODY, **fields}))


def assert_anthropic_error(response: httpx.Response, status: int, kind: str) -> str:
    """Its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return body["error"]["message"]


def test_an_answer_has_anthropic_s_shape(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app)
            submit = await app.answer("one", " two", num_cached_tokens=3)
            response = await asking
            assert response.headers["request-id"] == response.headers["x-request-id"]
            num_output = len(app.ids("one")) + len(app.ids(" two")) + 1
            assert response.json() == {
                "id": submit.request_id,
                "type": "message",
                "role": "assistant",
                "model": "tiny",
                "content": [{"type": "text", "text": "one two"}],
                "stop_reason": "end_turn",
                "stop_sequence": None,
                "usage": {
                    "input_tokens": len(submit.prompt_token_ids) - 3,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 3,
                    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
                    "output_tokens": num_output,
                    "output_tokens_details": {"thinking_tokens": 0},
                    "service_tier": "standard",
                },
            }
            assert submit.request_id.startswith("msg_")
            assert (submit.max_tokens, submit.max_tokens_given) == (20, True)

    run(test())


def test_the_prompt_is_that_of_the_same_chat(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            texts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
            asking = post(app, system="be brief", messages=[{"role": "user", "content": texts}])
            submit = await app.answer("one")
            await asking
            chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one\ntwo"}]
            body = {"model": "tiny", "messages": chat}
            asking = asyncio.create_task(app.http.post("/v1/chat/completions", json=body))
            assert (await app.answer("one")).prompt_token_ids == submit.prompt_token_ids
            await asking

    run(test())


def test_an_empty_answer_has_no_blocks(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app)
            await app.answer()
            answer = (await asking).json()
            assert (answer["content"], answer["stop_reason"]) == ([], "end_turn")
            assert answer["usage"]["output_tokens"] == 1

    run(test())


def test_the_stop_sequence_that_was_found_is_named(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stop_sequences=[*"456789", "o th"])
            await app.answer("one", " two", " three", finish_reason=None)
            answer = (await asking).json()
            assert answer["content"] == [{"type": "text", "text": "one tw"}]
            assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "o th")

    run(test())


async def cut_off(app: Served) -> Submit:
    """The next request's answer is one token, and its limit is reached."""
    submit = await app.submitted()
    app.engine.step(submit.request_id, app.ids("one")[0], finish_reason="length", start=True)
    return submit


def test_the_limit_and_the_end_of_the_context_are_told_apart(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 40}) as app:
            asking = post(app, max_tokens=1)
            assert (await cut_off(app)).max_tokens == 1
            assert (await asking).json()["stop_reason"] == "max_tokens"
            asking = post(app, max_tokens=32_000)
            submit = await cut_off(app)
            assert submit.max_tokens == 40 - len(submit.prompt_token_ids)
            assert (await asking).json()["stop_reason"] == "model_context_window_exceeded"

    run(test())


def test_a_prompt_that_is_too_long_is_said_in_anthropic_s_words(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 20}) as app:
            response = await post(app, messages=[{"role": "user", "content": "one two three " * 20}])
            assert "prompt is too long" in assert_anthropic_error(response, 400, "invalid_request_error")

    run(test())


def test_no_tokens_warm_the_cache_and_answer_nothing(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, max_tokens=0)
            assert (await cut_off(app)).max_tokens == 1
            answer = (await asking).json()
            assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
            assert answer["usage"]["output_tokens"] == 0

    run(test())


def test_calls_are_blocks_in_the_order_they_were_written(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, ROOM_FOR_TOOLS) as app:
            asking = post(app, tools=[WEATHER])
            await app.answer("one moment", WEATHER_CALL, WEATHER_CALL)
            answer = (await asking).json()
            text, *calls = answer["content"]
            assert text == {"type": "text", "text": "one moment"}
            assert [call["input"] for call in calls] == [{"city": "Oslo"}] * 2
            assert {(call["type"], call["name"]) for call in calls} == {("tool_use", "weather")}
            assert len({call["id"] for call in calls}) == 2
            assert answer["stop_reason"] == "tool_use"

    run(test())


def test_the_input_of_a_call_that_was_cut_off_is_what_came_of_it(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, ROOM_FOR_TOOLS) as app:
            asking = post(app, tools=[WEATHER])
            submit = await app.answer('<tool_call>\n{"name": "weather", "arguments": {"city": "Os', finish_reason=None)
            app.engine.step(submit.request_id, finish_reason="length")
            answer = (await asking).json()
            (call,) = answer["content"]
            assert (call["name"], answer["stop_reason"]) == ("weather", "max_tokens")
            assert call["input"] in ({}, {"city": "Os"})

    run(test())


def test_count_tokens_counts_the_prompt_of_the_message(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, ROOM_FOR_TOOLS) as app:
            fields = {"system": "be brief", "tools": [WEATHER], "tool_choice": {"type": "auto"}}
            asking = post(app, **fields)
            submit = await app.answer("one")
            await asking
            body = {**COUNTED, **fields}
            response = await app.http.post(COUNT_TOKENS, json=body)
            assert response.json() == {"input_tokens": len(submit.prompt_token_ids)}
            assert response.headers["request-id"] == response.headers["x-request-id"]
            refused = await app.http.post(COUNT_TOKENS, json={**body, "max_tokens": 5})
            assert "max_tokens" in assert_anthropic_error(refused, 400, "invalid_request_error")

    run(test())


def test_what_a_request_gives_up_is_named_in_a_header(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, unknown_fields="warn") as app:
            blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "two"}]
            messages = [*BODY["messages"], {"role": "assistant", "content": blocks}, *BODY["messages"]]
            asking = post(app, messages=messages, frobnicate=1)
            await app.answer("one")
            assert (await asking).headers["x-ignored-fields"] == "frobnicate, messages[1].content[0]"

    run(test())


@pytest.mark.parametrize(
    ("change", "status", "kind", "word"),
    [
        ({"json": {**BODY, "model": "claude"}}, 404, "not_found_error", "claude"),
        ({"json": {**BODY, "top_k": -1}}, 400, "invalid_request_error", "top_k"),
        ({"json": {**BODY, "messages": [{"role": "system", "content": ""}, *BODY["messages"]]}}, 400,
         "invalid_request_error", "messages"),
        ({"content": b"{"}, 400, "invalid_request_error", "JSON"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "invalid_request_error", "Content-Type"),
        ({"content": b" " * 5000}, 413, "request_too_large", "MAX_BODY_BYTES"),
        ({"method": "GET"}, 405, "invalid_request_error", "GET"),
        ({"url": "/v1/messages/batches"}, 404, "not_found_error", "batches"),
        ({"url": COUNT_TOKENS, "json": {**COUNTED, "model": "claude"}}, 404, "not_found_error", "claude"),
    ],
)  # fmt: skip
def test_errors_have_anthropic_s_form(
    tmp_path: Path, tiny_chat_model: Path, change: dict[str, Any], status: int, kind: str, word: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_body_bytes=4096) as app:
            response = await app.http.request(**{"method": "POST", "url": MESSAGES, **change})
            assert word in assert_anthropic_error(response, status, kind)
            asking = post(app)
            await app.answer("one")
            assert (await asking).status_code == 200

    run(test())


def test_inputs_nested_too_deeply_are_refused(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 100_000}) as app:
            deep = '{"a":' * 980 + "1" + "}" * 980
            use = '{"type": "tool_use", "id": "x", "name": "n", "input": ' + deep + "}"
            result = '{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}'
            messages = '[{"role": "assistant", "content": [' + use + "]}, " + result + "]"
            # So large that it is read in a thread, whose stack has room for more.
            body = '{"model": "tiny", "max_tokens": 5, "messages": ' + messages + " " * 2**16 + "}"
            message = assert_anthropic_error(await app.http.post(MESSAGES, content=body), 400, "invalid_request_error")
            assert "nested too deeply" in message

    run(test())


def test_the_ring_s_troubles_have_anthropic_s_form(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        changes = {"max_concurrent_requests": 1}
        async with served(tmp_path, tiny_chat_model, changes, max_queued_requests=1) as app:
            first = post(app)
            await app.until(lambda: len(app.client.generations) == 1)
            second = post(app)
            await app.until(lambda: len(app.client.generations) == 2)
            refused = await app.http.post(MESSAGES, json=BODY)
            assert_anthropic_error(refused, 429, "rate_limit_error")
            assert int(refused.headers["retry-after"]) > 0
            for asking in (first, second):
                submit = await app.engine.read()
                output = SequenceOutput(submit.request_id, finish_reason="error", error="it broke")
                app.engine.send(StepOutput([output]))
                assert assert_anthropic_error(await asking, 500, "api_error") == "it broke"
            app.supervisor.state, app.supervisor.detail = "starting", "loading layers"
            for path in (MESSAGES, COUNT_TOKENS):
                body = BODY if path == MESSAGES else COUNTED
                message = assert_anthropic_error(await app.http.post(path, json=body), 503, "overloaded_error")
                assert "loading layers" in message

    run(test())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "secret", "anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b"}, 200),
        ({"authorization": "Bearer secret", "anthropic-version": "tomorrow"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({}, 401),
    ],
)
def test_keys_come_in_either_header(tmp_path: Path, tiny_chat_model: Path, headers: dict[str, str], status: int):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys="secret") as app:
            asking = asyncio.create_task(app.http.post(MESSAGES, json=BODY, headers=headers))
            if status == 200:
                await app.answer("one")
                assert (await asking).json()["content"] == [{"type": "text", "text": "one"}]
            else:
                assert_anthropic_error(await asking, 401, "authentication_error")

    run(test())


def test_the_log_says_who_asked(tmp_path: Path, tiny_chat_model: Path, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            caplog.set_level("INFO", "api")
            asking = post(app, metadata={"user_id": "someone"})
            submit = await app.answer("one")
            await asking
            (line,) = [record.getMessage() for record in caplog.records if submit.request_id in record.getMessage()]
            assert "user_id='someone'" in line and "finish_reason=stop" in line

    run(test())
