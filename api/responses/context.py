"""What a response is made from: the conversation before it, as it is stored, and the request's own items.

It finds what a request refers to and says which field of the request an item came from. It makes no prompt: that is
`api.responses.translation`. Called by the routes of /v1/responses.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import TypeAdapter

from api.errors import InvalidRequest
from api.responses.store import ResponseStore, StoredItem
from api.schemas.response_items import (
    AssistantMessage,
    FunctionCall,
    FunctionCallOutput,
    InputMessage,
    Item,
    ItemReference,
    Reasoning,
    ReceivedItem,
)
from api.schemas.responses import ContextFields

AnyItem = InputMessage | AssistantMessage | FunctionCall | FunctionCallOutput | Reasoning

_stored: TypeAdapter[AnyItem] = TypeAdapter(Item)
MAX_REFERENCES = 256  # of one request to stored items; each is read and parsed
_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


@dataclass(frozen=True)
class ContextItem:
    """`source`: the field of the request it came from, as errors name it."""

    item: AnyItem
    source: str
    stored: StoredItem

    @property
    def begins_a_turn(self) -> bool:
        return isinstance(self.item, InputMessage) and self.item.role == "user"

    @property
    def instructs(self) -> bool:
        return isinstance(self.item, InputMessage) and self.item.role != "user"


async def context_of(request: ContextFields, store: ResponseStore, owner: str | None) -> list[ContextItem]:
    """The items of the conversation so far, then the request's. Raises InvalidRequest for what is not there."""
    earlier: list[StoredItem] = []
    if request.previous_response_id is not None:
        found = await store.items(owner, request.previous_response_id, with_output=True)
        if found is None:
            raise InvalidRequest(
                f"Previous response with id '{request.previous_response_id}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        earlier = found
    referred = {
        place: await _referred(item.id, f"input[{place}]", store, owner) for place, item in _references(request.items)
    }
    items = await asyncio.to_thread(_context, request, earlier, referred)
    if not items:
        raise InvalidRequest("Missing required parameter: 'input'.", param="input", code="missing_required_parameter")
    return items


def _references(items: Sequence[ReceivedItem]) -> list[tuple[int, ItemReference]]:
    """With their places. Raises InvalidRequest for more than one to an item, or too many."""
    references = [(place, item) for place, item in enumerate(items) if isinstance(item, ItemReference)]
    known: set[str] = set()
    for place, item in references:
        param = f"input[{place}].id"
        if item.id in known:
            message = f"Invalid '{param}': the item '{item.id}' is referred to twice."
            raise InvalidRequest(message, param=param, code="invalid_value")
        if len(known) == MAX_REFERENCES:
            message = f"Invalid '{param}': more than {MAX_REFERENCES} items are referred to."
            raise InvalidRequest(message, param=param, code="array_above_max_length")
        known.add(item.id)
    return references


async def _referred(item_id: str, source: str, store: ResponseStore, owner: str | None) -> StoredItem:
    stored = await store.item(owner, item_id)
    if stored is None:
        message = f"Item with id '{item_id}' not found."
        raise InvalidRequest(message, param=f"{source}.id", code="item_not_found")
    return stored


def _context(
    request: ContextFields, earlier: Sequence[StoredItem], referred: Mapping[int, StoredItem]
) -> list[ContextItem]:
    """`referred`: items that stand at these places of the input. In a thread: a conversation may be long."""
    items = [_read(stored, "previous_response_id") for stored in earlier]
    taken = {stored.id for stored in earlier}
    for place, item in enumerate(request.items):
        source = "input" if isinstance(request.input, str) else f"input[{place}]"
        if isinstance(item, ItemReference):
            context = _read(referred[place], source)
        else:
            context = ContextItem(item, source, _to_store(item))
        if context.stored.id in taken:
            context = replace(context, stored=_as_another(context))
        taken.add(context.stored.id)
        items.append(context)
    return items


def later_turns(items: Sequence[ContextItem]) -> list[int]:
    """Where the context may begin instead: at later messages of the user that part no call from its output."""
    called: dict[str, int] = {}
    begun = [0] * (len(items) + 1)  # calls whose outputs are still to come, as changes from place to place
    for place, context in enumerate(items):
        match context.item:
            case FunctionCall(call_id=call_id):
                called[call_id] = place
            case FunctionCallOutput(call_id=call_id) if call_id in called:
                begun[called[call_id] + 1] += 1
                begun[place + 1] -= 1
    num_open = itertools.accumulate(begun)
    return [
        place
        for place, (item, parted) in enumerate(zip(items, num_open))
        if item.begins_a_turn and place and not parted
    ]


def from_turn(items: Sequence[ContextItem], start: int) -> list[ContextItem]:
    """The context without what was said before `start`; what instructs the model stays."""
    return [item for item in items[:start] if item.instructs] + list(items[start:])


def _read(stored: StoredItem, source: str) -> ContextItem:
    return ContextItem(_stored.validate_json(stored.body), source, stored)


def _to_store(item: AnyItem) -> StoredItem:
    """As OpenAI lists input items: with an id, a status, and content as parts."""
    form: dict[str, Any] = item.model_dump(mode="json", by_alias=True, exclude_none=True)
    form.setdefault("id", _new_id(item))
    form.setdefault("status", "completed")
    if isinstance(form.get("content"), str):
        form["content"] = [{"type": "input_text", "text": form["content"]}]
    if isinstance(item, AssistantMessage):
        form["content"] = [_said(part) for part in form["content"]]
    return StoredItem(cast(str, form["id"]), json.dumps(form, ensure_ascii=False))


def _as_another(context: ContextItem) -> StoredItem:
    """What is in the conversation already, or has the id of what is, once more: a list is read on from an id."""
    form = {**json.loads(context.stored.body), "id": _new_id(context.item)}
    return StoredItem(form["id"], json.dumps(form, ensure_ascii=False))


def _new_id(item: AnyItem) -> str:
    return f"{_ID_PREFIXES[item.type]}_{secrets.token_hex(24)}"


def _said(part: dict[str, Any]) -> dict[str, Any]:
    """A part of an assistant's message with all that one of an answer has, whatever its client left out of it."""
    if part["type"] == "refusal":
        return part
    return {"annotations": [], "logprobs": [], **part, "type": "output_text"}
