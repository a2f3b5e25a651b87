"""Clients of all kinds that come, ask and leave: what a server sees in a day, in minutes.

Chats whole and streamed, two choices, schemas, tools, long prompts that share their beginnings, answers without a
limit; a third of the clients leaves before the first token, in the middle, or while it waits for a whole answer. It
counts what became of them and judges nothing. Used by `bench.soak`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.streams import new_http

LEAVING = 0.35  # of the clients
MOST_PATIENT_S = 0.6  # of those who leave without having seen a token
MOST_PIECES = 40  # of those who leave in the middle
NUM_QUESTIONS = 500  # the tokenizers library remembers up to 10,000 words, so new ones would look like a leak
NUM_TOPICS = 6  # long prompts with a beginning of their own, which several share

_FORM: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "note", "parameters": _FORM, "strict": True}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "form", "schema": _FORM, "strict": True}}
KINDS: dict[str, dict[str, Any]] = {
    "chat": {"max_tokens": 40},
    "stream": {"max_tokens": 80, "stream": True},
    "two choices": {"max_tokens": 30, "n": 2, "stream": True},
    "schema": {"max_tokens": 80, "response_format": _SCHEMA, "stream": True},
    "tools": {"max_tokens": 80, "tools": [_TOOL], "tool_choice": "required"},
    "logprobs": {"max_tokens": 20, "logprobs": True, "top_logprobs": 3},
    "long prompt": {"max_tokens": 20, "stream": True},
    "no limit": {"stream": True},
}


@dataclass
class MixedLoad:
    url: str
    model: str
    rng: random.Random
    answered: Counter[str] = field(default_factory=Counter)  # by kind
    left: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    async def run(self, num_clients: int, seconds: float) -> None:
        """So many at a time; when the time is over, those that still wait for an answer leave."""
        end = time.monotonic() + seconds
        async with new_http() as http:
            clients = [asyncio.create_task(self._client(http, end)) for _ in range(num_clients)]
            await asyncio.wait(clients, timeout=seconds)
            for client in clients:
                client.cancel()
            for result in await asyncio.gather(*clients, return_exceptions=True):
                if isinstance(result, Exception):
                    self.errors.append(repr(result))

    async def _client(self, http: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            kind = self.rng.choice(list(KINDS))
            patience_s: float | None = None
            pieces: int | None = None
            if self.rng.random() < LEAVING:
                if KINDS[kind].get("stream") and self.rng.random() < 0.6:
                    pieces = self.rng.randint(1, MOST_PIECES)
                else:
                    patience_s = self.rng.uniform(0, MOST_PATIENT_S)
            try:
                async with asyncio.timeout(patience_s):
                    stayed = await self._ask(http, self._body(kind), pieces)
            except TimeoutError:
                stayed = False
            (self.answered if stayed else self.left)[kind] += 1

    def _body(self, kind: str) -> dict[str, Any]:
        words = f"Question {self.rng.randrange(NUM_QUESTIONS)}."
        if kind == "long prompt":
            words = f"Topic {self.rng.randrange(NUM_TOPICS)}: " + "the quick brown fox jumps. " * 50 + words
        return {"model": self.model, "messages": [{"role": "user", "content": words}], **KINDS[kind]}

    async def _ask(self, http: httpx.AsyncClient, body: dict[str, Any], pieces: int | None) -> bool:
        """Whether it stayed to the end; after `pieces` it leaves."""
        async with http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                self.errors.append(f"{response.status_code}: {(await response.aread()).decode()[:200]}")
            num_pieces = 0
            async for line in response.aiter_lines():
                num_pieces += line.startswith("data: {")
                if '"error"' in line[:20]:
                    self.errors.append(line)
                if num_pieces == pieces:
                    return False
        return True
