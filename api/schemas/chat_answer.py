"""What /v1/chat/completions answers: OpenAI's objects, with vLLM's `reasoning_content` and our `performance`.

Fields that an object must not have are not set, so they are not written.
"""

from __future__ import annotations

from typing import Any, Literal

from api.output.deltas import FinishReason
from api.schemas.base import Performance, Sent, Usage


class TopLogprob(Sent):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Sent):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Sent):
    content: list[TokenLogprob]
    refusal: None


class AnswerFunction(Sent):
    name: str
    arguments: str


class AnswerToolCall(Sent):
    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(Sent):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    reasoning_content: str | None = None  # extension, as DeepSeek and vLLM name it
    tool_calls: list[AnswerToolCall] | None = None


class Choice(Sent):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Sent):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    service_tier: Literal["default"]
    system_fingerprint: str
    metadata: dict[str, str] | None = None
    performance: Performance


class DeltaFunction(Sent):
    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(Sent):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction


class ChunkDelta(Sent):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(Sent):
    index: int
    delta: ChunkDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Sent):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: Literal["default"]
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    performance: Performance | None = None
