"""KV_CACHE_BITS: which caches of a stage can be quantized, found out at start-up by trying.

What a cache holds and whether a model's attention takes quantized keys and values shows only when a token passes, so
one does: through plain caches for the shapes, then through quantized ones, alone and as a batch. A model that cannot
do it is refused as a whole: quantizing some of its layers in silence would not be what the key says. `server.stage`
calls `quantized_make_cache` once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from distributed.shard.message import StageMessage, pack_message
from distributed.shard.stage_model import StageModel
from server.errors import CacheError
from server.quantized_cache import MergeableQuantizedKVCache

GROUP_SIZES = (64, 32)  # numbers that share a scale and a bias, mlx-lm's own choice first; MLX has no smaller ones

Cache = Any  # mlx-lm's caches share no base class that is exported


def quantized_make_cache(model: StageModel, bits: int) -> Callable[[], list[Cache]]:
    """`model.make_cache`, but keys and values are kept in `bits` bits. Runs a token; the weights are loaded.

    Raises:
        CacheError: a layer's cache, or its attention, cannot do it.
    """
    output, used = model.dry_run()
    if isinstance(output, StageMessage) and output.new_kv:
        raise _refusal(bits, "later layers read the keys and values of earlier ones on other ranks")
    groups = group_sizes(used, bits)

    def make_cache() -> list[Cache]:
        return [
            cache if group_size is None else MergeableQuantizedKVCache(group_size, bits)
            for cache, group_size in zip(model.make_cache(), groups, strict=True)
        ]

    try:
        _run(model, make_cache())
        if model.can_batch:
            _run(model, [type(cache).merge([cache]) for cache in make_cache()])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # packed keys are tuples
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refusal(bits, f"its attention does not take quantized keys and values: {reason}") from error
    return make_cache


def group_sizes(used: Sequence[Cache], bits: int) -> list[int | None]:
    """For each cache that a token has passed through, evaluated or not, the group size to quantize with.

    None where nothing is to be quantized: a state-space layer, a cache that no layer fills.

    Raises:
        CacheError: a cache is of a kind that mlx-lm cannot quantize, or its head dimension is no multiple of 32.
    """
    for cache in used:
        if type(cache) is not KVCache and not isinstance(cache, ArraysCache):
            raise _refusal(bits, f"a layer's cache is a {_name(cache)}, which cannot be quantized")
    return [_group_size(cache, bits) for cache in used]


def _group_size(cache: Cache, bits: int) -> int | None:
    # The cut advances a cache that none of its layers fills by integers, see distributed.shard.caches.
    if isinstance(cache, ArraysCache) or cache.keys is None or not mx.issubdtype(cache.keys.dtype, mx.floating):
        return None
    head_dims = cache.keys.shape[-1], cache.values.shape[-1]
    for group_size in GROUP_SIZES:
        if all(dim and dim % group_size == 0 for dim in head_dims):
            return group_size
    sizes = " and ".join(map(str, sorted(set(head_dims))))
    raise _refusal(bits, f"a head's keys and values are of {sizes} numbers, not a multiple of {GROUP_SIZES[-1]}")


def _run(model: StageModel, caches: list[Cache]) -> None:
    output, caches = model.dry_run(caches)
    arrays = pack_message(output)[0] if isinstance(output, StageMessage) else output
    mx.eval(arrays, [cache.state for cache in caches])


def _name(cache: Cache) -> str:
    if isinstance(cache, CacheList):
        return f"CacheList of {' and '.join(map(_name, cache.caches))}"
    return type(cache).__name__


def _refusal(bits: int, reason: str) -> CacheError:
    return CacheError(f"KV_CACHE_BITS={bits} cannot be used with this model: {reason}; leave KV_CACHE_BITS empty")
