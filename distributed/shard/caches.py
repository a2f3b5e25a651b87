"""What the cut must know of mlx-lm's caches: which are alike, what passes through them, how to move an empty one on.

It works on any cache class, single-sequence or batched, and never evaluates one. The layer map and `StageModel` use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache, CacheList

from distributed.shard.message import FromCache


def cache_kind(fresh: Any) -> Any:
    """Comparable description of a fresh cache: class and settings (max_size, keep, …), for a CacheList its members'.

    Masks and offsets made from one cache hold for all caches of its kind.
    """
    if isinstance(fresh, (list, tuple)):
        return tuple(cache_kind(item) for item in fresh)
    if hasattr(fresh, "__dict__"):
        return type(fresh), tuple((name, cache_kind(value)) for name, value in sorted(vars(fresh).items()))
    return fresh


def advance_phantom(cache: Any, batch_size: int, length: int) -> None:
    """Move a cache that no layer of the stage fills on by `length` tokens, at 2 bytes a token.

    So its offset and mask stay those of its kind, also through merge, extend and filter.
    """
    if isinstance(cache, CacheList):
        for member in cache.caches:
            advance_phantom(member, batch_size, length)
    elif isinstance(cache, ArraysCache):
        cache.cache = [mx.zeros((batch_size, 1)) if state is None else state for state in cache.cache]
    else:
        nothing = mx.zeros((batch_size, 1, length, 1), mx.int8)
        cache.update_and_fetch(nothing, nothing)


class CacheTap:
    """Sees, during one forward, the new keys and values that caches are given and the arrays they hand out.

    `new_kv`: for each cache entry, the keys and values of this step's tokens.
    """

    def __init__(self, caches: Mapping[int, Any]):
        """`caches`: cache entry -> cache; only those that hold plain keys and values are tapped."""
        self.new_kv: dict[int, tuple[mx.array, mx.array]] = {}
        self._caches = caches
        self._tapped = {entry: cache for entry, cache in caches.items() if hasattr(cache, "update_and_fetch")}
        # By the array's id; the array is kept beside it, so that no other can get the same id meanwhile.
        self._handed_out: dict[int, tuple[int, FromCache, mx.array]] = {}

    def __enter__(self) -> CacheTap:
        for entry, cache in self._tapped.items():
            self._tap(entry, cache)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for cache in self._tapped.values():
            del cache.update_and_fetch
            vars(cache).pop("keys_and_values", None)

    def _tap(self, entry: int, cache: Any) -> None:
        update_and_fetch, keys_and_values = cache.update_and_fetch, getattr(cache, "keys_and_values", None)

        def tapped_update(keys: mx.array, values: mx.array) -> Any:
            self.new_kv[entry] = keys, values
            return self._note(entry, update_and_fetch(keys, values))

        def tapped_fetch() -> Any:
            assert keys_and_values is not None
            return self._note(entry, keys_and_values())

        cache.update_and_fetch = tapped_update
        if keys_and_values is not None:
            cache.keys_and_values = tapped_fetch

    def _note(self, entry: int, fetched: Any) -> Any:
        for which, array in zip(FromCache, fetched, strict=True):
            self._handed_out[id(array)] = entry, which, array
        return fetched

    def entries_read(self, arguments: Any) -> set[int]:
        """The cache entries that these arguments of a layer hold: the cache itself, or arrays it handed out."""
        leaves = {id(leaf) for _, leaf in tree_flatten(arguments)}
        read = {entry for entry, cache in self._caches.items() if id(cache) in leaves}
        return read | {entry for key, (entry, _, _) in self._handed_out.items() if key in leaves}

    def without_cache_contents(self, output: Any) -> Any:
        """`output` of a layer with every array that a cache handed out replaced by a `FromCache`."""
        return tree_map(lambda leaf: self._handed_out[id(leaf)][1] if id(leaf) in self._handed_out else leaf, output)
