"""An answer in the words of /v1/completions: one object, or chunks of a stream, which have the same shape.

It reads what `api.answer` gathers and writes OpenAI's objects: the echo of the prompts, the best of several answers,
logprobs in their legacy form. A request that only wants its prompts scored (`max_tokens: 0`) is run for one token,
which appears nowhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import cache, partial
from typing import Literal

from api import sse
from api.answer import Answer, Choice
from api.chat.format import usage_of
from api.completions.logprobs import LogprobsOfChoice
from api.output.deltas import ContentDelta, DrawnToken, FinishReason, Step
from api.schemas.base import Usage
from api.schemas.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from api.tokenizer import ChatTokenizer

CompletionFinishReason = Literal["stop", "length"]


class CompletionFormat:
    def __init__(self, request: CompletionRequest, answer: Answer, tokenizer: ChatTokenizer) -> None:
        self._request = request
        self._answer = answer
        self._tokenizer = tokenizer
        self._token_text = cache(tokenizer.token_text)  # logprobs name the same tokens over and over

    # -- as one object -----------------------------------------------------------------------------------------------

    def whole(self) -> Completion:
        completion = self._completion([self._choice(index, choice) for index, choice in enumerate(self._returned())])
        completion.usage = self._usage()
        completion.performance = self._answer.performance
        return completion

    def _returned(self) -> list[Choice]:
        """Of each prompt's choices the likeliest, the best first; all as they are where nothing is left out."""
        of_prompt, wanted = self._request.num_choices, self._request.num_returned
        if of_prompt == wanted:
            return self._answer.choices
        starts = range(0, len(self._answer.choices), of_prompt)
        ranked = [
            sorted(self._answer.choices[start : start + of_prompt], key=_mean_logprob, reverse=True) for start in starts
        ]
        return [choice for choices in ranked for choice in choices[:wanted]]

    def _choice(self, index: int, choice: Choice) -> CompletionChoice:
        logprobs = self._logprobs_of(choice)
        if logprobs is not None:
            logprobs.add(self._shown(choice.tokens))
        return CompletionChoice(
            text=self._echo(choice) + ("" if self._only_scores else choice.content),
            index=index,
            logprobs=logprobs.take() if logprobs else None,
            finish_reason=self._finish_reason(choice.finish_reason),
        )

    # -- as a stream -------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events: of each choice the echo, its text as it comes and its finish reason; the usage."""
        logprobs: dict[int, LogprobsOfChoice | None] = {}
        num_open = len(self._answer.choices)
        steps = self._answer.steps()
        try:
            async for choice, step in steps:
                is_first = choice.index not in logprobs
                if is_first:  # a prompt and its logprobs may be long
                    logprobs[choice.index] = await asyncio.to_thread(self._logprobs_of, choice)
                num_open -= step.finish_reason is not None
                is_last = not num_open and not self._request.include_usage
                write = partial(self._event, choice, step, logprobs[choice.index], is_first=is_first, is_last=is_last)
                yield await asyncio.to_thread(write) if is_first else write()
        finally:
            await steps.aclose()
        if self._request.include_usage:
            last = self._completion([])
            last.usage = self._usage()
            last.performance = self._answer.performance
            yield sse.event(last)
        yield sse.DONE

    def _event(
        self, choice: Choice, step: Step, logprobs: LogprobsOfChoice | None, *, is_first: bool, is_last: bool
    ) -> bytes:
        chunk = self._chunk(choice, step, self._echo(choice) if is_first else "", logprobs)
        if is_last:
            chunk.performance = self._answer.performance
        return sse.event(chunk)

    def _chunk(self, choice: Choice, step: Step, echo: str, logprobs: LogprobsOfChoice | None) -> Completion:
        text = "".join(delta.text for delta in step.deltas if isinstance(delta, ContentDelta))
        written: CompletionLogprobs | None = None
        if logprobs is not None:
            logprobs.add(self._shown(step.tokens))
            written = logprobs.take()
        chunk = self._completion(
            [
                CompletionChoice(
                    text=echo + ("" if self._only_scores else text),
                    index=choice.index,
                    logprobs=written,
                    finish_reason=self._finish_reason(step.finish_reason),
                )
            ]
        )
        if self._request.include_usage:
            chunk.usage = None  # OpenAI sends it as null in all chunks but the last
        return chunk

    # -- in both -----------------------------------------------------------------------------------------------------

    @property
    def _only_scores(self) -> bool:
        return self._request.token_limit == 0

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        answer = self._answer
        return Completion(
            id=answer.id,
            object="text_completion",
            created=answer.created,
            model=answer.model,
            system_fingerprint=answer.fingerprint,
            choices=choices,
        )

    def _prompt_text(self, choice: Choice) -> str:
        """What an echo says: the client's own words, or what the tokens say, control tokens included."""
        prompt = self._request.prompts[choice.index // self._request.num_choices]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _echo(self, choice: Choice) -> str:
        return self._prompt_text(choice) if self._request.echo else ""

    def _logprobs_of(self, choice: Choice) -> LogprobsOfChoice | None:
        """Where logprobs are wanted, with those of the prompt that is echoed."""
        if self._request.logprobs is None:
            return None
        logprobs = LogprobsOfChoice(self._prompt_text(choice), self._request.logprobs, self._token_text)
        if (of_prompt := choice.generation.prompt_logprobs) is not None:
            logprobs.add_prompt(choice.generation.prompt_token_ids, of_prompt.values)
        return logprobs

    def _shown(self, tokens: list[DrawnToken]) -> list[DrawnToken]:
        return [] if self._only_scores else tokens

    def _finish_reason(self, reason: FinishReason | None) -> CompletionFinishReason | None:
        assert reason != "tool_calls"  # the output of a raw prompt is read as plain text
        return "length" if reason is not None and self._only_scores else reason

    def _usage(self) -> Usage:
        usage = usage_of(self._answer)
        if self._only_scores:
            usage.completion_tokens = 0
            usage.total_tokens = usage.prompt_tokens
        return usage


def _mean_logprob(choice: Choice) -> float:
    """OpenAI's measure of the best: the highest log probability per token."""
    return sum(token.logprobs.logprob for token in choice.tokens) / max(1, len(choice.tokens))
