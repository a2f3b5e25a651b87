"""The caches of one rank with a real tiny model: joins, leaves and growth change no logits, and peak low."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from server.errors import DisagreementError
from server.frame import Admit, Frame, Join, Leave, Row
from server.kv_budget import CacheCost, KVBudget, RankCost, Shape
from server.kv_cache import KVCacheStore, is_mergeable, measure_cost
from server.protocol import SamplingParams

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


class Driver:
    """Plays rank 0 for one store: keeps the lengths, runs tokens through the model."""

    def __init__(self, model: llama.Model) -> None:
        self.model = model
        self.store = KVCacheStore(model.make_cache)
        self.lengths: dict[int, int] = {}

    def admit(self, sequence_id: int, tokens: list[int]) -> None:
        self.store.apply([Admit(sequence_id, len(tokens), SamplingParams())])
        self.lengths[sequence_id] = 0
        self.run([sequence_id], [tokens], None)

    def run(self, sequence_ids: list[int], tokens: list[list[int]], group_id: int | None) -> mx.array:
        for sequence_id in sequence_ids:
            self.lengths[sequence_id] += len(tokens[0])
        frame = Frame(0, [], [Row(i, self.lengths[i]) for i in sequence_ids], group_id)
        batch = self.store.batch_for(frame, len(tokens[0]))
        logits = self.model(mx.array(tokens), cache=batch.caches)
        mx.eval(logits, [cache.state for cache in batch.caches])
        return logits[:, -1]


def alone(model: llama.Model, tokens: list[int]) -> mx.array:
    return model(mx.array([tokens]), cache=model.make_cache())[0, -1]


def test_sequences_that_join_and_leave_get_the_logits_they_get_alone(model: llama.Model):
    driver = Driver(model)
    texts = {0: [1, 2, 3], 1: list(range(40)), 2: [7], 3: [9, 8, 7, 6, 5]}
    for sequence_id in (0, 1, 2):
        driver.admit(sequence_id, texts[sequence_id])
    driver.store.apply([Join(5, [0, 1, 2])])

    def step(sequence_ids: list[int], token: int) -> None:
        logits = driver.run(sequence_ids, [[token]] * len(sequence_ids), 5)
        for row, sequence_id in enumerate(sequence_ids):
            texts[sequence_id] = [*texts[sequence_id], token]
            assert mx.allclose(logits[row], alone(model, texts[sequence_id]), atol=1e-4)

    step([0, 1, 2], 11)
    driver.store.apply([Leave([1])])
    step([0, 2], 12)
    driver.admit(3, texts[3])
    driver.store.apply([Leave([0]), Join(5, [3])])
    step([2, 3], 13)
    step([2, 3], 14)


def test_buffers_are_whole_blocks_of_the_longest_row_through_joins_growth_and_leaves(model: llama.Model):
    driver = Driver(model)
    token_bytes = measure_cost(_one_token(model)).row_bytes(1)
    driver.admit(0, [1] * 200)
    driver.admit(1, [1] * 10)
    driver.store.apply([Join(0, [0, 1])])

    def rectangle() -> float:
        driver.store.count_bytes()
        return driver.store.num_bytes / token_bytes

    assert rectangle() == 2 * 256
    for _ in range(57):
        driver.run([0, 1], [[3], [3]], 0)
    assert rectangle() == 2 * 512  # 257 tokens
    driver.store.apply([Leave([0])])
    assert rectangle() == 256  # 67 tokens are left
    driver.store.apply([Leave([1])])
    assert rectangle() == 0


def test_a_frame_that_does_not_fit_this_ranks_state_is_refused(model: llama.Model):
    driver = Driver(model)
    driver.admit(0, [1, 2, 3])
    with pytest.raises(DisagreementError, match=r"expects rows \[\(0, 9\)\], this rank holds \[\(0, 4\)\]"):
        driver.store.batch_for(Frame(7, [], [Row(0, 9)]), 1)


def test_a_sequence_can_leave_before_it_joined(model: llama.Model):
    driver = Driver(model)
    driver.admit(0, [1, 2, 3])
    driver.store.apply([Leave([0])])
    driver.store.count_bytes()
    assert driver.store.num_bytes == 0


@pytest.mark.parametrize("change", ["join", "leave", "grow"])
def test_joins_leaves_and_growth_of_a_full_batch_peak_under_1_3_times_the_cache(change: str):
    """8 rows of 512 tokens in 12 layers of 8 heads × 64: 201 MB, so that nothing else counts."""
    layers, rows, length = 12, 8, 512

    def make_caches() -> list[KVCache]:
        return [KVCache() for _ in range(layers)]

    store = KVCacheStore(make_caches)  # type: ignore[arg-type]
    for row in range(rows):
        store.apply([Admit(row, length, SamplingParams())])
        batch = store.batch_for(Frame(0, [], [Row(row, length)]), length)
        for cache in batch.caches:
            cache.update_and_fetch(mx.ones((1, 8, length, 64)), mx.ones((1, 8, length, 64)))
            mx.eval(cache.state)
        del batch, cache
    store.apply([Join(0, list(range(rows - 1)))])
    if change != "join":
        store.apply([Join(0, [rows - 1])])
    mx.reset_peak_memory()
    match change:
        case "join":
            store.apply([Join(0, [rows - 1])])
        case "leave":
            store.apply([Leave([0])])
        case "grow":
            store.batch_for(Frame(0, [], [Row(row, length + 1) for row in range(rows)], 0), 1)
    peak = mx.get_peak_memory()
    num_tokens = length + 256 if change == "grow" else length
    assert peak < 1.3 * rows * layers * num_tokens * 2 * 8 * 64 * 4


def _one_token(model: llama.Model) -> list:
    caches = model.make_cache()
    model(mx.array([[1]]), cache=caches)
    return caches


def test_costs_are_read_off_the_shapes_of_a_lazy_run(model: llama.Model):
    cost = measure_cost(_one_token(model))
    assert cost.caches == [CacheCost(2 * 4 * 16 * 4)] * NUM_LAYERS and cost.batchable


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
    assert is_mergeable(KVCache()) and is_mergeable(RotatingKVCache(max_size=8)) and is_mergeable(ArraysCache(1))


def test_windows_hold_no_more_than_the_budget_counts_after_a_long_row_has_left():
    window, head = 1024, (1, 2, 1, 8)
    store = KVCacheStore(lambda: [RotatingKVCache(max_size=window), RotatingKVCache(max_size=window)])
    token_bytes = 2 * 2 * 8 * 4
    budget = KVBudget([RankCost([CacheCost(token_bytes, window)] * 2)], 1 << 30)

    def prefill(sequence_id: int, length: int) -> None:
        store.apply([Admit(sequence_id, length, SamplingParams())])
        batch = store.batch_for(Frame(0, [], [Row(sequence_id, length)]), length)
        for cache in batch.caches:
            cache.update_and_fetch(*[mx.zeros((1, 2, length, 8))] * 2)

    def decode(lengths: dict[int, int]) -> None:
        rows = [Row(sequence_id, length) for sequence_id, length in lengths.items()]
        for cache in store.batch_for(Frame(0, [], rows, 0), 1).caches:
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
    store.count_bytes()
    assert store.num_bytes == budget.bytes_on(0, [Shape(7, 102)]) == 7 * 256 * 2 * token_bytes
