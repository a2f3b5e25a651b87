"""mlx.launch as a child of the api process: started, its output relayed to the log, ended with all its ranks.

Whether the ring lives is never read from an exit code (mlx.launch returns 0 when ranks were killed) but from rank 0's
connection; this module says only when the launcher itself has gone. Used by the supervisor alone.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import deque
from pathlib import Path

import psutil

from api.processes import end_processes, ring_processes
from config import Settings
from config.logging import relay_rank_line
from distributed.launch import RingCommand, ring_command

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 1024 * 1024
TERM_GRACE_S = 5.0
OUTPUT_GRACE_S = 5.0  # for what is left of the output, when all processes have ended


async def end_ring(instance: str) -> list[psutil.Process]:
    """Ends every process of this instance's rings on this machine; returns those that had to be killed."""
    return await asyncio.to_thread(lambda: end_processes(ring_processes(instance), TERM_GRACE_S))


class RingProcess:
    def __init__(self, command: RingCommand, instance: str) -> None:
        self.ranks = command.ranks
        self.last_lines: deque[str] = deque(maxlen=20)  # for the message when it ends without a word to the api
        self._command = command
        self._instance = instance
        self._process: asyncio.subprocess.Process | None = None
        self._relay: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, settings: Settings, socket_path: Path, instance: str) -> RingProcess:
        """Raises HostError or RingError where the settings' machines cannot be found."""
        command = await asyncio.to_thread(
            ring_command, settings, root=settings.project_root, socket_path=str(socket_path), instance=instance
        )
        ring = cls(command, instance)
        await ring._start()
        return ring

    async def _start(self) -> None:
        self._command.temporary.mkdir(exist_ok=True)
        # A session of its own: a ctrl-C in the terminal must reach the api alone, which then ends the ring in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command.argv,
            env=self._command.env,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        self._relay = asyncio.create_task(self._relay_output(), name="ring output")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def has_exited(self) -> bool:
        return self._process is None or self._process.returncode is not None

    def stop_spinning(self) -> None:
        """mlx.launch spins a core while its ranks' stdin is writable; one newline makes it find out that it is not."""
        if self._process is not None and self._process.stdin is not None and not self.has_exited:
            self._process.stdin.write(b"\n")

    async def end(self, grace_s: float) -> None:
        """Returns when no process of this ring is left here, but for what nothing can end.

        `grace_s`: how long it may take to end by itself.
        """
        if self._process is None or self._relay is None:
            return
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            pass
        killed = await end_ring(self._instance)
        if killed:
            logger.warning("killed what did not end when asked: %s", ", ".join(str(process.pid) for process in killed))
        if self._process.stdin is not None:
            self._process.stdin.close()
        # Both wait for the last process that holds the pipe, and one that hangs in the kernel no signal ends.
        ending = (self._relay, asyncio.ensure_future(self._process.wait()))
        _, held_up = await asyncio.wait(ending, timeout=OUTPUT_GRACE_S)
        for task in held_up:
            task.cancel()
        if held_up:
            logger.warning("a process of the last ring does not end; the next ring does not wait for it")
        await asyncio.to_thread(shutil.rmtree, self._command.temporary, ignore_errors=True)

    async def _relay_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while True:
            try:
                line = (await self._process.stdout.readline()).decode("utf-8", "replace")
            except ValueError:  # longer than MAX_LINE_BYTES; asyncio has dropped it
                continue
            if not line:
                return
            if said := relay_rank_line(line):
                self.last_lines.append(said)
