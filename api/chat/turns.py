"""The messages of a request as a chat template gets them, its turns.

Where the template has a place for tools they go in as they are. Where it has none, or a grammar enforces another form,
calls and results are written into ordinary turns, in the generic format: so a conversation with tools works with every
template. Pure functions; called by `api.chat.prompt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from api.chat.template import ChatTemplate
from api.output.tool_format import call_text, offer_text, result_text
from api.schemas.chat import AssistantMessage, DeveloperMessage, Message, ToolCall, ToolMessage

Turn = dict[str, Any]

INSTRUCTING = ("system", "developer")
BETWEEN_INSTRUCTIONS = "\n\n"


def native_turns(messages: Sequence[Message], template: ChatTemplate, *, short_ids: bool = False) -> list[Turn]:
    """For a template that has a place for calls and results; with `short_ids` one that insists on 9 characters."""
    turns = []
    for message in _in_call_order(messages):
        turn = _turn(message, template)
        if isinstance(message, ToolMessage):
            turn["tool_call_id"] = message.tool_call_id
        if isinstance(message, AssistantMessage) and message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": _arguments(call)},
                }
                for call in message.tool_calls
            ]
        turns.append(turn)
    if short_ids:
        _shorten_ids(turns)
    return turns


def generic_turns(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[dict[str, Any]]) -> list[Turn]:
    """For any template: calls and results are text, and so is the offer of `tools`."""
    turns: list[Turn] = []
    follows_result = False
    for message in _in_call_order(messages):
        is_result = isinstance(message, ToolMessage)
        turn = _turn(message, template)
        if is_result:
            turn = {"role": "user", "content": result_text(message.text)}
        if isinstance(message, AssistantMessage) and message.tool_calls:
            calls = [call_text(call.function.name, _arguments(call)) for call in message.tool_calls]
            turn["content"] = "\n".join([message.text, *calls] if message.text else calls)
        # Many templates insist that user and assistant take turns.
        if turns and turns[-1]["role"] == turn["role"] == "user" and (is_result or follows_result):
            turns[-1]["content"] += "\n" + turn["content"]
        else:
            turns.append(turn)
        follows_result = is_result
    turns = with_placed_instructions(turns, template)
    if tools:
        _offer(turns, offer_text(tools), template)
    return turns


def with_placed_instructions(turns: list[Turn], template: ChatTemplate) -> list[Turn]:
    """Instructions where the template has a place for them.

    Where it takes one turn of them alone, those at the beginning are one: agents send several, `instructions` of a
    response beside a developer's message, a system's beside a developer's. Where it takes none behind the beginning,
    later ones are the user's: Claude Code sends one behind the first question, Codex where a setting changes. They
    keep their place, so that the prompt of the next request begins as this one does.
    """
    begin = list(takewhile(lambda turn: turn["role"] in INSTRUCTING, turns))
    rest = turns[len(begin) :]
    if len(begin) > 1 and not template.takes_several_systems:
        begin = [{**begin[0], "content": BETWEEN_INSTRUCTIONS.join(turn["content"] for turn in begin)}]
    if any(turn["role"] in INSTRUCTING for turn in rest) and not template.takes_late_system:
        rest = _instructed_by_the_user(rest)
    return [*begin, *rest]


def _instructed_by_the_user(turns: Sequence[Turn]) -> list[Turn]:
    """Instructions as the user's words, in one turn with those around them: many templates insist that user and
    assistant take turns."""
    made: list[Turn] = []
    follows_instructions = False
    for turn in turns:
        instructs = turn["role"] in INSTRUCTING
        said: Turn = {"role": "user", "content": turn["content"]} if instructs else turn
        if made and made[-1]["role"] == said["role"] == "user" and (instructs or follows_instructions):
            content = made[-1]["content"] + BETWEEN_INSTRUCTIONS + said["content"]
            made[-1] = {**made[-1], "content": content}
        else:
            made.append(said)
        follows_instructions = instructs
    return made


def _turn(message: Message, template: ChatTemplate) -> Turn:
    role: str = message.role
    if isinstance(message, DeveloperMessage) and not template.names("developer"):
        role = "system"
    turn: Turn = {"role": role, "content": message.text}
    if message.name:
        turn["name"] = message.name
    if isinstance(message, AssistantMessage) and message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    return turn


def _offer(turns: list[Turn], text: str, template: ChatTemplate) -> None:
    """Put the offer of tools where the model reads it first."""
    if turns[0]["role"] in INSTRUCTING:
        turns[0]["content"] += BETWEEN_INSTRUCTIONS + text
    elif template.takes_system:
        turns.insert(0, {"role": "system", "content": text})
    else:
        first_user = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        first_user["content"] = f"{text}\n\n{first_user['content']}"


def _in_call_order(messages: Sequence[Message]) -> Iterator[Message]:
    """Results in the order of their calls: clients that run calls side by side send them as they come, and templates
    and models know results by their order."""
    order: dict[str, int] = {}
    results: list[ToolMessage] = []
    for message in messages:
        if isinstance(message, ToolMessage):
            results.append(message)
            continue
        yield from sorted(results, key=lambda result: order.get(result.tool_call_id, len(order)))
        results = []
        if isinstance(message, AssistantMessage) and message.tool_calls:
            order = {call.id: place for place, call in enumerate(message.tool_calls)}
        yield message
    yield from sorted(results, key=lambda result: order.get(result.tool_call_id, len(order)))


def _arguments(call: ToolCall) -> Any:
    """As chat templates expect them: an object."""
    text = call.function.arguments
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text  # a model may write what is no JSON; the template sees the text


def _shorten_ids(turns: list[Turn]) -> None:
    """Give every call an id of 9 digits, by its place; its result gets the same."""
    ids: dict[str, str] = {}
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            call["id"] = ids.setdefault(call["id"], f"{len(ids):09}")
        if "tool_call_id" in turn:
            turn["tool_call_id"] = ids.setdefault(turn["tool_call_id"], f"{len(ids):09}")
