"""Real servers that start wrong, lose ranks, are killed or stopped: what is said, what goes on, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from api.__main__ import HTTP_END_GRACE_S
from api.processes import ring_processes
from distributed.launch import instance_id
from tests.running_server import RunningServer
from tests.tiny_chat_model import write_tiny_chat_model

pytestmark = pytest.mark.ring

HELLO: Any = [{"role": "user", "content": "hello world"}]
NewServer = Callable[..., RunningServer]


@pytest.fixture
def new_server(tmp_path: Path, tiny_chat_model: Path) -> Iterator[NewServer]:
    """Servers of one test's own, not started yet; nothing of them may be left at the end."""
    servers: list[RunningServer] = []

    def make(**keys: object) -> RunningServer:
        environ = {"MODEL_REPO": tiny_chat_model, "RING_SIZE": 1, **keys}
        server = RunningServer(
            tmp_path / f"project {len(servers)}", {key: str(value) for key, value in environ.items()}
        )
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.close_clients()
        if server in RunningServer.started:
            server.stop()
        assert ring_processes(instance_id(server.root)) == []


def stream_of(server: RunningServer, **fields: Any) -> Any:
    fields = {"model": server.model, "max_tokens": 400, "temperature": 0, "stream": True, **fields}
    return server.client().chat.completions.create(messages=HELLO, **fields)


def open_stream(server: RunningServer) -> AbstractContextManager[httpx.Response]:
    """A stream as lines, of some seconds."""
    body = {"model": server.model, "messages": HELLO, "max_tokens": 1900, "temperature": 0, "stream": True}
    return httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60)


def request_of_much(server: RunningServer) -> bytes:
    """The bytes of a request whose stream is more than a connection holds while nobody reads it."""
    body = {"model": server.model, "messages": HELLO, "max_tokens": 1900, "temperature": 0, "stream": True}
    content = json.dumps({**body, "logprobs": True, "top_logprobs": 20}).encode()
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def rank_pids(server: RunningServer) -> list[int]:
    return [rank["pid"] for rank in server.health()["ranks"]]


