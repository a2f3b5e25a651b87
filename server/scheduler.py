"""Decides what runs next: who is admitted, which group decodes, whose prompt gets the next chunk, who must step back.

Continuous batching under a KV budget. A lap is one chunk's worth of prefill and one decode step of every group, so
neither a long prompt nor running streams starve the other. Pure: no mlx, no sockets, no clock; the engine turns its
steps into frames and tells it what came back. It is the only place where a sequence's life changes.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

from server.frame import Admit, Frame, Join, Leave, Operation, Row
from server.kv_budget import KVBudget, Shape, blocks
from server.protocol import SequenceOutput, Submit
from server.sequence import Sequence, SequenceStatus

GROWTH_TOKENS = 512  # set aside for a request without max_tokens, and again each time it outgrows that


@dataclass
class Group:
    """Sequences that decode together. `rows` are in the caches' batch, the other members are still being prefilled."""

    group_id: int
    members: list[Sequence] = field(default_factory=list)
    rows: list[Sequence] = field(default_factory=list)

    def shape(self, *extra_tokens: int) -> Shape:
        """The rectangle its caches grow to, with further rows of `extra_tokens` each."""
        lengths = [*(member.num_reserved_tokens for member in self.members), *extra_tokens]
        return Shape(len(lengths), max(lengths, default=0))


@dataclass(frozen=True)
class Step:
    """A frame and the tokens that go with it, one list a row. `started` are requests that just left the queue."""

    frame: Frame
    token_ids: list[list[int]]
    started: list[str]


