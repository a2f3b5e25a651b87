"""What is between a format's markers, read as it comes: one `CallReader` for each time the start marker was found.

`JsonCallReader` gives a call's name as soon as it is certain, and the arguments as the model writes them;
`WholeCallReader` waits for the end and lets mlx-lm's parser read it. Text that turns out to be no call is given back.
The reader of harmony's calls is with the rest of that format, in `api.output.harmony`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from api.output.text import Finder
from api.output.tool_format import FoundCall, NotACall, ToolFormat

Piece = FoundCall | str  # a call with its arguments so far, or more of its arguments


class CallReader(ABC):
    def __init__(self, tool_format: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        self._format = tool_format
        self._tools = tools
        self.rest: str | None = None  # once it is over: the text after it
        self.given_back: str | None = None  # once it is over, and was no call: its text

    @abstractmethod
    def add(self, text: str) -> list[Piece]:
        """What `text` adds to the calls."""

    @abstractmethod
    def finish(self) -> list[Piece]:
        """The rest, when no more text comes."""

    def _parse(self, text: str, rest: str) -> list[Piece]:
        self.rest = rest
        try:
            return [*self._format.parse(text, self._tools)]
        except NotACall:
            self.given_back = text
            return []


class WholeCallReader(CallReader):
    """For any format: one call or several, parsed when the end marker has come, or the end of the answer."""

    def __init__(self, tool_format: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(tool_format, tools)
        self._end = Finder([tool_format.end] if tool_format.end else [])
        self._text = ""

    def add(self, text: str) -> list[Piece]:
        self._text += self._end.add(text)
        return self._parse(self._text, self._end.rest()) if self._end.found is not None else []

    def finish(self) -> list[Piece]:
        return self._parse(self._text + self._end.rest(), "")


class JsonCallReader(CallReader):
    """For `{"name": …, "arguments": {…}}`. Members in another order are read when the end marker has come."""

    _HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
    _CUT_AFTER_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*(,\s*("[a-z]*("\s*(:\s*)?)?)?)?')
    _NO_CALL = re.compile(r"\s*[^\s{\[]")

    def __init__(self, tool_format: ToolFormat, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(tool_format, tools)
        self._held = ""
        self._depth = 0  # of objects and arrays; 1: in the call, but not in its arguments
        self._in_string = self._escaped = False
        self._has_arguments = False  # all of them

    def add(self, text: str) -> list[Piece]:
        self._held += text
        return self._read_on() if self._depth else self._read_head()

    def finish(self) -> list[Piece]:
        cut = None if self._depth else self._CUT_AFTER_NAME.fullmatch(self._held)
        if not self._depth and cut is None:
            return self._parse(self._held, "")
        self.rest = ""
        if cut is not None:
            return [FoundCall(cut[1], "")]
        return [self._held] if self._held and not self._has_arguments else []

    def _read_head(self) -> list[Piece]:
        if self._NO_CALL.match(self._held):
            self.given_back, self.rest = self._held, ""
            return []
        end = self._held.find(self._format.end)
        head = self._HEAD.match(self._held)
        if head is not None and (end < 0 or head.end() <= end):
            self._held = self._held[head.end() :]
            self._depth = 1
            return [FoundCall(head[1], ""), *self._read_on()]
        if end >= 0:
            return self._parse(self._held[:end], self._held[end + len(self._format.end) :])
        return []

    def _read_on(self) -> list[Piece]:
        """The arguments as far as they have come; after them, nothing until the call's own brace closes."""
        held, end = self._held, self._format.end
        read = written = 0  # characters of what is held; those of them that are arguments
        for place, char in enumerate(held):
            if char == end[0] and not self._in_string:
                if held.startswith(end, place):  # before all braces are closed: no JSON, but the call is over
                    self.rest = held[place + len(end) :]
                    break
                if end.startswith(held[place:]):
                    break
            self._advance(char)
            read = place + 1
            if not self._has_arguments:
                written = read
                self._has_arguments = self._depth == 1
            if self._depth == 0:
                self.rest = held[read:]
                break
        self._held = held[read:]
        return [held[:written]] if written else []

    def _advance(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
