"""What /v1/responses and the paths under it take, as OpenAI's reference has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from api.schemas.base import (
    MAX_TOP_LOGPROBS,
    Metadata,
    Probability,
    Received,
    Temperature,
    TokenCount,
    conflict,
    only,
    unsupported,
)
from api.schemas.chat import MAX_TOOLS, FunctionName, JsonObjectFormat, ReasoningEffort, TextFormat
from api.schemas.response_items import Input, InputMessage, ReceivedItem

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"

# -- tools and formats, flatter than in a chat -----------------------------------------------------------------------


class FunctionTool(Received):
    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Annotated[Any, only(["direct"])] = None
    defer_loading: Annotated[Any, only(False)] = None
    is_async: Annotated[Any, only(False), Field(alias="async")] = None
    output_schema: Annotated[Any, only()] = None


class NamedFunction(Received):
    type: Literal["function"]
    name: FunctionName


class AllowedFunctions(Received):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


def _choice_kind(value: Any) -> str | None:
    return "mode" if isinstance(value, str) else value.get("type") if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedFunction, Tag("function")]
    | Annotated[AllowedFunctions, Tag("allowed_tools")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="expected none, auto, required, or an object of type function or allowed_tools",
    ),
]


class JsonSchemaFormat(Received):
    """Unlike in a chat there is none without a schema."""

    type: Literal["json_schema"]
    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class TextConfig(Received):
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[Any, only("medium")] = None


class ReasoningConfig(Received):
    """There is no summary but the reasoning itself, which is always given: "auto" is content with that."""

    effort: ReasoningEffort | None = None
    summary: Annotated[Any, only("auto")] = None
    generate_summary: Annotated[Any, only("auto")] = None
    context: Annotated[Any, only("auto")] = None
    mode: Annotated[Any, only("standard")] = None


# -- what else a response can be asked to include --------------------------------------------------------------------

_Documented = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


def _done(name: str) -> str:
    if name not in (LOGPROBS, ENCRYPTED_REASONING):
        raise unsupported(LOGPROBS, ENCRYPTED_REASONING)
    return name


Include = Annotated[list[Annotated[_Documented, AfterValidator(_done)]], Field(max_length=20, fail_fast=True)]


class ObfuscationOptions(Received):
    include_obfuscation: Annotated[Any, only(False)] = None


# -- requests --------------------------------------------------------------------------------------------------------


class ContextFields(Received):
    """What makes the prompt, of /v1/responses and of /v1/responses/input_tokens."""

    input: Input | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    conversation: Annotated[Any, only()] = None

    @property
    def items(self) -> list[ReceivedItem]:
        """The input as items, which a string stands for one of."""
        if isinstance(self.input, str):
            return [InputMessage(type="message", role="user", content=self.input)]
        return self.input or []


class ResponseRequest(ContextFields):
    """POST /v1/responses."""

    model: str
    stream: bool | None = None
    stream_options: ObfuscationOptions | None = None
    store: bool | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: Include | None = None
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # every prompt is looked up in the prefix cache, with a key or without
    # documented by OpenAI, not done
    access_programs: Annotated[Any, only()] = None
    background: Annotated[Any, only(False)] = None
    background_options: Annotated[Any, only()] = None
    context_management: Annotated[Any, only([])] = None
    image: Annotated[Any, only()] = None
    max_tool_calls: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    multi_agent: Annotated[Any, only({"enabled": False})] = None
    prompt: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    service_tier: Annotated[Any, only("auto", "default")] = None

    @model_validator(mode="after")
    def _goes_together(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or [])

    @property
    def wants_encrypted_reasoning(self) -> bool:
        return ENCRYPTED_REASONING in (self.include or [])


class InputTokensRequest(ContextFields):
    """POST /v1/responses/input_tokens."""

    model: str | None = None  # none: the served one
    personality: Annotated[Any, only()] = None


class _Query(Received):
    model_config = ConfigDict(strict=False)  # a query's values are text

    include: Include | None = None
    beta: Annotated[bool | None, only(True)] = None  # what OpenAI adds to multi-agent runs, which are not done


class RetrieveQuery(_Query):
    """GET /v1/responses/{id}: as it is stored; there are no streams to be taken up again."""

    stream: Annotated[bool | None, only(False)] = None
    starting_after: Annotated[Any, only()] = None
    include_obfuscation: Annotated[bool | None, only(False)] = None


class InputItemsQuery(_Query):
    """GET /v1/responses/{id}/input_items."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
