"""The edges of HTTP and of a request's limits: what is rare, and must neither kill the server nor surprise a client."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from api import body as body_module
from tests.api.fake_engine import READY
from tests.api.served_app import BODY, Served, run, served

COMPLETIONS = "/v1/chat/completions"


async def asked(app: Served, *pieces: str, finish_reason: str | None = "stop", **fields: Any) -> httpx.Response:
    """Asks, and answers as the ring with `pieces`."""
    asking = asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, **fields}))
    await app.answer(*pieces, finish_reason=finish_reason)
    return await asking


def port_of(response: httpx.Response) -> int:
    """The client's port: the same for two requests on one connection."""
    return response.extensions["network_stream"].get_extra_info("client_addr")[1]


def head(*fields: str) -> bytes:
    """The head of a request as it goes over the wire."""
    return "\r\n".join([f"POST {COMPLETIONS} HTTP/1.1", "Host: a", *fields, "", ""]).encode()


# -- HTTP ------------------------------------------------------------------------------------------------------------


def test_a_connection_goes_on_after_every_kind_of_error(tmp_path: Path, tiny_chat_model: Path):
    json_type = {"content-type": "application/json"}
    wrong: list[tuple[int, str, str, dict[str, Any]]] = [
        (400, "POST", COMPLETIONS, {"content": b"{", "headers": json_type}),
        (404, "POST", "/v1/nothing", {"json": BODY}),
        (404, "POST", COMPLETIONS, {"json": {**BODY, "model": "other"}}),
        (405, "DELETE", COMPLETIONS, {}),
        (413, "POST", COMPLETIONS, {"content": b" " * 200_000, "headers": json_type}),
        (415, "POST", COMPLETIONS, {"content": b"a=b", "headers": {"content-type": "text/plain"}}),
    ]

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_body_bytes=100_000) as app:
            ports = set()
            for status, method, path, content in wrong:
                response = await app.http.request(method, path, **content)
                assert response.status_code == status
                ports.add(port_of(response))
                following = await app.http.get("/v1/models")
                assert following.status_code == 200
                ports.add(port_of(following))
            assert len(ports) == 1

    run(test())


def test_a_body_that_stops_coming_gets_a_408_while_others_are_served(
    tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.2)

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(app.url.rpartition(":")[2]))
            writer.write(head("Content-Type: application/json", "Content-Length: 100") + b'{"model":')
            assert (await asked(app, "hi")).status_code == 200
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            assert b'"code":"request_timeout"' in await reader.readuntil(b"}}")
            writer.close()

    run(test())


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(app.url.rpartition(":")[2]))
            content = json.dumps(BODY).encode()
            writer.write(head(f"Content-Length: {len(content)}", "Expect: 100-continue"))
            assert (await reader.readline()).startswith(b"HTTP/1.1 100 ")
            await reader.readline()
            writer.write(content)
            await app.answer("hi")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_accepts_changes_nothing_and_compresses_nothing(
    tmp_path: Path, tiny_chat_model: Path, stream: bool
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            app.http.headers.update({"accept": "application/json", "accept-encoding": "gzip, deflate, zstd"})
            response = await asked(app, "hello", " world", stream=stream)
            assert response.status_code == 200
            assert "content-encoding" not in response.headers
            kind = "text/event-stream" if stream else "application/json"
            assert response.headers["content-type"].partition(";")[0] == kind
            assert response.content.endswith(b"data: [DONE]\n\n" if stream else b"}")

    run(test())


@pytest.mark.parametrize("method", ["HEAD", "PUT", "PATCH"])
def test_a_method_that_a_path_lacks_is_a_405_that_says_which_it_has(tmp_path: Path, tiny_chat_model: Path, method: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await app.http.request(method, COMPLETIONS)
            assert response.status_code == 405
            assert response.headers["allow"] == "POST"
            assert (response.content == b"") == (method == "HEAD")

    run(test())


def test_every_answer_has_an_id_of_its_own_and_the_request_s_in_its_header(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            app.http.headers["x-request-id"] = "mine"
            answers = [await asked(app, "hi") for _ in range(3)]
            assert len({answer.json()["id"] for answer in answers}) == 3
            assert {answer.headers["x-request-id"] for answer in answers} == {"mine"}
            streamed = await asked(app, "hi", " there", stream=True)
            events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line and "[DONE]" not in line]
            assert len({event["id"] for event in events}) == 1
            assert streamed.headers["x-request-id"] == "mine"

    run(test())


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('"temperature": NaN', 400),
        ('"temperature": -Infinity', 400),
        ('"temperature": 1e400', 400),
        ('"seed": 1' + "0" * 400, 400),
        ('"seed": 1' + "0" * 5000, 400),
        ('"max_tokens": 1.5', 400),
        ('"max_tokens": 1e2', 400),
        ('"max_tokens": true', 400),
        ('"max_tokens": "5"', 400),
        ('"temperature": 0, "temperature": 1', 400),
        ('"metadata": ' + '{"a":' * 5000 + "1" + "}" * 5000, 400),
        ('"metadata": ' + '{"a":' * 100_000, 400),
        ('"user": "\\ud83d"', 400),
        ('"user": "\\u0000"', 200),
    ],
)
def test_a_number_a_name_or_a_nesting_that_json_can_hold_and_a_request_cannot_is_a_400(
    tmp_path: Path, tiny_chat_model: Path, text: str, status: int
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            content = json.dumps(BODY)[:-1] + ", " + text + "}"
            headers = {"content-type": "application/json"}
            asking = asyncio.create_task(app.http.post(COMPLETIONS, content=content, headers=headers))
            if status == 200:
                await app.answer("hi")
            response = await asking
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["type"] == "invalid_request_error"

    run(test())


# -- the limits of an answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_says_nothing_gives_an_empty_answer(tmp_path: Path, tiny_chat_model: Path, stream: bool):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await asked(app, stream=stream)
            if stream:
                events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and "[DONE]" not in line]
                choices = [event["choices"][0] for event in events]
                assert "".join(choice["delta"].get("content") or "" for choice in choices) == ""
                assert choices[-1]["finish_reason"] == "stop"
            else:
                (choice,) = response.json()["choices"]
                assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
                assert response.json()["usage"]["completion_tokens"] == 1

    run(test())


