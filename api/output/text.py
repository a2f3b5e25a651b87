"""From token ids to text in pieces: whole characters only, and strings are found wherever the pieces' borders are.

mlx-lm's streaming detokenizer knows how bytes are spread over tokens; a `TextStream` adds that the bytes of a character
that never became whole are no text. A `Finder` holds back what may still turn out to begin one of its strings. Both
belong to one answer and know nothing of requests or of the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what half a character decodes to


class Detokenizer(Protocol):
    """The part of mlx-lm's StreamingDetokenizer that is used here."""

    def add_token(self, token: int) -> None: ...
    def finalize(self) -> None: ...
    @property
    def last_segment(self) -> str: ...


class Finder:
    """Finds the first of several strings in text that comes in pieces."""

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What of the text so far is surely before any of the strings. Nothing more once one is `found`."""
        self._held += text
        if self.found is not None:
            return ""
        matches = [
            (place + len(string), place, string) for string in self._strings if (place := self._held.find(string)) >= 0
        ]
        if matches:
            # The one that is complete first, as if the text had come letter by letter: borders must not matter.
            end, place, self.found = min(matches)
            free, self._held = self._held[:place], self._held[end:]
            return free
        keep = max((_begun(self._held, string) for string in self._strings), default=0)
        free, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return free

    def rest(self) -> str:
        """The text after what was `found`; where the text has ended before, what turned out to begin no string."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, string: str) -> int:
    """How many characters at the end of `text` are the beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)


class TextStream:
    """The text of one answer's tokens."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def add(self, token_id: int) -> str:
        """The text that is certain now."""
        self._detokenizer.add_token(token_id)
        return self._detokenizer.last_segment

    def finish(self) -> str:
        """The rest, when no more ids come, or one that is no text. A character that was cut off is left out."""
        self._detokenizer.finalize()
        return self._detokenizer.last_segment.rstrip(REPLACEMENT)
