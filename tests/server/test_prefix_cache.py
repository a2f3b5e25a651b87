"""Which prefixes are kept, found and dropped; what follows for the ranks is in test_scheduler."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from server.frame import Drop, Keep
from server.kv_budget import CacheCost, Shape
from server.prefix_cache import MIN_TOKENS, PrefixCache, num_shared_tokens, prefix_key
from tests.server.ranks_model import make_budget


def key(*parts: range) -> bytes:
    return prefix_key([token_id for part in parts for token_id in part])


@given(shared=st.lists(st.integers(0, 2**31 - 1)), a=st.lists(st.integers(0, 9)), b=st.lists(st.integers(0, 9)))
def test_shared_tokens_are_counted_whole(shared: list[int], a: list[int], b: list[int]):
    expected = len(shared)
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        expected += 1
    assert num_shared_tokens(prefix_key([*shared, *a]), prefix_key([*shared, *b])) == expected


def test_ids_that_share_bytes_but_not_whole_tokens_do_not_match():
    assert num_shared_tokens(prefix_key([1, 0x0101]), prefix_key([1, 0x0201])) == 1


def test_the_longest_usable_prefix_is_found():
    prefix = PrefixCache(make_budget(8192))
    prefix.keep(0, key(range(300)), [])
    prefix.keep(1, key(range(200), range(900, 1200)), [])
    hit = prefix.find(key(range(200), range(900, 1000), range(50)), most=1000)
    assert hit is not None and (hit.entry.entry_id, hit.num_tokens) == (1, 300)
    assert prefix.find(key(range(MIN_TOKENS - 1)), most=1000) is None, "too short to be worth it"


def test_caches_that_cannot_be_cut_serve_only_whole():
    prefix = PrefixCache(make_budget(8192, caches=[CacheCost(0, None, 100)]))
    prefix.keep(0, key(range(300)), [])
    assert prefix.find(key(range(299), range(9)), most=1000) is None
    hit = prefix.find(key(range(300), range(9)), most=1000)
    assert hit is not None and hit.num_tokens == 300
    assert prefix.find(key(range(300)), most=299) is None


def test_a_longer_entry_replaces_the_one_it_continues_where_it_can_be_cut():
    prefix = PrefixCache(make_budget(8192))
    prefix.keep(0, key(range(300)), [])
    assert prefix.keep(0, key(range(400)), []) == [Drop([0]), Keep(1, 0, 400)]
    prefix = PrefixCache(make_budget(8192, caches=[CacheCost(0, None, 100)]))
    prefix.keep(0, key(range(300)), [])
    assert prefix.keep(0, key(range(400)), []) == [Keep(1, 0, 400)]


def test_what_is_there_already_is_not_kept_twice():
    prefix = PrefixCache(make_budget(8192))
    prefix.keep(0, key(range(300)), [])
    assert prefix.keep(1, key(range(300)), []) == prefix.keep(1, key(range(200)), []) == []


@pytest.mark.parametrize("num_running", [0, 3])
def test_entries_stay_within_what_running_sequences_leave(num_running: int):
    prefix = PrefixCache(make_budget(1024))
    running = [Shape(num_running, 256)]
    for index in range(6):
        prefix.keep(index, key(range(1000 * index, 1000 * index + 200)), running)
    assert prefix.num_entries == 4 - num_running and prefix.usage.num_tokens == 256 * (4 - num_running)


def test_making_room_drops_the_least_recently_used_and_no_more_than_needed():
    prefix = PrefixCache(make_budget(1024))
    for index in range(4):
        prefix.keep(index, key(range(1000 * index, 1000 * index + 200)), [])
    prefix.find(key(range(200)), most=1000)
    assert prefix.make_room([Shape(1, 512)]) == [Drop([1]), Drop([2])]
