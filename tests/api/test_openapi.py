"""The description of the API: it names every route, refers to nothing that is not there, and needs no other host."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from api import routes
from api.openapi import OPERATIONS, Operation, document
from api.schemas.errors import AnthropicErrorResponse, ErrorResponse
from api.validation import validate
from config import Settings
from tests.api.served_app import run, served

UNDESCRIBED = {"/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json"}


def refs(value: Any) -> Iterator[str]:
    """Every `$ref` in it."""
    if isinstance(value, dict):
        yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        for member in value.values():
            yield from refs(member)
    elif isinstance(value, list):
        for member in value:
            yield from refs(member)


def test_the_description_names_every_route_and_no_other():
    modules = [importlib.import_module(f"api.routes.{module.name}") for module in pkgutil.iter_modules(routes.__path__)]
    found = {
        (method.lower(), re.sub(r":\w+}", "}", route.path), route.name)
        for module in modules
        for route in module.router.routes
        if isinstance(route, APIRoute) and route.path not in UNDESCRIBED
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert {(operation.method, operation.path, operation.name) for operation in OPERATIONS} == found


@pytest.mark.parametrize("has_keys", [False, True])
def test_all_it_refers_to_is_there_and_all_that_is_there_is_referred_to(has_keys: bool):
    description = document("tiny", has_keys)
    schemas = {f"#/components/schemas/{name}" for name in description["components"]["schemas"]}
    assert set(refs(description)) == schemas


def test_fields_that_are_not_done_take_only_what_asks_for_nothing():
    chat = document("tiny", False)["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["additionalProperties"] is False
    assert set(chat["required"]) == {"model", "messages"}
    assert chat["properties"]["store"]["enum"] == [None, False]
    assert {"type": "string"} in chat["properties"]["stop"]["anyOf"][0]["anyOf"]


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation.request is not None])
def test_the_example_of_a_body_is_one_that_is_taken(operation: Operation):
    described = document("tiny", False)["paths"][operation.path][operation.method]
    example = described["requestBody"]["content"]["application/json"]["example"]
    request, ignored = validate(operation.request, example, "reject")
    assert request.model == "tiny" and not ignored


def test_errors_are_described_by_status_and_in_the_form_of_their_path():
    paths = document("tiny", True)["paths"]
    answered = paths["/v1/chat/completions"]["post"]["responses"]
    assert {"400", "401", "404", "408", "413", "415", "429", "500", "503", "504"} < set(answered)
    assert "401" not in document("tiny", False)["paths"]["/v1/chat/completions"]["post"]["responses"]
    for path, methods in paths.items():
        form = AnthropicErrorResponse if path.startswith("/v1/messages") else ErrorResponse
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status != "200" and path != "/health":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema["$ref"] == f"#/components/schemas/{form.__name__}"


def test_the_page_and_its_files_are_open_and_come_from_this_server(tmp_path: Path, tiny_chat_model: Path):
    keys = Settings.model_validate({"api_keys": "secret"}).api_keys

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, api_keys=keys) as app:
            description = (await app.http.get("/openapi.json")).json()
            assert description == document("tiny", True)
            assert description["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}, {"x-api-key": []}]
            page = await app.http.get("/docs")
            assert page.headers["content-type"].startswith("text/html")
            assert re.findall(r"https?://[^\s\"'<]+", page.text) == []
            for name, kind in (("swagger-ui-bundle.js", "javascript"), ("swagger-ui.css", "css")):
                assert f"docs/{name}" in page.text
                file = await app.http.get(f"/docs/{name}")
                assert file.status_code == 200
                assert kind in file.headers["content-type"]
            for path in UNDESCRIBED:
                assert (await app.http.head(path)).status_code == 200
            assert (await app.http.get("/docs/favicon.png")).status_code == 401

    run(test())


def test_every_real_error_is_of_the_described_form(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            for path, form in (("/v1/chat/completions", ErrorResponse), ("/v1/messages", AnthropicErrorResponse)):
                for content, status in ((b"{", 400), (b'{"model": "other", "messages": []}', 400)):
                    headers = {"content-type": "application/json"}
                    response = await app.http.post(path, content=content, headers=headers)
                    assert response.status_code == status
                    form.model_validate_json(response.content)

    run(test())
