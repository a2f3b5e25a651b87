"""The number of groups and the size of chunks, as functions of measured times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.chunking import MAX_CHUNK_TOKENS, chunk_tokens_alone, chunk_tokens_beside_streams, in_even_chunks
from server.grouping import choose_num_groups, period_seconds
from server.step_times import ChunkTimes, Line, StepTimes


def measured(num_stages: int, seconds: Callable[[int, int], float], groups: list[int], rows: list[int]) -> StepTimes:
    """Times as if steps of `rows` rows had run in so many groups; `seconds(groups, rows)` is what a stage takes."""
    times = StepTimes()
    for count in groups:
        for num_rows in rows:
            times.note(count, num_rows, [seconds(count, num_rows)] * num_stages)
    return times


def test_nothing_measured_is_one_group():
    assert choose_num_groups(8, 4, StepTimes()) == 1


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_steps_that_cost_by_the_row_are_split_over_all_stages(num_stages: int):
    times = measured(num_stages, lambda groups, rows: 0.01 * rows, [1], [1, 4, 8, 16, 32])
    assert choose_num_groups(24, num_stages, times) == num_stages


@pytest.mark.parametrize("num_stages", [2, 3, 8])
def test_steps_that_cost_the_same_at_any_size_stay_one_group(num_stages: int):
    times = measured(num_stages, lambda groups, rows: 0.01, [1, 2, 3], [1, 2, 4, 8])
    assert choose_num_groups(8, num_stages, times) == 1
    assert choose_num_groups(8, num_stages, times, current=num_stages) == 1


def test_ranks_that_share_one_machines_cores_stay_one_group():
    """Two stages at once each take twice as long: what they gain by the rows they lose to each other."""
    times = measured(2, lambda groups, rows: groups * (0.02 + 0.005 * rows), [1, 2], [4, 8])
    assert choose_num_groups(8, 2, times, current=2) == 1


def test_smaller_groups_are_tried_once_where_only_one_size_was_measured():
    times = measured(2, lambda groups, rows: 0.02, [1], [8])
    assert choose_num_groups(8, 2, times) == 2, "optimism, until measured"
    times.note(2, 4, [0.02, 0.02])
    assert choose_num_groups(8, 2, times, current=2) == 1


def test_a_small_gain_is_not_worth_moving():
    times = measured(2, lambda groups, rows: 0.02 + 0.0001 * rows, [1, 2], [4, 8])
    assert choose_num_groups(8, 2, times, current=1) == 1


def test_one_more_group_than_stages_hides_slow_links():
    times = measured(2, lambda groups, rows: 0.01 * rows, [1, 2, 3], [2, 3, 4, 6, 12])
    for _ in range(9):
        times.note_overhead(0.03)
    assert choose_num_groups(12, 2, times) == 3


def test_a_lone_sequence_and_a_ring_of_one_have_one_group():
    times = measured(2, lambda groups, rows: 0.01 * rows, [1], [1, 8])
    assert choose_num_groups(1, 2, times) == 1 and choose_num_groups(8, 1, times) == 1


def test_a_period_is_the_slowest_stage_or_the_way_round():
    times = StepTimes()
    times.note(2, 4, [0.03, 0.01])
    assert period_seconds(8, 2, times) == pytest.approx(0.06)  # the slow stage serves both groups
    times.note_overhead(0.05)
    times.note_overhead(0.05)
    assert period_seconds(8, 2, times) == pytest.approx(0.09)  # a group is under way for longer than that


def test_times_follow_what_is_measured_and_shrug_off_a_hiccup():
    times = StepTimes()
    for seconds in (0.01, 0.01, 0.9, 0.01):
        times.note(1, 4, [seconds])
    assert times.stage_seconds(1, 4) == [pytest.approx(0.01)]
    for _ in range(20):
        times.note(1, 4, [0.05])
    assert times.stage_seconds(1, 4) == [pytest.approx(0.05)]


def test_what_was_not_measured_for_long_is_forgotten_and_tried_again():
    times = measured(2, lambda groups, rows: 0.02, [1, 2], [4, 8])
    assert choose_num_groups(8, 2, times) == 1
    for _ in range(5000):
        times.note(1, 8, [0.02, 0.02])
    assert choose_num_groups(8, 2, times) == 2


def test_times_between_and_beyond_what_was_measured_lie_on_a_line():
    times = measured(1, lambda groups, rows: 1.0 + rows, [1], [2, 6])
    assert times.stage_seconds(1, 4) == [pytest.approx(5.0)]
    assert times.stage_seconds(1, 8) == [pytest.approx(9.0)]
    assert times.stage_seconds(1, 1) == [pytest.approx(2.0)]


# -- chunks ----------------------------------------------------------------------------------------------------------


def test_the_cost_of_chunks_is_a_line_through_them():
    times = ChunkTimes()
    times.note(100, [0.1, 0.2])
    assert times.line is None
    times.note(300, [0.3, 0.4])
    assert times.line is not None
    assert (times.line.fixed, times.line.per_token) == (pytest.approx(0.1), pytest.approx(0.001))


def test_a_chunk_beside_streams_stretches_their_gap_to_the_factor():
    """P = 1: a lap is the chunk and one step of 0.1 s; 2.5 times that leave 0.15 s for the chunk."""
    steps = measured(1, lambda groups, rows: 0.1, [1], [4])
    assert chunk_tokens_beside_streams(4, 1, 1, steps, Line(0.05, 0.001)) == pytest.approx(100, abs=1)


def test_a_lone_group_on_a_long_ring_gets_smaller_chunks_for_it_waits_behind_one_on_every_stage():
    steps = measured(8, lambda groups, rows: 0.01, [1, 8], [4])
    alone = chunk_tokens_beside_streams(4, 1, 8, steps, Line(0.0, 0.0001))
    together = chunk_tokens_beside_streams(32, 8, 8, steps, Line(0.0, 0.0001))
    assert alone == pytest.approx((2.5 * 0.08 - 0.01) / 7 / 0.0001, abs=1) and together == MAX_CHUNK_TOKENS


def test_more_stages_want_more_chunks_and_costly_passes_fewer():
    assert chunk_tokens_alone(2000, 1, Line(0.05, 0.01)) == MAX_CHUNK_TOKENS
    assert chunk_tokens_alone(2000, 2, Line(0.05, 0.01)) == 100
    assert chunk_tokens_alone(2000, 2, Line(0.5, 0.01)) > chunk_tokens_alone(2000, 4, Line(0.5, 0.01)) > 100


def test_no_chunk_is_mostly_the_fixed_part_of_a_pass():
    assert chunk_tokens_alone(100, 8, Line(1.0, 0.01)) == 100


def test_chunks_are_even():
    assert in_even_chunks(520, 512) == 260 and in_even_chunks(512, 512) == 512 and in_even_chunks(3, 512) == 3
