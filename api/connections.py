"""Clients' connections: uvicorn's HTTP/1.1 with an end to every wait for a client, and a limit on how many there are.

uvicorn waits for ever for the head of a request, for a client that does not read, and for one whose machine is gone.
Here each of these ends. Nothing here knows what is asked or answered: a request's body is read by api.body, and an
answer is computed whether its client reads or not. Made by `python -m api`; uvicorn calls `Connections.accept`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.engine_client import RETRY_AFTER_S

logger = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 20.0  # for a request's head, from the connection or from the first byte of a further request
KEEP_ALIVE_S = 75  # between two requests; longer than clients keep a connection they may use again
PROBE_AFTER_S, PROBE_EVERY_S, NUM_PROBES = 60, 15, 4  # TCP's own question whether the other machine is still there

WANTED_FILES = (65_536, 10_240)  # the second is what macOS lets a process have
FILES_FOR_OURSELVES = 64  # log, ring, store, the library's own
FEW_CONNECTIONS = 1_200

_LAST = "content-length: 0\r\nconnection: close\r\n\r\n"
_NOT_NOW = f"HTTP/1.1 503 Service Unavailable\r\nretry-after: {RETRY_AFTER_S}\r\n{_LAST}"
_TOO_SLOW = f"HTTP/1.1 408 Request Timeout\r\n{_LAST}"


def raise_file_limit() -> int:
    """As many open files as the system lets this process have; how many that is. A connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in WANTED_FILES:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= limit:
            return max(soft, limit)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
        except (OSError, ValueError):  # macOS's kern.maxfilesperproc is under what it says is the hard limit
            continue
    return soft


class Connections:
    """What all connections of a server share: how long a client may be silent, and which ones are idle."""

    def __init__(self, *, max_connections: int, silence_s: float) -> None:
        """`silence_s`: how long a client may take nothing of what is being sent to it."""
        self.max_connections = max_connections
        self.silence_s = silence_s
        self.idle: dict[Connection, None] = {}  # without a request; longest first

    @classmethod
    def for_open_files(cls, num_files: int, *, silence_s: float) -> Connections:
        max_connections = max(1, num_files - FILES_FOR_OURSELVES)
        if max_connections < FEW_CONNECTIONS:
            logger.warning(
                "this process may have %d open files: at most %d connections at once. To have more, raise the hard "
                "limit of open files (ulimit -Hn; LimitNOFILE= of a systemd unit)",
                num_files,
                max_connections,
            )
        return cls(max_connections=max_connections, silence_s=silence_s)

    def hurry(self, connections: set[Connection], silence_s: float) -> None:
        """From now on a client may take nothing for so long only, and has so long for the rest of a request.

        No request is accepted any more: what a body would still say, nobody waits for. `connections`: all of the
        server's, as uvicorn keeps them.
        """
        self.silence_s = silence_s
        for connection in connections:
            connection.look_sooner()

        def refuse_unsent() -> None:
            for connection in list(connections):
                connection.refuse_unsent()

        asyncio.get_running_loop().call_later(silence_s, refuse_unsent)

    def accept(self, **arguments: Any) -> Connection:
        """As uvicorn makes a connection's protocol."""
        return Connection(self, **arguments)


class Connection(H11Protocol):
    def __init__(self, shared: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._shared = shared
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None

    # -- its life ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        probe(transport.get_extra_info("socket"))
        # What the system does not take is paused for at once, so that all of it is under `_reader_timer`.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self._shared.max_connections and not self._make_room():
            self._end(_NOT_NOW)
            return
        self._shared.idle[self] = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.idle.pop(self, None)
        self._head_timer = _cancelled(self._head_timer)
        self._reader_timer = _cancelled(self._reader_timer)
        super().connection_lost(exc)

    def _make_room(self) -> bool:
        """Whether a place is free for this one: that of the connection that has been idle longest."""
        longest = next(iter(self._shared.idle), None)
        if longest is not None:
            longest._end()
        return longest is not None

    def _end(self, last_words: str = "") -> None:
        self._shared.idle.pop(self, None)
        if not self.transport.is_closing():
            self.transport.write(last_words.encode())
            self.transport.close()

    # -- requests ----------------------------------------------------------------------------------------------------

    @property
    def _is_serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_serving:
            self._shared.idle.pop(self, None)
            self._head_timer = _cancelled(self._head_timer)
        else:  # a part of a head, or what nobody reads any more of the request before
            self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_serving and not self.transport.is_closing():  # else the next request had come already
            self._shared.idle[self] = None

    def _expect_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        has_begun = self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        self._end(_TOO_SLOW if has_begun else "")

    def refuse_unsent(self) -> None:
        """Where a part of a request has come, it is over."""
        if self._is_serving and self.cycle.more_body:
            self._end("" if self.cycle.response_started else _NOT_NOW)

    # -- a client that does not read ---------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_timer = _cancelled(self._reader_timer)

    def look_sooner(self) -> None:
        """At a client that takes nothing: how long it may has changed."""
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._watch_reader()

    def _watch_reader(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self._shared.silence_s, self._check_reader, size)

    def _check_reader(self, size_before: int) -> None:
        if self.transport.get_write_buffer_size() < size_before:
            self._watch_reader()
            return
        logger.info("a client has read nothing for %.0f s: its connection is closed", self._shared.silence_s)
        self.transport.abort()


def probe(connection: socket.socket) -> None:
    """Have the system find out when the other machine is gone without a word."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    after = socket.TCP_KEEPALIVE if sys.platform == "darwin" else socket.TCP_KEEPIDLE
    connection.setsockopt(socket.IPPROTO_TCP, after, PROBE_AFTER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
