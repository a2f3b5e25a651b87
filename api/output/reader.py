"""From the ids of one answer to deltas: which tokens are text, and how many were spent on reasoning.

`ChatTokenizer.output_reader` makes one for each choice; `api.answer` feeds it. It shows whole characters only, and no
special token: those that are part of a marker or of a call only the parser gets to see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from api.output.deltas import Delta
from api.output.parser import OutputFormat, OutputParser
from api.output.text import TextStream


@dataclass(frozen=True)
class HiddenTokens:
    """Ids that are no text for a client."""

    never_text: Set[int]  # ends of a turn, and ids of a padded vocabulary that the tokenizer does not know
    special: Set[int]
    markers: Set[int]  # special ones that are in a marker of this answer
    shown_as: Mapping[int, str] = field(default_factory=dict)  # to the parser, where text is never taken for them


class OutputReader:
    def __init__(
        self,
        text: TextStream,
        output: OutputFormat,
        stop: Sequence[str],
        hidden: HiddenTokens,
        invisible: re.Pattern[str] | None = None,
    ) -> None:
        """`invisible`: the text of special tokens, where some of them are shown to the parser."""
        self._text = text
        self._hidden = hidden
        self._parser = OutputParser(output, stop, invisible)
        self.are_content: list[bool] = []  # for each id that the last `add` took, whether it is of the answer's text
        self.num_tokens = 0
        self.num_reasoning_tokens = 0  # markers included

    @property
    def stopped(self) -> bool:
        """Whether the choice ends here: a stop string was found, or the one call that is allowed is complete."""
        return self._parser.stopped

    @property
    def stop_found(self) -> str | None:
        """The stop string that ended the choice."""
        return self._parser.stop_found

    @property
    def has_tool_calls(self) -> bool:
        return self._parser.has_tool_calls

    def add(self, token_ids: Sequence[int]) -> list[Delta]:
        """What is certain now. Ids after `stopped` are not taken."""
        deltas: list[Delta] = []
        self.are_content = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            was_reasoning, was_content = self._parser.is_reasoning, self._parser.is_content
            is_text = self._is_text(token_id)
            if token_id in self._hidden.shown_as:
                deltas += self._parser.add(self._text.finish() + self._hidden.shown_as[token_id])
            elif is_text:
                deltas += self._parser.add(self._text.add(token_id))
            self.num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
            self.are_content.append(is_text and was_content and self._parser.is_content)
        return deltas

    def finish(self) -> list[Delta]:
        """The rest, when no more ids come. A character that was cut off is left out."""
        if self.stopped:
            return []
        return [*self._parser.add(self._text.finish()), *self._parser.finish()]

    def _is_text(self, token_id: int) -> bool:
        hidden = self._hidden
        if token_id in hidden.never_text:
            return False
        return token_id not in hidden.special or token_id in hidden.markers or self._parser.is_in_whole_call
