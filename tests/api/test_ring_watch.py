"""What makes a ring a lost one, before a scripted rank 0 and a launcher that only says whether it runs."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from api.engine_client import EngineClient
from api.restart_policy import RingLost
from api.ring_watch import Replaced, RingWatch
from config import Settings
from server.protocol import DumpStacks, Failed, Progress, Stats
from tests.api.fake_engine import READY, FakeEngine, connected


class Launcher:
    has_exited = False
    last_lines = ("the last word",)

    def stop_spinning(self) -> None:
        pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A ring that is connected, and its watch."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.clock = Clock()
        self.launcher: Any = Launcher()
        self.replaced = asyncio.Event()
        self.client = EngineClient({}, max_queued_requests=9, request_timeout_s=99, clock=self.clock)
        chosen = Settings(project_root=folder, poll_interval=0.01, **settings)
        self.watch = RingWatch(self.launcher, self.client, chosen, self.replaced)
        self.engine: FakeEngine

    async def ends(self) -> RingLost:
        with pytest.raises(RingLost) as raised:
            async with asyncio.timeout(5):
                await self.watch.until_lost()
        return raised.value


@asynccontextmanager
async def watched(folder: Path, **settings: Any) -> AsyncIterator[Watched]:
    made = Watched(folder, **settings)
    async with connected(made.client, folder) as made.engine:
        yield made


def test_a_start_may_take_as_long_as_it_makes_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Each new word gives it START_TIMEOUT again; one that is repeated does not."""
    caplog.set_level(logging.INFO, "api.ring_watch")

    async def test() -> None:
        async with watched(tmp_path, start_timeout=7) as ring:
            monkeypatch.setattr(asyncio.get_running_loop(), "time", ring.clock)
            told: list[str] = []
            starting = asyncio.create_task(ring.watch.until_ready(told.append))
            for percent in range(5):
                ring.clock.now += 6
                ring.engine.send(Progress(f"{percent} %"))
                while len(told) == percent:
                    await asyncio.sleep(0)
            ring.engine.send(READY)
            assert await starting == READY
            starting = asyncio.create_task(ring.watch.until_ready(told.append))
            while not starting.done():
                ring.clock.now += 0.1
                ring.engine.send(Progress("4 %"))
                await asyncio.sleep(0)
            with pytest.raises(RingLost, match=r"START_TIMEOUT=7 s; last: 4 %"):
                await starting

    asyncio.run(test())
    assert [record.getMessage() for record in caplog.records if record.name == "api.ring_watch"] == [
        "0 %",
        "1 %",
        "2 %",
        "3 %",
        "4 %",
        "4 %",
    ]


def test_the_end_of_rank_0_is_the_end_of_the_ring(tmp_path: Path):
    async def test() -> None:
        async with watched(tmp_path) as ring:
            await ring.engine.leave()
            lost = await ring.ends()
            assert lost.reason == "rank 0 is gone; its last line: the last word"
            assert not lost.permanent and not lost.is_explained

    asyncio.run(test())


def test_what_rank_0_says_before_its_end_is_the_reason(tmp_path: Path):
    async def test() -> None:
        async with watched(tmp_path) as ring:
            ring.engine.send(Failed("rank 2: too little memory", permanent=True, out_of_memory=True))
            lost = await ring.ends()
            assert (lost.reason, lost.permanent, lost.out_of_memory) == ("rank 2: too little memory", True, True)

    asyncio.run(test())


def test_a_launcher_that_dies_before_its_ranks_is_no_request_s_fault(tmp_path: Path):
    async def test() -> None:
        async with watched(tmp_path) as ring:
            ring.launcher.has_exited = True
            assert (await ring.ends()).is_explained

    asyncio.run(test())


def test_a_rank_0_that_says_nothing_is_lost_after_5_seconds(tmp_path: Path):
    async def test() -> None:
        async with watched(tmp_path) as ring:
            ring.clock.now = 5.0
            watching = asyncio.create_task(ring.ends())
            await asyncio.sleep(0.05)
            assert not watching.done()
            ring.clock.now = 5.1
            assert (await watching).reason == "rank 0 was silent for 5 s"

    asyncio.run(test())


def test_a_ring_that_has_work_and_completes_no_step_is_stuck_and_one_that_does_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("api.ring_watch.STACKS_S", 1)

    async def test() -> None:
        async with watched(tmp_path, step_timeout=60) as ring:

            async def pass_second(num_steps: int) -> None:
                ring.clock.now += 1
                before = ring.client.stats
                ring.engine.send(Stats([], 1, 0, num_frames_in_flight=1, num_steps=num_steps))
                while ring.client.stats is before:
                    await asyncio.sleep(0)

            watching = asyncio.create_task(ring.ends())
            for second in range(180):
                await pass_second(num_steps=second // 30)  # a step takes half a minute
            for _ in range(60):
                await pass_second(num_steps=6)
            assert await ring.engine.read() == DumpStacks("it has work and completed no step for 59 s")
            assert not watching.done()
            await pass_second(num_steps=6)
            await pass_second(num_steps=6)
            lost = await watching
            assert lost.reason == "it has work and completed no step for 61 s (STEP_TIMEOUT)"
            assert not lost.is_explained

    asyncio.run(test())


def test_whoever_asks_for_another_ring_ends_the_watch(tmp_path: Path):
    async def test() -> None:
        async with watched(tmp_path) as ring:
            watching = asyncio.create_task(ring.watch.until_lost())
            await asyncio.sleep(0)
            ring.replaced.set()
            with pytest.raises(Replaced):
                await watching

    asyncio.run(test())
