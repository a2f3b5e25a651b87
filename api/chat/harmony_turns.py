"""The messages of a request as gpt-oss's chat template takes them: one call a turn, with its results right behind it.

That template shows the first call of a turn and drops the others, takes a result's name from the call before it, has
a place for instructions at the beginning alone, and one for either text or reasoning before a call. So turns are split
and joined here until nothing of them is lost. Pure; called by `api.chat.prompt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from api.chat.template import ChatTemplate
from api.chat.turns import INSTRUCTING, Turn, native_turns, with_placed_instructions
from api.errors import InvalidRequest
from api.output.deltas import BETWEEN_MESSAGES
from api.output.tool_format import result_text
from api.schemas.chat import Message

# For each call the template looks at all turns behind it. So many take a second or two: 1,500 calls with their results.
_MAX_LOOKS = 5_000_000


def harmony_turns(messages: Sequence[Message], template: ChatTemplate) -> list[Turn]:
    """Raises InvalidRequest for a conversation with so many calls that the template takes too long."""
    turns = with_placed_instructions(native_turns(messages, template), template)
    begin = list(takewhile(lambda turn: turn["role"] in INSTRUCTING, turns))
    said = list(_said(turns[len(begin) :]))
    num_calls = sum("tool_calls" in turn for turn in said)
    if num_calls * len(said) > _MAX_LOOKS:
        raise InvalidRequest(
            f"The conversation has {num_calls} calls of tools in {len(said)} turns, and the served model's chat "
            "template takes too long for so many: leave out the oldest.",
            param="messages",
            code="array_above_max_length",
        )
    return [*begin, *said]


def _said(turns: Sequence[Turn]) -> Iterator[Turn]:
    """What follows the instructions."""
    groups: list[list[Turn]] = []  # a turn, and the results behind it
    for turn in turns:
        if turn["role"] == "tool" and groups:
            groups[-1].append(turn)
        else:
            groups.append([turn])
    for group in groups:
        calls = group[0].get("tool_calls", ())
        results: dict[str, list[Turn]] = {}
        for turn in group:
            if turn["role"] == "tool":
                results.setdefault(turn["tool_call_id"], []).append(turn)
            elif not calls and not _is_silent(turn):
                yield turn
        for number, call in enumerate(calls):
            yield _calling(group[0], call, is_first=number == 0)
            yield from results.pop(call["id"], ())
        for of_other_call in results.values():  # one that is not in front of it, so it goes by no name
            yield from ({"role": "user", "content": result_text(result["content"])} for result in of_other_call)


def _is_silent(turn: Turn) -> bool:
    """An answer that was cut while it reasoned. The template would show an empty one, and take it for a final one."""
    return turn["role"] == "assistant" and not turn["content"]


def _calling(turn: Turn, call: dict[str, Any], *, is_first: bool) -> Turn:
    """A turn of one call. What was thought and said before the calls goes with the first, as its reasoning."""
    before = [turn.get("reasoning_content"), turn["content"]] if is_first else []
    made: Turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    if thoughts := BETWEEN_MESSAGES.join(filter(None, before)):
        made["thinking"] = thoughts
    return made
