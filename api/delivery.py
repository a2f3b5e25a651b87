"""How an answer gets to its client, whatever the endpoint: whole or as a stream, with one line in the log.

A client that leaves at any point, streaming or not, takes its request off the ring. Routes call it with a function or a
generator that writes the answer in their words; it never looks into what they write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api import sse
from api.answer import Answer
from api.body import read_json_body
from api.caller import MAX_LOGGED, Caller
from api.errors import ApiError, http_status
from api.schemas.base import Received, Sent
from api.service import Service
from api.validation import parse_request
from config.logging import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Schema = TypeVar("Schema", bound=Received)


@contextlib.contextmanager
def counting_refusals(service: Service) -> Iterator[None]:
    """Around all that comes before an answer is delivered: what is refused there is counted by its status."""
    try:
        yield
    except ApiError as error:
        service.engine.metrics.failed(http_status(error))
        raise


async def receive(request: Request, schema: type[Schema], service: Service) -> tuple[Schema, dict[str, str]]:
    """The request's body as `schema`, and headers for the answer. Raises ApiError for what is refused."""
    body = await read_json_body(request, service.settings.max_body_bytes)
    parsed, ignored = await parse_request(schema, body, service.settings.unknown_fields)
    headers = {}
    if ignored:
        names = ", ".join(printable(name, MAX_LOGGED) for name in ignored)
        logger.warning("%s: ignored unknown fields: %s", request.url.path, names)
        headers["x-ignored-fields"] = names.encode("ascii", "backslashreplace").decode()
    return parsed, headers


async def deliver_whole(
    request: Request,
    service: Service,
    answer: Answer,
    render: Callable[[], Sent],
    caller: Caller,
    headers: Mapping[str, str],
    run: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> Response:
    """Run the answer to its end, by `run` where somebody reads the steps on the way; `render` makes the body of it."""
    try:
        await _unless_the_client_leaves(request, (run or answer.run)())
        # Logprobs of a long answer are many megabytes.
        body = await asyncio.to_thread(lambda: render().to_json())
        return Response(body, media_type="application/json", headers=dict(headers))
    finally:
        _note_end(answer, service, caller)


async def deliver_stream(
    request: Request,
    service: Service,
    answer: Answer,
    events: AsyncGenerator[bytes, None],
    caller: Caller,
    headers: Mapping[str, str],
    error_event: Callable[[ApiError], bytes] = sse.error_event,
    keep_alive: bytes = sse.COMMENT,
) -> Response:
    """Send `events`, which iterates over the answer's steps and yields nothing before the first of them has come.

    So what goes wrong before the first token still becomes an HTTP status, unless that takes so long that the stream is
    begun to keep proxies and clients alive. An error after that is written by `error_event` and ends the stream.
    """
    first = asyncio.ensure_future(anext(events))

    async def end() -> None:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        _note_end(answer, service, caller)

    try:
        await _unless_the_client_leaves(request, asyncio.wait((first,), timeout=sse.KEEP_ALIVE_S))
        if first.done():
            first.result()
    except BaseException:
        await end()
        raise
    return sse.EventStream(_events(first, events, error_event), end, headers, keep_alive)


async def _events(
    first: asyncio.Future[bytes], others: AsyncGenerator[bytes, None], error_event: Callable[[ApiError], bytes]
) -> AsyncIterator[bytes]:
    try:
        yield await first
        async for event in others:
            yield event
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


def _note_end(answer: Answer, service: Service, caller: Caller) -> None:
    """The one line of a request, and its share in the metrics."""
    performance, metrics = answer.performance, service.engine.metrics
    reasons = ",".join(dict.fromkeys(str(choice.finish_reason) for choice in answer.choices))
    if answer.failure is not None:
        outcome = f"none, {answer.failure.message}"
        metrics.failed(http_status(answer.failure))
    elif not answer.is_complete:
        outcome = "none, the client left"
        metrics.failed(None)
    else:
        outcome = reasons
        metrics.answered(
            reasons,
            latency_s=performance.total_time,
            prompt_tokens=answer.prompt_tokens,
            generation_tokens=answer.completion_tokens,
        )
    logger.info(
        "%s model=%s%s prompt_tokens=%d completion_tokens=%d time_to_first_token=%.3fs tokens_per_second=%.2f "
        "total_time=%.3fs finish_reason=%s",
        answer.id,
        answer.model,
        caller,
        answer.prompt_tokens,
        answer.completion_tokens,
        performance.time_to_first_token,
        performance.tokens_per_second,
        performance.total_time,
        outcome,
    )
