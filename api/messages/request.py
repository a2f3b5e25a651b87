"""From a request to /v1/messages to the chat that answers it, and from the chat's errors back to the request's words.

Everything behind this module knows only `ChatCompletionRequest`: prompts, tools, grammars and limits exist once. Plain
data in and out; what the model cannot be told is in `ignored`, which the client reads in a header. Called by
api/routes/messages.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from api.errors import ApiError, ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from api.schemas import anthropic as asked
from api.schemas import chat as made

BLOCKS_APART = "\n"  # between a user's or the system's blocks; the model's own follow each other as it wrote them

# What the chat calls what the request calls otherwise; the longer of two that begin alike comes first.
_OWN_NAMES = {
    "max_completion_tokens": "max_tokens",
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "reasoning_effort": "output_config.effort",
}
_OWN_ENDS = {
    ".tool_calls": ".content",
    ".tool_call_id": ".tool_use_id",
    ".reasoning_content": ".content",
    ".function.parameters": ".input_schema",
    ".function": "",
}

_Block = (
    asked.TextBlock | asked.ThinkingBlock | asked.RedactedThinkingBlock | asked.ToolUseBlock | asked.ToolResultBlock
)


@dataclass(frozen=True)
class Translation:
    """The chat, and how its parts are called in the request."""

    chat: made.ChatCompletionRequest
    ignored: list[str]
    origins: list[str]  # for each of the chat's messages, what it comes from

    def in_own_words(self, error: ApiError) -> ApiError:
        """An error of the chat, about what its client has sent."""
        if error.param is None:
            return error
        name = self._own_name(error.param)
        message = error.message.replace(f"'{error.param}'", f"'{name}'")
        if isinstance(error, ContextLengthExceeded):
            message = f"prompt is too long: {message}"  # the words by which agents know that they must shorten it
        return type(error)(message, param=name, code=error.code, retry_after_s=error.retry_after_s)

    def _own_name(self, param: str) -> str:
        if param == "continue_final_message":
            return self.origins[-1]
        found = re.fullmatch(r"(messages|tools)\[(\d+)\](.*)", param)
        if found:
            kind, place, rest = found.group(1), int(found.group(2)), found.group(3)
            return (self.origins[place] if kind == "messages" else f"tools[{place}]") + _renamed(rest, _OWN_ENDS)
        return _renamed(param, _OWN_NAMES)


def translate(request: asked.CountTokensRequest, *, can_think: bool) -> Translation:
    """The chat that answers `request`. Raises InvalidRequest for messages that do not fit together, and
    UnsupportedParameter for thinking where the served model cannot."""
    turns = list(_turns(request))
    _check_calls(turns)
    if turns[-1].is_empty_answer:
        turns.pop()
    if not turns:
        raise InvalidRequest("The 'messages' hold nothing to answer.", param="messages")
    is_prefilled = turns[-1].role == "assistant"
    if is_prefilled:
        _check_prefill(turns[-1], request)
    messages, origins, ignored = [], [], []
    for turn in turns:
        for message, origin in turn.messages():
            messages.append(message)
            origins.append(origin)
        ignored += turn.unreadable
    if isinstance(request.thinking, asked.ThinkingEnabled):
        ignored.append("thinking.budget_tokens")
    fields: dict[str, Any] = {"model": request.model, "messages": messages, "continue_final_message": is_prefilled}
    fields |= _tools(request) | {"reasoning_effort": _reasoning_effort(request, can_think)}
    if isinstance(request, asked.MessagesRequest):
        fields |= {
            "max_completion_tokens": max(1, request.max_tokens),
            "stream": request.stream,
            "stop": request.stop_sequences,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
        }
    if request.json_format is not None:
        json_schema = made.JsonSchema.model_validate({"name": "output", "schema": request.json_format.schema_})
        fields["response_format"] = made.JsonSchemaFormat(type="json_schema", json_schema=json_schema)
    # Right by its own schema. OpenAI's limits (4 stop strings, names of 64 characters) are not Anthropic's.
    return Translation(made.ChatCompletionRequest.model_construct(**fields), ignored, origins)


# -- messages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """The blocks of messages of one role that follow each other: one turn, as at Anthropic."""

    role: str
    origin: str
    blocks: list[tuple[_Block, str]]  # each with its place in the request

    def messages(self) -> Iterator[tuple[made.Message, str]]:
        """What the chat has for the turn, with its origin."""
        if self.role == "assistant":
            yield self._said_by_the_model(), self.origin
        elif self.role == "system":
            yield made.SystemMessage(role="system", content=self._texts(self.blocks)), self.origin
        else:
            yield from self._said_by_the_user()

    @property
    def is_empty_answer(self) -> bool:
        texts = [block.text if isinstance(block, asked.TextBlock) else "…" for block, _ in self.blocks]
        return self.role == "assistant" and not "".join(texts)

    @property
    def unreadable(self) -> list[str]:
        return [origin for block, origin in self.blocks if isinstance(block, asked.RedactedThinkingBlock)]

    def _said_by_the_model(self) -> made.AssistantMessage:
        blocks = [block for block, _ in self.blocks]
        calls = [_call(block) for block in blocks if isinstance(block, asked.ToolUseBlock)]
        thoughts = "".join(block.thinking for block in blocks if isinstance(block, asked.ThinkingBlock))
        text = "".join(block.text for block in blocks if isinstance(block, asked.TextBlock))
        return made.AssistantMessage(
            role="assistant",
            content=text if text or not calls else None,
            tool_calls=calls or None,
            reasoning_content=thoughts or None,
        )

    def _said_by_the_user(self) -> Iterator[tuple[made.Message, str]]:
        """A message for each result of a tool, and one for the text before, between and after them."""
        texts: list[tuple[_Block, str]] = []
        for block, origin in self.blocks:
            if isinstance(block, asked.ToolResultBlock):
                if texts:
                    yield made.UserMessage(role="user", content=self._texts(texts)), texts[0][1]
                    texts = []
                yield _result(block), origin
            else:
                texts.append((block, origin))
        if texts:
            yield made.UserMessage(role="user", content=self._texts(texts)), texts[0][1]

    @staticmethod
    def _texts(blocks: list[tuple[_Block, str]]) -> str:
        return BLOCKS_APART.join(block.text for block, _ in blocks if isinstance(block, asked.TextBlock))


def _turns(request: asked.CountTokensRequest) -> Iterator[_Turn]:
    given: list[tuple[str, Any, str]] = [("system", request.system, "system")] if request.system else []
    given += [(message.role, message.content, f"messages[{place}]") for place, message in enumerate(request.messages)]
    turn: _Turn | None = None
    for role, content, origin in given:
        if turn is None or turn.role != role:
            if turn is not None:
                yield turn
            turn = _Turn(role, origin, [])
        if isinstance(content, str):
            turn.blocks.append((asked.TextBlock(type="text", text=content), origin))
        else:
            path = origin if origin == "system" else f"{origin}.content"
            turn.blocks.extend((block, f"{path}[{place}]") for place, block in enumerate(content))
    if turn is not None:
        yield turn


def _check_calls(turns: list[_Turn]) -> None:
    """Every result must be of a call that was made: templates look its name up."""
    ids: set[str] = set()
    for turn in turns:
        for block, origin in turn.blocks:
            if isinstance(block, asked.ToolUseBlock):
                ids.add(block.id)
            elif isinstance(block, asked.ToolResultBlock) and block.tool_use_id not in ids:
                message = f"'{origin}.tool_use_id' names no 'tool_use' block of an earlier message."
                raise InvalidRequest(message, param=f"{origin}.tool_use_id", code="invalid_value")


def _check_prefill(last: _Turn, request: asked.CountTokensRequest) -> None:
    """The answer goes on with a last turn of the model's own. Raises InvalidRequest where it cannot."""
    blocks = [block for block, _ in last.blocks]
    choice = request.tool_choice
    if any(isinstance(block, asked.ToolUseBlock) for block in blocks):
        why = "the results of its 'tool_use' blocks must follow it"
    elif not any(isinstance(block, asked.TextBlock) and block.text for block in blocks):
        why = "it holds no text"
    elif request.json_format is not None or (choice is not None and choice.type in ("any", "tool")):
        why = "the form of the answer is enforced from its beginning"
    else:
        return
    name = f"messages[{len(request.messages) - 1}]"
    raise InvalidRequest(f"The answer cannot go on with '{name}': {why}.", param=name, code="invalid_value")


