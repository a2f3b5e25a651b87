"""Waiting for the left neighbour where anybody may call: the first caller that says the right `Hello` is taken.

Callers are heard side by side, so strangers that say nothing, or all they know slowly, keep nobody waiting; each has
little time, few bytes and one place of a few. Nothing a stranger does is an error here. `distributed.control` calls it
once, while a rank starts.
"""

from __future__ import annotations

import hmac
import logging
import selectors
import socket
import time

import msgspec

from distributed.frames import LENGTH, Hello, decode

_HELLO_TIMEOUT_S = 2.0
_HELLO_BYTES = 4096
_MAX_CALLERS = 64  # heard at once; past that the one that has been here longest goes

logger = logging.getLogger(__name__)


class _Caller:
    """Somebody who has not said all of a `Hello` yet. Never reads further: what follows is the connection's."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.address = address
        self.hang_up_at = time.monotonic() + _HELLO_TIMEOUT_S
        self._data = b""
        self._size = LENGTH.size

    def listen(self) -> Hello | None:
        """What it said, None while there is more to come. EOFError, OSError or ValueError where it is none of ours."""
        piece = self.socket.recv(self._size - len(self._data))
        if not piece:
            raise EOFError
        self._data += piece
        if len(self._data) == LENGTH.size == self._size:
            self._size += LENGTH.unpack(self._data)[0]
            if self._size > _HELLO_BYTES:
                raise ValueError("too long for a Hello")
        if len(self._data) < self._size:
            return None
        message = decode(self._data[LENGTH.size :])
        if not isinstance(message, Hello):
            raise ValueError("not a Hello")
        return message


def accept_caller(listener: socket.socket, expected: Hello, deadline: float) -> socket.socket | None:
    """The first caller that says `expected`, None if none did by `deadline` (of `time.monotonic`)."""
    callers: dict[socket.socket, _Caller] = {}  # in the order they came
    with selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)

        def hang_up(caller: _Caller) -> None:
            logger.warning("hung up on %s: it is not rank %d of this ring", caller.address, expected.rank)
            selector.unregister(caller.socket)
            del callers[caller.socket]
            caller.socket.close()

        try:
            while (now := time.monotonic()) < deadline:
                for caller in [caller for caller in callers.values() if caller.hang_up_at <= now]:
                    hang_up(caller)
                until = min([deadline, *(caller.hang_up_at for caller in callers.values())])
                for key, _ in selector.select(until - now):
                    if key.fileobj is listener:
                        if len(callers) == _MAX_CALLERS:
                            hang_up(next(iter(callers.values())))
                        if caller := _accept(listener):
                            callers[caller.socket] = caller
                            selector.register(caller.socket, selectors.EVENT_READ, caller)
                    elif key.fileobj in callers and (verdict := _judge(key.data, expected)) is not None:
                        if verdict:
                            del callers[key.data.socket]
                            return key.data.socket
                        hang_up(key.data)
        finally:
            for caller in callers.values():
                caller.socket.close()
    return None


def _accept(listener: socket.socket) -> _Caller | None:
    try:
        sock, address = listener.accept()
    except OSError:  # it has left again
        return None
    return _Caller(sock, str(address[0]))


def _judge(caller: _Caller, expected: Hello) -> bool | None:
    """Whether it is the neighbour; None while that cannot be told."""
    try:
        hello = caller.listen()
    except BlockingIOError:
        return None
    except (OSError, EOFError, ValueError, msgspec.MsgspecError):
        return False
    if hello is None:
        return None
    return hello.rank == expected.rank and hmac.compare_digest(hello.token.encode(), expected.token.encode())
