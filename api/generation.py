"""One accepted request, as the api keeps it until its answer is complete.

It holds all that is needed to send the request to a ring again (prompt and sampled ids, sampling parameters with their
seed) and the moments its `performance` is made of. Changed by the engine client alone; the routes read it and take its
outputs from a queue.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from api.errors import ApiError
from server.protocol import SamplingParams, SequenceOutput, Submit, TokenLogprobs


class PromptLogprobs:
    """Those of one prompt, from its second token on. All its choices have them; the first one's generation asks."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self.values: list[TokenLogprobs] = []
        self._num_wanted = num_prompt_tokens - 1
        self._are_complete = asyncio.Event()
        self.put(1, [])

    def put(self, start: int, values: list[TokenLogprobs]) -> None:
        """Of the tokens from index `start` on, over what is there: a prompt may be read again."""
        self.values[start - 1 : start - 1 + len(values)] = values
        if len(self.values) >= self._num_wanted:
            self._are_complete.set()

    async def complete(self) -> None:
        await self._are_complete.wait()


@dataclass(eq=False)
class Generation:
    """Times are those of the engine client's clock, in seconds."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    max_tokens_given: bool
    stop_token_ids: list[int]
    priority: int = 0
    owner: str | None = None  # label of the API key that sent it
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None  # whoever's generation asks the ring for them
    accepted_at: float = 0.0
    progressed_at: float = 0.0
    started_at: float | None = None
    num_cached_tokens: int = 0  # of the prompt, when a ring began with it for the first time
    first_token_at: float | None = None
    last_token_at: float | None = None
    is_running: bool = False  # its prefill has begun on the ring that serves now
    is_prefilling: bool = False  # and that ring has given it no token yet
    is_preempted: bool = False  # that ring had begun with it and has put it back into its queue
    num_asides: int = 0  # how often the ring that serves had to give it back
    _outputs: asyncio.Queue[SequenceOutput | ApiError] = field(default_factory=asyncio.Queue)

    @property
    def name_on_ring(self) -> str:
        """What the ring that serves calls it: another name each time it gets it, so old words are not taken for new."""
        return f"{self.request_id}~{self.num_asides}" if self.num_asides else self.request_id

    def submit_message(self) -> Submit:
        """The request as a ring gets it, the first time or again."""
        return Submit(
            request_id=self.name_on_ring,
            prompt_token_ids=self.prompt_token_ids,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            max_tokens_given=self.max_tokens_given,
            stop_token_ids=self.stop_token_ids,
            output_token_ids=list(self.output_token_ids),
            priority=self.priority,
        )

    def fit(self, max_sequence_length: int) -> bool:
        """Whether it fits into a ring that takes so many tokens. A limit that its client left open is made to fit."""
        room = max_sequence_length - len(self.prompt_token_ids)
        if not self.max_tokens_given and room >= max(1, self.sampling.min_tokens):
            self.max_tokens = min(self.max_tokens, room)
        return self.max_tokens <= room

    def start(self, now: float, num_cached_tokens: int) -> None:
        """The ring has begun with it. What another ring finds in its cache later is no merit of the client's prompt."""
        self.is_running = self.is_prefilling = True
        self.is_preempted = False
        self.progressed_at = now
        if self.started_at is None:
            self.started_at = now
            self.num_cached_tokens = num_cached_tokens

    def preempt(self) -> None:
        """The ring needs its memory for others; it goes on later."""
        self.is_running = self.is_prefilling = False
        self.is_preempted = True

    def step_aside(self) -> None:
        """The ring has given it back, and may get it again."""
        self.is_running = self.is_prefilling = self.is_preempted = False
        self.num_asides += 1

    def leave_ring(self) -> None:
        """The ring that served is gone."""
        self.is_running = self.is_prefilling = self.is_preempted = False
        self.num_asides = 0

    def take(self, output: SequenceOutput, now: float) -> None:
        """What a step gave it."""
        self.progressed_at = now
        if output.token_ids:
            self.is_prefilling = False
            if self.first_token_at is None:
                self.first_token_at = now
            self.last_token_at = now
            self.output_token_ids += output.token_ids
        if output.prompt_logprobs and self.prompt_logprobs is not None:
            self.prompt_logprobs.put(output.prompt_logprobs_start, output.prompt_logprobs)
        if output.token_ids or output.finish_reason is not None:
            self._outputs.put_nowait(output)

    def fail(self, error: ApiError) -> None:
        """Ends it: whoever waits for outputs gets `error`."""
        self._outputs.put_nowait(error)

    def unreported_end(self) -> str | None:
        """Why it has ended, where the ring died after its last token and before it said so."""
        if self.output_token_ids and self.output_token_ids[-1] in self.stop_token_ids:
            return "stop"
        return "length" if len(self.output_token_ids) >= self.max_tokens else None

    async def outputs(self) -> AsyncGenerator[SequenceOutput, None]:
        """Each step's output until the one with a finish reason, none before its prompt's logprobs, where it has them.

        Raises the ApiError it failed with.
        """
        while True:
            output = await self._outputs.get()
            if isinstance(output, ApiError):
                raise output
            if self.prompt_logprobs is not None:
                await self.prompt_logprobs.complete()
            yield output
            if output.finish_reason is not None:
                return
