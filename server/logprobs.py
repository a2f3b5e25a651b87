"""How likely tokens were by the model's own distribution: log_softmax of its raw logits, in float32. Last rank only.

It scores the tokens drawn for requests that want that, and the prompts of those that want that. A token of a prompt is
scored in the frame that runs it, by the logits of the one before, so the last row of a chunk's logits is kept until
the next. A frame of which nobody wants anything costs nothing. `Stage` is its only caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from server.frame import Frame, Row
from server.protocol import SamplingParams

_SLICE_TOKENS = 64  # of a prompt, whose logits are in float32 at once


@dataclass
class _Request:
    """A sequence that wants logprobs. `next_logits` (1, vocab_size) predict the next token of its prompt."""

    num_prompt_tokens: int
    num_top: int | None
    num_prompt_top: int | None
    next_logits: mx.array | None = None


@dataclass(frozen=True)
class _Piece:
    """`token_ids` (tokens,) and the `logits` (tokens, vocab_size) that predicted them; lazy."""

    logits: mx.array
    token_ids: mx.array
    num_top: int


class Logprobs:
    """One for the whole rank; sequences are admitted and forgotten as frames say."""

    def __init__(self) -> None:
        self._requests: dict[int, _Request] = {}

    def admit(self, sequence_id: int, params: SamplingParams, num_prompt_tokens: int) -> None:
        """Take a sequence on, if it wants any."""
        if params.logprobs is not None or params.prompt_logprobs is not None:
            self._requests[sequence_id] = _Request(num_prompt_tokens, params.logprobs, params.prompt_logprobs)

    def forget(self, sequence_id: int) -> None:
        """Drop a sequence."""
        self._requests.pop(sequence_id, None)

    def of_frame(self, frame: Frame, token_ids: mx.array, logits: mx.array, drawn: mx.array | None) -> list[mx.array]:
        """The tensors of logprobs that `ResultHeader` tells of, none where nobody wants them.

        Args:
            frame: a step, of which
            token_ids: (rows, tokens) ran,
            logits: (rows, tokens, vocab_size) came out, in any float dtype, and
            drawn: (rows,) were drawn, None for a prefill frame.
        """
        wanting = [
            (index, row, self._requests[row.sequence_id])
            for index, row in enumerate(frame.rows)
            if row.sequence_id in self._requests
        ]
        if not wanting:
            return []
        pieces: list[_Piece] = []
        for index, row, request in wanting:
            if request.num_prompt_top is not None:
                pieces += _pieces_of_prompt(request, row, request.num_prompt_top, token_ids[index], logits[index])
        tops = {index: request.num_top for index, _, request in wanting if request.num_top is not None}
        if drawn is not None and tops:
            rows = mx.array(list(tops))
            pieces.append(_Piece(logits[rows, -1], drawn[rows], max(tops.values())))
        num_top = max((piece.num_top for piece in pieces), default=0)
        scored = [_scored(piece, num_top) for piece in pieces]
        return [mx.concatenate(list(parts)) for parts in zip(*scored, strict=True)]


def _pieces_of_prompt(request: _Request, row: Row, num_top: int, token_ids: mx.array, logits: mx.array) -> list[_Piece]:
    """The tokens of its prompt among the `token_ids` that a row runs; keeps of `logits` what the next one needs."""
    first, indexes = row.length - row.num_tokens, row.prompt_indexes(request.num_prompt_tokens)
    pieces = []
    if first in indexes:
        assert request.next_logits is not None, "a prompt with logprobs is computed from its first token"
        pieces.append(_Piece(request.next_logits, token_ids[:1], num_top))
    for start in range(1, indexes.stop - first, _SLICE_TOKENS):
        end = min(start + _SLICE_TOKENS, indexes.stop - first)
        pieces.append(_Piece(logits[start - 1 : end - 1], token_ids[start:end], num_top))
    request.next_logits = None
    if row.length < request.num_prompt_tokens:
        # `take` copies; a slice would keep the logits of the whole chunk.
        request.next_logits = mx.take(logits, mx.array([row.num_tokens - 1]), axis=0)
        mx.eval(request.next_logits)
    return pieces


def _scored(piece: _Piece, num_top: int) -> list[mx.array]:
    """Logprobs (tokens,), and with `num_top` the likeliest ids and their logprobs, (tokens, num_top), most likely
    first. Evaluated, so that one piece is in memory at a time.
    """
    logits = piece.logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    scored = [(mx.take_along_axis(logits, piece.token_ids[:, None], axis=-1) - total)[:, 0]]
    if num_top:
        lowest = max(0, logits.shape[-1] - num_top)
        ids = mx.argpartition(logits, lowest, axis=-1)[:, lowest:]
        ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1), axis=-1)
        scored += [ids.astype(mx.int32), mx.take_along_axis(logits, ids, axis=-1) - total]
    mx.eval(scored)
    return scored
