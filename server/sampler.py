"""Draws the next token of every row of a batch at once, each row by its own request's parameters. Last rank only.

The noise of a draw comes from a key made of (the request's seed, the token's position), so a request gets the same
noise alone, in a batch and after a restart. Order as in vLLM: bias and penalties on the logits, what grammar and
min_tokens forbid, temperature, min_p, top_k, top_p, then one Gumbel-max draw. What no row asks for is not computed. It
sees every token that runs, because the penalties count them and grammars follow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from server.protocol import SamplingParams

if TYPE_CHECKING:
    from server.grammar import Grammars

_MASK64 = (1 << 64) - 1
_GREEDY_BELOW = 1e-5  # a temperature: dividing float32 logits by less overflows
# (256, 8): what a byte of a bitmask adds to eight logits. Adding is far quicker than choosing with `where`.
_BANS_OF_OCTET = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)


@dataclass
class _Request:
    """What the sampler knows of one sequence. The counts are there only where a penalty wants them."""

    params: SamplingParams
    num_prompt_tokens: int
    stop_token_ids: list[int]
    num_seen: int = 0
    output_counts: np.ndarray | None = None  # (vocab_size,) int32
    is_seen: np.ndarray | None = None  # (vocab_size,) bool, prompt and output


@dataclass
class _BatchParams:
    """The rows' parameters as columns (rows, 1), for one composition of a batch."""

    greedy: bool
    temperature: mx.array
    is_greedy: mx.array
    min_p: mx.array | None
    top_k: mx.array | None
    top_p: mx.array | None
    bias: tuple[mx.array, mx.array, mx.array] | None  # rows, token ids, values
    has_grammar: bool
    requests: list[_Request] = field(default_factory=list)


