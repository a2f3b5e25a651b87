"""How many bytes the KV caches may and will take: arithmetic that decides who is admitted. No mlx, no clock.

Caches are counted as mlx-lm really allocates them: a group of sequences is one rectangle, rows × the longest length
in whole blocks of 256 tokens, left-padded; a sliding-window layer stops growing at its window; a state-space layer
does not grow. Each rank has its own costs and limit, and the tightest rank decides. The scheduler is the only caller
that asks again and again; start-up asks once what fits.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from server.errors import BudgetError

BLOCK_TOKENS = 256  # mlx-lm's caches grow by this many tokens
MIB = 1024 * 1024


def blocks(num_tokens: int) -> int:
    """`num_tokens` rounded up to whole blocks, in tokens."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


class CacheCost(msgspec.Struct, frozen=True):
    """Bytes of one cache: so many a token, up to `window` tokens (None: no end), and `fixed_bytes` a sequence.

    `room`: for so many tokens more it may have room, however many it holds.
    """

    bytes_per_token: int
    window: int | None = None
    fixed_bytes: int = 0
    room: int = 0

    def row_bytes(self, num_tokens: int) -> int:
        """Bytes of one row of `num_tokens` allocated tokens."""
        held = num_tokens if self.window is None else min(num_tokens, self.window)
        return self.fixed_bytes + (held + self.room) * self.bytes_per_token


class RankCost(msgspec.Struct, frozen=True):
    """What the caches of one rank's layers cost, one entry a cache, and what can be done with them.

    `batchable`: sequences can share a batch. `can_pack`: prompts of different lengths can be prefilled side by side,
    padded at their right. `can_keep`: they can be copied, so that the prefix cache works.
    """

    caches: list[CacheCost]
    batchable: bool = True
    can_pack: bool = False
    can_keep: bool = False

    def row_bytes(self, num_tokens: int) -> int:
        return sum(cache.row_bytes(num_tokens) for cache in self.caches)

    def copy_bytes(self, num_tokens: int) -> int:
        """The largest single cache: a join, a leave or a growth copies one cache at a time."""
        return max((cache.row_bytes(num_tokens) for cache in self.caches), default=0)


class Shape(msgspec.Struct, frozen=True):
    """A group as the budget sees it."""

    rows: int
    longest: int  # tokens of its longest sequence


class Usage(msgspec.Struct):
    """Tokens and bytes of caches, added up over some of them."""

    num_tokens: int
    rank_bytes: list[int]  # on a rank of each kind, see KVBudget

    def add(self, other: Usage) -> None:
        self.num_tokens += other.num_tokens
        self.rank_bytes = [a + b for a, b in zip(self.rank_bytes, other.rank_bytes, strict=True)]

    def subtract(self, other: Usage) -> None:
        self.num_tokens -= other.num_tokens
        self.rank_bytes = [a - b for a, b in zip(self.rank_bytes, other.rank_bytes, strict=True)]


