"""What /v1/messages gives: Anthropic's Message, the events of its stream, and the count of tokens. Plain data.

Written by `api.messages.format`, and by nobody else.
"""

from __future__ import annotations

from typing import Any, Literal

from api.schemas.base import Sent

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class _Sent(Sent):
    """Every field is sent: what is not there is null in Anthropic's answers."""

    def to_json(self) -> str:
        return self.model_dump_json()


class Text(_Sent):
    type: Literal["text"] = "text"
    text: str


class Thinking(_Sent):
    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str


class ToolUse(_Sent):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


Block = Text | Thinking | ToolUse


class CacheCreation(_Sent):
    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class OutputTokensDetails(_Sent):
    thinking_tokens: int


class Usage(_Sent):
    """`input_tokens` are those of the prompt that were not cached: the three kinds add up to the prompt."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    service_tier: Literal["standard"]


class Message(_Sent):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage


class TokenCount(_Sent):
    input_tokens: int


# -- events ----------------------------------------------------------------------------------------------------------


class Event(_Sent):
    """One of a stream's; `type` is its name on the wire as well."""

    type: str


class MessageStart(Event):
    type: Literal["message_start"] = "message_start"
    message: Message


class BlockStart(Event):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Block


class TextDelta(_Sent):
    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDelta(_Sent):
    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class SignatureDelta(_Sent):
    type: Literal["signature_delta"] = "signature_delta"
    signature: str


class InputJsonDelta(_Sent):
    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockDelta(Event):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: BlockDelta


class BlockStop(Event):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class StopDelta(_Sent):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Event):
    type: Literal["message_delta"] = "message_delta"
    delta: StopDelta
    usage: Usage


class MessageStop(Event):
    type: Literal["message_stop"] = "message_stop"


StreamEvent = MessageStart | BlockStart | ContentBlockDelta | BlockStop | MessageDelta | MessageStop
