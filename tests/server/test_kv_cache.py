"""The caches of one rank with a real tiny model: joins, leaves, packs and growth change no logits, and peak low."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache
from mlx_lm.models.deepseek_v41 import LayerCache

from server.cache_ops import is_mergeable, measure_cost
from server.errors import DisagreementError
from server.frame import Admit, Detach, Frame, Join, Leave, Row
from server.kv_budget import CacheCost, KVBudget, RankCost, Shape
from server.kv_cache import KVCacheStore
from server.protocol import SamplingParams
from server.quantized_cache import MergeableQuantizedKVCache
from tests.server.cache_driver import CacheDriver

NUM_LAYERS = 6


@pytest.fixture(scope="module")
def model() -> llama.Model:
    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=NUM_LAYERS,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=50,
    )
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    return model


def test_sequences_that_join_and_leave_get_the_logits_they_get_alone(model: llama.Model):
    driver = CacheDriver(model)
    driver.prefill(0, [1, 2, 3])
    driver.prefill(1, list(range(40)))
    driver.prefill(2, [7])
    driver.join(5, 0, 1, 2)
    driver.check({0: [11], 1: [11], 2: [11]}, 5)
    driver.store.apply([Leave([1])])
    driver.check({0: [12], 2: [12]}, 5)
    driver.prefill(3, [9, 8, 7, 6, 5])
    driver.store.apply([Leave([0]), Join(5, [3])])
    driver.check({2: [13], 3: [13]}, 5)
    driver.check({2: [14], 3: [14]}, 5)


def test_buffers_are_whole_blocks_of_the_longest_row_through_joins_growth_and_leaves(model: llama.Model):
    driver = CacheDriver(model)
    token_bytes = measure_cost(_one_token(model)).row_bytes(1)
    driver.prefill(0, [1] * 200)
    driver.prefill(1, [1] * 10)
    driver.join(0, 0, 1)

    def rectangle() -> float:
        return driver.store.num_bytes / token_bytes

    assert rectangle() == 2 * 256
    for _ in range(57):
        driver.run({0: [3], 1: [3]}, 0)
    assert rectangle() == 2 * 512  # 257 tokens
    driver.store.apply([Leave([0])])
    assert rectangle() == 256  # 67 tokens are left
    driver.store.apply([Leave([1])])
    assert rectangle() == 0


def test_a_frame_that_does_not_fit_this_ranks_state_is_refused(model: llama.Model):
    driver = CacheDriver(model)
    driver.prefill(0, [1, 2, 3])
    with pytest.raises(DisagreementError, match=r"frame 7 starts from rows \[\(0, 8\)\], this rank holds \[\(0, 3\)\]"):
        with driver.store.running(Frame(7, [], [Row(0, 9)])):
            pass


def test_a_sequence_can_leave_before_it_joined(model: llama.Model):
    driver = CacheDriver(model)
    driver.prefill(0, [1, 2, 3])
    driver.store.apply([Leave([0])])
    assert driver.store.num_bytes == 0


def test_prompts_in_one_pack_get_the_logits_they_get_alone(model: llama.Model):
    """Rows that hold nothing, then rows that hold different lengths: padded at both sides."""
    driver = CacheDriver(model)
    for sequence_id in (0, 1, 2):
        driver.admit(sequence_id)
    driver.check({0: [5, 6, 7], 1: list(range(20)), 2: [9]})
    driver.check({0: list(range(11)), 1: [4], 2: [8, 1, 7]})
    driver.admit(3)
    driver.check({3: [2, 3], 1: [8, 9, 1]})
    driver.keep(10, 0)
    driver.admit(4, 10)
    driver.check({4: [4, 4]})
    driver.join(0, 0, 1)
    driver.join(0, 2, 3)
    driver.check({0: [11], 1: [12], 2: [13], 3: [14]}, 0)


def test_after_a_pack_every_sequence_holds_only_its_own_tokens(model: llama.Model):
    driver = CacheDriver(model)
    token_bytes = measure_cost(_one_token(model)).row_bytes(1)
    driver.admit(0)
    driver.admit(1)
    driver.run({0: [1] * 300, 1: [2] * 3})
    assert driver.store.num_bytes == (300 + 256) * token_bytes
    driver.store.apply([Leave([0])])
    assert driver.store.num_bytes == 256 * token_bytes


def test_a_pack_is_refused_where_padding_would_turn_over_a_window():
    store = KVCacheStore(lambda: [RotatingKVCache(max_size=8)])
    store.apply([Admit(0, 2, SamplingParams()), Admit(1, 1, SamplingParams())])
    with pytest.raises(DisagreementError, match="several prompts"):
        with store.running(Frame(0, [], [Row(0, 2, 2), Row(1, 1, 1)])):
            pass


@pytest.mark.parametrize("kind", [KVCache, MergeableQuantizedKVCache])
@pytest.mark.parametrize("change", ["join", "leave", "detach", "grow"])
def test_changes_of_a_full_batch_peak_under_1_3_times_the_cache(change: str, kind: type):
    """8 rows of 512 tokens in 12 layers of 8 heads × 64: 201 MB, or 57 in 8 bits, so that nothing else counts."""
    layers, rows, length = 12, 8, 512
    store = KVCacheStore(lambda: [kind() for _ in range(layers)])
    for row in range(rows):
        store.apply([Admit(row, length, SamplingParams())])
        with store.running(Frame(0, [], [Row(row, length, length)])) as caches:
            for cache in caches:
                cache.update_and_fetch(mx.ones((1, 8, length, 64)), mx.ones((1, 8, length, 64)))
                mx.eval(cache.state)
        del caches, cache
    store.apply([Join(0, list(range(rows - 1)))])
    if change != "join":
        store.apply([Join(0, [rows - 1])])
    mx.reset_peak_memory()
    full = store.num_bytes
    others = mx.get_active_memory() - full  # what other tests of this process keep
    match change:
        case "join":
            store.apply([Join(0, [rows - 1])])
        case "leave":
            store.apply([Leave([0])])
        case "detach":
            store.apply([Detach([0, 2, 5])])
        case "grow":
            with store.running(Frame(0, [], [Row(row, length + 1) for row in range(rows)], 0)):
                pass
    full = max(full, store.num_bytes)
    number_bytes = 4 if kind is KVCache else 1 + 2 * 4 / 64
    assert full == rows * layers * (length + 256 if change == "grow" else length) * 2 * 8 * 64 * number_bytes
    assert mx.get_peak_memory() - others < 1.3 * full


def _one_token(model: llama.Model) -> list:
    caches = model.make_cache()
    model(mx.array([[1]]), cache=caches)
    return caches


def test_costs_are_read_off_the_shapes_of_a_lazy_run(model: llama.Model):
    cost = measure_cost(_one_token(model))
    assert cost == RankCost([CacheCost(2 * 4 * 16 * 4)] * NUM_LAYERS, batchable=True, can_pack=True, can_keep=True)


def test_costs_of_windows_states_and_lists():
    keys = mx.zeros((1, 2, 1, 8))
    window, plain, state = RotatingKVCache(max_size=128), KVCache(), ArraysCache(2)
    for cache in (window, plain):
        cache.update_and_fetch(keys, keys)
    state[0], state[1] = mx.zeros((1, 3, 5)), mx.zeros((1, 4))
    token = 2 * 2 * 8 * 4
    assert measure_cost([window, CacheList(plain, state)]).caches == [
        CacheCost(token, 128),
        CacheCost(token),
        CacheCost(0, None, (15 + 4) * 4),
    ]


def test_a_chunked_cache_makes_groups_of_one():
    assert not is_mergeable(ChunkedKVCache(64)) and not is_mergeable(CacheList(KVCache(), ChunkedKVCache(64)))
    assert not measure_cost([ChunkedKVCache(64)]).can_pack and measure_cost([ChunkedKVCache(64)]).can_keep
    assert is_mergeable(KVCache()) and is_mergeable(RotatingKVCache(max_size=8)) and is_mergeable(ArraysCache(1))


def test_packs_need_caches_that_hold_every_token_and_copies_known_ones():
    costs = {
        kind: measure_cost([KVCache(), cache])
        for kind, cache in {
            "window": RotatingKVCache(max_size=8),
            "state": ArraysCache(1),
            "list": CacheList(KVCache()),
            "unknown": LayerCache(8),
            "unknown in a list": CacheList(KVCache(), LayerCache(8)),
        }.items()
    }
    assert not any(cost.can_pack for cost in costs.values())
    assert [kind for kind, cost in costs.items() if not cost.can_keep] == ["unknown", "unknown in a list"]


def test_windows_hold_no_more_than_the_budget_counts_after_a_long_row_has_left():
    window, head = 1024, (1, 2, 1, 8)
    store = KVCacheStore(lambda: [RotatingKVCache(max_size=window), RotatingKVCache(max_size=window)])
    token_bytes = 2 * 2 * 8 * 4
    budget = KVBudget([RankCost([CacheCost(token_bytes, window)] * 2)], 1 << 30)

    def prefill(sequence_id: int, length: int) -> None:
        store.apply([Admit(sequence_id, length, SamplingParams())])
        with store.running(Frame(0, [], [Row(sequence_id, length, length)])) as caches:
            for cache in caches:
                cache.update_and_fetch(*[mx.zeros((1, 2, length, 8))] * 2)

    def decode(lengths: dict[int, int]) -> None:
        rows = [Row(sequence_id, length) for sequence_id, length in lengths.items()]
        with store.running(Frame(0, [], rows, 0)) as caches:
            for cache in caches:
                cache.update_and_fetch(*[mx.zeros((len(rows), *head[1:]))] * 2)

    prefill(0, 2000)
    prefill(1, 100)
    store.apply([Join(0, [0, 1])])
    decode({0: 2001, 1: 101})
    store.apply([Leave([0])])
    for sequence_id in range(2, 8):
        prefill(sequence_id, 100)
    store.apply([Join(0, list(range(2, 8)))])
    decode({1: 102} | dict.fromkeys(range(2, 8), 101))
    assert store.num_bytes == budget.bytes_on(0, [Shape(7, 102)]) == 7 * 256 * 2 * token_bytes
