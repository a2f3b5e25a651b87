"""The KV caches of one rank: of sequences being prefilled, and of groups that decode together.

mlx-lm's cache classes do the work; this module decides when, one cache at a time: evaluating a whole join, leave or
growth at once peaks at up to 2.5 times the group's bytes, layer by layer below 1.3 (a test holds it). It
changes only as frames say and holds no policy. Lengths are kept beside the caches so that a rank whose state is not
what rank 0 thinks is found out at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, CacheList, KVCache, RotatingKVCache

from server.errors import DisagreementError
from server.frame import Admit, Frame, Join, Leave, Operation
from server.kv_budget import BLOCK_TOKENS, CacheCost, RankCost, blocks

Cache = Any  # mlx-lm's caches share no base class that is exported


@dataclass
class Batch:
    """Caches of one row or several, one entry a cache of the stage; `lengths` are the rows' tokens, in row order."""

    caches: list[Cache]
    sequence_ids: list[int]
    lengths: list[int]


class KVCacheStore:
    """All caches of this rank.

    Args:
        make_caches: fresh caches for one sequence, one entry a cache the stage owns.
        can_batch: whether the model runs on batched caches; where not, each group is one sequence's own caches.
    """

    def __init__(self, make_caches: Callable[[], list[Cache]], *, can_batch: bool = True) -> None:
        self._make_caches = make_caches
        self._can_batch = can_batch
        self._sequences: dict[int, Batch] = {}  # admitted, not in a group yet
        self._groups: dict[int, Batch] = {}
        self.num_bytes = 0  # as of the last frame; read by the heartbeat

    def apply(self, operations: list[Operation]) -> None:
        """Change the caches as a frame says."""
        for operation in operations:
            match operation:
                case Admit(sequence_id=sequence_id):
                    self._sequences[sequence_id] = Batch(self._make_caches(), [sequence_id], [0])
                case Join(group_id=group_id, sequence_ids=sequence_ids):
                    self._join(group_id, [self._sequences.pop(sequence_id) for sequence_id in sequence_ids])
                case Leave(sequence_ids=sequence_ids):
                    self._leave(set(sequence_ids))

    def batch_for(self, frame: Frame, num_tokens: int) -> Batch:
        """The caches that a frame's rows run on, with room for `num_tokens` more in each row.

        Raises:
            DisagreementError: rows or lengths are not what rank 0 thinks.
        """
        batch = self._sequences[frame.rows[0].sequence_id] if frame.group_id is None else self._groups[frame.group_id]
        batch.lengths = [length + num_tokens for length in batch.lengths]
        held = list(zip(batch.sequence_ids, batch.lengths, strict=True))
        expected = [(row.sequence_id, row.length) for row in frame.rows]
        if held != expected:
            raise DisagreementError(f"frame {frame.frame_id} expects rows {expected}, this rank holds {held}")
        for cache in batch.caches:
            _reserve(cache, num_tokens)
        return batch

    def count_bytes(self) -> None:
        """Bring `num_bytes` up to date: what MLX really allocated for all caches."""
        batches = [*self._sequences.values(), *self._groups.values()]
        self.num_bytes = sum(cache.nbytes for batch in batches for cache in batch.caches if not cache.empty())

    def _join(self, group_id: int, joining: list[Batch]) -> None:
        group = self._groups.get(group_id)
        if not (self._can_batch and all(map(is_mergeable, joining[0].caches))):
            (self._groups[group_id],) = joining
            return
        if group is None:
            group = self._groups[group_id] = Batch([None] * len(joining[0].caches), [], [])
        for index, cache in enumerate(group.caches):
            rows = [batch.caches[index] for batch in joining]
            merged = type(rows[0]).merge(rows)
            if cache is None:
                cache = group.caches[index] = merged
            else:
                cache.extend(merged)
            for batch in joining:
                batch.caches[index] = None  # freed now: the next layer's copy takes its place
            del rows, merged
            _settle(cache)
        group.sequence_ids += [sequence_id for batch in joining for sequence_id in batch.sequence_ids]
        group.lengths += [length for batch in joining for length in batch.lengths]

    def _leave(self, leaving: set[int]) -> None:
        for sequence_id in leaving & self._sequences.keys():
            del self._sequences[sequence_id]
        for group_id, group in list(self._groups.items()):
            keep = [i for i, sequence_id in enumerate(group.sequence_ids) if sequence_id not in leaving]
            if not keep:
                del self._groups[group_id]
            elif len(keep) < len(group.sequence_ids):
                for index in range(len(group.caches)):
                    group.caches[index] = _keep_rows(group.caches[index], keep)
                group.sequence_ids = [group.sequence_ids[i] for i in keep]
                group.lengths = [group.lengths[i] for i in keep]
        mx.clear_cache()


