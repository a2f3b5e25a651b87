"""Rank 0's end of the unix socket to the api process: sends from any thread, reads into the engine's inbox.

The api owns this ring: when the connection closes, the process ends, and with it the ring. The messages are
`server.protocol`'s.
"""

from __future__ import annotations

import queue
import socket
import threading
from typing import Any

from distributed.fatal import die, start_thread
from server.protocol import PROTOCOL_VERSION, Configure, FromEngine, ProtocolError, encode, read_to_engine


class ApiLink:
    """The connection at `socket_path`, which the api process listens on."""

    def __init__(self, socket_path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(socket_path)
        self._lock = threading.Lock()

    def configure(self) -> dict[str, Any]:
        """The settings that the api sends first.

        Raises:
            ProtocolError: it sent something else, or speaks another version of the protocol.
        """
        message = read_to_engine(self._socket)
        if not isinstance(message, Configure) or message.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"expected Configure of protocol {PROTOCOL_VERSION} from the api process, got {message!r}"
            )
        return message.settings

    def send(self, message: FromEngine) -> None:
        """Send one message; the end of the api process is the end of this one."""
        try:
            with self._lock:
                self._socket.sendall(encode(message))
        except OSError as error:
            die(f"the api process is gone ({error})", exit_code=0)

    def start_reading(self, inbox: queue.SimpleQueue[Any]) -> None:
        """Put every further message into `inbox`, from a thread of its own."""
        start_thread("api-reader", self._read_forever, inbox)

    def _read_forever(self, inbox: queue.SimpleQueue[Any]) -> None:
        while (message := read_to_engine(self._socket)) is not None:
            inbox.put(message)
        die("the api process closed the connection", exit_code=0)
