"""The items of a conversation as /v1/responses takes them: messages, calls of functions, their outputs, reasoning.

Items come from a client, or from the store, where earlier ones and answers of this server lie in the same form; so what
this server sends as an item is always one that it takes. What an item means for the prompt is said in `api.responses`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from api.schemas.base import MAX_MESSAGES, Received, only

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Received):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Annotated[Any, only()] = None


class OutputText(Received):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[Any, only([])] = None
    logprobs: list[Any] | None = None  # of an answer sent back as it came; they say nothing to the model


class OutputRefusal(Received):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _content_kind(value: Any) -> str | None:
    return {str: "string", list: "parts"}.get(type(value))


_content = Discriminator(
    _content_kind, custom_error_type="content_type", custom_error_message="expected a string or an array of parts"
)
_String = Annotated[str, Tag("string")]
_AnyPart = Annotated[InputText | OutputText | OutputRefusal, Field(discriminator="type")]
InputContent = Annotated[
    _String | Annotated[list[InputText], Tag("parts"), Field(min_length=1, fail_fast=True)], _content
]
FunctionOutput = Annotated[_String | Annotated[list[InputText], Tag("parts"), Field(fail_fast=True)], _content]
AssistantContent = Annotated[
    _String | Annotated[list[_AnyPart], Tag("parts"), Field(min_length=1, fail_fast=True)], _content
]


class _Item(Received):
    id: str | None = None
    status: Status | None = None


class _Message(_Item):
    type: Literal["message"]
    content: Any
    phase: Annotated[Any, only()] = None

    @property
    def text(self) -> str:
        """The content as one string; the text of several parts without anything between, as in a chat."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content


class InputMessage(_Message):
    role: Literal["user", "system", "developer"]
    content: InputContent


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: AssistantContent


class _OfFunction(_Item):
    """Fields of calls and outputs that belong to tools this server does not have."""

    call_id: str
    caller: Annotated[Any, only({"type": "direct"})] = None
    created_by: Annotated[Any, only()] = None
    namespace: Annotated[Any, only()] = None


class FunctionCall(_OfFunction):
    type: Literal["function_call"]
    name: str
    arguments: str
    is_async: Annotated[Any, only(False), Field(alias="async")] = None


class FunctionCallOutput(_OfFunction):
    type: Literal["function_call_output"]
    output: FunctionOutput
    name: Annotated[Any, only()] = None

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class SummaryText(Received):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Received):
    type: Literal["reasoning_text"]
    text: str


class Reasoning(_Item):
    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(fail_fast=True)]
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    encrypted_content: str | None = None


class ItemReference(Received):
    type: Literal["item_reference"]
    id: str


def _with_type(value: Any) -> Any:
    """OpenAI's clients leave the type out of messages and references."""
    if isinstance(value, dict) and value.get("type") is None:
        return {**value, "type": "message" if "role" in value else "item_reference"}
    return value


Item = Annotated[
    Annotated[InputMessage | AssistantMessage, Field(discriminator="role")]
    | FunctionCall
    | FunctionCallOutput
    | Reasoning,
    Field(discriminator="type"),
]
ReceivedItem = Annotated[
    Annotated[
        Annotated[InputMessage | AssistantMessage, Field(discriminator="role")]
        | FunctionCall
        | FunctionCallOutput
        | Reasoning
        | ItemReference,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_type),
]


def _input_kind(value: Any) -> str | None:
    return {str: "string", list: "items"}.get(type(value))


Input = Annotated[
    _String | Annotated[list[ReceivedItem], Tag("items"), Field(max_length=MAX_MESSAGES, fail_fast=True)],
    Discriminator(
        _input_kind, custom_error_type="input_type", custom_error_message="expected a string or an array of items"
    ),
]
