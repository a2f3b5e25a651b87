"""What a rank does to mlx-lm's caches, one at a time: make room, merge, take rows out, copy; and what one costs.

Whatever rearranges a cache also evaluates it, so that a caller who goes cache by cache never holds more than one of
them twice. It decides nothing and keeps nothing; `KVCacheStore` is the caller, and `Stage` measures costs with it. A
further class of caches is made known in the tables below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from server.errors import DisagreementError
from server.kv_budget import BLOCK_TOKENS, CacheCost, RankCost, blocks
from server.quantized_cache import BatchQuantizedKVCache, MergeableQuantizedKVCache

Cache = Any  # mlx-lm's caches share no base class that is exported

# Classes that hold every token, and those that hold the last `max_size`: the attribute that says how many tokens have
# passed through, those of the longest row. Their keys and values are arrays, or tuples of them, with tokens at axis -2.
_PLAIN: dict[type, str] = {
    KVCache: "offset",
    BatchKVCache: "_idx",
    MergeableQuantizedKVCache: "offset",
    BatchQuantizedKVCache: "_idx",
}
_ROTATING: dict[type, str] = {RotatingKVCache: "offset", BatchRotatingKVCache: "_offset"}
# Merged, these take rows of different lengths, padded at the right.
_PACKABLE: set[type] = {KVCache, MergeableQuantizedKVCache}
# Tokens after which a cache of an unknown class is looked at: one short of whole blocks, when what it gathers before it
# closes a group of them is most; past the windows that such caches have.
_GROWTH_RUNS = (BLOCK_TOKENS - 1, 2 * BLOCK_TOKENS - 1)
_COPYABLE: set[type] = {KVCache, MergeableQuantizedKVCache, RotatingKVCache, ChunkedKVCache, ArraysCache}


def is_mergeable(cache: Cache) -> bool:
    """True if mlx-lm can merge caches of this kind into one batch (not so for llama4's ChunkedKVCache)."""
    return all(map(is_mergeable, cache.caches)) if isinstance(cache, CacheList) else hasattr(cache, "merge")


def is_packable(cache: Cache) -> bool:
    """True if merged caches of this kind can run prompts of different lengths side by side.

    Padding at the right would turn over a window and run through a state, so only caches that hold every token can.
    """
    return type(cache) in _PACKABLE


def uncopyable_class(cache: Cache) -> str | None:
    """None if `copied` knows caches of this kind, else the name of the class that it does not."""
    if isinstance(cache, CacheList):
        return next(filter(None, map(uncopyable_class, cache.caches)), None)
    return None if type(cache) in _COPYABLE else type(cache).__name__


def measure_cost(
    caches: list[Cache], *, can_batch: bool = True, run: Callable[[int], list[Cache]] | None = None
) -> RankCost:
    """What one sequence costs, read off the shapes of `caches` that one token has passed through, evaluated or not.

    `run`: fresh caches that so many tokens have passed through, for those whose growth one token does not show.
    """
    batchable = can_batch and all(map(is_mergeable, caches))
    grown: list[Any] = [()] * len(caches)
    if run is not None and any(map(_hides_growth, caches)):
        grown = list(zip(*map(run, _GROWTH_RUNS), strict=True))
    return RankCost(
        [cost for cache, later in zip(caches, grown, strict=True) for cost in _costs(cache, *later)],
        batchable=batchable,
        can_pack=batchable and all(map(is_packable, caches)),
        can_keep=not any(map(uncopyable_class, caches)),
    )


def _hides_growth(cache: Cache) -> bool:
    """True if it is neither keys and values nor a state of one size: deepseek_v41's closes a group of tokens at a time.

    Such a class is in no table; a cache that nothing has filled may be any.
    """
    if isinstance(cache, CacheList):
        return any(map(_hides_growth, cache.caches))
    return getattr(cache, "keys", None) is None and not isinstance(cache, ArraysCache) and not cache.empty()


def _costs(cache: Cache, *grown: Cache) -> list[CacheCost]:
    """`grown`: the same cache after each of _GROWTH_RUNS, if they were run."""
    if isinstance(cache, CacheList):
        members = zip(cache.caches, *(later.caches for later in grown), strict=True)
        return [cost for member in members for cost in _costs(*member)]
    if grown and _hides_growth(cache):
        (before, after), (num_bytes, more_bytes) = _GROWTH_RUNS, [later.nbytes for later in grown]
        token_bytes = -(-(more_bytes - num_bytes) // (after - before))
        return [CacheCost(token_bytes, None, max(0, num_bytes - before * token_bytes))]
    if getattr(cache, "keys", None) is None:  # state-space layers: the same size at every length
        return [CacheCost(0, None, 0 if cache.empty() else cache.nbytes)]
    window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    # It grows by whole blocks from wherever it is, which need not be the end of one.
    room = BLOCK_TOKENS if isinstance(cache, ChunkedKVCache) else 0
    return [CacheCost(cache.nbytes // _capacity(cache), window, room=room)]


def arrays_of(cache: Cache) -> list[Any]:
    """What has to be evaluated after a step: `state` would first cut keys and values to length, ops for each layer."""
    if isinstance(cache, CacheList):
        return [array for member in cache.caches for array in arrays_of(member)]
    return [value for value in vars(cache).values() if isinstance(value, mx.array | tuple | list)]


def reserve(cache: Cache, num_tokens: int) -> None:
    """Grow a cache by whole blocks before the step needs it, by itself, so that not all layers are held twice."""
    if isinstance(cache, CacheList):
        for member in cache.caches:
            reserve(member, num_tokens)
        return
    if cache.empty():
        return
    if type(cache) in _PLAIN and _num_tokens(cache) + num_tokens > _capacity(cache):
        _resize(cache, blocks(_num_tokens(cache) + num_tokens))
    elif type(cache) in _ROTATING and num_tokens == 1:  # chunks bring their own room
        if _num_tokens(cache) >= _capacity(cache) and _capacity(cache) < cache.max_size:
            _resize(cache, min(blocks(_num_tokens(cache) + 1), cache.max_size))


def within_window(cache: Cache) -> Cache:
    """One sequence's cache after a chunk, which leaves so many tokens more in a window than it needs, without them."""
    if isinstance(cache, CacheList):
        cache.caches = tuple(map(within_window, cache.caches))
    elif isinstance(cache, RotatingKVCache) and not cache.empty() and _capacity(cache) > cache.max_size:
        return copied(cache)
    elif isinstance(cache, ChunkedKVCache) and not cache.empty() and _capacity(cache) > cache.chunk_size + BLOCK_TOKENS:
        return copied(cache)
    return cache


def settle(cache: Cache) -> None:
    """Evaluate a group's cache that was just rearranged, in whole blocks, and give the old buffers back."""
    if isinstance(cache, CacheList):
        for member in cache.caches:
            settle(member)
        return
    if type(cache) in _PLAIN and not cache.empty() and _capacity(cache) % BLOCK_TOKENS:
        _resize(cache, blocks(_num_tokens(cache)))
    if not cache.empty():
        mx.eval(cache.state)
    mx.clear_cache()


def keep_rows(cache: Cache, rows: list[int]) -> Cache:
    """A group's cache with only these rows, as small as their longest one needs. `cache` itself is used up."""
    if isinstance(cache, CacheList):
        cache.caches = tuple(keep_rows(member, rows) for member in cache.caches)
        return cache
    if isinstance(cache, BatchRotatingKVCache) and cache.keys is not None:
        # Its `filter` keeps the padding that only a longer row needed.
        cache = BatchRotatingKVCache.merge([cache.extract(row) for row in rows])
    else:
        cache.filter(mx.array(rows))
    settle(cache)
    return cache


def copied(cache: Cache, *, rewind: int = 0) -> Cache:
    """A copy of one sequence's cache as it was `rewind` tokens ago, evaluated, of no more than a window's tokens.

    Its arrays are its own, and as large as they say. Shared ones would not be: MLX lets an array be a part of a buffer
    that is up to 16 KiB larger (`contiguous`), and hands out freed buffers that are up to two pages larger than asked
    for (mlx/backend/common/buffer_cache.h), so those are given back first.

    Raises:
        DisagreementError: this kind of cache cannot go back, or no longer holds what it was then.
    """
    if isinstance(cache, CacheList):
        return CacheList(*(copied(member, rewind=rewind) for member in cache.caches))
    copy_ = copy.copy(cache)
    if isinstance(cache, ArraysCache):
        _require(rewind == 0, cache, rewind)
        copy_.cache = [None if state is None else _own(state) for state in cache.cache]
    elif not cache.empty():
        copy_.offset -= rewind
        keys, values = cache.keys, cache.values
        match cache:
            case RotatingKVCache():
                _require(rewind == 0 or cache.offset <= cache.max_size, cache, rewind)
                keys, values = cache._temporal_order(keys), cache._temporal_order(values)
                end = keys.shape[2] - rewind
                start = max(0, end - cache.max_size)
                copy_._idx = end - start
            case ChunkedKVCache():
                _require(rewind == 0 or cache.start_position == 0, cache, rewind)
                copy_.maybe_trim_front()  # as the model's next step would
                keys, values = copy_.keys, copy_.values
                start, end = 0, copy_.offset - copy_.start_position
            case _:
                start, end = 0, blocks(copy_.offset)
        copy_.keys, copy_.values = tree_map(lambda array: _own(array[..., start:end, :]), (keys, values))
    mx.clear_cache()
    mx.eval(copy_.state)
    return copy_


def _own(array: mx.array) -> mx.array:
    """The same values in a buffer of their own, which `contiguous` does not promise; lazy."""
    return array * 1


def extracted(cache: Cache, row: int, *, rewind: int = 0) -> Cache:
    """One row of a group's cache as a cache of its own, as it was `rewind` tokens ago, evaluated. See `copied`."""
    return copied(cache.extract(row), rewind=rewind)


def _require(can_rewind: bool, cache: Cache, rewind: int) -> None:
    if not can_rewind:
        raise DisagreementError(f"a {type(cache).__name__} cannot go back {rewind} tokens from where it is")


def _resize(cache: Cache, num_tokens: int) -> None:
    """Give the buffers of `cache` room for exactly `num_tokens` tokens, which is at least what they hold."""
    used = _num_tokens(cache)
    padding = [(0, 0), (0, 0), (0, num_tokens - used), (0, 0)]
    cache.keys, cache.values = tree_map(lambda array: mx.pad(array[..., :used, :], padding), (cache.keys, cache.values))
    mx.eval(cache.keys, cache.values)
    mx.clear_cache()


def _num_tokens(cache: Cache) -> int:
    """Tokens that have passed through a cache of the tables, those of its longest row."""
    return getattr(cache, _PLAIN.get(type(cache)) or _ROTATING[type(cache)])


def _capacity(cache: Cache) -> int:
    """Tokens that the buffers of a cache with keys have room for."""
    keys = cache.keys[0] if isinstance(cache.keys, (tuple, list)) else cache.keys
    return keys.shape[-2]
