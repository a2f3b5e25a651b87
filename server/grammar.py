"""Follows the grammars of the running requests: which tokens each may draw next. Last rank only.

A sequence with a grammar has a matcher of llguidance. The tokens drawn advance it, and its next mask is computed in a
thread while the frame travels. Until its grammar is compiled a sequence is not ready, and rank 0 lets it join no group.
It must never fail the ring: what goes wrong with a grammar is that sequence's failure. The sampler calls it, from the
compute thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask_par

from server.grammar_compiler import GrammarCompiler, UnusableGrammar, why
from server.protocol import SamplingParams
from server.vocabulary import Stops

logger = logging.getLogger(__name__)

_LONGEST_WAIT_S = 15.0  # of a step for its grammars; far from STEP_TIMEOUT, which would take the ring for wedged
_LONGEST_COMPILING_S = 120.0  # from admission: nobody waits for it but its own request, but that not for ever
# A mask takes 10 ms of a core at most, a lexer's states take 100 MB. An object with hundreds of optional properties
# makes long rows. What compiling takes is bounded by the api, before a grammar comes here.
LIMITS = LLParserLimits(step_lexer_fuel=150_000, max_lexer_states=60_000, max_items_in_row=10_000, verbose_errors=False)
_MESSAGE_LENGTH = 300


@dataclass(eq=False)
class _Sequence:
    """One request's way through its grammar. The background threads write the lower half."""

    grammar: str
    num_prompt_tokens: int
    stop_ids: frozenset[int]
    num_seen: int = 0  # tokens that ran, the prompt's too
    output: list[int] = field(default_factory=list)  # drawn, in this life or an earlier one
    admitted_at: float = field(default_factory=time.monotonic)

    matcher: LLMatcher | None = None
    is_private: bool = False  # its matcher shares nothing with those of other sequences
    stops: Stops = field(init=False)  # there when the matcher is
    num_taken: int = 0  # of `output`, by the matcher
    mask: np.ndarray | None = None
    num_masked: int = -1  # tokens of `output` that the mask follows
    failure: str | None = None

    @property
    def is_ready(self) -> bool:
        return self.failure is not None or self.num_masked == len(self.output)


