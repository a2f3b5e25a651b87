"""langchain-openai: ChatOpenAI with tools and with structured output."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer
from tests.sdks.conftest import Import
from tests.sdks.weather import MAX_TOKENS, TOOL, Weather, assert_call

pytestmark = [pytest.mark.ring, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def chat(import_sdk: Import, server: RunningServer) -> Iterator[Any]:
    about = {"model": server.model, "base_url": f"{server.url}/v1", "api_key": "none"}
    with httpx.Client(timeout=120) as client:
        chat = import_sdk("langchain_openai").ChatOpenAI
        yield chat(**about, http_client=client, max_tokens=MAX_TOKENS, max_retries=0, seed=1)


def test_a_chat_streamed_is_the_chat_whole(chat: Any):
    short = chat.bind(max_tokens=12)
    whole = short.invoke("hello world")
    chunks = list(short.stream("hello world"))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    usage = whole.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_tool_is_called_whole_and_streamed(chat: Any):
    bound = chat.bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False)
    first, *others = bound.stream("What is the weather in Paris?")
    streamed = reduce(add, others, first)
    for message in (bound.invoke("What is the weather in Paris?"), streamed):
        (call,) = message.tool_calls
        assert_call(call["name"], call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_structured_answer_is_of_its_class(chat: Any, method: str):
    structured = chat.with_structured_output(Weather, method=method)
    assert isinstance(structured.invoke("What is the weather in Paris?"), Weather)