class Sampler:
    """One for the whole rank; sequences are admitted and forgotten as frames say.

    Args:
        vocab_size: width of the logits.
        grammars: follows the requests' grammars; without it none can have one.
    """

    def __init__(self, vocab_size: int, grammars: Grammars | None = None) -> None:
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._requests: dict[int, _Request] = {}
        self._batches: dict[tuple[int, ...], _BatchParams] = {}  # by their rows; groups take turns

    def admit(
        self, sequence_id: int, params: SamplingParams, num_prompt_tokens: int, stop_token_ids: Sequence[int] = ()
    ) -> None:
        """Take a sequence on; its tokens follow through `observe`, from the first."""
        stop_token_ids = [token_id for token_id in stop_token_ids if 0 <= token_id < self._vocab_size]
        request = _Request(params, num_prompt_tokens, stop_token_ids)
        if params.presence_penalty or params.frequency_penalty:
            request.output_counts = np.zeros(self._vocab_size, np.int32)
        if params.repetition_penalty != 1.0:
            request.is_seen = np.zeros(self._vocab_size, np.bool_)
        self._requests[sequence_id] = request
        if self._grammars is not None:
            self._grammars.admit(sequence_id, params, num_prompt_tokens, stop_token_ids)

    def forget(self, sequence_id: int) -> None:
        """Drop a sequence."""
        self._requests.pop(sequence_id, None)
        if self._grammars is not None:
            self._grammars.forget(sequence_id)
        self._batches = {rows: batch for rows, batch in self._batches.items() if sequence_id not in rows}

    def observe(self, sequence_id: int, token_ids: list[int]) -> None:
        """Tokens that just ran, in order; they matter to penalties and grammar at the next draw."""
        request = self._requests[sequence_id]
        if self._grammars is not None and request.params.grammar is not None:
            self._grammars.observe(sequence_id, token_ids)
        if request.is_seen is not None:
            request.is_seen[token_ids] = True
        if request.output_counts is not None:
            num_prompt_left = max(0, request.num_prompt_tokens - request.num_seen)
            np.add.at(request.output_counts, token_ids[num_prompt_left:], 1)
        request.num_seen += len(token_ids)

    def wants_tokens(self, sequence_ids: list[int]) -> bool:
        """True if `observe` matters to any of these sequences."""
        return any(self._requests[sequence_id].params.needs_tokens for sequence_id in sequence_ids)

    def sample(self, logits: mx.array, sequence_ids: list[int], positions: list[int]) -> mx.array:
        """The next token of each row.

        Args:
            logits: (rows, vocab_size), any float dtype.
            sequence_ids: the rows' sequences.
            positions: absolute position of the token to draw, which keys its noise.

        Returns:
            (rows,) int32, lazy.
        """
        batch = self._batch_params(tuple(sequence_ids))
        logits = logits.astype(mx.float32)
        if batch.bias is not None:
            rows, token_ids, values = batch.bias
            logits = logits.at[rows, token_ids].add(values)
        logits = _penalized(logits, batch.requests)
        if batch.has_grammar:
            mx.async_eval(logits)  # while the grammars may still be at work
        if (bans := self._bans(batch, sequence_ids, positions)) is not None:
            logits = logits + mx.array(bans)
        greedy = mx.argmax(logits, axis=-1).astype(mx.int32)
        if batch.greedy:
            return greedy
        scaled = logits / batch.temperature
        if batch.min_p is not None:
            highest = scaled.max(axis=-1, keepdims=True)
            scaled = mx.where(scaled < highest + mx.log(batch.min_p), -mx.inf, scaled)
        if batch.top_k is not None or batch.top_p is not None:
            scaled = _truncated(scaled, batch.top_k, batch.top_p)
        keys = mx.array([_key(r.params.seed, p) for r, p in zip(batch.requests, positions, strict=True)], mx.uint32)
        noise = mx.vmap(lambda key: mx.random.gumbel((logits.shape[-1],), key=key))(keys)
        sampled = mx.argmax(scaled + noise, axis=-1).astype(mx.int32)
        return mx.where(batch.is_greedy, greedy, sampled)

    def drawn(self, sequence_ids: list[int], token_ids: mx.array) -> dict[int, str]:
        """What `sample` gave is evaluated now: the grammars go on from there. Which sequences cannot, and why."""
        if self._grammars is None or not self._batch_params(tuple(sequence_ids)).has_grammar:
            return {}
        self._grammars.drawn(sequence_ids, token_ids.tolist())  # type: ignore[arg-type]
        return self._grammars.failures(sequence_ids)

    def newly_ready(self, wait_s: float) -> list[int]:
        """Sequences whose grammars can be followed now, which this was not asked about yet; waits for one so long."""
        return [] if self._grammars is None else self._grammars.newly_ready(wait_s)

    def _bans(self, batch: _BatchParams, sequence_ids: list[int], positions: list[int]) -> np.ndarray | None:
        """What each row may not draw, (rows, vocab_size): -inf, and 0 for what it may; None: anything.

        Until min_tokens are drawn that is any of the ids that end the answer, unless the grammar wants just these.
        """
        masks = self._grammars.bitmasks(sequence_ids) if self._grammars is not None and batch.has_grammar else None
        too_short = [
            row
            for row, (request, position) in enumerate(zip(batch.requests, positions, strict=True))
            if position - request.num_prompt_tokens < request.params.min_tokens
        ]
        if masks is not None:
            octets = np.ascontiguousarray(masks).view(np.uint8)
            bans = np.take(_BANS_OF_OCTET, octets, axis=0).reshape(len(positions), -1)[:, : self._vocab_size]
        elif too_short:
            bans = np.zeros((len(positions), self._vocab_size), np.float32)
        else:
            return None
        for row in too_short:
            stops = batch.requests[row].stop_token_ids
            bans_of_stops = bans[row, stops]
            bans[row, stops] = -np.inf
            if np.isneginf(bans[row]).all():
                bans[row, stops] = bans_of_stops
        return bans

    def _batch_params(self, sequence_ids: tuple[int, ...]) -> _BatchParams:
        """Made anew only when a group's composition changes."""
        if (batch := self._batches.get(sequence_ids)) is None:
            batch = _columns([self._requests[sequence_id] for sequence_id in sequence_ids], self._vocab_size)
            # A sequence decodes in one group at a time: its earlier ones are of no more use.
            members = set(sequence_ids)
            self._batches = {rows: other for rows, other in self._batches.items() if members.isdisjoint(rows)}
            self._batches[sequence_ids] = batch
        return batch


