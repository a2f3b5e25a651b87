"""What clients send and get: OpenAI's chat completions and models, as pydantic models.

A field of OpenAI's reference is here whether this server does it or not: one that it does not do is `only(…)` the
values that ask for nothing. So a name that is not here is documented nowhere. No policy: defaults, limits of the model
and the chat template are applied by the routes. docs/api.md says the same in words.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 1024  # characters; how much text a stream may have to hold back


class Received(BaseModel):
    """Base of what clients send: JSON's own types (no "1" for 1), and no field that is not named here."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class Sent(BaseModel):
    """Base of what clients get. Serialized with `exclude_unset`: what a message must not have is not set."""

    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


def only(*neutral: Any) -> AfterValidator:
    """A documented field that is not done: null and the values that ask for nothing are fine, the rest is a 400."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(other) and value == other for other in neutral):
            return value
        raise PydanticCustomError("unsupported", "not supported by this server")

    return AfterValidator(check)


# -- messages --------------------------------------------------------------------------------------------------------


class TextPart(Received):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Annotated[Any, only()] = None


class RefusalPart(Received):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class FunctionCall(Received):
    name: str
    arguments: str


class ToolCall(Received):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # clients that collected a stream send it back


def _content_kind(value: Any) -> str | None:
    return {str: "string", list: "parts"}.get(type(value))


_content = Discriminator(
    _content_kind, custom_error_type="content_type", custom_error_message="expected a string or an array of parts"
)
_String = Annotated[str, Tag("string")]
Content = Annotated[_String | Annotated[list[TextPart], Tag("parts"), Field(min_length=1, fail_fast=True)], _content]
_AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
AssistantContent = Annotated[
    _String | Annotated[list[_AssistantPart], Tag("parts"), Field(min_length=1, fail_fast=True)], _content
]


class _Message(Received):
    content: Any
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string; the text of several parts without anything between."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class SystemMessage(_Message):
    role: Literal["system"]
    content: Content


class DeveloperMessage(_Message):
    role: Literal["developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class ToolMessage(_Message):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: AssistantContent | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None  # of answers sent back as they came

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise PydanticCustomError("no_content", "an assistant message needs content or tool_calls")
        return self

    @property
    def text(self) -> str:
        return super().text or self.refusal or ""


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


# -- the request -----------------------------------------------------------------------------------------------------


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    for name in bias:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", name):
            raise PydanticCustomError("token_id", "every key must be a token id of the model's vocabulary")
    return bias


def _top_k(value: int) -> int:
    return max(value, 0)  # vLLM writes -1 for "off"


_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_Stop = Annotated[
    list[_StopString],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=MAX_STOP_STRINGS),
]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]
_Metadata = Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=16)]


class StreamOptions(Received):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class ChatCompletionRequest(Received):
    """POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _TokenCount | None = None
    max_completion_tokens: _TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: _Probability | None = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, _Bias], AfterValidator(_token_ids)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: _Metadata | None = None
    # extensions that vLLM and llama.cpp have
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), AfterValidator(_top_k)] | None = None
    min_p: _Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    priority: _Priority | None = None  # smaller goes first
    # documented by OpenAI, not done
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    logprobs: Annotated[Any, only(False)] = None
    modalities: Annotated[Any, only(["text"])] = None
    moderation: Annotated[Any, only()] = None
    n: Annotated[Any, only(1)] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None  # says nothing without tools
    prediction: Annotated[Any, only()] = None
    prompt_cache_key: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    reasoning_effort: Annotated[Any, only("medium")] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    tools: Annotated[Any, only([])] = None
    top_logprobs: Annotated[Any, only(0)] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _goes_together(self) -> ChatCompletionRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "conflict",
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                {"param": "max_tokens"},
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "conflict",
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                {"param": "stream_options"},
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """How many tokens the client allows the answer, None where it names no limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


# -- the answer ------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(Sent):
    cached_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(Sent):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Sent):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
        prompt_details = PromptTokensDetails(cached_tokens=cached_tokens, audio_tokens=0)
        completion_details = CompletionTokensDetails(
            reasoning_tokens=0, audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0
        )
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=prompt_details,
            completion_tokens_details=completion_details,
        )


class Performance(Sent):
    """Our extension: where the time of one request went. Seconds, and decoded tokens a second."""

    total_time: float
    tokens_per_second: float
    queue_time: float
    prefill_time: float
    time_to_first_token: float
    decode_time: float


class AnswerMessage(Sent):
    role: Literal["assistant"]
    content: str
    refusal: None
    annotations: list[Any]


class Choice(Sent):
    index: int
    message: AnswerMessage
    logprobs: None
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


class Delta(Sent):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChunkChoice(Sent):
    index: int
    delta: Delta
    logprobs: None
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


class Model(Sent):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Sent):
    object: Literal["list"]
    data: list[Model]
