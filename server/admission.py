"""Who has memory: admits requests, starts them from kept prefixes, lets them grow, and takes their caches away.

Rank 0's view of what every rank's caches hold, and the only place that changes it: each change is an operation that the
next frame carries to all ranks. A request waits until the tightest rank has room for it; what was admitted is preempted
rather than failed. Pure bookkeeping; the scheduler drives it and decides what runs.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from server.frame import Admit, Detach, Drop, Join, Keep, Leave, Operation
from server.groups import Group, Groups
from server.kv_budget import MIB, KVBudget
from server.prefill import PrefillQueue
from server.prefix_cache import MIN_TOKENS, Hit, PrefixCache, num_shared_tokens
from server.protocol import Started
from server.sequence import Sequence, SequenceStatus

logger = logging.getLogger(__name__)

GROWTH_TOKENS = 512  # set aside for a request without max_tokens, and again each time it outgrows that
_MOST_ADMIT_BYTES = 4 * MIB  # of a frame: grammars and ids of prefixes are long, and a frame's header is bounded


class Changes(NamedTuple):
    """What the next frame has to tell the ranks, and which requests just left the queue or are back in it."""

    operations: list[Operation]
    started: list[Started]
    preempted: list[str]


class Admission:
    """Waiting and admitted sequences, their groups, and the prefix cache, under one budget.

    Args:
        budget: what the ranks' caches may hold.
        prefill: the queue that started sequences enter.
        max_sequence_length: prompt + completion of one request, tokens.
        max_running: sequences admitted at once.
        prefix_cache: PREFIX_CACHE.
    """

    def __init__(
        self,
        budget: KVBudget,
        prefill: PrefillQueue,
        *,
        max_sequence_length: int,
        max_running: int,
        prefix_cache: bool,
    ) -> None:
        self.groups = Groups(can_share=budget.batchable)
        self.prefix = PrefixCache(budget, is_on=prefix_cache)
        self._budget = budget
        self._prefill = prefill
        self._max_sequence_length = max_sequence_length
        self._max_running = max_running
        self._waiting: list[Sequence] = []
        self._blocked: list[Sequence] = []  # admitted, but another is reading a prefix that they have too
        self._operations: list[Operation] = []
        self._num_admit_bytes = 0  # among them
        self._started: list[Started] = []
        self._preempted: list[str] = []
        self._refused: Sequence | None = None  # the head of the queue, for which there was no room; nothing went since
        self.num_prompt_tokens = self.num_cached_tokens = self.num_preemptions = 0  # totals

    @property
    def num_running(self) -> int:
        return len(self.groups.members())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens set aside for what runs."""
        return self._budget.usage(self.groups.shapes()).num_tokens

    @property
    def has_changes(self) -> bool:
        return bool(self._operations)

    def take_changes(self) -> Changes:
        """Everything since the last call, for the next frame."""
        changes = Changes(_coalesced(self._operations), self._started, self._preempted)
        self._operations, self._started, self._preempted = [], [], []
        self._num_admit_bytes = 0
        return changes

    def enqueue(self, sequence: Sequence) -> None:
        """Queue a sequence, by priority and age."""
        insort(self._waiting, sequence, key=lambda other: other.order)

    def admit_waiting(self, num_groups_for: Callable[[int], int]) -> None:
        """Admit from the head of the queue as long as the tightest rank has room: nobody overtakes.

        `num_groups_for`: how many groups so many sequences should form.
        """
        self._start_blocked()
        while self._waiting and self.num_running < self._max_running and self._waiting[0] is not self._refused:
            if self._num_admit_bytes > _MOST_ADMIT_BYTES:
                return
            sequence = self._waiting[0]
            num_reserved = self._tokens_to_reserve(sequence)
            group = self.groups.place(num_reserved, num_groups_for(self.num_running + 1), self._budget.fits)
            if group is None:
                self._refused = sequence
                return
            self._waiting.pop(0)
            sequence.num_reserved_tokens = num_reserved
            sequence.group_id = group.group_id
            sequence.status = SequenceStatus.ADMITTED
            group.members.append(sequence)
            self._start_or_block(sequence)

    def _start_or_block(self, sequence: Sequence) -> None:
        """Its caches start from the longest prefix there is, or it waits for one that is just being computed."""
        may_share = self.prefix.is_on and not sequence.wants_prompt_logprobs
        key = sequence.prefix_key() if may_share else b""
        hit = self.prefix.find(key, len(sequence.token_ids) - 1)
        dropped = self.prefix.make_room(self.groups.shapes())
        # The least recently used go first, so the one just found is the last to go: then it is taken over.
        takes = bool(hit and dropped and dropped[-1] == Drop([hit.entry.entry_id]))
        if takes and hit and hit.entry.num_tokens <= sequence.num_reserved_tokens:
            dropped.pop()
        elif takes:
            hit, takes = None, False
        self._operations += dropped
        if not takes and self._waits_for_reader(sequence, key, hit):
            self._blocked.append(sequence)
        else:
            self._start(sequence, key, hit, takes=takes)

    def _waits_for_reader(self, sequence: Sequence, key: bytes, hit: Hit | None) -> bool:
        """Whether another sequence is about to compute more of this prompt than is there; if so it waits for that."""
        if not key:
            return False
        cached = hit.num_tokens if hit else 0
        most = cached + MIN_TOKENS
        for reader in self._prefill.reading():
            shared = num_shared_tokens(reader.prefix_key(), key)
            if shared < most or reader.num_computed_tokens >= shared or reader.order > sequence.order:
                continue
            # On its own it would get every other frame; to wait for much more than that is no gain.
            if self._prefill.num_tokens_before(reader, shared) <= 2 * (shared - cached):
                most, sequence.waits_for, sequence.num_awaited_tokens = shared + 1, reader, shared
        if sequence.waits_for is None:
            return False
        sequence.waits_for.checkpoints.add(sequence.num_awaited_tokens)
        return True

    def _start_blocked(self) -> None:
        for sequence in list(self._blocked):
            if self._num_admit_bytes > _MOST_ADMIT_BYTES:
                return
            reader = sequence.waits_for
            if reader is None or not reader.can_prefill or reader.num_computed_tokens >= sequence.num_awaited_tokens:
                self._blocked.remove(sequence)
                sequence.waits_for = None
                self._start_or_block(sequence)

    def _start(self, sequence: Sequence, key: bytes, hit: Hit | None, *, takes: bool) -> None:
        num_cached = hit.num_tokens if hit else 0
        sequence.has_caches = True
        sequence.awaits_grammar = sequence.submit.sampling.grammar is not None
        sequence.num_computed_tokens = num_cached
        # Its caches are kept on the way where it shares so much with an earlier one whose caches could not be cut.
        shared = self.prefix.num_shared_tokens(key)
        sequence.checkpoints = {shared} if shared >= num_cached + MIN_TOKENS else set()
        self._prefill.add(sequence)
        sampling = sequence.submit.sampling
        admit = Admit(
            sequence.sequence_id,
            sequence.num_prompt_tokens,
            sampling,
            entry_id=hit.entry.entry_id if hit else None,
            num_cached_tokens=num_cached,
            cached_token_ids=sequence.token_ids[:num_cached] if sampling.needs_tokens else [],
            takes_entry=takes,
            stop_token_ids=sequence.submit.stop_token_ids if sampling.min_tokens or sampling.grammar else [],
        )
        self._operations.append(admit)
        self._num_admit_bytes += len(msgspec.msgpack.encode(admit))
        num_cached = min(num_cached, sequence.num_prompt_tokens)
        self._started.append(Started(sequence.request_id, num_cached))
        if not sequence.was_started:
            sequence.was_started = True
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_tokens += num_cached

    def keep(self, sequence: Sequence) -> None:
        """Keep what a sequence's caches hold as an entry of the prefix cache, if it is worth it and there is room."""
        if self.prefix.is_on:
            kept = self.prefix.keep(sequence.sequence_id, sequence.computed_key(), self.groups.shapes())
            self._operations += kept

    def _tokens_to_reserve(self, sequence: Sequence) -> int:
        """All it may need where the client said how much; else GROWTH_TOKENS more than it has, hoping for the best."""
        most = min(sequence.max_length, self._max_sequence_length)
        if sequence.submit.max_tokens_given:
            return most
        return min(most, len(sequence.token_ids) + GROWTH_TOKENS)

    def make_room_to_grow(self, group: Group) -> None:
        """Reserve more for rows that outgrow their share; where there is no more, the last in order step back."""
        for sequence in list(group.rows):
            if sequence.num_computed_tokens < sequence.num_reserved_tokens:
                continue
            most = min(sequence.max_length, self._max_sequence_length)
            wanted = min(most, sequence.num_reserved_tokens + GROWTH_TOKENS)
            least = sequence.num_computed_tokens + 1
            while sequence.status is SequenceStatus.RUNNING:
                sequence.num_reserved_tokens = wanted
                if self._budget.fits(self.groups.shapes()):
                    self._operations += self.prefix.make_room(self.groups.shapes())
                    break
                if wanted > least:
                    wanted = least
                else:
                    self._preempt(max(self.groups.members(), key=lambda other: other.order))

    def _preempt(self, sequence: Sequence) -> None:
        """Take its caches away and queue it again; it is prefilled anew, its ids stay and its stream only pauses."""
        self._evict(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = sequence.num_reserved_tokens = 0
        self.num_preemptions += 1
        self._started = [started for started in self._started if started.request_id != sequence.request_id]
        self._preempted.append(sequence.request_id)
        self.enqueue(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A sequence ends, wherever it is."""
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        else:
            self._evict(sequence, may_keep=True)
        sequence.status = SequenceStatus.FINISHED

    def _evict(self, sequence: Sequence, *, may_keep: bool = False) -> None:
        """Take a sequence out of its group and off the ranks; its caches may stay as an entry of the prefix cache."""
        self.groups.remove(sequence)
        self._refused = None
        self._prefill.discard(sequence)
        if sequence in self._blocked:
            self._blocked.remove(sequence)
        sequence.waits_for = None
        if not sequence.has_caches:
            return
        sequence.has_caches = False
        kept = []
        if may_keep and self.prefix.is_on:
            kept = self.prefix.keep(sequence.sequence_id, sequence.computed_key(), self.groups.shapes())
        if kept and isinstance(kept[-1], Keep):
            self._operations += [*kept[:-1], msgspec.structs.replace(kept[-1], leaves=True)]
        else:
            self._operations.append(Leave([sequence.sequence_id]))

    def join(self, group: Group) -> None:
        """Prefilled members become rows of their group."""
        if joining := [member for member in group.members if member.can_join]:
            self._operations.append(Join(group.group_id, [sequence.sequence_id for sequence in joining]))
            group.rows.extend(joining)
            for sequence in joining:
                sequence.status = SequenceStatus.RUNNING

    def regroup(self, num_wanted: int) -> None:
        """One move towards `num_wanted` groups of like size."""
        move = self.groups.next_move(num_wanted, self._budget.fits)
        if move is None:
            return
        target = move.target or self.groups.open()
        self._refused = None
        logger.debug("%d of %d groups wanted: %d rows move", num_wanted, len(self.groups), len(move.sequences))
        detached = []
        for sequence in move.sequences:
            if sequence in move.source.rows:
                detached.append(sequence.sequence_id)
                sequence.status = SequenceStatus.ADMITTED
            self.groups.remove(sequence)
            sequence.group_id = target.group_id
            target.members.append(sequence)
        if detached:
            self._operations.append(Detach(detached))
        self._operations += self.prefix.make_room(self.groups.shapes())


def _coalesced(operations: list[Operation]) -> list[Operation]:
    """The same operations with runs of leaves made one: caches are filtered once, not once a sequence."""
    result: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Leave) and result and isinstance(result[-1], Leave):
            result[-1] = Leave([*result[-1].sequence_ids, *operation.sequence_ids])
        else:
            result.append(operation)
    return result
