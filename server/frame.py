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
    """A new sequence: gets caches of its own to be prefilled into, empty ones or a prefix that is kept.

    `num_cached_tokens` of the entry `entry_id` are where it starts. `cached_token_ids` are those tokens, for the
    sampler; given only where a penalty or the grammar of the request wants them. `stop_token_ids` end the answer; given
    only where min_tokens or a grammar want them.
    """

    sequence_id: int
    num_prompt_tokens: int
    sampling: SamplingParams
    entry_id: int | None = None
    num_cached_tokens: int = 0
    cached_token_ids: list[int] = []
    takes_entry: bool = False  # the entry goes with it: there is no room for both
    stop_token_ids: list[int] = []


class Join(msgspec.Struct, tag="join", frozen=True, array_like=True):
    """Sequences that are in no group become the next rows of one, which is made if there is none."""

    group_id: int
    sequence_ids: list[int]


class Detach(msgspec.Struct, tag="detach", frozen=True, array_like=True):
    """Rows of groups become sequences of their own again, to join another group. A group without rows is gone."""

    sequence_ids: list[int]


class Leave(msgspec.Struct, tag="leave", frozen=True, array_like=True):
    """These sequences end, wherever they are: rows of a group, or in none. A group without rows is gone."""

    sequence_ids: list[int]


class Keep(msgspec.Struct, tag="keep", frozen=True, array_like=True):
    """What a sequence's caches hold now, `length` tokens, is kept as the entry `entry_id` of the prefix cache.

    With `leaves` the sequence ends with it, as in `Leave`, layer by layer: there need not be room for both.
    """

    entry_id: int
    sequence_id: int
    length: int
    leaves: bool = False


class Drop(msgspec.Struct, tag="drop", frozen=True, array_like=True):
    """These entries of the prefix cache go."""

    entry_ids: list[int]


Operation = Admit | Join | Detach | Leave | Keep | Drop


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part in a step: `num_tokens` run, `length` is what its caches hold afterwards; ranks check it.

    The token ids' tensor is as wide as the longest row; the others are padded at their right.
    """

    sequence_id: int
    length: int
    num_tokens: int = 1

    def prompt_indexes(self, num_prompt_tokens: int) -> range:
        """Which tokens of its prompt it runs; the first of a prompt left out, which nothing predicts."""
        return range(max(1, self.length - self.num_tokens), min(self.length, num_prompt_tokens))


class Frame(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of one micro-batch. `rows` are in the order of the group's rows, or the sequences being prefilled.

    Prefill frames (`group_id` None) run the next part of one prompt, or of several short ones, and draw no token;
    decode frames run one token a row and draw the next. A frame without rows only changes caches, or asks whether a
    grammar is compiled, where nothing else is left to do.
    """

    frame_id: int
    operations: list[Operation] = []
    rows: list[Row] = []
    group_id: int | None = None
    after_idle: bool = False  # the ring had nothing to do before: what a rank waited for it is no bubble
    awaits_grammar: bool = False  # the last rank may wait a moment for one


class StepHeader(msgspec.Struct, tag="step", frozen=True):
    """Header of a frame on its way down the ring. Tensors: token ids (rows, tokens), then the message's arrays."""

    frame: Frame
    message: Any = None  # structure of the upstream stage's output, see distributed.shard
    stage_seconds: list[float] = []  # what each stage so far took for it


class ResultHeader(msgspec.Struct, tag="result", frozen=True):
    """Header of what the last rank returns to rank 0.

    Tensors: sampled ids (rows,), of a decode frame. Then logprobs (tokens,), where rows want some: first, row by row,
    those of the prompts' tokens that the frame ran, then, row by row, those of the tokens it drew. Then, where any of
    these rows wants to know the likeliest tokens, their ids and their logprobs, (tokens, the most that one wants).
    """

    frame_id: int
    stage_seconds: list[float] = []  # what each stage took for it, in rank order
    failures: dict[int, str] = {}  # sequences that cannot go on, and why
    ready: list[int] = []  # sequences with a grammar that could not be followed yet, and now can


Header = StepHeader | ResultHeader

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)


def encode_header(header: Header) -> bytes:
    """The bytes that travel as an envelope's header."""
    return _encoder.encode(header)


def decode_header(data: bytes) -> Header:
    """The header from an envelope's bytes."""
    return _decoder.decode(data)
