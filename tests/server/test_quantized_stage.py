"""KV_CACHE_BITS on the ranks: what the store and the stages do to quantized caches leaves every answer as it was."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from server.cache_ops import measure_cost
from server.frame import Admit, Detach, Leave
from server.kv_budget import CacheCost, RankCost
from server.quantized_cache import MergeableQuantizedKVCache
from tests.server.cache_driver import CacheDriver
from tests.server.test_stage import MAX_TOKENS, PROMPTS, Ring, Server, requests
from tests.server.wide_models import build_wide


def quantized(bits: int) -> Any:
    """A whole model whose own `make_cache` makes quantized caches."""
    model: Any = build_wide("qwen2")
    model.make_cache = lambda: [MergeableQuantizedKVCache(32, bits) for _ in model.layers]
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_packs_groups_and_kept_prefixes_give_the_logits_of_each_text_alone(bits: int):
    driver = CacheDriver(quantized(bits))
    for sequence_id in (0, 1, 2):
        driver.admit(sequence_id)
    driver.check({0: [5, 6, 7], 1: list(range(20)), 2: [9]})
    driver.check({0: list(range(11)), 1: [4], 2: [8, 1, 7]})
    driver.keep(10, 1)
    driver.check({1: [6]})  # written into the arrays whose memory the entry shares
    driver.join(0, 0, 1)
    driver.join(0, 2)
    driver.check({0: [11], 1: [12], 2: [13]}, 0)
    driver.keep(11, 0)
    driver.admit(3, 10, 15)
    driver.admit(4, 11)
    driver.admit(5, 10)
    driver.check({3: [1, 2], 4: [3], 5: [4]})
    driver.store.apply([Detach([1]), Leave([2])])
    driver.join(1, 1, 3, 4)
    driver.check({1: [5], 3: [6], 4: [7]}, 1)
    driver.check({0: [8]}, 0)
    driver.end()
    assert driver.store.num_bytes == 0


def test_costs_are_those_of_packed_numbers_and_all_can_be_done_with_them():
    model = quantized(4)
    caches = make_prompt_cache(model)
    model(mx.array([[1]]), cache=caches)
    token_bytes = 2 * 2 * 32 * (4 / 8 + 2 * 4 / 32)  # keys and values of 2 heads; a float32 scale and bias for each 32
    assert measure_cost(caches) == RankCost([CacheCost(int(token_bytes))] * 4, can_pack=True, can_keep=True)


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """What the whole model says on mlx-lm's own quantized caches."""
    model: Any = build_wide("qwen3_next")
    cache = [QuantizedKVCache(32, 8) if index == 2 else fresh for index, fresh in enumerate(make_prompt_cache(model))]
    tokens: list[int] = []
    ids: Any = prompt
    for _ in range(max_tokens):
        ids = mx.argmax(model(mx.array([ids]), cache=cache)[:, -1], axis=-1).tolist()
        tokens += ids
    return tokens


def test_a_ring_says_what_mlx_lm_says_also_from_a_kept_prefix(monkeypatch: pytest.MonkeyPatch):
    """Of qwen3_next's layers one in three has keys and values, the others have states."""
    for module in ("server.prefix_cache", "server.admission"):
        monkeypatch.setattr(f"{module}.MIN_TOKENS", 4)
    server = Server(Ring("qwen3_next", 2, build=build_wide, kv_cache_bits=8), prefix_cache=True)
    first_turns = server.serve(requests())
    assert first_turns == {name: alone(PROMPTS[name], MAX_TOKENS[name]) for name in PROMPTS}
    second = {name: PROMPTS[name] + first_turns[name] + [7, 8] for name in PROMPTS}
    monkeypatch.setattr("tests.server.test_stage.PROMPTS", second)
    assert server.serve(requests()) == {name: alone(second[name], MAX_TOKENS[name]) for name in second}
    assert any(admit.num_cached_tokens for admit in server.operations(Admit))
