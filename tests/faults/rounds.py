"""A round: eight streams run, at a certain piece of one of them a process of the ring is killed or stopped, all must end.

The moment is one that was seen (so many pieces of a stream, all accepted, so far in a start), never a sleep. A round
says what came of it and asserts nothing but that the fault was placed; `tests.faults` and `bench.faults` judge it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from api.processes import ring_processes
from distributed.launch import instance_id
from tests.faults.ring_watch import LOOK_S, Ring, RingWatch
from tests.faults.streams import Said, Stream, new_http, read_all

Bodies = Mapping[str, dict[str, Any]]
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
LAUNCHER = "launcher"
STEPS_OF_A_START = 6  # what /health says of a start changes about so often
AT_ONCE = 0.1  # of the faults come when all requests are accepted, before the first piece


class Server(Protocol):
    """`tests.running_server.RunningServer`, or another that serves from a folder."""

    @property
    def root(self) -> Path: ...
    @property
    def url(self) -> str: ...


@dataclass(frozen=True)
class Fault:
    """`again`: the next ring loses a process as well, while it starts."""

    blow: signal.Signals
    victim: str  # "rank 0" and so on, or LAUNCHER
    again: bool = False

    def __str__(self) -> str:
        return f"{self.blow.name}{', once more in the start' if self.again else ''}"

    def pid(self, ring: Ring) -> int:
        return ring.launcher_pid if self.victim == LAUNCHER else ring.rank_pids[int(self.victim.removeprefix("rank "))]


@dataclass(frozen=True)
class Moment:
    """When `piece` of the stream `name` has come; 0: when all are accepted."""

    name: str
    piece: int

    def __str__(self) -> str:
        return f"piece {self.piece} of {self.name!r}" if self.piece else "accepted"


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
    left_over: list[str]  # processes of earlier rings

    @property
    def is_sound(self) -> bool:
        return not self.differences and not self.left_over


async def run_round(
    server: Server, bodies: Bodies, undisturbed: Sequence[Stream], fault: Fault, rng: random.Random
) -> Round:
    """The server must be ready, and is so again afterwards."""
    watch = RingWatch(server.root)
    ring, moment = watch.now, draw_moment(undisturbed, rng)
    victim = psutil.Process(fault.pid(ring))
    struck_at: list[float] = []

    def strike() -> None:
        struck_at.append(time.monotonic())
        victim.send_signal(fault.blow)

    def on_piece(stream: Stream) -> None:
        if stream.name == moment.name and len(stream.arrivals) == moment.piece:
            strike()

    async with _beside(watch.run()), new_http() as http, contextlib.AsyncExitStack() as beside:
        if moment.piece == 0:
            await beside.enter_async_context(_beside(_strike_when_accepted(http, server, len(bodies), strike)))
        if fault.again:
            await beside.enter_async_context(_beside(_strike_in_the_start(http, server, watch, ring, rng)))
        streams = await read_all(server.url, bodies, on_piece)
        assert struck_at, f"no fault was placed: {moment}; {[len(stream.arrivals) for stream in streams]}"
        if victim.is_running() and victim.status() == psutil.STATUS_STOPPED and fault.victim == LAUNCHER:
            victim.resume()  # nobody missed it: the ring runs without
        await _until_ready(http, server)
        watch.look()
    return _judge(fault, moment, streams, undisturbed, struck_at[0], watch, server)


def _judge(
    fault: Fault,
    moment: Moment,
    streams: Sequence[Stream],
    undisturbed: Sequence[Stream],
    struck_at: float,
    watch: RingWatch,
    server: Server,
) -> Round:
    differences = [
        f"{mine.name}: {different}"
        for mine, its in zip(streams, undisturbed, strict=True)
        if (different := difference(mine.said, its.said))
    ]
    return Round(
        str(fault),
        fault.victim,
        str(moment),
        len(streams),
        differences,
        [stream.pause_after(struck_at) for stream in streams if (stream.ended_at or 0) > struck_at],
        watch.start_up_s(),
        _left_over(server.root, watch.now),
    )


def difference(said: Said, undisturbed: Said) -> str:
    """Empty where a stream is as it is undisturbed, and that one came to an end."""
    if undisturbed.errors or undisturbed.num_done != 1:
        return f"undisturbed it has no end: {undisturbed}"
    return said.difference(undisturbed)


def _left_over(root: Path, ring: Ring) -> list[str]:
    """Processes of this folder's rings that are neither the launcher that runs nor below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(ring.launcher_pid)
        known = {process.pid for process in [launcher, *launcher.children(recursive=True)]}
        return [str(process) for process in ring_processes(instance_id(root)) if process.pid not in known]
    return [f"no launcher {ring.launcher_pid}"]


async def _strike_when_accepted(http: httpx.AsyncClient, server: Server, count: int, strike: Any) -> None:
    while True:
        requests = (await _health(http, server)).get("requests") or {"running": 0, "waiting": 0}
        if sum(requests.values()) == count:
            return strike()
        await asyncio.sleep(LOOK_S)


async def _strike_in_the_start(
    http: httpx.AsyncClient, server: Server, watch: RingWatch, ring: Ring, rng: random.Random
) -> None:
    """SIGKILL to any process of the ring that comes after `ring`, after any step of its start."""
    steps, said = rng.randint(0, STEPS_OF_A_START), set[str]()
    launched = await watch.until_launched(other_than=ring.launcher_pid)
    while len(said) <= steps and not watch.now.serves:
        said.add((await _health(http, server)).get("detail", ""))
        await asyncio.sleep(LOOK_S)
    launcher = psutil.Process(launched.launcher_pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        rng.choice([launcher, *launcher.children(recursive=True)]).kill()


async def _health(http: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    return (await http.get(f"{server.url}/health")).json()


async def _until_ready(http: httpx.AsyncClient, server: Server) -> None:
    async with asyncio.timeout(180):
        while (await _health(http, server))["status"] != "ready":
            await asyncio.sleep(LOOK_S)


@contextlib.asynccontextmanager
async def _beside(work: Any) -> Any:
    """`work` runs meanwhile, and ends with the block; its error is the block's."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
