"""Whether clients that do nothing cost those that do: streams beside idle connections and clients that never read.

A tiny random model over two ranks, so that the api process and not the model sets the pace: what idle connections and
unread answers cost shows nowhere better. The ring works on an unread answer too, so the measure for clients that never
read is as many that ask the same and read. Every round runs each scenario once, one after the other.

    python -m bench.clients
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from api.connections import raise_file_limit
from bench.client import Request, Target, ask, new_http, steady_tokens_per_second
from bench.environment import heading, table
from bench.figures import cell, median, milliseconds, percentile
from tests.running_server import RunningServer
from tests.tiny_chat_model import CONTEXT, write_tiny_chat_model

MIB = 2**20
MESSAGES = [{"role": "user", "content": "hello world"}]
LONG_TOKENS = CONTEXT - 100


class Scenario(NamedTuple):
    """What there is beside the streams that are measured."""

    idle: int = 0  # connections
    reading: int = 0  # clients with a long answer
    unread: int = 0  # clients with the same answer that take nothing of it


@dataclass
class Measured:
    """Of one scenario, a figure a round."""

    rates: list[float] = field(default_factory=list)
    longest_gaps: list[float] = field(default_factory=list)
    api_mib: list[float] = field(default_factory=list)
    num_closed: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--long", type=int, default=8, help="clients that ask for a long answer")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer that is read")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    raise_file_limit()
    idle, long = arguments.idle, arguments.long
    scenarios = [Scenario(), Scenario(idle), Scenario(reading=long), Scenario(unread=long), Scenario(idle, unread=long)]
    measured = {scenario: Measured() for scenario in scenarios}
    with running(arguments.streams + long) as server:
        for _ in range(arguments.rounds):
            for scenario, result in measured.items():
                asyncio.run(run(server, scenario, arguments.streams, arguments.tokens, result))
    print(heading(f"{arguments.streams} streams of a tiny model, P = 2, {arguments.rounds} rounds"))
    columns = ["idle connections", "long answers, read", "never read", "tokens/s", "gap p99, ms", "api, MiB", "closed"]
    print(table(columns, [[*map(str, scenario), *row(result)] for scenario, result in measured.items()]))


def row(result: Measured) -> list[str]:
    gap = milliseconds(median(result.longest_gaps))
    return [cell(median(result.rates), 0), gap, cell(median(result.api_mib), 1), str(max(result.num_closed))]


@contextlib.contextmanager
def running(num_requests: int) -> Iterator[RunningServer]:
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = write_tiny_chat_model(Path(scratch) / "model")
        keys = {"MODEL_REPO": model, "RING_SIZE": 2, "MAX_CONCURRENT_REQUESTS": num_requests, "SHUTDOWN_GRACE_S": 1}
        server = RunningServer(Path(scratch) / "project", {key: str(value) for key, value in keys.items()})
        server.start()
        try:
            yield server
        finally:
            server.stop()


async def run(server: RunningServer, scenario: Scenario, streams: int, tokens: int, result: Measured) -> None:
    """One round of one scenario."""
    assert server.process is not None
    target = Target(server.url, server.model, banned_token_ids=(0, 1, 2))
    request = Request(MESSAGES, tokens)
    async with new_http() as http, idle_connections(server, scenario.idle) as connections:
        async with long_answers(server, scenario.reading, read=True), long_answers(server, scenario.unread, read=False):
            answers = await asyncio.gather(*(ask(http, target, request) for _ in range(streams)))
            result.api_mib.append(psutil.Process(server.process.pid).memory_info().rss / MIB)
        result.num_closed.append(sum(reader.at_eof() for reader in connections))
    result.rates.append(steady_tokens_per_second(answers))
    result.longest_gaps.append(percentile([gap for answer in answers for gap in answer.gaps], 99))


@contextlib.asynccontextmanager
async def idle_connections(server: RunningServer, count: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Each has been answered once, as a client's that keeps its connection."""
    opened = [await asyncio.open_connection("127.0.0.1", server.api_port) for _ in range(count)]
    for reader, writer in opened:
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: bench\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
    try:
        yield [reader for reader, _ in opened]
    finally:
        for _, writer in opened:
            writer.close()


@contextlib.asynccontextmanager
async def long_answers(server: RunningServer, count: int, *, read: bool) -> AsyncIterator[None]:
    """Clients that ask for a long stream, and read it or take nothing of it."""
    body = {"model": server.model, "messages": MESSAGES, "max_tokens": LONG_TOKENS, "stream": True, "logprobs": True}
    content = json.dumps({**body, "top_logprobs": 20, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()

    async def drain(client: socket.socket) -> None:
        while await loop.sock_recv(client, 65536):
            pass

    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(socket.socket()) for _ in range(count)]
        for client in clients:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", server.api_port))
            await loop.sock_sendall(client, head + content)
        draining = [asyncio.create_task(drain(client)) for client in clients if read]
        yield
        for task in draining:
            task.cancel()
        await asyncio.gather(*draining, return_exceptions=True)


if __name__ == "__main__":
    main()
