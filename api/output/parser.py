"""From an answer's text to deltas: what of it is reasoning, content, or a call of a tool.

Models mark these parts with strings. An `OutputFormat` says which string leads from which part to which; the parser
follows them wherever the pieces' borders are, and shows none of them. It knows nothing of tokens: `api.output.reader`
gives it text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from api.output.call_reader import CallReader, JsonCallReader, Piece, WholeCallReader
from api.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from api.output.harmony import HarmonyCallReader
from api.output.text import Finder
from api.output.tool_format import FoundCall, ToolFormat

# Parts of an answer, by mlx-lm's names for them. Text of any other part is dropped.
CONTENT, REASONING, CALL = "normal", "reasoning", "tool"
Markers = Mapping[str, Mapping[str, str]]  # part → marker → the part it leads to


@dataclass(frozen=True)
class OutputFormat:
    """What the answer to one request is made of."""

    markers: Markers = field(default_factory=dict)
    first: str = CONTENT  # the part that the answer begins in
    tool_format: ToolFormat | None = None  # of calls; None: there are none
    tools: Sequence[dict[str, Any]] = ()  # the functions, for the format's parser
    only_calls: bool = False  # by a grammar: other text is the beginning of a call that was cut
    only_one_call: bool = False
    content_is_enforced: bool = False  # by a grammar: once it has begun, it may quote any marker
    continues_text: bool = False  # of the prompt, so a space that it begins with is text
    has_messages: bool = False  # several of one kind, which are told apart
    shown_as: Mapping[str, str] = field(default_factory=dict)  # special tokens: what the parser is shown for them

    @classmethod
    def plain(cls) -> OutputFormat:
        """All of it is content, and goes on where the prompt ends."""
        return cls(continues_text=True)

    @property
    def all_markers(self) -> set[str]:
        return {marker for markers in self.markers.values() for marker in markers}


def part_markers(tokenizer: TokenizerWrapper, tool_format: ToolFormat | None) -> Markers:
    """The markers that mlx-lm knows for this model. Those that are out of place lead nowhere: they are only dropped."""
    markers: dict[str, dict[str, str]] = {CONTENT: {}, REASONING: {}}
    for part, transitions in tokenizer.response_transitions.items():
        markers.setdefault(part, {}).update((marker, to) for marker, to in transitions if to != CALL or tool_format)
    start, end = tokenizer.think_start, tokenizer.think_end
    if start and end:
        for part in (CONTENT, REASONING):
            markers[part] |= {start: REASONING, end: CONTENT}
    markers[CONTENT] |= dict.fromkeys(tokenizer.structural_markers, CONTENT)
    if tool_format is not None:
        for part in (CONTENT, REASONING):  # some models end their reasoning by calling
            markers[part] |= {tool_format.end: part, tool_format.start: CALL}
            markers[part].pop("", None)
    return {part: edges for part, edges in markers.items() if edges}


class OutputParser:
    def __init__(
        self, output: OutputFormat, stop: Sequence[str] = (), invisible: re.Pattern[str] | None = None
    ) -> None:
        """`stop`: strings that end the answer when they are in its content. `invisible`: never part of a text."""
        self._output = output
        self._invisible = invisible
        self._stop = Finder(stop)
        self._deltas: list[Delta] = []  # that nobody has taken yet
        self._num_calls = 0
        self._call: CallReader | None = None
        self._has_said: set[str] = set()  # parts of which there was text
        self._said_anew: set[str] = set()  # of these, those whose next text is another message
        self._part = output.first
        self._enter(output.first)
        self._skips_newlines = output.first != CONTENT

    @property
    def is_reasoning(self) -> bool:
        return self._part == REASONING

    @property
    def is_content(self) -> bool:
        return self._part == CONTENT

    @property
    def is_in_whole_call(self) -> bool:
        """Whether it reads text of which special tokens are a part."""
        return isinstance(self._call, WholeCallReader)

    @property
    def has_tool_calls(self) -> bool:
        return self._num_calls > 0

    @property
    def stopped(self) -> bool:
        """Whether the answer ends here: a stop string was found, or the one call that is allowed is complete."""
        is_called = self._output.only_one_call and self.has_tool_calls and self._call is None
        return self._stop.found is not None or is_called

    @property
    def stop_found(self) -> str | None:
        return self._stop.found

    def add(self, text: str) -> list[Delta]:
        """The deltas that are certain now."""
        self._read(text)
        return self._take_deltas()

    def finish(self) -> list[Delta]:
        """The rest, when no more text comes."""
        while self._call is not None:
            self._write_call(self._call.finish())
            self._read(self._leave_call(self._call))  # what was no call may hold the beginning of another
        if not self.stopped:
            rest = self._finder.rest()
            end = self._output.tool_format.end if self._output.tool_format and self.has_tool_calls else ""
            if self._spaces is None or not end.startswith(rest):  # else a call's end marker was cut short
                self._write(rest)
            if self._spaces and not self.has_tool_calls:
                self._give(ContentDelta(self._stop.add(self._spaces)))
            self._give(ContentDelta("" if self.stopped else self._stop.rest()))
        return self._take_deltas()

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read(self, text: str) -> None:
        while text and not self.stopped:
            text = self._read_part(text) if self._call is None else self._read_call(self._call, text)

    def _read_part(self, text: str) -> str:
        """Up to the next marker. Gives back the text after it."""
        finder = self._finder
        free = finder.add(text)
        if self._output.content_is_enforced and self._part == CONTENT and free.strip():
            self._finder = Finder()
            self._write(free + (finder.found or "") + finder.rest())
            return ""
        self._write(free)
        if finder.found is None or self.stopped:
            return ""
        self._enter(self._output.markers[self._part][finder.found])
        return finder.rest()

    def _read_call(self, call: CallReader, text: str) -> str:
        self._write_call(call.add(text))
        return "" if call.rest is None else self._leave_call(call)

    def _leave_call(self, call: CallReader) -> str:
        """The text to go on with."""
        self._call = None
        if call.given_back is None:
            self._enter(CONTENT)
            return call.rest or ""
        self._enter(self._called_from)
        return call.given_back + (call.rest or "")

    def _enter(self, part: str) -> None:
        if part == CALL:
            assert self._output.tool_format is not None
            self._call = _call_reader(self._output.tool_format, self._output.tools)
            self._called_from = self._part
        if self._stop.found is None:
            self._give(ContentDelta(self._stop.rest()))
        if self._output.has_messages and part != self._part:
            self._said_anew |= {part} & self._has_said
        self._part = part
        self._finder = Finder(list(self._output.markers.get(part, ())))
        self._skips_newlines = True  # those after a marker belong to it
        # Whitespace around calls is no content, but that it is around one turns out later.
        self._spaces: str | None = "" if self._output.markers else None

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write(self, text: str) -> None:
        """Text of the part that it is in."""
        if self._invisible is not None:
            text = self._invisible.sub("", text)
        if self._skips_newlines:
            text = text.lstrip("\n")
        if not text:
            return
        self._skips_newlines = False
        if self._part == REASONING:
            self._give(ReasoningDelta(text))
        elif self._part == CONTENT and not self._output.only_calls:
            self._write_content(text)

    def _write_content(self, text: str) -> None:
        if self._spaces is not None:
            text = self._spaces + text
            self._spaces = text if text.isspace() else None
            if self._spaces is not None:
                return
        self._give(ContentDelta(self._stop.add(text)))

    def _write_call(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                self._give(ToolCallDelta(self._num_calls - 1, piece))
            elif not (self._output.only_one_call and self.has_tool_calls):
                self._give(_beginning(self._num_calls, piece))
                self._num_calls += 1

    def _give(self, delta: Delta) -> None:
        """Joined with the delta before it where both say the same kind of thing."""
        if isinstance(delta, ContentDelta | ReasoningDelta):
            if not delta.text:
                return
            part = CONTENT if isinstance(delta, ContentDelta) else REASONING
            delta = replace(delta, begins_message=part in self._said_anew)
            self._said_anew.discard(part)
            self._has_said.add(part)
        match self._deltas, delta:
            case [*_, ContentDelta(before, begins)], ContentDelta(text, False):
                self._deltas[-1] = ContentDelta(before + text, begins)
            case [*_, ReasoningDelta(before, begins)], ReasoningDelta(text, False):
                self._deltas[-1] = ReasoningDelta(before + text, begins)
            case [*_, ToolCallDelta() as call], ToolCallDelta(arguments=more, id=None):
                self._deltas[-1] = replace(call, arguments=call.arguments + more)
            case _:
                self._deltas.append(delta)

    def _take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas


def _call_reader(tool_format: ToolFormat, tools: Sequence[dict[str, Any]]) -> CallReader:
    if tool_format.is_harmony:
        return HarmonyCallReader(tool_format, tools)
    return JsonCallReader(tool_format, tools) if tool_format.is_json else WholeCallReader(tool_format, tools)


def _beginning(index: int, call: FoundCall) -> ToolCallDelta:
    return ToolCallDelta(index, call.arguments, call.id or f"call_{secrets.token_hex(12)}", call.name)
