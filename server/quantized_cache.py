"""Quantized keys and values in batches: what mlx-lm's BatchKVCache is to its KVCache, for its QuantizedKVCache.

A token's keys and values are quantized once, when they come in, and only moved from then on, so a row's packed data
stays bit for bit the same alone, in any batch and on the way from one to the other; nothing here may dequantize.
`server.quantization` puts these caches in the place of plain ones, `server.kv_cache` treats them like any of mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, QuantizedKVCache, dynamic_roll

Packed = Any  # (packed uint32, scales, biases), each (rows, heads, tokens, ...)


class MergeableQuantizedKVCache(QuantizedKVCache):
    """mlx-lm's quantized cache of one sequence, which can become a row of a batch."""

    @classmethod
    def merge(cls, caches: Sequence[QuantizedKVCache]) -> BatchQuantizedKVCache:
        return BatchQuantizedKVCache.merge(caches)

    def size(self) -> int:
        return self.offset


class BatchQuantizedKVCache(BatchKVCache):
    """Quantized caches of several sequences, left-padded, with the semantics of BatchKVCache in every method.

    `keys` and `values` are None or (packed, scales, biases), each (rows, heads, capacity, ...).
    """

    keys: Packed
    values: Packed

    def __init__(self, left_padding: Sequence[int], group_size: int = 64, bits: int = 8) -> None:
        super().__init__(list(left_padding))
        self.group_size = group_size
        self.bits = bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Packed, Packed]:
        """Quantize and append keys and values (rows, heads, tokens, head dim); returns all that is held, packed."""
        num_tokens = keys.shape[2]
        start, end = self._idx, self._idx + num_tokens
        new = [mx.quantize(x, group_size=self.group_size, bits=self.bits) for x in (keys, values)]
        if self.keys is None:
            self.keys, self.values = _map(lambda x: x[..., :0, :], new)
        if end > self.keys[0].shape[2]:
            room = -(-num_tokens // self.step) * self.step
            self.keys, self.values = _map(lambda x: _pad(x[..., :start, :], right=room), (self.keys, self.values))
        for held, packed in zip((*self.keys, *self.values), (*new[0], *new[1]), strict=True):
            held[..., start:end, :] = packed
        self.offset = self.offset + num_tokens
        self._idx = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Packed, Packed]:
        return _map(lambda x: x[..., : self._idx, :], (self.keys, self.values))

    def finalize(self) -> None:
        """Turn the right padding that `prepare` announced into left padding."""
        padding = self._right_padding
        if padding is None:
            return
        self.keys, self.values = _map(lambda x: dynamic_roll(x, padding[:, None], axis=2), (self.keys, self.values))
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding
        self._right_padding = None

    def filter(self, batch_indices: mx.array) -> None:
        """Keep only these rows, and no more padding than they need."""
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices]
        surplus = min(_numbers(self.left_padding))
        self.left_padding = self.left_padding - surplus
        self._idx -= surplus
        if self.keys is not None:
            self.keys, self.values = _map(lambda x: x[batch_indices][..., surplus:, :], (self.keys, self.values))

    def extend(self, other: BatchQuantizedKVCache) -> None:
        """Append the rows of `other`, which must have the same group size and bits."""
        longest = max(self._idx, other._idx)
        filled = [cache for cache in (self, other) if cache.keys is not None]
        if filled:
            capacity = max(cache.keys[0].shape[2] for cache in filled)
            both = [cache._right_justified(longest, capacity, like=filled[0]) for cache in (self, other)]
            self.keys, self.values = _map(lambda ours, theirs: mx.concatenate([ours, theirs]), *both)
        self.left_padding = mx.concatenate([c.left_padding + (longest - c._idx) for c in (self, other)])
        self.offset = mx.concatenate([self.offset, other.offset])
        self._idx = longest

    def _right_justified(self, idx: int, capacity: int, like: BatchQuantizedKVCache) -> tuple[Packed, Packed]:
        """Keys and values moved right so that they end at `idx`; of a cache still empty, zeros shaped as `like`'s."""
        held = (self.keys, self.values)
        if self.keys is None:
            rows = self.offset.shape[0]
            held = _map(lambda x: mx.zeros((rows, x.shape[1], 0, x.shape[3]), x.dtype), (like.keys, like.values))
        return _map(lambda x: _pad(x[..., : self._idx, :], idx - self._idx, capacity - idx), held)

    def extract(self, idx: int) -> MergeableQuantizedKVCache:
        """One row as a cache of its own."""
        cache = MergeableQuantizedKVCache(self.group_size, self.bits)
        padding = _numbers(self.left_padding)[idx]
        cache.keys, cache.values = _map(
            lambda x: mx.contiguous(x[idx : idx + 1, :, padding : self._idx]), (self.keys, self.values)
        )
        cache.offset = self._idx - padding
        return cache

    @classmethod
    def merge(cls, caches: Sequence[QuantizedKVCache]) -> BatchQuantizedKVCache:
        """The batch whose rows are these sequences, of any lengths, and of one group size and number of bits."""
        longest = max(cache.offset for cache in caches)
        padding = [longest - cache.offset for cache in caches]
        merged = cls(padding, caches[0].group_size, caches[0].bits)
        merged.offset = merged.offset + longest
        merged._idx = longest
        if longest == 0:
            return merged
        example = next(cache for cache in caches if cache.keys is not None)
        merged.keys, merged.values = _map(
            lambda x: mx.zeros((len(caches), x.shape[1], longest, x.shape[3]), x.dtype), (example.keys, example.values)
        )
        for row, cache in enumerate(caches):
            if cache.keys is None or cache.values is None:
                continue
            for held, packed in zip((*merged.keys, *merged.values), (*cache.keys, *cache.values), strict=True):
                held[row : row + 1, :, padding[row] :] = packed[..., : cache.offset, :]
        return merged

    @property
    def state(self) -> Any:
        return self.keys, self.values, self.offset, self.left_padding, self._idx, self.group_size, self.bits

    @state.setter
    def state(self, v: Any) -> None:
        self.keys, self.values, self.offset, self.left_padding, self._idx, self.group_size, self.bits = v
        self._right_padding = None

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else sum(x.nbytes for x in (*self.keys, *self.values))


_map: Any = tree_map  # over arrays in keys and values, which are tuples of three; mlx types it for any tree


def _numbers(per_row: mx.array) -> list[int]:
    return per_row.tolist()  # type: ignore[return-value]


def _pad(x: mx.array, left: int = 0, right: int = 0) -> mx.array:
    """`x` (rows, heads, tokens, ...) with so many more tokens of zeros."""
    return mx.pad(x, [(0, 0), (0, 0), (left, right), (0, 0)]) if left or right else x
