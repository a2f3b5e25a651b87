"""POST /v1/completions, as one answer or as a stream: raw prompts, without messages and without a template.

The same walk as a chat's: body, schema, prompt ids, the engine, and back as text in OpenAI's words, which
`api.completions.format` writes.
"""

from __future__ import annotations

import secrets

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.caller import caller_of
from api.completions.format import CompletionFormat
from api.delivery import counting_refusals, deliver_stream, deliver_whole, receive
from api.schemas.completions import CompletionRequest
from api.service import service_of

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    service = service_of(request)
    with counting_refusals(service):
        completion, headers = await receive(request, CompletionRequest, service)
        caller = caller_of(request, user=completion.user)
        answer = await service.complete(completion, caller, f"cmpl-{secrets.token_hex(16)}")
    tokenizer = service.supervisor.tokenizer
    assert tokenizer is not None  # the request was accepted
    answer_format = CompletionFormat(completion, answer, tokenizer)
    if completion.stream:
        return await deliver_stream(request, service, answer, answer_format.events(), caller, headers)
    return await deliver_whole(request, service, answer, answer_format.whole, caller, headers)