def test_a_stop_string_that_is_the_first_token_leaves_nothing(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await asked(app, "hello", finish_reason=None, stop=["hello"])
            (choice,) = response.json()["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")

    run(test())


def test_an_answer_of_one_token_is_cut_by_its_length(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, "max_tokens": 1}))
            submit = await app.engine.read()
            assert submit.max_tokens == 1
            app.engine.step(submit.request_id, app.ids("a")[0], finish_reason="length", start=True)
            answer = (await asking).json()
            assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == (
                "a",
                "length",
            )
            assert answer["usage"]["completion_tokens"] == 1

    run(test())


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("parallel_tool_calls", [False, True])
def test_a_tool_call_that_is_cut_by_its_length_says_so(
    tmp_path: Path, tiny_chat_model: Path, tool_choice: Any, parallel_tool_calls: bool
):
    tool = {"type": "function", "function": {"name": "f"}}
    fields = {"tools": [tool], "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, {"max_sequence_length": 2048}) as app:
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, **fields, "max_tokens": 99}))
            submit = await app.answer('<tool_call>\n{"name": "f", "arguments": {"a', finish_reason=None)
            app.engine.step(submit.request_id, *app.ids("b"), finish_reason="length")
            (choice,) = (await asking).json()["choices"]
            assert choice["finish_reason"] == "length"
            (call,) = choice["message"]["tool_calls"]
            assert call["function"] == {"name": "f", "arguments": '{"ab'}

    run(test())


def test_a_prompt_and_its_answer_may_fill_the_context_to_the_last_token(tmp_path: Path, tiny_chat_model: Path):
    longest = READY.max_sequence_length

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json=BODY))
            length = len((await app.answer("hi")).prompt_token_ids)
            assert (await asking).status_code == 200
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, "max_tokens": longest - length}))
            assert (await app.answer("hi")).max_tokens == longest - length
            assert (await asking).status_code == 200
            refused = await app.http.post(COMPLETIONS, json={**BODY, "max_tokens": longest - length + 1})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")

    run(test())


@pytest.mark.parametrize(("left", "status"), [(1, 200), (0, 400), (-1, 400)])
def test_a_prompt_that_leaves_one_token_is_answered_and_one_that_leaves_none_is_refused(
    tmp_path: Path, tiny_chat_model: Path, left: int, status: int
):
    async def test() -> None:
        # As many tokens as the prompt of BODY has, and `left` more.
        async with served(tmp_path, tiny_chat_model) as app:
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json=BODY))
            length = len((await app.answer("hi")).prompt_token_ids)
            assert (await asking).status_code == 200
        (tmp_path / "again").mkdir()
        async with served(tmp_path / "again", tiny_chat_model, {"max_sequence_length": length + left}) as app:
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json=BODY))
            if status == 200:
                assert (await app.answer("hi")).max_tokens == 1
            response = await asking
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["code"] == "context_length_exceeded"

    run(test())
