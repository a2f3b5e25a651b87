"""Sends made-up bodies to every endpoint of a running server and judges the answers.

An answer must have a documented status that is no 5xx and the documented form, a stream that has begun must hold no
error, and the ordinary request that follows must be served. Run by `python -m tests.fuzz` and by the tests.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from pydantic import TypeAdapter, ValidationError

from api.openapi import OPERATIONS, Operation, document
from api.schemas.errors import AnthropicErrorResponse, ErrorResponse
from tests.fuzz.bodies import MAX_TOKENS, Bodies

# DEFAULT_MAX_TOKENS is not for this endpoint: it has a default of its own.
DEFAULTS = {"/v1/completions": {"max_tokens": MAX_TOKENS}}
TARGETS = [operation for operation in OPERATIONS if operation.request is not None]


@dataclass
class Fuzzer:
    """`statuses`: how often each operation was answered with each status."""

    url: str
    model: str
    statuses: dict[str, Counter[int]] = field(default_factory=dict)

    def run(self, num_bodies: int, seed: int) -> None:
        """So many bodies, shared by the endpoints. AssertionError shows the smallest body that goes wrong."""
        with httpx.Client(base_url=self.url, timeout=60) as http:
            for operation in TARGETS:
                self._fuzz(operation, http, -(-num_bodies // len(TARGETS)), seed)

    def _fuzz(self, operation: Operation, http: httpx.Client, num_bodies: int, seed: int) -> None:
        description = document(self.model, False)
        described = description["paths"][operation.path][operation.method]
        schema = described["requestBody"]["content"]["application/json"]["schema"]
        bodies = Bodies(description["components"]["schemas"], self.model).of(schema, DEFAULTS.get(operation.path, {}))
        counts = self.statuses[operation.name] = Counter()

        @seeded(seed)
        @settings(
            max_examples=num_bodies,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        )
        @given(body=bodies)
        def send(body: bytes) -> None:
            headers = {"content-type": "application/json"}
            response = http.request(operation.method, operation.path, content=body, headers=headers)
            counts[response.status_code] += 1
            judge(operation, described["responses"], response)
            self._ask(http)

        send()

    def _ask(self, http: httpx.Client) -> None:
        """The ordinary request that comes next."""
        ordinary = {"model": self.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        response = http.post("/v1/chat/completions", json=ordinary)
        assert response.status_code == 200, f"the next ordinary request got {response.status_code}: {response.text}"
        assert response.json()["usage"]["completion_tokens"] == 1


def judge(operation: Operation, documented: dict[str, Any], response: httpx.Response) -> None:
    """AssertionError where an answer is none that the description promises."""
    status, text = response.status_code, response.text
    assert str(status) in documented and status < 500, f"{operation.path} answered {status}: {text[:500]}"
    assert response.headers["x-request-id"]
    if status != 200:
        form = AnthropicErrorResponse if operation.is_anthropic else ErrorResponse
        _check(form, response.content, text)
    elif response.headers["content-type"].startswith("text/event-stream"):
        for line in text.splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                _judge_event(operation, line.removeprefix("data: "))
    else:
        _check(operation.answer, response.content, text)


def _judge_event(operation: Operation, data: str) -> None:
    event = json.loads(data)
    assert not event.get("error") and event.get("type") != "response.failed", f"{operation.path} streamed {data[:500]}"
    _check(operation.events, data.encode(), data)


def _check(form: Any, content: bytes, text: str) -> None:
    try:
        TypeAdapter(form).validate_json(content)
    except ValidationError as error:
        raise AssertionError(f"not of the documented form: {text[:500]}\n{error}") from None
