"""What a running server holds: resident memory, MLX's memory, KV cache, open files, by process.

It reads /health, /metrics and the process table, and compares nothing. Used by `bench.soak`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx
import psutil

from tests.running_server import RunningServer

LOOK_S = 1.0  # the ring reports once a second
NUM_LOOKS = 3  # that see the same, until it is taken for what is held: a rank lets go of its last step a moment later
QUIET_S = 30.0  # after the last client, until nothing may run any more


@dataclass(frozen=True)
class Idle:
    """What a server that nobody asks holds, by process. Bytes are without the prefix cache's."""

    requests: int
    kv_tokens: int  # set aside for requests
    num_prefixes: int  # entries of the prefix cache
    kv_bytes: dict[str, int]
    memory_bytes: dict[str, int]  # MLX's active memory
    num_connections: int  # of clients, as the api sees them
    num_fds: dict[str, int]

    @property
    def is_quiet(self) -> bool:
        return not (self.requests or self.kv_tokens or any(self.kv_bytes.values()) or self.num_connections)


def idle(server: RunningServer) -> Idle:
    """When nothing runs any more; what is held even QUIET_S later is in it."""
    deadline = time.monotonic() + QUIET_S
    looks = [_look(server)]
    while time.monotonic() < deadline:
        if looks[-1].is_quiet and looks[-NUM_LOOKS:] == [looks[-1]] * NUM_LOOKS:
            break
        time.sleep(LOOK_S)
        looks.append(_look(server))
    return looks[-1]


def _look(server: RunningServer) -> Idle:
    health = server.health()
    ranks = {f"rank {rank['rank']}": rank for rank in health["ranks"]}
    kv_tokens = int(metric(server, "kv_cache_tokens"))
    watched = processes(server)
    # What was just asked here is a connection too, until the api has seen that it was closed. Files are counted after
    # connections: where there are none, none is among the files.
    num_connections = _num_connections(watched["api"], server.api_port)
    return Idle(
        requests=sum(health["requests"].values()),
        kv_tokens=kv_tokens,
        num_prefixes=health["prefix_cache"]["entries"],
        kv_bytes={name: rank["kv_cache_bytes"] - rank["prefix_cache_bytes"] for name, rank in ranks.items()},
        memory_bytes={name: rank["memory_bytes"] - rank["prefix_cache_bytes"] for name, rank in ranks.items()},
        num_connections=num_connections,
        num_fds={name: process.num_fds() for name, process in watched.items()},
    )


def _num_connections(api: psutil.Process, port: int) -> int:
    open_here = [connection for connection in api.net_connections("tcp") if connection.laddr.port == port]
    return sum(connection.status != psutil.CONN_LISTEN for connection in open_here)


def processes(server: RunningServer) -> dict[str, psutil.Process]:
    """The api process and the ranks."""
    assert server.process is not None
    ranks = {f"rank {rank['rank']}": rank["pid"] for rank in server.health()["ranks"]}
    return {name: psutil.Process(pid) for name, pid in ({"api": server.process.pid} | ranks).items()}


def metric(server: RunningServer, name: str) -> float:
    """The one sample of this name in /metrics."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"mlx_ring_{name} "))
