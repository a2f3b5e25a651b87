"""Chat completions in front of a scripted rank 0: what clients see when steps are late, wrong or never come."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI

from server.protocol import Cancel, SequenceOutput, StepOutput
from tests.api.served_app import BODY, Served, run, served
from tests.api.test_app import COMPLETIONS, assert_openai_error


def events(text: str) -> list[Any]:
    """The data of a stream's events, the last one as it is where it is no JSON."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def post(app: Served, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, **fields}))


def test_an_answer_has_openai_s_shape_and_our_timings(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, metadata={"a": "b"})
            submit = await app.answer("one", " two")
            answer = (await asking).json()
            assert answer["id"] == submit.request_id
            assert answer["object"] == "chat.completion"
            assert answer["model"] == "tiny"
            assert answer["metadata"] == {"a": "b"}
            (choice,) = answer["choices"]
            assert choice["message"] == {"role": "assistant", "content": "one two", "refusal": None, "annotations": []}
            assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
            usage = answer["usage"]
            assert usage["prompt_tokens"] == len(submit.prompt_token_ids)
            assert usage["completion_tokens"] == len(app.ids("one")) + len(app.ids(" two")) + 1
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0
            times = answer["performance"]
            names = {
                "total_time",
                "tokens_per_second",
                "queue_time",
                "prefill_time",
                "time_to_first_token",
                "decode_time",
            }
            assert set(times) == names
            assert times["time_to_first_token"] == pytest.approx(times["queue_time"] + times["prefill_time"], abs=1e-5)
            assert times["total_time"] >= times["time_to_first_token"] + times["decode_time"] - 1e-5

    run(test())


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_has_openai_s_chunks_in_openai_s_order(tmp_path: Path, tiny_chat_model: Path, include_usage: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True, stream_options={"include_usage": include_usage})
            await app.answer("one", " two")
            response = await asking
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, done = events(response.text)
            assert done == "[DONE]"
            assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
            assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
            role, *texts, finish = chunks[: -1 if include_usage else None]
            assert role["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
            assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in texts) == "one two"
            assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "stop")
            assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (role, *texts))
            assert ["performance" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            if include_usage:
                assert chunks[-1]["choices"] == []
                assert chunks[-1]["usage"]["completion_tokens"] > 2
                assert all(chunk["usage"] is None for chunk in chunks[:-1])
            else:
                assert all("usage" not in chunk for chunk in chunks)

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_usage_says_how_much_of_the_prompt_was_cached(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
            await app.answer("one", num_cached_tokens=3)
            response = await asking
            usage = events(response.text)[-2]["usage"] if stream else response.json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 3

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_answer_and_frees_the_sequence(
    tmp_path: Path, tiny_chat_model: Path, stream: bool
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=stream, stop=["o th", "zzz"])
            submit = await app.answer("one", " two", " three", finish_reason=None)
            assert await app.engine.read() == Cancel(submit.request_id)
            response = await asking
            if stream:
                chunks = events(response.text)[:-1]
                text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                reason = chunks[-1]["choices"][0]["finish_reason"]
            else:
                choice = response.json()["choices"][0]
                text, reason = choice["message"]["content"], choice["finish_reason"]
            assert (text, reason) == ("one tw", "stop")

    run(test())


def test_an_answer_may_be_empty(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, max_tokens=1)
            submit = await app.answer(finish_reason="stop")
            assert (submit.max_tokens, submit.max_tokens_given) == (1, True)
            answer = (await asking).json()
            assert answer["choices"][0]["message"]["content"] == ""
            assert answer["usage"]["completion_tokens"] == 1

    run(test())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 2])