def still_running(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that have not ended by then. One that nobody has waited for yet has ended."""
    deadline = time.monotonic() + timeout_s
    while running := [process for process in processes if runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return running


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def failure_of(server: RunningServer) -> str:
    """Start a server that cannot get ready; why, as /health says it."""
    server.start(wait=False)
    detail = server.wait_until(lambda health: health.get("status") == "failed", "failed")["detail"]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"model": server.model, "messages": HELLO})
    assert answer.status_code == 503
    assert detail in answer.json()["error"]["message"]
    return detail


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_end_with_the_api_and_one_that_is_stopped_with_the_next_start(new_server: NewServer, rank: int):
    server = new_server(RING_SIZE=3)
    server.start()
    ranks = [psutil.Process(pid) for pid in rank_pids(server)]
    stopped = ranks.pop(rank)
    stopped.suspend()
    server.kill()
    assert still_running(ranks, 2) == []
    server.start()
    assert not stopped.is_running()
    assert text_of(stream_of(server, max_tokens=5)) is not None
    folders = Path(tempfile.gettempdir()).glob(f"mlx-ring-{instance_id(server.root)}-*")
    assert len(list(folders)) == 1, "that of the killed one is gone"


def test_rings_that_are_lost_leave_no_process_no_file_and_no_descriptor(new_server: NewServer):
    with tempfile.TemporaryDirectory() as temporary:
        server = new_server(RING_SIZE=2, TMPDIR=temporary)
        server.start()
        for folder in Path(temporary).glob("mlx-ring-*/"):
            shutil.rmtree(folder)  # as systems do with what is old
        undisturbed = text_of(stream_of(server))
        assert server.process is not None
        api = psutil.Process(server.process.pid)
        num_fds = api.num_fds()
        for victim in ("rank 0", "rank 1", "launcher"):
            pids = rank_pids(server)
            ring = [psutil.Process(pid) for pid in pids]
            stream = stream_of(server)
            text = "".join(next(stream).choices[0].delta.content or "" for _ in range(20))
            launcher = json.loads((server.root / ".run" / "ring.json").read_text())["launcher_pid"]
            os.kill({"rank 0": pids[0], "rank 1": pids[1], "launcher": launcher}[victim], signal.SIGKILL)
            assert still_running(ring, 2) == [], f"2 s after the end of {victim}"
            assert text + text_of(stream) == undisturbed
            assert not set(rank_pids(server)) & set(pids)
        deadline = time.monotonic() + 10
        while api.num_fds() > num_fds and time.monotonic() < deadline:
            time.sleep(0.02)  # the last stream's connection is still being closed
        assert api.num_fds() <= num_fds
        (folder,) = {path.parent for path in Path(temporary).rglob("rank0.sock")}
        assert len(list(folder.rglob("*"))) == 6, "the socket, a folder, and in it two files a rank, of this ring alone"
        assert server.stop() == 0
        kept = {path.name for path in Path(temporary).iterdir() if path.suffix != ".lock"}
        assert kept <= {f"mlx-ring-server-{os.getuid()}"}, "where ranks keep compiled kernels"


def test_stop_lets_accepted_requests_end_and_takes_no_more(new_server: NewServer):
    server = new_server(SHUTDOWN_GRACE_S=30)
    server.start()
    undisturbed = text_of(stream_of(server, max_tokens=1500))
    stream = stream_of(server, max_tokens=1500)
    text = next(stream).choices[0].delta.content or ""
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda health: health.get("status") == "stopping", "stopping", timeout_s=5)
    refused = httpx.post(f"{server.url}/v1/chat/completions", json={"model": server.model, "messages": HELLO})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert text + text_of(stream) == undisturbed
    assert server.stop() == 0
    assert not any((server.root / ".run" / name).exists() for name in ("api.json", "ring.json"))


def test_past_its_grace_stop_ends_requests_with_an_error(new_server: NewServer):
    server = new_server(SHUTDOWN_GRACE_S=0)
    server.start()
    with open_stream(server) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.process is not None
        server.process.send_signal(signal.SIGINT)
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert "being stopped" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert server.stop() == 0


def test_stop_waits_for_a_client_that_takes_its_answer_slowly(new_server: NewServer):
    server = new_server(SHUTDOWN_GRACE_S=60)
    server.start()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.api_port))
        slow.sendall(request_of_much(server))
        server.wait_until(lambda health: sum(health["requests"].values()) == 1, "at work")
        server.wait_until(lambda health: sum(health["requests"].values()) == 0, "done, though nobody reads")
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        received = b""
        while piece := slow.recv(16_384):
            received += piece
            if time.monotonic() < stopped + 2 * HTTP_END_GRACE_S:
                time.sleep(0.02)  # this is the slowness
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert server.process.wait(30) == 0
    RunningServer.started.remove(server)


def test_ctrl_c_in_the_server_s_terminal_lets_requests_end_and_no_idle_client_holds_it_up(new_server: NewServer):
    server = new_server(RING_SIZE=2, SHUTDOWN_GRACE_S=60)
    server.start(own_group=True)
    silent, unsent, unread = [socket.create_connection(("127.0.0.1", server.api_port)) for _ in range(3)]
    with silent, unsent, unread, httpx.Client() as idle, open_stream(server) as response:
        idle.get(f"{server.url}/v1/models")
        unsent.sendall(request_of_much(server)[:-1])
        unread.sendall(request_of_much(server))
        server.wait_until(lambda health: sum(health["requests"].values()) == 2, "at work on both")
        lines = response.iter_lines()
        next(lines)
        assert server.process is not None
        os.killpg(server.process.pid, signal.SIGINT)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        ended = time.monotonic()
        assert server.process.wait(30) == 0
        refused = unsent.recv(1000)
    assert time.monotonic() - ended < 15
    assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in refused
    RunningServer.started.remove(server)
    assert "the ring is lost" not in server.log()


def test_a_server_can_be_stopped_while_it_starts(new_server: NewServer):
    server = new_server(API_HOST="0.0.0.0")
    server.start(wait=False)
    server.wait_until(lambda health: health.get("status") == "starting", "starting")
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 20
    assert "WARNING api: API_HOST=0.0.0.0 lets other machines in and API_KEYS is empty" in server.log()


def test_a_taken_api_port_is_said_before_a_ring_is_started(new_server: NewServer):
    server = new_server()
    with socket.socket() as other:
        other.bind(("127.0.0.1", server.api_port))
        other.listen()
        server.start(wait=False)
        assert server.process is not None
        assert server.process.wait(30) == 4
    RunningServer.started.remove(server)
    assert f"port {server.api_port}" in server.log()
    assert "API_PORT" in server.log()
    assert not (server.root / ".run" / "ring.json").exists()


def test_a_taken_ring_port_is_named(new_server: NewServer):
    server = new_server(RING_SIZE=2)
    with socket.socket() as other:
        port = int(server.environ["RING_PORT"]) + 1
        other.bind(("127.0.0.1", port))
        other.listen()
        assert f"ring port {port}" in (detail := failure_of(server))
        assert "RING_PORT" in detail


def test_a_second_server_of_a_folder_is_refused_and_the_first_goes_on(new_server: NewServer):
    first = new_server()
    first.start()
    second = subprocess.run(
        [sys.executable, "-m", "api"], cwd=first.root, env=first.environ, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 3
    assert "runs already" in second.stderr
    assert first.health()["status"] == "ready"


def test_a_second_server_on_the_same_ring_ports_says_so(new_server: NewServer):
    first = new_server(RING_SIZE=2)
    first.start()
    second = new_server(RING_SIZE=2, RING_PORT=first.environ["RING_PORT"])
    assert "RING_PORT" in failure_of(second)
    assert text_of(stream_of(first, max_tokens=5)) is not None


def test_a_missing_model_is_said_and_not_tried_again(new_server: NewServer, tmp_path: Path):
    server = new_server(MODEL_REPO=tmp_path / "nowhere", RING_SIZE=1)
    assert "nowhere" in failure_of(server)
    assert server.log().count("starting ->") == 1


@pytest.mark.parametrize("damage", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_broken_model_folder_is_said_and_not_tried_again(new_server: NewServer, tmp_path: Path, damage: str):
    folder = write_tiny_chat_model(tmp_path / "broken")
    (folder / damage).write_text("{")
    server = new_server(MODEL_REPO=folder, RING_SIZE=1)
    assert "broken" in failure_of(server)
    assert server.log().count("giving up") == 1


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"LAYER_SPLIT": "3"}, "LAYER_SPLIT"),
        ({"KV_CACHE_MAX_SIZE": 100, "MAX_SEQUENCE_LENGTH": 200}, "KV_CACHE"),
    ],
)
def test_settings_that_cannot_work_are_named(new_server: NewServer, keys: dict[str, Any], names: str):
    server = new_server(**keys)
    server.start(wait=False)
    assert server.process is not None
    try:
        detail = server.wait_until(lambda health: health.get("status") == "failed", "failed")["detail"]
        assert names in detail
    except AssertionError:
        assert server.process.wait(5) == 2  # found before anything was started
        RunningServer.started.remove(server)
        assert names in server.log()


def test_a_wrong_key_is_said_at_once(new_server: NewServer):
    server = new_server(RING_PORT="abc")
    server.start(wait=False)
    assert server.process is not None
    assert server.process.wait(30) == 2
    RunningServer.started.remove(server)
    assert "RING_PORT" in server.log()


def test_a_ring_that_is_not_ready_in_time_is_given_up_with_its_last_word(new_server: NewServer):
    server = new_server(START_TIMEOUT=0.5)
    assert "START_TIMEOUT" in failure_of(server)
