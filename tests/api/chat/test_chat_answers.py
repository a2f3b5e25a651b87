"""What a chat's answer is made of, in front of a scripted rank 0: choices, logprobs, tool calls, reasoning."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from api.service import Service
from server.protocol import Cancel, SequenceOutput, Started, StepOutput, Submit, TokenLogprobs
from tests.api.chat.test_chat_route import events, post
from tests.api.served_app import Served, run, served
from tests.api.test_app import assert_openai_error

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is somewhere",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def give(app: Served, submit: Submit, *pieces: str, finish_reason: str | None = "stop") -> None:
    app.engine.send(StepOutput(started=[Started(submit.request_id, 0)]))
    for piece in pieces:
        app.engine.step(submit.request_id, *app.ids(piece))
    if finish_reason is not None:
        app.engine.step(submit.request_id, submit.stop_token_ids[0], finish_reason=finish_reason)


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_share_a_prompt_and_differ_by_their_seeds(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, ready={"max_concurrent_requests": 4}) as app:
            options = {"include_usage": True}
            asking = post(app, n=3, seed=7, stream=stream, **({"stream_options": options} if stream else {}))
            submits = [await app.submitted() for _ in range(3)]
            assert [submit.sampling.seed for submit in submits] == [7, 8, 9]
            assert len({tuple(submit.prompt_token_ids) for submit in submits}) == 1
            assert len({submit.request_id for submit in submits}) == 3
            for number in (2, 0, 1):  # whoever ends first
                give(app, submits[number], f"choice {number}")
            response = await asking
            if stream:
                *chunks, done = events(response.text)
                assert done == "[DONE]"
                *chunks, last = chunks
                assert last["choices"] == []
                usage = last["usage"]
                texts = {0: "", 1: "", 2: ""}
                for chunk in chunks:
                    (choice,) = chunk["choices"]
                    texts[choice["index"]] += choice["delta"].get("content") or ""
                assert texts == {number: f"choice {number}" for number in range(3)}
                reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
                assert reasons.count("stop") == 3
            else:
                answer = response.json()
                usage = answer["usage"]
                assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
                for number, choice in enumerate(answer["choices"]):
                    assert choice["message"]["content"] == f"choice {number}"
            assert usage["prompt_tokens"] == len(submits[0].prompt_token_ids), "one prompt, however many choices"
            assert usage["completion_tokens"] == sum(len(app.ids(f"choice {number}")) + 1 for number in range(3))

    run(test())


def test_a_client_that_leaves_frees_all_its_choices(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, n=2, stream=True)
            submits = [await app.submitted() for _ in range(2)]
            asking.cancel()
            left = [await app.engine.read() for _ in range(2)]
            assert left == [Cancel(submit.request_id) for submit in reversed(submits)]

    run(test())


def test_more_choices_than_may_wait_are_refused_before_any_is_accepted(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_queued_requests=1) as app:  # two run, one waits
            error = assert_openai_error(await post(app, n=4), 400, "integer_above_max_value")
            assert error["param"] == "n", "waiting would not help"
            asking = post(app, n=3)
            submits = [await app.submitted() for _ in range(3)]
            assert_openai_error(await post(app, n=2), 429, "rate_limit_exceeded")
            assert len(app.client.generations) == 3
            for submit in submits:
                give(app, submit, "one")
            assert len((await asking).json()["choices"]) == 3

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_name_each_token_with_its_bytes_and_alternatives(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, logprobs=True, top_logprobs=2, stream=stream)
            submit = await app.submitted()
            assert submit.sampling.logprobs == 2
            ids = app.ids("hello ü")
            app.engine.send(StepOutput(started=[Started(submit.request_id, 0)]))
            for token_id in ids:
                scored = TokenLogprobs(-0.5, [token_id, ids[0]], [-0.5, -1.5])
                app.engine.send(StepOutput([SequenceOutput(submit.request_id, [token_id], logprobs=[scored])]))
            stop = submit.stop_token_ids[0]
            end = SequenceOutput(
                submit.request_id, [stop], "stop", logprobs=[TokenLogprobs(-0.1, [stop, ids[0]], [-0.1, -2.0])]
            )
            app.engine.send(StepOutput([end]))
            response = await asking
            if stream:
                choices = [chunk["choices"][0] for chunk in events(response.text)[:-1]]
                tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
            else:
                tokens = response.json()["choices"][0]["logprobs"]["content"]
            assert len(tokens) == len(ids) + 1, "each sampled token, the last one too"
            assert b"".join(bytes(token["bytes"]) for token in tokens[:-1]) == "hello ü".encode()
            assert [token["logprob"] for token in tokens] == [-0.5] * len(ids) + [-0.1]
            assert all([top["logprob"] for top in token["top_logprobs"]] == [-0.5, -1.5] for token in tokens[:-1])

    run(test())


def test_logprobs_without_alternatives_have_none(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, logprobs=True)
            submit = await app.submitted()
            assert submit.sampling.logprobs == 0
            output = SequenceOutput(submit.request_id, app.ids("a"), "length", logprobs=[TokenLogprobs(-1.0)])
            app.engine.send(StepOutput([output]))
            (token,) = (await asking).json()["choices"][0]["logprobs"]["content"]
            assert (token["token"], token["logprob"], token["top_logprobs"]) == ("a", -1.0, [])

    run(test())


@pytest.mark.parametrize("tool_choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_call_is_an_object_of_openai_s(tmp_path: Path, tiny_chat_model: Path, tool_choice: Any):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, ready={"max_sequence_length": 2048}) as app:
            asking = post(app, tools=[WEATHER], tool_choice=tool_choice)
            submit = await app.submitted()
            assert (submit.sampling.grammar is not None) == (tool_choice != "auto")
            give(app, submit, CALL)
            (choice,) = (await asking).json()["choices"]
            # OpenAI ends an answer that had to be this call with "stop".
            assert choice["finish_reason"] == ("stop" if isinstance(tool_choice, dict) else "tool_calls")
            message = choice["message"]
            assert message["content"] is None
            (call,) = message["tool_calls"]
            assert call["type"] == "function" and call["id"].startswith("call_")
            assert call["function"]["name"] == "weather"
            assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}

    run(test())


def test_a_streamed_call_has_its_name_first_and_then_pieces_of_its_arguments(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, ready={"max_sequence_length": 2048}) as app:
            asking = post(app, tools=[WEATHER], stream=True)
            give(app, await app.submitted(), *CALL, finish_reason="stop")  # letter by letter
            *chunks, _ = events((await asking).text)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            assert not any(delta.get("content") for delta in deltas), "no marker leaks"
            first, *others = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
            assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather")
            assert all(set(other) == {"index", "function"} for other in others)
            arguments = first["function"]["arguments"] + "".join(other["function"]["arguments"] for other in others)
            assert len(others) > 3 and json.loads(arguments) == {"city": "Rome"}
            assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    run(test())


def test_ignore_eos_and_min_tokens_reach_the_ring(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, ignore_eos=True, max_tokens=3)
            submit = await app.submitted()
            assert submit.stop_token_ids == []
            app.engine.step(submit.request_id, *app.ids("a"), finish_reason="length")
            await asking
            asking = post(app, min_tokens=2, max_tokens=3)
            submit = await app.answer("one")
            assert submit.sampling.min_tokens == 2 and submit.stop_token_ids
            await asking
            assert_openai_error(await post(app, min_tokens=4, max_tokens=3), 400, "invalid_value")
            refused = await post(app, ignore_eos=True, response_format={"type": "json_object"})
            assert assert_openai_error(refused, 400, "invalid_value")["param"] == "ignore_eos"

    run(test())


def test_an_answer_without_text_is_an_empty_string(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app)
            await app.answer()
            answer = (await asking).json()
            assert answer["choices"][0]["message"]["content"] == ""
            assert answer["usage"]["completion_tokens"] == 1

    run(test())


def test_choices_are_read_while_a_slow_client_is_not(tmp_path: Path, tiny_chat_model: Path):
    """A choice that has ended gives its place back at once, whatever the client has read of the others."""

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, n=2, stop="!")
            first, second = [await app.submitted() for _ in range(2)]
            give(app, first, "one", "! two", finish_reason=None)
            assert await asyncio.wait_for(app.engine.read(), 5) == Cancel(first.request_id)
            give(app, second, "three")
            assert [choice["message"]["content"] for choice in (await asking).json()["choices"]] == ["one", "three"]

    run(test())


def test_an_answer_that_cannot_be_read_is_an_error_and_no_silence(
    tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def breaks(self: Any, token_ids: Any) -> Any:
        raise MemoryError

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app)
            submit = await app.submitted()
            monkeypatch.setattr("api.output.reader.OutputReader.add", breaks)
            app.engine.step(submit.request_id, *app.ids("one"))
            assert_openai_error(await asking, 500, "internal_error")
            assert await app.engine.read() == Cancel(submit.request_id)

    run(test())


def test_a_ring_that_is_given_up_while_the_prompt_is_made_refuses_the_request(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            prompt = Service._chat_prompt

            def give_up(self: Any, *arguments: Any) -> Any:
                made = prompt(self, *arguments)
                app.supervisor.state = "failed"
                return made

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Service, "_chat_prompt", give_up)
                assert_openai_error(await post(app), 503, "server_not_ready")
            assert not app.client.generations

    run(test())
