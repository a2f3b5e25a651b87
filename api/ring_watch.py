"""Watches one ring from its start until it is lost: what rank 0 says, that it says anything, that steps complete.

It judges by rank 0's connection and by progress, never by an exit code (mlx.launch returns 0 when ranks were killed).
It ends nothing and starts nothing: it raises RingLost, and the supervisor does what follows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from api.engine_client import EngineClient
from api.restart_policy import RingLost
from api.ring_process import RingProcess
from config import Settings
from distributed.control import PEER_SILENCE_S
from server.protocol import Failed, Progress, Ready

logger = logging.getLogger(__name__)

STACKS_S = 2.0  # before a ring is given up its ranks are asked for their stacks, and so long they have to log them
STALL_S = 1.0  # this process itself was held up: what the ring said meanwhile has still to be read


class Replaced(Exception):
    """This ring is to end in favour of one with other settings."""


class RingWatch:
    """Args: `replaced` is set by whoever wants another ring: each wait then ends with Replaced."""

    def __init__(self, ring: RingProcess, engine: EngineClient, settings: Settings, replaced: asyncio.Event) -> None:
        self._ring = ring
        self._engine = engine
        self._settings = settings
        self._replaced = replaced

    async def until_ready(self, tell: Callable[[str], None]) -> Ready:
        """Tells of each step of the start. Whatever is new gives it START_TIMEOUT again: a large model may take hours
        to download. Raises RingLost, Replaced."""
        said = "its ranks did not come"
        try:
            async with asyncio.timeout(self._settings.start_timeout) as start:
                while not isinstance(event := await self._next_event(), Ready):
                    if event is None or event.detail == said:
                        continue
                    self._ring.stop_spinning()  # the ring is formed, no rank reads its stdin; loading wants the core
                    said = event.detail
                    logger.info("%s", said)
                    tell(said)
                    self._engine.comes_nearer()
                    start.reschedule(asyncio.get_running_loop().time() + self._settings.start_timeout)
        except TimeoutError as error:
            seconds = f"{self._settings.start_timeout:g}"
            raise RingLost(f"its start made no progress for START_TIMEOUT={seconds} s; last: {said}") from error
        self._ring.stop_spinning()
        return event

    async def until_lost(self) -> None:
        """Raises RingLost, Replaced."""
        timeout_s = self._settings.step_timeout
        asked_at: float | None = None
        while True:
            looked_at = time.monotonic()
            await self._next_event()
            now = time.monotonic()
            if now - looked_at > STALL_S + self._settings.poll_interval:
                continue
            stuck_s = self._engine.seconds_without_step()
            reason = f"it has work and completed no step for {stuck_s:.0f} s"
            if stuck_s < timeout_s - min(STACKS_S, timeout_s / 2):
                asked_at = None
            elif asked_at is None:
                self._engine.dump_stacks(reason)  # when the ring is lost nobody can find out
                asked_at = now
            elif stuck_s > timeout_s and now - asked_at > min(STACKS_S, timeout_s / 2):
                raise RingLost(f"{reason} (STEP_TIMEOUT)", is_wedged=True)
            if self._engine.seconds_of_silence > PEER_SILENCE_S:
                raise RingLost(f"rank 0 was silent for {PEER_SILENCE_S:.0f} s")

    async def _next_event(self) -> Progress | Ready | None:
        """What rank 0 said next, None after POLL_INTERVAL without a word."""
        if self._replaced.is_set():
            raise Replaced
        try:
            async with asyncio.timeout(self._settings.poll_interval):
                event = await self._engine.life.get()
        except TimeoutError:
            if self._ring.has_exited:  # and rank 0 lives, so no request did that
                raise RingLost(self._last_words("mlx.launch ended"), is_explained=True) from None
            return None
        if isinstance(event, Failed):
            raise RingLost(event.message, permanent=event.permanent, out_of_memory=event.out_of_memory)
        if event is None:
            raise RingLost(self._last_words("rank 0 is gone"))
        return event

    def _last_words(self, what: str) -> str:
        last = self._ring.last_lines[-1] if self._ring.last_lines else "it printed nothing"
        return f"{what}; its last line: {last[:500]}"
