"""The answer to one request as it comes: one or more choices, each a generation on the ring, read into deltas.

It belongs to no endpoint: routes iterate over its steps and write them in their own words, or run it to the end and
read what the choices have gathered. It knows nothing of HTTP; whoever iterates must close the iterator, and that frees
the request's places on every rank.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import cast

from api.engine_client import EngineClient
from api.errors import ApiError, EngineFailure
from api.generation import Generation
from api.output.deltas import (
    ContentDelta,
    Delta,
    DrawnToken,
    FinishReason,
    ReasoningDelta,
    Step,
    ToolCall,
    ToolCallDelta,
)
from api.output.reader import OutputReader
from api.schemas.base import Performance
from server.protocol import SequenceOutput

logger = logging.getLogger(__name__)


class Choice:
    """One answer while it comes. Everything it has been given so far is gathered here."""

    def __init__(self, index: int, generation: Generation, reader: OutputReader) -> None:
        self.index = index
        self.generation = generation
        self.content = ""
        self.reasoning = ""
        self.tool_calls: list[ToolCall] = []
        self.tokens: list[DrawnToken] = []
        self.deltas: list[Delta] = []  # all of it in the order it came
        self.finish_reason: FinishReason | None = None
        self.reader = reader

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, the one that ended the answer included; none after a stop string."""
        return self.reader.num_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        return self.reader.num_reasoning_tokens

    def take(self, output: SequenceOutput) -> Step:
        """What a step of the ring adds."""
        deltas = self.reader.add(output.token_ids)
        # Ids after a stop string are not read, and nobody hears of them. There are no logprobs where none are wanted.
        drawn = zip(output.token_ids, output.logprobs, self.reader.are_content, strict=False)
        tokens = [DrawnToken(token_id, logprobs, is_content) for token_id, logprobs, is_content in drawn]
        stopped = self.reader.stopped
        if output.finish_reason is not None or stopped:
            deltas = [*deltas, *self.reader.finish()]
            # A call that is complete only because there are no more tokens did not stop the answer.
            stopped = stopped or self.reader.stop_found is not None
            self.finish_reason = self._finish_reason("stop" if stopped else output.finish_reason)
        for delta in deltas:
            self._gather(delta)
        self.deltas += deltas
        self.tokens += tokens
        return Step(deltas, tokens, self.finish_reason)

    def _finish_reason(self, ended: str | None) -> FinishReason:
        return "tool_calls" if ended == "stop" and self.reader.has_tool_calls else cast(FinishReason, ended)

    def _gather(self, delta: Delta) -> None:
        match delta:
            case ReasoningDelta():
                self.reasoning += delta.continuing
            case ContentDelta():
                self.content += delta.continuing
            case ToolCallDelta(id=str(id), name=str(name)):
                self.tool_calls.append(ToolCall(id, name, delta.arguments))
            case ToolCallDelta():
                self.tool_calls[delta.index].arguments += delta.arguments


class Answer:
    """Args: `model` as the client named it; `fingerprint` of the model that answers."""

    def __init__(
        self, answer_id: str, model: str, fingerprint: str, choices: list[Choice], engine: EngineClient
    ) -> None:
        self.id = answer_id
        self.model = model
        self.created = int(time.time())
        self.fingerprint = fingerprint
        self.choices = choices
        self.failure: ApiError | None = None  # neither this nor all finish reasons at the end: the client left
        self._engine = engine
        self._ended_at: float | None = None

    # -- reading it --------------------------------------------------------------------------------------------------

    async def steps(self) -> AsyncGenerator[tuple[Choice, Step], None]:
        """Every choice's steps as they come, until each has its finish reason. Raises ApiError: then all of it ends."""
        steps: asyncio.Queue[tuple[Choice, Step | ApiError]] = asyncio.Queue()
        readers = [asyncio.ensure_future(self._read(choice, steps)) for choice in self.choices]
        num_open = len(self.choices)
        try:
            while num_open:
                choice, step = await steps.get()
                if isinstance(step, ApiError):
                    self.failure = step
                    raise step
                if step.finish_reason is not None:
                    num_open -= 1
                    self._ended_at = self._engine.clock()
                yield choice, step
        finally:
            self._engine.cancel(*[choice.generation for choice in self.choices])
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def run(self) -> None:
        """All steps to the end; the choices have gathered them."""
        async for _ in self.steps():
            pass

    async def _read(self, choice: Choice, steps: asyncio.Queue[tuple[Choice, Step | ApiError]]) -> None:
        outputs = choice.generation.outputs()
        try:
            async for output in outputs:
                step = choice.take(output)
                steps.put_nowait((choice, step))
                if step.finish_reason is not None:
                    # At once, not when the client has read so far: the place is somebody else's.
                    self._engine.cancel(choice.generation)
                    return
        except ApiError as error:
            steps.put_nowait((choice, error))
        except Exception:  # the outermost frame of this task: whoever waits for its steps must hear of it
            logger.exception("%s: the answer could not be read", self.id)
            steps.put_nowait((choice, EngineFailure("The server had an error while it read the model's answer.")))
        finally:
            await outputs.aclose()

    # -- what it comes to --------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counted once, however many choices it has."""
        return sum(len(generation.prompt_token_ids) for generation in self._first_of_each_prompt())

    @property
    def cached_tokens(self) -> int:
        """Of the prompts' tokens, what the ring had when it began. A second choice's prompt is no merit of a cache."""
        return sum(generation.num_cached_tokens for generation in self._first_of_each_prompt())

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    @property
    def performance(self) -> Performance:
        """Seconds since the request was accepted; what has not happened yet took no time."""
        generations = [choice.generation for choice in self.choices]
        end = self._ended_at or self._engine.clock()
        accepted = min(generation.accepted_at for generation in generations)
        started = _earliest([generation.started_at for generation in generations], end)
        first = _earliest([generation.first_token_at for generation in generations], end)
        started = min(started, first)
        last = max([generation.last_token_at or first for generation in generations])
        decode, total = last - first, end - accepted
        # The first token belongs to the prefill; an answer of one step has no decoding to be measured.
        num_tokens = self.completion_tokens
        steps, span = (num_tokens - len(generations), decode) if decode > 0 else (num_tokens, total)
        return Performance(
            total_time=round(total, 6),
            tokens_per_second=round(steps / span, 3) if span > 0 else 0.0,
            queue_time=round(started - accepted, 6),
            prefill_time=round(first - started, 6),
            time_to_first_token=round(first - accepted, 6),
            decode_time=round(decode, 6),
        )

    def _first_of_each_prompt(self) -> list[Generation]:
        # Choices of one prompt share the list itself.
        by_prompt = {id(choice.generation.prompt_token_ids): choice.generation for choice in reversed(self.choices)}
        return list(by_prompt.values())


def _earliest(moments: list[float | None], otherwise: float) -> float:
    return min((moment for moment in moments if moment is not None), default=otherwise)
