"""Follows the grammars of the running requests: which tokens each may draw next. Last rank only.

A sequence with a grammar has a matcher of llguidance. The tokens drawn advance it, and its next mask is computed in a
thread while the frame travels; grammars are compiled in another thread, so that nobody's masks wait for it. It must
never fail the ring: what goes wrong with a grammar is that sequence's failure. The sampler calls it, from the compute
thread.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask_par

from server.protocol import SamplingParams
from server.vocabulary import Stops, Vocabulary, load_vocabulary

logger = logging.getLogger(__name__)

MAX_COMPILED = 8  # grammars that are kept for the next request that has them; each may have grown to 100 MB
_LONGEST_WAIT_S = 15.0  # of a step for its grammars; far from STEP_TIMEOUT, which would take the ring for wedged
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
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._limits = limits
        self._num_words = -(-vocab_size // 32)
        self._sequences: dict[int, _Sequence] = {}
        self._changed = threading.Condition()  # a sequence is ready, or has failed
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._matching = ThreadPoolExecutor(1, "grammar-masks")
        # Of the compiler's thread alone:
        self._vocabulary: Vocabulary | None = None
        self._unusable: str | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        # Of the masks' thread alone:
        self._executor: LLExecutor | None = None

    def warm(self, delay_s: float = 0.0) -> None:
        """Load the vocabulary then, in the background, if no request with a grammar has needed it before."""
        timer = threading.Timer(delay_s, lambda: self._compiler.submit(self._guard, self._load, []))
        timer.daemon = True
        timer.start()

    # -- the compute thread's calls ----------------------------------------------------------------------------------

    def admit(
        self, sequence_id: int, params: SamplingParams, num_prompt_tokens: int, stop_token_ids: Sequence[int]
    ) -> None:
        """Take a sequence on; its tokens follow through `observe`. Without a grammar nothing happens."""
        if params.grammar is None:
            return
        sequence = _Sequence(params.grammar, num_prompt_tokens, frozenset(stop_token_ids))
        self._sequences[sequence_id] = sequence
        self._compiler.submit(self._guard, self._compile, [sequence])

    def forget(self, sequence_id: int) -> None:
        """Drop a sequence, known or not."""
        if (sequence := self._sequences.pop(sequence_id, None)) is not None:
            sequence.failure = "forgotten"  # so that it is not compiled any more

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
        self._compiler.submit(self._guard, self._compile, [sequence])

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

    def _load(self, _: Sequence[_Sequence] = ()) -> None:
        if self._vocabulary is None and self._unusable is None:
            try:
                self._vocabulary = load_vocabulary(self._model_path, self._vocab_size)
            except (OSError, ValueError, LookupError, TypeError) as error:
                self._unusable = f"the model's tokenizer is of no use for it: {error}"
                logger.warning("requests with a grammar will fail: %s", self._unusable)

    def _compile(self, sequences: list[_Sequence]) -> None:
        """Give each its matcher."""
        self._load()
        for sequence in sequences:
            if sequence.failure is not None:
                continue
            if self._vocabulary is None:
                self._fail(sequence, self._unusable or "")
                continue
            matcher = self._matcher(sequence.grammar, self._vocabulary, is_private=sequence.is_private)
            if matcher.is_error():
                self._fail(sequence, _why(matcher))
                continue
            sequence.stops = self._vocabulary.stops(sequence.stop_ids)
            sequence.matcher = matcher
            self._follow([sequence])

    def _matcher(self, grammar: str, vocabulary: Vocabulary, *, is_private: bool) -> LLMatcher:
        """Copies share a lexer, which learns as it goes; a private one shares nothing."""
        if is_private:
            self._compiled.pop(grammar, None)  # it has failed one
            return LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=self._limits)
        if (matcher := self._compiled.pop(grammar, None)) is None:
            matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()

    def _advance(self, sequences: list[_Sequence]) -> None:
        """Bring matchers and masks up to date, where they are not yet and there is a matcher."""
        vocabulary = self._vocabulary
        behind = [(one, one.matcher) for one in sequences if one.matcher is not None and not one.is_ready]
        if not behind or vocabulary is None:
            return
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
                    self._give_up(sequence, _why(matcher))
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
        self._compiler.submit(self._guard, self._compile, [sequence])


def _why(matcher: LLMatcher) -> str:
    return matcher.get_error().partition("\n<")[0]
