"""Harmony, the format of gpt-oss's answers: messages with headers that say what each is and to whom it goes.

    <|channel|>analysis<|message|>reasoning<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{"a": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|>answer<|return|>

The prompt ends in `<|start|>assistant`, so an answer begins inside a header. A message of commentary to nobody is a
preamble, meant for the user; a recipient may stand before the channel as well. Specified in openai/harmony,
docs/format.md. mlx-lm has no parser for it. This is the table that `api.output.parser` follows, and the reader of the
calls; `api.tokenizer` gives them to the answers of models whose vocabulary and template speak harmony.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from api.output.call_reader import CallReader, Piece
from api.output.text import Finder
from api.output.tool_format import FoundCall, ToolFormat

TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
STOPS = ("<|return|>", "<|call|>")  # end an answer

# What the parser is shown for these tokens: halves of surrogate pairs, which are in no decoded text. So an answer that
# spells a token out, to explain the format, is text.
SHOWN_AS: Mapping[str, str] = {token: chr(0xDC00 + place) for place, token in enumerate(TOKENS)}
_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *_ENDS = SHOWN_AS.values()
_ANY_SHOWN = re.compile(f"[{''.join(SHOWN_AS.values())}]")

# Parts of an answer beyond the parser's own. In all of them text is dropped.
HEADER = "header"  # before anything is known of the message
_RECIPIENT, _UNHEARD = "recipient", "unheard"  # who it goes to; a message to somebody who is not here

BETWEEN_MESSAGES = "\n\n"  # of one kind: to a client they are one text


def is_spoken(vocabulary: Collection[str], templates: Iterable[str]) -> bool:
    """Whether a model answers in harmony. To have its tokens is not enough: it may have been trained to other chats."""
    has_tokens = all(token in vocabulary for token in TOKENS)
    return has_tokens and any("<|channel|>" in template and "<|message|>" in template for template in templates)


def markers(content: str, reasoning: str, call: str | None) -> dict[str, dict[str, str]]:
    """The table, given the parser's names for its parts. `call`: None where there are no tools to call."""
    to_reasoning, to_content = f"header of {reasoning}", f"header of {content}"
    named = {"to=": _RECIPIENT, "analysis": to_reasoning, "final": to_content, "commentary": to_content}
    in_text = {_START: HEADER, _CHANNEL: HEADER, **dict.fromkeys(_ENDS, HEADER)}
    table = {
        HEADER: {**named, _MESSAGE: content},  # of a message without a channel it is better to show too much
        to_reasoning: {"to=": _RECIPIENT, _MESSAGE: reasoning},
        to_content: {"to=": _RECIPIENT, _MESSAGE: content},
        _RECIPIENT: {_MESSAGE: _UNHEARD},
        **{part: {**in_text, _MESSAGE: part, _CONSTRAIN: part} for part in (content, reasoning)},
        _UNHEARD: in_text,
    }
    if call is not None:
        table[_RECIPIENT]["functions."] = call
    return table


class HarmonyCallReader(CallReader):
    """For what follows `to=functions.`: the name, the rest of the header, the arguments as they come."""

    def __init__(self, tool_format: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(tool_format, tools)
        self._name = Finder([" ", "\n", *SHOWN_AS.values()])
        self._header = Finder([_MESSAGE, _START, *_ENDS])
        self._arguments = Finder([_START, *_ENDS])
        self._text = ""  # of the name so far
        self._has_arguments = False

    def add(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._name.found is None:
            self._text += self._name.add(text)
            if self._name.found is None:
                return []
            if self._text:
                pieces.append(FoundCall(self._text, ""))
            text = self._name.found + self._name.rest()
        if self._header.found is None:
            self._header.add(text)
            if self._header.found is None:
                return pieces
            if self._header.found != _MESSAGE:  # it breaks off
                self.rest = self._header.found + self._header.rest()
                return pieces
            text = self._header.rest()
        arguments = _ANY_SHOWN.sub("", self._arguments.add(text)) if self._text else ""
        self._has_arguments = self._has_arguments or bool(arguments)
        if self._arguments.found is not None:
            self.rest = self._arguments.found + self._arguments.rest()
            if self._text and not self._has_arguments:
                arguments = "{}"
        return [*pieces, arguments] if arguments else pieces

    def finish(self) -> list[Piece]:
        """A call that was cut stays as far as it came; half a name is nothing."""
        self.rest = ""
        return []
