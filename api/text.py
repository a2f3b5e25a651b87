"""From token ids to the text a client may see: whole characters only, and nothing of a stop string.

mlx-lm's streaming detokenizer knows how bytes are spread over tokens; a `TextStream` adds what a client must not see:
special tokens, the bytes of a character that never became whole, and text that may still turn out to begin a stop
string. One `TextStream` belongs to one generation; it knows nothing of requests or of the ring.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol

REPLACEMENT = "\ufffd"  # what half a character decodes to


class Detokenizer(Protocol):
    """The part of mlx-lm's StreamingDetokenizer that is used here."""

    def add_token(self, token: int) -> None: ...
    def finalize(self) -> None: ...
    @property
    def last_segment(self) -> str: ...


class StopStrings:
    """Finds the first of several strings in text that comes in pieces, wherever the pieces' borders are."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far is surely before any stop string. Nothing more once `found`."""
        if self.found:
            return ""
        self._held += text
        matches = [(place + len(string), place) for string in self._strings if (place := self._held.find(string)) >= 0]
        if matches:
            self.found = True
            # The one that is complete first, as if the text had come letter by letter: borders must not matter.
            return self._held[: min(matches)[1]]
        keep = max((_begun(self._held, string) for string in self._strings), default=0)
        free, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return free

    def rest(self) -> str:
        """What was held back and turned out to begin no stop string, once the text has ended."""
        held, self._held = self._held, ""
        return "" if self.found else held


def _begun(text: str, string: str) -> int:
    """How many characters at the end of `text` are the beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)


class TextStream:
    """The visible text of one generation."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), hidden: Set[int] = frozenset()) -> None:
        """`hidden`: ids of tokens that are no text, such as the end of a turn."""
        self._detokenizer = detokenizer
        self._hidden = hidden
        self._stop = StopStrings(stop)
        self.num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now. Ids after a stop string are not taken."""
        text = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            if token_id not in self._hidden:
                self._detokenizer.add_token(token_id)
                text += self._stop.add(self._detokenizer.last_segment)
        return text

    def finish(self) -> str:
        """The rest, when no more ids come. A character that was cut off is left out."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        text = self._stop.add(self._detokenizer.last_segment.rstrip(REPLACEMENT))
        return text + self._stop.rest()
