"""Copies of caches hold no more memory than they count: MLX's `contiguous` alone would share a larger buffer."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache

from server.cache_ops import copied, extracted


def filled(num_tokens: int) -> KVCache:
    """One head: a part of its rows is contiguous in the buffer of all."""
    cache = KVCache()
    rows = mx.random.normal((1, 1, num_tokens, 16))
    cache.update_and_fetch(rows, rows)
    mx.eval(cache.keys, cache.values)
    return cache


@pytest.mark.parametrize("of_group", [False, True])
def test_a_copy_of_a_part_holds_the_part_alone(of_group: bool):
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = BatchKVCache.merge([filled(500)]) if of_group else filled(500)
    part = extracted(cache, 0, rewind=300) if of_group else copied(cache, rewind=300)
    del cache
    mx.clear_cache()
    assert part.offset == 200
    assert mx.get_active_memory() - before <= part.nbytes + 256
