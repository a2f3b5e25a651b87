"""A round: eight streams run, at a certain piece of one of them a fault hits the ring, and all of them must end.

The moment is one that was seen (so many pieces of a stream, a request accepted), never a sleep. A round says what
came of it and asserts nothing but that the fault was placed; `tests.faults` and `bench.faults` judge it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from api.processes import ring_processes
from distributed.launch import instance_id
from tests.faults.kinds import Fault, Scene, Server
from tests.faults.ring_file import LOOK_S, Ring, RingFile
from tests.faults.streams import Bodies, Said, Stream, new_http, read_all

END_S = 180.0  # for what a round leaves to be mended
AT_ONCE = 0.1  # of the faults come when the first request is accepted: most of the others find no ring


@dataclass(frozen=True)
class Moment:
    """When `piece` of the stream `name` has come; 0: when any request is accepted."""

    name: str
    piece: int

    def __str__(self) -> str:
        return f"piece {self.piece} of {self.name!r}" if self.piece else "the first accepted"


def draw_moment(undisturbed: Sequence[Stream], rng: random.Random) -> Moment:
    stream = rng.choice(undisturbed)
    return Moment(stream.name, 0 if rng.random() < AT_ONCE else rng.randint(1, len(stream.arrivals) - 1))


@dataclass(frozen=True)
class Round:
    """What a fault came to. Times in seconds."""

    fault: str
    victim: str
    moment: str
    num_streams: int
    differences: list[str]  # a line for each stream that was not as it is undisturbed
    pauses: list[float]  # of each stream that had not ended, its longest wait after the fault
    start_up_s: float | None  # of the ring that came after it, None where the old one went on
    first_pieces: list[float]  # of each stream that it served, from when it was ready
    left_over: list[str]  # processes of earlier rings

    @property
    def is_sound(self) -> bool:
        return not self.differences and not self.left_over


class _Blow:
    """A fault, and whether it has come."""

    def __init__(self, fault: Fault, scene: Scene) -> None:
        self.struck_at: float | None = None
        self._fault = fault
        self._scene = scene
        self._ring = scene.ring_file.now
        self._following: asyncio.Future[None] | None = None

    def strike(self) -> None:
        self.struck_at = time.monotonic()
        self._fault.strike(self._ring)
        if self._fault.undo is None:
            self._scene.lost.add(self._ring.launcher_pid)
        if self._fault.follow is not None:
            self._following = asyncio.ensure_future(self._fault.follow(self._scene))

    async def is_over(self) -> None:
        """To be awaited when the streams have ended: until a ring serves that is sound."""
        if self._fault.undo is not None:
            self._fault.undo(self._ring)
        async with asyncio.timeout(END_S):
            if self._following is not None:
                await self._following
            await self._scene.ring_file.until(lambda ring: ring.serves and ring.launcher_pid not in self._scene.lost)


async def run_round(
    server: Server, bodies: Bodies, undisturbed: Sequence[Stream], fault: Fault, rng: random.Random
) -> Round:
    """The server must be ready, and is so again afterwards."""
    ring_file, moment = RingFile(server.root), draw_moment(undisturbed, rng)
    async with new_http() as http, contextlib.AsyncExitStack() as stack:
        scene = Scene(server, http, ring_file, rng)
        blow = _Blow(fault, scene)

        def on_piece(stream: Stream) -> None:
            if stream.name == moment.name and len(stream.arrivals) == moment.piece:
                blow.strike()

        await stack.enter_async_context(_beside(ring_file.run()))
        if moment.piece == 0:
            await stack.enter_async_context(_beside(_when_accepted(scene, blow.strike)))
        streams = await read_all(server.url, bodies, on_piece)
        assert blow.struck_at, f"no fault was placed: {moment}; {[len(stream.arrivals) for stream in streams]}"
        await blow.is_over()
    differences = [
        f"{mine.name}: {different}"
        for mine, its in zip(streams, undisturbed, strict=True)
        if (different := difference(mine.said, its.said))
    ]
    return Round(
        fault.name,
        fault.victim,
        str(moment),
        len(streams),
        differences,
        pauses=[stream.pause_after(blow.struck_at) for stream in streams if (stream.ended_at or 0) > blow.struck_at],
        start_up_s=(start_up_s := ring_file.start_up_s()),
        first_pieces=[
            seconds
            for stream in streams
            if start_up_s is not None and (seconds := stream.next_after(ring_file.now.seen_at)) is not None
        ],
        left_over=_left_over(server.root, ring_file.now),
    )


def difference(said: Said, undisturbed: Said) -> str:
    """Empty where a stream is as it is undisturbed, and that one came to an end."""
    if undisturbed.errors or undisturbed.num_done != 1:
        return f"undisturbed it has no end: {undisturbed}"
    return said.difference(undisturbed)


async def _when_accepted(scene: Scene, strike: Callable[[], None]) -> None:
    while not any((await scene.health())["requests"].values()):
        await asyncio.sleep(LOOK_S)
    strike()


def _left_over(root: Path, ring: Ring) -> list[str]:
    """Processes of this folder's rings that do not belong to the one that serves."""
    try:
        launcher, *ranks = (psutil.Process(pid) for pid in (ring.launcher_pid, *ring.rank_pids))
        known = [launcher, *launcher.children(recursive=True)]
        known += [process for rank in ranks for process in (rank, *rank.parents())]  # over ssh they are sshd's children
    except psutil.NoSuchProcess as error:
        return [f"{error} of the ring that serves"]
    return [str(process) for process in ring_processes(instance_id(root)) if process not in known]


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` runs meanwhile, and is ended with the block."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
