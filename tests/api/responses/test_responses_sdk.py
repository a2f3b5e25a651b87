"""/v1/responses as the OpenAI SDK uses it, in front of a scripted rank 0."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import APIError, AsyncOpenAI, pydantic_function_tool
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

from server.protocol import SequenceOutput, StepOutput
from tests.api.responses.test_responses import FUNCTION, LONG, WEATHER_CALL
from tests.api.served_app import Served, run, served

ASKED: Any = {"model": "tiny", "input": "hello"}


class City(BaseModel):
    name: str
    people: int


class Weather(BaseModel):
    """How the weather is"""

    city: str


@asynccontextmanager
async def client_of(folder: Path, model: Path) -> AsyncIterator[tuple[Served, AsyncOpenAI]]:
    async with (
        served(folder, model, LONG) as app,
        AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield app, client


def test_create_and_everything_that_is_done_with_what_is_stored(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client_of(tmp_path, tiny_chat_model) as (app, client):
            asking = asyncio.create_task(client.responses.create(**ASKED))
            await app.answer("one", " two")
            response = await asking
            assert response.output_text == "one two"
            again = await client.responses.retrieve(response.id, include=["message.output_text.logprobs"])
            assert again.output == response.output
            items = [item async for item in client.responses.input_items.list(response.id, limit=1)]
            assert [item.type for item in items] == ["message"]
            counted = await client.responses.input_tokens.count(**ASKED)
            assert response.usage is not None and counted.input_tokens == response.usage.input_tokens
            with pytest.raises(openai.BadRequestError):
                await client.responses.cancel(response.id)
            await client.responses.delete(response.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response.id)

    run(test())


def test_the_stream_helper_sees_text_and_calls(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client_of(tmp_path, tiny_chat_model) as (app, client):
            tools: Any = [FUNCTION]

            async def read() -> Any:
                async with client.responses.stream(**ASKED, tools=tools) as stream:
                    texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
                    return texts, await stream.get_final_response()

            reading = asyncio.create_task(read())
            await app.answer("let me", " see", WEATHER_CALL)
            texts, response = await reading
            assert "".join(texts).strip() == response.output_text.strip() == "let me see"
            assert isinstance(response.output[1], ResponseFunctionToolCall)

    run(test())


def test_parse_gives_objects_of_the_client_s_classes(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client_of(tmp_path, tiny_chat_model) as (app, client):
            asking = asyncio.create_task(client.responses.parse(**ASKED, text_format=City))
            submit = await app.answer('{"name": "Oslo", ', '"people": 7}')
            response = await asking
            assert submit.sampling.grammar is not None
            assert response.output_parsed == City(name="Oslo", people=7)

    run(test())


def test_parse_gives_a_call_s_arguments(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client_of(tmp_path, tiny_chat_model) as (app, client):
            tools: Any = [pydantic_function_tool(Weather, name="weather")]
            asking = asyncio.create_task(client.responses.parse(**ASKED, tools=tools))
            await app.answer(WEATHER_CALL)
            (call,) = (await asking).output
            assert call.type == "function_call" and call.parsed_arguments == Weather(city="Oslo")

    run(test())


def test_a_round_of_tools_by_items_that_are_sent_back(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client_of(tmp_path, tiny_chat_model) as (app, client):
            items: list[Any] = [{"role": "user", "content": "hello"}]
            fields: Any = {"model": "tiny", "tools": [FUNCTION], "store": False, "tool_choice": "auto"}
            asking = asyncio.create_task(client.responses.create(input=items, **fields))
            await app.answer("let me see", WEATHER_CALL)
            response = await asking
            items += response.output
            call = response.output[-1]
            assert call.type == "function_call"
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
            asking = asyncio.create_task(client.responses.create(input=items, **fields))
            submit = await app.answer("it rains")
            assert (await asking).output_text == "it rains"
            prompt = app.tokenizer.decode(submit.prompt_token_ids)
            assert "let me see" in prompt and "Oslo" in prompt and "rain" in prompt

    run(test())


def test_a_conversation_by_previous_response_id(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client_of(tmp_path, tiny_chat_model) as (app, client):
            previous = None
            for turn in ("one", "two", "three"):
                asking = asyncio.create_task(
                    client.responses.create(model="tiny", input=f"ask {turn}", previous_response_id=previous)
                )
                submit = await app.answer(f"say {turn}")
                previous = (await asking).id
            prompt = app.tokenizer.decode(submit.prompt_token_ids)
            said = [prompt.index(text) for text in ("ask one", "say one", "ask two", "say two", "ask three")]
            assert said == sorted(said)

    run(test())


def test_an_error_in_a_stream_is_raised(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client_of(tmp_path, tiny_chat_model) as (app, client):
            opening = asyncio.create_task(client.responses.create(**ASKED, stream=True))
            submit = await app.answer("one", finish_reason=None)
            output = SequenceOutput(submit.request_id, finish_reason="error", error="it broke")
            app.engine.send(StepOutput([output]))
            with pytest.raises(APIError, match="it broke"):
                async for _ in await opening:
                    pass

    run(test())
