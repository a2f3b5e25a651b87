"""POST /v1/responses, and what can be done with responses that are stored.

The walk of a request: body, schema, the conversation it goes on with, a chat, the engine, and back in the words of this
endpoint, which `api.responses` holds.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import secrets
from collections.abc import Sequence
from typing import TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.caller import caller_of
from api.delivery import counting_refusals, deliver_stream, deliver_whole, receive
from api.errors import ContextLengthExceeded, InvalidRequest, ResponseNotFound, UnsupportedParameter
from api.responses.context import ContextItem, context_of, from_turn, later_turns
from api.responses.response_format import ResponseFormat
from api.responses.store import ResponseStore, StoredItem, StoredResponse
from api.responses.translation import Chat, chat_of
from api.schemas import response_answer as answers
from api.schemas.base import Received, Sent
from api.schemas.responses import InputItemsQuery, InputTokensRequest, ResponseRequest, RetrieveQuery
from api.service import Service, service_of
from api.validation import validate

router = APIRouter()
Query = TypeVar("Query", bound=Received)


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    service, store = service_of(request), store_of(request)
    with counting_refusals(service):
        asked, headers = await receive(request, ResponseRequest, service)
        if asked.store and not store.keeps_any:
            raise UnsupportedParameter("'store' cannot be true: this server stores nothing.", param="store")
        caller = caller_of(request, user=asked.user, safety_identifier=asked.safety_identifier)
        context = await context_of(asked, store, caller.label)
        chat = await asyncio.to_thread(_fitting_chat, asked, context, asked.model, service)
        with chat.in_own_words():
            answer = await service.chat(chat.request, caller, f"resp_{secrets.token_hex(24)}")

    def save(response: answers.Response) -> None:
        store.save(caller.label, _to_store(response, context))

    is_stored = store.keeps_any and asked.store is not False
    response = ResponseFormat(asked, answer, service.token_text, save if is_stored else None)
    if asked.stream:
        events = response.events()
        return await deliver_stream(request, service, answer, events, caller, headers, response.error_event)
    return await deliver_whole(request, service, answer, response.whole, caller, headers, response.run)


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request) -> Response:
    service = service_of(request)
    asked, headers = await receive(request, InputTokensRequest, service)
    model = asked.model or service.settings.model_name
    service.check_model(model)
    context = await context_of(asked, store_of(request), caller_of(request).label)

    def count() -> int:
        chat = _fitting_chat(asked, context, model, service)
        with chat.in_own_words():
            return len(service.chat_prompt(chat.request).token_ids)

    counted = answers.InputTokens(object="response.input_tokens", input_tokens=await asyncio.to_thread(count))
    return _json(counted, headers)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(request: Request, response_id: str) -> Response:
    _query(request, RetrieveQuery)
    body = await store_of(request).body(caller_of(request).label, response_id)
    if body is None:
        raise _not_found(response_id)
    return Response(body, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> Response:
    if not await store_of(request).delete(caller_of(request).label, response_id):
        raise _not_found(response_id)
    return _json(answers.DeletedResponse(id=response_id, object="response.deleted", deleted=True))


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(request: Request, response_id: str) -> Response:
    query = _query(request, InputItemsQuery)
    items = await store_of(request).items(caller_of(request).label, response_id, with_output=False)
    if items is None:
        raise _not_found(response_id)
    return _json(_page(items, query))


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    if await store_of(request).body(caller_of(request).label, response_id) is None:
        raise _not_found(response_id)
    raise InvalidRequest("Cannot cancel a synchronous response.")  # there are no others: `background` is refused


def store_of(request: Request) -> ResponseStore:
    return request.app.state.response_store


# -- the prompt ------------------------------------------------------------------------------------------------------


def _fitting_chat(
    asked: ResponseRequest | InputTokensRequest, context: Sequence[ContextItem], model: str, service: Service
) -> Chat:
    """The chat of the whole context or, with `truncation: auto`, of as many of its last turns as fit. In a thread."""
    whole = chat_of(asked, context, model)
    if asked.truncation != "auto" or _fits(whole, service):
        return whole
    turns = later_turns(context)

    def chat_from(start: int) -> Chat:
        return chat_of(asked, from_turn(context, start), model)

    first = bisect.bisect_left(turns, True, key=lambda start: _fits(chat_from(start), service))
    return chat_from(turns[min(first, len(turns) - 1)]) if turns else whole  # what never fits is refused later


def _fits(chat: Chat, service: Service) -> bool:
    _, ready = service.supervisor.accepting()
    try:
        with chat.in_own_words():
            prompt = service.chat_prompt(chat.request)
    except ContextLengthExceeded:
        return False
    return len(prompt.token_ids) + (chat.request.token_limit or 1) <= ready.max_sequence_length


# -- the store -------------------------------------------------------------------------------------------------------


def _to_store(response: answers.Response, context: Sequence[ContextItem]) -> StoredResponse:
    output = [StoredItem(item.id, item.to_json()) for item in response.output]
    return StoredResponse(response.id, response.to_json(), [item.stored for item in context], output)


def _page(items: list[StoredItem], query: InputItemsQuery) -> answers.ItemList:
    if query.order == "desc":
        items = items[::-1]
    if query.after is not None:
        ids = [item.id for item in items]
        if query.after not in ids:
            raise InvalidRequest(f"Item with id '{query.after}' not found.", param="after", code="invalid_value")
        items = items[ids.index(query.after) + 1 :]
    page = items[: query.limit]
    return answers.ItemList(
        object="list",
        data=[json.loads(item.body) for item in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(items) > len(page),
    )


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id '{response_id}' not found.", param="response_id")


def _query(request: Request, schema: type[Query]) -> Query:
    """The query's parameters; lists as OpenAI's clients write them (`include[]=…`, `include[0]=…`) or repeated."""
    fields: dict[str, str | list[str]] = {}
    for name, value in request.query_params.multi_items():
        if name.partition("[")[0] == "include":
            fields["include"] = [*fields.get("include", []), value]
        else:
            fields[name] = value
    query, _ = validate(schema, fields, "reject", setting_decides=False)
    return query


def _json(body: Sent, headers: dict[str, str] | None = None) -> Response:
    return Response(body.to_json(), media_type="application/json", headers=headers)