class KVBudget:
    """The limits of all ranks.

    Args:
        ranks: each rank's costs, in rank order.
        reserved_bytes: KV_CACHE_RESERVED_MEMORY_MB in bytes, a ceiling on every rank.
        max_tokens: KV_CACHE_MAX_SIZE, rounded up to whole blocks, or None.
        chunk_tokens: of all prefill in one lap; sliding windows hold up to so many tokens more until the rows join.
    """

    def __init__(
        self, ranks: list[RankCost], reserved_bytes: int, max_tokens: int | None = None, *, chunk_tokens: int = 1
    ) -> None:
        self._ranks = ranks
        # Ranks whose layers cost the same are one kind: most rings have a few, however long they are.
        kinds = [rank for index, rank in enumerate(ranks) if rank not in ranks[:index]]
        self._kind_of = [kinds.index(rank) for rank in ranks]
        self._rows = [_merged(kind) for kind in kinds]
        self._largest = [RankCost(list(set(kind.caches))) for kind in kinds]
        self._chunk_tokens = chunk_tokens
        self._reserved_bytes = reserved_bytes
        self._max_tokens = None if max_tokens is None else blocks(max_tokens)
        self.capacity_tokens = self._capacity_tokens()

    @property
    def batchable(self) -> bool:
        """False where some layer's cache cannot be merged with another's: then every group has one row."""
        return all(rank.batchable for rank in self._ranks)

    @property
    def can_pack(self) -> bool:
        """True where prompts of different lengths can be prefilled side by side."""
        return all(rank.can_pack for rank in self._ranks)

    @property
    def can_keep(self) -> bool:
        """True where caches can be copied, so that prefixes can be kept."""
        return all(rank.can_keep for rank in self._ranks)

    def can_rewind(self, num_tokens: int, to: int) -> bool:
        """True if caches of `num_tokens` can be cut to their first `to`.

        A sliding window that has moved on has lost what was before it, a state-space layer cannot go back at all.
        """
        if num_tokens == to:
            return True
        caches = [cache for rank in self._rows for cache in rank.caches]
        return not any(c.fixed_bytes or (c.window is not None and num_tokens >= c.window) for c in caches)

    def usage(self, groups: Iterable[Shape]) -> Usage:
        """What `groups` come to, without the working copy."""
        groups = list(groups)
        num_tokens = sum(group.rows * blocks(group.longest) for group in groups)
        return Usage(num_tokens, [_bytes(row, groups) for row in self._rows])

    def bytes_on(self, rank: int, groups: Iterable[Shape]) -> int:
        """What `groups` come to on one rank, in bytes, without the working copy."""
        return _bytes(self._rows[self._kind_of[rank]], groups)

    def bytes_limit(self, rank: int) -> int:
        """What one rank may hold: the smaller of the two keys.

        KV_CACHE_MAX_SIZE tokens cost most as one row where caches grow with every token, and as many short rows where
        windows and fixed states make them cheaper by the token.
        """
        if self._max_tokens is None:
            return self._reserved_bytes
        cost = self._ranks[rank]
        as_short_rows = self._max_tokens // BLOCK_TOKENS * cost.row_bytes(BLOCK_TOKENS)
        by_tokens = max(cost.row_bytes(self._max_tokens), as_short_rows) + self._overshoot_bytes(cost)
        return min(self._reserved_bytes, by_tokens)

    def fits(self, groups: Iterable[Shape], kept: Usage | None = None) -> bool:
        """True if every rank can hold `groups` beside what is `kept`, with room for the working copy of one cache."""
        groups = [group for group in groups if group.rows]
        usage = self.usage(groups)
        if kept is not None:
            usage.add(kept)
        if self._max_tokens is not None and usage.num_tokens > self._max_tokens:
            return False
        return all(
            num_bytes + self._overshoot_bytes(self._rows[kind]) + self._working_bytes(self._largest[kind], groups)
            <= self._reserved_bytes
            for kind, num_bytes in enumerate(usage.rank_bytes)
        )

    def max_sequence_length(self, configured: int | None, model_context: int | None) -> int:
        """Tokens of the longest request (prompt + completion) that is served.

        Raises:
            BudgetError: MAX_SEQUENCE_LENGTH is more than the cache or the model holds, or nothing fits at all.
        """
        if self.capacity_tokens < 1:
            needed = max(
                cost.row_bytes(BLOCK_TOKENS)
                + self._overshoot_bytes(cost)
                + self._working_bytes(cost, [Shape(1, BLOCK_TOKENS)])
                for cost in self._ranks
            )
            raise BudgetError(
                f"KV_CACHE_RESERVED_MEMORY_MB={self._reserved_bytes // MIB} cannot hold one request: the smallest "
                f"cache of this model takes {-(-needed // MIB)} MB on its tightest rank; set it to at least that"
            )
        if configured is None:
            return min(self.capacity_tokens, model_context or self.capacity_tokens)
        if configured > self.capacity_tokens:
            raise BudgetError(
                f"MAX_SEQUENCE_LENGTH={configured} is more than the KV cache holds ({self.capacity_tokens} tokens): "
                "lower it, or raise KV_CACHE_MAX_SIZE and KV_CACHE_RESERVED_MEMORY_MB"
            )
        if model_context is not None and configured > model_context:
            raise BudgetError(
                f"MAX_SEQUENCE_LENGTH={configured} is more than the model's context of {model_context} tokens: lower it"
            )
        return configured

    def _capacity_tokens(self) -> int:
        """Longest single sequence that fits, in tokens: the largest number of whole blocks, found by bisection."""
        if self._max_tokens is not None:
            high = self._max_tokens // BLOCK_TOKENS
        else:
            high = 1 << 20  # 268 million tokens: where every layer has a window or a fixed state, there is no end
        low = 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits([Shape(1, middle * BLOCK_TOKENS)]):
                low = middle
            else:
                high = middle - 1
        return low * BLOCK_TOKENS

    def _overshoot_bytes(self, cost: RankCost) -> int:
        """While a chunk is read, each of its tokens still sees a whole window before it."""
        return (self._chunk_tokens - 1) * sum(c.bytes_per_token for c in cost.caches if c.window is not None)

    @staticmethod
    def _working_bytes(cost: RankCost, groups: list[Shape]) -> int:
        return max((group.rows * cost.copy_bytes(blocks(group.longest)) for group in groups), default=0)


def _bytes(cost: RankCost, groups: Iterable[Shape]) -> int:
    return sum(group.rows * cost.row_bytes(blocks(group.longest)) for group in groups)


def _merged(cost: RankCost) -> RankCost:
    """The same cost of a row in few terms: caches with the same window are one, however many layers there are."""
    merged: dict[tuple[int | None, int], CacheCost] = {}
    for cache in cost.caches:
        kind = (cache.window, cache.room)
        so_far = merged.get(kind, CacheCost(0, cache.window, room=cache.room))
        merged[kind] = CacheCost(
            so_far.bytes_per_token + cache.bytes_per_token,
            cache.window,
            so_far.fixed_bytes + cache.fixed_bytes,
            cache.room,
        )
    return RankCost(list(merged.values()))
