"""Ports for the servers that tests start."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from itertools import cycle, islice

from api.runtime_files import AlreadyRunning, lock_port

_APART = 16  # at most so many consecutive ones are asked for
# Below the range that systems take clients' ports from: one of those may have any port by the time a server wants it.
_STARTS = range(12000, 32000, _APART)
_MAX_WORKERS = 8
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # "gw2", where several processes share a session

_mine = _STARTS if _WORKER is None else _STARTS[int(_WORKER.removeprefix("gw")) % _MAX_WORKERS :: _MAX_WORKERS]
# One after the other, since who is given some listens on them later; at random, since another session may run.
_next = cycle(random.SystemRandom().sample(_mine, len(_mine)))


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody has. Test processes side by side get different ones."""
    assert count <= _APART
    for first in islice(_next, len(_mine)):
        if _are_free(range(first, first + count)):
            return first
    raise RuntimeError("no free ports")


def _are_free(ports: range) -> bool:
    with contextlib.ExitStack() as held:
        try:
            for port in ports:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                # A ring that has formed listens no more, and its server keeps the ports for the next one.
                held.enter_context(lock_port(port))
        except (OSError, AlreadyRunning):
            return False
    return True
