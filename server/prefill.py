"""Which part of whose prompt is computed next: the queue of sequences being prefilled, in chunks and packs.

Oldest first, but a prompt that fits into one frame goes between the chunks of a longer one, every other time: nobody
waits for the whole of a long prompt, and a long prompt gets at least half of the prefill. Short prompts share a frame
where padding them costs less than a pass over the weights. Pure; the scheduler asks it and makes the frames.
"""

from __future__ import annotations

import itertools
from bisect import insort
from typing import NamedTuple

from server import chunking
from server.sequence import Sequence
from server.step_times import ChunkTimes, StepTimes


class Part(NamedTuple):
    """The next `num_tokens` of a sequence's prompt."""

    sequence: Sequence
    num_tokens: int


class LapLimits(NamedTuple):
    """Tokens of prefill between two steps of the running sequences."""

    chunk: int  # of one frame at most
    lap: int  # of all frames after which no further one is begun


class PrefillQueue:
    """Admitted sequences whose prompts are not in the caches yet.

    Args:
        num_stages: of the ring.
        chunk_tokens: PREFILL_CHUNK_TOKENS, None: by measured times.
        can_pack: whether the caches can run prompts of different lengths side by side.
    """

    def __init__(self, num_stages: int, chunk_tokens: int | None, *, can_pack: bool) -> None:
        self.times = ChunkTimes()
        self._num_stages = num_stages
        self._chunk_tokens = chunk_tokens
        self._can_pack = can_pack
        self._queue: list[Sequence] = []
        self._last_was_partial = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, by priority and age; it may be there already."""
        if sequence not in self._queue:
            insort(self._queue, sequence, key=lambda other: other.order)

    def discard(self, sequence: Sequence) -> None:
        if sequence in self._queue:
            self._queue.remove(sequence)

    def reading(self) -> list[Sequence]:
        """Sequences whose prompts are being computed or are next."""
        return [sequence for sequence in self._queue if sequence.can_prefill]

    def limits(self, num_rows: int, num_groups: int, steps: StepTimes) -> LapLimits:
        """For one lap, beside `num_rows` streams in `num_groups` groups."""
        line = self.times.line
        if self._chunk_tokens is not None:
            return LapLimits(self._chunk_tokens, self._chunk_tokens)
        if not num_rows:
            return LapLimits(chunking.MAX_CHUNK_TOKENS, chunking.tokens_before_first_step(line))
        if line is None:
            return LapLimits(chunking.UNMEASURED_CHUNK_TOKENS, chunking.UNMEASURED_CHUNK_TOKENS)
        tokens = chunking.chunk_tokens_beside_streams(num_rows, num_groups, self._num_stages, steps, line)
        return LapLimits(tokens, tokens)

    def num_tokens_before(self, reader: Sequence, length: int) -> int:
        """Tokens to compute until the caches of `reader`, which is in the queue, hold `length` of its own."""
        ahead = itertools.takewhile(lambda other: other is not reader, self.reading())
        return sum(other.num_tokens_to_prefill for other in ahead) + length - reader.num_computed_tokens

    def next_parts(self, chunk_limit: int, tokens_left: int | None) -> list[Part]:
        """What the next prefill frame runs; nothing where the lap has too little left for it.

        Args:
            chunk_limit: tokens of one frame at most.
            tokens_left: of this lap, None for its first frame, which always runs. A chunk is not cut to it: a pass over
                all weights would be spent on a few tokens.
        """
        reading = self.reading()
        if not reading:
            return []
        head = Part(reading[0], self._chunk_of(reading[0], chunk_limit))
        if self._last_was_partial and _is_partial(head):
            parts = (Part(sequence, self._chunk_of(sequence, chunk_limit)) for sequence in reading)
            head = next((part for part in parts if not _is_partial(part)), head)
        if tokens_left is not None and head.num_tokens > tokens_left:
            return []
        self._last_was_partial = _is_partial(head)
        most = chunk_limit if tokens_left is None else min(chunk_limit, tokens_left)
        return [head] if self._last_was_partial else self._packed(head, reading, most)

    def computed(self, part: Part) -> None:
        """A part is on its way: a sequence whose prompt is done leaves the queue."""
        part.sequence.num_computed_tokens += part.num_tokens
        if not part.sequence.num_tokens_to_prefill:
            self._queue.remove(part.sequence)

    def _chunk_of(self, sequence: Sequence, chunk_limit: int) -> int:
        """The sequence's next chunk, which ends at a checkpoint if there is one on the way."""
        chunk = _most_tokens([sequence], chunk_limit)
        if self._chunk_tokens is None:
            if self.times.line is not None:
                num_tokens = len(sequence.token_ids) - 1
                chunk = min(chunk, chunking.chunk_tokens_alone(num_tokens, self._num_stages, self.times.line))
            elif self._num_stages > 1:
                chunk = min(chunk, chunking.UNMEASURED_CHUNK_TOKENS)
        num_tokens = sequence.num_tokens_to_prefill
        ahead = [length - sequence.num_computed_tokens for length in sequence.checkpoints]
        num_tokens = min([num_tokens, *(tokens for tokens in ahead if tokens > 0)])
        return min(num_tokens, chunk) if self._chunk_tokens else chunking.in_even_chunks(num_tokens, chunk)

    def _packed(self, head: Part, reading: list[Sequence], most_tokens: int) -> list[Part]:
        """`head` and others that fit beside it whole. The rectangle that holds them for a moment stays small."""
        parts = [head]
        if not self._can_pack or self.times.line is None:
            return parts
        most_padding = self.times.line.fixed / self.times.line.per_token
        for sequence in reading:
            part = Part(sequence, self._chunk_of(sequence, most_tokens))
            if sequence is head.sequence or _is_partial(part):
                continue
            candidate = [*parts, part]
            width = max(num_tokens for _, num_tokens in candidate)
            longest = max(other.num_computed_tokens for other, _ in candidate) + width
            padding = max(width - num_tokens for _, num_tokens in candidate)
            if (
                padding <= most_padding
                and len(candidate) * width <= _most_tokens([other for other, _ in candidate], most_tokens)
                and len(candidate) * longest <= chunking.MAX_CHUNK_TOKENS
            ):
                parts = candidate
        return parts


def _is_partial(part: Part) -> bool:
    return part.num_tokens < part.sequence.num_tokens_to_prefill


def _most_tokens(sequences: list[Sequence], most_tokens: int) -> int:
    """Of a frame with these rows. All its tokens get logits as soon as one row wants those of its prompt."""
    wants_logits = any(sequence.wants_prompt_logprobs for sequence in sequences)
    return min(most_tokens, chunking.LOGPROBS_CHUNK_TOKENS) if wants_logits else most_tokens
