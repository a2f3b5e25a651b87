"""/v1/responses as a stream, in front of a scripted rank 0: the events, their order, and how a stream ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from server.protocol import Cancel, SequenceOutput, StepOutput, TokenLogprobs
from tests.api.responses.test_responses import FUNCTION, LONG, RESPONSES, WEATHER_CALL, post
from tests.api.served_app import Served, run, served
from tests.api.test_app import assert_openai_error
from tests.tiny_chat_model import VOCAB_SIZE

THINKING = {**LONG, "vocab_size": VOCAB_SIZE + 2}
_event: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def thinking_model(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with marks around its reasoning."""
    folder = tmp_path_factory.mktemp("models") / "thinking"
    shutil.copytree(tiny_chat_model, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    return folder


def events_of(text: str) -> list[dict[str, Any]]:
    """The stream's events, each as documented: under its name, numbered, and one that OpenAI's client knows."""
    events = []
    for number, block in enumerate(text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        _event.validate_python(event)
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


async def streamed(app: Served, *pieces: str, **fields: Any) -> list[dict[str, Any]]:
    asking = post(app, stream=True, **fields)
    await app.answer(*pieces)
    response = await asking
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def types(events: list[dict[str, Any]]) -> list[str]:
    """Types in order, several deltas of a kind as one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for place, name in enumerate(names) if not (name.endswith("delta") and names[place - 1] == name)]


def deltas(events: list[dict[str, Any]], kind: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")


MESSAGE_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
CALL_EVENTS = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]
REASONING_EVENTS = [
    "output_item.added",
    "content_part.added",
    "reasoning_text.delta",
    "reasoning_text.done",
    "content_part.done",
    "output_item.done",
]


def test_a_stream_has_openai_s_events_in_openai_s_order(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            events = await streamed(app, "one", " two")
            assert types(events) == ["created", "in_progress", *MESSAGE_EVENTS, "completed"]
            assert deltas(events, "output_text") == "one two"
            created, in_progress, added, part, *_, text, part_done, done, completed = events
            for event in (created, in_progress):
                response = event["response"]
                assert (response["status"], response["output"], response["usage"]) == ("in_progress", [], None)
            assert (added["item"]["status"], added["item"]["content"]) == ("in_progress", [])
            assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            assert text["text"] == part_done["part"]["text"] == "one two"
            assert done["item"]["status"] == "completed"
            assert completed["response"]["output"] == [done["item"]]
            assert completed["response"]["usage"]["output_tokens"] > 2
            items = {(event["item_id"], event["output_index"], event["content_index"]) for event in events[3:-2]}
            assert items == {(done["item"]["id"], 0, 0)}

    run(test())


def test_what_a_stream_ends_with_is_what_is_stored(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            *_, completed = await streamed(app, "one")
            path = f"{RESPONSES}/{completed['response']['id']}"
            assert (await app.http.get(path)).json() == completed["response"]

    run(test())


def test_a_whole_answer_says_what_a_stream_says(tmp_path: Path, thinking_model: Path):
    pieces = ("<think>", "hm", "</think>", "let me see", WEATHER_CALL)

    def without_ids(response: dict[str, Any]) -> dict[str, Any]:
        changing = ("id", "created_at", "completed_at", "performance")
        output = [{**item, "id": None, "call_id": None} for item in response["output"]]
        return {**response, **dict.fromkeys(changing), "output": output}

    async def test() -> None:
        async with served(tmp_path, thinking_model, THINKING) as app:
            *_, completed = await streamed(app, *pieces, tools=[FUNCTION])
            asking = post(app, tools=[FUNCTION])
            await app.answer(*pieces)
            assert without_ids((await asking).json()) == without_ids(completed["response"])
            kinds = [item["type"] for item in completed["response"]["output"]]
            assert kinds == ["reasoning", "message", "function_call"]

    run(test())


def test_calls_stream_their_arguments(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            events = await streamed(app, *[f"{WEATHER_CALL}\n"] * 2, tools=[FUNCTION])
            assert types(events) == ["created", "in_progress", *CALL_EVENTS * 2, "completed"]
            calls = events[-1]["response"]["output"]
            assert len({call["id"] for call in calls} | {call["call_id"] for call in calls}) == 4
            for index, call in enumerate(calls):
                of_call = [event for event in events if event.get("output_index") == index]
                assert of_call[0]["item"] == {**call, "status": "in_progress", "arguments": ""}
                assert deltas(of_call, "function_call_arguments") == call["arguments"]
                assert (of_call[-2]["arguments"], of_call[-2]["name"]) == (call["arguments"], "weather")
                assert json.loads(call["arguments"]) == {"city": "Oslo"}

    run(test())


def test_reasoning_is_an_item_before_the_answer(tmp_path: Path, thinking_model: Path):
    async def test() -> None:
        async with served(tmp_path, thinking_model, THINKING) as app:
            include = ["reasoning.encrypted_content"]
            events = await streamed(app, "<think>", "hm ", "hm", "</think>", "one", include=include)
            assert types(events) == ["created", "in_progress", *REASONING_EVENTS, *MESSAGE_EVENTS, "completed"]
            response = events[-1]["response"]
            reasoning, message = response["output"]
            assert deltas(events, "reasoning_text") == reasoning["content"][0]["text"] == "hm hm"
            assert (reasoning["summary"], reasoning["status"]) == ([], "completed")
            assert message["content"][0]["text"] == "one"
            assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
            # Sent back without its text, as clients do that trust the server alone, it is the same reasoning.
            carried = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
            prompts = []
            for item in (reasoning, carried):
                asking = post(app, input=[{"role": "user", "content": "a"}, item, message], store=False)
                prompts.append((await app.answer("one")).prompt_token_ids)
                assert (await asking).status_code == 200
            assert prompts[0] == prompts[1]

    run(test())


async def cut(app: Served, *pieces: str) -> None:
    submit = await app.answer(*pieces[:-1], finish_reason=None)
    app.engine.step(submit.request_id, *app.ids(pieces[-1]), finish_reason="length")


@pytest.mark.parametrize("pieces", [("one",), ("<think>", "hm")])
def test_a_stream_that_is_cut_ends_incomplete(tmp_path: Path, thinking_model: Path, pieces: tuple[str, ...]):
    async def test() -> None:
        async with served(tmp_path, thinking_model, THINKING) as app:
            asking = post(app, stream=True, max_output_tokens=5)
            await cut(app, *pieces)
            *_, done, last = events_of((await asking).text)
            assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
            assert last["type"] == "response.incomplete"
            response = last["response"]
            assert response["incomplete_details"] == {"reason": "max_output_tokens"}
            assert response["output"] == [done["item"]]
            goes_on = post(app, input="go on", previous_response_id=response["id"])
            await app.answer("one")
            assert (await goes_on).status_code == 200

    run(test())


def test_the_logprobs_of_a_delta_are_those_of_its_tokens(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True, include=["message.output_text.logprobs"])
            submit = await app.submitted()
            euro = app.ids("€")  # three bytes, three tokens: only the last makes a character
            assert len(euro) == 3
            for token in (*app.ids("one")[:1], *euro, submit.stop_token_ids[0]):
                reason = "stop" if token in submit.stop_token_ids else None
                output = SequenceOutput(submit.request_id, [token], reason, logprobs=[TokenLogprobs(-0.5)])
                app.engine.send(StepOutput([output]))
            events = events_of((await asking).text)
            with_text = [event for event in events if event["type"] == "response.output_text.delta"]
            assert [len(event["logprobs"]) for event in with_text] == [1, 3]
            (done,) = [event for event in events if event["type"] == "response.output_text.done"]
            assert [token["bytes"] for token in done["logprobs"][1:]] == [[byte] for byte in "€".encode()]
            assert done["logprobs"][0]["top_logprobs"] == []

    run(test())


def test_an_error_before_the_first_step_is_an_http_status(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            submit = await app.submitted()
            output = SequenceOutput(submit.request_id, finish_reason="error", error="the prompt cannot be held")
            app.engine.send(StepOutput([output]))
            error = assert_openai_error(await asking, 500)
            assert error["message"] == "the prompt cannot be held"

    run(test())


def test_an_error_after_it_ends_the_stream_as_failed(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            submit = await app.answer("one", finish_reason=None)
            output = SequenceOutput(submit.request_id, finish_reason="error", error="it broke")
            app.engine.send(StepOutput([output]))
            *others, error, failed = events_of((await asking).text)
            assert types(others) == ["created", "in_progress", *MESSAGE_EVENTS]
            assert (error["type"], error["message"], error["code"]) == ("error", "it broke", "internal_error")
            assert error["error"] == {
                "message": "it broke",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }
            response = failed["response"]
            assert (failed["type"], response["status"]) == ("response.failed", "failed")
            assert response["error"] == {"code": "server_error", "message": "it broke"}
            assert [item["status"] for item in response["output"]] == ["incomplete"]
            stored = await app.http.get(f"{RESPONSES}/{response['id']}")
            assert stored.json() == response

    run(test())


def test_a_client_that_leaves_frees_its_sequence_and_nothing_is_stored(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True)
            submit = await app.answer("one", finish_reason=None)
            await app.until(lambda: len(app.client.generations[submit.request_id].output_token_ids) > 0)
            asking.cancel()
            assert await app.engine.read() == Cancel(submit.request_id)
            assert_openai_error(await app.http.get(f"{RESPONSES}/{submit.request_id}"), 404)

    run(test())
