"""Rank 0's end of the unix socket to the api process: sends from any thread, reads into the engine's inbox.

The api owns this ring: when the connection closes, the process ends, and with it the ring. What must work while the
engine is stuck, or before there is one, is done by the thread that reads. The messages are `server.protocol`'s.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

from distributed.fatal import die, flush_and_exit, start_thread, tell_at_the_end
from distributed.frames import LastWords
from distributed.pipeline import Pipeline
from server.protocol import (
    PROTOCOL_VERSION,
    Configure,
    DumpStacks,
    Failed,
    FromEngine,
    ProtocolError,
    Shutdown,
    encode,
    read_to_engine,
)

_GOODBYE_TIMEOUT_S = 5.0
_LAST_WORDS_TIMEOUT_S = 0.5


class ApiLink:
    """The connection at `socket_path`, which the api process listens on."""

    def __init__(self, socket_path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(socket_path)
        self._lock = threading.Lock()
        tell_at_the_end(self._say_last)

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

    def start_reading(self, pipeline: Pipeline) -> None:
        """Read every further message, in a thread of its own. Requests go into the pipeline's inbox."""
        start_thread("api-reader", self._read_forever, pipeline)

    def _read_forever(self, pipeline: Pipeline) -> None:
        while (message := read_to_engine(self._socket)) is not None:
            match message:
                case DumpStacks(reason=reason):
                    pipeline.dump_stacks(reason)
                case Shutdown():
                    pipeline.close(_GOODBYE_TIMEOUT_S)
                    flush_and_exit(0)
                case _:
                    pipeline.inbox.put(message)
        die("the api process closed the connection", exit_code=0)

    def _say_last(self, words: LastWords) -> None:
        """Not through `send`, which ends the process where it fails."""
        if self._lock.acquire(timeout=_LAST_WORDS_TIMEOUT_S):
            self._socket.settimeout(_LAST_WORDS_TIMEOUT_S)
            self._socket.sendall(encode(Failed(words.reason, words.permanent, words.out_of_memory)))
