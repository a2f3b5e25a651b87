"""Quantized caches: in all operations what BatchKVCache does, rows bit for bit what they are alone; who takes them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

from distributed.partition import LayerRange
from distributed.shard.stage_model import StageModel
from server.errors import CacheError
from server.quantization import quantized_make_cache
from server.quantized_cache import BatchQuantizedKVCache, MergeableQuantizedKVCache
from server.stage import Stage
from tests.distributed.tiny_models import build
from tests.server.quantized_table import difference_from_mlx_lm
from tests.server.wide_models import build_wide

HEADS, KEY_DIM, VALUE_DIM = 2, 64, 128


def random_tokens(rows: int, num_tokens: int) -> tuple[mx.array, mx.array]:
    shape = (rows, HEADS, num_tokens)
    return mx.random.normal((*shape, KEY_DIM)), mx.random.normal((*shape, VALUE_DIM))


def equal(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b).item())


class Twins:
    """A BatchQuantizedKVCache and the BatchKVCache of the same keys and values, through the same operations."""

    def __init__(self, lengths: list[int], bits: int, group_size: int = 64) -> None:
        plain = [KVCache() for _ in lengths]
        quantized = [MergeableQuantizedKVCache(group_size, bits) for _ in lengths]
        for length, *caches in zip(lengths, plain, quantized):
            tokens = random_tokens(1, length)
            for cache in caches if length else []:
                cache.update_and_fetch(*tokens)
        self.plain = KVCache.merge(plain)
        self.quantized = MergeableQuantizedKVCache.merge(quantized)
        self.check()

    def append(self, num_tokens: int = 1, right_padding: list[int] | None = None) -> None:
        tokens = random_tokens(self.plain.offset.shape[0], num_tokens)
        for cache in (self.plain, self.quantized):
            if right_padding:
                lengths = [num_tokens - padding for padding in right_padding]
                cache.prepare(lengths=lengths, right_padding=right_padding)
            cache.update_and_fetch(*tokens)
            cache.finalize()
        self.check()

    def change(self, operation: str, argument: Any) -> None:
        getattr(self.plain, operation)(argument)
        getattr(self.quantized, operation)(argument)
        self.check()

    def extend(self, other: Twins) -> None:
        self.plain.extend(other.plain)
        self.quantized.extend(other.quantized)
        self.check()

    def check(self) -> None:
        """All that models and the store ask is equal; each row's packed data is what quantizing its numbers gives."""
        plain, quantized = self.plain, self.quantized
        assert type(plain) is BatchKVCache and type(quantized) is BatchQuantizedKVCache
        assert quantized.offset.tolist() == plain.offset.tolist()
        assert quantized.left_padding.tolist() == plain.left_padding.tolist()
        assert (quantized.size(), quantized.empty()) == (plain.size(), plain.empty())
        for num_tokens in (1, 3):
            assert equal(quantized.make_mask(num_tokens), plain.make_mask(num_tokens))
        for row in range(0 if plain.empty() else plain.offset.shape[0]):
            one, other = plain.extract(row), quantized.extract(row)
            assert type(other) is MergeableQuantizedKVCache and other.offset == one.offset
            assert is_quantized_once(other, one.keys, one.values)  # type: ignore[arg-type]


def is_quantized_once(cache: QuantizedKVCache, keys: mx.array, values: mx.array) -> bool:
    """True if `cache` holds, bit for bit, what quantizing these numbers gives."""
    return all(
        equal(a, b)
        for numbers, packed in zip((keys, values), cache.keys_and_values())
        for a, b in zip(mx.quantize(numbers, group_size=cache.group_size, bits=cache.bits), packed)  # type: ignore
    )


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 32)])
def test_a_rows_packed_data_is_what_it_is_alone_through_joins_growth_leaves_and_trims(bits: int, group_size: int):
    mx.random.seed(0)
    twins = Twins([5, 250, 0, 31], bits, group_size)
    for _ in range(8):
        twins.append()  # across the end of a block
    twins.extend(Twins([300, 2], bits, group_size))
    twins.append(3)
    twins.change("filter", mx.array([0, 2, 3, 5]))  # the longest rows leave
    twins.append()
    twins.extend(Twins([1], bits, group_size))
    twins.change("trim", 1)
    twins.append(260)


def test_prompts_padded_at_their_right_end_up_left_padded_chunk_after_chunk():
    mx.random.seed(0)
    twins = Twins([0, 9, 0], 8)
    twins.append(7, right_padding=[0, 5, 2])
    twins.append(3, right_padding=[2, 0, 0])
    twins.append()
    assert twins.quantized.offset.tolist() == [9, 15, 9]


def test_empty_rows_and_empty_batches_can_be_joined():
    mx.random.seed(0)
    for first, second in [([0, 0], [0]), ([0, 0], [4]), ([4], [0, 0])]:
        twins = Twins(first, 8)
        twins.extend(Twins(second, 8))
        twins.append(2)


