"""Anthropic's Python SDK: messages whole and streamed, tools, structured output, the count of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic, NotFoundError

from tests.running_server import RunningServer
from tests.sdks.weather import HELLO, MAX_TOKENS, QUESTION, TOOL, Weather, assert_call

pytestmark = pytest.mark.ring

ANTHROPIC_TOOL: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": TOOL["function"]["parameters"],
}


@pytest.fixture(scope="module")
def sdk(server: RunningServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as sdk:
        yield sdk


@pytest.fixture
def fields(server: RunningServer) -> Any:
    return {"model": server.model, "max_tokens": MAX_TOKENS}


def test_a_message_streamed_is_the_message_whole(sdk: Anthropic, fields: Any):
    greedy = {"temperature": 0}  # which the SDK no longer names, and older ones do
    fields |= {"messages": HELLO, "max_tokens": 12, "system": "Be short.", "extra_body": greedy}
    whole = sdk.messages.create(**fields)
    with sdk.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert sdk.messages.count_tokens(model=fields["model"], messages=HELLO, system="Be short.").input_tokens > 0


def test_a_tool_is_used_and_its_result_taken_back(sdk: Anthropic, fields: Any):
    fields |= {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    message = sdk.messages.create(**fields, messages=QUESTION)
    assert message.stop_reason == "tool_use"
    use = next(block for block in message.content if block.type == "tool_use")
    assert_call(use.name, use.input)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "warm"}
    messages = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    with sdk.messages.stream(**fields, messages=messages) as stream:
        final = stream.get_final_message()
    assert any(block.type == "tool_use" for block in final.content)


def test_a_structured_answer_is_parsed(sdk: Anthropic, fields: Any):
    message = sdk.messages.parse(**fields, messages=QUESTION, output_format=Weather)
    assert isinstance(message.parsed_output, Weather)


def test_an_error_is_raised_as_anthropic_s(sdk: Anthropic):
    with pytest.raises(NotFoundError) as raised:
        sdk.messages.create(model="other", max_tokens=1, messages=HELLO)
    assert raised.value.type == "not_found_error"
    assert "other" in raised.value.message
