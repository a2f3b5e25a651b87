"""The api process is killed while its ring works: how soon every rank is gone, and what the next start finds.

A rank that was stopped before cannot end by itself: the next start must end it. Used by `bench.faults`.
"""

from __future__ import annotations

import asyncio
import time

import psutil

from bench.environment import table
from bench.figures import cell, median
from tests.faults.ring_file import RingFile
from tests.faults.streams import Stream, read_all, requests
from tests.running_server import RunningServer

GIVE_UP_S = 30.0
PIECE = 20  # of any stream, at which it is killed
AIM_S = 2.0
CASES: dict[str, int | None] = {  # the rank that is stopped
    "all ranks run": None,
    "rank 1 is stopped": 1,
    "rank 0 is stopped": 0,  # it alone holds the api's connection
}


def api_deaths(server: RunningServer, num_rounds: int) -> tuple[str, bool]:
    """A table, and whether all ended and was reaped. The server must not run yet, and does not afterwards."""
    rows: list[list[str]] = []
    ended = True
    for case, rank in CASES.items():
        deaths = [_death(server, rank) for _ in range(num_rounds)]
        times = [seconds for seconds, _ in deaths]
        num_reaped = sum(reaped for _, reaped in deaths)
        reaped = "" if rank is None else f"{num_reaped} of {num_rounds}"
        rows.append([case, str(num_rounds), cell(median(times), 1), cell(max(times), 1), f"{AIM_S:.0f}", reaped])
        ended &= max(times) < GIVE_UP_S and num_reaped == num_rounds
    columns = ["", "rounds", "all that run gone after, p50", "worst", "aim", "ended by the next start"]
    return table(columns, rows), ended


def _death(server: RunningServer, rank: int | None) -> tuple[float, bool]:
    """Seconds until all ranks that run have ended, and whether none is left when the next ring serves."""
    server.start()
    ranks = [psutil.Process(pid) for pid in RingFile(server.root).now.rank_pids]
    stopped = [] if rank is None else [ranks.pop(rank)]
    killed_at: list[float] = []

    def on_piece(stream: Stream) -> None:
        if len(stream.arrivals) == PIECE and not killed_at:
            for process in stopped:
                process.suspend()
            killed_at.append(time.monotonic())
            server.kill()

    asyncio.run(read_all(server.url, requests(server.model), on_piece))
    psutil.wait_procs(ranks, timeout=GIVE_UP_S)
    seconds = time.monotonic() - killed_at[0]
    if stopped:
        server.start()
        server.stop()
    return seconds, not any(process.is_running() for process in stopped)
