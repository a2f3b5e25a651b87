"""Raw prompts in front of a scripted rank 0: their forms, several answers at once, echo, logprobs, the best of many."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from server.protocol import Cancel, SequenceOutput, Started, StepOutput, Submit, TokenLogprobs
from tests.api.chat.test_chat_route import events
from tests.api.served_app import Served, run, served
from tests.api.test_app import assert_openai_error
from tests.tiny_chat_model import VOCAB_SIZE

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "hello"}
ALTERNATIVES = [5, 6, 7, 8, 9]


def post(app: Served, **fields: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, **fields}))


async def submits(app: Served, number: int) -> list[Submit]:
    """The next requests that reach the ring."""
    messages = [await app.engine.read() for _ in range(number)]
    assert all(isinstance(message, Submit) for message in messages), messages
    return messages


def likely(token_ids: list[int], num_top: int | None, logprob: float) -> list[TokenLogprobs]:
    """What the ring says of tokens that were this likely; nothing where nobody asked."""
    if num_top is None:
        return []
    top = ALTERNATIVES[:num_top]
    return [TokenLogprobs(logprob, top, [-1.0 - place for place in range(num_top)]) for _ in token_ids]


def answer(
    app: Served, submit: Submit, *pieces: str, finish_reason: str | None = "stop", logprob: float = -0.5
) -> None:
    """What a ring says of a request: its prompt's logprobs, `pieces` a step each, and the token that ends it."""
    app.engine.send(StepOutput(started=[Started(submit.request_id, 0)]))
    sampling = submit.sampling
    if (num_top := sampling.prompt_logprobs) is not None:
        scored = likely(submit.prompt_token_ids[1:], num_top, -2.0)
        output = SequenceOutput(submit.request_id, prompt_logprobs=scored, prompt_logprobs_start=1)
        app.engine.send(StepOutput([output]))
    for piece in pieces:
        ids = app.ids(piece)
        output = SequenceOutput(submit.request_id, ids, logprobs=likely(ids, sampling.logprobs, logprob))
        app.engine.send(StepOutput([output]))
    if finish_reason is not None:
        last = [submit.stop_token_ids[0]]
        output = SequenceOutput(
            submit.request_id, last, finish_reason, logprobs=likely(last, sampling.logprobs, logprob)
        )
        app.engine.send(StepOutput([output]))


def texts(app: Served, token_ids: list[int]) -> list[str]:
    return [app.tokenizer.decode([token_id]) for token_id in token_ids]


def test_an_answer_has_openai_s_shape_and_our_timings(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt="one two")
            (submit,) = await submits(app, 1)
            assert submit.prompt_token_ids == app.ids("one two")
            assert (submit.max_tokens, submit.max_tokens_given) == (16, True)
            answer(app, submit, " three", " four")
            completion = (await asking).json()
            assert completion["id"] == submit.request_id
            assert completion["id"].startswith("cmpl-")
            assert (completion["object"], completion["model"]) == ("text_completion", "tiny")
            assert completion["choices"] == [
                {"text": " three four", "index": 0, "logprobs": None, "finish_reason": "stop"}
            ]
            usage = completion["usage"]
            assert usage["prompt_tokens"] == len(submit.prompt_token_ids)
            assert usage["completion_tokens"] == len(app.ids(" three")) + len(app.ids(" four")) + 1
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert completion["performance"]["total_time"] > 0

    run(test())


