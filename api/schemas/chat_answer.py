"""What /v1/chat/completions answers: OpenAI's objects, with vLLM's `reasoning_content` and our `performance`.

Fields that an object must not have are not set, so they are not written.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import WrapSerializer
from typing_extensions import TypedDict  # pydantic wants it before Python 3.12

from api.output.deltas import FinishReason
from api.schemas.base import Performance, Sent, Usage


class TopLogprob(TypedDict):  # there may be a hundred thousand in an answer, for which a model takes too long
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Sent):
    token: str
    logprob: float
    bytes: list[int] | None
    # A function for each, so that other threads get their turn while those of a long answer are written.
    top_logprobs: Annotated[list[TopLogprob], WrapSerializer(lambda value, write: write(value))]


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
