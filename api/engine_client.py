"""The api's end of the socket to rank 0, and the owner of every request that is not answered yet.

It listens, gives rank 0 its settings, passes the ring's life (`Progress`, `Ready`, `Failed`, its end) on to the
supervisor, and hands each step's outputs to the requests. Requests stay here while no ring serves; `serve` sends them
all to the new one. It never starts or stops a process, and it decides nothing about the ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from api.errors import ApiError, ContextLengthExceeded, EngineFailure, InvalidRequest, QueueFull, Stalled
from api.generation import Generation
from api.limits import KeyLimits
from api.metrics import RequestMetrics
from server.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    Configure,
    Failed,
    FromEngine,
    Progress,
    ProtocolError,
    Ready,
    SequenceOutput,
    Shutdown,
    Stats,
    StepOutput,
    ToEngine,
    encode,
    read_from_engine,
)

logger = logging.getLogger(__name__)

MAX_RINGS_LOST = 3  # a request that was running each time so many rings died is not given to another one
RETRY_AFTER_S = 5


class EngineClient:
    def __init__(
        self,
        rank_settings: dict[str, Any],
        *,
        max_queued_requests: int,
        request_timeout_s: float,
        max_concurrent_per_key: int | None = None,
        max_queued_per_key: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rank_settings`: what `Configure` carries to the ranks."""
        self.clock = clock
        self.metrics = RequestMetrics()
        self.life: asyncio.Queue[Progress | Ready | Failed | None] = asyncio.Queue()  # None: rank 0 has gone
        self.stats: Stats | None = None
        self.ready: Ready | None = None
        self.serving_since: float | None = None
        self.last_message_at = 0.0
        self.last_step_at = 0.0
        self.generations: dict[str, Generation] = {}  # unanswered, in the order they were accepted
        self._rank_settings = rank_settings
        self._max_queued_requests = max_queued_requests
        self._request_timeout_s = request_timeout_s
        self._limits = KeyLimits(max_concurrent_per_key, max_queued_per_key)
        self._writer: asyncio.StreamWriter | None = None

    # -- requests, for the routes ------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return sum(generation.is_running for generation in self.generations.values())

    @property
    def num_waiting(self) -> int:
        return len(self.generations) - self.num_running

    def check_queue(self, num_more: int = 1, owner: str | None = None) -> None:
        """Raises QueueFull where so many more sequences, of the API key `owner`, would be too many.

        InvalidRequest where they would be on an idle server as well.
        """
        most = self._max_queued_requests + (self.ready.max_concurrent_requests if self.ready else 0)
        most = self._limits.most(owner, most)
        if num_more > most:
            message = f"The request asks for {num_more} answers at once, and this server takes at most {most}."
            raise InvalidRequest(message, param="n", code="integer_above_max_value")
        free = max(0, (self.ready.max_concurrent_requests if self.ready else 0) - self.num_running)
        mine = [generation for generation in self.generations.values() if generation.owner == owner]
        running = sum(generation.is_running for generation in mine)
        waiting = len(mine) - running
        if not self._limits.has_room(owner, num_more, num_running=running, num_waiting=waiting, num_free=free):
            raise QueueFull(
                f"{waiting} requests of this API key are waiting already "
                f"(MAX_QUEUED_REQUESTS_PER_KEY={self._limits.max_queued}). Try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.num_waiting + num_more > self._max_queued_requests + free:
            raise QueueFull(
                f"{self.num_waiting} requests are waiting already (MAX_QUEUED_REQUESTS={self._max_queued_requests}). "
                "Try again later.",
                retry_after_s=RETRY_AFTER_S,
            )

    def submit(self, *generations: Generation) -> None:
        """Accept all of an answer's, or none (QueueFull): from here on they are answered, whatever the ring does."""
        self.check_queue(len(generations), generations[0].owner)
        for generation in generations:
            generation.accepted_at = generation.progressed_at = self.clock()
            self.generations[generation.request_id] = generation
            if self._limits.enter(generation.owner, generation.request_id, generation.priority):
                self._give(generation)

    def cancel(self, generation: Generation) -> None:
        """The client left, or needs no more tokens. Does nothing where the request has ended."""
        if generation.request_id in self.generations:
            self._take_back(generation)
            self._forget(generation)

    # -- the ring, for the supervisor --------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def listening(self, socket_path: Path) -> AsyncIterator[None]:
        """Takes rank 0's connection at `socket_path` for the life of one ring; forgets that ring at the end."""
        self.life = asyncio.Queue()
        server = await asyncio.start_unix_server(self._connection, path=socket_path)
        try:
            yield
        finally:
            server.close()
            self._drop_ring()
            socket_path.unlink(missing_ok=True)

    def configure(self, rank_settings: dict[str, Any]) -> None:
        """What the next ring's ranks are told."""
        self._rank_settings = rank_settings

    def serve(self, ready: Ready) -> None:
        """The ring serves: everything that is unanswered goes to it, in the order it was accepted."""
        self.ready = ready
        now = self.clock()
        for generation in list(self.generations.values()):
            fits = generation.fit(ready.max_sequence_length)
            if reason := generation.unreported_end():
                self._take_output(SequenceOutput(generation.request_id, finish_reason=reason), now)
            elif not fits:
                self._fail(generation, _no_longer_fits(generation, ready))
        self.serving_since = self.last_step_at = self.last_message_at = now
        for generation in self.generations.values():
            if not self._limits.holds_back(generation.request_id):
                self._give(generation)

    def suspend(self, *, lost: bool = True) -> None:
        """No ring serves any more; what was running waits for the next one. `lost`: the ring, and not ended by us."""
        if self.serving_since is None:
            return
        self.serving_since = None
        self.stats = None
        for generation in list(self.generations.values()):
            generation.is_preempted = False  # the next ring has put nobody back
            if not generation.is_running:
                continue
            generation.is_running = generation.is_prefilling = False
            generation.rings_lost += lost
            if generation.rings_lost >= MAX_RINGS_LOST:
                message = f"The ring was lost {MAX_RINGS_LOST} times while it worked on this request; the log says how."
                self._fail(generation, EngineFailure(message))

    def shut_down(self) -> None:
        """Ask the ring to end."""
        self._send(Shutdown())

    def fail_all(self, error: ApiError) -> None:
        """No ring will come: every request ends with `error`."""
        for generation in list(self.generations.values()):
            self._fail(generation, error)

    def expire(self) -> None:
        """End the requests to which nothing happened for REQUEST_TIMEOUT while a ring was serving."""
        if self.serving_since is None:
            return
        now = self.clock()
        for generation in list(self.generations.values()):
            if now - max(generation.progressed_at, self.serving_since) > self._request_timeout_s:
                seconds = f"{self._request_timeout_s:g}"
                self._take_back(generation)
                self._fail(generation, Stalled(f"The request made no progress for {seconds} s (REQUEST_TIMEOUT)."))

    def seconds_without_step(self) -> float:
        """How long frames have been in flight without one being completed; 0 where none is."""
        if self.stats is None or self.stats.num_frames_in_flight == 0:
            return 0.0
        return self.clock() - self.last_step_at

    # -- the connection ----------------------------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            writer.close()
            return
        self._writer, life = writer, self.life
        self._send(Configure(PROTOCOL_VERSION, self._rank_settings))
        try:
            # Once the ring is dropped, what this connection still holds must not be taken for the next one's words.
            while (message := await read_from_engine(reader)) is not None and self._writer is writer:
                self._receive(message)
        except ProtocolError as error:
            life.put_nowait(Failed(f"rank 0 sent what the api does not understand: {error}", permanent=False))
        finally:
            life.put_nowait(None)

    def _receive(self, message: FromEngine) -> None:
        now = self.last_message_at = self.clock()
        if isinstance(message, StepOutput):
            self.last_step_at = now
            for request_id in message.preempted:
                if generation := self.generations.get(request_id):
                    generation.preempt()
            for started in message.started:
                if generation := self.generations.get(started.request_id):
                    self.metrics.starts(generation, now)
                    generation.start(now, started.num_cached_tokens)
            for output in message.outputs:
                self._take_output(output, now)
        elif isinstance(message, Stats):
            self._take_stats(message, now)
        else:
            self.life.put_nowait(message)

    def _take_stats(self, stats: Stats, now: float) -> None:
        if self.stats is None or stats.num_steps != self.stats.num_steps:
            self.last_step_at = now
            # A long prompt gives nothing to its client for many steps, and yet each is progress. Who had to step back
            # was promised an answer, and waits for others that get on.
            for generation in self.generations.values():
                if generation.is_prefilling or generation.is_preempted:
                    generation.progressed_at = now
        elif stats.num_frames_in_flight == 0:
            self.last_step_at = now
        self.stats = stats

    def _take_output(self, output: SequenceOutput, now: float) -> None:
        generation = self.generations.get(output.request_id)
        if generation is None:  # cancelled while the step was on its way
            return
        if output.finish_reason == "error":
            self._fail(generation, EngineFailure(output.error or "The ring could not serve this request."))
            return
        if output.token_ids:
            self.metrics.takes_tokens(generation, now)
        generation.take(output, now)
        if output.finish_reason is not None:
            self._forget(generation)

    def _fail(self, generation: Generation, error: ApiError) -> None:
        self._forget(generation)
        generation.fail(error)

    # -- what the ring is given --------------------------------------------------------------------------------------

    def _give(self, generation: Generation) -> None:
        """To the ring, where one serves; `serve` gives the others to the next one."""
        if self.serving_since is not None:
            self._send(generation.submit_message())

    def _take_back(self, generation: Generation) -> None:
        if self.serving_since is not None and not self._limits.holds_back(generation.request_id):
            self._send(Cancel(generation.request_id))

    def _forget(self, generation: Generation) -> None:
        """It is over; whoever of the same key waits for its place has it now."""
        del self.generations[generation.request_id]
        successor = self._limits.leave(generation.owner, generation.request_id)
        if successor is not None:
            self.generations[successor].progressed_at = self.clock()
            self._give(self.generations[successor])

    def _drop_ring(self) -> None:
        self.suspend()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _no_longer_fits(generation: Generation, ready: Ready) -> ApiError:
    return ContextLengthExceeded(
        f"The server was restarted with smaller limits while it worked on this request: one may have "
        f"{ready.max_sequence_length} tokens now, and this one asks for "
        f"{len(generation.prompt_token_ids) + generation.max_tokens}."
    )
