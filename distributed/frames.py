"""What travels between neighbouring ranks on the control connections: small typed messages, length-prefixed
MessagePack.

An `Envelope` announces a frame: its header (opaque here, `server.frame` gives it meaning) and the tensors that follow
on MLX's ring. `Credit` flows back when the receiver has a free slot. `Heartbeat` and `Lap` serve liveness and
start-up, `LastWords` and `DumpStacks` the search for what went wrong. Nothing here touches a socket or an array.
"""

from __future__ import annotations

import struct

import msgspec

MAX_CONTROL_BYTES = 16 * 1024 * 1024  # of one message; a frame of 256 rows with its operations is some tens of KiB
LENGTH = struct.Struct(">I")


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """Shape and dtype name ("float32", "bfloat16", …) of a tensor on its way."""

    shape: tuple[int, ...]
    dtype: str


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message of a control connection: proof that the caller is the left neighbour of this run's ring."""

    token: str
    rank: int


class Envelope(msgspec.Struct, tag="frame", frozen=True):
    """A frame's header, and the tensors that now follow on the ring."""

    header: bytes
    tensors: list[TensorSpec]


class Credit(msgspec.Struct, tag="credit", frozen=True):
    """The receiver took `count` frames out of its inbox: so many more may be sent."""

    count: int


class Heartbeat(msgspec.Struct, tag="heartbeat", frozen=True):
    """Sent each second both ways. Rightwards it collects every rank's report on its way to rank 0.

    A sender that is silent for longer than `silence_s` from now on is lost.
    """

    silence_s: float
    reports: list[bytes] = []


class Lap(msgspec.Struct, tag="lap", frozen=True):
    """Start-up records on their way round the ring; `records[i]` is rank i's."""

    records: list[bytes]
    complete: bool


class LastWords(msgspec.Struct, tag="last words", frozen=True):
    """Sent both ways by a rank that dies, best effort. Who hears it dies of it, and says the same: so it goes round.

    `reason` names the rank that it began with. `permanent`: starting the ring again cannot help. `out_of_memory`: that
    rank could not get memory that it asked for.
    """

    reason: str
    permanent: bool = False
    out_of_memory: bool = False


class DumpStacks(msgspec.Struct, tag="dump stacks", frozen=True):
    """Every rank is to log what its threads are doing, and to pass this on; rank 0 sends it both ways.

    So a rank whose receiver is stuck is reached as well. `number` tells a second request from the same one once more.
    """

    number: int
    reason: str


class Goodbye(msgspec.Struct, tag="goodbye", frozen=True):
    """The ring ends in order: each rank passes it on and exits."""


ControlMessage = Hello | Envelope | Credit | Heartbeat | Lap | LastWords | DumpStacks | Goodbye

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ControlMessage)


def encode(message: ControlMessage) -> bytes:
    """The bytes of one message, length included."""
    body = _encoder.encode(message)
    if len(body) > MAX_CONTROL_BYTES:
        raise ValueError(f"a control message of {len(body)} bytes is over the limit of {MAX_CONTROL_BYTES}")
    return LENGTH.pack(len(body)) + body


def decode(body: bytes | bytearray) -> ControlMessage:
    """A message from its bytes, length stripped.

    Raises:
        msgspec.MsgspecError: the bytes are not one of our messages.
    """
    return _decoder.decode(body)
