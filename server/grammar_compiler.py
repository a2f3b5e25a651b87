"""Compiles grammars, several at once, in threads beside the one that computes: llguidance lets others run meanwhile.

A grammar is compiled once, however many sequences have it, and kept for the next ones. It must never stop a frame, so
nothing here is waited for: who asks gets a future. `server.grammar` is the only caller.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits

from server.vocabulary import Vocabulary, load_vocabulary

logger = logging.getLogger(__name__)

MAX_COMPILED = 8  # grammars that are kept for the next request that has them; each may have grown to 100 MB
_NUM_THREADS = 4  # so many slow ones hold up no other


class UnusableGrammar(Exception):
    """Says why no sequence can have this grammar."""


class GrammarCompiler:
    """Args: `is_wanted` says whether anybody still wants a grammar, asked when its turn comes, in a thread."""

    def __init__(
        self, model_path: Path, vocab_size: int, limits: LLParserLimits, is_wanted: Callable[[str], bool]
    ) -> None:
        self._model_path = model_path
        self._vocab_size = vocab_size
        self._limits = limits
        self._is_wanted = is_wanted
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "grammar-compiler")
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()  # of `_compiled`
        self._loading = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._unusable: str | None = None

    def warm(self, delay_s: float) -> None:
        """Load the vocabulary then, in the background, if no grammar has needed it before."""
        timer = threading.Timer(delay_s, lambda: self._threads.submit(self._load))
        timer.daemon = True
        timer.start()

    @property
    def vocabulary(self) -> Vocabulary:
        """That of the grammars which are compiled; there as soon as one is."""
        assert self._vocabulary is not None
        return self._vocabulary

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """A matcher that others get as well, so to be copied. The future may raise UnusableGrammar."""
        with self._lock:
            compiled = self._compiled.pop(grammar, None) or self._threads.submit(self._for_all, grammar)
            self._compiled[grammar] = compiled
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def compile_anew(self, grammar: str) -> Future[LLMatcher]:
        """A matcher of the caller's own: copies share a lexer, which learns as it goes until it has had enough."""
        with self._lock:
            self._compiled.pop(grammar, None)
        return self._threads.submit(self._matcher, grammar)

    # -- in the threads ----------------------------------------------------------------------------------------------

    def _for_all(self, grammar: str) -> LLMatcher:
        with self._lock:  # who asks for it now finds it, or compiles it again
            if not self._is_wanted(grammar):
                self._compiled.pop(grammar, None)
                raise UnusableGrammar("nobody waited for it")
        try:
            return self._matcher(grammar)
        except BaseException:  # a panic in Rust is no Exception
            with self._lock:
                self._compiled.pop(grammar, None)
            raise

    def _matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._load().tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UnusableGrammar(why(matcher))
        return matcher

    def _load(self) -> Vocabulary:
        with self._loading:
            if self._vocabulary is None and self._unusable is None:
                try:
                    self._vocabulary = load_vocabulary(self._model_path, self._vocab_size)
                except (OSError, ValueError, LookupError, TypeError) as error:
                    self._unusable = f"the model's tokenizer is of no use for it: {error}"
                    logger.warning("requests with a grammar will fail: %s", self._unusable)
        if self._vocabulary is None:
            raise UnusableGrammar(self._unusable or "")
        return self._vocabulary


def why(matcher: LLMatcher) -> str:
    """What is wrong with a matcher that has an error."""
    return matcher.get_error().partition("\n<")[0]
