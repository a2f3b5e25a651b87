"""Control connections on loopback: who is believed, and what ends one."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from distributed import callers, control
from distributed.control import Connection, connect_neighbours, listen
from distributed.errors import RingError
from distributed.frames import (
    LENGTH,
    MAX_CONTROL_BYTES,
    Credit,
    Envelope,
    Heartbeat,
    Hello,
    LastWords,
    TensorSpec,
    decode,
    encode,
)


@pytest.fixture
def connected() -> Iterator[tuple[Connection, socket.socket]]:
    with listen("127.0.0.1") as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours, theirs:
        yield Connection(ours, 3), theirs


def test_messages_arrive_as_they_were_sent(connected: tuple[Connection, socket.socket]):
    ours, theirs = connected
    envelope = Envelope(b"\x00header", [TensorSpec((2, 3), "bfloat16")])
    for message in (envelope, Credit(4), Heartbeat(5.0, [b"a", b"b"])):
        theirs.sendall(encode(message))
        assert ours.receive() == message


def test_a_message_that_comes_in_pieces_is_put_together(connected: tuple[Connection, socket.socket]):
    ours, theirs = connected
    data = encode(Heartbeat(5.0, [b"x" * 100]))
    sender = threading.Thread(target=lambda: [theirs.sendall(data[i : i + 7]) for i in range(0, len(data), 7)])
    sender.start()
    assert ours.receive() == Heartbeat(5.0, [b"x" * 100])
    sender.join()


def test_the_end_of_a_peer_is_an_error_that_names_it(connected: tuple[Connection, socket.socket]):
    ours, theirs = connected
    theirs.close()
    with pytest.raises(RingError, match="rank 3 is lost"):
        ours.receive()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_CONTROL_BYTES + 1),
        struct.pack(">I", 5) + b"\xc1\xc1\xc1\xc1\xc1",
        encode(Credit(4))[:4] + b"\x00" * 9,
    ],
)
def test_garbage_and_oversized_messages_are_errors(connected: tuple[Connection, socket.socket], data: bytes):
    ours, theirs = connected
    theirs.sendall(data + b"\x00" * 64)
    with pytest.raises(RingError, match="not ours"):
        ours.receive()


def test_a_peer_that_is_silent_for_longer_than_it_said_is_lost(connected: tuple[Connection, socket.socket]):
    ours, theirs = connected
    theirs.sendall(encode(Heartbeat(0.2)))
    assert ours.receive() == Heartbeat(0.2)
    with pytest.raises(RingError, match=r"rank 3 has been silent for 0\.2 s"):
        ours.receive()


def test_last_words_are_heard_before_the_end_and_never_waited_for(connected: tuple[Connection, socket.socket]):
    ours, theirs = connected
    ours.say_last(LastWords("rank 3 (here): out of memory"))
    ours.close()
    assert decode(theirs.recv(4096)[LENGTH.size :]) == LastWords("rank 3 (here): out of memory")
    ours.say_last(LastWords("to nobody"))


def test_strangers_who_say_nothing_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(callers, "_HELLO_TIMEOUT_S", 3600)
    monkeypatch.setattr(callers, "_MAX_CALLERS", 5)
    own = listen("127.0.0.1")
    strangers = [socket.create_connection(own.getsockname()) for _ in range(20)]
    neighbour = socket.create_connection(own.getsockname())
    data = encode(Hello("token", 1))
    neighbour.sendall(data[:9])
    sender = threading.Timer(0.1, neighbour.sendall, [data[9:] + b"what follows"])
    sender.start()
    with own:
        taken = callers.accept_caller(own, Hello("token", 1), time.monotonic() + 30)
    assert taken is not None
    taken.settimeout(5)
    assert taken.recv(100) == b"what follows"
    for sock in (*strangers, neighbour, taken):
        sock.close()


def test_only_the_neighbour_with_the_token_is_believed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(callers, "_HELLO_TIMEOUT_S", 0.2)
    own, right = listen("127.0.0.1"), listen("127.0.0.1")
    address = own.getsockname()
    strangers = [socket.create_connection(address) for _ in range(5)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(encode(Hello("wrong", 1)))
    strangers[2].sendall(encode(Hello("token", 7)))
    strangers[3].close()  # 4 says nothing
    neighbour = socket.create_connection(address)
    neighbour.sendall(encode(Hello("token", 1)) + encode(Credit(4)))
    with right:
        left, to_right = connect_neighbours(own, right.getsockname(), token="token", rank=0, size=2)
        assert left.peer == 1 and left.receive() == Credit(4)
        left.close()
        to_right.close()
    for sock in [*strangers, neighbour]:
        sock.close()


def test_a_neighbour_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control, "_CONNECT_TIMEOUT_S", 0.3)
    with listen("127.0.0.1") as right, pytest.raises(RingError, match="rank 2 did not open its control connection"):
        connect_neighbours(listen("127.0.0.1"), right.getsockname(), token="t", rank=0, size=3)


def test_a_right_neighbour_that_is_not_there_is_named():
    with listen("127.0.0.1") as gone:
        address = gone.getsockname()
    with pytest.raises(RingError, match=r"rank 0 cannot reach rank 1 at 127\.0\.0\.1 port"):
        connect_neighbours(listen("127.0.0.1"), address, token="t", rank=0, size=2)


def test_the_listener_is_on_the_ring_address_only():
    with listen("127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
