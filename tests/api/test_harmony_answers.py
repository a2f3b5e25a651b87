"""A model that writes harmony, on all endpoints, in front of a scripted rank 0: answers, and the way they go back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.protocol import SequenceOutput, StepOutput, Submit, TokenLogprobs
from tests.api.chat.template_models import harmony_model
from tests.api.chat.test_chat_answers import WEATHER
from tests.api.chat.test_chat_route import events as chunks_of
from tests.api.messages.test_messages import WEATHER as ANTHROPIC_WEATHER
from tests.api.messages.test_messages import assert_anthropic_error
from tests.api.messages.test_messages_stream import blocks, told
from tests.api.messages.test_messages_stream import events as message_events
from tests.api.responses.test_responses import FUNCTION
from tests.api.responses.test_responses_stream import events_of, types
from tests.api.served_app import Served, run, served
from tests.api.test_app import assert_openai_error

NEXT = "<|end|><|start|>assistant"
THOUGHT = f"<|channel|>analysis<|message|>let me see{NEXT}"
PREAMBLE = f"<|channel|>commentary<|message|>I look.{NEXT}"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
FINAL = "<|channel|>final<|message|>It rains.<|return|>"
CALLING = THOUGHT + PREAMBLE + CALL
USER = {"role": "user", "content": "hello"}
# What the next prompt has of such an answer, and of the result of its call.
SAID_BEFORE = (
    "<|start|>assistant<|channel|>analysis<|message|>let me see\n\nI look.<|end|>"
    '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"rain"<|end|><|start|>assistant'
)


@asynccontextmanager
async def speaking(folder: Path, model: Path) -> AsyncIterator[Served]:
    async with served(folder, model, {"max_sequence_length": 2000, "vocab_size": 600}) as app:
        app.supervisor.tokenizer = app.tokenizer = harmony_model(model, folder / "harmony")
        yield app


async def asked(app: Served, path: str, answer: str, **body: Any) -> tuple[httpx.Response, Submit]:
    """The response to a request that the ring answers with these tokens, the one that ends it included."""
    asking: Awaitable[httpx.Response] = asyncio.create_task(app.http.post(path, json={"model": "tiny", **body}))
    submit = await app.answer(finish_reason=None)
    *ids, last = app.ids(answer)
    assert last in submit.stop_token_ids
    for token_id in ids:
        app.engine.step(submit.request_id, token_id)
    app.engine.step(submit.request_id, last, finish_reason="stop")
    response = await asking
    assert response.status_code == 200, response.text
    return response, submit


def prompt_of(app: Served, submit: Submit) -> str:
    return app.tokenizer.decode(submit.prompt_token_ids)


def test_a_chat_has_reasoning_content_and_calls_and_takes_them_back(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            path, body = "/v1/chat/completions", {"messages": [USER], "tools": [WEATHER]}
            response, _ = await asked(app, path, CALLING, **body)
            (choice,) = response.json()["choices"]
            message = choice["message"]
            assert (message["reasoning_content"], message["content"]) == ("let me see", "I look.")
            (call,) = message["tool_calls"]
            assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
            assert choice["finish_reason"] == "tool_calls"
            details = response.json()["usage"]["completion_tokens_details"]
            assert details["reasoning_tokens"] == len(app.ids("let me see")) + 2

            response, _ = await asked(app, path, CALLING, stream=True, **body)
            told = {"reasoning_content": "", "content": "", "arguments": ""}
            for chunk in chunks_of(response.text)[:-1]:
                delta = chunk["choices"][0]["delta"]
                for name in ("reasoning_content", "content"):
                    told[name] += delta.get(name) or ""
                for piece in delta.get("tool_calls") or ():
                    told["arguments"] += piece["function"]["arguments"]
            assert list(told.values()) == ["let me see", "I look.", '{"city": "Oslo"}']

            result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
            turns = {**body, "messages": [USER, message, result]}
            response, submit = await asked(app, path, THOUGHT + FINAL, **turns)
            assert prompt_of(app, submit).endswith(SAID_BEFORE)
            assert response.json()["choices"][0]["message"]["content"] == "It rains."
            assert response.json()["choices"][0]["finish_reason"] == "stop"

    run(test())


def test_a_response_has_items_of_each_kind_and_takes_them_back(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            path, body = "/v1/responses", {"tools": [FUNCTION]}
            response, _ = await asked(app, path, CALLING, input="hello", **body)
            output = response.json()["output"]
            reasoning, message, call = output
            assert reasoning["content"] == [{"type": "reasoning_text", "text": "let me see"}]
            assert message["content"][0]["text"] == "I look."
            assert (call["name"], call["arguments"]) == ("weather", '{"city": "Oslo"}')
            assert response.json()["usage"]["output_tokens_details"]["reasoning_tokens"] > 0

            result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
            stored = {"previous_response_id": response.json()["id"], "input": [result]}
            for turns in (stored, {"input": [{"role": "user", "content": "hello"}, *output, result]}):
                response, submit = await asked(app, path, THOUGHT + FINAL, **turns, **body)
                assert prompt_of(app, submit).endswith(SAID_BEFORE)
                kinds = [item["type"] for item in response.json()["output"]]
                assert kinds == ["reasoning", "message"]

            response, _ = await asked(app, path, CALLING, input="hello", stream=True, **body)
            added = [event for event in events_of(response.text) if event["type"] == "response.output_item.added"]
            assert [event["item"]["type"] for event in added] == ["reasoning", "message", "function_call"]
            assert "function_call_arguments.delta" in types(events_of(response.text))

    run(test())


THINKING_TWICE = f"{THOUGHT}{PREAMBLE}<|channel|>analysis<|message|>there{NEXT}"


def test_what_is_thought_and_said_by_turns_is_an_item_or_a_block_each(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            said = ["let me see", "I look.", "there", "It rains."]
            response, _ = await asked(app, "/v1/responses", THINKING_TWICE + FINAL, input="hello")
            assert [item["content"][0]["text"] for item in response.json()["output"]] == said
            response, _ = await asked(app, "/v1/responses", THINKING_TWICE + FINAL, input="hello", stream=True)
            done = [event for event in events_of(response.text) if event["type"] == "response.output_item.done"]
            assert [event["item"]["content"][0]["text"] for event in done] == said
            path, body = "/v1/messages", {"messages": [USER], "max_tokens": 200}
            response, _ = await asked(app, path, THINKING_TWICE + FINAL, **body)
            assert [block.get("thinking") or block.get("text") for block in response.json()["content"]] == said
            response, _ = await asked(app, path, THINKING_TWICE + FINAL, stream=True, **body)
            told_of = [told(block, "thinking") + told(block, "text") for block in blocks(message_events(response.text))]
            assert told_of == said
            response, _ = await asked(app, "/v1/chat/completions", THINKING_TWICE + FINAL, messages=[USER])
            message = response.json()["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == ("let me see\n\nthere", "I look.\n\nIt rains.")

    run(test())


def test_what_a_response_thought_between_words_and_a_call_goes_back_with_it(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            path, body = "/v1/responses", {"tools": [FUNCTION]}
            response, _ = await asked(app, path, THINKING_TWICE + CALL, input="hello", **body)
            call = response.json()["output"][-1]
            result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
            _, submit = await asked(
                app, path, FINAL, previous_response_id=response.json()["id"], input=[result], **body
            )
            thought = "<|channel|>analysis<|message|>let me see\n\nthere\n\nI look.<|end|>"
            assert thought in prompt_of(app, submit) and "<|channel|>final" not in prompt_of(app, submit)

    run(test())


def test_logprobs_of_a_response_are_those_of_its_text(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            body = {"model": "tiny", "input": "hello", "include": ["message.output_text.logprobs"]}
            asking = asyncio.create_task(app.http.post("/v1/responses", json=body))
            submit = await app.answer(finish_reason=None)
            ids = app.ids(THINKING_TWICE + FINAL)
            for token_id in ids:
                reason = "stop" if token_id is ids[-1] else None
                output = SequenceOutput(submit.request_id, [token_id], reason, logprobs=[TokenLogprobs(-0.5, [], [])])
                app.engine.send(StepOutput([output]))
            texts = {
                part["text"]: [app.ids(token["token"]) for token in part["logprobs"]]
                for item in (await asking).json()["output"]
                for part in item["content"]
                if item["type"] == "message"
            }
            assert {text: [token_id for token in tokens for token_id in token] for text, tokens in texts.items()} == {
                text: app.ids(text) for text in ("I look.", "It rains.")
            }

    run(test())


def test_a_message_has_blocks_of_each_kind_and_takes_them_back(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            path, body = "/v1/messages", {"max_tokens": 200, "tools": [ANTHROPIC_WEATHER]}
            thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
            response, submit = await asked(app, path, CALLING, messages=[USER], **thinking, **body)
            assert "Reasoning: high\n" in prompt_of(app, submit)
            content = response.json()["content"]
            thought, text, call = content
            assert (thought["thinking"], text["text"]) == ("let me see", "I look.")
            assert (call["name"], call["input"]) == ("weather", {"city": "Oslo"})
            assert response.json()["stop_reason"] == "tool_use"

            response, _ = await asked(app, path, CALLING, messages=[USER], stream=True, **body)
            streamed = blocks(message_events(response.text))
            kinds = [block[0]["content_block"]["type"] for block in streamed]
            assert kinds == ["thinking", "text", "tool_use"]
            assert told(streamed[2], "partial_json") == '{"city": "Oslo"}'

            result = {"type": "tool_result", "tool_use_id": call["id"], "content": "rain"}
            turns = [USER, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
            response, submit = await asked(app, path, THOUGHT + FINAL, messages=turns, **body)
            assert prompt_of(app, submit).endswith(SAID_BEFORE)
            assert [block["type"] for block in response.json()["content"]] == ["thinking", "text"]

            begun = [USER, {"role": "assistant", "content": "It"}]
            response, submit = await asked(app, path, " rains.<|return|>", messages=begun, **body)
            assert prompt_of(app, submit).endswith("<|channel|>final<|message|>It")
            assert response.json()["content"] == [{"type": "text", "text": " rains."}]

    run(test())


def test_thinking_is_switched_off_and_efforts_are_refused_in_each_endpoint_s_words(
    tmp_path: Path, tiny_chat_model: Path
):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            off = {"thinking": {"type": "disabled"}}
            answer = "<|channel|>final<|message|>Hi.<|return|>"
            _, submit = await asked(app, "/v1/messages", answer, messages=[USER], max_tokens=9, **off)
            assert submit.sampling.grammar is not None and "analysis" in submit.sampling.grammar
            body = {"model": "tiny", "messages": [USER], "max_tokens": 9, "output_config": {"effort": "max"}}
            message = assert_anthropic_error(
                await app.http.post("/v1/messages", json=body), 400, "invalid_request_error"
            )
            assert "'output_config.effort'" in message
            body = {"model": "tiny", "input": "hello", "reasoning": {"effort": "minimal"}}
            error = assert_openai_error(await app.http.post("/v1/responses", json=body), 400, "unsupported_parameter")
            assert error["param"] == "reasoning.effort" and "'low'" in error["message"]

    run(test())


def test_the_model_says_that_it_reasons(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            capabilities = (await app.http.get("/v1/models")).json()["data"][0]["capabilities"]
            assert capabilities["reasoning"] and capabilities["tools"] and capabilities["structured_output"]

    run(test())


@pytest.mark.parametrize("cut", ["<|channel|>ana", "<|channel|>commentary to=functions.wea", THOUGHT])
def test_an_answer_that_is_cut_before_it_says_anything_is_empty(tmp_path: Path, tiny_chat_model: Path, cut: str):
    async def test() -> None:
        async with speaking(tmp_path, tiny_chat_model) as app:
            body = {"model": "tiny", "messages": [USER], "tools": [WEATHER]}
            asking = asyncio.create_task(app.http.post("/v1/chat/completions", json=body))
            submit = await app.answer(finish_reason=None)
            app.engine.step(submit.request_id, *app.ids(cut), finish_reason="length")
            (choice,) = (await asking).json()["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
            assert "tool_calls" not in choice["message"]

    run(test())
