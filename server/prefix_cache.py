"""Rank 0's index of the prefix cache: which token ids' caches are kept, which one a prompt can start from, which goes.

An entry is one sequence's caches at some length, on every rank; only the index is here, and what it decides travels as
Keep, Drop and Admit with the frames, so that all ranks agree. Entries live in what the KV budget has left and go, least
recently used first, as soon as a sequence needs the room. Pure: no mlx, no clock. The scheduler is its only caller.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from server.frame import Drop, Keep, Operation
from server.kv_budget import KVBudget, Shape, Usage

_MOST_ENTRIES = 512  # which every newcomer is compared with
MIN_TOKENS = 64  # shorter prefixes are computed again sooner than they are copied and waited for
_ID_BYTES = 4


def prefix_key(token_ids: Sequence[int]) -> bytes:
    """Token ids in a form of which two are compared by memcmp: 4 bytes each."""
    return array("i", token_ids).tobytes()


def num_shared_tokens(a: bytes, b: bytes) -> int:
    """Tokens that two keys have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high // _ID_BYTES
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low // _ID_BYTES


@dataclass(frozen=True)
class Entry:
    """Caches of the tokens in `key`, kept on every rank."""

    entry_id: int
    key: bytes
    usage: Usage

    @property
    def num_tokens(self) -> int:
        return len(self.key) // _ID_BYTES


@dataclass(frozen=True)
class Hit:
    """The first `num_tokens` of an entry are what a prompt starts with."""

    entry: Entry
    num_tokens: int


class PrefixCache:
    """The entries, least recently used first.

    Args:
        budget: says what an entry costs and whether it can be cut; without `can_keep` nothing is ever kept.
        is_on: PREFIX_CACHE.
    """

    def __init__(self, budget: KVBudget, *, is_on: bool = True) -> None:
        self._budget = budget
        self.is_on = is_on and budget.can_keep
        self.usage = budget.usage([])  # of all entries
        self._entries: dict[int, Entry] = {}
        self._ids = itertools.count()

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def find(self, key: bytes, most: int) -> Hit | None:
        """The entry that a prompt can start from with most tokens, at most `most`; it counts as used now."""
        best: Hit | None = None
        for entry in self._entries.values():
            num_tokens = min(num_shared_tokens(entry.key, key), most)
            if num_tokens > (best.num_tokens if best else 0) and self._budget.can_rewind(entry.num_tokens, num_tokens):
                best = Hit(entry, num_tokens)
        if best is None or best.num_tokens < MIN_TOKENS:
            return None
        self._entries[best.entry.entry_id] = self._entries.pop(best.entry.entry_id)
        return best

    def num_shared_tokens(self, key: bytes) -> int:
        """Tokens that a prompt has in common with any entry, whether it could start from there or not."""
        return max((num_shared_tokens(entry.key, key) for entry in self._entries.values()), default=0)

    def keep(self, sequence_id: int, key: bytes, groups: Sequence[Shape]) -> list[Operation]:
        """Keep what a sequence's caches hold, which is `key`; entries it makes superfluous go. Older ones make room.

        Nothing is kept, and nothing comes back, where little of it is new or `groups` leave no room.
        """
        num_tokens = len(key) // _ID_BYTES
        if not self.is_on or num_tokens < MIN_TOKENS:
            return []
        covered = [entry for entry in self._entries.values() if key.startswith(entry.key)]
        longer = [entry for entry in self._entries.values() if entry.key.startswith(key)]
        if any(self._budget.can_rewind(entry.num_tokens, num_tokens) for entry in longer):
            return []
        if num_tokens - max((entry.num_tokens for entry in covered), default=0) < MIN_TOKENS // 4:
            return []
        usage = self._budget.usage([Shape(1, num_tokens)])
        if not self._budget.fits(groups, usage):
            return []
        operations: list[Operation] = [
            self._drop(entry) for entry in covered if self._budget.can_rewind(num_tokens, entry.num_tokens)
        ]
        operations += self.make_room(groups, usage)
        entry = Entry(next(self._ids), key, usage)
        self._entries[entry.entry_id] = entry
        self.usage.add(usage)
        return [*operations, Keep(entry.entry_id, sequence_id, num_tokens)]

    def make_room(self, groups: Sequence[Shape], more: Usage | None = None) -> list[Operation]:
        """Drop entries until `groups` fit beside them and beside what is to be kept `more`; without entries they do."""
        operations: list[Operation] = []
        wanted = Usage(self.usage.num_tokens, self.usage.rank_bytes)
        if more is not None:
            wanted.add(more)
        while self._entries and (len(self._entries) >= _MOST_ENTRIES or not self._budget.fits(groups, wanted)):
            oldest = next(iter(self._entries.values()))
            wanted.subtract(oldest.usage)
            operations.append(self._drop(oldest))
        return operations

    def _drop(self, entry: Entry) -> Drop:
        del self._entries[entry.entry_id]
        self.usage.subtract(entry.usage)
        return Drop([entry.entry_id])
