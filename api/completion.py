"""One chat completion as it comes: text, finish reason, usage and timings of a running generation.

It joins a generation's ids with its text stream and makes the objects clients get, chunk by chunk or as a whole. It
knows nothing of HTTP; whoever iterates must close the iterator, and that frees the request's place on every rank.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import cast

from api.engine_client import EngineClient
from api.errors import ApiError
from api.generation import Generation
from api.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    Delta,
    FinishReason,
    Performance,
    Usage,
)
from api.tokenizer import ChatTokenizer


class Completion:
    def __init__(
        self, request: ChatCompletionRequest, generation: Generation, tokenizer: ChatTokenizer, engine: EngineClient
    ) -> None:
        self.generation = generation
        self.finish_reason: FinishReason | None = None
        self.failure: ApiError | None = None  # neither this nor a finish reason at the end: the client left
        self._request = request
        self._text = tokenizer.text_stream(request.stop or ())
        self._fingerprint = tokenizer.fingerprint
        self._engine = engine
        self._created = int(time.time())
        self._ended_at: float | None = None

    @property
    def model(self) -> str:
        return self._request.model

    @property
    def completion_tokens(self) -> int:
        """Sampled tokens, the one that ended the answer included; none after a stop string."""
        return self._text.num_tokens

    @property
    def usage(self) -> Usage:
        generation = self.generation
        return Usage.of(len(generation.prompt_token_ids), self.completion_tokens, generation.num_cached_tokens)

    @property
    def performance(self) -> Performance:
        """Seconds since the request was accepted; what has not happened yet took no time."""
        generation = self.generation
        end = self._ended_at or self._engine.clock()
        started = generation.started_at or generation.first_token_at or end
        first = generation.first_token_at or end
        decode = (generation.last_token_at or first) - first
        # The first token belongs to the prefill; an answer of one step has no decoding to be measured.
        total = end - generation.accepted_at
        steps, span = (self.completion_tokens - 1, decode) if decode > 0 else (self.completion_tokens, total)
        return Performance(
            total_time=round(total, 6),
            tokens_per_second=round(steps / span, 3) if span > 0 else 0.0,
            queue_time=round(started - generation.accepted_at, 6),
            prefill_time=round(first - started, 6),
            time_to_first_token=round(first - generation.accepted_at, 6),
            decode_time=round(decode, 6),
        )

    async def texts(self) -> AsyncGenerator[str, None]:
        """The answer's text, piece by piece (a piece may be empty), until `finish_reason` is set. Raises ApiError."""
        outputs = self.generation.outputs()
        try:
            async for output in outputs:
                text = self._text.add(output.token_ids)
                reason = output.finish_reason
                if reason is not None:
                    text += self._text.finish()
                if reason is not None or self._text.stopped:
                    self.finish_reason = "stop" if self._text.stopped else cast(FinishReason, reason)
                    self._ended_at = self._engine.clock()
                    yield text
                    return
                yield text
        except ApiError as error:
            self.failure = error
            raise
        finally:
            self._engine.cancel(self.generation)
            await outputs.aclose()

    async def whole(self) -> ChatCompletion:
        """The answer in one piece."""
        content = "".join([text async for text in self.texts()])
        assert self.finish_reason is not None
        message = AnswerMessage(role="assistant", content=content, refusal=None, annotations=[])
        choice = Choice(index=0, message=message, logprobs=None, finish_reason=self.finish_reason)
        answer = ChatCompletion(
            id=self.generation.request_id,
            object="chat.completion",
            created=self._created,
            model=self._request.model,
            choices=[choice],
            usage=self.usage,
            service_tier="default",
            system_fingerprint=self._fingerprint,
            performance=self.performance,
        )
        if self._request.metadata is not None:
            answer.metadata = self._request.metadata
        return answer

    async def chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        """The answer as a stream: the role, the text as it comes, the finish reason, and the usage where asked for."""
        texts = self.texts()
        try:
            first = await anext(texts)
            yield self._chunk(Delta(role="assistant", content="", refusal=None))
            if first:
                yield self._chunk(Delta(content=first))
            async for text in texts:
                if text:
                    yield self._chunk(Delta(content=text))
        finally:
            await texts.aclose()
        last = self._chunk(Delta(), self.finish_reason)
        if self._request.include_usage:
            yield last
            last = self._chunk(None)
            last.usage = self.usage
        last.performance = self.performance
        yield last

    def _chunk(self, delta: Delta | None, finish_reason: FinishReason | None = None) -> ChatCompletionChunk:
        choices = []
        if delta is not None:
            choices = [ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)]
        chunk = ChatCompletionChunk(
            id=self.generation.request_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._request.model,
            service_tier="default",
            system_fingerprint=self._fingerprint,
            choices=choices,
        )
        if self._request.include_usage:
            chunk.usage = None  # OpenAI sends it as null in all chunks but the last
        return chunk
