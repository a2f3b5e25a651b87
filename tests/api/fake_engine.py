"""Rank 0's end of the socket for tests of the api alone: it says what the test tells it to say.

It speaks `server.protocol` over a real unix socket, so what the engine client reads and writes is what a ring would.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from api.engine_client import EngineClient
from server.protocol import (
    Configure,
    FromEngine,
    RankInfo,
    Ready,
    SequenceOutput,
    Started,
    StepOutput,
    ToEngine,
    encode,
)

_to_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)

READY = Ready(
    model_path="/nowhere",
    max_sequence_length=64,
    kv_cache_tokens=256,
    vocab_size=100,
    max_concurrent_requests=2,
    ranks=[RankInfo(0, "here", 1, (0, 4), memory_bytes=1, kv_cache_bytes=0, kv_cache_bytes_limit=10)],
)


class FakeEngine:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, socket_path: Path) -> FakeEngine:
        engine = cls(*await asyncio.open_unix_connection(socket_path))
        assert isinstance(await engine.read(), Configure)
        return engine

    async def read(self, timeout_s: float = 5) -> Any:
        """The api's next message."""
        async with asyncio.timeout(timeout_s):
            length = int.from_bytes(await self._reader.readexactly(4), "big")
            return _to_engine.decode(await self._reader.readexactly(length))

    def send(self, message: FromEngine) -> None:
        self._writer.write(encode(message))

    def step(self, request_id: str, *token_ids: int, finish_reason: str | None = None, start: bool = False) -> None:
        output = SequenceOutput(request_id, list(token_ids), finish_reason)
        self.send(StepOutput([output], [Started(request_id, 0)] if start else []))

    async def leave(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@asynccontextmanager
async def connected(client: EngineClient, folder: Path, ready: Ready = READY) -> AsyncIterator[FakeEngine]:
    """A ring that serves: connected, and said to be ready."""
    async with client.listening(folder / "s"):
        engine = await FakeEngine.connect(folder / "s")
        client.serve(ready)
        yield engine
        await engine.leave()
