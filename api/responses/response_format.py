"""An answer in the words of /v1/responses: one object, or the events of a stream.

The output's items and their events come from `api.responses.output`; here is the response around them, with the
settings it was made with, how it ended, and its way into the store. Called by the routes of /v1/responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from api import sse
from api.answer import Answer
from api.chat.format import TokenText, token_logprob
from api.errors import ApiError, error_object
from api.responses.output import Numbered, OutputWriter
from api.schemas import response_answer as schema
from api.schemas.responses import FunctionTool, ResponseRequest

Save = Callable[[schema.Response], None]


class ResponseFormat:
    """Args: `save` takes every response that has ended, before its client hears of the end; None: not stored."""

    def __init__(self, request: ResponseRequest, answer: Answer, token_text: TokenText, save: Save | None) -> None:
        self._request = request
        self._answer = answer
        self._save = save
        self._event = Numbered()
        num_top = request.top_logprobs or 0

        def token_with_bytes(token_id: int) -> tuple[str, list[int] | None]:
            text, data = token_text(token_id)
            return text, data or []  # null, as a chat has it for control tokens, is nothing this endpoint documents

        self._writer = OutputWriter(
            self._event,
            (lambda token: token_logprob(token, num_top, token_with_bytes)) if request.wants_logprobs else None,
            with_encrypted_reasoning=request.wants_encrypted_reasoning,
        )

    # -- as one object -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """All steps to the end."""
        steps = self._answer.steps()
        try:
            async for _, step in steps:
                self._writer.take(step)
        finally:
            await steps.aclose()
        await asyncio.to_thread(self._writer.finish, self._status)

    def whole(self) -> schema.Response:
        response = self._ended(self._status)
        self._store(response)
        return response

    # -- as a stream -------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """In OpenAI's order, numbered, and none before the first step."""
        has_begun = False
        steps = self._answer.steps()
        try:
            async for _, step in steps:
                if not has_begun:
                    has_begun = True
                    yield self._lifecycle("response.created", self._response("in_progress"))
                    yield self._lifecycle("response.in_progress", self._response("in_progress"))
                for event in self._writer.take(step):
                    yield sse.named_event(event.type, event)
        except ApiError as error:
            if not has_begun:
                raise
            yield self.error_event(error)
            return
        finally:
            await steps.aclose()
        for event in await asyncio.to_thread(self._end):
            yield event

    def _end(self) -> list[bytes]:
        """The last events. They repeat all that was said, logprobs too: in a thread."""
        events = [sse.named_event(event.type, event) for event in self._writer.finish(self._status)]
        response = self.whole()
        return [*events, self._lifecycle(f"response.{response.status}", response)]

    def error_event(self, error: ApiError) -> bytes:
        """How a stream that has begun ends where something goes wrong."""
        events: list[schema.Event] = self._writer.finish("incomplete")
        said = error_object(error)["error"]
        flat = {name: said[name] for name in ("code", "message", "param")}
        events.append(self._event(schema.ErrorEvent, "error", **flat, error=said))
        failed = self._response("failed")
        failed.error = schema.ResponseError(code="server_error", message=error.message)
        self._store(failed)
        written = [sse.named_event(event.type, event) for event in events]
        return b"".join([*written, self._lifecycle("response.failed", failed)])

    def _store(self, response: schema.Response) -> None:
        if self._save is not None:
            self._save(response)

    def _lifecycle(self, type: str, response: schema.Response) -> bytes:
        return sse.named_event(type, self._event(schema.ResponseEvent, type, response=response))

    # -- in both -----------------------------------------------------------------------------------------------------

    @property
    def _status(self) -> Any:
        return "incomplete" if self._answer.choices[0].finish_reason == "length" else "completed"

    def _ended(self, status: Any) -> schema.Response:
        response = self._response(status)
        if status == "completed":
            response.completed_at = int(time.time())
        else:
            response.incomplete_details = schema.IncompleteDetails(reason="max_output_tokens")
        response.usage = _usage_of(self._answer)
        response.performance = self._answer.performance
        return response

    def _response(self, status: Any) -> schema.Response:
        """The response as it is by now, with what it was asked for as OpenAI repeats it."""
        request, answer = self._request, self._answer
        sampling = answer.choices[0].generation.sampling
        return schema.Response(
            id=answer.id,
            object="response",
            created_at=answer.created,
            status=status,
            background=False,
            completed_at=None,
            error=None,
            incomplete_details=None,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            max_tool_calls=None,
            model=answer.model,
            output=list(self._writer.items),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            prompt_cache_key=request.prompt_cache_key,
            reasoning=_reasoning(request),
            safety_identifier=request.safety_identifier,
            service_tier="default",
            store=self._save is not None,
            temperature=sampling.temperature,
            text=_text(request),
            tool_choice=_tool_choice(request),
            tools=[_tool(tool) for tool in request.tools or []],
            top_logprobs=request.top_logprobs or 0,
            top_p=sampling.top_p if request.top_p is None else request.top_p,
            truncation=request.truncation or "disabled",
            usage=None,
            user=request.user,
            metadata=request.metadata or {},
        )


def _usage_of(answer: Answer) -> schema.ResponseUsage:
    return schema.ResponseUsage(
        input_tokens=answer.prompt_tokens,
        # What is written to the cache is known to the ring alone, and nobody pays for it.
        input_tokens_details=schema.InputTokensDetails(cached_tokens=answer.cached_tokens, cache_write_tokens=0),
        output_tokens=answer.completion_tokens,
        output_tokens_details=schema.OutputTokensDetails(reasoning_tokens=answer.reasoning_tokens),
        total_tokens=answer.prompt_tokens + answer.completion_tokens,
    )


def _reasoning(request: ResponseRequest) -> dict[str, Any]:
    asked = request.reasoning
    return {"effort": asked and asked.effort, "summary": asked and asked.summary}


def _text(request: ResponseRequest) -> dict[str, Any]:
    asked = request.text.format if request.text is not None else None
    format = asked.model_dump(by_alias=True) if asked is not None else {"type": "text"}
    return {"format": format, "verbosity": "medium"}


def _tool_choice(request: ResponseRequest) -> str | dict[str, Any]:
    choice = request.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _tool(tool: FunctionTool) -> dict[str, Any]:
    described = tool.model_dump(include={"type", "name", "description", "parameters"})
    return described | {"strict": bool(tool.strict)}
