"""LiteLLM's client, as people put it in front of many servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer
from tests.sdks.conftest import Import
from tests.sdks.weather import HELLO, MAX_TOKENS, QUESTION, TOOL, Weather, assert_call

pytestmark = [pytest.mark.ring, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def litellm(import_sdk: Import) -> Iterator[Any]:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # else it makes one and never closes it
    with pytest.MonkeyPatch.context() as patch, httpx.Client(timeout=120) as client:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a list of prices when it is imported
        module = import_sdk("litellm")
        module.client_session = client
        yield module
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def fields(server: RunningServer) -> Any:
    about = {"model": f"openai/{server.model}", "api_base": f"{server.url}/v1", "api_key": "none"}
    return {**about, "max_tokens": MAX_TOKENS, "num_retries": 0}


def test_a_chat_streamed_is_the_chat_whole(litellm: Any, fields: Any):
    fields |= {"messages": HELLO, "max_tokens": 12, "seed": 1}
    whole = litellm.completion(**fields)
    chunks = list(litellm.completion(**fields, stream=True, stream_options={"include_usage": True}))
    streamed = litellm.stream_chunk_builder(chunks)
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens


def test_a_tool_is_called_whole_and_streamed(litellm: Any, fields: Any):
    fields |= {"messages": QUESTION, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    chunks = list(litellm.completion(**fields, stream=True))
    for answer in (litellm.completion(**fields), litellm.stream_chunk_builder(chunks)):
        assert answer.choices[0].finish_reason == "tool_calls"
        (call,) = answer.choices[0].message.tool_calls
        assert_call(call.function.name, call.function.arguments)


def test_a_structured_answer_is_of_its_class(litellm: Any, fields: Any):
    answer = litellm.completion(**fields, messages=QUESTION, response_format=Weather)
    Weather.model_validate_json(answer.choices[0].message.content)
