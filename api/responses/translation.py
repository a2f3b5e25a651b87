"""A request of /v1/responses as the chat it comes to, so that everything a chat checks and does exists once.

Plain data in, plain data out; what cannot be said as a chat is refused here. Errors of the chat are told in the words
of this endpoint: `in_own_words` gives back the names of the client's fields.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from api.errors import ApiError, InvalidRequest
from api.output.deltas import BETWEEN_MESSAGES
from api.responses.context import ContextItem
from api.schemas.chat import ChatCompletionRequest
from api.schemas.response_items import AssistantMessage, FunctionCall, FunctionCallOutput, InputMessage, Reasoning
from api.schemas.responses import (
    AllowedFunctions,
    ContextFields,
    FunctionTool,
    InputTokensRequest,
    JsonSchemaFormat,
    NamedFunction,
    ResponseRequest,
    TextConfig,
    ToolChoice,
)
from api.validation import validate

_ENCRYPTED_PREFIX = "plain."  # nothing is hidden from a client that is given the reasoning itself
_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^messages$", "input"),
        (r"^max_(completion_)?tokens$", "max_output_tokens"),
        (r"^response_format\.json_schema\b", "text.format"),
        (r"^response_format\b", "text.format"),
        (r"^reasoning_effort$", "reasoning.effort"),
        (r"^(tools\[\d+\])\.function\b", r"\1"),
        (r"^tool_choice\.allowed_tools\b", "tool_choice"),
        (r"^(tool_choice(?:\.tools\[\d+\])?)\.function\b", r"\1"),
    )
]


@dataclass(frozen=True)
class Chat:
    """`sources`: for each message, the field of the client's request that it came from."""

    request: ChatCompletionRequest
    sources: Sequence[str]

    @contextlib.contextmanager
    def in_own_words(self) -> Iterator[None]:
        """Around what is done with the chat: an error that leaves names the client's field."""
        with _in_own_words(self.sources):
            yield


def chat_of(request: ResponseRequest | InputTokensRequest, items: Sequence[ContextItem], model: str) -> Chat:
    """Raises InvalidRequest, in the words of this endpoint."""
    messages = _Messages()
    if request.instructions is not None:
        messages.add({"role": "system", "content": request.instructions}, "instructions")
    for item in items:
        messages.add_item(item)
    messages.end_reasoning()
    fields = {"model": model, "messages": messages.messages, **_prompt_fields(request)}
    if isinstance(request, ResponseRequest):
        fields |= {
            "max_completion_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "logprobs": request.wants_logprobs,
            "top_logprobs": request.top_logprobs if request.wants_logprobs else None,
        }
    with _in_own_words(messages.sources):
        chat, _ = validate(ChatCompletionRequest, fields, "reject")
    return Chat(chat, messages.sources)


def encrypted_reasoning(text: str) -> str:
    """Reasoning as one word that clients carry without looking into it."""
    return _ENCRYPTED_PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


@contextlib.contextmanager
def _in_own_words(sources: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        if error.param is not None:
            theirs, ours = error.param, _own_name(error.param, sources)
            error.param, error.message = ours, error.message.replace(f"'{theirs}'", f"'{ours}'")
        raise


def _own_name(param: str, sources: Sequence[str]) -> str:
    if of_message := re.match(r"messages\[(\d+)\]", param):
        return sources[int(of_message[1])]
    for pattern, name in _RENAMED:
        param = pattern.sub(name, param)
    return param


# -- messages --------------------------------------------------------------------------------------------------------


class _Messages:
    """What a chat has in one message, reasoning, text and calls, are items of their own here."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.sources: list[str] = []
        self._reasoning = ""  # that the next assistant message is to have
        self._reasoning_source = ""
        self._call_ids: set[str] = set()

    def add(self, message: dict[str, Any], source: str) -> None:
        if message["role"] == "assistant" and self._reasoning:
            message["reasoning_content"] = self._reasoning
            self._reasoning = ""
        self.end_reasoning()
        self.messages.append(message)
        self.sources.append(source)

    def add_item(self, context: ContextItem) -> None:
        source = context.source
        match context.item:
            case InputMessage() | AssistantMessage() as message:
                self.add({"role": message.role, "content": message.text}, source)
            case FunctionCall() as call:
                self._call_ids.add(call.call_id)
                self._add_call(call, source)
            case FunctionCallOutput() as output:
                if output.call_id not in self._call_ids:
                    text = f"No tool call found for function call output with call_id {output.call_id}."
                    raise InvalidRequest(text, param=source, code="invalid_value")
                self.add({"role": "tool", "tool_call_id": output.call_id, "content": output.text}, source)
            case Reasoning() as reasoning:
                self._reasoning += _reasoning_text(reasoning, source)
                self._reasoning_source = source

    def end_reasoning(self) -> None:
        """Reasoning that no answer followed, because it was cut, is a message of its own."""
        if self._reasoning:
            text, self._reasoning = self._reasoning, ""
            self.messages.append({"role": "assistant", "content": "", "reasoning_content": text})
            self.sources.append(self._reasoning_source)

    def _add_call(self, call: FunctionCall, source: str) -> None:
        """A call belongs to the assistant's message or calls before it, and so does what was thought between them."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant":
            last = {"role": "assistant", "content": None}
            self.add(last, source)
        elif self._reasoning:
            before = last.get("reasoning_content")
            last["reasoning_content"] = BETWEEN_MESSAGES.join(filter(None, [before, self._reasoning]))
            self._reasoning = ""
        function = {"name": call.name, "arguments": call.arguments}
        last.setdefault("tool_calls", []).append({"id": call.call_id, "type": "function", "function": function})


def _reasoning_text(reasoning: Reasoning, source: str) -> str:
    if reasoning.content:
        return "".join(part.text for part in reasoning.content)
    if reasoning.encrypted_content:
        return _decrypted(reasoning.encrypted_content, f"{source}.encrypted_content")
    return "\n\n".join(part.text for part in reasoning.summary)


def _decrypted(word: str, param: str) -> str:
    try:
        if not word.startswith(_ENCRYPTED_PREFIX):
            raise ValueError
        return base64.b64decode(word.removeprefix(_ENCRYPTED_PREFIX), altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        message = f"The encrypted content in '{param}' could not be verified: it was not made by this server."
        raise InvalidRequest(message, param=param, code="invalid_encrypted_content") from None


# -- the other fields ------------------------------------------------------------------------------------------------


def _prompt_fields(request: ContextFields) -> dict[str, Any]:
    return {
        "response_format": _response_format(request.text),
        "tools": [_tool(tool) for tool in request.tools] if request.tools is not None else None,
        "tool_choice": _tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": request.reasoning.effort if request.reasoning is not None else None,
    }


def _tool(tool: FunctionTool) -> dict[str, Any]:
    described = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": described}


def _tool_choice(choice: ToolChoice | None) -> Any:
    match choice:
        case NamedFunction(name=name):
            return {"type": "function", "function": {"name": name}}
        case AllowedFunctions(mode=mode, tools=tools):
            named = [{"type": "function", "function": {"name": tool.name}} for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        case _:
            return choice


def _response_format(text: TextConfig | None) -> Any:
    match text and text.format:
        case None:
            return None
        case JsonSchemaFormat() as schema:
            described = schema.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
            return {"type": "json_schema", "json_schema": described}
        case other:
            return {"type": other.type}
