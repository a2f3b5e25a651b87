"""The one client of all benchmarks: streamed chat requests to any OpenAI-like server, and when their text came.

It shares the machine's cores with the servers, so it does as little as it can: httpx and one JSON object a piece of
text. Times are of this process's monotonic clock, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Target:
    """Where to ask. `banned_token_ids` may not be sampled, so that every answer has its full length."""

    url: str
    model: str
    banned_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    messages: Messages
    max_tokens: int
    response_format: dict[str, Any] | None = None


@dataclass
class Answer:
    """What came, and when. A token without text of its own (half a character) shows with the next one."""

    started: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of pieces of text
    ended: float = 0.0
    text: str = ""
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first text, or to the end where there was none."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.started

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def gaps_between(self, start: float, end: float) -> list[float]:
        """Gaps that ended after `start` and until `end`."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [later - earlier for earlier, later in pairs if start < later <= end]


def new_http() -> httpx.AsyncClient:
    """A client without timeouts or a limit of connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=None, limits=limits)


async def ask(http: httpx.AsyncClient, target: Target, request: Request, answer: Answer | None = None) -> Answer:
    """Stream one answer; `answer` is filled as it comes, for callers that look meanwhile.

    Raises:
        RuntimeError: the server did not answer 200, or the stream broke off with an error.
    """
    answer = answer or Answer()
    body: dict[str, Any] = {
        "model": target.model,
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.response_format is not None:
        body["response_format"] = request.response_format
    if target.banned_token_ids:
        body["logit_bias"] = {str(token_id): -100 for token_id in target.banned_token_ids}
    answer.started = time.perf_counter()
    async with http.stream("POST", f"{target.url}/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} of {target.url}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                _take(json.loads(line[6:]), answer)
    answer.ended = time.perf_counter()
    return answer


def _take(event: dict[str, Any], answer: Answer) -> None:
    if "error" in event:
        raise RuntimeError(str(event["error"]))
    for choice in event.get("choices") or []:
        if piece := choice["delta"].get("content"):
            answer.arrivals.append(time.perf_counter())
            answer.text += piece
    if usage := event.get("usage"):
        answer.num_tokens = usage["completion_tokens"]
        answer.num_prompt_tokens = usage["prompt_tokens"]
        answer.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def _ask_all(target: Target, requests: Sequence[Request]) -> list[Answer]:
    async with new_http() as http:
        return await asyncio.gather(*(ask(http, target, request) for request in requests))


def ask_all(target: Target, requests: Sequence[Request]) -> list[Answer]:
    """All at once; their answers when the last one has ended."""
    return asyncio.run(_ask_all(target, requests))


def tokens_per_second(answers: Sequence[Answer]) -> float:
    """All their tokens over the time from the first request to the last piece of text: reading the prompts counts."""
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    return sum(answer.num_tokens for answer in answers) / seconds


def steady_tokens_per_second(answers: Sequence[Answer]) -> float:
    """Only while all streams ran: from the last one's first piece to the first one's last. NaN where they never did."""
    start = max((answer.arrivals or [answer.ended])[0] for answer in answers)
    end = min((answer.arrivals or [answer.started])[-1] for answer in answers)
    if end <= start:
        return float("nan")
    tokens = sum(
        answer.num_tokens / len(answer.arrivals) * sum(start < arrival <= end for arrival in answer.arrivals)
        for answer in answers
    )
    return tokens / (end - start)
