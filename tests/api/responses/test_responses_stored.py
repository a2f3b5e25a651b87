"""What can be done with responses that are stored, in front of a scripted rank 0."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import ResponseItemList

from tests.api.responses.test_responses import LONG, RESPONSES, answered, message, post
from tests.api.served_app import run, served
from tests.api.test_app import assert_openai_error

KEYS = ("alice:a-key", "bob:b-key")


def test_a_stored_response_comes_back_as_it_was(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await answered(app)
            path = f"{RESPONSES}/{response['id']}"
            assert (await app.http.get(path)).json() == response
            included = await app.http.get(path, params={"include[]": "message.output_text.logprobs", "stream": "false"})
            assert included.json() == response
            assert (await app.http.get(path, params={"beta": "true"})).json() == response  # client.beta.responses
            deleted = (await app.http.delete(path)).json()
            assert deleted == {"id": response["id"], "object": "response.deleted", "deleted": True}
            for method in ("GET", "DELETE"):
                assert_openai_error(await app.http.request(method, path), 404, "response_not_found")

    run(test())


def test_a_response_that_was_not_to_be_stored_is_not(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await answered(app, store=False)
            assert response["store"] is False
            assert_openai_error(await app.http.get(f"{RESPONSES}/{response['id']}"), 404, "response_not_found")

    run(test())


def test_a_server_that_stores_nothing_says_so(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, responses_store_max=0) as app:
            assert (await answered(app))["store"] is False
            assert assert_openai_error(await post(app, store=True), 400, "unsupported_parameter")["param"] == "store"

    run(test())


def test_the_store_keeps_as_many_as_the_settings_say(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, responses_store_max=2) as app:
            responses = [await answered(app) for _ in range(3)]
            statuses = [(await app.http.get(f"{RESPONSES}/{response['id']}")).status_code for response in responses]
            assert statuses == [404, 200, 200]

    run(test())


def test_another_key_s_responses_are_not_there(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys=KEYS) as app:
            response = await answered(app, key="a-key")
            path = f"{RESPONSES}/{response['id']}"
            theirs = {"Authorization": "Bearer b-key"}
            for method, below in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
                assert_openai_error(
                    await app.http.request(method, path + below, headers=theirs), 404, "response_not_found"
                )
            refused = await post(app, key="b-key", previous_response_id=response["id"])
            assert_openai_error(refused, 400, "previous_response_not_found")
            reference = [{"type": "item_reference", "id": response["output"][0]["id"]}]
            assert_openai_error(await post(app, key="b-key", input=reference), 400, "item_not_found")
            own = {"Authorization": "Bearer a-key"}
            assert (await app.http.get(path, headers=own)).status_code == 200

    run(test())


def test_input_items_are_listed_in_pages(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            first = await answered(app, "one")
            second = await answered(
                app, "three", input=[{"id": "mine", **message("user", "two")}], previous_response_id=first["id"]
            )
            path = f"{RESPONSES}/{second['id']}/input_items"

            async def page(**params: Any) -> dict[str, Any]:
                body = (await app.http.get(path, params=params)).json()
                ResponseItemList.model_validate(body)
                return body

            newest_first = await page()
            texts = [item["content"][0]["text"] for item in newest_first["data"]]
            assert (texts, newest_first["has_more"]) == (["two", "one", "hello"], False)
            assert newest_first["data"][0] == {
                "id": "mine",
                "type": "message",
                "status": "completed",
                "role": "user",
                "content": [{"type": "input_text", "text": "two"}],
            }
            ids = [item["id"] for item in newest_first["data"]][::-1]
            assert (newest_first["first_id"], newest_first["last_id"]) == (ids[2], ids[0])
            start = await page(order="asc", limit=2)
            assert ([item["id"] for item in start["data"]], start["has_more"]) == (ids[:2], True)
            rest = await page(order="asc", limit=2, after=ids[1])
            assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (ids[2:], False)

    run(test())


def test_items_of_one_id_are_listed_each_once(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            first = await answered(app, "one", input=[{"id": "mine", **message("user", "hello")}])
            again = [{"id": "mine", **message("user", text)} for text in ("two", "three")]
            reference = {"type": "item_reference", "id": first["output"][0]["id"]}
            second = await answered(app, input=[*again, reference], previous_response_id=first["id"])
            texts, ids, more = [], [], True
            while more and len(ids) < 10:
                params = {"order": "asc", "limit": 1, **({"after": ids[-1]} if ids else {})}
                page = (await app.http.get(f"{RESPONSES}/{second['id']}/input_items", params=params)).json()
                texts.append(page["data"][0]["content"][0]["text"])
                ids.append(page["last_id"])
                more = page["has_more"]
            assert texts == ["hello", "one", "two", "three", "one"]
            assert ids[:2] == ["mine", first["output"][0]["id"]]

    run(test())


@pytest.mark.parametrize(
    "content", ["one", [{"type": "output_text", "text": "one"}], [{"type": "input_text", "text": "one"}]]
)
def test_what_the_assistant_said_is_listed_as_in_an_answer(tmp_path: Path, tiny_chat_model: Path, content: Any):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            said = {"role": "assistant", "content": content}
            response = await answered(app, input=[message("user", "hello"), said, message("user", "two")])
            items = (await app.http.get(f"{RESPONSES}/{response['id']}/input_items")).json()["data"]
            assert items[1]["content"] == [{"type": "output_text", "text": "one", "annotations": [], "logprobs": []}]

    run(test())


@pytest.mark.parametrize(
    ("below", "params", "param"),
    [
        ("", {"stream": "true"}, "stream"),
        ("", {"starting_after": "3"}, "starting_after"),
        ("", {"include[]": "file_search_call.results"}, "include[0]"),
        ("", {"expand": "all"}, "expand"),
        ("/input_items", {"limit": "101"}, "limit"),
        ("/input_items", {"order": "up"}, "order"),
        ("/input_items", {"after": "none"}, "after"),
    ],
)
def test_a_query_is_checked_like_a_body(
    tmp_path: Path, tiny_chat_model: Path, below: str, params: dict[str, str], param: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await answered(app)
            refused = await app.http.get(f"{RESPONSES}/{response['id']}{below}", params=params)
            error = assert_openai_error(refused, 400)
            assert error["param"] == param
            assert "UNKNOWN_FIELDS" not in error["message"]  # which is about bodies

    run(test())


def test_there_is_nothing_to_cancel(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await answered(app)
            refused = await app.http.post(f"{RESPONSES}/{response['id']}/cancel")
            assert "synchronous" in assert_openai_error(refused, 400)["message"]
            assert_openai_error(await app.http.post(f"{RESPONSES}/resp_none/cancel"), 404, "response_not_found")

    run(test())


def test_input_tokens_are_counted_without_an_answer(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, LONG) as app:
            first = await answered(app)
            fields = {"input": "two", "instructions": "be brief", "previous_response_id": first["id"]}
            counted = await app.http.post(f"{RESPONSES}/input_tokens", json=fields)
            assert app.client.generations == {}
            body = await answered(app, **fields)
            assert counted.json() == {
                "object": "response.input_tokens",
                "input_tokens": body["usage"]["input_tokens"],
            }

    run(test())


def test_a_store_that_breaks_breaks_no_answer(tmp_path: Path, tiny_chat_model: Path, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            (tmp_path / ".run").mkdir()
            (tmp_path / ".run" / "responses.sqlite3").write_bytes(b"no database " * 1000)
            response = await answered(app)
            path = f"{RESPONSES}/{response['id']}"
            assert_openai_error(await app.http.get(path), 500, "store_failure")
            assert_openai_error(await post(app, previous_response_id=response["id"]), 500, "store_failure")
            assert f"{response['id']} is not stored" in caplog.text
            assert (await answered(app))["status"] == "completed"

    run(test())


def test_answers_wait_for_no_lock_of_the_store(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            stored = await answered(app)
            assert (await app.http.get(f"{RESPONSES}/{stored['id']}")).status_code == 200
            locked = sqlite3.connect(tmp_path / ".run" / "responses.sqlite3", isolation_level=None)
            locked.execute("BEGIN EXCLUSIVE")
            responses = [await answered(app) for _ in range(3)]
            locked.close()
            assert {response["status"] for response in responses} == {"completed"}

    run(test())
