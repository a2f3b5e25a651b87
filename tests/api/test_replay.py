"""A ring is lost in the middle of everything: each stream goes on exactly where it stopped, whatever it asked for."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faulty_ranks import FaultyRank
from tests.running_server import RunningServer

pytestmark = pytest.mark.ring

HELLO = {"role": "user", "content": "hello world"}
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 70, "maxItems": 90}
DATA = {"type": "object", "properties": {"data": NUMBERS}, "required": ["data"], "additionalProperties": False}
STORE = {"type": "function", "function": {"name": "store", "strict": True, "parameters": DATA}}
CHAT, COMPLETIONS, MESSAGES, RESPONSES = "chat/completions", "completions", "messages", "responses"
LONG = {"max_tokens": 300, "ignore_eos": True}
ATTEMPTS = 5  # to have all streams run at once
# Of each stream its endpoint and what it asks for.
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy, with logprobs": (CHAT, {**LONG, "temperature": 0, "logprobs": True, "top_logprobs": 3}),
    "two seeded choices": (CHAT, {**LONG, "temperature": 1, "seed": 7, "n": 2}),
    "penalties, min_tokens and a stop string": (
        CHAT,
        {
            "max_tokens": 300,
            "min_tokens": 250,
            "temperature": 1,
            "seed": 8,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.5,
            "repetition_penalty": 1.1,
            "stop": ["hello world hello"],
        },
    ),
    "a schema": (
        CHAT,
        {
            "max_tokens": 500,
            "seed": 9,
            "response_format": {"type": "json_schema", "json_schema": {"name": "data", "strict": True, "schema": DATA}},
        },
    ),
    "a tool": (CHAT, {"max_tokens": 500, "seed": 10, "tools": [STORE], "tool_choice": "required"}),
    "echo, with logprobs of the prompt": (COMPLETIONS, {**LONG, "echo": True, "logprobs": 2, "temperature": 0}),
    "Anthropic's": (MESSAGES, {"max_tokens": 300, "temperature": 0}),
    "a response": (RESPONSES, {"max_output_tokens": 300, "temperature": 0, "store": False}),
}
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [HELLO]},
    MESSAGES: {"messages": [HELLO]},
    RESPONSES: {"input": "hello world"},
    COMPLETIONS: {"prompt": "The quick brown fox jumps over the lazy dog. " * 20},
}
# What differs between two runs of the same request.
OWN = {"id", "created", "created_at", "completed_at", "performance", "item_id", "call_id", "request_id"}


@pytest.fixture(scope="module")
def faulty_rank(tmp_path_factory: pytest.TempPathFactory) -> FaultyRank:
    return FaultyRank("wedge", 1, tmp_path_factory.mktemp("fault") / "now")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_chat_model: Path, faulty_rank: FaultyRank
) -> Iterator[RunningServer]:
    about = {"MODEL_REPO": str(tiny_chat_model), "RING_SIZE": "2", "PREFIX_CACHE": "false", "STEP_TIMEOUT": "8"}
    made = RunningServer(tmp_path_factory.mktemp("server") / "project", {**about, **faulty_rank.environment})
    made.start()
    yield made
    made.stop()


class Reader:
    """One stream and its events, as they come."""

    def __init__(self, server: RunningServer, http: httpx.AsyncClient, name: str) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        path, asked = STREAMS[name]
        body = {"model": server.model, "stream": True, **PROMPTS[path], **asked}
        self.task = asyncio.create_task(self._read(http, f"{server.url}/v1/{path}", body))

    async def _read(self, http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
        async with http.stream("POST", url, json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))

    def leaves(self) -> list[Any]:
        """All that the events say, choice by choice: their values in order. Pings say only that a pause was long."""
        events = [event for event in self.events if event.get("type") != "ping"]
        of_choices = sorted(events, key=lambda event: (event.get("choices") or [{}])[0].get("index", 0))
        return [leaf for event in of_choices for leaf in leaves_of(event)]


def leaves_of(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, member in value.items():
            if key not in OWN:
                yield key
                yield from leaves_of(member)
    elif isinstance(value, list):
        for member in value:
            yield from leaves_of(member)
    else:
        yield value


async def read_all(server: RunningServer, *, amid: Callable[[], None] | None = None) -> dict[str, list[Any]]:
    """What every stream says, all running at once; `amid` is called when each has said something and none has ended."""
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        for _ in range(ATTEMPTS):
            readers = [Reader(server, http, name) for name in STREAMS]
            if amid is None or await all_are_amid(readers):
                break
            await asyncio.gather(*[reader.task for reader in readers])
        else:
            raise AssertionError("on this machine one ends before another begins")
        if amid is not None:
            amid()
        await asyncio.gather(*[reader.task for reader in readers])
        return {reader.name: reader.leaves() for reader in readers}


async def all_are_amid(readers: list[Reader]) -> bool:
    """When each has said something; whether none has ended by then."""
    while not all(len(reader.events) >= 10 or reader.task.done() for reader in readers):
        await asyncio.sleep(0.001)
    return not any(reader.task.done() for reader in readers)


def assert_same(disturbed: dict[str, list[Any]], undisturbed: dict[str, list[Any]]) -> None:
    for name, expected in undisturbed.items():
        said = [leaf for leaf in disturbed[name] if not isinstance(leaf, float)]
        assert said == [leaf for leaf in expected if not isinstance(leaf, float)], name
        # Logits differ in their last bits with the rows that are computed together.
        numbers = [leaf for leaf in expected if isinstance(leaf, float)]
        assert [leaf for leaf in disturbed[name] if isinstance(leaf, float)] == pytest.approx(numbers, abs=1e-3), name


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> dict[str, list[Any]]:
    return asyncio.run(read_all(server))


def test_every_kind_of_stream_goes_on_exactly_when_a_rank_is_killed(
    server: RunningServer, undisturbed: dict[str, list[Any]]
):
    pid = server.health()["ranks"][1]["pid"]
    num_lost = server.log().count("state: ready -> restarting")
    assert_same(asyncio.run(read_all(server, amid=lambda: os.kill(pid, signal.SIGKILL))), undisturbed)
    assert server.log().count("state: ready -> restarting") == num_lost + 1


def test_a_ring_that_is_stuck_says_where_and_its_streams_go_on(
    server: RunningServer, undisturbed: dict[str, list[Any]], faulty_rank: FaultyRank
):
    assert_same(asyncio.run(read_all(server, amid=faulty_rank.fail_in_the_next_step)), undisturbed)
    log = server.log()
    for rank in (0, 1):
        assert re.search(rf"rank {rank}/2].*stacks of all threads, because .* completed no step for \d+ s", log)
    assert "wedge" in log.partition("stacks of all threads")[2]
