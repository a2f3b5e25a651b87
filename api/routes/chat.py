"""POST /v1/chat/completions, as one answer or as a stream.

The walk of a request: body, schema, model, prompt ids, the engine, and back as text. A client that leaves at any point,
streaming or not, takes its request off the ring. One line in the log for each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api.body import read_json_body
from api.completion import Completion
from api.errors import ApiError, http_status
from api.metrics import RequestMetrics
from api.schemas import ChatCompletionChunk, ChatCompletionRequest
from api.service import Service, service_of
from api.sse import DONE, EventStream, error_event, event
from api.validation import parse_request

logger = logging.getLogger(__name__)
router = APIRouter()
T = TypeVar("T")

MAX_LOGGED = 64  # characters of a client's word that the log repeats


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    service = service_of(request)
    metrics = service.engine.metrics
    try:
        chat, completion, headers = await _accept(request, service)
    except ApiError as error:
        metrics.failed(http_status(error))
        raise
    sender = _sender(getattr(request.state, "api_key_label", None), chat)
    if not chat.stream:
        try:
            answer = await _unless_the_client_leaves(request, completion.whole())
        finally:
            _log(completion, sender)
            _count(completion, metrics)
        return Response(answer.to_json(), media_type="application/json", headers=headers)

    chunks = completion.chunks()

    async def end() -> None:
        await chunks.aclose()
        _log(completion, sender)
        _count(completion, metrics)

    try:
        # What goes wrong before the first token still becomes an HTTP status.
        first = await _unless_the_client_leaves(request, anext(chunks))
    except BaseException:
        await end()
        raise
    return EventStream(_events(first, chunks), end, headers)


async def _accept(request: Request, service: Service) -> tuple[ChatCompletionRequest, Completion, dict[str, str]]:
    """The request, its running completion and headers for the answer. Raises ApiError for what is refused."""
    body = await read_json_body(request, service.settings.max_body_bytes)
    chat, ignored = await parse_request(ChatCompletionRequest, body, service.settings.unknown_fields)
    service.check_model(chat.model)
    generation, tokenizer = await service.prepare(chat)
    service.engine.submit(generation)
    headers = {}
    if ignored:
        logger.warning("%s: ignored unknown fields: %s", generation.request_id, ", ".join(ignored))
        headers["x-ignored-fields"] = ", ".join(ignored).encode("ascii", "backslashreplace").decode()
    return chat, Completion(chat, generation, tokenizer, service.engine), headers


async def _events(
    first: ChatCompletionChunk, others: AsyncGenerator[ChatCompletionChunk, None]
) -> AsyncIterator[bytes]:
    yield event(first)
    try:
        async for chunk in others:
            yield event(chunk)
        yield DONE
    except ApiError as error:
        yield error_event(error)


async def _unless_the_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection. Raises ClientDisconnect then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sender(label: str | None, chat: ChatCompletionRequest) -> str:
    """For the log. What the client says is in quotes and escaped, so it cannot make a line of its own."""
    said = {"user": chat.user, "safety_identifier": chat.safety_identifier}
    words = [f" {name}={value[:MAX_LOGGED]!r}" for name, value in said.items() if value]
    return "".join([f" key={label}" if label else "", *words])


def _log(completion: Completion, sender: str) -> None:
    """The one line of a request."""
    performance, generation = completion.performance, completion.generation
    outcome = completion.finish_reason or "none, the client left"
    if completion.failure is not None:
        outcome = f"none, {completion.failure.message}"
    logger.info(
        "%s model=%s%s prompt_tokens=%d completion_tokens=%d time_to_first_token=%.3fs tokens_per_second=%.2f "
        "total_time=%.3fs finish_reason=%s",
        generation.request_id,
        completion.model,
        sender,
        len(generation.prompt_token_ids),
        completion.completion_tokens,
        performance.time_to_first_token,
        performance.tokens_per_second,
        performance.total_time,
        outcome,
    )


def _count(completion: Completion, metrics: RequestMetrics) -> None:
    if completion.finish_reason is not None:
        metrics.answered(
            completion.finish_reason,
            latency_s=completion.performance.total_time,
            prompt_tokens=len(completion.generation.prompt_token_ids),
            generation_tokens=completion.completion_tokens,
        )
    else:
        metrics.failed(http_status(completion.failure) if completion.failure is not None else None)
