"""POST /tokenize and /detokenize, as vLLM has them: what a prompt is in tokens, and back.

A text is encoded as /v1/completions encodes it, messages as /v1/chat/completions does, so the count is the one that a
request would be charged with. Nothing goes to the ring. No longer text or list is taken than a request could use.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.completions.logprobs import token_name
from api.completions.prompts import check_ids, text_ids
from api.delivery import receive
from api.errors import ContextLengthExceeded
from api.schemas.chat import ChatCompletionRequest
from api.schemas.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from api.service import Service, service_of

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    service = service_of(request)
    asked, headers = await receive(request, TokenizeRequest, service)
    service.check_model(asked.model or service.settings.model_name)
    body = await asyncio.to_thread(lambda: _tokenized(asked, service).to_json())
    return Response(body, media_type="application/json", headers=headers)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    service = service_of(request)
    asked, headers = await receive(request, DetokenizeRequest, service)
    service.check_model(asked.model or service.settings.model_name)
    body = await asyncio.to_thread(lambda: _detokenized(asked, service).to_json())
    return Response(body, media_type="application/json", headers=headers)


def _tokenized(asked: TokenizeRequest, service: Service) -> TokenizeResponse:
    tokenizer, ready = service.supervisor.accepting()
    if asked.messages is not None:
        chat = ChatCompletionRequest(
            model=service.settings.model_name,
            messages=asked.messages,
            tools=asked.tools,
            chat_template_kwargs=asked.chat_template_kwargs,
        )
        token_ids = service.chat_prompt(chat).token_ids
    else:
        special = asked.add_special_tokens is not False
        token_ids = text_ids(asked.prompt or "", tokenizer, ready, "prompt", add_special_tokens=special)
    names = [token_name(*tokenizer.token_text(token_id)) for token_id in token_ids] if asked.return_token_strs else None
    return TokenizeResponse(
        count=len(token_ids), max_model_len=ready.max_sequence_length, tokens=token_ids, token_strs=names
    )


def _detokenized(asked: DetokenizeRequest, service: Service) -> DetokenizeResponse:
    tokenizer, ready = service.supervisor.accepting()
    if len(asked.tokens) > ready.max_sequence_length:
        raise ContextLengthExceeded(
            f"'tokens' has {len(asked.tokens)} ids; the model's context holds {ready.max_sequence_length}.",
            param="tokens",
        )
    check_ids(asked.tokens, ready, "tokens")
    return DetokenizeResponse(prompt=tokenizer.decode(asked.tokens))
