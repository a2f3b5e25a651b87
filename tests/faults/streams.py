"""Eight streams of different kinds, as clients read them: what each of them said, and when its pieces came.

What must be the same whatever happens to the ring is in `Said`, so two runs of a request compare by `==`. It knows of
no fault. Used by the rounds of `tests.faults`, and through them by `bench.faults`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

Bodies = Mapping[str, dict[str, Any]]  # of requests, by their names

SILENT_S = 240.0  # without a byte: longer than any restart, so the stream was forgotten

_STATION: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "readings": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 8},
        "note": {"type": "string", "maxLength": 80},
    },
    "required": ["name", "readings", "note"],
    "additionalProperties": False,
}
_ROUTE: Any = {
    "type": "object",
    "properties": {
        "legs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"to": {"enum": ["Paris", "Rome", "Oslo"]}, "km": {"type": "integer"}},
                "required": ["to", "km"],
                "additionalProperties": False,
            },
            "minItems": 3,
            "maxItems": 6,
        },
        "why": {"type": "string", "maxLength": 70},
    },
    "required": ["legs", "why"],
    "additionalProperties": False,
}


def _tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}


def _schema(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def requests(model: str, *, tokens: int = 100) -> Bodies:
    """The bodies of the eight, by name. Their answers have up to two times `tokens`, each another number."""
    tools = [_tool("report", _STATION), _tool("travel", _ROUTE)]
    long_text = " ".join(f"{number} foxes jump over the lazy dog." for number in range(40))
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0, "max_tokens": tokens * 2, "ignore_eos": True},
        "greedy, long prompt": {"temperature": 0, "max_tokens": tokens, "logprobs": True, "text": long_text},
        "sampled": {"temperature": 1, "seed": 11, "max_tokens": tokens * 3 // 2, "logprobs": True},
        "sampled, penalties": {
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": 12,
            "frequency_penalty": 0.7,
            "repetition_penalty": 1.1,
            "max_tokens": tokens * 5 // 4,
            "ignore_eos": True,
        },
        "schema": {"temperature": 0.9, "seed": 13, "response_format": _schema("station", _STATION)},
        "schema, greedy": {"temperature": 0, "response_format": _schema("route", _ROUTE)},
        "tools, required": {"temperature": 0.9, "seed": 15, "tools": tools, "tool_choice": "required"},
        "tools, auto": {"temperature": 0.9, "seed": 16, "tools": tools, "tool_choice": "auto"},
    }
    return {
        name: {
            "model": model,
            "messages": [{"role": "user", "content": fields.pop("text", f"Tell me of {name} things.")}],
            "max_tokens": tokens * 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        for name, fields in kinds.items()
    }


@dataclass
class Call:
    name: str = ""
    arguments: str = ""
    num_ids: int = 0  # a call says its id once


@dataclass
class Said:
    """All of a stream but what differs from run to run: ids and times, and what a prefix cache happened to hold."""

    num_ids: int = 0  # of the answer; all its chunks carry the same
    num_roles: int = 0
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # where logprobs name them
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[tuple[int, int, int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_done: int = 0

    def difference(self, other: Said) -> str:
        """Where they differ first, for people; empty where they do not."""
        for name, mine in vars(self).items():
            its = getattr(other, name)
            if isinstance(mine, str) and mine != its:
                start = next((i for i, (a, b) in enumerate(zip(mine, its)) if a != b), min(len(mine), len(its)))
                return f"{name} from character {start} on: {mine[start:][:80]!r} and not {its[start:][:80]!r}"
            if mine != its:
                return f"{name}: {mine!r} and not {its!r}"
        return ""


@dataclass
class Stream:
    """One request on its way. `arrivals` are those of the pieces of its answer, by this process's monotonic clock."""

    name: str
    said: Said = field(default_factory=Said)
    arrivals: list[float] = field(default_factory=list)
    ended_at: float | None = None
    _ids: set[str] = field(default_factory=set)

    def pause_after(self, moment: float) -> float:
        """The longest wait for a piece or the end that was over after `moment`; of its part after that moment."""
        ends = [*self.arrivals, self.ended_at or time.monotonic()]
        starts = [moment, *self.arrivals]
        return max((end - max(start, moment) for start, end in zip(starts, ends) if end > moment), default=0.0)

    def next_after(self, moment: float) -> float | None:
        """How long after `moment` its next piece or the end came; None where it had ended."""
        later = [arrival for arrival in (*self.arrivals, self.ended_at or moment) if arrival > moment]
        return min(later) - moment if later else None

    def take(self, event: dict[str, Any]) -> bool:
        """Whether it held a piece of the answer."""
        if "error" in event:
            self.said.errors.append(str(event["error"]))
            return False
        self._ids.add(event["id"])
        self.said.num_ids = len(self._ids)
        if usage := event.get("usage"):
            self.said.usages.append(tuple(usage[f"{part}_tokens"] for part in ("prompt", "completion", "total")))
        return any([self._take_choice(choice) for choice in event["choices"]])

    def _take_choice(self, choice: dict[str, Any]) -> bool:
        said, delta = self.said, choice["delta"]
        said.num_roles += bool(delta.get("role"))
        said.content += delta.get("content") or ""
        for part in delta.get("tool_calls") or []:
            if part["index"] == len(said.calls):
                said.calls.append(Call())
            call, function = said.calls[part["index"]], part.get("function") or {}
            call.num_ids += bool(part.get("id"))
            call.name += function.get("name") or ""
            call.arguments += function.get("arguments") or ""
        scored = (choice.get("logprobs") or {}).get("content") or []
        said.tokens += [token["token"] for token in scored]
        if reason := choice.get("finish_reason"):
            said.finish_reasons.append(reason)
        return bool(delta.get("content") or delta.get("tool_calls") or scored)


OnPiece = Callable[[Stream], None]


async def read(http: httpx.AsyncClient, url: str, body: dict[str, Any], stream: Stream, on_piece: OnPiece) -> None:
    """Reads the stream to its end, whatever that is; `on_piece` is called after each piece."""
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                stream.said.errors.append(f"{response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    stream.said.num_done += 1
                elif line.startswith("data: ") and stream.take(json.loads(line.removeprefix("data: "))):
                    stream.arrivals.append(time.monotonic())
                    on_piece(stream)
    except httpx.HTTPError as error:
        stream.said.errors.append(repr(error))
    stream.ended_at = time.monotonic()


def new_http() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=httpx.Timeout(SILENT_S), limits=limits)


async def read_all(url: str, bodies: Bodies, on_piece: OnPiece = lambda stream: None) -> Sequence[Stream]:
    """All at once, to their ends."""
    streams = [Stream(name) for name in bodies]
    async with new_http() as http:
        await asyncio.gather(*(read(http, url, bodies[stream.name], stream, on_piece) for stream in streams))
    return streams
