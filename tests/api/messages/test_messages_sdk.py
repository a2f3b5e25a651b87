"""Anthropic's own SDK in front of a scripted rank 0: it reads whole answers, streams, tools and errors as it should."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from server.protocol import SequenceOutput, StepOutput
from tests.api.messages.test_messages import ROOM_FOR_TOOLS, WEATHER, WEATHER_CALL
from tests.api.served_app import Served, run, served

ASKED: Any = {"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}
TOOLS: Any = [WEATHER]


@asynccontextmanager
async def client(
    folder: Path, model: Path, ready: dict[str, Any] | None = None, **keys: Any
) -> AsyncIterator[tuple[Served, AsyncAnthropic]]:
    async with (
        served(folder, model, ready, **keys) as app,
        AsyncAnthropic(base_url=app.url, api_key="secret", max_retries=0) as sdk,
    ):
        yield app, sdk


def test_a_message_by_the_synchronous_client(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys="secret") as app:

            def ask() -> anthropic.types.Message:
                with Anthropic(base_url=app.url, api_key="secret", max_retries=0) as sdk:
                    return sdk.messages.create(**ASKED)

            asking = asyncio.create_task(asyncio.to_thread(ask))
            await app.answer("one", " two")
            message = await asking
            assert [block.type for block in message.content] == ["text"]
            assert message.content[0].type == "text" and message.content[0].text == "one two"
            assert (message.stop_reason, message.usage.cache_read_input_tokens) == ("end_turn", 0)

    run(test())


def test_raw_events_and_the_stream_helper(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client(tmp_path, tiny_chat_model) as (app, sdk):
            opening = asyncio.create_task(sdk.messages.create(**ASKED, stream=True))
            await app.answer("one", " two")
            kinds = [event.type async for event in await opening]
            assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")

            async def ask() -> tuple[list[str], anthropic.types.Message]:
                async with sdk.messages.stream(**ASKED, stop_sequences=["thr"]) as stream:
                    return [text async for text in stream.text_stream], await stream.get_final_message()

            asking = asyncio.create_task(ask())
            await app.answer("one", " two", " three", num_cached_tokens=2)
            texts, message = await asking
            assert "".join(texts) == "one two "
            assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "thr")
            assert message.usage.cache_read_input_tokens == 2
            assert message.usage.output_tokens > 0

    run(test())


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_round_trip(tmp_path: Path, tiny_chat_model: Path, streams: bool):
    async def test() -> None:
        async with client(tmp_path, tiny_chat_model, ROOM_FOR_TOOLS) as (app, sdk):

            async def ask(**fields: Any) -> anthropic.types.Message:
                if not streams:
                    return await sdk.messages.create(**{**ASKED, **fields}, tools=TOOLS)
                async with sdk.messages.stream(**{**ASKED, **fields}, tools=TOOLS) as stream:
                    return await stream.get_final_message()

            asking = asyncio.create_task(ask(tool_choice={"type": "auto"}))
            first = await app.answer("one moment", WEATHER_CALL)
            message = await asking
            text, call = message.content
            assert text.type == "text" and text.text == "one moment"
            assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Oslo"})
            assert message.stop_reason == "tool_use"

            result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
            turns = [*ASKED["messages"], message.to_param(), {"role": "user", "content": [result]}]
            asking = asyncio.create_task(ask(messages=turns))
            second = await app.answer("one")
            assert (await asking).stop_reason == "end_turn"
            # The model reads its own words again, and the prefix cache can serve them.
            assert second.prompt_token_ids[: len(first.prompt_token_ids)] == first.prompt_token_ids
            assert "sunny" in app.tokenizer.decode(second.prompt_token_ids)

    run(test())


class City(BaseModel):
    name: str
    size: int


def test_an_answer_in_the_form_of_a_class(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client(tmp_path, tiny_chat_model) as (app, sdk):
            asking = asyncio.create_task(sdk.messages.parse(**ASKED, output_format=City))
            submit = await app.answer('{"name": "Oslo", "size": 7}')
            assert submit.sampling.grammar
            assert (await asking).parsed_output == City(name="Oslo", size=7)

    run(test())


def test_tokens_are_counted(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client(tmp_path, tiny_chat_model) as (app, sdk):
            asking = asyncio.create_task(sdk.messages.create(**ASKED, system="be brief"))
            submit = await app.answer("one")
            usage = (await asking).usage
            fields = {key: value for key, value in ASKED.items() if key != "max_tokens"}
            count = await sdk.messages.count_tokens(**fields, system="be brief")
            assert count.input_tokens == usage.input_tokens == len(submit.prompt_token_ids)

    run(test())


def test_the_beta_api_asks_the_same(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client(tmp_path, tiny_chat_model) as (app, sdk):
            keeps: Any = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
            asking = asyncio.create_task(
                sdk.beta.messages.create(**ASKED, betas=["context-management-2025-06-27"], context_management=keeps)
            )
            await app.answer("one")
            assert (await asking).content[0].type == "text"

    run(test())


def test_errors_are_the_sdk_s_own(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with client(tmp_path, tiny_chat_model, api_keys="secret") as (app, sdk):
            with pytest.raises(anthropic.NotFoundError) as missing:
                await sdk.messages.create(**{**ASKED, "model": "claude"})
            assert missing.value.type == "not_found_error" and missing.value.request_id
            with pytest.raises(anthropic.BadRequestError, match="container"):
                await sdk.messages.create(**ASKED, extra_body={"container": "x"})
            with pytest.raises(anthropic.AuthenticationError):
                await sdk.with_options(api_key="wrong").messages.create(**ASKED)

            stream = asyncio.create_task(sdk.messages.create(**ASKED, stream=True))
            submit = await app.answer("one", finish_reason=None)
            reading = await stream
            output = SequenceOutput(submit.request_id, finish_reason="error", error="it broke")
            app.engine.send(StepOutput([output]))
            with pytest.raises(anthropic.APIStatusError, match="it broke"):
                async for _ in reading:
                    pass

    run(test())
