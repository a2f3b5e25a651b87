"""The KV caches of one rank: of sequences by themselves, of groups that decode together, of prefixes that are kept.

mlx-lm's cache classes do the work, through `cache_ops`; this module decides when, one cache at a time: evaluating a
whole join, leave or growth at once peaks at up to 2.5 times the group's bytes, layer by layer below 1.3 (a test holds
it). It changes only as frames say and holds no policy. Lengths are kept beside the caches so that a rank whose state is
not what rank 0 thinks is found out at once. `Stage` is its only caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from server.cache_ops import (
    Cache,
    copied,
    extracted,
    is_mergeable,
    is_packable,
    keep_rows,
    reserve,
    settle,
    within_window,
)
from server.errors import DisagreementError
from server.frame import Admit, Detach, Drop, Frame, Join, Keep, Leave, Operation


@dataclass
class Batch:
    """Caches of one row or several, one entry a cache of the stage; `lengths` are the rows' tokens, in row order."""

    caches: list[Cache]
    sequence_ids: list[int]
    lengths: list[int]
    num_bytes: int = 0  # as last counted


@dataclass
class Entry:
    """A kept prefix of `length` tokens. Its caches are copied, never run on."""

    caches: list[Cache]
    length: int
    num_bytes: int


class KVCacheStore:
    """All caches of this rank.

    `num_bytes`: of all arrays, as of the last frame. `prefix_bytes`: those of the prefix cache's entries among them,
    which share none with sequences. Both are plain numbers, which the heartbeat's thread reads.

    Args:
        make_caches: fresh caches for one sequence, one entry a cache the stage owns.
        can_batch: whether the model runs on batched caches; where not, each group is one sequence's own caches.
    """

    def __init__(self, make_caches: Callable[[], list[Cache]], *, can_batch: bool = True) -> None:
        self._make_caches = make_caches
        fresh = make_caches()
        self._can_batch = can_batch and all(map(is_mergeable, fresh))
        self._can_pack = self._can_batch and all(map(is_packable, fresh))
        self._sequences: dict[int, Batch] = {}  # in no group, one row each
        self._groups: dict[int, Batch] = {}
        self._entries: dict[int, Entry] = {}
        self.num_bytes = 0
        self.prefix_bytes = 0

    def apply(self, operations: list[Operation]) -> None:
        """Change the caches as a frame says.

        Raises:
            DisagreementError: a prefix is not what rank 0 thinks.
        """
        for operation in operations:
            match operation:
                case Admit():
                    self._admit(operation)
                case Join(group_id=group_id, sequence_ids=sequence_ids):
                    self._join(group_id, [self._sequences.pop(sequence_id) for sequence_id in sequence_ids])
                case Detach(sequence_ids=sequence_ids):
                    for single in self._take_out(set(sequence_ids), extract=True):
                        self._sequences[single.sequence_ids[0]] = single
                case Leave(sequence_ids=sequence_ids):
                    for sequence_id in sequence_ids:
                        self._sequences.pop(sequence_id, None)
                    self._take_out(set(sequence_ids), extract=False)
                case Keep():
                    self._keep(operation)
                case Drop(entry_ids=entry_ids):
                    for entry_id in entry_ids:
                        self._drop(entry_id)
        if operations:
            mx.clear_cache()
            self.num_bytes = self.prefix_bytes
            for batch in (*self._sequences.values(), *self._groups.values()):
                batch.num_bytes = 0
                self._count_bytes(batch)

    @contextmanager
    def running(self, frame: Frame) -> Iterator[list[Cache]]:
        """The caches that a frame's rows run on, with room for its tokens.

        The body runs the model on them and evaluates them; it must not leave anything lazy behind that holds their
        arrays, for then they would be copied. Rows that are in no group are merged for the time of the body.

        Raises:
            DisagreementError: rows or lengths are not what rank 0 thinks.
        """
        if frame.group_id is None:
            batches = [self._sequences[row.sequence_id] for row in frame.rows]
        else:
            batches = [self._groups[frame.group_id]]
        self._check(frame, batches)
        num_tokens = max(row.num_tokens for row in frame.rows)
        if len(batches) == 1:
            for cache in batches[0].caches:
                reserve(cache, num_tokens)
            yield batches[0].caches
            if frame.group_id is None:
                for index, cache in enumerate(batches[0].caches):
                    batches[0].caches[index] = within_window(cache)
                    del cache
        else:
            pack = _packed(batches, num_tokens)
            yield pack
            _unpack(pack, batches, [num_tokens - row.num_tokens for row in frame.rows])
        lengths = iter([row.length for row in frame.rows])
        for batch in batches:
            batch.lengths = [next(lengths) for _ in batch.lengths]
            self._count_bytes(batch)

    def _check(self, frame: Frame, batches: list[Batch]) -> None:
        held = [row for batch in batches for row in zip(batch.sequence_ids, batch.lengths, strict=True)]
        expected = [(row.sequence_id, row.length - row.num_tokens) for row in frame.rows]
        if held != expected:
            raise DisagreementError(f"frame {frame.frame_id} starts from rows {expected}, this rank holds {held}")
        if len(batches) > 1 and not self._can_pack:
            raise DisagreementError(
                f"frame {frame.frame_id} has several prompts, this rank's caches take one at a time"
            )

    def _admit(self, admit: Admit) -> None:
        caches = self._make_caches()
        if admit.entry_id is not None:
            entry = self._entries[admit.entry_id]
            if admit.num_cached_tokens > entry.length:
                raise DisagreementError(
                    f"sequence {admit.sequence_id} starts from {admit.num_cached_tokens} tokens of entry "
                    f"{admit.entry_id}, this rank holds {entry.length}"
                )
            caches = _copies(entry.caches, rewind=entry.length - admit.num_cached_tokens, use_up=admit.takes_entry)
            if admit.takes_entry:
                self._drop(admit.entry_id)
        self._sequences[admit.sequence_id] = Batch(caches, [admit.sequence_id], [admit.num_cached_tokens])

    def _join(self, group_id: int, joining: list[Batch]) -> None:
        if not self._can_batch:
            (self._groups[group_id],) = joining
            return
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = Batch([None] * len(joining[0].caches), [], [])
        for index, cache in enumerate(group.caches):
            merged = _merged(joining, index)
            if cache is None:
                cache = group.caches[index] = merged
            else:
                cache.extend(merged)
            del merged
            settle(cache)
        group.sequence_ids += [sequence_id for batch in joining for sequence_id in batch.sequence_ids]
        group.lengths += [length for batch in joining for length in batch.lengths]

    def _take_out(self, sequence_ids: set[int], *, extract: bool) -> list[Batch]:
        """Take rows out of their groups; with `extract`, give them back as sequences by themselves."""
        singles: list[Batch] = []
        for group_id, group in list(self._groups.items()):
            rows = [row for row, sequence_id in enumerate(group.sequence_ids) if sequence_id in sequence_ids]
            stay = [row for row in range(len(group.sequence_ids)) if row not in rows]
            if rows and (extract or stay):
                singles += self._split(group, rows if extract else [], stay)
            if not stay:
                del self._groups[group_id]
        return singles

    def _split(self, group: Batch, rows: list[int], stay: list[int]) -> list[Batch]:
        """`rows` of a group as sequences by themselves; the group keeps the rows `stay`."""
        if not self._can_batch:
            return [Batch(group.caches, group.sequence_ids, group.lengths)]
        singles = [Batch([], [group.sequence_ids[row]], [group.lengths[row]]) for row in rows]
        for index in range(len(group.caches)):
            for row, single in zip(rows, singles, strict=True):
                single.caches.append(extracted(group.caches[index], row))
            group.caches[index] = keep_rows(group.caches[index], stay) if stay else None
            mx.clear_cache()
        group.sequence_ids = [group.sequence_ids[row] for row in stay]
        group.lengths = [group.lengths[row] for row in stay]
        return singles

    def _keep(self, keep: Keep) -> None:
        holders = [*self._sequences.values(), *self._groups.values()]
        batch = next((batch for batch in holders if keep.sequence_id in batch.sequence_ids), Batch([], [], []))
        length = dict(zip(batch.sequence_ids, batch.lengths, strict=True)).get(keep.sequence_id)
        if length != keep.length:
            raise DisagreementError(
                f"entry {keep.entry_id} keeps {keep.length} tokens of sequence {keep.sequence_id}, "
                f"this rank holds {length}"
            )
        if keep.leaves and keep.sequence_id not in self._sequences:
            (batch,) = self._take_out({keep.sequence_id}, extract=True)
        if keep.leaves or keep.sequence_id in self._sequences or not self._can_batch:
            caches = _copies(batch.caches, use_up=keep.leaves)
        else:
            row = batch.sequence_ids.index(keep.sequence_id)
            caches = [extracted(cache, row) for cache in batch.caches]
        if keep.leaves:
            self._sequences.pop(keep.sequence_id, None)
        entry = self._entries[keep.entry_id] = Entry(caches, keep.length, _num_bytes(caches))
        self.prefix_bytes += entry.num_bytes

    def _drop(self, entry_id: int) -> None:
        self.prefix_bytes -= self._entries.pop(entry_id).num_bytes

    def _count_bytes(self, batch: Batch) -> None:
        """Bring a batch's share of the total up to date."""
        before, batch.num_bytes = batch.num_bytes, _num_bytes(batch.caches)
        self.num_bytes += batch.num_bytes - before


