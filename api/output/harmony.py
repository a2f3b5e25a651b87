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
_START, _CHANNEL, _CONSTRAIN, _MESSAGE, _END, _RETURN, _CALL = SHOWN_AS.values()
_ENDS = (_END, _RETURN, _CALL)
_ANY_SHOWN = re.compile(f"[{''.join(SHOWN_AS.values())}]")

# Parts of an answer beyond the parser's own. In all of them text is dropped.
HEADER = "header"  # before anything is known of the message
_RECIPIENT, _UNHEARD = "recipient", "unheard"  # who it goes to; a message to somebody who is not here


def is_spoken(vocabulary: Collection[str], templates: Iterable[str]) -> bool:
    """Whether a model answers in harmony. To have its tokens is not enough: it may have been trained to other chats."""
    has_tokens = all(token in vocabulary for token in TOKENS)
    return has_tokens and any("<|channel|>" in template and "<|message|>" in template for template in templates)


def markers(content: str, reasoning: str, call: str | None) -> dict[str, dict[str, str]]:
    """The table, given the parser's names for its parts. `call`: None where there are no tools to call.

    Whatever is broken off, as gpt-oss does now and then (llama.cpp#27720), the next header is read as any.
    """
    to_reasoning, to_content = f"header of {reasoning}", f"header of {content}"
    named = {"to=": _RECIPIENT, "analysis": to_reasoning, "final": to_content, "commentary": to_content}
    over = dict.fromkeys([_START, *_ENDS], HEADER)
    anew = {**over, _CHANNEL: HEADER}
    table = {
        HEADER: {**named, _MESSAGE: content},  # of a message without a channel it is better to show too much
        to_reasoning: {**anew, "to=": _RECIPIENT, _MESSAGE: reasoning},
        to_content: {**anew, "to=": _RECIPIENT, _MESSAGE: content},
        _RECIPIENT: {**over, _MESSAGE: _UNHEARD},
        reasoning: {**anew, _MESSAGE: reasoning, _CONSTRAIN: reasoning},
        content: {**anew, _MESSAGE: content, _CONSTRAIN: content},
        _UNHEARD: anew,
    }
    if call is not None:
        table[_RECIPIENT]["functions."] = call
    return table


class HarmonyCallReader(CallReader):
    """For what follows `to=functions.`: once the header is whole the name, then the arguments as they come."""

    _NAME = re.compile(rf"[^\s{''.join(SHOWN_AS.values())}]+")

    def __init__(self, tool_format: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(tool_format, tools)
        self._header = Finder([_MESSAGE, _START, *_ENDS])
        self._header_text = ""
        self._arguments = Finder([_START, *_ENDS])
        self._has_arguments = False

    def add(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._header.found is None:
            self._header_text += self._header.add(text)
            if self._header.found is None:
                return []
            name = self._NAME.match(self._header_text)
            if name is None or self._header.found != _MESSAGE:  # it is broken off
                self.rest = _END + self._header.rest()
                return []
            pieces.append(FoundCall(name[0], ""))
            text = self._header.rest()
        arguments = _ANY_SHOWN.sub("", self._arguments.add(text))
        if not self._has_arguments:
            arguments = arguments.lstrip()
        self._has_arguments = self._has_arguments or bool(arguments)
        if self._arguments.found is not None:
            self.rest = self._arguments.found + self._arguments.rest()
            arguments = arguments if self._has_arguments else "{}"
        return [*pieces, arguments] if arguments else pieces

    def finish(self) -> list[Piece]:
        """A call that was cut stays as far as it came."""
        self.rest = ""
        return []
