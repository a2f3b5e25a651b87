"""What /v1/chat/completions takes: OpenAI's reference, with extensions of vLLM and llama.cpp."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from api.schemas.base import (
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    Metadata,
    Received,
    SamplingFields,
    TokenCount,
    conflict,
    only,
)

MAX_TOOLS = 128

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
    content: Annotated[_String | Annotated[list[TextPart], Tag("parts"), Field(fail_fast=True)], _content]  # or nothing
    tool_call_id: str


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: AssistantContent | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None  # of answers sent back as they came
    reasoning_content: str | None = None  # likewise; the template decides whether the model sees it

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        # An answer that was cut while it reasoned has neither text nor calls; clients send it back without content.
        if self.content is None and self.refusal is None and not self.tool_calls and not self.reasoning_content:
            raise PydanticCustomError("no_content", "an assistant message needs content or tool_calls")
        return self

    @property
    def text(self) -> str:
        return super().text or self.refusal or ""


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


# -- tools and formats -----------------------------------------------------------------------------------------------

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Received):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema; none: no parameters are described
    strict: bool | None = None


class Tool(Received):
    type: Literal["function"]
    function: Function


def tool_names(tools: list[Tool] | None) -> list[str]:
    """The names of their functions, no two of which may be the same."""
    names = [tool.function.name for tool in tools or []]
    if len(names) > len(set(names)):
        raise conflict("tools", "Two tools have the same name; each function needs a name of its own.")
    return names


class NamedFunction(Received):
    name: FunctionName


class NamedTool(Received):
    type: Literal["function"]
    function: NamedFunction


class _AllowedTools(Received):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Received):
    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools


def _choice_kind(value: Any) -> str | None:
    return "mode" if isinstance(value, str) else value.get("type") if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedTool, Tag("function")]
    | Annotated[AllowedTools, Tag("allowed_tools")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="expected none, auto, required, or an object of type function or allowed_tools",
    ),
]


class TextFormat(Received):
    type: Literal["text"]


class JsonObjectFormat(Received):
    type: Literal["json_object"]


class JsonSchema(Received):
    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Received):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Prediction(Received):
    """OpenAI's hint for speculative decoding. It changes no answer; here it changes no speed either."""

    type: Literal["content"]
    content: Content


# -- the request -----------------------------------------------------------------------------------------------------


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    prediction: Prediction | None = None
    prompt_cache_key: str | None = None  # every prompt is looked up in the prefix cache, with a key or without
    safety_identifier: str | None = None
    metadata: Metadata | None = None
    # extensions of vLLM: what the chat template is rendered with; an answer that goes on with the last message
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    # documented by OpenAI, not done
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    modalities: Annotated[Any, only(["text"])] = None
    moderation: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _goes_together(self) -> ChatCompletionRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise conflict(
                "max_tokens", "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
            )
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.")
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.")
        self._check_tools()
        self._check_continuation()
        return self

    def _check_tools(self) -> None:
        names = tool_names(self.tools)
        if not names:
            if self.tool_choice not in (None, "none", "auto"):
                raise conflict("tool_choice", "'tool_choice' is only allowed when 'tools' are specified.")
            return
        match self.tool_choice:
            case NamedTool(function=function):
                asked = [function.name]
            case AllowedTools(allowed_tools=allowed):
                asked = [tool.function.name for tool in allowed.tools]
            case _:
                asked = []
        for name in asked:
            if name not in names:
                raise conflict("tool_choice", f"The tool '{name}' of 'tool_choice' is not among the 'tools'.")

    def _check_continuation(self) -> None:
        name = "continue_final_message"
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                message = f"'add_generation_prompt' may only be false together with '{name}'."
                raise conflict("add_generation_prompt", message)
            return
        if self.add_generation_prompt:
            raise conflict(name, f"'{name}' and 'add_generation_prompt' cannot both be true.")
        last = self.messages[-1]
        if not isinstance(last, AssistantMessage) or not last.text or last.tool_calls:
            raise conflict(name, f"'{name}' needs a last message of the assistant that is text.")
        if not isinstance(self.response_format, TextFormat | None) or self.tool_choice not in (None, "none", "auto"):
            raise conflict(name, f"'{name}' cannot be used where the answer's form is enforced.")

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives each token's logprob comes with; None where no logprobs are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None
