"""What every rank holds, as lists of token ids: a stand-in for the ranks that refuses what a rank would refuse.

It checks more than a rank can: that every token which runs is preceded by just the tokens that its request has before
it, wherever its caches came from, and that everything that is held fits the budget after each frame. The ring checks
that logprobs come when they should.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from distributed.frames import MAX_CONTROL_BYTES
from server.chunking import LOGPROBS_CHUNK_TOKENS
from server.frame import Admit, Detach, Drop, Join, Keep, Leave, ResultHeader, StepHeader, encode_header
from server.kv_budget import CacheCost, KVBudget, RankCost, Shape
from server.protocol import SamplingParams, SequenceOutput, Submit, TokenLogprobs
from server.scheduler import Scheduler, SchedulerOptions, Step

STOP = 7


def next_token(tokens: list[int]) -> int:
    """The model: any function of all tokens so far will do."""
    return 10 + hash(tuple(tokens)) % 90


def answer(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def logprobs_of(tokens: list[int], num_top: int) -> TokenLogprobs:
    """The model's logprobs of the last of `tokens`: any function of them will do."""
    top_ids = [hash((*tokens[:-1], rank)) % 90 for rank in range(num_top)]
    return TokenLogprobs(-float(hash(tuple(tokens)) % 100), top_ids, [-0.5 * rank for rank in range(num_top)])


