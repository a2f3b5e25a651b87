"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's own API.

The walk of a request is that of /v1/chat/completions with a translation on both sides: `api.messages.request` makes a
chat of it, `api.messages.format` writes the answer.
"""

from __future__ import annotations

import asyncio
import secrets

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.caller import caller_of
from api.delivery import counting_refusals, deliver_stream, deliver_whole, receive
from api.errors import ApiError, InvalidRequest
from api.messages.format import PING, MessagesFormat, error_event
from api.messages.request import Translation, translate
from api.schemas.anthropic import CountTokensRequest, MessagesRequest
from api.schemas.anthropic_answer import TokenCount
from api.service import Service, service_of
from api.validation import MAX_IGNORED_FIELDS

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    service = service_of(request)
    with counting_refusals(service):
        asked, headers = await receive(request, MessagesRequest, service)
        translation = await asyncio.to_thread(_translated, asked, service, headers)
        caller = caller_of(request, user_id=asked.metadata.user_id if asked.metadata else None)
        try:
            answer = await service.chat(translation.chat, caller, f"msg_{secrets.token_hex(16)}", may_shrink=True)
        except ApiError as error:
            raise translation.in_own_words(error) from error
    request_id = headers["request-id"] = request.state.request_id
    answer_format = MessagesFormat(asked, answer)
    if asked.stream:
        events = answer_format.events()
        return await deliver_stream(request, service, answer, events, caller, headers, error_event(request_id), PING)
    return await deliver_whole(request, service, answer, answer_format.whole, caller, headers)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    service = service_of(request)
    asked, headers = await receive(request, CountTokensRequest, service)
    translation = await asyncio.to_thread(_translated, asked, service, headers)
    try:
        prompt = await asyncio.to_thread(service.chat_prompt, translation.chat)
    except ApiError as error:
        raise translation.in_own_words(error) from error
    headers["request-id"] = request.state.request_id
    count = TokenCount(input_tokens=len(prompt.token_ids))
    return Response(count.to_json(), media_type="application/json", headers=headers)


def _translated(asked: CountTokensRequest, service: Service, headers: dict[str, str]) -> Translation:
    """The chat; what it gives up is named in `headers`, beside the unknown fields where those are let pass."""
    service.check_model(asked.model)
    tokenizer, _ = service.supervisor.accepting()
    can_think = tokenizer.template.can_think or tokenizer.template.takes("reasoning_effort")
    try:
        translation = translate(asked, can_think=can_think)
    except RecursionError:  # an input of a tool, written out
        raise InvalidRequest("The request is nested too deeply to be written into a prompt.") from None
    names = [*filter(None, [headers.get("x-ignored-fields")]), *translation.ignored[:MAX_IGNORED_FIELDS]]
    if names:
        headers["x-ignored-fields"] = ", ".join(names)
    return translation
