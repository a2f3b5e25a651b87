"""Control connections: one plain TCP connection to each neighbour, beside MLX's ring.

A rank blocks here for free, where a pending ring recv would spin a core, and learns the instant a neighbour dies
(EOF) or falls silent (no heartbeat). A connection is believed only after it has shown this run's token
(`distributed.callers`); it never carries pickles, and every message has a length limit. `Pipeline` owns the two
connections; nobody else reads or writes them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import msgspec

from distributed.callers import accept_caller
from distributed.errors import RingError
from distributed.frames import LENGTH, MAX_CONTROL_BYTES, ControlMessage, Heartbeat, Hello, decode, encode

HEARTBEAT_INTERVAL_S = 1.0
PEER_SILENCE_S = 5.0  # a power cut, a pulled cable and SIGSTOP send no EOF
# While a rank starts, imports and libraries that read files hold Python's lock, for seconds on a busy machine, and its
# heartbeat waits for them.
STARTING_SILENCE_S = 30.0
_CONNECT_TIMEOUT_S = 30.0
_LAST_WORDS_TIMEOUT_S = 0.5
_LAST_WORDS_TRAVEL_S = 0.3


class Connection:
    """A control connection to `peer` (its rank). `send` may be called from any thread, `receive` from one.

    How long the peer may be silent it says itself, in each heartbeat.
    """

    def __init__(self, sock: socket.socket, peer: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._send_lock = threading.Lock()
        self._bear_silence(STARTING_SILENCE_S)
        self.peer = peer

    def send(self, message: ControlMessage) -> None:
        """Send one message.

        Raises:
            RingError: the peer is gone, or has not read anything for as long as it may be silent.
        """
        data = encode(message)
        try:
            with self._send_lock:
                self._socket.sendall(data)
        except OSError as error:
            time.sleep(_LAST_WORDS_TRAVEL_S)  # it may have said why, and the thread that reads ends this process first
            raise RingError(f"rank {self.peer} is lost: {error}") from error

    def say_last(self, message: ControlMessage) -> None:
        """Send, if that can be done at once: the process ends."""
        if self._send_lock.acquire(timeout=_LAST_WORDS_TIMEOUT_S):
            with contextlib.suppress(OSError):
                self._socket.settimeout(_LAST_WORDS_TIMEOUT_S)
                self._socket.sendall(encode(message))

    def receive(self) -> ControlMessage:
        """The next message; blocks without using the processor.

        Raises:
            RingError: the peer closed the connection, was silent for too long, or sent something not ours.
        """
        try:
            message = _read_message(self._socket)
        except TimeoutError as error:
            raise RingError(f"rank {self.peer} has been silent for {self._silence_s:g} s") from error
        except (OSError, EOFError) as error:
            raise RingError(f"rank {self.peer} is lost: {error}") from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise RingError(f"rank {self.peer} sent something that is not ours: {error}") from error
        if isinstance(message, Heartbeat) and message.silence_s != self._silence_s:
            self._bear_silence(message.silence_s)
        return message

    def close(self) -> None:
        """Hang up; the peer sees EOF."""
        self._socket.close()

    def _bear_silence(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._socket.settimeout(silence_s)


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
            raise RingError(
                f"rank {rank} cannot reach rank {right_rank} at {host} port {port}: {error} (the system chose"
                " that port: does a firewall there let in the ring's ports alone?)"
            ) from error
        try:
            right.send(Hello(token, rank))
            caller = accept_caller(listener, Hello(token, left_rank), deadline)
            if caller is None:
                raise RingError(f"rank {left_rank} did not open its control connection within {_CONNECT_TIMEOUT_S:g} s")
            return Connection(caller, left_rank), right
        except RingError:
            right.close()
            raise


def _read_message(sock: socket.socket) -> ControlMessage:
    """One message; each piece within the socket's timeout."""
    (length,) = LENGTH.unpack(_read_exactly(sock, LENGTH.size))
    if length > MAX_CONTROL_BYTES:
        raise ValueError(f"a message of {length} bytes is over the limit of {MAX_CONTROL_BYTES}")
    return decode(_read_exactly(sock, length))


def _read_exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError("it closed the connection")
        view = view[count:]
    return data
