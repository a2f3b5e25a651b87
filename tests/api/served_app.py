"""The real application behind real HTTP, in front of a scripted rank 0: everything of the api but processes.

For tests of what clients see in cases that a real ring does not produce on demand (a step that never comes, an engine's
error, a ring that goes away). Only the supervisor's loop does not run; its state is set.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn

from api.app import create_app
from api.connections import KEEP_ALIVE_S, Connections
from api.engine_client import EngineClient
from api.supervisor import Supervisor
from api.tokenizer import ChatTokenizer
from config import Settings
from server.protocol import Started, StepOutput, Submit
from tests.api.fake_engine import READY, FakeEngine, connected
from tests.ports import free_ports
from tests.tiny_chat_model import VOCAB_SIZE

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@cache
def _tokenizer(model: Path) -> ChatTokenizer:
    return ChatTokenizer(model)


@dataclass
class Served:
    http: httpx.AsyncClient
    engine: FakeEngine
    client: EngineClient
    supervisor: Supervisor
    tokenizer: ChatTokenizer
    url: str

    def ids(self, text: str) -> list[int]:
        return self.tokenizer._tokenizer.encode(text, add_special_tokens=False)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                await asyncio.sleep(0.001)

    async def submitted(self) -> Submit:
        """The next request, as the ring gets it."""
        message = await self.engine.read()
        assert isinstance(message, Submit), message
        return message

    async def answer(self, *pieces: str, finish_reason: str | None = "stop", num_cached_tokens: int = 0) -> Submit:
        """Take the next request and answer it with `pieces`, a step each."""
        submit = await self.submitted()
        self.engine.send(StepOutput(started=[Started(submit.request_id, num_cached_tokens)]))
        for piece in pieces:
            self.engine.step(submit.request_id, *self.ids(piece))
        if finish_reason is not None:
            self.engine.step(submit.request_id, submit.stop_token_ids[0], finish_reason=finish_reason)
        return submit


@asynccontextmanager
async def served(
    folder: Path,
    model: Path,
    ready: dict[str, Any] | None = None,
    *,
    host: str = "127.0.0.1",
    max_connections: int = 1000,
    **keys: Any,
) -> AsyncIterator[Served]:
    """`ready`: changes to what the ring says it can; `keys`: settings."""
    settings = Settings(model_name="tiny", model_repo=str(model), project_root=folder, **keys)
    client = EngineClient(
        settings.for_ranks(),
        max_queued_requests=settings.max_queued_requests,
        request_timeout_s=settings.request_timeout,
        max_concurrent_per_key=settings.max_concurrent_requests_per_key,
        max_queued_per_key=settings.max_queued_requests_per_key,
    )
    supervisor = Supervisor(settings, client, "test")
    tokenizer = _tokenizer(model)
    port = free_ports(1)
    http_server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, client, supervisor),
            http=Connections(max_connections=max_connections, silence_s=settings.request_timeout).accept,  # pyright: ignore[reportArgumentType]
            timeout_keep_alive=KEEP_ALIVE_S,
            host=host,
            port=port,
            log_config=None,
            lifespan="off",
        )
    )
    http_server.config.load()
    http_server.lifespan = http_server.config.lifespan_class(http_server.config)
    about = msgspec.structs.replace(READY, **{"vocab_size": VOCAB_SIZE, **(ready or {})})
    async with connected(client, folder, about) as engine:
        supervisor.tokenizer, supervisor.state, supervisor.detail = tokenizer, "ready", ""
        await http_server.startup()
        url = f"http://{host}:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            yield Served(http, engine, client, supervisor, tokenizer, url)
        # Uvicorn's own end takes its time in tenths of a second.
        for server in http_server.servers:
            server.close()
        for task in list(http_server.server_state.tasks):
            task.cancel()
    supervisor.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)
