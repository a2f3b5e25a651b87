"""Ports for the servers that tests start."""

from __future__ import annotations

import contextlib
import os
import random
import socket

_APART = 16  # at most so many consecutive ones are asked for
# Below the range that systems take clients' ports from: one of those may have any port by the time a server wants it.
_STARTS = range(12000, 32000, _APART)
_MAX_WORKERS = 8


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody listens on. Test processes side by side get different ones."""
    assert count <= _APART
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _MAX_WORKERS
    starts = _STARTS[worker::_MAX_WORKERS]
    for first in random.SystemRandom().sample(starts, len(starts)):  # another test session may be looking too
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")
