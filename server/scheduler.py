"""Decides what runs next: who is admitted, which group decodes, whose prompt gets the next chunk, who must step back.

Continuous batching in micro-batch groups under a KV budget. A lap is one chunk's worth of prefill and one decode step
of every group, so neither a long prompt nor running streams starve the other. Pure: no mlx, no sockets, no clock; the
engine turns its steps into frames and tells it what came back and how long it took. Who has memory is `admission`'s
business; here is what runs when.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from server.admission import Admission
from server.frame import Frame, ResultHeader, Row
from server.grouping import choose_num_groups
from server.groups import Group
from server.kv_budget import KVBudget
from server.prefill import PrefillQueue
from server.protocol import SchedulerCounters, SequenceOutput, Started, Submit
from server.results import RowResult, row_results
from server.sequence import Sequence, SequenceStatus
from server.step_times import StepTimes

_UNSATURATED = 1.05  # a way round that takes so many times longer than all groups' turns on the slowest stage


@dataclass(frozen=True)
class SchedulerOptions:
    """What the user or the ring decides, in tokens where not said otherwise.

    Args:
        max_sequence_length: prompt + completion of one request.
        max_running: sequences admitted at once.
        num_stages: of the ring.
        chunk_tokens: of all prefill in one lap, None: as measured times say.
        num_groups: of micro-batches, None: as measured times say.
        prefix_cache: keep and reuse prefixes where caches allow.
    """

    max_sequence_length: int
    max_running: int
    num_stages: int = 1
    chunk_tokens: int | None = None
    num_groups: int | None = None
    prefix_cache: bool = True


@dataclass(frozen=True)
class Step:
    """A frame and the tokens that go with it, one list a row. `started` are requests that just left the queue."""

    frame: Frame
    token_ids: list[list[int]]
    started: list[Started]
    preempted: list[str]  # requests that wait again


@dataclass
class _InFlight:
    """What a frame carries that has not come back: a group's decode step, or prefill, or only operations."""

    group: Group | None = None
    rows: list[tuple[Sequence, Row]] = field(default_factory=list)
    num_groups: int = 0
    num_prefill_tokens: int = 0
    was_clean: bool = False  # no prefill in flight, which would slow it down where ranks share a machine


