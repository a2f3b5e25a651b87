"""instructor, over OpenAI's SDK: answers of a class by tools and by JSON schema, whole and as they come."""

from __future__ import annotations

from typing import Any

import pytest

from tests.running_server import RunningServer
from tests.sdks.conftest import Import
from tests.sdks.weather import HELLO, MAX_TOKENS, QUESTION, Weather

pytestmark = [pytest.mark.ring, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def instructor(import_sdk: Import) -> Any:
    return import_sdk("instructor")


@pytest.fixture
def fields(server: RunningServer) -> Any:
    return {"model": server.model, "max_tokens": MAX_TOKENS, "max_retries": 0, "temperature": 0}


def test_a_chat_without_a_class_is_the_sdk_s_own(instructor: Any, server: RunningServer, fields: Any):
    client = instructor.from_openai(server.client())
    answer = client.chat.completions.create(**fields | {"max_tokens": 4}, messages=HELLO, response_model=None)
    assert answer.usage.completion_tokens <= 4


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_an_answer_is_of_its_class_in_every_mode(instructor: Any, server: RunningServer, fields: Any, mode: str):
    client = instructor.from_openai(server.client(), mode=instructor.Mode[mode])
    answer = client.chat.completions.create(**fields, messages=QUESTION, response_model=Weather)
    assert isinstance(answer, Weather)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_an_answer_grows_while_it_comes(instructor: Any, server: RunningServer, fields: Any, mode: str):
    client = instructor.from_openai(server.client(), mode=instructor.Mode[mode])
    partial = list(client.chat.completions.create_partial(**fields, messages=QUESTION, response_model=Weather))
    assert len(partial) > 1
    Weather.model_validate(partial[-1].model_dump())
