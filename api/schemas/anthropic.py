"""What /v1/messages and /v1/messages/count_tokens take, as Anthropic's reference and SDK have it, beta fields included.

As in `api.schemas.base`: a field that this server does not do is `only(…)` the values that ask for nothing, and a name
that is not here is documented nowhere. It says what a request may be; `api.messages.request` makes a chat of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from api.schemas.base import MAX_MESSAGES, MAX_STOP_LENGTH, Probability, Received, conflict, only

MAX_TOOLS = 512
MAX_STOP_SEQUENCES = 64
MIN_THINKING_BUDGET = 1024  # Anthropic's

# -- content ---------------------------------------------------------------------------------------------------------


class CacheControl(Received):
    """Where a cached prefix is to end. Here every prompt's prefix is cached, marked or not."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Received):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[Any, only([])] = None


class ThinkingBlock(Received):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None  # not checked: a client may have begun the conversation elsewhere


class RedactedThinkingBlock(Received):
    """What another server's model thought, readable to that server alone."""

    type: Literal["redacted_thinking"]
    data: str


ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


class ToolUseBlock(Received):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: ToolName
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Annotated[Any, only({"type": "direct"})] = None
    toolset_name: Annotated[Any, only()] = None


def _content_kind(value: Any) -> str | None:
    return {str: "string", list: "blocks"}.get(type(value))


_string_or_blocks = Discriminator(
    _content_kind, custom_error_type="content_type", custom_error_message="expected a string or an array of blocks"
)
_String = Annotated[str, Tag("string")]
_TextBlocks = Annotated[list[TextBlock], Tag("blocks"), Field(fail_fast=True)]
TextContent = Annotated[_String | _TextBlocks, _string_or_blocks]


class ToolResultBlock(Received):
    type: Literal["tool_result"]
    tool_use_id: str
    content: TextContent | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: Annotated[Any, only()] = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, Field(discriminator="type")
]
_UserBlocks = Annotated[list[UserBlock], Tag("blocks"), Field(min_length=1, fail_fast=True)]
_AssistantBlocks = Annotated[list[AssistantBlock], Tag("blocks"), Field(fail_fast=True)]  # an answer may be empty

# -- messages --------------------------------------------------------------------------------------------------------


class UserMessage(Received):
    role: Literal["user"]
    content: Annotated[_String | _UserBlocks, _string_or_blocks]


class AssistantMessage(Received):
    role: Literal["assistant"]
    content: Annotated[_String | _AssistantBlocks, _string_or_blocks]


class SystemMessage(Received):
    role: Literal["system"]
    content: TextContent
    clear_at: Annotated[Any, only("never")] = None
    output_config: Annotated[Any, only({})] = None


InputMessage = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]

# -- tools, thinking, output -----------------------------------------------------------------------------------------


class Tool(Received):
    """A tool that the client runs. The tools that Anthropic runs, or has trained its models on, have other types."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: Annotated[Any, only(True)] = None
    allowed_callers: Annotated[Any, only(["direct"])] = None
    defer_loading: Annotated[Any, only(False)] = None
    input_examples: Annotated[Any, only([])] = None


class NoToolChoice(Received):
    type: Literal["none"]


class FreeToolChoice(Received):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class NamedToolChoice(Received):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


ToolChoice = Annotated[NoToolChoice | FreeToolChoice | NamedToolChoice, Field(discriminator="type")]

_Display = Literal["summarized", "omitted"]


class ThinkingEnabled(Received):
    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=MIN_THINKING_BUDGET, le=2**31 - 1)]
    display: _Display | None = None
    block_binding: Annotated[Any, only({})] = None


class ThinkingAdaptive(Received):
    type: Literal["adaptive"]
    display: _Display | None = None
    block_binding: Annotated[Any, only({})] = None


class ThinkingDisabled(Received):
    type: Literal["disabled"]


Thinking = Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")]
Effort = Literal["low", "medium", "high", "xhigh", "max"]


class JsonOutputFormat(Received):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Received):
    effort: Effort | None = None
    format: JsonOutputFormat | None = None
    task_budget: Annotated[Any, only()] = None


class RequestMetadata(Received):
    user_id: str | None = None


# -- the requests ----------------------------------------------------------------------------------------------------

_KEEPS_ALL_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}


class CountTokensRequest(Received):
    """POST /v1/messages/count_tokens: all that a prompt is made of."""

    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: TextContent | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutputFormat | None = None  # what output_config.format was called before
    cache_control: CacheControl | None = None
    # documented by Anthropic, not done
    billing_policy: Annotated[Any, only()] = None
    compaction: Annotated[Any, only()] = None
    context_management: Annotated[Any, only({}, {"edits": []}, _KEEPS_ALL_THINKING)] = None
    mcp_servers: Annotated[Any, only([])] = None
    speed: Annotated[Any, only("standard")] = None
    thread: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _goes_together(self) -> CountTokensRequest:
        names = [tool.name for tool in self.tools or []]
        if len(names) > len(set(names)):
            raise conflict("tools", "Two tools have the same name; each tool needs a name of its own.")
        match self.tool_choice:
            case NamedToolChoice(name=name) if name not in names:
                raise conflict("tool_choice.name", f"The tool '{name}' of 'tool_choice' is not among the 'tools'.")
            case FreeToolChoice(type="any") if not names:
                raise conflict("tool_choice", "'tool_choice' of type 'any' is only allowed together with 'tools'.")
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise conflict("output_format", "'output_format' and 'output_config.format' cannot be used together.")
        return self

    @property
    def json_format(self) -> JsonOutputFormat | None:
        return self.output_format or (self.output_config.format if self.output_config else None)


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)]  # 0: the prompt is to be cached, nothing to be answered
    stream: bool | None = None
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOP_SEQUENCES)
        ]
        | None
    ) = None
    temperature: Probability | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: RequestMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    # documented by Anthropic, not done
    container: Annotated[Any, only()] = None
    diagnostics: Annotated[Any, only({}, {"previous_message_id": None})] = None
    fallback_credit_token: Annotated[Any, only()] = None
    fallbacks: Annotated[Any, only([], "default")] = None
    inference_geo: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _streams_something(self) -> MessagesRequest:
        if self.stream and not self.max_tokens:
            raise conflict("max_tokens", "'max_tokens' of 0 is only allowed without 'stream'.")
        return self