class Scheduler:
    """First come, first served, by priority."""

    def __init__(self, budget: KVBudget, options: SchedulerOptions) -> None:
        self._options = options
        self._step_times = StepTimes()
        self._prefill = PrefillQueue(options.num_stages, options.chunk_tokens, can_pack=budget.can_pack)
        self._admission = Admission(
            budget,
            self._prefill,
            max_sequence_length=options.max_sequence_length,
            max_running=options.max_running,
            prefix_cache=options.prefix_cache,
        )
        self._groups = self._admission.groups
        self._by_request: dict[str, Sequence] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._is_idle = True  # there was nothing to do since the last frame came back

        self._prefill_left: int | None = None  # tokens of prefill left in this lap, None: it had none yet
        self._groups_left: list[int] = []  # groups that still have to decode in this lap
        self._num_groups: dict[int, int] = {}  # that so many sequences should form, as decided in this lap
        self._sequence_ids = itertools.count()
        self._frame_ids = itertools.count()
        self._num_generated_tokens = 0

    @property
    def num_running(self) -> int:
        return self._admission.num_running

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    @property
    def num_frames_in_flight(self) -> int:
        return len(self._in_flight)

    def counters(self) -> SchedulerCounters:
        """For /metrics."""
        admission = self._admission
        return SchedulerCounters(
            num_groups=len(self._groups),
            num_kv_tokens=admission.num_kv_tokens,
            num_prefix_entries=admission.prefix.num_entries,
            num_prefix_tokens=admission.prefix.usage.num_tokens,
            num_prompt_tokens=admission.num_prompt_tokens,
            num_cached_tokens=admission.num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=admission.num_preemptions,
        )

    # -- from the api ------------------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> None:
        """Queue a request. The engine has checked that it can be served at all."""
        sequence = Sequence(next(self._sequence_ids), submit)
        self._by_request[submit.request_id] = sequence
        self._admission.enqueue(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its slot and caches are free with the next frame. Unknown ids are fine: it just ended."""
        if (sequence := self._by_request.get(request_id)) is not None:
            self._finish(sequence)

    # -- the step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step to put into the pipeline, or None: nothing to do before something comes back."""
        self._admission.admit_waiting(self._num_groups_for)
        self._admission.regroup(self._num_groups_for(self.num_running))
        step = self._next_in_lap() or self._only_operations()
        if step is None and not self._in_flight:
            self._is_idle = True
        return step

    def complete(self, result: ResultHeader, tensors: list[list[Any]], round_trip_s: float) -> list[SequenceOutput]:
        """A frame came back: what it gave each request that still wants it.

        Args:
            result: its header.
            tensors: those that came with it, as lists.
            round_trip_s: seconds from its start on rank 0 until now.
        """
        done = self._in_flight.pop(result.frame_id)
        self._note_times(done, result.stage_seconds, round_trip_s)
        if done.group is not None:
            done.group.is_in_flight = False
        if result.ready:
            self._note_ready(result.ready)
        results = row_results(done.rows, tensors, has_drawn=done.group is not None)
        outputs = [
            self._output(sequence, row, given, result.failures.get(sequence.sequence_id))
            for (sequence, row), given in zip(done.rows, results, strict=True)
            if sequence.status is not SequenceStatus.FINISHED  # cancelled meanwhile
        ]
        return [output for output in outputs if output is not None]

    def _note_ready(self, sequence_ids: list[int]) -> None:
        """Who was preempted since and is admitted again may have to wait after all, in its group: not for long."""
        for sequence in self._groups.members():
            if sequence.sequence_id in sequence_ids:
                sequence.awaits_grammar = False

    def _output(self, sequence: Sequence, row: Row, given: RowResult, failure: str | None) -> SequenceOutput | None:
        """Take what a row gave; None where it is nothing to its request."""
        token_ids, finish_reason = [], None
        if given.token_id is not None:
            if len(sequence.token_ids) != row.length:
                return None  # preempted and already past this token, which another frame drew alike
            if failure is not None:
                self._finish(sequence)
                return SequenceOutput(sequence.request_id, finish_reason="error", error=failure)
            token_ids = [given.token_id]
            finish_reason = self._append(sequence, given.token_id)
        elif not given.prompt_logprobs:
            return None
        return SequenceOutput(
            sequence.request_id,
            token_ids,
            finish_reason,
            logprobs=given.logprobs,
            prompt_logprobs=given.prompt_logprobs,
            prompt_logprobs_start=given.prompt_start,
        )

    def _append(self, sequence: Sequence, token_id: int) -> str | None:
        """A sequence has one more token; why it ends with it, if it does."""
        sequence.token_ids.append(token_id)
        self._num_generated_tokens += 1
        if sequence.can_prefill:  # preempted while the frame was on its way, admitted again, and read to the end
            self._prefill.add(sequence)
        finish_reason = self._finish_reason(sequence, token_id)
        if finish_reason is not None:
            self._finish(sequence)
        return finish_reason

    def _note_times(self, done: _InFlight, stage_seconds: list[float], round_trip_s: float) -> None:
        is_clean = done.was_clean and not any(other.num_prefill_tokens for other in self._in_flight.values())
        if done.group is not None and is_clean:
            self._step_times.note(done.num_groups, len(done.rows), stage_seconds)
            # With all stages busy a group also waits for its turn, which is no overhead of the links.
            if round_trip_s > _UNSATURATED * done.num_groups * max(stage_seconds):
                self._step_times.note_overhead(round_trip_s - sum(stage_seconds))
        if done.num_prefill_tokens:
            self._prefill.times.note(done.num_prefill_tokens, stage_seconds)

    # -- a lap -------------------------------------------------------------------------------------------------------

    def _next_in_lap(self) -> Step | None:
        """Prefill first, so that newcomers join the decode step of the same lap; then each group once.

        While the groups that are left are on their way, more prefill fills stages that would stand idle, and only
        those: it would make the groups wait behind it.
        """
        may_prefill = sum(bool(f.num_prefill_tokens) for f in self._in_flight.values()) <= self._options.num_stages
        for _ in range(2):  # what is left of this lap, or the next one
            if not self._groups_left:
                self._groups_left = [group.group_id for group in self._groups]
                self._num_groups.clear()
                self._prefill_left = None
            if may_prefill and (step := self._prefill_step(self._prefill_left)) is not None:
                return step
            if (step := self._next_decode_step()) is not None:
                self._prefill_left = 0  # who comes now waits for the next lap
                return step
            if self._groups_left:
                break
        if may_prefill and self._groups_left and len(self._in_flight) < self._options.num_stages:
            return self._prefill_step(None)
        return None

    def _prefill_step(self, tokens_left: int | None) -> Step | None:
        if not self._prefill.reading():
            return None
        running = [len(group.rows) for group in self._groups if group.rows]
        limits = self._prefill.limits(sum(running), len(running), self._step_times)
        parts = self._prefill.next_parts(limits.chunk, tokens_left)
        if not parts:
            return None
        rows, token_ids = [], []
        for part in parts:
            sequence, start = part.sequence, part.sequence.num_computed_tokens
            self._prefill.computed(part)
            rows.append((sequence, Row(sequence.sequence_id, sequence.num_computed_tokens, part.num_tokens)))
            token_ids.append(sequence.token_ids[start : start + part.num_tokens])
        num_tokens = len(parts) * max(part.num_tokens for part in parts)
        self._prefill_left = (limits.lap if tokens_left is None else tokens_left) - num_tokens
        step = self._step(token_ids, _InFlight(rows=rows, num_prefill_tokens=num_tokens))
        for sequence, _ in parts:
            if not sequence.num_tokens_to_prefill or sequence.num_computed_tokens in sequence.checkpoints:
                self._admission.keep(sequence)
        return step

    def _next_decode_step(self) -> Step | None:
        """A step of the first group of this lap that is here; groups with nobody to decode are passed over."""
        for group_id in list(self._groups_left):
            group = self._groups.get(group_id)
            if group is not None and group.is_in_flight:
                continue
            self._groups_left.remove(group_id)
            if group is not None and (step := self._decode_step(group)) is not None:
                return step
        return None

    def _decode_step(self, group: Group) -> Step | None:
        self._admission.make_room_to_grow(group)
        self._admission.join(group)
        if not group.rows:
            return None
        for sequence in group.rows:
            sequence.num_computed_tokens += 1
        rows = [(sequence, Row(sequence.sequence_id, sequence.num_computed_tokens)) for sequence in group.rows]
        token_ids = [sequence.token_ids[-1:] for sequence in group.rows]
        num_groups = sum(bool(other.rows) for other in self._groups)
        group.is_in_flight = True
        return self._step(token_ids, _InFlight(group, rows, num_groups))

    def _only_operations(self) -> Step | None:
        """Nobody runs, but somebody left: let the ranks free the memory now. Or whoever is left waits for a grammar."""
        awaits = not self._in_flight and any(member.only_awaits_grammar for member in self._groups.members())
        return self._step([], _InFlight(), awaits_grammar=awaits) if awaits or self._admission.has_changes else None

    def _step(self, token_ids: list[list[int]], in_flight: _InFlight, *, awaits_grammar: bool = False) -> Step:
        changes = self._admission.take_changes()
        rows = [row for _, row in in_flight.rows]
        group_id = None if in_flight.group is None else in_flight.group.group_id
        frame = Frame(
            next(self._frame_ids),
            changes.operations,
            rows,
            group_id,
            after_idle=self._is_idle,
            awaits_grammar=awaits_grammar,
        )
        self._is_idle = False
        in_flight.was_clean = not any(other.num_prefill_tokens for other in self._in_flight.values())
        self._in_flight[frame.frame_id] = in_flight
        return Step(frame, token_ids, changes.started, changes.preempted)

    # -- sequences and groups ----------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence) -> None:
        self._admission.finish(sequence)
        del self._by_request[sequence.request_id]

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        if token_id in sequence.submit.stop_token_ids:
            return "stop"
        if sequence.num_output_tokens >= sequence.submit.max_tokens:
            return "length"
        if len(sequence.token_ids) >= self._options.max_sequence_length:
            return "length"
        return None

    def _num_groups_for(self, num_rows: int) -> int:
        """How many groups so many sequences should form. Asked at every step, decided again each lap."""
        if self._options.num_groups is not None:
            return min(self._options.num_groups, max(num_rows, 1))
        if num_rows not in self._num_groups:
            current = len(self._groups)
            self._num_groups[num_rows] = choose_num_groups(
                num_rows, self._options.num_stages, self._step_times, current
            )
        return self._num_groups[num_rows]
