"""The budget's arithmetic: blocks, windows, the tightest rank, and messages that name the key."""

import pytest

from server.errors import BudgetError
from server.kv_budget import MIB, CacheCost, KVBudget, RankCost, Shape, blocks

KIB = 1024


def attention(num_layers: int, bytes_per_token: int = KIB) -> RankCost:
    return RankCost([CacheCost(bytes_per_token)] * num_layers)


def test_lengths_count_in_whole_blocks():
    assert [blocks(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]


def test_a_group_is_charged_as_a_rectangle_of_its_longest_row():
    budget = KVBudget([attention(4)], 100 * MIB)
    assert budget.bytes_on(0, [Shape(3, 300)]) == 3 * 512 * 4 * KIB


def test_a_sliding_window_stops_growing():
    rank = RankCost([CacheCost(KIB, window=512), CacheCost(KIB)])
    assert rank.row_bytes(2048) == (512 + 2048) * KIB


def test_a_sliding_window_holds_a_chunk_more_while_a_prompt_is_read():
    window, copy, overshoot = 512 * KIB, 512 * KIB, 99 * KIB
    rank = RankCost([CacheCost(KIB, window=512)])
    assert KVBudget([rank], window + copy + overshoot, chunk_tokens=100).fits([Shape(1, 2048)])
    assert not KVBudget([rank], window + copy + overshoot - 1, chunk_tokens=100).fits([Shape(1, 2048)])


def test_the_limit_covers_many_short_rows_of_windows_and_states():
    rank = RankCost([CacheCost(KIB, window=512), CacheCost(0, None, fixed_bytes=KIB)])
    budget = KVBudget([rank], 100 * MIB, max_tokens=4096)
    groups = [Shape(16, 256)]
    assert budget.fits(groups) and budget.bytes_on(0, groups) <= budget.bytes_limit(0)


def test_a_state_space_layer_costs_the_same_at_every_length():
    rank = RankCost([CacheCost(0, None, fixed_bytes=7 * KIB)])
    assert rank.row_bytes(256) == rank.row_bytes(1 << 20) == 7 * KIB


def test_the_tightest_rank_decides():
    budget = KVBudget([attention(1), attention(8)], 16 * MIB)
    # Rank 1: 8 KiB a token and a copy of one layer, 1 KiB a token more: 16 MiB hold 7 blocks of 256.
    assert budget.capacity_tokens == 16 * MIB // (9 * KIB) // 256 * 256
    assert budget.fits([Shape(1, budget.capacity_tokens)])
    assert not budget.fits([Shape(1, budget.capacity_tokens + 1)])


def test_the_smaller_of_the_two_size_keys_binds():
    by_tokens = KVBudget([attention(4)], 100 * MIB, max_tokens=1000)
    assert by_tokens.capacity_tokens == 1024  # whole blocks
    assert by_tokens.bytes_limit(0) == 1024 * 4 * KIB
    by_bytes = KVBudget([attention(4)], 2 * MIB, max_tokens=1_000_000)
    assert by_bytes.capacity_tokens == 256
    assert by_bytes.bytes_limit(0) == 2 * MIB


def test_the_token_limit_is_shared_by_all_groups():
    budget = KVBudget([attention(1)], 100 * MIB, max_tokens=1024)
    assert budget.fits([Shape(2, 256), Shape(1, 512)])
    assert not budget.fits([Shape(2, 256), Shape(1, 513)])


@pytest.mark.parametrize(
    ("configured", "context", "expected"),
    [(None, 2048, 2048), (None, None, 4096), (None, 9000, 4096), (512, 2048, 512)],
)
def test_the_longest_request_is_bounded_by_cache_model_and_setting(configured, context, expected):
    budget = KVBudget([attention(1)], 100 * MIB, max_tokens=4096)
    assert budget.max_sequence_length(configured, context) == expected


def test_a_sequence_length_over_the_cache_names_the_keys():
    budget = KVBudget([attention(1)], 100 * MIB, max_tokens=1024)
    with pytest.raises(BudgetError, match=r"MAX_SEQUENCE_LENGTH=2000 .*1024 tokens.*KV_CACHE_MAX_SIZE"):
        budget.max_sequence_length(2000, None)


def test_a_sequence_length_over_the_models_context_is_refused():
    budget = KVBudget([attention(1)], 100 * MIB)
    with pytest.raises(BudgetError, match=r"MAX_SEQUENCE_LENGTH=5000 .*context of 4096"):
        budget.max_sequence_length(5000, 4096)


def test_a_budget_that_cannot_hold_one_request_says_what_is_needed():
    budget = KVBudget([attention(64, 64 * KIB)], 1 * MIB)
    with pytest.raises(BudgetError, match=r"KV_CACHE_RESERVED_MEMORY_MB=1 .*1040 MB"):
        budget.max_sequence_length(None, 4096)


def test_one_unbatchable_rank_makes_groups_of_one():
    assert not KVBudget([attention(1), RankCost([CacheCost(KIB)], batchable=False)], MIB).batchable
