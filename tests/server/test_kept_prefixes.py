"""Prefixes that are kept and taken up again, on real tiny models of every kind of cache: no logit changes."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from server.errors import DisagreementError
from server.frame import Admit, Detach, Drop, Frame, Join, Keep, Leave, Row
from server.kv_cache import KVCacheStore
from server.protocol import SamplingParams
from tests.distributed.tiny_models import WINDOW, build
from tests.server.cache_driver import CacheDriver

# Attention; windows and attention; states; states and attention; chunks of attention, which cannot be batched.
ARCHITECTURES = ["llama4_text", "gemma3_text", "mamba2", "qwen3_next", "llama4"]
BATCHED = ARCHITECTURES[:-1]
TOKEN_BYTES = 2 * 2 * 8 * 4  # of the caches made by hand: keys and values, 2 heads of 8, float32


def text(num_tokens: int, step: int) -> list[int]:
    return [(i * step + 3) % 89 for i in range(num_tokens)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kept_prefix_gives_what_its_tokens_give_before_and_after_windows_are_full(architecture: str):
    driver = CacheDriver(build(architecture))
    driver.prefill(0, text(WINDOW - 3, 7))
    driver.keep(10, 0)
    driver.run({0: text(WINDOW + 5, 5)})
    driver.keep(11, 0)
    for sequence_id, entry_id in ((1, 10), (2, 11), (3, 11)):
        driver.admit(sequence_id, entry_id)
        driver.check({sequence_id: text(4, 10 + sequence_id)})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_of_a_prefix_do_not_disturb_each_other_the_entry_or_the_original(architecture: str):
    driver = CacheDriver(build(architecture))
    driver.prefill(0, text(WINDOW - 3, 7))
    driver.keep(10, 0)
    driver.admit(1, 10)
    driver.admit(2, 10)
    for step in range(WINDOW + 2):  # one token at a time: written into the buffers in place
        for sequence_id in (0, 1, 2):
            driver.run({sequence_id: [20 * sequence_id + step]})
    for sequence_id in (0, 1, 2):
        driver.check({sequence_id: [5, 6]})
    driver.admit(3, 10)
    driver.check({3: [5, 6]})


@pytest.mark.parametrize("architecture", BATCHED)
def test_a_row_of_a_group_is_kept_and_the_copy_joins_again(architecture: str):
    driver = CacheDriver(build(architecture))
    driver.prefill(0, text(4, 7))
    driver.prefill(1, text(21, 5))
    driver.join(0, 0, 1)
    for step in range(WINDOW):  # the short row's window fills up, the long one's turns over
        driver.run({0: [step], 1: [step]}, 0)
    driver.keep(10, 0)
    driver.keep(11, 1)
    driver.admit(2, 10)
    driver.admit(3, 11)
    driver.join(0, 3, 2)
    driver.check({0: [50], 1: [51], 3: [52], 2: [53]}, 0)
    driver.admit(4, 11)
    driver.check({4: text(3, 11)})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_can_end_as_an_entry_and_an_entry_as_a_sequence(architecture: str):
    driver = CacheDriver(build(architecture))
    driver.prefill(0, text(19, 7))
    driver.keep(10, 0, leaves=True)
    assert driver.store.num_bytes == driver.store.prefix_bytes > 0
    driver.admit(1, 10, takes=True)
    assert driver.store.prefix_bytes == 0
    driver.join(0, 1)
    driver.prefill(2, text(5, 3))
    if architecture in BATCHED:
        driver.join(0, 2)
        driver.check({1: [1], 2: [2]}, 0)
    driver.keep(11, 1, leaves=True)
    driver.check({2: [3]}, 0 if architecture in BATCHED else None)
    driver.admit(3, 11, takes=True)
    driver.check({3: [4, 5]})
    with pytest.raises(KeyError):
        driver.admit(4, 11)


@pytest.mark.parametrize("architecture", BATCHED)
def test_rows_that_change_their_group_keep_their_logits(architecture: str):
    driver = CacheDriver(build(architecture))
    for sequence_id, length in enumerate((3, 17, 6, 9)):
        driver.prefill(sequence_id, text(length, 5 + sequence_id))
    driver.join(0, 0, 1, 2)
    driver.join(1, 3)
    driver.check({0: [1], 1: [2], 2: [3]}, 0)
    driver.store.apply([Detach([1, 0])])
    driver.join(1, 0, 1)
    driver.check({2: [4]}, 0)
    driver.check({3: [5], 0: [6], 1: [7]}, 1)
    driver.store.apply([Detach([2]), Join(1, [2])])
    driver.check({3: [5], 0: [6], 1: [7], 2: [8]}, 1)


def test_a_sequence_of_its_own_group_changes_it_where_nothing_can_be_merged():
    driver = CacheDriver(build("llama4"))
    driver.prefill(0, text(13, 7))
    driver.join(0, 0)
    driver.store.apply([Detach([0])])
    driver.join(4, 0)
    driver.check({0: [3]}, 4)


@pytest.mark.parametrize("architecture", ["llama4_text", "gemma3_text", "llama4"])
def test_part_of_an_entry_can_be_taken_while_its_windows_hold_all_of_it(architecture: str):
    driver = CacheDriver(build(architecture))
    driver.prefill(0, text(WINDOW - 1, 7))
    driver.keep(10, 0)
    for sequence_id, num_tokens in ((1, 2), (2, WINDOW - 2)):
        driver.admit(sequence_id, 10, num_tokens)
        driver.check({sequence_id: text(3, 11)})
    driver.admit(3, 10)
    driver.check({3: text(3, 13)})


@pytest.mark.parametrize("architecture", ["gemma3_text", "mamba2", "qwen3_next", "llama4"])
def test_what_cannot_go_back_is_refused(architecture: str):
    driver = CacheDriver(build(architecture))
    driver.prefill(0, text(2 * WINDOW, 7))
    driver.keep(10, 0)
    with pytest.raises(DisagreementError, match=r"KVCache|ArraysCache.* cannot go back 1 tokens"):
        driver.admit(1, 10, 2 * WINDOW - 1)


def test_a_prefix_that_is_not_what_rank_0_thinks_is_refused():
    driver = CacheDriver(build("llama4_text"))
    driver.prefill(0, [1, 2, 3])
    with pytest.raises(DisagreementError, match="keeps 4 tokens of sequence 0, this rank holds 3"):
        driver.store.apply([Keep(10, 0, 4)])
    with pytest.raises(DisagreementError, match="keeps 4 tokens of sequence 9, this rank holds None"):
        driver.store.apply([Keep(10, 9, 4)])
    driver.keep(10, 0)
    with pytest.raises(DisagreementError, match="starts from 4 tokens of entry 10, this rank holds 3"):
        driver.store.apply([Admit(1, 9, SamplingParams(), 10, 4)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_left_of_entries_that_are_dropped(architecture: str):
    driver = CacheDriver(build(architecture))
    driver.prefill(0, text(20, 7))
    driver.keep(10, 0)
    assert 0 < driver.store.prefix_bytes < driver.store.num_bytes
    driver.admit(1, 10)
    driver.store.apply([Drop([10]), Leave([0])])
    assert driver.store.prefix_bytes == 0 < driver.store.num_bytes
    driver.kept.clear()
    driver.check({1: [1, 2, 3]})
    driver.end()
    assert driver.store.num_bytes == 0


class Filled:
    """A store of one cache of 2 heads of 8, filled without a model."""

    def __init__(self, cache: type, *args: int) -> None:
        self.store = KVCacheStore(lambda: [cache(*args)])

    def run(self, sequence_id: int, length: int, num_tokens: int) -> None:
        with self.store.running(Frame(0, [], [Row(sequence_id, length, num_tokens)])) as caches:
            for cache in caches:
                cache.update_and_fetch(mx.ones((1, 2, num_tokens, 8)), mx.ones((1, 2, num_tokens, 8)))
                mx.eval(cache.state)


def test_an_entry_and_a_sequence_that_starts_from_it_hold_what_they_count():
    filled = Filled(KVCache)
    filled.store.apply([Admit(0, 4000, SamplingParams())])
    filled.run(0, 4000, 4000)
    gc.collect()
    before = mx.get_active_memory()
    filled.store.apply([Keep(10, 0, 4000), Admit(1, 4001, SamplingParams(), 10, 4000)])
    assert filled.store.prefix_bytes == 4096 * TOKEN_BYTES
    assert filled.store.num_bytes == 3 * filled.store.prefix_bytes
    assert mx.get_active_memory() - before == 2 * filled.store.prefix_bytes
    filled.run(1, 4001, 1)
    assert mx.get_active_memory() - before == 2 * filled.store.prefix_bytes


def test_a_short_copy_of_a_long_entry_does_not_hold_the_whole_of_it():
    filled = Filled(KVCache)
    start = mx.get_active_memory()
    filled.store.apply([Admit(0, 4000, SamplingParams())])
    filled.run(0, 4000, 4000)
    filled.store.apply([Keep(10, 0, 4000), Leave([0])])
    filled.store.apply([Admit(1, 301, SamplingParams(), 10, 300), Drop([10])])
    assert filled.store.num_bytes == 512 * TOKEN_BYTES
    assert mx.get_active_memory() - start < 600 * TOKEN_BYTES


@pytest.mark.parametrize("taken", ["whole", "cut", "from a row", "from a sequence"])
def test_what_is_taken_over_is_never_held_twice(taken: str):
    """8 layers, so that one of them is little."""
    length, layers = 16384, 8
    whole = layers * length * TOKEN_BYTES
    store = KVCacheStore(lambda: [KVCache() for _ in range(layers)])
    store.apply([Admit(0, length, SamplingParams()), Admit(1, 1, SamplingParams())])
    for sequence_id, num_tokens in ((0, length), (1, 1)):
        with store.running(Frame(0, [], [Row(sequence_id, num_tokens, num_tokens)])) as caches:
            for cache in caches:
                cache.update_and_fetch(mx.ones((1, 2, num_tokens, 8)), mx.ones((1, 2, num_tokens, 8)))
                mx.eval(cache.state)
            del caches, cache
    if taken == "from a row":
        store.apply([Join(0, [0, 1])])
    held = store.num_bytes
    start = mx.get_active_memory() - held
    mx.reset_peak_memory()
    store.apply([Keep(10, 0, length, taken.startswith("from"))])
    if taken.startswith("from"):
        assert mx.get_peak_memory() - start < held + whole / 2
    else:
        store.apply([Leave([0, 1])])
        mx.reset_peak_memory()
        store.apply([Admit(2, length, SamplingParams(), 10, length - 300 * (taken == "cut"), takes_entry=True)])
        assert mx.get_peak_memory() - start < 1.3 * whole


def test_a_window_is_kept_without_what_the_last_chunk_still_saw_before_it():
    window, chunk = 512, 256
    filled = Filled(RotatingKVCache, window)
    filled.store.apply([Admit(0, 1000, SamplingParams())])
    for length in range(chunk, 5 * chunk, chunk):
        filled.run(0, length, chunk)
    filled.store.apply([Keep(10, 0, 4 * chunk)])
    assert filled.store.prefix_bytes == window * TOKEN_BYTES
    assert filled.store.num_bytes == 2 * window * TOKEN_BYTES, "the sequence's own cache was cut after its chunk"
    filled.store.apply([Leave([0])])
    assert filled.store.num_bytes == window * TOKEN_BYTES