def is_mergeable(cache: Cache) -> bool:
    """True if mlx-lm can merge caches of this kind into one batch (not so for llama4's ChunkedKVCache)."""
    return all(map(is_mergeable, cache.caches)) if isinstance(cache, CacheList) else hasattr(cache, "merge")


def measure_cost(caches: list[Cache], *, can_batch: bool = True) -> RankCost:
    """What one sequence costs, read off the shapes of `caches` that one token has passed through, evaluated or not."""
    costs = [cost for cache in caches for cost in _costs(cache)]
    return RankCost(costs, batchable=can_batch and all(map(is_mergeable, caches)))


def _costs(cache: Cache) -> list[CacheCost]:
    if isinstance(cache, CacheList):
        return [cost for member in cache.caches for cost in _costs(member)]
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if keys is None or values is None:  # state-space layers: the same size at every length
        return [CacheCost(0, None, 0 if cache.empty() else cache.nbytes)]
    bytes_per_token = (keys.nbytes + values.nbytes) // keys.shape[2]
    return [CacheCost(bytes_per_token, getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None))]


def _reserve(cache: Cache, num_tokens: int) -> None:
    """Grow a cache by whole blocks before the step needs it, by itself, so that not all layers are held twice."""
    if isinstance(cache, CacheList):
        for member in cache.caches:
            _reserve(member, num_tokens)
        return
    if getattr(cache, "keys", None) is None:
        return
    used, capacity = _used_tokens(cache), cache.keys.shape[2]
    if isinstance(cache, (KVCache, BatchKVCache)) and used + num_tokens > capacity:
        _resize(cache, blocks(used + num_tokens))
    elif isinstance(cache, (RotatingKVCache, BatchRotatingKVCache)) and num_tokens == 1:  # chunks bring their own room
        if used >= capacity and capacity < cache.max_size:
            _resize(cache, min(blocks(used + 1), cache.max_size))


def _keep_rows(cache: Cache, rows: list[int]) -> Cache:
    """A group's cache with only these rows, as small as their longest one needs."""
    if isinstance(cache, CacheList):
        cache.caches = tuple(_keep_rows(member, rows) for member in cache.caches)
        return cache
    if isinstance(cache, BatchRotatingKVCache) and cache.keys is not None:
        # Its `filter` keeps the padding that only a longer row needed.
        cache = BatchRotatingKVCache.merge([cache.extract(row) for row in rows])
    else:
        cache.filter(mx.array(rows))
    _settle(cache)
    return cache


def _settle(cache: Cache) -> None:
    """Evaluate a cache that was just rearranged, cut to whole blocks, and give the old buffers back to the system."""
    if isinstance(cache, CacheList):
        for member in cache.caches:
            _settle(member)
        return
    if isinstance(cache, BatchKVCache) and cache.keys is not None and cache.keys.shape[2] % BLOCK_TOKENS:
        _resize(cache, blocks(cache._idx))
    if not cache.empty():
        mx.eval(cache.state)
    mx.clear_cache()


def _resize(cache: Cache, num_tokens: int) -> None:
    """Give the buffers of `cache` room for exactly `num_tokens` tokens, which is at least what they hold."""
    used = _used_tokens(cache)
    padding = [(0, 0), (0, 0), (0, num_tokens - used), (0, 0)]
    cache.keys = mx.pad(cache.keys[..., :used, :], padding)
    cache.values = mx.pad(cache.values[..., :used, :], padding)
    mx.eval(cache.keys, cache.values)
    mx.clear_cache()


def _used_tokens(cache: Cache) -> int:
    """Tokens that passed through a cache with keys, those of the longest row; a window may have dropped the first."""
    match cache:
        case BatchKVCache():
            return cache._idx
        case BatchRotatingKVCache():
            return cache._offset
        case _:
            return cache.offset