def test_a_row_that_leaves_a_batch_goes_on_alone_and_joins_again():
    mx.random.seed(0)
    twins = Twins([3, 100], 4)
    keys, values = (x[:1, :, 97:100] for x in (twins.plain.keys, twins.plain.values))  # type: ignore[misc]
    row = twins.quantized.extract(0)
    for num_tokens in (1, 252, 5):
        more = random_tokens(1, num_tokens)
        row.update_and_fetch(*more)
        keys, values = (mx.concatenate([held, new], axis=2) for held, new in zip((keys, values), more))
    assert is_quantized_once(row, keys, values)
    again = MergeableQuantizedKVCache.merge([row, twins.quantized.extract(1)])
    assert is_quantized_once(again.extract(0), keys, values)


def test_a_batch_comes_back_from_its_state():
    mx.random.seed(0)
    cache = Twins([5, 2], 4, 32).quantized
    again = BatchQuantizedKVCache.from_state(cache.state)
    assert (again.group_size, again.bits, again.nbytes) == (32, 4, cache.nbytes)
    assert all(map(equal, again.extract(1).keys, cache.extract(1).keys))  # type: ignore[arg-type]


def test_packed_bytes_are_what_the_bits_say():
    """Each number takes `bits` bits, each group of them a scale and a bias, float32 here."""
    for bits, group_size in [(8, 64), (4, 32)]:
        cache = Twins([256], bits, group_size).quantized
        assert cache.nbytes == 256 * HEADS * (KEY_DIM + VALUE_DIM) * (bits / 8 + 2 * 4 / group_size)


# qwen3_next: most layers keep states; deepseek_v2: keys and values of different sizes; hunyuan: layers hand their keys
# and values on; bailing_moe_linear: a stage keeps a cache that none of its layers fills; nanbeige: one rank only.
@pytest.mark.parametrize(
    "architecture", ["qwen2", "qwen3_next", "deepseek_v2", "hunyuan", "bailing_moe_linear", "nanbeige"]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_cut_model_in_a_batch_gives_the_logits_of_mlx_lms_quantized_cache(architecture: str, bits: int):
    # On the CPU they are equal; elsewhere rounding may move a number to the next of its 255 or 15 steps.
    assert difference_from_mlx_lm(architecture, bits) < 0.05


def test_only_the_caches_that_layers_fill_with_keys_and_values_are_quantized():
    whole = StageModel(build_wide("qwen3_next"), LayerRange(0, 4))
    kinds = [type(cache).__name__ for cache in quantized_make_cache(whole, 8)()]
    assert kinds == ["ArraysCache", "ArraysCache", "MergeableQuantizedKVCache", "ArraysCache"]
    states_only = StageModel(build_wide("bailing_moe_linear"), LayerRange(0, 1))
    kinds = [type(cache).__name__ for cache in quantized_make_cache(states_only, 8)()]
    assert kinds == ["ArraysCache", "KVCache"]  # the latter keeps masks and positions right, at 2 bytes a token


def test_groups_are_of_64_numbers_where_the_head_dimension_allows_and_else_of_32():
    model = StageModel(build_wide("deepseek_v2"), LayerRange(0, 4))
    assert {(c.group_size, c.bits) for c in quantized_make_cache(model, 4)()} == {(32, 4)}
    model = StageModel(build_wide("deepseek_v2", v_head_dim=64), LayerRange(0, 4))
    assert {(c.group_size, c.bits) for c in quantized_make_cache(model, 4)()} == {(64, 4)}


@pytest.mark.parametrize(
    ("architecture", "layers", "reason"),
    [
        ("gemma3_text", (0, 6), "a RotatingKVCache"),
        ("falcon_h1", (0, 4), "a CacheList of ArraysCache and KVCache"),
        ("llama4", (0, 5), "a ChunkedKVCache"),
        ("deepseek_v3", (0, 4), "its attention does not take quantized keys and values"),
        ("stablelm", (2, 4), "its attention does not take quantized keys and values"),
        ("afm7", (0, 3), "later layers read the keys and values of earlier ones"),
    ],
)
def test_a_model_whose_caches_cannot_be_quantized_is_refused_with_the_reason(
    architecture: str, layers: tuple[int, int], reason: str
):
    model = StageModel(build_wide(architecture), LayerRange(*layers))
    with pytest.raises(CacheError, match=rf"^KV_CACHE_BITS=8 .*{reason}.*; leave KV_CACHE_BITS empty$"):
        quantized_make_cache(model, 8)


def test_a_head_dimension_that_no_group_size_divides_is_refused():
    with pytest.raises(CacheError, match="16 numbers, not a multiple of 32"):
        Stage(StageModel(build("qwen2"), LayerRange(0, 2)), kv_cache_bits=8)
