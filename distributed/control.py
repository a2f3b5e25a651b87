"""Control connections: one plain TCP connection to each neighbour, beside MLX's ring.

A rank blocks here for free, where a pending ring recv would spin a core, and learns the instant a neighbour dies
(EOF) or falls silent (no heartbeat). A connection is believed only after it has shown this run's token; it never
carries pickles, and every message has a length limit. `Pipeline` owns the two connections; nobody else reads or
writes them.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
import time

import msgspec

from distributed.errors import RingError
from distributed.frames import LENGTH, MAX_CONTROL_BYTES, ControlMessage, Hello, decode, encode

HEARTBEAT_INTERVAL_S = 1.0
PEER_SILENCE_S = 5.0  # a power cut, a pulled cable and SIGSTOP send no EOF
_CONNECT_TIMEOUT_S = 30.0
_HELLO_TIMEOUT_S = 2.0
_HELLO_BYTES = 4096

logger = logging.getLogger(__name__)


class Connection:
    """A control connection to `peer` (its rank). `send` may be called from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket, peer: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(PEER_SILENCE_S)
        self._socket = sock
        self._send_lock = threading.Lock()
        self.peer = peer

    def send(self, message: ControlMessage) -> None:
        """Send one message.

        Raises:
            RingError: the peer is gone, or has not read anything for PEER_SILENCE_S.
        """
        data = encode(message)
        try:
            with self._send_lock:
                self._socket.sendall(data)
        except OSError as error:
            raise RingError(f"rank {self.peer} is lost: {error}") from error

    def receive(self) -> ControlMessage:
        """The next message; blocks without using the processor.

        Raises:
            RingError: the peer closed the connection, sent nothing for PEER_SILENCE_S, or sent something not ours.
        """
        try:
            return _read_message(self._socket, MAX_CONTROL_BYTES)
        except TimeoutError as error:
            raise RingError(f"rank {self.peer} has been silent for {PEER_SILENCE_S:g} s") from error
        except (OSError, EOFError) as error:
            raise RingError(f"rank {self.peer} is lost: {error}") from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise RingError(f"rank {self.peer} sent something that is not ours: {error}") from error

    def close(self) -> None:
        """Hang up; the peer sees EOF."""
        self._socket.close()


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of this rank's ring address, and of that address only."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)


def connect_neighbours(
    listener: socket.socket, right_address: tuple[str, int], *, token: str, rank: int, size: int
) -> tuple[Connection, Connection]:
    """The connections (left, right): calls the right neighbour, accepts the left one, closes the listener.

    Raises:
        RingError: the right neighbour does not answer, or no caller showed the token, within 30 s.
    """
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    left_rank, right_rank = (rank - 1) % size, (rank + 1) % size
    with listener:
        try:
            right = Connection(socket.create_connection(right_address, timeout=_CONNECT_TIMEOUT_S), right_rank)
        except OSError as error:
            host, port = right_address
            raise RingError(f"rank {rank} cannot reach rank {right_rank} at {host} port {port}: {error}") from error
        try:
            right.send(Hello(token, rank))
            return Connection(_accept(listener, Hello(token, left_rank), deadline), left_rank), right
        except RingError:
            right.close()
            raise


def _accept(listener: socket.socket, expected: Hello, deadline: float) -> socket.socket:
    """The first caller that says `expected`; all others are hung up on."""
    while (left_s := deadline - time.monotonic()) > 0:
        listener.settimeout(left_s)
        try:
            caller, address = listener.accept()
        except TimeoutError:
            break
        try:
            hello = _read_message(caller, _HELLO_BYTES, deadline=time.monotonic() + _HELLO_TIMEOUT_S)
        except (OSError, EOFError, ValueError, msgspec.MsgspecError):
            hello = None
        if isinstance(hello, Hello) and hello.rank == expected.rank:
            if hmac.compare_digest(hello.token.encode(), expected.token.encode()):
                return caller
        logger.warning("hung up on %s: it is not rank %d of this ring", address[0], expected.rank)
        caller.close()
    raise RingError(f"rank {expected.rank} did not open its control connection within {_CONNECT_TIMEOUT_S:g} s")


def _read_message(sock: socket.socket, limit: int, deadline: float | None = None) -> ControlMessage:
    """One message; all of it by `deadline` (of `time.monotonic`), or each piece within the socket's own timeout."""
    (length,) = LENGTH.unpack(_read_exactly(sock, LENGTH.size, deadline))
    if length > limit:
        raise ValueError(f"a message of {length} bytes is over the limit of {limit}")
    return decode(_read_exactly(sock, length, deadline))


def _read_exactly(sock: socket.socket, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError("it closed the connection")
        view = view[count:]
    return data
