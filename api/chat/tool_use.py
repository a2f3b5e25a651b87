"""How the answer to one request may use tools: which are offered, in which format, and what a grammar must enforce.

A pure function of the request and the model. A model is offered tools in its own format; where calls must be enforced
and that format is no JSON, in the generic one. Called by `api.chat.prompt`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from api.output.tool_format import GENERIC, ToolFormat
from api.schemas.chat import AllowedTools, AssistantMessage, ChatCompletionRequest, NamedTool, TextFormat, Tool
from api.structured.request_schemas import Function

_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolUse:
    is_native: bool  # the template writes tools, calls and results; otherwise they are text
    offered: tuple[dict[str, Any], ...] = ()
    tool_format: ToolFormat | None = None  # None: no calls
    callable: tuple[Function, ...] = ()
    is_enforced: bool = False  # calls fit a grammar
    is_required: bool = False  # the answer is nothing but calls
    is_forbidden: bool = False  # no calls, where the model may think of some
    is_parallel: bool = True  # there may be several

    def generic(self) -> ToolUse:
        """The same as text, for a template that cannot write it."""
        return replace(self, is_native=False, tool_format=GENERIC if self.tool_format else None)


def tool_use(chat: ChatCompletionRequest, native: ToolFormat | None) -> ToolUse:
    """`native`: the model's own format, if it has one."""
    choice = chat.tool_choice or "auto"
    if not chat.tools or choice == "none":
        # A model that finds calls in the conversation writes more of them, also where it is offered no tools.
        has_calls = any(isinstance(message, AssistantMessage) and message.tool_calls for message in chat.messages)
        return ToolUse(is_native=native is not None, is_forbidden=has_calls or choice == "none")
    required, parallel = choice == "required", chat.parallel_tool_calls is not False
    names = {tool.function.name for tool in chat.tools}
    if isinstance(choice, NamedTool):
        names, required, parallel = {choice.function.name}, True, False
    elif isinstance(choice, AllowedTools):
        names = {tool.function.name for tool in choice.allowed_tools.tools}
        required = choice.allowed_tools.mode == "required"
    functions = tuple(_function(place, tool) for place, tool in enumerate(chat.tools) if tool.function.name in names)
    enforced = (
        required
        or len(functions) < len(chat.tools)
        or any(function.strict for function in functions)
        or not isinstance(chat.response_format, TextFormat | None)
    )
    is_native = native is not None and (native.is_enforceable or not enforced)
    return ToolUse(
        is_native=is_native,
        offered=tuple(_for_template(tool) for tool in chat.tools),
        tool_format=native if is_native else GENERIC,
        callable=functions,
        is_enforced=enforced,
        is_required=required,
        is_parallel=parallel,
    )


def _function(place: int, tool: Tool) -> Function:
    function = tool.function
    return Function(function.name, function.parameters, bool(function.strict), f"tools[{place}].function.parameters")


def _for_template(tool: Tool) -> dict[str, Any]:
    """As the client sent it; what it may leave out is there, since templates and parsers look for it."""
    function: dict[str, Any] = {
        "name": tool.function.name,
        "description": tool.function.description or "",
        "parameters": tool.function.parameters or _NO_PARAMETERS,
    }
    if tool.function.strict is not None:
        function["strict"] = tool.function.strict
    return {"type": tool.type, "function": function}
