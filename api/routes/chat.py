"""POST /v1/chat/completions, as one answer or as a stream.

The walk of a request: body, schema, prompt ids, the engine, and back as text in OpenAI's words, which `api.chat.format`
writes.
"""

from __future__ import annotations

import secrets

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.caller import caller_of
from api.chat.format import ChatFormat
from api.delivery import counting_refusals, deliver_stream, deliver_whole, receive
from api.schemas.chat import ChatCompletionRequest
from api.service import service_of

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    service = service_of(request)
    with counting_refusals(service):
        chat, headers = await receive(request, ChatCompletionRequest, service)
        caller = caller_of(request, user=chat.user, safety_identifier=chat.safety_identifier)
        answer = await service.chat(chat, caller, f"chatcmpl-{secrets.token_hex(16)}")
    answer_format = ChatFormat(chat, answer, service.token_text)
    if chat.stream:
        return await deliver_stream(request, service, answer, answer_format.events(), caller, headers)
    return await deliver_whole(request, service, answer, answer_format.whole, caller, headers)
