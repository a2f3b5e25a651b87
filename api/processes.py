"""Finding and ending the processes of a ring on this machine, by command line and never by guess.

Every process of the server in one project folder carries `--instance ID`, so what a crash left behind is found without
any file. It asks a process to end before it kills it: on macOS a SIGKILL can strand wired memory. Called by the
supervisor, in a thread, and by the commands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import psutil

POLL_S = 0.02


def own_processes() -> Iterator[psutil.Process]:
    """This user's, with `info`: those of others may call themselves what they like, and nothing may end them."""
    for process in psutil.process_iter(["cmdline", "status", "uids"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == os.getuid():
            yield process


def ring_processes(instance: str) -> list[psutil.Process]:
    """mlx.launch, the ranks and their shells that belong to `instance`."""
    found: list[psutil.Process] = []
    for process in own_processes():
        command = " ".join(process.info["cmdline"] or [])
        if f"--instance {instance}" in command and "-m server" in command:
            found.append(process)
    return found


def end_processes(processes: list[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """Ends them: SIGTERM, then SIGKILL after `grace_s`. Returns those that had to be killed."""
    for process in processes:
        _signal(process.terminate)
        _signal(process.resume)  # a stopped process gets no SIGTERM
    left = _wait(processes, grace_s)
    for process in left:
        _signal(process.kill)
    _wait(left, grace_s)
    return left


def _wait(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run after `timeout_s`. It looks and does not wait(2): a child's exit code is its parent's."""
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        pass  # it has ended meanwhile, which is what was wanted
