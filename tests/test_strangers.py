"""Strangers at every port and socket of a real server, while it serves and while it starts: none is believed."""

from __future__ import annotations

import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed.frames import Goodbye, Hello, encode
from server.protocol import Failed
from server.protocol import encode as encode_for_api
from tests.conftest import StartServer
from tests.running_server import RunningServer

pytestmark = pytest.mark.ring

GARBAGE = [
    b"",  # comes and goes
    b"\x00" * 4096,
    b"\xff" * 4096,
    struct.pack(">I", 2**32 - 1) + b"x" * 4096,  # the length of a message that nobody may send
    struct.pack(">I", 100) + b"x",  # an early end
    encode(Hello("0" * 32, 0)) + encode(Goodbye()),
    encode_for_api(Failed("I am rank 0", permanent=True)),
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 300_000 + b"\r\n\r\n",
]


def processes_of(server: RunningServer) -> list[psutil.Process]:
    assert server.process is not None
    api = psutil.Process(server.process.pid)
    return [api, *api.children(recursive=True)]


def listeners_of(server: RunningServer, kind: str) -> set[Any]:
    """Addresses at which any process of the server listens."""
    connections = [found for process in processes_of(server) for found in process.net_connections(kind)]
    if kind == "unix":
        return {found.laddr for found in connections if str(found.laddr).endswith(".sock")}
    return {tuple(found.laddr) for found in connections if found.status == psutil.CONN_LISTEN}


def answer_of(server: RunningServer) -> str:
    answer = server.client().chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": "hello"}], max_tokens=20, temperature=0
    )
    return answer.choices[0].message.content or ""


def throw(family: socket.AddressFamily, address: Any, data: bytes) -> None:
    """Send it all as far as that is taken, then hang up."""
    with socket.socket(family) as stranger:
        stranger.settimeout(5)
        stranger.connect(address)
        try:
            stranger.sendall(data)
        except OSError:
            pass  # hung up on


def test_a_serving_ring_listens_for_the_api_alone_and_garbage_changes_nothing(running_server: StartServer):
    server = running_server(RING_SIZE=3)
    pids = [rank["pid"] for rank in server.health()["ranks"]]
    answer = answer_of(server)
    assert listeners_of(server, "tcp") == {("127.0.0.1", server.api_port)}
    (path,) = listeners_of(server, "unix")
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    for data in GARBAGE:
        for _ in range(3):
            throw(socket.AF_INET, ("127.0.0.1", server.api_port), data)
            throw(socket.AF_UNIX, path, data)
    assert answer_of(server) == answer
    health = server.health()
    assert (health["status"], [rank["pid"] for rank in health["ranks"]]) == ("ready", pids)


@pytest.fixture
def starting(tiny_chat_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    server = RunningServer(tmp_path / "a project", {"MODEL_REPO": str(tiny_chat_model), "RING_SIZE": "2"})
    yield server
    server.stop()


def test_a_stranger_in_the_ring_only_makes_the_start_be_repeated(starting: RunningServer):
    """It takes the last rank's place at rank 0's port, before that rank has come."""
    starting.start(wait=False)
    last_rank = wait_for_rank(starting, 1)
    last_rank.suspend()
    port = int(starting.environ["RING_PORT"])
    deadline = time.monotonic() + 60
    while True:
        try:
            throw(socket.AF_INET, ("127.0.0.1", port), b"I am rank 1" * 1000)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "rank 0 did not listen"
            time.sleep(0.01)
    last_rank.resume()
    starting.wait_until(lambda health: health.get("status") == "ready", "ready")
    assert "the ring is lost: rank 0" in starting.log()
    assert answer_of(starting) is not None


def wait_for_rank(server: RunningServer, rank: int) -> psutil.Process:
    """That rank's process, as soon as it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in processes_of(server):
            try:
                if process.cmdline()[1:3] == ["-m", "server"] and process.environ().get("MLX_RANK") == str(rank):
                    return process
            except psutil.Error:
                continue
        time.sleep(0.005)
    raise AssertionError(f"rank {rank} did not come:\n{server.log()}")
