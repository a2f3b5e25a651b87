"""The owner of every request that is not answered yet: it gives them to the ring and hands them what the ring draws.

Requests stay here while no ring serves; `serve` gives them all to the new one, prompt and ids so far, in the order of
the queue. Where a request may be what kills the rings, `api.suspects` says who is tried alone. It never starts or stops
a process, and it decides nothing about the ring. Routes submit and cancel; the supervisor tells of the ring's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from api.errors import ApiError, ContextLengthExceeded, EngineFailure, InvalidRequest, NotReady, QueueFull, Stalled
from api.generation import Generation
from api.limits import KeyLimits
from api.metrics import RequestMetrics
from api.ring_link import RingLink
from api.suspects import Suspects
from server.protocol import (
    Cancel,
    DumpStacks,
    Failed,
    Progress,
    Ready,
    SequenceOutput,
    Shutdown,
    Stats,
    StepOutput,
)

logger = logging.getLogger(__name__)

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
        self.stats: Stats | None = None
        self.ready: Ready | None = None
        self.serving_since: float | None = None
        self.last_step_at = 0.0
        self.num_tokens = 0  # that the last ring has drawn
        self.generations: dict[str, Generation] = {}  # unanswered, in the order they were accepted
        self._link = RingLink(rank_settings, self._receive, clock)
        self._on_ring: dict[str, Generation] = {}  # by the name that the ring which serves knows it by
        self._worked_on: list[str] = []  # what the last ring was at when it ended
        self._suspects = Suspects()
        self._away_since = clock()  # while no ring serves: since when none has come nearer
        self._max_queued_requests = max_queued_requests
        self._request_timeout_s = request_timeout_s
        self._limits = KeyLimits(max_concurrent_per_key, max_queued_per_key)

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
            raise _queue_full(waiting, " of this API key", "MAX_QUEUED_REQUESTS_PER_KEY", self._limits.max_queued)
        if self.num_waiting + num_more > self._max_queued_requests + free:
            raise _queue_full(self.num_waiting, "", "MAX_QUEUED_REQUESTS", self._max_queued_requests)

    def submit(self, *generations: Generation) -> None:
        """Accept all of an answer's, or none (ApiError): from here on they are answered, whatever the ring does."""
        self.check_queue(len(generations), generations[0].owner)
        if self.ready is not None:  # perhaps another ring than when the prompt was made
            for generation in generations:
                if not generation.fit(self.ready.max_sequence_length):
                    raise _does_not_fit(generation, self.ready)
        for generation in generations:
            generation.accepted_at = generation.progressed_at = self.clock()
            self.generations[generation.request_id] = generation
            if self._limits.enter(generation.owner, generation.request_id, generation.priority):
                self._give(generation)

    def cancel(self, *generations: Generation) -> None:
        """The client left, or needs no more tokens. Does nothing where the request has ended."""
        for generation in reversed(generations):  # the first ones have the places that the others would get of them
            if generation.request_id in self.generations:
                self._take_back(generation)
                self._forget(generation)

    # -- the ring, for the supervisor --------------------------------------------------------------------------------

    @property
    def life(self) -> asyncio.Queue[Progress | Ready | Failed | None]:
        """What rank 0 says of the ring; None: it has gone."""
        return self._link.life

    @property
    def seconds_of_silence(self) -> float:
        """How long the ring that serves has said nothing."""
        return self.clock() - max(self._link.last_message_at, self.serving_since or 0.0)

    @contextlib.asynccontextmanager
    async def listening(self, socket_path: Path) -> AsyncIterator[None]:
        """Takes rank 0's connection at `socket_path` for the life of one ring; forgets that ring at the end."""
        async with self._link.listening(socket_path):
            try:
                yield
            finally:
                self.suspend()

    def configure(self, rank_settings: dict[str, Any]) -> None:
        """What the next ring's ranks are told."""
        self._link.rank_settings = rank_settings

    def serve(self, ready: Ready) -> None:
        """The ring serves: everything that is unanswered and may run goes to it, in the order it was accepted."""
        self.ready = ready
        now = self.clock()
        for generation in list(self.generations.values()):
            fits = generation.fit(ready.max_sequence_length)
            if reason := generation.unreported_end():
                self._take_output(generation, SequenceOutput(generation.request_id, finish_reason=reason), now)
            elif not fits:
                self._fail(generation, _does_not_fit(generation, ready))
        self.serving_since = self.last_step_at = now
        self.num_tokens = 0
        self._suspects.ring_began()
        if self._suspects.on_trial is not None:
            logger.warning("%s runs alone: rings died while they worked on it", self._suspects.on_trial)
        self._give_all()

    def suspend(self) -> None:
        """No ring serves any more; what is unanswered waits for the next one."""
        if self.serving_since is None:
            return
        self._worked_on = self._what_the_ring_works_on()
        self._on_ring.clear()
        self.serving_since, self._away_since = None, self.clock()
        self.stats = None
        for generation in self.generations.values():
            generation.leave_ring()

    def blame(self) -> bool:
        """The last ring died and nobody knows why: it may have been one of the requests it worked on.

        Returns whether it is clear by now which one, which is given up then.
        """
        guilty = self._suspects.ring_died([name for name in self._worked_on if name in self.generations])
        self._worked_on = []
        if guilty is not None:
            logger.error("%s kills the ring whenever it runs: it is given up", guilty)
            message = "The ring died each time it worked on this request, also while it had no other; the log says how."
            self._fail(self.generations[guilty], EngineFailure(message))
        return guilty is not None

    def dump_stacks(self, reason: str) -> None:
        """Have every rank log what it is doing, also where it is stuck. Does not wait for it."""
        self._link.send(DumpStacks(reason))

    def shut_down(self) -> None:
        """Ask the ring to end."""
        self._link.send(Shutdown())

    def fail_all(self, error: ApiError) -> None:
        """No ring will come: every request ends with `error`."""
        for generation in reversed(list(self.generations.values())):  # as in `cancel`
            self._fail(generation, error)

    def comes_nearer(self) -> None:
        """The start of a ring has got on, so those that wait for one do not wait in vain."""
        self._away_since = self.clock()

    def expire(self, state: str) -> None:
        """End the requests to which nothing happened for REQUEST_TIMEOUT. `state`: why none serves, if none does."""
        now, seconds = self.clock(), f"{self._request_timeout_s:g} s (REQUEST_TIMEOUT)"
        since = self._away_since if self.serving_since is None else self.serving_since
        for generation in list(self.generations.values()):
            if now - max(generation.progressed_at, since) > self._request_timeout_s:
                self._take_back(generation)
                error = Stalled(f"The request made no progress for {seconds}.")
                if self.serving_since is None:
                    error = NotReady(f"Nothing serves since {seconds}: {state}", retry_after_s=RETRY_AFTER_S)
                self._fail(generation, error)

    def seconds_without_step(self) -> float:
        """How long frames have been in flight without one being completed; 0 where none is."""
        if self.stats is None or self.stats.num_frames_in_flight == 0:
            return 0.0
        return self.clock() - self.last_step_at

    # -- what the ring says ------------------------------------------------------------------------------------------

    def _receive(self, message: StepOutput | Stats) -> None:
        if self.serving_since is None:  # of a ring that is over: its ranks are not those of the next one
            return
        now = self.clock()
        if isinstance(message, Stats):
            self._take_stats(message, now)
            return
        self.last_step_at = now
        for name in message.preempted:
            if generation := self._on_ring.get(name):
                generation.preempt()
        for started in message.started:
            if generation := self._on_ring.get(started.request_id):
                self.metrics.starts(generation, now)
                generation.start(now, started.num_cached_tokens)
        for output in message.outputs:
            if generation := self._on_ring.get(output.request_id):  # else it was taken back meanwhile
                self._take_output(generation, output, now)

    def _take_stats(self, stats: Stats, now: float) -> None:
        if self.stats is None or stats.num_steps != self.stats.num_steps:
            self.last_step_at = now
            # A long prompt gives nothing to its client for many steps, and yet each is progress. Who had to step back
            # was promised an answer, and waits for others that get on; so does who waits for a trial.
            for generation in self.generations.values():
                waits = generation.is_preempted or not self._suspects.may_run(generation.request_id)
                if generation.is_prefilling or waits:
                    generation.progressed_at = now
        elif stats.num_frames_in_flight == 0:
            self.last_step_at = now
        self.stats = stats

    def _take_output(self, generation: Generation, output: SequenceOutput, now: float) -> None:
        if output.finish_reason == "error":
            self._fail(generation, EngineFailure(output.error or "The ring could not serve this request."))
            return
        if output.token_ids:
            self.metrics.takes_tokens(generation, now)
        generation.take(output, now)
        self.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._forget(generation)
        elif self._suspects.gained(generation.request_id, len(output.token_ids)):
            logger.info("%s is cleared", generation.request_id)
            if self._suspects.on_trial is not None:  # who runs alone next
                self._take_back(generation)
            self._give_all()

    def _what_the_ring_works_on(self) -> list[str]:
        """Ids of the requests that run there; where none does, of all it was given: it looks at each when it comes."""
        given = sorted(self._on_ring.values(), key=lambda generation: generation.priority)
        running = [generation for generation in given if generation.is_running]
        return [generation.request_id for generation in running or given]

    # -- what the ring is given --------------------------------------------------------------------------------------

    def _give_all(self) -> None:
        for generation in self.generations.values():
            self._give(generation)

    def _give(self, generation: Generation) -> None:
        """To the ring that serves, where it may be there and is not; `serve` gives the others to the next one."""
        request_id = generation.request_id
        if self.serving_since is None or generation.name_on_ring in self._on_ring:
            return
        if not self._limits.holds_back(request_id) and self._suspects.may_run(request_id):
            self._on_ring[generation.name_on_ring] = generation
            self._link.send(generation.submit_message())

    def _take_back(self, generation: Generation) -> None:
        """Off the ring. What it still says of the request is nobody's: should it get it again, by another name."""
        if self._on_ring.pop(generation.name_on_ring, None) is not None:
            self._link.send(Cancel(generation.name_on_ring))
            generation.step_aside()

    def _forget(self, generation: Generation) -> None:
        """It is over; who waited for its place, or for the end of its trial, has it now."""
        del self.generations[generation.request_id]
        self._on_ring.pop(generation.name_on_ring, None)
        successor = self._limits.leave(generation.owner, generation.request_id)
        if successor is not None:
            self.generations[successor].progressed_at = self.clock()
            self._give(self.generations[successor])
        if self._suspects.forget(generation.request_id):
            self._give_all()

    def _fail(self, generation: Generation, error: ApiError) -> None:
        self._forget(generation)
        generation.fail(error)


def _queue_full(num_waiting: int, whose: str, setting: str, limit: int | None) -> QueueFull:
    if num_waiting:
        why = f"{num_waiting} requests{whose} are waiting already"
    else:  # the limit is 0, or the answers of one request are too many
        why = f"Too few places are free, and {f'at most {limit}' if limit else 'no'} requests{whose} may wait for one"
    return QueueFull(f"{why} ({setting}={limit}). Try again later.", retry_after_s=RETRY_AFTER_S)


def _does_not_fit(generation: Generation, ready: Ready) -> ApiError:
    return ContextLengthExceeded(
        f"The server was restarted with smaller limits while it worked on this request: one may have "
        f"{ready.max_sequence_length} tokens now, and this one asks for "
        f"{len(generation.prompt_token_ids) + generation.max_tokens}."
    )
