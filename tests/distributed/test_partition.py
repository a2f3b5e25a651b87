"""The split of layers, against brute force over every split of a small model."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed.errors import PartitionError
from distributed.partition import LayerRange, explicit_split, split_layers


def all_splits(num_layers: int, num_stages: int):
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield [LayerRange(*pair) for pair in itertools.pairwise((0, *cuts, num_layers))]


def at_the_ends(num_stages: int, first: float, last: float) -> list[Any]:
    others: list[Any] = [0] * num_stages
    others[0] += first
    others[-1] += last
    return others


def lengths(ranges) -> list[int]:
    return [len(layer_range) for layer_range in ranges]


@given(st.data())
def test_the_slowest_stage_is_as_fast_as_in_the_best_of_all_splits(data):
    costs = data.draw(st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
    num_stages = data.draw(st.integers(1, min(4, len(costs))))
    first, last = data.draw(st.floats(0, 100)), data.draw(st.floats(0, 100))

    def slowest(ranges) -> float:
        stages = [sum(costs[layer] for layer in layer_range) for layer_range in ranges]
        stages[0] += first
        stages[-1] += last
        return max(stages)

    ranges = split_layers([costs] * num_stages, other_costs=at_the_ends(num_stages, first, last))
    best = min(slowest(split) for split in all_splits(len(costs), num_stages))
    assert slowest(ranges) == pytest.approx(best, rel=1e-6)
    assert [layer for layer_range in ranges for layer in layer_range] == list(range(len(costs)))


@given(st.data())
def test_every_stage_stays_within_its_memory_or_no_split_does(data):
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    num_stages = data.draw(st.integers(1, min(4, len(sizes))))
    limits = data.draw(st.lists(st.integers(1, 60), min_size=num_stages, max_size=num_stages))
    first, last = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10))

    def fits(ranges) -> bool:
        held = [sum(sizes[layer] for layer in layer_range) for layer_range in ranges]
        held[0] += first
        held[-1] += last
        return all(size <= limit for size, limit in zip(held, limits, strict=True))

    try:
        ranges = split_layers(
            [sizes] * num_stages,
            layer_bytes=sizes,
            other_bytes=at_the_ends(num_stages, first, last),
            memory_limits=limits,
        )
    except PartitionError:
        assert not any(fits(split) for split in all_splits(len(sizes), num_stages))
    else:
        assert fits(ranges)


def test_equal_layers_are_spread_evenly():
    assert sorted(lengths(split_layers([[1.0] * 30] * 4))) == [7, 7, 8, 8]


def test_a_heavy_head_gets_fewer_layers_beside_it():
    assert lengths(split_layers([[1.0] * 30] * 2, other_costs=[0, 8])) == [19, 11]


def test_a_machine_twice_as_fast_gets_twice_the_layers():
    assert lengths(split_layers([[2.0] * 30, [1.0] * 30])) == [10, 20]


def test_a_machine_that_is_slow_with_one_kind_of_layer_gets_the_other_kind():
    """Six layers of one kind, then six of another; the first machine takes ten times as long for the second kind."""
    assert lengths(split_layers([[1.0] * 6 + [10.0] * 6, [1.0] * 12])) == [6, 6]


@given(st.data())
def test_with_machines_of_any_speeds_the_slowest_stage_is_as_fast_as_can_be(data):
    num_layers = data.draw(st.integers(1, 8))
    num_stages = data.draw(st.integers(1, min(4, num_layers)))
    row = st.lists(st.floats(0.01, 100), min_size=num_layers, max_size=num_layers)
    costs = data.draw(st.lists(row, min_size=num_stages, max_size=num_stages))

    def slowest(ranges) -> float:
        return max(sum(costs[stage][layer] for layer in part) for stage, part in enumerate(ranges))

    best = min(slowest(split) for split in all_splits(num_layers, num_stages))
    assert slowest(split_layers(costs)) == pytest.approx(best, rel=1e-6)


def test_a_small_machine_gets_what_it_can_hold():
    ranges = split_layers([[1.0] * 12] * 3, layer_bytes=[10] * 12, memory_limits=[1000, 25, 1000])
    assert lengths(ranges) == [5, 2, 5]


def test_what_a_stage_needs_besides_layers_counts_against_its_memory():
    ranges = split_layers([[1] * 9] * 3, layer_bytes=[10] * 9, other_bytes=[0, 15, 0], memory_limits=[90, 40, 90])
    assert len(ranges[1]) == 2


def test_a_model_that_does_not_fit_names_the_keys_to_change():
    with pytest.raises(PartitionError, match=r"do not fit.*WORKER_HOSTS.*KV_CACHE_RESERVED_MEMORY_MB"):
        split_layers([[1, 1]] * 2, layer_bytes=[2**30, 2**30], memory_limits=[2**30, 2**20])


def test_more_ranks_than_layers_is_refused():
    with pytest.raises(PartitionError, match="RING_SIZE to at most 2"):
        split_layers([[1, 1]] * 3)


def test_an_explicit_split_becomes_ranges():
    assert explicit_split([10, 20], 30, 2) == (LayerRange(0, 10), LayerRange(10, 30))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([10, 10], r"LAYER_SPLIT=10,10 adds up to 20 layers, but the model has 30"),
        ([10, 10, 10], r"LAYER_SPLIT=10,10,10 has 3 entries, but the ring has 2 ranks"),
        ([30, 0], r"LAYER_SPLIT=30,0 leaves a rank without layers"),
        ([40, -10], r"leaves a rank without layers"),
    ],
)
def test_an_explicit_split_that_does_not_add_up_says_what_it_must(counts, message):
    with pytest.raises(PartitionError, match=message):
        explicit_split(counts, 30, 2)


def test_a_layer_range_counts_iterates_and_contains():
    layer_range = LayerRange(3, 6)
    assert (len(layer_range), list(layer_range), 5 in layer_range, 6 in layer_range) == (3, [3, 4, 5], True, False)
    with pytest.raises(ValueError, match="not a range"):
        LayerRange(3, 3)