class Scheduler:
    """First come, first served.

    Args:
        budget: what the ranks' caches may hold.
        max_sequence_length: prompt + completion of one request, tokens.
        max_running: sequences admitted at once.
        prefill_chunk_tokens: tokens of one prefill frame, and of all prefill in one lap.
        max_frames_in_flight: frames between `schedule` and `complete`.
    """

    def __init__(
        self,
        budget: KVBudget,
        *,
        max_sequence_length: int,
        max_running: int,
        prefill_chunk_tokens: int,
        max_frames_in_flight: int = 1,
    ) -> None:
        self._budget = budget
        self._max_sequence_length = max_sequence_length
        self._max_running = max_running
        self._chunk_tokens = prefill_chunk_tokens
        self._max_frames_in_flight = max_frames_in_flight

        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._groups: dict[int, Group] = {}
        self._by_request: dict[str, Sequence] = {}
        self._in_flight: dict[int, list[Sequence]] = {}  # frame id: the sequences it decodes
        self._operations: list[Operation] = []  # to go with the next frame
        self._started: list[str] = []

        self._prefill_left = prefill_chunk_tokens  # tokens of prefill left in this lap
        self._groups_left: deque[int] = deque()  # groups that still have to decode in this lap
        self._sequence_ids = itertools.count()
        self._group_ids = itertools.count()
        self._frame_ids = itertools.count()

    @property
    def num_running(self) -> int:
        return sum(len(group.members) for group in self._groups.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_frames_in_flight(self) -> int:
        return len(self._in_flight)

    # -- from the api ------------------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> None:
        """Queue a request. The engine has checked that it can be served at all."""
        sequence = Sequence(next(self._sequence_ids), submit)
        self._by_request[submit.request_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request; its slot and caches are free with the next frame. Unknown ids are fine: it just ended."""
        if (sequence := self._by_request.get(request_id)) is not None:
            self._finish(sequence)

    # -- the step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step to put into the pipeline, or None: nothing to do, or enough is in flight."""
        if len(self._in_flight) >= self._max_frames_in_flight:
            return None
        self._admit_waiting()
        return self._next_in_lap() or self._next_in_lap(new_lap=True) or self._only_operations()

    def complete(self, frame_id: int, sampled_token_ids: list[int]) -> list[SequenceOutput]:
        """A frame came back; what it gave each request that still wants it."""
        outputs = []
        for sequence, token_id in zip(self._in_flight.pop(frame_id), sampled_token_ids, strict=True):
            if sequence.status is not SequenceStatus.RUNNING:  # cancelled while the frame was on its way
                continue
            sequence.token_ids.append(token_id)
            finish_reason = self._finish_reason(sequence, token_id)
            if finish_reason is not None:
                self._finish(sequence)
            outputs.append(SequenceOutput(sequence.request_id, [token_id], finish_reason))
        return outputs

    def _next_in_lap(self, *, new_lap: bool = False) -> Step | None:
        """Prefill first, so that newcomers join the decode step of the same lap; then each group once."""
        if new_lap:
            self._prefill_left = self._chunk_tokens
            self._groups_left = deque(self._groups)
        if self._prefilling and self._next_chunk(self._prefilling[0]) <= self._prefill_left:
            return self._prefill_step(self._prefilling[0])
        while self._groups_left:
            self._prefill_left = 0  # who comes now waits for the next lap
            group = self._groups.get(self._groups_left.popleft())
            if group is not None and (step := self._decode_step(group)) is not None:
                return step
        return None

    def _prefill_step(self, sequence: Sequence) -> Step:
        start = sequence.num_computed_tokens
        num_tokens = self._next_chunk(sequence)
        sequence.num_computed_tokens += num_tokens
        self._prefill_left -= num_tokens
        if sequence.num_tokens_to_prefill == 0:
            self._prefilling.popleft()
        row = Row(sequence.sequence_id, sequence.num_computed_tokens)
        return self._step([row], [sequence.token_ids[start : start + num_tokens]], [])

    def _next_chunk(self, sequence: Sequence) -> int:
        """Whole chunks only: what a lap has left over would cost a pass over all weights for a few tokens."""
        return min(sequence.num_tokens_to_prefill, self._chunk_tokens)

    def _decode_step(self, group: Group) -> Step | None:
        self._make_room_to_grow(group)
        joining = [m for m in group.members if m.status is SequenceStatus.PREFILLING and not m.num_tokens_to_prefill]
        if joining:
            self._operations.append(Join(group.group_id, [sequence.sequence_id for sequence in joining]))
            group.rows.extend(joining)
            for sequence in joining:
                sequence.status = SequenceStatus.RUNNING
        if not group.rows:
            return None
        for sequence in group.rows:
            sequence.num_computed_tokens += 1
        rows = [Row(sequence.sequence_id, sequence.num_computed_tokens) for sequence in group.rows]
        return self._step(rows, [sequence.token_ids[-1:] for sequence in group.rows], list(group.rows), group.group_id)

    def _only_operations(self) -> Step | None:
        """Nobody runs, but somebody left: let the ranks free the memory now."""
        return self._step([], [], []) if self._operations else None

    def _step(
        self, rows: list[Row], token_ids: list[list[int]], decoding: list[Sequence], group_id: int | None = None
    ) -> Step:
        frame = Frame(next(self._frame_ids), _coalesced(self._operations), rows, group_id)
        started, self._operations, self._started = self._started, [], []
        self._in_flight[frame.frame_id] = decoding
        return Step(frame, token_ids, started)

    # -- a sequence's life -------------------------------------------------------------------------------------------

    def _admit_waiting(self) -> None:
        """Admit from the head of the queue as long as the tightest rank has room: nobody overtakes."""
        while self._waiting and self.num_running < self._max_running:
            sequence = self._waiting[0]
            num_reserved = self._tokens_to_reserve(sequence)
            group = self._group_for(num_reserved)
            if group is None:
                return
            self._waiting.popleft()
            sequence.num_reserved_tokens = num_reserved
            sequence.group_id = group.group_id
            sequence.status = SequenceStatus.PREFILLING
            self._groups[group.group_id] = group
            group.members.append(sequence)
            self._operations.append(Admit(sequence.sequence_id, sequence.num_prompt_tokens, sequence.submit.sampling))
            if sequence.num_tokens_to_prefill:
                self._prefilling.append(sequence)
            if not sequence.was_started:
                sequence.was_started = True
                self._started.append(sequence.request_id)

    def _tokens_to_reserve(self, sequence: Sequence) -> int:
        """All it may need where the client said how much; else GROWTH_TOKENS more than it has, hoping for the best."""
        most = min(sequence.max_length, self._max_sequence_length)
        if sequence.submit.max_tokens_given:
            return most
        return min(most, len(sequence.token_ids) + GROWTH_TOKENS)

    def _group_for(self, num_tokens: int) -> Group | None:
        """The group that a new row of `num_tokens` costs least, a new group where none takes it, None: no room.

        A row that would more than double a group's rectangle does not join it: left padding would eat the memory.
        """
        if self._budget.batchable:
            for group in sorted(
                self._groups.values(), key=lambda group: _area(group.shape(num_tokens)) - _area(group.shape())
            ):
                doubles = _area(group.shape(num_tokens)) > 2 * _area(group.shape())
                if not doubles and self._fits_with(group.group_id, group.shape(num_tokens)):
                    return group
        if self._fits_with(-1, Shape(1, num_tokens)):
            return Group(next(self._group_ids))
        return None

    def _fits_with(self, group_id: int, shape: Shape) -> bool:
        others = [group.shape() for group in self._groups.values() if group.group_id != group_id]
        return self._budget.fits([*others, shape])

    def _make_room_to_grow(self, group: Group) -> None:
        """Reserve more for rows that outgrow their share; where there is no more, the youngest step back."""
        for sequence in list(group.rows):
            if (
                sequence.status is not SequenceStatus.RUNNING
                or sequence.num_computed_tokens < sequence.num_reserved_tokens
            ):
                continue
            most = min(sequence.max_length, self._max_sequence_length)
            wanted = min(most, sequence.num_reserved_tokens + GROWTH_TOKENS)
            least = sequence.num_computed_tokens + 1
            while sequence.status is SequenceStatus.RUNNING:
                sequence.num_reserved_tokens = wanted
                if self._budget.fits([other.shape() for other in self._groups.values()]):
                    break
                if wanted > least:
                    wanted = least
                else:
                    self._preempt(max(self._admitted(), key=lambda other: other.sequence_id))

    def _admitted(self) -> list[Sequence]:
        return [member for group in self._groups.values() for member in group.members]

    def _preempt(self, sequence: Sequence) -> None:
        """Take its caches away and queue it first; it is prefilled again, its ids stay and its stream only pauses."""
        self._evict(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = sequence.num_reserved_tokens = 0
        self._waiting.appendleft(sequence)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        else:
            self._evict(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._by_request[sequence.request_id]

    def _evict(self, sequence: Sequence) -> None:
        group = self._groups[sequence.group_id]
        group.members.remove(sequence)
        if sequence in group.rows:
            group.rows.remove(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        if not group.members:
            del self._groups[group.group_id]
        self._operations.append(Leave([sequence.sequence_id]))

    def _finish_reason(self, sequence: Sequence, token_id: int) -> str | None:
        if token_id in sequence.submit.stop_token_ids:
            return "stop"
        if sequence.num_output_tokens >= sequence.submit.max_tokens:
            return "length"
        if len(sequence.token_ids) >= self._max_sequence_length:
            return "length"
        return None


def _area(shape: Shape) -> int:
    """Tokens of a group's rectangle."""
    return shape.rows * blocks(shape.longest)


def _coalesced(operations: list[Operation]) -> list[Operation]:
    """The same operations with runs of leaves made one: caches are filtered once, not once a sequence."""
    result: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Leave) and result and isinstance(result[-1], Leave):
            result[-1] = Leave([*result[-1].sequence_ids, *operation.sequence_ids])
        else:
            result.append(operation)
    return result
