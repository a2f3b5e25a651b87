"""A sequence: one request's tokens and where it stands. The scheduler owns and changes it; nobody else does."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from server.prefix_cache import prefix_key
from server.protocol import Submit


class SequenceStatus(Enum):
    """waiting → admitted → running → finished; a preempted sequence is waiting again.

    An admitted sequence has memory and a place in a group, and is prefilled until it joins the group's rows; one that
    moves to another group is admitted again until it joins that one's.
    """

    WAITING = auto()
    ADMITTED = auto()
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
    has_caches: bool = False  # the ranks know it
    waits_for: Sequence | None = None  # which is reading a prefix that both have
    num_awaited_tokens: int = 0  # of that prefix
    checkpoints: set[int] = field(default_factory=set)  # lengths at which its caches are kept for others
    awaits_grammar: bool = False  # it can be followed by the last rank only when it is compiled
    was_started: bool = False  # counted among the prompts that were begun

    def __post_init__(self) -> None:
        self.token_ids = [*self.submit.prompt_token_ids, *self.submit.output_token_ids]

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: smaller is sooner, and is preempted later."""
        return self.submit.priority, self.sequence_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.submit.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True if every token of its prompt has to be computed, and its logits too."""
        return self.submit.sampling.prompt_logprobs is not None

    @property
    def max_length(self) -> int:
        """Tokens in the caches when it is longest: its last sampled token is never run."""
        return self.num_prompt_tokens + self.submit.max_tokens - 1

    @property
    def num_tokens_to_prefill(self) -> int:
        """All but the last token is prefilled; the last one is the first decode step, which samples."""
        return max(0, len(self.token_ids) - 1 - self.num_computed_tokens)

    @property
    def can_join(self) -> bool:
        """True when it only has to join the rows of its group to decode."""
        return self._is_read and not self.awaits_grammar

    @property
    def only_awaits_grammar(self) -> bool:
        """True when it could join but for that."""
        return self._is_read and self.awaits_grammar

    @property
    def _is_read(self) -> bool:
        return self.status is SequenceStatus.ADMITTED and self.has_caches and not self.num_tokens_to_prefill

    @property
    def can_prefill(self) -> bool:
        return self.status is SequenceStatus.ADMITTED and self.has_caches and self.num_tokens_to_prefill > 0

    def prefix_key(self) -> bytes:
        """Everything that will have been in the caches before it decodes."""
        return prefix_key(self.token_ids[:-1])

    def computed_key(self) -> bytes:
        """What its caches hold."""
        return prefix_key(self.token_ids[: self.num_computed_tokens])
