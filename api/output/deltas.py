"""What one step adds to an answer, in words that no endpoint owns: reasoning, content, tool calls, drawn tokens.

`api.output.reader` makes deltas of text, `api.answer` hands them out step by step, and every endpoint writes them in
its own format. Plain data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.protocol import TokenLogprobs

FinishReason = Literal["stop", "length", "tool_calls"]


BETWEEN_MESSAGES = "\n\n"  # where messages of one kind are one text to the client


@dataclass(frozen=True)
class _TextDelta:
    text: str
    begins_message: bool = False  # apart from what was said of this kind before

    @property
    def continuing(self) -> str:
        """The text, for whoever joins it to all that was said of this kind before."""
        return BETWEEN_MESSAGES + self.text if self.begins_message else self.text


class ReasoningDelta(_TextDelta):
    """More of what the model thinks before it answers."""


class ContentDelta(_TextDelta):
    """More of the answer."""


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call's arguments, a piece of JSON text. The first delta of a call has its `id` and `name`.

    `index` counts the calls of one answer; a call is complete when the next one begins, or other text, or the answer
    ends.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Delta = ReasoningDelta | ContentDelta | ToolCallDelta


@dataclass(frozen=True)
class DrawnToken:
    """A token of the answer and how likely it was; only where the request wants to know."""

    token_id: int
    logprobs: TokenLogprobs
    is_content: bool = True  # of the answer's text, as far as that is known by now


@dataclass(frozen=True)
class Step:
    """What one step of the ring gave one choice. The step with a `finish_reason` is its last."""

    deltas: list[Delta] = field(default_factory=list)
    tokens: list[DrawnToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass
class ToolCall:
    """A call as it has come so far."""

    id: str
    name: str
    arguments: str
