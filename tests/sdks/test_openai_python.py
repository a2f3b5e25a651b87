"""OpenAI's Python SDK: chat completions and responses, sync and async, streamed and whole, tools and parsed answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool

from tests.running_server import RunningServer
from tests.sdks.weather import HELLO, MAX_TOKENS, QUESTION, TOOL, Weather, assert_call

pytestmark = pytest.mark.ring

NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def sdk(server: RunningServer) -> OpenAI:
    return server.client()


@pytest.fixture
def fields(server: RunningServer) -> Any:
    return {"model": server.model, "max_completion_tokens": MAX_TOKENS}


def test_a_chat_streamed_is_the_chat_whole(sdk: OpenAI, fields: Any):
    fields |= {"messages": HELLO, "seed": 1, "max_completion_tokens": 12}
    whole = sdk.chat.completions.create(**fields)
    text, usage = "", None
    for chunk in sdk.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        assert chunk.id
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage
    assert text == whole.choices[0].message.content
    assert usage is not None and whole.usage is not None
    assert (usage.completion_tokens, usage.prompt_tokens) == (whole.usage.completion_tokens, whole.usage.prompt_tokens)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_what_an_sdk_spells_out_with_null_is_taken(sdk: OpenAI, fields: Any):
    nulls: Any = dict.fromkeys(("logprobs", "seed", "stop", "response_format", "user", "temperature", "n", "tools"))
    answer = sdk.chat.completions.create(**fields | {"max_completion_tokens": 2}, messages=HELLO, stream=False, **nulls)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_tool_round_trip_keeps_its_tool_choice(sdk: OpenAI, fields: Any):
    messages = [*QUESTION]
    for _ in range(2):
        answer = sdk.chat.completions.create(
            **fields, messages=messages, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert_call(call.function.name, call.function.arguments)
        messages.append(choice.message.model_dump(include={"role", "content", "refusal", "tool_calls"}))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "warm"})


def test_a_streamed_tool_call_is_put_together(sdk: OpenAI, fields: Any):
    with sdk.chat.completions.stream(**fields, messages=QUESTION, tools=[TOOL], tool_choice=NAMED) as stream:
        kinds = [event.type for event in stream]
        (choice,) = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    assert choice.finish_reason == "stop"  # as OpenAI says it of a function that the request has named
    assert choice.message.tool_calls and not choice.message.content
    assert_call(choice.message.tool_calls[0].function.name, choice.message.tool_calls[0].function.arguments)


def test_parsed_answers_and_parsed_tool_calls_are_of_their_class(sdk: OpenAI, fields: Any):
    answer = sdk.chat.completions.parse(**fields, messages=QUESTION, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    with sdk.chat.completions.stream(**fields, messages=QUESTION, response_format=Weather) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)
    tools = [pydantic_function_tool(Weather)]
    one: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    called = sdk.chat.completions.parse(**fields, **one, messages=QUESTION, tools=tools)
    calls = called.choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, Weather)


def test_the_async_client_does_the_same_side_by_side(server: RunningServer, fields: Any):
    async def streamed(sdk: AsyncOpenAI) -> str:
        stream = await sdk.chat.completions.create(**fields | {"max_completion_tokens": 8}, messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def test() -> None:
        async with server.async_client() as sdk:
            text, parsed, called = await asyncio.gather(
                streamed(sdk),
                sdk.chat.completions.parse(**fields, messages=QUESTION, response_format=Weather),
                sdk.chat.completions.create(**fields, messages=QUESTION, tools=[TOOL], tool_choice=NAMED),
            )
        assert isinstance(text, str)
        assert isinstance(parsed.choices[0].message.parsed, Weather)
        calls: Any = called.choices[0].message.tool_calls
        assert_call(calls[0].function.name, calls[0].function.arguments)

    asyncio.run(test())


# -- responses -------------------------------------------------------------------------------------------------------

RESPONSE_TOOL: Any = {"type": "function", **TOOL["function"]}


@pytest.fixture
def asked(server: RunningServer) -> Any:
    return {"model": server.model, "max_output_tokens": MAX_TOKENS}


def test_a_response_streamed_has_its_events_in_order_and_is_the_response_whole(sdk: OpenAI, asked: Any):
    asked |= {"max_output_tokens": 16, "temperature": 0}
    whole = sdk.responses.create(**asked, input="hello world")
    events = list(sdk.responses.create(**asked, input="hello world", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert whole.usage is not None and whole.usage.input_tokens_details.cached_tokens >= 0


def test_a_response_goes_on_from_the_one_before(sdk: OpenAI, asked: Any):
    asked |= {"max_output_tokens": 16}
    first = sdk.responses.create(**asked, input="hello world", store=True)
    more: Any = [{"role": "user", "content": "and now?"}]
    second = sdk.responses.create(**asked, input=more, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_response_s_tool_call_goes_back_with_its_output(sdk: OpenAI, asked: Any):
    asked |= {"tools": [RESPONSE_TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    first = sdk.responses.create(**asked, input=QUESTION)
    call = next(item for item in first.output if item.type == "function_call")
    assert_call(call.name, call.arguments)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "warm"}
    second = sdk.responses.create(**asked, input=[*QUESTION, *first.output, output])
    assert any(item.type == "function_call" for item in second.output)


def test_a_response_is_parsed_whole_and_streamed(sdk: OpenAI, asked: Any):
    assert isinstance(sdk.responses.parse(**asked, input=QUESTION, text_format=Weather).output_parsed, Weather)
    with sdk.responses.stream(**asked, input=QUESTION, text_format=Weather) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Weather)
