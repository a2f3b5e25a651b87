"""Logprobs in the words of /v1/completions: lists that go side by side, with the place of each token in the text.

As at OpenAI places are counted in characters from the beginning of the prompt, whether it is echoed or not, and a token
that is part of a character is named by its bytes. `api.completions.format` is the only caller.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice

from api.output.deltas import DrawnToken
from api.schemas.completions import CompletionLogprobs
from server.protocol import TokenLogprobs

TokenText = Callable[[int], tuple[str, list[int] | None]]


class LogprobsOfChoice:
    """Of one choice: prompt first, where it is wanted, then the answer as it comes; `take` has what was added last."""

    def __init__(self, prompt: str, num_top: int, token_text: TokenText) -> None:
        """`num_top` alternatives are given with each token."""
        self._num_top = num_top
        self._token_text = token_text
        self._name = cache(lambda token_id: token_name(*token_text(token_id)))  # the same ones come over and over
        self._offsets = _TextOffsets(prompt)
        self._added = _empty()

    def add_prompt(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """The prompt's tokens; the first one follows nothing, so it has no logprob."""
        for token_id, likely in zip(token_ids, [None, *logprobs], strict=True):
            text, data = self._token_text(token_id)
            self._add(token_id, likely, self._offsets.of_prompt(text, data))

    def add(self, tokens: Sequence[DrawnToken]) -> None:
        """More of the answer."""
        for token in tokens:
            _, data = self._token_text(token.token_id)
            self._add(token.token_id, token.logprobs, self._offsets.of_answer(data))

    def take(self) -> CompletionLogprobs:
        """What was added since the last time."""
        taken, self._added = self._added, _empty()
        return taken

    def _add(self, token_id: int, likely: TokenLogprobs | None, offset: int) -> None:
        name = self._name(token_id)
        self._added.tokens.append(name)
        self._added.text_offset.append(offset)
        if likely is None:
            self._added.token_logprobs.append(None)
            self._added.top_logprobs.append(None)
            return
        top: dict[str, float] = {}
        # A batch may compute more alternatives than this request wants.
        for top_id, logprob in islice(zip(likely.top_ids, likely.top_logprobs, strict=True), self._num_top):
            top.setdefault(self._name(top_id), logprob)  # the likelier of two with the same text
        self._added.token_logprobs.append(likely.logprob)
        self._added.top_logprobs.append(top | {name: likely.logprob})


def token_name(text: str, data: list[int] | None) -> str:
    """A token as text, or as OpenAI writes bytes that are no text by themselves."""
    try:
        return text if data is None else bytes(data).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data or [])


class _TextOffsets:
    """The character that each token of a choice begins with. Bytes that are no text count as what they are shown as."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt.encode()
        self._num_bytes = 0  # of the prompt that its tokens have covered
        self._in_prompt = _Characters(0)
        self._in_text = _Characters(len(prompt))  # with the answer's tokens

    def of_prompt(self, text: str, data: list[int] | None) -> int:
        """A control token (no `data`) may stand in the text, or be put before it by the tokenizer."""
        piece = text.encode() if data is None else bytes(data)
        if not self._prompt.startswith(piece, self._num_bytes):
            # Tokenizers after SentencePiece begin a text with a space that is not there.
            piece = b"" if data is None else piece.removeprefix(b" ")
        self._num_bytes += len(piece)
        return self._in_prompt.add(piece)

    def of_answer(self, data: list[int] | None) -> int:
        """In an answer control tokens are no text."""
        return self._in_text.add(bytes(data or []))


class _Characters:
    """Counts the characters of bytes that come in pieces."""

    def __init__(self, num_before: int) -> None:
        self._num_whole = num_before
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> int:
        """The character that the piece begins with, or goes on with where the one before is not whole yet."""
        is_cut = bool(self._decoder.getstate()[0] and piece and piece[0] & 0xC0 != 0x80)  # the one before stays half
        place = self._num_whole + is_cut
        self._num_whole += len(self._decoder.decode(piece))
        return place


def _empty() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
