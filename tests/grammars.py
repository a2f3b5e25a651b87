"""Random answers that keep to a grammar, drawn as the last rank draws them, and texts held against a grammar."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer

from server.grammar import Grammars
from server.protocol import SamplingParams

PROMPT = [1, 2, 3]


class Answer:
    """One sequence of `grammars`. `draw` takes any allowed token, each as likely as another."""

    def __init__(self, grammars: Grammars, sequence_id: int, grammar: str, stop_ids: list[int], *, seed: int = 0):
        self.grammars = grammars
        self.sequence_id = sequence_id
        self.stop_ids = stop_ids
        self.token_ids: list[int] = []
        self._rng = random.Random(seed)
        grammars.admit(sequence_id, SamplingParams(grammar=grammar), len(PROMPT), stop_ids)

    def read_prompt(self) -> None:
        self.grammars.observe(self.sequence_id, PROMPT)

    def mask(self) -> np.ndarray:
        masks = self.grammars.bitmasks([self.sequence_id])
        assert masks is not None
        return masks[0]

    def allowed(self) -> list[int]:
        bits = np.unpackbits(np.ascontiguousarray(self.mask()).view(np.uint8), bitorder="little")
        return np.flatnonzero(bits).tolist()

    @property
    def failure(self) -> str | None:
        return self.grammars.failures([self.sequence_id]).get(self.sequence_id)

    def draw(self) -> int:
        return self.take(self._rng.choice(self.allowed()))

    def take(self, token_id: int) -> int:
        self.token_ids.append(token_id)
        self.grammars.drawn([self.sequence_id], [token_id])
        self.grammars.observe(self.sequence_id, [token_id])  # it runs in the next step
        return token_id

    def run(self, max_tokens: int = 1000) -> list[int]:
        """To its end: the ids without the one that ended it. AssertionError where it does not end or fails."""
        for _ in range(max_tokens):
            assert self.failure is None, self.failure
            if self.draw() in self.stop_ids:
                return self.token_ids[:-1]
        raise AssertionError(f"no end within {max_tokens} tokens")


class _Bytes:
    """A token for each byte, then `special` ones; as llguidance's TokenizerWrapper wants it."""

    def __init__(self, special: list[str]) -> None:
        self.eos_token_id = 256 + len(special)
        self.bos_token_id = None
        self.tokens = [bytes([byte]) for byte in range(256)] + [text.encode() for text in [*special, "<end>"]]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def special_ids(special: list[str]) -> dict[str, int]:
    """As `fits` numbers them."""
    return {text: 256 + index for index, text in enumerate(special)}


def fits(grammar: str, text: str, special: list[str] | None = None) -> bool:
    """Whether `text` is a whole answer by the grammar; what is in `special` are tokens of their own."""
    ids = special_ids(special or [])
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(_Bytes(special or []))), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    parts = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
    token_ids = [token_id for part in parts for token_id in ([ids[part]] if part in ids else part.encode())]
    return matcher.consume_tokens(token_ids) and matcher.is_accepting()


# -- the tokenizer in a model's folder ------------------------------------------------------------------------------


def token_id_of(folder: Path, text: str) -> int:
    token_id = _tokenizer(folder).token_to_id(text)
    assert token_id is not None
    return token_id


def decoded(folder: Path, token_ids: list[int]) -> str:
    return _tokenizer(folder).decode(token_ids)


def num_tokens(folder: Path) -> int:
    return _tokenizer(folder).get_vocab_size()


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
