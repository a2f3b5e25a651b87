"""The event loop sends every client's stream: nothing that one client asks for may keep it for long."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from api.schemas.base import MAX_MESSAGES, Sent
from server.protocol import SequenceOutput, StepOutput, TokenLogprobs
from tests.api.served_app import Served, run, served
from tests.api.test_app import assert_openai_error

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def written_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages to clients that were made into JSON by the event loop's thread, by their classes."""
    written: list[str] = []
    to_json = Sent.to_json

    def noted(self: Sent) -> str:
        if threading.current_thread() is threading.main_thread():
            written.append(type(self).__name__)
        return to_json(self)

    monkeypatch.setattr(Sent, "to_json", noted)
    return written


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": "hello", "logprobs": 2}),
        ("/v1/responses", {"input": "hello", "top_logprobs": 2}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    ],
)
def test_whole_answers_are_written_in_a_thread(
    tmp_path: Path, tiny_chat_model: Path, written_on_the_loop: list[str], path: str, fields: dict[str, Any]
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = asyncio.create_task(app.http.post(path, json={"model": "tiny", **fields}))
            await _answer(app)
            assert (await asking).status_code == 200
            assert written_on_the_loop == []

    run(test())


def test_the_logprobs_of_an_echoed_prompt_and_the_end_of_a_response_are_written_in_a_thread(
    tmp_path: Path, tiny_chat_model: Path, written_on_the_loop: list[str]
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            for path, fields in (
                ("/v1/completions", {"prompt": "one two three", "logprobs": 2, "echo": True}),
                ("/v1/responses", {"input": "hello", "top_logprobs": 2}),
            ):
                body = {"model": "tiny", "stream": True, **fields}
                asking = asyncio.create_task(app.http.post(path, json=body))
                await _answer(app)
                assert (await asking).status_code == 200
            assert written_on_the_loop.count("Completion") == 1, "all but the first"
            assert not {"TextDoneEvent"} & set(written_on_the_loop)
            assert written_on_the_loop.count("ResponseEvent") == 2, "created, in progress"

    run(test())


@pytest.mark.parametrize(
    ("path", "field", "extra"),
    [
        ("/v1/chat/completions", "messages", {}),
        ("/v1/messages", "messages", {"max_tokens": 5}),
        ("/v1/responses", "input", {}),
        ("/tokenize", "messages", {}),
    ],
)
def test_more_messages_than_any_request_has_use_for_are_refused(
    tmp_path: Path, tiny_chat_model: Path, path: str, field: str, extra: dict[str, Any]
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            body = {"model": "tiny", field: HELLO * (MAX_MESSAGES + 1), **extra}
            response = await app.http.post(path, json=body)
            assert response.status_code == 400 and f"{MAX_MESSAGES}" in response.json()["error"]["message"]
            if path != "/v1/messages":
                assert assert_openai_error(response, 400, "array_above_max_length")["param"] == field

    run(test())


async def _answer(app: Served) -> None:
    """Two tokens and the end, with logprobs of all."""
    submit = await app.engine.read()
    likely = TokenLogprobs(-0.5, [5, 6], [-1.0, -2.0])
    if submit.sampling.prompt_logprobs is not None:
        scored = [likely] * (len(submit.prompt_token_ids) - 1)
        output = SequenceOutput(submit.request_id, prompt_logprobs=scored, prompt_logprobs_start=1)
        app.engine.send(StepOutput([output]))
    first, last = app.ids("word")[:1], [submit.stop_token_ids[0]]
    app.engine.send(StepOutput([SequenceOutput(submit.request_id, first, logprobs=[likely])]))
    app.engine.send(StepOutput([SequenceOutput(submit.request_id, last, "stop", logprobs=[likely])]))