def test_a_client_that_leaves_frees_its_sequence(
    tmp_path: Path, tiny_chat_model: Path, stream: bool, tokens_before: int, caplog: pytest.LogCaptureFixture
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            caplog.set_level("INFO")
            asking = post(app, stream=stream)
            submit = await app.answer(*["one"] * tokens_before, finish_reason=None)
            generation = app.client.generations[submit.request_id]
            await app.until(lambda: len(generation.output_token_ids) >= tokens_before)
            asking.cancel()
            assert await app.engine.read() == Cancel(submit.request_id)
            await app.until(lambda: "the client left" in caplog.text)
            assert app.client.generations == {}

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_an_http_status(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=stream)
            submit = await app.submitted()
            output = SequenceOutput(submit.request_id, finish_reason="error", error="the prompt cannot be held")
            app.engine.send(StepOutput([output]))
            error = assert_openai_error(await asking, 500)
            assert error["message"] == "the prompt cannot be held"

    run(test())


def test_an_error_after_the_first_token_is_an_event_that_the_sdk_raises(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with (
            served(tmp_path, tiny_chat_model) as app,
            AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as sdk,
        ):
            opening = asyncio.create_task(sdk.chat.completions.create(**BODY, stream=True))  # type: ignore[call-overload]
            submit = await app.answer("one", finish_reason=None)
            stream = await opening
            texts: list[str] = []
            with pytest.raises(APIError, match="broke"):
                async for chunk in stream:
                    texts.append(chunk.choices[0].delta.content or "")
                    if texts[-1]:
                        output = SequenceOutput(submit.request_id, finish_reason="error", error="it broke")
                        app.engine.send(StepOutput([output]))
            assert "".join(texts) == "one"

    run(test())


@pytest.mark.parametrize("started", [False, True])
def test_no_progress_is_a_504_or_an_error_event(tmp_path: Path, tiny_chat_model: Path, started: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, request_timeout=0.05) as app:
            asking = post(app, stream=True)
            if started:
                await app.answer("one", finish_reason=None)
            else:
                await app.submitted()
            while app.client.generations:
                await asyncio.sleep(0.01)
                app.client.expire("")
            response = await asking
            if not started:
                assert_openai_error(response, 504, "timeout")
                return
            assert response.status_code == 200
            last = events(response.text)[-1]
            assert last["error"]["code"] == "timeout"
            assert "REQUEST_TIMEOUT" in last["error"]["message"]

    run(test())


def test_a_full_queue_is_a_429_that_says_when_to_come_back(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        changes = {"max_concurrent_requests": 1}
        async with served(tmp_path, tiny_chat_model, changes, max_queued_requests=1) as app:
            first, second = post(app), post(app)
            await app.until(lambda: len(app.client.generations) == 2)
            refused = await app.http.post(COMPLETIONS, json=BODY)
            assert_openai_error(refused, 429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) > 0
            await app.answer("one")
            await app.answer("one")
            assert {(await first).status_code, (await second).status_code} == {200}

    run(test())


@pytest.mark.parametrize("state", ["starting", "failed", "stopping"])
def test_a_server_that_is_not_ready_answers_503(tmp_path: Path, tiny_chat_model: Path, state: Any):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            app.supervisor.state, app.supervisor.detail = state, "loading layers"
            response = await app.http.post(COMPLETIONS, json=BODY)
            error = assert_openai_error(response, 503, "server_not_ready")
            assert "loading layers" in error["message"]
            assert response.headers["retry-after"]

    run(test())


def test_a_request_waits_while_the_ring_is_restarted(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            app.supervisor.state = "restarting"
            app.client.suspend()
            asking = post(app)
            await app.until(lambda: len(app.client.generations) == 1)
            assert app.client.ready is not None
            app.client.serve(app.client.ready)
            await app.answer("one")
            assert (await asking).json()["choices"][0]["message"]["content"] == "one"

    run(test())


def test_a_stream_goes_on_over_a_restart_without_a_repeated_token(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=True, stream_options={"include_usage": True})
            first = await app.answer("one", " two", finish_reason=None, num_cached_tokens=2)
            generation = app.client.generations[first.request_id]
            ready = app.client.ready
            assert ready is not None
            delivered = [*app.ids("one"), *app.ids(" two")]
            await app.until(lambda: generation.output_token_ids == delivered)
            app.client.suspend()
            app.client.serve(ready)
            again = await app.answer(" three", num_cached_tokens=0)
            assert again.request_id == first.request_id
            assert again.output_token_ids == delivered
            assert again.sampling.seed == first.sampling.seed
            *chunks, last, _ = events((await asking).text)
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two three"
            assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 2  # as at its first start

    run(test())


def test_a_prompt_that_is_too_long_is_refused_in_openai_s_words(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 20}) as app:
            long = [{"role": "user", "content": "one two three four five " * 20}]
            error = assert_openai_error(await post(app, messages=long), 400, "context_length_exceeded")
            assert error["message"].startswith(
                "This model's maximum context length is 20 tokens. However, your messages"
            )
            error = assert_openai_error(await post(app, max_tokens=15), 400, "context_length_exceeded")
            assert "15 in the completion" in error["message"]
            asking = post(app)  # names no limit: gets what is left
            submit = await app.answer("one")
            assert submit.max_tokens == 20 - len(submit.prompt_token_ids)
            assert not submit.max_tokens_given
            await asking
            exact = post(app, max_tokens=20 - len(submit.prompt_token_ids))
            await app.answer("one")
            assert (await exact).status_code == 200

    run(test())


@pytest.mark.parametrize(("given", "sent"), [({}, 0), ({"priority": None}, 0), ({"priority": -7}, -7)])
def test_the_ring_is_told_the_priority(tmp_path: Path, tiny_chat_model: Path, given: dict[str, Any], sent: int):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, **given)
            assert (await app.answer("one")).priority == sent
            await asking

    run(test())


def test_the_settings_limit_prompts_and_answers(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_prompt_len_bytes=6, default_max_tokens=7) as app:
            asking = post(app)
            assert (await app.answer("one")).max_tokens == 7
            await asking
            for text in ("1234567", "äöü!"):
                error = assert_openai_error(await post(app, messages=[{"role": "user", "content": text}]), 400)
                assert "MAX_PROMPT_LEN_BYTES" in error["message"]

    run(test())


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"messages": []}, 400, "empty_array"),
        ({"temperature": "hot"}, 400, "invalid_type"),
        ({"frobnicate": 1}, 400, "unknown_parameter"),
        ({"store": True}, 400, "unsupported_parameter"),
        ({"logit_bias": {"512": 1}}, 400, "invalid_value"),
        ({"messages": [{"role": "system", "content": ""}, BODY["messages"][0]]}, 400, "invalid_messages"),
    ],
)
def test_a_wrong_request_never_reaches_the_ring(
    tmp_path: Path, tiny_chat_model: Path, fields: dict[str, Any], status: int, code: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            assert_openai_error(await post(app, **fields), status, code)
            asking = post(app, user="the next one")
            await app.answer("one")
            assert (await asking).status_code == 200

    run(test())


def test_unknown_fields_are_named_in_a_header_where_they_are_let_pass(
    tmp_path: Path, tiny_chat_model: Path, caplog: pytest.LogCaptureFixture
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, unknown_fields="warn") as app:
            asking = post(app, frobnicate=1, größe=2)
            await app.answer("one")
            response = await asking
            assert response.status_code == 200
            assert set(response.headers["x-ignored-fields"].split(", ")) == {"frobnicate", "gr\\xf6\\xdfe"}
            assert "frobnicate" in caplog.text

    run(test())


def test_each_request_leaves_one_line_in_the_log(
    tmp_path: Path, tiny_chat_model: Path, caplog: pytest.LogCaptureFixture
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            caplog.set_level("INFO", "api")
            caplog.clear()
            asking = post(app, user="someone\n" + "x" * 100)
            submit = await app.answer("one")
            await asking
            (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("api")]
            for part in (submit.request_id, "model=tiny", "prompt_tokens=", "finish_reason=stop", "tokens_per_second="):
                assert part in line
            assert "user='someone\\nxx" in line and "x" * 60 not in line

    run(test())
