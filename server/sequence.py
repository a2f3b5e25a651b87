"""A sequence: one request's tokens and where it stands. The scheduler owns and changes it; nobody else does."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from server.protocol import Submit


class SequenceStatus(Enum):
    """waiting → prefilling → running → finished; a preempted sequence is waiting again."""

    WAITING = auto()
    PREFILLING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """`token_ids` is the prompt and everything sampled; all but the last of them have to be in the caches to decode."""

    sequence_id: int
    submit: Submit
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0  # tokens in the caches, those of frames in flight included
    num_reserved_tokens: int = 0  # what the budget holds for it
    group_id: int = -1
    status: SequenceStatus = SequenceStatus.WAITING
    was_started: bool = False  # the api has been told that it no longer queues

    def __post_init__(self) -> None:
        self.token_ids = [*self.submit.prompt_token_ids, *self.submit.output_token_ids]

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.submit.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_length(self) -> int:
        """Tokens in the caches when it is longest: its last sampled token is never run."""
        return self.num_prompt_tokens + self.submit.max_tokens - 1

    @property
    def num_tokens_to_prefill(self) -> int:
        """All but the last token is prefilled; the last one is the first decode step, which samples."""
        return max(0, len(self.token_ids) - 1 - self.num_computed_tokens)