@pytest.mark.parametrize("form", ["text", "texts", "ids", "id lists"])
def test_a_prompt_may_have_any_of_openai_s_forms(tmp_path: Path, tiny_chat_model: Path, form: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            ids = app.ids("one two")
            prompt = {"text": "one two", "texts": ["one two"], "ids": ids, "id lists": [ids]}[form]
            asking = post(app, prompt=prompt, echo=True)
            (submit,) = await submits(app, 1)
            assert submit.prompt_token_ids == ids
            answer(app, submit, " three")
            assert (await asking).json()["choices"][0]["text"] == "one two three"

    run(test())


def test_several_prompts_and_answers_run_at_once_and_are_numbered_as_at_openai(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt=["one", "two two"], n=2, seed=7)
            requests = await submits(app, 4)
            prompts = [app.ids("one"), app.ids("two two")]
            assert [submit.prompt_token_ids for submit in requests] == [prompts[0]] * 2 + [prompts[1]] * 2
            assert [submit.sampling.seed for submit in requests] == [7, 8, 7, 8]
            for place in (3, 1, 0, 2):  # in whatever order they come
                answer(app, requests[place], f" answer {'abcd'[place]}")
            completion = (await asking).json()
            assert [choice["index"] for choice in completion["choices"]] == [0, 1, 2, 3]
            assert [choice["text"][-1] for choice in completion["choices"]] == ["a", "b", "c", "d"]
            assert completion["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[1])
            assert completion["usage"]["completion_tokens"] == sum(
                len(app.ids(f" answer {letter}")) + 1 for letter in "abcd"
            )

    run(test())


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_has_the_chunks_of_every_answer(tmp_path: Path, tiny_chat_model: Path, include_usage: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            options = {"stream_options": {"include_usage": True}} if include_usage else {}
            asking = post(app, prompt=["one", "two"], stream=True, echo=True, **options)
            first, second = await submits(app, 2)
            answer(app, second, " b", " c", finish_reason=None)
            answer(app, first, " a")
            last = [second.stop_token_ids[0]]
            app.engine.send(StepOutput([SequenceOutput(second.request_id, last, "length")]))
            *chunks, done = events((await asking).text)
            assert done == "[DONE]"
            assert {chunk["object"] for chunk in chunks} == {"text_completion"}
            assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
            choices = [choice for chunk in chunks for choice in chunk["choices"]]
            for index, text, reason in ((0, "one a", "stop"), (1, "two b c", "length")):
                own = [choice for choice in choices if choice["index"] == index]
                assert "".join(choice["text"] for choice in own) == text
                assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + [reason]
            assert ["performance" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            if include_usage:
                assert chunks[-1]["choices"] == []
                assert chunks[-1]["usage"]["prompt_tokens"] == len(app.ids("one")) + len(app.ids("two"))
                assert all(chunk["usage"] is None for chunk in chunks[:-1])
            else:
                assert all("usage" not in chunk for chunk in chunks)

    run(test())


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_openai_s_legacy_form(tmp_path: Path, tiny_chat_model: Path, echo: bool, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt="one two", logprobs=2, echo=echo, stream=stream)
            (submit,) = await submits(app, 1)
            assert submit.sampling.logprobs == 2
            assert submit.sampling.prompt_logprobs == (2 if echo else None)
            answer(app, submit, " three", " four")
            response = await asking
            if stream:
                parts = [chunk["choices"][0]["logprobs"] for chunk in events(response.text)[:-1]]
                logprobs = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
            else:
                logprobs = response.json()["choices"][0]["logprobs"]
            prompt_ids, sampled = app.ids("one two"), [*app.ids(" three"), *app.ids(" four")]
            tokens = texts(app, [*(prompt_ids if echo else []), *sampled])
            assert logprobs["tokens"] == [*tokens, "<|im_end|>"]
            of_prompt = [None, *[-2.0] * (len(prompt_ids) - 1)] if echo else []
            assert logprobs["token_logprobs"] == [*of_prompt, *[-0.5] * (len(sampled) + 1)]
            alternatives = dict(zip(texts(app, ALTERNATIVES[:2]), (-1.0, -2.0)))
            assert logprobs["top_logprobs"][-1] == {**alternatives, "<|im_end|>": -0.5}
            assert (logprobs["top_logprobs"][0] is None) == echo
            # From the beginning of the prompt, as at OpenAI, echoed or not.
            whole, offsets = "one two three four", logprobs["text_offset"]
            assert offsets[0] == (0 if echo else len("one two"))
            assert [whole[start:end] for start, end in pairwise(offsets)] == tokens

    run(test())


def test_a_prompt_is_scored_by_its_first_answer_and_the_others_wait_for_it(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt=["one two three", "four five"], n=2, logprobs=1, echo=True, stream=True)
            requests = await submits(app, 4)
            assert [submit.sampling.prompt_logprobs for submit in requests] == [1, None, 1, None]
            for place in (1, 3, 2):  # the second answers are ready before their prompts are scored
                answer(app, requests[place], " six")
            await app.until(lambda: len(app.client.generations) == 1)
            # Part of a prompt is scored, and its reading begins anew on another ring or after a preemption.
            first, num_scored = requests[0], len(requests[0].prompt_token_ids) - 1
            scored = likely(first.prompt_token_ids[1:], 1, -7.0)[: num_scored - 1]
            app.engine.send(
                StepOutput([SequenceOutput(first.request_id, prompt_logprobs=scored, prompt_logprobs_start=1)])
            )
            answer(app, first, " six")
            *chunks, _ = events((await asking).text)
            for index, prompt in enumerate(["one two three"] * 2 + ["four five"] * 2):
                own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
                assert "".join(choice["text"] for choice in own) == f"{prompt} six"
                values = [value for choice in own for value in choice["logprobs"]["token_logprobs"]]
                prompt_ids, sampled = app.ids(prompt), app.ids(" six")
                assert values == [None, *[-2.0] * (len(prompt_ids) - 1), *[-0.5] * (len(sampled) + 1)]

    run(test())


def test_an_answer_whose_prompt_cannot_be_scored_ends_with_the_error(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt="one two", n=2, logprobs=1, echo=True)
            first, second = await submits(app, 2)
            answer(app, second, " three")
            app.engine.send(StepOutput([SequenceOutput(first.request_id, finish_reason="error", error="broken")]))
            assert_openai_error(await asking, 500)

    run(test())


def test_a_token_that_is_part_of_a_character_is_named_by_its_bytes(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt="a世b", echo=True, logprobs=0, max_tokens=0)
            (submit,) = await submits(app, 1)
            answer(app, submit, "x", finish_reason="length")
            choice = (await asking).json()["choices"][0]
            assert choice["text"] == "a世b"
            logprobs = choice["logprobs"]
            assert logprobs["tokens"] == ["a", "bytes:\\xe4", "bytes:\\xb8", "bytes:\\x96", "b"]
            assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
            assert logprobs["top_logprobs"] == [None, *[{name: -2.0} for name in logprobs["tokens"][1:]]]

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_without_an_answer(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            asking = post(app, prompt=["one two", "three"], echo=True, logprobs=1, max_tokens=0, **options)
            for submit in await submits(app, 2):
                assert submit.max_tokens == 1
                answer(app, submit, finish_reason="stop")
            response = await asking
            if stream:
                *chunks, last, _ = events(response.text)
                choices, usage = [chunk["choices"][0] for chunk in chunks], last["usage"]
            else:
                choices, usage = response.json()["choices"], response.json()["usage"]
            choices.sort(key=lambda choice: choice["index"])
            for choice, prompt in zip(choices, ("one two", "three"), strict=True):
                assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
                assert choice["logprobs"]["tokens"] == texts(app, app.ids(prompt))
            assert usage["completion_tokens"] == 0
            assert usage["total_tokens"] == usage["prompt_tokens"] == len(app.ids("one two")) + len(app.ids("three"))

    run(test())


def test_the_best_of_several_answers_come_back_and_all_are_counted(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt=["one", "two"], n=2, best_of=3)
            requests = await submits(app, 6)
            for submit, letter, logprob in zip(requests, "abcdef", (-3.0, -0.1, -1.0, -0.2, -5.0, -0.3), strict=True):
                assert submit.sampling.logprobs == 0
                answer(app, submit, f" {letter}", logprob=logprob)
            completion = (await asking).json()
            assert [(choice["index"], choice["text"]) for choice in completion["choices"]] == [
                (0, " b"), (1, " c"), (2, " d"), (3, " f"),
            ]  # fmt: skip
            assert all(choice["logprobs"] is None for choice in completion["choices"])
            num_tokens = sum(len(app.ids(f" {letter}")) + 1 for letter in "abcdef")
            assert completion["usage"]["completion_tokens"] == num_tokens

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_and_frees_its_sequence(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, stream=stream, stop="wo th", logprobs=0)
            (submit,) = await submits(app, 1)
            answer(app, submit, "one", " two", " three", finish_reason=None)
            assert await app.engine.read() == Cancel(submit.request_id)
            response = await asking
            chunks = events(response.text)[:-1] if stream else [response.json()]
            choices = [chunk["choices"][0] for chunk in chunks]
            assert "".join(choice["text"] for choice in choices) == "one t"
            assert choices[-1]["finish_reason"] == "stop"

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_all_its_sequences(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, prompt=["one", "two"], stream=stream)
            requests = await submits(app, 2)
            answer(app, requests[0], "one", finish_reason=None)
            asking.cancel()
            cancelled = {(await app.engine.read()).request_id for _ in requests}
            assert cancelled == {submit.request_id for submit in requests}
            await app.until(lambda: app.client.generations == {})

    run(test())


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": 7}, "prompt", "invalid_type"),
        ({"prompt": ["one", 7]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, "one"]}, "prompt[1]", "invalid_type"),
        ({"prompt": [True]}, "prompt[0]", "invalid_type"),
        ({"prompt": [1.5]}, "prompt[0]", "invalid_type"),
        ({"prompt": [[1], []]}, "prompt[1]", "empty_array"),
        ({"prompt": [1, -1]}, "prompt[1]", "integer_below_min_value"),
        ({"prompt": [1, VOCAB_SIZE]}, "prompt[1]", "invalid_value"),
        ({"prompt": [[1], [1, 2, VOCAB_SIZE]]}, "prompt[1][2]", "invalid_value"),
        ({"prompt": [2**70]}, "prompt[0]", "integer_above_max_value"),
        ({"prompt": ["short", "one two three " * 40]}, "prompt[1]", "context_length_exceeded"),
        ({"prompt": "x" * 100_000}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 64}, "prompt", "context_length_exceeded"),
        ({"prompt": [1] * 40, "max_tokens": 30}, "prompt", "context_length_exceeded"),
        ({"prompt": ["one"] * 1025}, "prompt", "array_above_max_length"),
        ({"prompt": ["one"] * 100, "n": 20}, "prompt", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"min_tokens": 17}, "min_tokens", "invalid_value"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 2, "best_of": 1}, "best_of", "invalid_value"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
        ({"suffix": "the end"}, "suffix", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_400_that_names_it(
    tmp_path: Path, tiny_chat_model: Path, fields: dict[str, Any], param: str, code: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            error = assert_openai_error(await app.http.post(COMPLETIONS, json={**BODY, **fields}), 400, code)
            assert error["param"] == param
            assert app.client.generations == {}
            asking = post(app)
            (submit,) = await submits(app, 1)
            answer(app, submit, "one")
            assert (await asking).status_code == 200

    run(test())


def test_what_asks_for_nothing_is_no_mistake(tmp_path: Path, tiny_chat_model: Path):
    nothing = {
        "best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": {}, "logprobs": None, "max_tokens": None,
        "n": 1, "presence_penalty": 0, "seed": None, "stop": None, "stream": False, "stream_options": None,
        "suffix": "", "temperature": 1, "top_p": 1, "user": "",
    }  # fmt: skip

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = post(app, **nothing)
            (submit,) = await submits(app, 1)
            answer(app, submit, "one")
            assert (await asking).json()["choices"][0]["text"] == "one"

    run(test())


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_a_missing_field_is_named(tmp_path: Path, tiny_chat_model: Path, field: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            body = {name: value for name, value in BODY.items() if name != field}
            error = assert_openai_error(await app.http.post(COMPLETIONS, json=body), 400, "missing_required_parameter")
            assert error["param"] == field

    run(test())


def test_a_prompt_may_fill_the_context_but_for_the_answer(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 20}) as app:
            asking = post(app, prompt=[1] * 16, max_tokens=4)
            (submit,) = await submits(app, 1)
            assert submit.max_tokens == 4
            answer(app, submit, "one")
            assert (await asking).status_code == 200

    run(test())


def test_the_openai_sdk_completes(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with (
            served(tmp_path, tiny_chat_model) as app,
            AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as sdk,
        ):
            asking = asyncio.create_task(sdk.completions.create(model="tiny", prompt=["one", "two"], logprobs=1))
            for submit in await submits(app, 2):
                answer(app, submit, " three")
            completion = await asking
            assert [choice.text for choice in completion.choices] == [" three", " three"]
            logprobs = completion.choices[1].logprobs
            assert logprobs is not None and logprobs.text_offset is not None
            assert logprobs.text_offset[0] == len("two")
            assert completion.usage is not None and completion.usage.completion_tokens > 2
            opening = asyncio.create_task(
                sdk.completions.create(model="tiny", prompt="one", stream=True, stream_options={"include_usage": True})
            )
            (submit,) = await submits(app, 1)
            answer(app, submit, " two", " three")
            chunks = [chunk async for chunk in await opening]
            assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " two three"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.prompt_tokens == len(app.ids("one"))

    run(test())