class Ranks:
    """Token ids in the caches: of sequences in no group, of groups in row order, and of kept entries."""

    def __init__(self, budget: KVBudget) -> None:
        self.budget = budget
        self.admitted: dict[int, Admit] = {}
        self.sequences: dict[int, list[int]] = {}
        self.groups: dict[int, dict[int, list[int]]] = {}
        self.entries: dict[int, list[int]] = {}

    def run(self, step: Step) -> list[list[Any]]:
        """Apply a frame; the tensors of its result."""
        assert len(encode_header(StepHeader(step.frame))) < MAX_CONTROL_BYTES / 2
        for operation in step.frame.operations:
            self._apply(operation)
            self.groups = {group_id: group for group_id, group in self.groups.items() if group}
        frame = step.frame
        holders = self.sequences if frame.group_id is None else self.groups[frame.group_id]
        assert frame.group_id is None or [row.sequence_id for row in frame.rows] == list(holders)
        assert len(frame.rows) <= 1 or self.budget.can_pack or frame.group_id is not None
        for row, token_ids in zip(frame.rows, step.token_ids, strict=True):
            holders[row.sequence_id] += token_ids
            assert len(holders[row.sequence_id]) == row.length and len(token_ids) == row.num_tokens
        self._check_budget()
        texts = [holders[row.sequence_id] for row in frame.rows]
        drawn = [next_token(text) for text in texts] if frame.group_id is not None else []
        return [*([drawn] if drawn else []), *self._logprobs(step, texts, drawn)]

    def _logprobs(self, step: Step, texts: list[list[int]], drawn: list[int]) -> list[list[Any]]:
        admitted = [self.admitted[row.sequence_id] for row in step.frame.rows]
        wanted: list[tuple[list[int], int]] = []
        for admit, text, token_ids in zip(admitted, texts, step.token_ids, strict=True):
            num_top = admit.sampling.prompt_logprobs
            for index in range(len(text) - len(token_ids), len(text)):
                if num_top is not None and 0 < index < admit.num_prompt_tokens:
                    wanted.append((text[: index + 1], num_top))
        if wanted and not drawn:
            assert len(texts) * max(map(len, step.token_ids)) <= LOGPROBS_CHUNK_TOKENS
        for admit, text, token_id in zip(admitted, texts, drawn, strict=False):
            if (num_top := admit.sampling.logprobs) is not None:
                wanted.append(([*text, token_id], num_top))
        num_top = max((num_top for _, num_top in wanted), default=0)
        logprobs = [logprobs_of(tokens, num_top) for tokens, _ in wanted]
        tensors: list[list[Any]] = [[one.logprob for one in logprobs]] if wanted else []
        if num_top:
            tensors += [[one.top_ids for one in logprobs], [one.top_logprobs for one in logprobs]]
        return tensors

    def _apply(self, operation: object) -> None:
        if isinstance(operation, Admit):
            assert not (operation.num_cached_tokens and operation.sampling.prompt_logprobs is not None)
            self.admitted[operation.sequence_id] = operation
        match operation:
            case Admit(sequence_id=sequence_id, entry_id=None):
                assert not self.holds(sequence_id)
                self.sequences[sequence_id] = []
            case Admit(sequence_id=sequence_id, entry_id=entry_id, num_cached_tokens=length, takes_entry=takes):
                assert not self.holds(sequence_id) and entry_id is not None
                entry = self.entries.pop(entry_id) if takes else self.entries[entry_id]
                assert 0 < length <= len(entry) and self.budget.can_rewind(len(entry), length)
                self.sequences[sequence_id] = entry[:length]
            case Join(group_id=group_id, sequence_ids=sequence_ids):
                group = self.groups.setdefault(group_id, {})
                group.update({sequence_id: self.sequences.pop(sequence_id) for sequence_id in sequence_ids})
                assert self.budget.batchable or len(group) == 1
            case Detach(sequence_ids=sequence_ids):
                for sequence_id in sequence_ids:
                    (self.sequences[sequence_id],) = [
                        group.pop(sequence_id) for group in self.groups.values() if sequence_id in group
                    ]
            case Leave(sequence_ids=sequence_ids):
                for sequence_id in sequence_ids:
                    self._leave(sequence_id)
            case Keep(entry_id=entry_id, sequence_id=sequence_id, length=length, leaves=leaves):
                assert entry_id not in self.entries
                tokens = self.tokens_of(sequence_id)
                assert len(tokens) == length
                self.entries[entry_id] = list(tokens)
                if leaves:
                    self._leave(sequence_id)
            case Drop(entry_ids=entry_ids):
                for entry_id in entry_ids:
                    del self.entries[entry_id]

    def _leave(self, sequence_id: int) -> None:
        assert self.holds(sequence_id)
        self.sequences.pop(sequence_id, None)
        for group in self.groups.values():
            group.pop(sequence_id, None)

    def tokens_of(self, sequence_id: int) -> list[int]:
        return next(held[sequence_id] for held in (self.sequences, *self.groups.values()) if sequence_id in held)

    def holds(self, sequence_id: int) -> bool:
        return any(sequence_id in held for held in (self.sequences, *self.groups.values()))

    @property
    def is_empty(self) -> bool:
        return not self.sequences and not self.groups

    def _check_budget(self) -> None:
        shapes = [Shape(len(group), max(map(len, group.values()))) for group in self.groups.values()]
        shapes += [Shape(1, len(tokens)) for tokens in self.sequences.values() if tokens]
        kept = self.budget.usage([Shape(1, len(tokens)) for tokens in self.entries.values()])
        assert self.budget.fits(shapes, kept), (shapes, kept)


def make_budget(
    capacity_tokens: int,
    *,
    batchable: bool = True,
    can_pack: bool = True,
    can_keep: bool = True,
    caches: list[CacheCost] | None = None,
    num_ranks: int = 1,
) -> KVBudget:
    cost = RankCost(caches or [CacheCost(1)] * 4, batchable, can_pack and batchable, can_keep)
    return KVBudget([cost] * num_ranks, 1 << 40, max_tokens=capacity_tokens)


