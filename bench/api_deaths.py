"""The api process is killed while its ring works: how soon every rank is gone, and what the next start finds.

In every other round one rank is stopped before, so it cannot end by itself: the next start must end it. Used by
`bench.faults`.
"""

from __future__ import annotations

import asyncio
import random
import time

import psutil

from bench.environment import table
from bench.figures import cell, median
from tests.faults.ring_file import RingFile
from tests.faults.streams import Stream, read_all, requests
from tests.running_server import RunningServer

AIM_S = 2.0
GIVE_UP_S = 30.0
PIECE = 20  # of any stream, at which it is killed


def api_deaths(server: RunningServer, num_rounds: int) -> tuple[str, bool]:
    """A table, and whether all ended and was reaped. The server must not run yet, and does not afterwards."""
    plain: list[float] = []
    beside_stopped: list[float] = []
    num_reaped = 0
    for number in range(num_rounds):
        server.start()
        ranks = [psutil.Process(pid) for pid in RingFile(server.root).now.rank_pids]
        stopped = random.choice(ranks) if number % 2 else None
        seconds = _kill_at_work(server, ranks, stopped)
        (plain if stopped is None else beside_stopped).append(seconds)
        if stopped is not None:
            server.start()
            num_reaped += not stopped.is_running()
            server.stop()
    rows = [
        [what, str(len(times)), cell(median(times), 1), cell(max(times), 1), f"{AIM_S:.0f}", reaped]
        for what, times, reaped in (
            ("all ranks run", plain, ""),
            ("one rank is stopped", beside_stopped, f"{num_reaped} of {len(beside_stopped)}"),
        )
    ]
    columns = ["", "rounds", "all that run gone after, p50", "worst", "aim", "stopped ones ended by the next start"]
    ended = max(plain + beside_stopped) < GIVE_UP_S and num_reaped == len(beside_stopped)
    return table(columns, rows), ended


def _kill_at_work(server: RunningServer, ranks: list[psutil.Process], stopped: psutil.Process | None) -> float:
    """Seconds until all ranks that run have ended."""
    killed_at: list[float] = []

    def on_piece(stream: Stream) -> None:
        if len(stream.arrivals) == PIECE and not killed_at:
            if stopped is not None:
                stopped.suspend()
            killed_at.append(time.monotonic())
            server.kill()

    asyncio.run(read_all(server.url, requests(server.model), on_piece))
    psutil.wait_procs([rank for rank in ranks if rank != stopped], timeout=GIVE_UP_S)
    return time.monotonic() - killed_at[0]
