"""What /v1/responses and the paths under it answer: the response, its items, and the events of a stream.

An item that is sent is also one of `api.schemas.response_items`: clients and the store give it back as it was.
"""

from __future__ import annotations

from typing import Any, Literal

from api.schemas.base import Performance, Sent
from api.schemas.chat_answer import TokenLogprob
from api.schemas.response_items import Status

# -- items -----------------------------------------------------------------------------------------------------------


class OutputTextPart(Sent):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class ReasoningTextPart(Sent):
    type: Literal["reasoning_text"]
    text: str


class MessageItem(Sent):
    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputTextPart]


class FunctionCallItem(Sent):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class ReasoningItem(Sent):
    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[Any]
    content: list[ReasoningTextPart]
    encrypted_content: str | None = None


OutputItem = MessageItem | FunctionCallItem | ReasoningItem

# -- the response ----------------------------------------------------------------------------------------------------


class InputTokensDetails(Sent):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Sent):
    reasoning_tokens: int


class ResponseUsage(Sent):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Sent):
    reason: Literal["max_output_tokens"]


class ResponseError(Sent):
    code: str
    message: str


class Response(Sent):
    """With `performance`, our extension, once it has ended."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    performance: Performance | None = None


class DeletedResponse(Sent):
    id: str
    object: Literal["response.deleted"]
    deleted: bool


class ItemList(Sent):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(Sent):
    object: Literal["response.input_tokens"]
    input_tokens: int


# -- events ----------------------------------------------------------------------------------------------------------


class Event(Sent):
    type: str
    sequence_number: int


class ResponseEvent(Event):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: Response


class ErrorEvent(Event):
    """As documented, and once more as an object, in which OpenAI's clients look for what they raise."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
    error: dict[str, Any]


class ItemEvent(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _OfItem(Event):
    item_id: str
    output_index: int


class PartEvent(_OfItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputTextPart | ReasoningTextPart


class TextDeltaEvent(_OfItem):
    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(_OfItem):
    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDeltaEvent(_OfItem):
    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ReasoningDoneEvent(_OfItem):
    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ArgumentsDeltaEvent(_OfItem):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_OfItem):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


StreamEvent = (
    ResponseEvent
    | ErrorEvent
    | ItemEvent
    | PartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ReasoningDeltaEvent
    | ReasoningDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)