class Ring:
    """A scheduler and its ranks, with frames in flight between them, which come back in order.

    `seconds(rows or tokens of prefill)`: what a stage takes for a step; a frame takes no time otherwise. `failures`:
    sequences that the last rank says cannot go on. A grammar is compiled `grammar_frames` after it came.
    """

    def __init__(
        self,
        budget: KVBudget,
        *,
        num_stages: int = 1,
        seconds=lambda rows: 0.01,
        grammar_frames: int = 0,
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "max_sequence_length": budget.capacity_tokens,
            "max_running": 8,
            "chunk_tokens": 256,
        }
        self.num_stages = num_stages
        self.scheduler = Scheduler(budget, SchedulerOptions(num_stages=num_stages, **(defaults | options)))
        self.ranks = Ranks(budget)
        self.seconds = seconds
        self.outputs: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, dict[int, TokenLogprobs]] = {}  # by the token's index in the prompt
        self.finished: dict[str, str] = {}
        self.failures: dict[int, str] = {}
        self.steps: list[Step] = []
        self._submitted: dict[str, Submit] = {}
        self._grammar_frames = grammar_frames
        self._compiling: dict[int, int] = {}  # sequences, and frames until their grammars are compiled
        self._in_flight: deque[tuple[Step, list[list[Any]], list[int]]] = deque()

    def submit(self, name: str, prompt: int | list[int] = 10, max_tokens: int = 5, **options) -> None:
        token_ids = [100 + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        defaults = {"max_tokens_given": True, "stop_token_ids": [STOP], "sampling": SamplingParams()}
        self._submitted[name] = Submit(name, token_ids, max_tokens=max_tokens, **(defaults | options))
        self.scheduler.add(self._submitted[name])

    def launch(self) -> Step | None:
        """Put one more frame into the ring, if the scheduler has one."""
        if (step := self.scheduler.schedule()) is not None:
            self.steps.append(step)
            self._in_flight.append((step, self.ranks.run(step), self._newly_ready(step)))
        return step

    def _newly_ready(self, step: Step) -> list[int]:
        for operation in step.frame.operations:
            if isinstance(operation, Admit) and operation.sampling.grammar is not None:
                self._compiling[operation.sequence_id] = self._grammar_frames
        ready = [sequence_id for sequence_id, left in self._compiling.items() if not left]
        self._compiling = {
            sequence_id: left - 1
            for sequence_id, left in self._compiling.items()
            if left and self.ranks.holds(sequence_id)
        }
        return ready

    def receive(self) -> list[SequenceOutput]:
        """The oldest frame comes back."""
        step, tensors, ready = self._in_flight.popleft()
        width = max((row.num_tokens for row in step.frame.rows), default=0)
        seconds = self.seconds(len(step.frame.rows) * width)
        times = [seconds] * self.num_stages
        rows = {row.sequence_id for row in step.frame.rows if step.frame.group_id is not None}
        failures = {sequence_id: why for sequence_id, why in self.failures.items() if sequence_id in rows}
        outputs = self.scheduler.complete(
            ResultHeader(step.frame.frame_id, times, failures, ready), tensors, sum(times)
        )
        for output in outputs:
            self._take(output)
        return outputs

    def _take(self, output: SequenceOutput) -> None:
        submit = self._submitted[output.request_id]
        self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
        self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
        assert len(output.logprobs) == (0 if submit.sampling.logprobs is None else len(output.token_ids))
        of_prompt = self.prompt_logprobs.setdefault(output.request_id, {})
        for index, logprobs in enumerate(output.prompt_logprobs, output.prompt_logprobs_start):
            of_prompt[index] = logprobs
        if output.token_ids and submit.sampling.prompt_logprobs is not None:
            assert list(of_prompt) == list(range(1, len(submit.prompt_token_ids))), "all before the first token"
        if output.finish_reason:
            self.finished[output.request_id] = output.finish_reason

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def run(self, num_steps: int = 100_000) -> list[Step]:
        """Go on until nothing is left to do, or for so many steps, with as much in flight as there can be."""
        first = len(self.steps)
        while len(self.steps) - first < num_steps:
            is_launched = self.launch() is not None
            if not is_launched and not self._in_flight:
                return self.steps[first:]
            if not is_launched or self.num_stages == 1:  # a ring of one has its result before it looks again
                self.receive()
        assert num_steps < 100_000, "the scheduler does not come to an end"
        return self.steps[first:]

    def started(self) -> dict[str, int]:
        """Cached tokens of every request that was started."""
        return {s.request_id: s.num_cached_tokens for step in self.steps for s in step.started}
