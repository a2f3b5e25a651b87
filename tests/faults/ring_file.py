"""A server's ring as its folder tells it: the processes of the ring that runs, and how long each ring took to start.

`.run/ring.json` is written when a ring is launched and again when it serves, so the moments of its changes are those of
the ring. It only looks. Used by the rounds of `tests.faults`, for victims and for the start-up that a pause is held
against.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LOOK_S = 0.01


@dataclass(frozen=True)
class Ring:
    launcher_pid: int
    rank_pids: tuple[int, ...]  # none while it starts
    written_at: float  # seconds of time.time
    seen_at: float  # seconds of time.monotonic

    @property
    def serves(self) -> bool:
        return bool(self.rank_pids)


class RingFile:
    """`rings` are all states seen, from the one at the beginning on."""

    def __init__(self, root: Path) -> None:
        self._file = root / ".run" / "ring.json"
        self._seen: tuple[int, int] | None = None  # inode and time of the last version read
        self.rings: list[Ring] = []
        self.look()

    @property
    def now(self) -> Ring:
        return self.rings[-1]

    def look(self) -> None:
        """Notes the state now, where it is new."""
        try:
            with self._file.open() as file:
                version = os.fstat(file.fileno())
                said = json.load(file)
        except FileNotFoundError:
            return
        if (version.st_ino, version.st_mtime_ns) != self._seen:
            self._seen = version.st_ino, version.st_mtime_ns
            pids = tuple(rank["pid"] for rank in sorted(said["ranks"], key=lambda rank: rank["rank"]))
            self.rings.append(Ring(said["launcher_pid"], pids, version.st_mtime, time.monotonic()))

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    async def until(self, holds: Callable[[Ring], bool]) -> Ring:
        """The first ring for which `holds`; `run` must run meanwhile."""
        while not holds(self.now):
            await asyncio.sleep(LOOK_S)
        return self.now

    def start_up_s(self) -> float | None:
        """From the launch of the last ring until it served; None where it was there at the beginning, or never did."""
        launched = {ring.launcher_pid: ring.written_at for ring in reversed(self.rings) if not ring.serves}
        last = self.now
        return last.written_at - launched[last.launcher_pid] if last.serves and last.launcher_pid in launched else None
