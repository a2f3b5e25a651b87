"""An answer in the words of /v1/chat/completions: one object, or chunks of a stream.

It reads what `api.answer` gathers and writes OpenAI's objects. What was asked for is in the request: no policy here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cache
from itertools import islice

from api import sse
from api.answer import Answer, Choice
from api.output.deltas import ContentDelta, Delta, DrawnToken, FinishReason, ReasoningDelta, Step, ToolCallDelta
from api.schemas import chat_answer as schema
from api.schemas.base import CompletionTokensDetails, PromptTokensDetails, Usage
from api.schemas.chat import ChatCompletionRequest, NamedTool

TokenText = Callable[[int], tuple[str, list[int] | None]]


class ChatFormat:
    """Args: `token_text` gives a token's text and bytes, for logprobs."""

    def __init__(self, request: ChatCompletionRequest, answer: Answer, token_text: TokenText) -> None:
        self._request = request
        self._answer = answer
        self._token_text = cache(token_text)

    # -- as one object -----------------------------------------------------------------------------------------------

    def whole(self) -> schema.ChatCompletion:
        answer = self._answer
        completion = schema.ChatCompletion(
            id=answer.id,
            object="chat.completion",
            created=answer.created,
            model=answer.model,
            choices=[self._choice(choice) for choice in answer.choices],
            usage=usage_of(answer),
            service_tier="default",
            system_fingerprint=answer.fingerprint,
            performance=answer.performance,
        )
        if self._request.metadata is not None:
            completion.metadata = self._request.metadata
        return completion

    def _choice(self, choice: Choice) -> schema.Choice:
        # OpenAI's content is null beside tool calls where the model wrote nothing else.
        content = choice.content or (None if choice.tool_calls else "")
        message = schema.AnswerMessage(role="assistant", content=content, refusal=None, annotations=[])
        if choice.reasoning:
            message.reasoning_content = choice.reasoning
        if choice.tool_calls:
            message.tool_calls = [
                schema.AnswerToolCall(
                    id=call.id,
                    type="function",
                    function=schema.AnswerFunction(name=call.name, arguments=call.arguments),
                )
                for call in choice.tool_calls
            ]
        assert choice.finish_reason is not None
        return schema.Choice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(choice.tokens),
            finish_reason=self._finish_reason(choice.finish_reason),
        )

    # -- as a stream -------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events: for each choice its role, its deltas as they come and its finish reason; the usage."""
        begun: set[int] = set()
        num_open = len(self._answer.choices)
        steps = self._answer.steps()
        try:
            async for choice, step in steps:
                chunks = self._chunks(choice, step, is_first=choice.index not in begun)
                begun.add(choice.index)
                num_open -= step.finish_reason is not None
                if not num_open and not self._request.include_usage:
                    chunks[-1].performance = self._answer.performance
                for chunk in chunks:
                    yield sse.event(chunk)
        finally:
            await steps.aclose()
        if self._request.include_usage:
            last = self._chunk([])
            last.usage = usage_of(self._answer)
            last.performance = self._answer.performance
            yield sse.event(last)
        yield sse.DONE

    def _chunks(self, choice: Choice, step: Step, *, is_first: bool) -> list[schema.ChatCompletionChunk]:
        deltas = [_delta(delta) for delta in step.deltas]
        chunks = []
        if is_first:
            deltas = [schema.ChunkDelta(role="assistant", content="", refusal=None), *deltas]
        logprobs = self._logprobs(step.tokens)
        if logprobs is not None and logprobs.content and len(deltas) == is_first and step.finish_reason is None:
            deltas.append(schema.ChunkDelta(content=""))  # tokens whose text is not certain yet
        for place, delta in enumerate(deltas):
            # The step's tokens go with the last of its deltas.
            of_this = logprobs if place == len(deltas) - 1 and step.finish_reason is None else None
            chunks.append(self._chunk([self._chunk_choice(choice, delta, of_this)]))
        if step.finish_reason is not None:
            reason = self._finish_reason(step.finish_reason)
            of_this = logprobs if logprobs is not None and logprobs.content else None
            chunks.append(self._chunk([self._chunk_choice(choice, schema.ChunkDelta(), of_this, reason)]))
        return chunks

    def _chunk_choice(
        self,
        choice: Choice,
        delta: schema.ChunkDelta,
        logprobs: schema.ChoiceLogprobs | None,
        finish_reason: FinishReason | None = None,
    ) -> schema.ChunkChoice:
        return schema.ChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    def _chunk(self, choices: list[schema.ChunkChoice]) -> schema.ChatCompletionChunk:
        answer = self._answer
        chunk = schema.ChatCompletionChunk(
            id=answer.id,
            object="chat.completion.chunk",
            created=answer.created,
            model=answer.model,
            service_tier="default",
            system_fingerprint=answer.fingerprint,
            choices=choices,
        )
        if self._request.include_usage:
            chunk.usage = None  # OpenAI sends it as null in all chunks but the last
        return chunk

    # -- in both -----------------------------------------------------------------------------------------------------

    def _finish_reason(self, reason: FinishReason) -> FinishReason:
        """OpenAI ends a call that the request forced by name with "stop"."""
        is_forced = isinstance(self._request.tool_choice, NamedTool)
        return "stop" if reason == "tool_calls" and is_forced else reason

    def _logprobs(self, tokens: Sequence[DrawnToken]) -> schema.ChoiceLogprobs | None:
        if not self._request.logprobs:
            return None
        num_top = self._request.top_logprobs or 0
        logprobs = [token_logprob(token, num_top, self._token_text) for token in tokens]
        return schema.ChoiceLogprobs(content=logprobs, refusal=None)


def token_logprob(drawn: DrawnToken, num_top: int, token_text: TokenText) -> schema.TokenLogprob:
    """A drawn token and the `num_top` likeliest in its place, as OpenAI writes them."""
    top: list[schema.TopLogprob] = []
    likeliest = zip(drawn.logprobs.top_ids, drawn.logprobs.top_logprobs, strict=True)
    for token_id, logprob in islice(likeliest, num_top):
        text, data = token_text(token_id)
        top.append({"token": text, "logprob": logprob, "bytes": data})
    text, data = token_text(drawn.token_id)
    return schema.TokenLogprob.model_construct(token=text, logprob=drawn.logprobs.logprob, bytes=data, top_logprobs=top)


def usage_of(answer: Answer) -> Usage:
    """OpenAI's usage object."""
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        total_tokens=answer.prompt_tokens + answer.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=answer.cached_tokens, audio_tokens=0),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=answer.reasoning_tokens,
            audio_tokens=0,
            accepted_prediction_tokens=0,
            rejected_prediction_tokens=0,
        ),
    )


def _delta(delta: Delta) -> schema.ChunkDelta:
    match delta:
        case ReasoningDelta():
            return schema.ChunkDelta(reasoning_content=delta.continuing)
        case ContentDelta():
            return schema.ChunkDelta(content=delta.continuing)
        case ToolCallDelta(index=index, id=None):
            function = schema.DeltaFunction(arguments=delta.arguments)
            return schema.ChunkDelta(tool_calls=[schema.DeltaToolCall(index=index, function=function)])
        case ToolCallDelta(index=index):
            function = schema.DeltaFunction(name=delta.name, arguments=delta.arguments)
            call = schema.DeltaToolCall(index=index, id=delta.id, type="function", function=function)
            return schema.ChunkDelta(tool_calls=[call])
