"""A frame: what rank 0 tells every rank to do next, and the only thing that changes a rank's caches.

Every rank sees the same frames in the same order and applies them alike, so all agree without asking each other. A
frame first changes caches (`operations`, in order), then runs its rows' tokens through the stage. The token ids
themselves travel beside it as a tensor on MLX's ring. Plain data: no mlx, no sockets.
"""

from __future__ import annotations

from typing import Any

import msgspec

from server.protocol import SamplingParams


class Admit(msgspec.Struct, tag="admit", frozen=True, array_like=True):
    """A new sequence: gets empty caches of its own to be prefilled into."""

    sequence_id: int
    num_prompt_tokens: int
    sampling: SamplingParams


class Join(msgspec.Struct, tag="join", frozen=True, array_like=True):
    """Prefilled sequences become the next rows of a group, which is made if there is none."""

    group_id: int
    sequence_ids: list[int]


class Leave(msgspec.Struct, tag="leave", frozen=True, array_like=True):
    """These sequences end, wherever they are: rows of a group, or not joined yet. A group without rows is gone."""

    sequence_ids: list[int]


Operation = Admit | Join | Leave


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part in a step. `length` is what its caches hold after the step, in tokens: ranks check it."""

    sequence_id: int
    length: int


class Frame(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of one micro-batch. `rows` are in the order of the group's rows (or the one sequence being prefilled).

    Prefill frames (`group_id` None) run part of one prompt and give no token; decode frames run one token a row and
    give the next. A frame without rows only changes caches.
    """

    frame_id: int
    operations: list[Operation] = []
    rows: list[Row] = []
    group_id: int | None = None


class StepHeader(msgspec.Struct, tag="step", frozen=True):
    """Header of a frame on its way down the ring. Tensors: token ids (rows, tokens), then the message's arrays."""

    frame: Frame
    message: Any = None  # structure of the upstream stage's output, see distributed.shard


class ResultHeader(msgspec.Struct, tag="result", frozen=True):
    """Header of what the last rank returns to rank 0. Tensor: sampled ids (rows,), where the frame sampled."""

    frame_id: int


Header = StepHeader | ResultHeader

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)


def encode_header(header: Header) -> bytes:
    """The bytes that travel as an envelope's header."""
    return _encoder.encode(header)


def decode_header(data: bytes) -> Header:
    """The header from an envelope's bytes."""
    return _decoder.decode(data)