class Grammars:
    """One for the whole rank.

    Args:
        model_path: folder of the model, for its tokenizer.
        vocab_size: width of the logits.
        limits: what a sequence's matcher may take.
    """

    def __init__(self, model_path: Path, vocab_size: int, limits: LLParserLimits = LIMITS) -> None:
        self._num_words = -(-vocab_size // 32)
        self._sequences: dict[int, _Sequence] = {}
        self._not_ready: dict[int, _Sequence] = {}  # those of which rank 0 has not heard yet that they are
        self._changed = threading.Condition()  # a sequence is ready, or has failed
        self._compiler = GrammarCompiler(model_path, vocab_size, limits, self._is_wanted)
        self._matching = ThreadPoolExecutor(1, "grammar-masks")
        self._executor: LLExecutor | None = None  # of the masks' thread alone

    def warm(self, delay_s: float = 0.0) -> None:
        """Load the vocabulary then, in the background, if no request with a grammar has needed it before."""
        self._compiler.warm(delay_s)

    # -- the compute thread's calls ----------------------------------------------------------------------------------

    def admit(
        self, sequence_id: int, params: SamplingParams, num_prompt_tokens: int, stop_token_ids: Sequence[int]
    ) -> None:
        """Take a sequence on; its tokens follow through `observe`. Without a grammar nothing happens."""
        if params.grammar is None:
            return
        sequence = _Sequence(params.grammar, num_prompt_tokens, frozenset(stop_token_ids))
        self._sequences[sequence_id] = self._not_ready[sequence_id] = sequence
        self._compile(sequence)

    def forget(self, sequence_id: int) -> None:
        """Drop a sequence, known or not."""
        self._not_ready.pop(sequence_id, None)
        if (sequence := self._sequences.pop(sequence_id, None)) is not None:
            sequence.failure = "forgotten"  # so that its grammar is not compiled any more

    def newly_ready(self, wait_s: float = 0.0) -> list[int]:
        """The admitted sequences that have their first mask since this was asked last, or have failed.

        Waits for one of them at most `wait_s`, where there are any to wait for.
        """
        if not self._not_ready:
            return []
        with self._changed:
            self._changed.wait_for(lambda: any(one.is_ready for one in self._not_ready.values()), wait_s)
        for sequence in self._not_ready.values():
            if not sequence.is_ready and time.monotonic() - sequence.admitted_at > _LONGEST_COMPILING_S:
                self._fail(sequence, f"it is not compiled after {_LONGEST_COMPILING_S:.0f} s")
        ready = [sequence_id for sequence_id, sequence in self._not_ready.items() if sequence.is_ready]
        for sequence_id in ready:
            del self._not_ready[sequence_id]
        return ready

    def observe(self, sequence_id: int, token_ids: Sequence[int]) -> None:
        """Tokens that ran, in order from the first. The prompt's, and those that `drawn` took, say nothing new."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return
        first = sequence.num_seen - sequence.num_prompt_tokens  # index in the output of the first of these tokens
        ran = list(token_ids[max(0, -first) :])
        first = max(0, first)
        sequence.num_seen += len(token_ids)
        known = sequence.output[first : first + len(ran)]
        if known != ran[: len(known)]:
            self._correct(sequence_id, sequence, [*sequence.output[:first], *ran])
        elif new := ran[len(known) :]:
            sequence.output += new
            self._follow([sequence])

    def _correct(self, sequence_id: int, wrong: _Sequence, output: list[int]) -> None:
        """A preempted sequence drew a token twice, near a tie, and rank 0 has kept the other one: begin anew."""
        wrong.failure = "replaced"
        sequence = _Sequence(wrong.grammar, wrong.num_prompt_tokens, wrong.stop_ids, wrong.num_seen, output)
        self._sequences[sequence_id] = sequence
        if sequence_id in self._not_ready:
            self._not_ready[sequence_id] = sequence
        self._compile(sequence)

    def bitmasks(self, sequence_ids: Sequence[int]) -> np.ndarray | None:
        """What each sequence may draw next: a bit a token, in words of 32; None where no sequence has a grammar.

        Waits for what is still being computed, not for long: all others wait as well. All ones for sequences without
        a grammar, or whose grammar failed.
        """
        sequences = [self._sequences.get(sequence_id) for sequence_id in sequence_ids]
        if not any(sequences):
            return None
        with self._changed:
            self._changed.wait_for(lambda: all(one.is_ready for one in sequences if one), _LONGEST_WAIT_S)
            for sequence in sequences:
                if sequence is not None and not sequence.is_ready:
                    self._fail(sequence, f"it takes longer than {_LONGEST_WAIT_S:.0f} s")
        masks = np.full((len(sequences), self._num_words), -1, np.int32)
        for row, sequence in zip(masks, sequences, strict=True):
            if sequence is not None and sequence.failure is None and sequence.mask is not None:
                row[:] = sequence.mask.view(np.int32)
        return masks

    def drawn(self, sequence_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """The tokens that were just drawn; the next masks are computed from here on."""
        followed = []
        for sequence_id, token_id in zip(sequence_ids, token_ids, strict=True):
            if (sequence := self._sequences.get(sequence_id)) is not None:
                sequence.output.append(token_id)
                followed.append(sequence)
        self._follow(followed)

    def failures(self, sequence_ids: Sequence[int]) -> dict[int, str]:
        """Why these sequences' grammars cannot be followed any further, for those where it is so."""
        sequences = {sequence_id: self._sequences.get(sequence_id) for sequence_id in sequence_ids}
        return {
            sequence_id: sequence.failure
            for sequence_id, sequence in sequences.items()
            if sequence is not None and sequence.failure is not None
        }

    # -- in the background -------------------------------------------------------------------------------------------

    def _follow(self, sequences: list[_Sequence]) -> None:
        if sequences:
            self._matching.submit(self._guard, self._advance, sequences)

    def _guard(self, work: Callable[[list[_Sequence]], None], sequences: list[_Sequence]) -> None:
        """The outermost frame of background work: what it raises fails these sequences, or they would wait for ever."""
        try:
            work(sequences)
        except BaseException as error:  # a panic in Rust is no Exception
            logger.exception("a grammar could not be followed")
            for sequence in sequences:
                self._fail(sequence, f"{type(error).__name__}: {error}")

    def _fail(self, sequence: _Sequence, why: str) -> None:
        with self._changed:
            sequence.failure = f"The grammar of this request cannot be followed: {why[:_MESSAGE_LENGTH]}"
            self._changed.notify_all()

    def _is_wanted(self, grammar: str) -> bool:
        return any(one.grammar == grammar and one.failure is None for one in list(self._sequences.values()))

    def _compile(self, sequence: _Sequence) -> None:
        """Have it get its matcher."""
        compile = self._compiler.compile_anew if sequence.is_private else self._compiler.compile

        def begin(compiled: Future[LLMatcher]) -> None:
            self._guard(lambda _: self._begin(sequence, compiled), [sequence])

        compile(sequence.grammar).add_done_callback(begin)

    def _begin(self, sequence: _Sequence, compiled: Future[LLMatcher]) -> None:
        if sequence.failure is not None:
            return
        try:
            matcher = compiled.result()
        except UnusableGrammar as error:
            self._fail(sequence, str(error))
            return
        sequence.stops = self._compiler.vocabulary.stops(sequence.stop_ids)
        sequence.matcher = matcher if sequence.is_private else matcher.deep_copy()
        self._follow([sequence])

    def _advance(self, sequences: list[_Sequence]) -> None:
        """Bring matchers and masks up to date, where they are not yet and there is a matcher."""
        behind = [(one, one.matcher) for one in sequences if one.matcher is not None and not one.is_ready]
        if not behind:
            return
        vocabulary = self._compiler.vocabulary
        for sequence, matcher in behind:
            new = sequence.output[sequence.num_taken :]
            sequence.num_taken += len(new)
            matcher.consume_tokens([token_id for token_id in new if token_id not in sequence.stop_ids])
        allowed = np.zeros((len(behind), vocabulary.num_words), np.int32)
        if self._executor is None:
            self._executor = LLExecutor()
        matchers = [(matcher, row) for row, (_, matcher) in enumerate(behind)]
        fill_next_token_bitmask_par(self._executor, matchers, allowed)
        with self._changed:
            for (sequence, matcher), row in zip(behind, allowed.view(np.uint32), strict=True):
                if matcher.is_error():
                    self._give_up(sequence, why(matcher))
                elif (mask := vocabulary.mask(row, sequence.stops)).any():
                    sequence.mask, sequence.num_masked = mask, sequence.num_taken
                else:
                    self._fail(sequence, "no token of the model goes on from here")
            self._changed.notify_all()

    def _give_up(self, sequence: _Sequence, why: str) -> None:
        """A limit may have been used up by others that share its lexer: it gets a second try with one of its own."""
        if sequence.failure is not None:
            return
        if sequence.is_private:
            self._fail(sequence, why)
            return
        sequence.is_private, sequence.matcher, sequence.num_taken = True, None, 0
        self._compile(sequence)
