"""Clients that say nothing, too little or too much, and those that never read, on real sockets."""

import asyncio
import contextlib
import logging
import resource
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from api import connections
from api.connections import Connection, Connections, probe, raise_file_limit
from tests.api.served_app import BODY, Served, run, served

GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(app: Served, **arguments: Any) -> Streams:
    return await asyncio.open_connection("127.0.0.1", int(app.url.rpartition(":")[2]), **arguments)


async def all_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes the connection."""
    async with asyncio.timeout(10):
        return await reader.read()


async def answer_to(streams: Streams, request: bytes = GET) -> bytes:
    """The status line; the rest of the answer is read as well."""
    reader, writer = streams
    writer.write(request)
    async with asyncio.timeout(10):
        status = await reader.readline()
        length = 0
        while (line := await reader.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        await reader.readexactly(length)
    return status


def test_a_head_that_does_not_come_is_not_waited_for(
    tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.1)

    async def byte_by_byte(streams: Streams) -> None:
        """A head without an end, until the server has had enough."""
        ended = asyncio.create_task(all_of(streams[0]))
        while not ended.done():
            streams[1].write(b"x")
            await asyncio.sleep(0.005)
        with contextlib.suppress(ConnectionResetError):  # it closed before it had read all that
            await ended

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            silent, slow, cut, second = [await connect(app) for _ in range(4)]
            assert b" 200 " in await answer_to(second)
            for _, writer in (cut, second):
                writer.write(GET[:-2])
            await byte_by_byte(slow)
            assert await all_of(silent[0]) == b""
            assert (await all_of(cut[0])).startswith(b"HTTP/1.1 408 ")
            assert (await all_of(second[0])).startswith(b"HTTP/1.1 408 ")
            for _, writer in (silent, slow, cut, second):
                writer.close()

    run(test())


def test_an_answer_may_take_longer_than_a_head(tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.05)

    async def test() -> None:
        async with served(tmp_path, tiny_chat_model) as app:
            asking = asyncio.create_task(app.http.post("/v1/chat/completions", json=BODY))
            await app.until(lambda: bool(app.client.generations))
            await asyncio.sleep(0.1)
            await app.answer("hi")
            assert (await asking).status_code == 200

    run(test())


def test_at_the_limit_the_longest_idle_connection_makes_room(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_connections=2) as app:
            first, second = await connect(app), await connect(app)
            for streams in (second, first):  # so the second is idle longer
                assert b" 200 " in await answer_to(streams)
            third = await connect(app)
            assert b" 200 " in await answer_to(third)
            assert await all_of(second[0]) == b""
            assert b" 200 " in await answer_to(first)
            for _, writer in (first, second, third):
                writer.close()

    run(test())


def test_where_all_connections_are_in_use_a_further_one_gets_a_503(tmp_path: Path, tiny_chat_model: Path):
    async def test() -> None:
        async with served(tmp_path, tiny_chat_model, max_connections=1) as app:
            asking = asyncio.create_task(app.http.post("/v1/chat/completions", json=BODY))
            await app.until(lambda: bool(app.client.generations))
            reader, writer = await connect(app)
            refused = await all_of(reader)
            assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after" in refused
            writer.close()
            await app.answer("hi")
            assert (await asking).status_code == 200

    run(test())


def test_a_client_that_never_reads_holds_no_place_on_the_ring_and_is_hung_up_on(
    tmp_path: Path, tiny_chat_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "api")
    monkeypatch.setattr(
        connections, "probe", lambda accepted: accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    )
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": true}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def test() -> None:
        ready = {"max_sequence_length": 2000}
        async with served(tmp_path, tiny_chat_model, ready, request_timeout=0.2) as app:
            loop = asyncio.get_running_loop()
            with socket.socket() as client:
                client.setblocking(False)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await loop.sock_connect(client, ("127.0.0.1", int(app.url.rpartition(":")[2])))
                await loop.sock_sendall(client, head + body)
                await app.answer(*["one"] * 500)
                await app.until(lambda: not app.client.generations)
                await app.until(lambda: "read nothing" in caplog.text)
                got = b""
                while piece := await loop.sock_recv(client, 65536):
                    got += piece
            assert b"data: " in got and b"[DONE]" not in got

    run(test())


def test_a_client_that_reads_slowly_is_waited_for():
    """Over a transport that says how much is unsent."""

    async def test() -> None:
        sizes, aborted = iter([900, 500, 500, 500]), []
        shared = Connections(max_connections=1, silence_s=1000)
        config = uvicorn.Config(FastAPI(), log_config=None)
        connection = Connection(shared, config=config, server_state=ServerState(), app_state={})
        connection.flow = SimpleNamespace(pause_writing=lambda: None)  # pyright: ignore[reportAttributeAccessIssue]
        connection.transport = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
            get_write_buffer_size=lambda: next(sizes), abort=lambda: aborted.append(True)
        )
        connection.pause_writing()
        for size_before, is_over in ((900, False), (500, True)):
            connection._check_reader(size_before)
            assert bool(aborted) == is_over

    run(test())


def test_a_connection_whose_other_machine_is_gone_is_found_out():
    with socket.socket() as accepted:
        probe(accepted)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == connections.NUM_PROBES
    there, here = socket.socketpair()
    with there, here:
        probe(here)  # a unix socket has no such thing


def test_the_process_may_have_as_many_files_open_as_the_system_lets_it():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        limit = raise_file_limit()
        assert limit > 256
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit, hard)
        assert raise_file_limit() == limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_few_files_make_few_connections_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture):
    assert Connections.for_open_files(256, silence_s=1).max_connections == 192
    assert "at most 192 connections" in caplog.text and "ulimit" in caplog.text
    caplog.clear()
    assert Connections.for_open_files(10_240, silence_s=1).max_connections > 10_000
    assert not caplog.text