def _call(block: asked.ToolUseBlock) -> made.ToolCall:
    function = made.FunctionCall(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False))
    return made.ToolCall(id=block.id, type="function", function=function)


def _result(block: asked.ToolResultBlock) -> made.ToolMessage:
    content = block.content or ""
    text = content if isinstance(content, str) else BLOCKS_APART.join(part.text for part in content)
    # No chat template knows of failure, so it is said in words.
    return made.ToolMessage(
        role="tool", tool_call_id=block.tool_use_id, content=f"Error: {text}" if block.is_error else text
    )


# -- tools and reasoning ---------------------------------------------------------------------------------------------


def _tools(request: asked.CountTokensRequest) -> dict[str, Any]:
    choice = request.tool_choice
    fields: dict[str, Any] = {"tools": [_tool(tool) for tool in request.tools or []] or None}
    match choice:
        case asked.NoToolChoice():
            fields["tool_choice"] = "none"
        case asked.FreeToolChoice(type=kind):
            fields["tool_choice"] = {"auto": "auto", "any": "required"}[kind]
        case asked.NamedToolChoice(name=name):
            named = made.NamedTool.model_construct(
                type="function", function=made.NamedFunction.model_construct(name=name)
            )
            fields["tool_choice"] = named
    if isinstance(choice, asked.FreeToolChoice | asked.NamedToolChoice) and choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _tool(tool: asked.Tool) -> made.Tool:
    function = made.Function.model_construct(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return made.Tool(type="function", function=function)


def _reasoning_effort(request: asked.CountTokensRequest, can_think: bool) -> made.ReasoningEffort | None:
    """What the chat calls both, thinking and effort. Without a word about either, the model does as it does."""
    thinking, effort = request.thinking, request.output_config.effort if request.output_config else None
    if isinstance(thinking, asked.ThinkingDisabled):
        return "none"
    if can_think:
        if effort is None:
            return "high" if thinking is not None else None  # Anthropic's effort where none is named
        return effort
    why = "The served model does not think before it answers; leave it out"
    if isinstance(thinking, asked.ThinkingEnabled):
        message = f"Unsupported parameter: 'thinking'. {why}, or send the type 'disabled' or 'adaptive'."
        raise UnsupportedParameter(message, param="thinking")
    if effort not in (None, "high"):
        message = f"Unsupported parameter: 'output_config.effort'. {why}, or send 'high', which asks for nothing."
        raise UnsupportedParameter(message, param="output_config.effort")
    return None


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, own in names.items():
        if name == theirs or name.startswith((f"{theirs}.", f"{theirs}[")):
            return own + name[len(theirs) :]
    return name
