"""What every answer has in common, whatever the route: ids, keys, CORS, and errors in OpenAI's form."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.cli.health import fetch_health
from api.ring_machines import Absence
from config import Settings
from tests.api.served_app import BODY, run, served

COMPLETIONS = "/v1/chat/completions"


def assert_openai_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", COMPLETIONS, 405, "method_not_supported"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_supported"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
def test_what_is_not_there_is_said_in_openai_s_form(
    tmp_path: Path, tiny_chat_model: Path, method: str, path: str, status: int, code: str
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            response = await app.http.request(method, path)
            assert_openai_error(response, status, code)
            if status == 405:
                assert response.headers["allow"]

    run(test())


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/chat/completions", "/v1/v1/messages", "/api/v1/models"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_wrong_base_url_is_answered_with_the_right_one(tmp_path: Path, tiny_chat_model: Path, method: str, path: str):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            error = assert_openai_error(await app.http.request(method, path), 404, "unknown_url")
            assert f"({method} {path})" in error["message"]
            assert "http://HOST:PORT/v1" in error["message"] and "/docs" in error["message"]

    run(test())


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[]", {}, 400),
        (b'{"model": NaN}', {}, 400),
        (b"model=tiny", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"{" + b" " * 2000 + b"}", {}, 413),
    ],
)
def test_a_body_that_is_no_request_never_leaks_another_form_of_error(
    tmp_path: Path, tiny_chat_model: Path, content: bytes, headers: dict[str, str], status: int
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_body_bytes=1000) as app:
            response = await app.http.post(
                COMPLETIONS, content=content, headers={"content-type": "application/json", **headers}
            )
            assert_openai_error(response, status)

    run(test())


def test_a_body_that_never_ends_is_refused_at_its_limit(tmp_path: Path, tiny_chat_model: Path):
    async def chunks():
        for _ in range(200):
            yield b" " * 65536

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_body_bytes=100_000) as app:
            response = await app.http.post(COMPLETIONS, content=chunks(), headers={"content-type": "application/json"})
            assert_openai_error(response, 413, "request_too_large")

    run(test())


def test_the_client_s_request_id_comes_back_and_another_one_where_it_is_not_sane(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            answers = [
                await app.http.get("/v1/models", headers={"x-request-id": given} if given else {})
                for given in ("mine-1", "x" * 200, "")
            ]
            ids = [answer.headers["x-request-id"] for answer in answers]
            assert ids[0] == "mine-1"
            assert all(request_id.startswith("req_") for request_id in ids[1:])
            assert ids[1] != ids[2]

    run(test())


def test_only_those_who_show_a_key_are_served_and_logs_know_its_label(
    tmp_path: Path, tiny_chat_model: Path, caplog: pytest.LogCaptureFixture
):
    keys = Settings.model_validate({"api_keys": "alice:secret-a,secret-b"}).api_keys

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys=keys) as app:
            for header in (
                None,
                "Bearer",
                "Bearer wrong",
                "Basic secret-a",
                "secret-a",
                "Bearer secret-a extra",
                "Bearer é",
            ):
                headers = [(b"authorization", header.encode("latin-1"))] if header else []
                assert_openai_error(await app.http.get("/v1/models", headers=headers), 401, "invalid_api_key")
            for key in ("wrong", "", "Bearer secret-a"):
                refused = await app.http.get("/v1/models", headers={"x-api-key": key})
                assert_openai_error(refused, 401, "invalid_api_key")
            for key in ("secret-a", "secret-b"):
                bearer, anthropic = {"authorization": f"Bearer {key}"}, {"x-api-key": key}
                for headers in (bearer, anthropic, anthropic | {"authorization": "Bearer not this one"}):
                    assert (await app.http.get("/v1/models", headers=headers)).status_code == 200
            assert (await app.http.get("/health")).status_code == 200
            caplog.set_level("INFO")
            headers = {"authorization": "Bearer secret-a"}
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json=BODY, headers=headers))
            await app.answer("hi")
            assert (await asking).status_code == 200
            assert "key=alice" in caplog.text
            assert "secret-a" not in caplog.text

    run(test())


@pytest.mark.parametrize("name", ["a\r\nx-made-up: 1", "a\x00b", "é\u2028\U0001f600", "x" * 20_000, ""])
def test_a_field_s_name_makes_neither_a_header_nor_a_line_of_the_log(
    tmp_path: Path, tiny_chat_model: Path, caplog: pytest.LogCaptureFixture, name: str
):
    caplog.set_level("INFO")

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, unknown_fields="warn") as app:
            asking = asyncio.create_task(app.http.post(COMPLETIONS, json={**BODY, name: 1}))
            await app.answer("hi")
            answer = await asking
            assert answer.status_code == 200
            assert "x-made-up" not in answer.headers
            assert len(answer.headers["x-ignored-fields"]) < 1000
            assert_openai_error(await app.http.get("/v1/models/%0da line"), 404)
            assert_openai_error(await app.http.post(COMPLETIONS, json={**BODY, "logit_bias": {name: "a"}}), 400)

    run(test())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("api.")]
    assert len(lines) == 4
    assert all(line.isprintable() and len(line) < 1500 for line in lines)


def test_health_tells_its_details_to_those_who_show_a_key(tmp_path: Path, tiny_chat_model: Path):
    keys = Settings.model_validate({"api_keys": "alice:secret-a,secret-b"}).api_keys

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys=keys) as app:
            app.supervisor.state, app.supervisor.detail = "failed", "/a/path is broken"
            for headers in ({}, {"authorization": "Bearer wrong"}):
                answer = await app.http.get("/health", headers=headers)
                assert answer.status_code == 503
                assert set(answer.json()) == {"status", "model", "uptime_s"}
            settings = Settings(api_port=int(app.url.rpartition(":")[2]), api_keys=keys)
            health = await asyncio.to_thread(fetch_health, settings)
            assert health and health["detail"] == "/a/path is broken" and health["ranks"]

    run(test())


def test_browsers_may_ask_without_a_key_what_they_may_send(tmp_path: Path, tiny_chat_model: Path):
    keys = Settings.model_validate({"api_keys": "secret"}).api_keys
    preflight = {
        "origin": "https://chat.example.com",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys=keys) as app:
            answer = await app.http.options(COMPLETIONS, headers=preflight)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "authorization" in answer.headers["access-control-allow-headers"]
            refused = await app.http.post(COMPLETIONS, json=BODY, headers={"origin": preflight["origin"]})
            assert_openai_error(refused, 401)
            assert refused.headers["access-control-allow-origin"] == "*"
            assert "x-request-id" in refused.headers["access-control-expose-headers"]

    run(test())


def test_cors_can_be_switched_off(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, cors_allow_origins=()) as app:
            answer = await app.http.get("/v1/models", headers={"origin": "https://chat.example.com"})
            assert "access-control-allow-origin" not in answer.headers

    run(test())


def test_head_and_options_are_answered(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            for path in ("/v1/models", "/v1/models/tiny", "/health"):
                answer = await app.http.head(path)
                assert answer.status_code == 200
                assert answer.content == b""
            answer = await app.http.options(COMPLETIONS)
            assert answer.status_code == 204
            assert "POST" in answer.headers["allow"]

    run(test())


def test_what_nobody_expected_is_a_500_in_openai_s_form_and_is_logged(
    tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            monkeypatch.setattr(app.supervisor, "accepting", lambda: 1 / 0)
            response = await app.http.post(COMPLETIONS, json=BODY, headers={"origin": "https://chat.example.com"})
            error = assert_openai_error(response, 500, "internal_error")
            assert "division" not in error["message"]
            assert response.headers["access-control-allow-origin"] == "*"
            assert "ZeroDivisionError" in caplog.text

    run(test())


def test_models_lists_the_one_model_under_both_its_names(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            listed = (await app.http.get("/v1/models")).json()
            assert listed["object"] == "list"
            (model,) = listed["data"]
            assert model["id"] == "tiny"
            assert model["object"] == "model"
            assert isinstance(model["created"], int)
            assert model["owned_by"]
            assert (await app.http.get("/v1/models/tiny")).json() == model
            quoted = str(tiny_chat_model).replace("/", "%2F")
            assert (await app.http.get(f"/v1/models/{quoted}")).json() == model

    run(test())


@pytest.mark.parametrize("state", ["starting", "restarting", "failed", "stopping"])
def test_health_is_a_503_with_the_reason_while_nothing_is_served(tmp_path: Path, tiny_chat_model: Path, state: Any):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            healthy = await app.http.get("/health")
            assert healthy.status_code == 200
            assert healthy.json()["ranks"][0]["layers"] == [0, 4]
            app.supervisor.state, app.supervisor.detail = state, "rank 1 loads"
            answer = await app.http.get("/health")
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert (answer.json()["status"], answer.json()["detail"]) == (state, "rank 1 loads")

    run(test())


def test_health_names_the_machines_that_are_waited_for(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            assert (await app.http.get("/health")).json()["waiting_for"] == []
            app.supervisor.state = "restarting"
            app.supervisor.machines.missed = [Absence("mac2.local", 1_700_000_000.0, "it does not answer")]
            (absence,) = (await app.http.get("/health")).json()["waiting_for"]
            since = "2023-11-14T22:13:20+00:00"
            assert absence == {"host": "mac2.local", "since": since, "reason": "it does not answer"}

    run(test())
