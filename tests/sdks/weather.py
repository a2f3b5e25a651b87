"""What every SDK's tests ask for: a record with few possible values, as a structured answer and as a tool.

The tiny model's words are noise, so a record that is valid is one that the server's grammar made valid.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

MAX_TOKENS = 200  # more than any text of a `Weather` takes
HELLO: Any = [{"role": "user", "content": "hello world"}]
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


class Weather(BaseModel):
    """The weather of a city. Forbids more, else the tiny model has more and more to say."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome"]
    warm: bool


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "get_weather",
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"], "description": "where"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def assert_call(name: str | None, arguments: str | dict[str, Any] | None) -> None:
    """A call of `TOOL` with arguments that its schema allows."""
    assert name == "get_weather"
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert isinstance(given, dict)
    assert set(given) == {"city"} and given["city"] in ("Paris", "Rome")