def _columns(requests: list[_Request], vocab_size: int) -> _BatchParams:
    params = [request.params for request in requests]
    is_greedy = [p.temperature < _GREEDY_BELOW for p in params]
    sampled = [p for p, greedy in zip(params, is_greedy, strict=True) if not greedy]
    bias = [(row, token_id, value) for row, p in enumerate(params) for token_id, value in p.logit_bias.items()]
    return _BatchParams(
        greedy=not sampled,
        temperature=_column([1.0 if greedy else p.temperature for p, greedy in zip(params, is_greedy, strict=True)]),
        is_greedy=mx.array(is_greedy),
        min_p=_column([p.min_p for p in params]) if any(p.min_p > 0 for p in sampled) else None,
        top_k=mx.array([[p.top_k or vocab_size] for p in params]) if any(p.top_k > 0 for p in sampled) else None,
        top_p=_column([p.top_p for p in params]) if any(p.top_p < 1 for p in sampled) else None,
        bias=tuple(map(mx.array, zip(*bias, strict=True))) if bias else None,  # type: ignore[arg-type]
        has_grammar=any(p.grammar is not None for p in params),
        requests=requests,
    )


def _column(values: list[float]) -> mx.array:
    return mx.array(values, mx.float32)[:, None]


def _penalized(logits: mx.array, requests: list[_Request]) -> mx.array:
    """Repetition penalty over prompt and output (sign-aware, arXiv:1909.05858), the two others over the output."""
    if any(request.is_seen is not None for request in requests):
        none_seen = np.zeros(logits.shape[-1], np.bool_)
        seen = np.stack([none_seen if r.is_seen is None else r.is_seen for r in requests])
        penalty = _column([request.params.repetition_penalty for request in requests])
        is_seen = mx.array(seen)  # type: ignore[arg-type]
        logits = mx.where(is_seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    if any(request.output_counts is not None for request in requests):
        no_output = np.zeros(logits.shape[-1], np.int32)
        counts = mx.array(np.stack([no_output if r.output_counts is None else r.output_counts for r in requests]))
        frequency = _column([request.params.frequency_penalty for request in requests])
        presence = _column([request.params.presence_penalty for request in requests])
        logits = logits - counts * frequency - (counts > 0) * presence
    return logits


def _truncated(logits: mx.array, top_k: mx.array | None, top_p: mx.array | None) -> mx.array:
    """`logits` with everything below each row's top_k-th value, then outside its top_p mass, at -inf. One sort."""
    descending = -mx.sort(-logits, axis=-1)
    lowest = mx.full((logits.shape[0], 1), -mx.inf)
    if top_k is not None:
        lowest = mx.take_along_axis(descending, mx.minimum(top_k, logits.shape[-1]) - 1, axis=-1)
        descending = mx.where(descending < lowest, -mx.inf, descending)
    if top_p is not None:
        probabilities = mx.softmax(descending, axis=-1)
        mass_before = mx.cumsum(probabilities, axis=-1) - probabilities
        num_kept = mx.maximum((mass_before < top_p).sum(axis=-1, keepdims=True), 1)
        lowest = mx.maximum(lowest, mx.take_along_axis(descending, num_kept - 1, axis=-1))
    return mx.where(logits < lowest, -mx.inf, logits)


def _key(seed: int, position: int) -> list[int]:
    """Two 32-bit words from (seed, position), by splitmix64 (Steele et al. 2014): near seeds give unrelated keys."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return [z >> 32, z & 0xFFFFFFFF]
