"""The api's end of the socket to rank 0: it listens, gives rank 0 its settings, and passes on what rank 0 says.

What concerns requests goes to the engine client, in the order it came; the ring's life (`Progress`, `Ready`, `Failed`,
its end) is kept for the supervisor in `life`. One ring is connected at a time. It knows no request and decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from server.protocol import (
    PROTOCOL_VERSION,
    Configure,
    Failed,
    FromEngine,
    Progress,
    ProtocolError,
    Ready,
    Stats,
    StepOutput,
    ToEngine,
    encode,
    read_from_engine,
)


class RingLink:
    """Args: `rank_settings`: what `Configure` carries to the ranks; `receive` gets each `StepOutput` and `Stats`."""

    def __init__(
        self, rank_settings: dict[str, Any], receive: Callable[[StepOutput | Stats], None], clock: Callable[[], float]
    ) -> None:
        self.rank_settings = rank_settings
        self.life: asyncio.Queue[Progress | Ready | Failed | None] = asyncio.Queue()  # None: rank 0 has gone
        self.last_message_at = 0.0
        self._receive = receive
        self._clock = clock
        self._writer: asyncio.StreamWriter | None = None

    @contextlib.asynccontextmanager
    async def listening(self, socket_path: Path) -> AsyncIterator[None]:
        """Takes rank 0's connection at `socket_path` for the life of one ring."""
        self.life = asyncio.Queue()
        server = await asyncio.start_unix_server(self._connection, path=socket_path)
        try:
            yield
        finally:
            server.close()
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            socket_path.unlink(missing_ok=True)

    def send(self, message: ToEngine) -> None:
        """To rank 0, where it is connected."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            writer.close()
            return
        self._writer, life = writer, self.life
        self.send(Configure(PROTOCOL_VERSION, self.rank_settings))
        try:
            # Once the ring is dropped, what this connection still holds must not be taken for the next one's words.
            while (message := await read_from_engine(reader)) is not None and self._writer is writer:
                self._take(message)
        except ProtocolError as error:
            life.put_nowait(Failed(f"rank 0 sent what the api does not understand: {error}", permanent=False))
        finally:
            life.put_nowait(None)

    def _take(self, message: FromEngine) -> None:
        self.last_message_at = self._clock()
        if isinstance(message, StepOutput | Stats):
            self._receive(message)
        else:
            self.life.put_nowait(message)
