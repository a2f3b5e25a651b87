"""/v1/responses in front of a scripted rank 0: the whole answer, and conversations."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.responses import Response

from server.protocol import SequenceOutput, StepOutput, TokenLogprobs
from tests.api.served_app import Served, run, served
from tests.api.test_app import COMPLETIONS, assert_openai_error

RESPONSES = "/v1/responses"
BODY = {"model": "tiny", "input": "hello"}
FUNCTION = {
    "type": "function",
    "name": "weather",
    "description": "How the weather is",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
WEATHER_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
LONG = {"max_sequence_length": 2000}


def post(app: Served, *, key: str | None = None, **fields: Any) -> asyncio.Task[httpx.Response]:
    headers = {"Authorization": f"Bearer {key}"} if key else None
    return asyncio.create_task(app.http.post(RESPONSES, json={**BODY, **fields}, headers=headers))


async def answered(app: Served, *pieces: str, key: str | None = None, **fields: Any) -> dict[str, Any]:
    """The response to a request that the ring answers with `pieces`."""
    asking = post(app, key=key, **fields)
    await app.answer(*(pieces or ("one",)))
    response = await asking
    assert response.status_code == 200, response.text
    return response.json()


async def chat_prompt(app: Served, *messages: dict[str, Any], **fields: Any) -> list[int]:
    """The ids that the same conversation has as a chat."""
    body = {"model": "tiny", "messages": list(messages), **fields}
    asking = asyncio.create_task(app.http.post(COMPLETIONS, json=body))
    submit = await app.answer("one")
    assert (await asking).status_code == 200
    return submit.prompt_token_ids


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


# -- the answer ------------------------------------------------------------------------------------------------------


def test_a_response_has_openai_s_shape(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, instructions="be brief", metadata={"a": "b"}, user="me", temperature=0.5)
            submit = await app.answer("one", " two", num_cached_tokens=3)
            body = (await asking).json()
            Response.model_validate(body)
            assert body["id"] == submit.request_id and body["id"].startswith("resp_")
            assert body["completed_at"] >= body["created_at"]
            (item,) = body["output"]
            assert item.pop("id").startswith("msg_")
            text = {"type": "output_text", "text": "one two", "annotations": [], "logprobs": []}
            assert item == {"type": "message", "status": "completed", "role": "assistant", "content": [text]}
            num_output = len(app.ids("one")) + len(app.ids(" two")) + 1
            assert body["usage"] == {
                "input_tokens": len(submit.prompt_token_ids),
                "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
                "output_tokens": num_output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": len(submit.prompt_token_ids) + num_output,
            }
            assert body["performance"]["total_time"] > 0
            for name in ("id", "created_at", "completed_at", "output", "usage", "performance"):
                del body[name]
            assert body == {
                "object": "response",
                "status": "completed",
                "background": False,
                "error": None,
                "incomplete_details": None,
                "instructions": "be brief",
                "max_output_tokens": None,
                "max_tool_calls": None,
                "model": "tiny",
                "parallel_tool_calls": True,
                "previous_response_id": None,
                "prompt_cache_key": None,
                "reasoning": {"effort": None, "summary": None},
                "safety_identifier": None,
                "service_tier": "default",
                "store": True,
                "temperature": 0.5,
                "text": {"format": {"type": "text"}, "verbosity": "medium"},
                "tool_choice": "auto",
                "tools": [],
                "top_logprobs": 0,
                "top_p": 1.0,
                "truncation": "disabled",
                "user": "me",
                "metadata": {"a": "b"},
            }

    run(test())


def test_the_prompt_is_that_of_the_same_chat(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, instructions="be brief", max_output_tokens=5)
            submit = await app.answer("one")
            await asking
            assert (submit.max_tokens, submit.max_tokens_given) == (5, True)
            same = await chat_prompt(app, message("system", "be brief"), message("user", "hello"))
            assert submit.prompt_token_ids == same

    run(test())


def test_an_answer_that_is_cut_is_incomplete(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, max_output_tokens=1)
            submit = await app.submitted()
            app.engine.step(submit.request_id, app.ids("one")[0], finish_reason="length", start=True)
            body = (await asking).json()
            assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
            assert body["completed_at"] is None
            assert [item["status"] for item in body["output"]] == ["incomplete"]

    run(test())


def test_an_empty_answer_is_an_empty_message(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app)
            await app.answer()
            body = (await asking).json()
            assert [part["text"] for part in body["output"][0]["content"]] == [""]
            assert body["usage"]["output_tokens"] == 1

    run(test())


def test_the_request_s_settings_come_back(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            named = {"type": "function", "name": "time"}
            asked: dict[str, Any] = {
                "tools": [FUNCTION, named],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [named]},
                "parallel_tool_calls": False,
                "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}},
                "max_output_tokens": 100,
                "prompt_cache_key": "k",
                "safety_identifier": "s",
                "top_p": 0.0,
                "truncation": "auto",
                "store": False,
            }
            body = await answered(app, "{}", **asked)
            Response.model_validate(body)
            described = {"description": None, "parameters": None, "strict": False}
            asked["tools"] = [FUNCTION, {**named, **described}]
            asked["text"] = {"format": {**asked["text"]["format"], "description": None}, "verbosity": "medium"}
            assert {name: body[name] for name in asked} == asked

    run(test())


def test_calls_are_items_of_their_own_after_the_text(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            body = await answered(app, "let me see\n", WEATHER_CALL, tools=[FUNCTION])
            Response.model_validate(body)
            text, call = body["output"]
            assert text["content"][0]["text"].strip() == "let me see"
            assert call["id"].startswith("fc_")
            assert (call["type"], call["status"], call["name"]) == ("function_call", "completed", "weather")
            assert call["arguments"].replace(" ", "") == '{"city":"Oslo"}'
            assert call["call_id"] and call["call_id"] != call["id"]

    run(test())


def test_logprobs_are_those_of_the_text(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, top_logprobs=1)
            submit = await app.submitted()
            assert submit.sampling.logprobs == 1
            one, two = app.ids("one")[0], app.ids(" two")[0]
            for token in (one, two, submit.stop_token_ids[0]):
                reason = "stop" if token == submit.stop_token_ids[0] else None
                logprobs = [TokenLogprobs(-0.5, [two], [-0.25])]
                app.engine.send(StepOutput([SequenceOutput(submit.request_id, [token], reason, logprobs=logprobs)]))
            (part,) = (await asking).json()["output"][0]["content"]
            texts = [app.tokenizer.token_text(token_id)[0] for token_id in (one, two)]
            assert [token["token"] for token in part["logprobs"]] == texts
            assert {token["logprob"] for token in part["logprobs"]} == {-0.5}
            assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [1, 1]
            assert part["logprobs"][0]["top_logprobs"][0]["logprob"] == -0.25

    run(test())


def test_a_likely_token_without_bytes_has_none(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, top_logprobs=1)
            submit = await app.submitted()
            end = submit.stop_token_ids[0]
            for token, reason in ((app.ids("one")[0], None), (end, "stop")):
                logprobs = [TokenLogprobs(-0.5, [end], [-0.25])]
                app.engine.send(StepOutput([SequenceOutput(submit.request_id, [token], reason, logprobs=logprobs)]))
            (part,) = (await asking).json()["output"][0]["content"]
            assert part["logprobs"][0]["top_logprobs"] == [{"token": "<|im_end|>", "logprob": -0.25, "bytes": []}]

    run(test())


def test_an_error_of_the_ring_is_an_http_status_and_nothing_is_stored(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app)
            submit = await app.answer("one", finish_reason=None)
            output = SequenceOutput(submit.request_id, finish_reason="error", error="it broke")
            app.engine.send(StepOutput([output]))
            assert_openai_error(await asking, 500)
            assert_openai_error(await app.http.get(f"{RESPONSES}/{submit.request_id}"), 404)

    run(test())


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "missing_required_parameter"),
        ({"model": "other"}, "model", "model_not_found"),
        ({"input": "one two three " * 50}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 64}, "input", "context_length_exceeded"),
        ({"input": [message("system", ""), message("user", "a")]}, "input", "invalid_messages"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "previous_response_not_found"),
        ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "input[0].id", "item_not_found"),
        ({"seed": 1}, "seed", "unknown_parameter"),
    ],
)
def test_a_refusal_names_the_field(
    tmp_path: Path, tiny_chat_model: Path, fields: dict[str, Any], param: str, code: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            status = 404 if code == "model_not_found" else 400
            assert assert_openai_error(await post(app, **fields), status, code)["param"] == param

    run(test())


# -- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_response_without_its_instructions(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            first = await answered(app, "one", instructions="be brief")
            second = await answered(app, "three", input="two", previous_response_id=first["id"])
            assert second["previous_response_id"] == first["id"]
            asking = post(app, input="four", previous_response_id=second["id"], instructions="be kind")
            submit = await app.answer("five")
            await asking
            said = [("user", "hello"), ("assistant", "one"), ("user", "two"), ("assistant", "three"), ("user", "four")]
            same = await chat_prompt(app, message("system", "be kind"), *[message(*words) for words in said])
            assert submit.prompt_token_ids == same

    run(test())


def test_a_call_is_answered_with_its_output_alone(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            first = await answered(app, WEATHER_CALL, tools=[FUNCTION])
            (call,) = first["output"]
            output = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
            goes_on = post(app, input=[output], previous_response_id=first["id"], tools=[FUNCTION])
            submit = await app.answer("it rains")
            assert (await goes_on).status_code == 200
            # The same, for clients that keep the conversation themselves and send the items back as they came.
            history = [message("user", "hello"), call, output]
            sent_back = post(app, input=history, tools=[FUNCTION], store=False)
            again = await app.answer("it rains")
            assert (await sent_back).status_code == 200
            assert again.prompt_token_ids == submit.prompt_token_ids

    run(test())


def test_an_item_may_be_referred_to_by_its_id(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            first = await answered(app, "one")
            reference = {"id": first["output"][0]["id"]}
            asking = post(app, input=[message("user", "hello"), reference, message("user", "two")])
            submit = await app.answer("three")
            await asking
            said = [message("user", "hello"), message("assistant", "one"), message("user", "two")]
            assert submit.prompt_token_ids == await chat_prompt(app, *said)

    run(test())


def test_truncation_drops_the_oldest_turns_until_the_rest_fits(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 60}) as app:
            turns = [message("user", "one two"), message("assistant", "three four")] * 6
            input = [message("system", "five"), *turns, message("user", "question")]
            fields: dict[str, Any] = {"input": input, "max_output_tokens": 8}
            assert_openai_error(await post(app, **fields), 400, "context_length_exceeded")
            asking = post(app, **fields, truncation="auto")
            submit = await app.answer("answer")
            answer = (await asking).json()
            assert answer["truncation"] == "auto"
            prompts = [await chat_prompt(app, input[0], *turns[start:], input[-1]) for start in (10, 8)]
            fitting = [prompt for prompt in prompts if len(prompt) + 8 <= 60]
            assert submit.prompt_token_ids == fitting[-1]
            # The conversation itself is whole.
            listed = await app.http.get(f"{RESPONSES}/{answer['id']}/input_items", params={"limit": 100})
            assert len(listed.json()["data"]) == len(input)
            assert_openai_error(
                await post(app, input="one two three " * 50, truncation="auto"), 400, "context_length_exceeded"
            )

    run(test())


def test_truncation_never_parts_a_call_from_its_output(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 90}) as app:
            call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
            output = {"type": "function_call_output", "call_id": "a", "output": "seven"}
            old = message("user", "one two three " * 10)
            input = [old, call, message("user", "what?"), output, message("user", "four"), message("user", "five")]
            asking = post(app, input=input, max_output_tokens=8, truncation="auto")
            submit = await app.answer("answer")
            assert (await asking).status_code == 200
            assert submit.prompt_token_ids == await chat_prompt(app, *input[4:])

    run(test())
