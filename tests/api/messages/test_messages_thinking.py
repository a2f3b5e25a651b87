"""/v1/messages with a model that thinks, and answers that go on with what the client began."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message

from tests.api.chat.template_models import DEEPSEEK_R1, QWEN3, template_model
from tests.api.messages.test_messages import BODY, MESSAGES, WEATHER, WEATHER_CALL, assert_anthropic_error, post
from tests.api.messages.test_messages_stream import blocks, events, told
from tests.api.served_app import Served, run, served

PIECES = ["<think>\nlet me", " see\n</think>", "\n\none", " two"]
BUDGET = {"type": "enabled", "budget_tokens": 1024}


@asynccontextmanager
async def thinking(folder: Path, model: Path, template: str = QWEN3) -> AsyncIterator[Served]:
    async with served(folder, model, {"max_sequence_length": 2000, "vocab_size": 600}) as app:
        tokenizer = template_model(model, folder / "thinks", template, added=["<think>", "</think>"])
        app.supervisor.tokenizer = app.tokenizer = tokenizer
        yield app


def test_thinking_is_a_block_before_the_text(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with thinking(tmp_path, tiny_chat_model) as app:
            asking = post(app, thinking=BUDGET)
            await app.answer(*PIECES)
            response = await asking
            answer = response.json()
            thought, text = answer["content"]
            assert thought == {"type": "thinking", "thinking": "let me see\n", "signature": ""}
            assert text == {"type": "text", "text": "one two"}
            assert 0 < answer["usage"]["output_tokens_details"]["thinking_tokens"] < answer["usage"]["output_tokens"]
            assert response.headers["x-ignored-fields"] == "thinking.budget_tokens"

    run(test())


@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_a_stream_shows_thinking_or_leaves_its_text_out(tmp_path: Path, tiny_chat_model: Path, display: str):
    async def test() -> None:
        async with thinking(tmp_path, tiny_chat_model) as app:
            for stream in (True, False):
                asking = post(app, stream=stream, thinking={"type": "adaptive", "display": display})
                await app.answer(*PIECES)
                shown = "let me see\n" if display == "summarized" else ""
                if not stream:
                    assert (await asking).json()["content"][0]["thinking"] == shown
                    return
                whole_stream = events((await asking).text)
                usage = whole_stream[0]["message"]["usage"]
                assert (usage["output_tokens"], usage["output_tokens_details"]["thinking_tokens"]) == (0, 0)
                thought, text = blocks(whole_stream)
                assert thought[0]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
                kinds = {"thinking_delta", "signature_delta"} if shown else {"signature_delta"}
                assert {event["delta"]["type"] for event in thought[1:-1]} == kinds
                assert thought[-2]["delta"] == {"type": "signature_delta", "signature": ""}
                assert told(thought, "thinking") == shown
                assert told(text, "text") == "one two"

    run(test())


@pytest.mark.parametrize(
    ("said", "end"),
    [(None, "assistant\n"), ({"type": "adaptive"}, "assistant\n"), ({"type": "disabled"}, "</think>\n\n")],
)
def test_thinking_can_be_switched_off(tmp_path: Path, tiny_chat_model: Path, said: Any, end: str):
    async def test() -> None:
        async with thinking(tmp_path, tiny_chat_model) as app:
            asking = post(app, thinking=said)
            submit = await app.answer("one")
            assert app.tokenizer.decode(submit.prompt_token_ids).endswith(end)
            assert (await asking).json()["content"] == [{"type": "text", "text": "one"}]

    run(test())


def test_thinking_text_and_calls_go_back_as_they_came(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with (
            thinking(tmp_path, tiny_chat_model) as app,
            AsyncAnthropic(base_url=app.url, api_key="none", max_retries=0) as sdk,
        ):
            fields: Any = {**BODY, "tools": [WEATHER]}

            async def ask() -> Message:
                async with sdk.messages.stream(**fields) as stream:
                    return await stream.get_final_message()

            asking = asyncio.create_task(ask())
            await app.answer(*PIECES, WEATHER_CALL)
            message = await asking
            assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
            call = message.content[2]
            assert call.type == "tool_use"
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny", "is_error": True}
            turns = [*BODY["messages"], message.to_param(), {"role": "user", "content": [result]}]
            asking = asyncio.create_task(sdk.messages.create(**{**fields, "messages": turns}))
            submit = await app.answer("three")
            assert (await asking).content[0].type == "text"
            prompt = app.tokenizer.decode(submit.prompt_token_ids)
            assert "<think>\nlet me see\n" in prompt
            assert "one two\n" + WEATHER_CALL in prompt
            assert "<tool_response>\nError: sunny\n</tool_response>" in prompt

    run(test())


def test_a_model_that_cannot_think_says_so(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            for fields in ({"thinking": BUDGET}, {"output_config": {"effort": "low"}}):
                message = assert_anthropic_error(await post(app, **fields), 400, "invalid_request_error")
                assert "does not think" in message
            for fields in ({"thinking": {"type": "adaptive"}}, {"output_config": {"effort": "high"}}):
                asking = post(app, **fields)
                await app.answer("one")
                assert (await asking).status_code == 200

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_with_what_the_client_began(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            turns = [*BODY["messages"], {"role": "assistant", "content": "the quick <|im_end|>"}]
            asking = post(app, messages=turns, stream=stream)
            submit = await app.answer(" brown", " fox")
            prompt = app.tokenizer.decode(submit.prompt_token_ids)
            assert prompt.endswith("assistant\nthe quick <|im_end|>")
            # What the client wrote is text, also where it looks like the end of a turn.
            assert submit.prompt_token_ids.count(submit.stop_token_ids[0]) == 1
            response = await asking
            text = told(blocks(events(response.text))[0], "text") if stream else response.json()["content"][0]["text"]
            assert text == " brown fox"
            counted = await app.http.post(f"{MESSAGES}/count_tokens", json={"model": "tiny", "messages": turns})
            assert counted.json() == {"input_tokens": len(submit.prompt_token_ids)}

    run(test())


def test_a_template_that_changes_what_was_begun_is_said_so(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with thinking(tmp_path, tiny_chat_model, DEEPSEEK_R1) as app:
            # This template cuts an answer at what it takes for the end of its thinking.
            turns = [*BODY["messages"], {"role": "assistant", "content": "one </think> two"}]
            asking = post(app, messages=turns)
            message = assert_anthropic_error(await asking, 400, "invalid_request_error")
            assert "template" in message

    run(test())
