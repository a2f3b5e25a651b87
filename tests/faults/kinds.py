"""The kinds of faults: who is hit, how, and what comes after.

A fault is placed by whoever runs the streams (`tests.faults.rounds`), at a moment that was seen; what it does later
waits for a state that is seen as well, never for a time. It judges nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from api.processes import runs
from tests.faults.ring_file import LOOK_S, Ring, RingFile
from tests.faulty_ranks import FaultyRank
from tests.multihost.namespaces import Host

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
LAUNCHER = "launcher"
STEPS_OF_A_START = 6  # what /health says of a start changes about so often


class Server(Protocol):
    """`tests.running_server.RunningServer`, `tests.launched_project.LaunchedProject`."""

    @property
    def root(self) -> Path: ...
    @property
    def url(self) -> str: ...
    @property
    def model(self) -> str: ...


@dataclass
class Scene:
    """Where a fault is placed. `lost` are the launchers of the rings that cannot go on."""

    server: Server
    http: httpx.AsyncClient
    ring_file: RingFile
    rng: random.Random
    lost: set[int] = field(default_factory=set)

    async def health(self) -> dict[str, Any]:
        return (await self.http.get(f"{self.server.url}/health")).json()


@dataclass(frozen=True)
class Fault:
    """Args:
    strike: hits the ring that serves; in no time, since streams wait meanwhile.
    follow: goes on from there, beside the streams.
    undo: once the streams have ended, for a fault that the ring survives.
    """

    name: str
    victim: str
    strike: Callable[[Ring], None]
    follow: Callable[[Scene], Coroutine[Any, Any, None]] | None = None
    undo: Callable[[Ring], None] | None = None


def signalled(blow: signal.Signals, victim: str) -> Fault:
    """To "rank 0" and so on, or to LAUNCHER. A ring does without a launcher that is stopped."""

    def send(ring: Ring, number: signal.Signals) -> None:
        pid = ring.launcher_pid if victim == LAUNCHER else ring.rank_pids[int(victim.removeprefix("rank "))]
        os.kill(pid, number)

    is_harmless = (blow, victim) == (STOP, LAUNCHER)
    undo = (lambda ring: send(ring, signal.SIGCONT)) if is_harmless else None
    return Fault(blow.name, victim, lambda ring: send(ring, blow), undo=undo)


def killed_twice(victim: str) -> Fault:
    """The ring that comes next loses a process as well, while it starts."""
    first = signalled(KILL, victim)
    return Fault("SIGKILL, and one in the start", victim, first.strike, follow=_kill_in_the_start)


async def _kill_in_the_start(scene: Scene) -> None:
    """Any process of the ring, after any step of its start."""
    steps, said = scene.rng.randint(0, STEPS_OF_A_START), set[str]()
    launched = await scene.ring_file.until(lambda ring: ring.launcher_pid not in scene.lost)
    while len(said) <= steps and not scene.ring_file.now.serves:
        said.add((await scene.health()).get("detail", ""))
        await asyncio.sleep(LOOK_S)
    scene.lost.add(launched.launcher_pid)
    launcher = psutil.Process(launched.launcher_pid)
    while runs(launcher):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended is no victim
            return scene.rng.choice([launcher, *launcher.children(recursive=True)]).kill()


def unplugged(host: Host, victim: str) -> Fault:
    """The cable of a machine, plugged in again as soon as the ring is lost."""

    async def mend(scene: Scene) -> None:
        try:
            while (await scene.health())["status"] == "ready":
                await asyncio.sleep(LOOK_S)
        finally:
            host.mend()

    return Fault("link cut", victim, lambda ring: host.cut(), follow=mend)


def wedged(faulty: FaultyRank, victim: str) -> Fault:
    """The compute thread of a rank is stuck for ever. The ring must have been started with `faulty`."""

    async def ask_for_a_step(scene: Scene) -> None:
        """There may be none left of the streams. It must be answered all the same."""
        body = {"model": scene.server.model, "prompt": "more", "max_tokens": 1}
        answer = await scene.http.post(f"{scene.server.url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text

    return Fault("wedge", victim, lambda ring: faulty.fail_in_the_next_step(), follow=ask_for_a_step)