def _packed(batches: list[Batch], num_tokens: int) -> list[Cache]:
    """The caches of several sequences merged, with room for `num_tokens`; the sequences are left without."""
    pack: list[Cache] = []
    for index in range(len(batches[0].caches)):
        pack.append(_merged(batches, index))
        reserve(pack[-1], num_tokens)
    return pack


def _unpack(pack: list[Cache], batches: list[Batch], right_padding: list[int]) -> None:
    """Each row of a pack becomes its sequence's own caches again, without the padding at its right."""
    for index in range(len(pack)):
        for row, (batch, padding) in enumerate(zip(batches, right_padding, strict=True)):
            batch.caches[index] = extracted(pack[index], row, rewind=padding)
        pack[index] = None
        mx.clear_cache()


def _copies(caches: list[Cache], *, rewind: int = 0, use_up: bool = False) -> list[Cache]:
    """All caches of one sequence as they were `rewind` tokens ago; with `use_up` each is given up for its copy."""
    copies: list[Cache] = []
    for index in range(len(caches)):
        copies.append(copied(caches[index], rewind=rewind))
        if use_up:
            caches[index] = None
            mx.clear_cache()
    return copies


def _merged(batches: list[Batch], index: int) -> Cache:
    """One cache of several sequences merged, lazy. They give it up, so that evaluating the result frees theirs."""
    rows = [batch.caches[index] for batch in batches]
    for batch in batches:
        batch.caches[index] = None
    return type(rows[0]).merge(rows)


def _num_bytes(caches: list[Cache]) -> int:
    return sum(cache.nbytes for cache in caches if not cache.empty())
