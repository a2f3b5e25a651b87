"""An answer in the words of /v1/messages: one Message, or the events of a stream.

It reads what `api.answer` gathers and writes Anthropic's objects. An answer is a row of blocks, and a delta of another
kind, or of another call, begins the next one; both forms are made by that one rule.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pydantic_core import from_json

from api import sse
from api.answer import Answer, Choice
from api.errors import ApiError, anthropic_error_object
from api.output.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from api.schemas import anthropic_answer as schema
from api.schemas.anthropic import MessagesRequest, ThinkingAdaptive, ThinkingEnabled

PING = b'event: ping\ndata: {"type": "ping"}\n\n'  # where nothing else comes, as Anthropic's own service sends it
SIGNATURE = ""  # a thinking block's; nothing here would check one


class MessagesFormat:
    def __init__(self, request: MessagesRequest, answer: Answer) -> None:
        self._request = request
        self._answer = answer
        thinking = request.thinking
        self._hides_thinking = (
            isinstance(thinking, ThinkingEnabled | ThinkingAdaptive) and thinking.display == "omitted"
        )

    # -- as one object -----------------------------------------------------------------------------------------------

    def whole(self) -> schema.Message:
        (choice,) = self._answer.choices
        reason, sequence = self._stop(choice)
        if not self._request.max_tokens:  # only the prompt was wanted; the ring gives no answer of no token
            return self._message([], reason, sequence, num_tokens=0)
        deltas = filter(_says_something, choice.deltas)
        blocks = [self._block(list(of_block)) for _, of_block in groupby(deltas, _block_key)]
        return self._message(blocks, reason, sequence, choice.num_tokens)

    def _block(self, deltas: Sequence[Delta]) -> schema.Block:
        text = "".join(_piece(delta, is_first=place == 0) for place, delta in enumerate(deltas))
        match deltas[0]:
            case ReasoningDelta():
                return schema.Thinking(thinking="" if self._hides_thinking else text, signature=SIGNATURE)
            case ContentDelta():
                return schema.Text(text=text)
            case ToolCallDelta(id=str(id), name=str(name)):
                return schema.ToolUse(id=id, name=name, input=_as_object(text))
        raise AssertionError("a call's first delta has its id and name")

    # -- as a stream -------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events. Each block is opened, told in deltas, and closed before the next one."""
        stream = _BlockStream(self._hides_thinking)
        has_begun = False
        steps = self._answer.steps()
        try:
            async for choice, step in steps:
                events: list[schema.Event] = []
                if not has_begun:
                    has_begun = True
                    message = self._message([], None, None, num_tokens=0)
                    events.append(schema.MessageStart(message=message))
                for delta in filter(_says_something, step.deltas):
                    events += stream.add(delta)
                if step.finish_reason is not None:
                    events += stream.close()
                    reason, sequence = self._stop(choice)
                    stop = schema.StopDelta(stop_reason=reason, stop_sequence=sequence)
                    events.append(schema.MessageDelta(delta=stop, usage=self._usage(choice.num_tokens)))
                    events.append(schema.MessageStop())
                if events:
                    yield b"".join(sse.named_event(event.type, event) for event in events)
        finally:
            await steps.aclose()

    # -- in both -----------------------------------------------------------------------------------------------------

    def _message(
        self, content: list[schema.Block], reason: schema.StopReason | None, sequence: str | None, num_tokens: int
    ) -> schema.Message:
        answer = self._answer
        return schema.Message(
            id=answer.id,
            model=answer.model,
            content=content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(num_tokens),
        )

    def _stop(self, choice: Choice) -> tuple[schema.StopReason, str | None]:
        match choice.finish_reason:
            case "tool_calls":
                return "tool_use", None
            case "length" if choice.generation.max_tokens < self._request.max_tokens:
                return "model_context_window_exceeded", None
            case "length":
                return "max_tokens", None
        found = choice.reader.stop_found
        return ("end_turn", None) if found is None else ("stop_sequence", found)

    def _usage(self, num_tokens: int) -> schema.Usage:
        answer = self._answer
        num_thinking = answer.reasoning_tokens if num_tokens else 0  # as many as are told, not as have come by now
        return schema.Usage(
            input_tokens=answer.prompt_tokens - answer.cached_tokens,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=answer.cached_tokens,
            cache_creation=schema.CacheCreation(ephemeral_5m_input_tokens=0, ephemeral_1h_input_tokens=0),
            output_tokens=num_tokens,
            output_tokens_details=schema.OutputTokensDetails(thinking_tokens=num_thinking),
            service_tier="standard",
        )


class _BlockStream:
    """Deltas as the events of blocks."""

    def __init__(self, hides_thinking: bool) -> None:
        self._hides_thinking = hides_thinking
        self._open: Hashable = None  # the key of the block that is open
        self._index = -1

    def add(self, delta: Delta) -> Iterator[schema.Event]:
        is_first = _block_key(delta) != self._open
        if is_first:
            yield from self.close()
            self._open = _block_key(delta)
            self._index += 1
            yield schema.BlockStart(index=self._index, content_block=_empty_block(delta))
        told = self._told(delta, _piece(delta, is_first=is_first))
        if told is not None:
            yield schema.ContentBlockDelta(index=self._index, delta=told)

    def close(self) -> Iterator[schema.Event]:
        if self._open is None:
            return
        if self._open == _block_key(ReasoningDelta("")):
            signature = schema.SignatureDelta(signature=SIGNATURE)
            yield schema.ContentBlockDelta(index=self._index, delta=signature)
        yield schema.BlockStop(index=self._index)
        self._open = None

    def _told(self, delta: Delta, piece: str) -> schema.BlockDelta | None:
        match delta:
            case ReasoningDelta():
                return None if self._hides_thinking else schema.ThinkingDelta(thinking=piece)
            case ContentDelta():
                return schema.TextDelta(text=piece)
            case ToolCallDelta():
                return schema.InputJsonDelta(partial_json=piece) if piece else None


def error_event(request_id: str) -> Callable[[ApiError], bytes]:
    """How a stream that has begun says what went wrong; it is the stream's last event."""

    def write(error: ApiError) -> bytes:
        data = json.dumps(anthropic_error_object(error, request_id), ensure_ascii=False)
        return f"event: error\ndata: {data}\n\n".encode()

    return write


def _says_something(delta: Delta) -> bool:
    return isinstance(delta, ToolCallDelta) or bool(delta.text)


def _block_key(delta: Delta) -> Hashable:
    """The same for deltas that follow each other in one block."""
    return delta.index if isinstance(delta, ToolCallDelta) else type(delta)


def _piece(delta: Delta, *, is_first: bool) -> str:
    """What a delta adds to its block."""
    if isinstance(delta, ToolCallDelta):
        return delta.arguments
    return delta.text if is_first else delta.continuing


def _empty_block(delta: Delta) -> schema.Block:
    match delta:
        case ReasoningDelta():
            return schema.Thinking(thinking="", signature="")
        case ContentDelta():
            return schema.Text(text="")
        case ToolCallDelta(id=str(id), name=str(name)):
            return schema.ToolUse(id=id, name=name, input={})
    raise AssertionError("a call's first delta has its id and name")


def _as_object(arguments: str) -> dict[str, Any]:
    """A call's arguments; of one that was cut off, as far as they came."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}
