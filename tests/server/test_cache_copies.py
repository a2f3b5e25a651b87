"""Copies of caches hold exactly the memory they count, whatever buffers MLX would share or has at hand."""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache

from server.cache_ops import Cache, copied, extracted

NUM_TOKENS = 500


@pytest.fixture(autouse=True)
def nothing_of_other_tests():
    """What they left in cycles must not go while memory is measured here."""
    gc.collect()
    mx.clear_cache()


def filled() -> KVCache:
    """One head: a part of its rows is contiguous in the buffer of all."""
    cache = KVCache()
    rows = mx.arange(NUM_TOKENS * 16.0).reshape(1, 1, NUM_TOKENS, 16)
    cache.update_and_fetch(rows, rows)
    mx.eval(cache.keys, cache.values)
    return cache


def state() -> ArraysCache:
    cache = ArraysCache(1)
    cache[0] = mx.arange(4.0 * NUM_TOKENS).reshape(1, 4, NUM_TOKENS)[..., :400]
    mx.eval(cache[0])
    return cache


COPIES: dict[str, Callable[[], Cache]] = {
    "whole": lambda: copied(filled()),
    "a part": lambda: copied(filled(), rewind=300),
    "a group's row": lambda: extracted(BatchKVCache.merge([filled()]), 0),
    "a part of a group's row": lambda: extracted(BatchKVCache.merge([filled()]), 0, rewind=300),
    "a state": lambda: copied(state()),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_holds_what_it_counts(name: str):
    before = mx.get_active_memory()
    copy = COPIES[name]()
    mx.synchronize()
    assert mx.get_active_memory() - before == copy.nbytes


def test_a_copy_takes_no_larger_buffer_that_was_freed():
    cache = filled()
    wanted = copied(cache).keys.nbytes
    mx.clear_cache()
    freed = [mx.zeros(wanted // 4 + 1000) for _ in range(2)]  # 4,000 B more: within two pages of 4 KiB
    mx.eval(freed)
    del freed
    before = mx.get_active_memory()
    copy = copied(cache)
    mx.synchronize()
    assert mx.get_active_memory() - before == copy.nbytes


def test_a_copy_shares_nothing():
    cache = filled()
    copy = copied(cache)
    kept = copy.keys[..., :NUM_TOKENS, :] + 0
    mx.eval(kept)
    cache.update_and_fetch(mx.zeros((1, 1, 1, 16)), mx.zeros((1, 1, 1, 16)))
    assert cache.keys is not None
    cache.keys[...] = 0.0
    mx.eval(cache.keys)
    assert mx.array_equal(copy.keys[..., :NUM_TOKENS, :], kept)
