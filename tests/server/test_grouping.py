"""The number of groups and the size of chunks, as functions of measured times."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.chunking import MAX_CHUNK_TOKENS, chunk_tokens_alone, chunk_tokens_beside_streams, in_even_chunks
from server.grouping import choose_num_groups, period_seconds
from server.step_times import ChunkTimes, Line, StepTimes


def measured(num_stages: int, seconds: Callable[[int, int], float], groups: list[int], rows: list[int]) -> StepTimes:
    """Times as if steps of `rows` rows had run in so many groups; `seconds(groups, rows)` is what a stage takes."""
    times = StepTimes()
    for count in groups:
        for num_rows in rows:
            for _ in range(3):
                times.note(count, num_rows, [seconds(count, num_rows)] * num_stages)
    return times


@dataclass(frozen=True)
class Machine:
    """What steps really cost: with more groups in flight than one, each takes `contention` times as long."""

    num_stages: int
    fixed: float
    per_row: float
    contention: float = 1.0
    unevenness: float = 0.0  # how much longer the first stage takes
    link: float = 0.0

    def stage_seconds(self, groups: int, rows: int) -> list[float]:
        step = (self.fixed + self.per_row * rows) * (self.contention if groups > 1 else 1.0)
        return [step * (1 + self.unevenness), *[step] * (self.num_stages - 1)]

    def period(self, rows: int, groups: int) -> float:
        sizes = even_sizes(rows, groups)
        by_group = [self.stage_seconds(groups, size) for size in sizes]
        way_round = sum(by_group[0]) + self.link * self.num_stages
        return max(way_round, *(sum(stage) for stage in zip(*by_group, strict=True)))


def even_sizes(rows: int, groups: int) -> list[int]:
    size, num_larger = divmod(rows, groups)
    return [size + 1] * num_larger + [size] * (groups - num_larger)


def test_nothing_measured_is_one_group():
    assert choose_num_groups(8, 4, StepTimes()) == 1


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_steps_that_cost_by_the_row_are_split_over_all_stages(num_stages: int):
    times = measured(num_stages, lambda groups, rows: 0.01 * rows, [1], [1, 4, 8, 16, 24])
    assert choose_num_groups(24, num_stages, times) == num_stages


@pytest.mark.parametrize("num_stages", [2, 3, 8])
def test_steps_that_cost_the_same_at_any_size_stay_one_group(num_stages: int):
    times = measured(num_stages, lambda groups, rows: 0.01, [1, 2, 3, 8], [1, 2, 3, 4, 8])
    assert choose_num_groups(8, num_stages, times) == 1
    assert choose_num_groups(8, num_stages, times, current=num_stages) == 1


def test_ranks_that_share_one_machines_cores_stay_one_group():
    """Two stages at once each take twice as long: what they gain by the rows they lose to each other."""
    times = measured(2, lambda groups, rows: groups * (0.02 + 0.005 * rows), [1, 2], [4, 8])
    assert choose_num_groups(8, 2, times, current=2) == 1


def test_smaller_groups_are_tried_once_where_only_one_size_was_measured():
    times = measured(2, lambda groups, rows: 0.02, [1], [8])
    assert choose_num_groups(8, 2, times) == 2, "optimism, until measured"
    for _ in range(3):
        assert choose_num_groups(8, 2, times, current=2) == 2, "three steps, lest one that was disturbed decides"
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
    times = measured(2, lambda groups, rows: groups * 0.01 * rows, [1, 2], [4, 8])
    assert choose_num_groups(8, 2, times) == 1
    for _ in range(2000):
        times.note(1, 8, [0.08, 0.08])
    assert choose_num_groups(8, 2, times) == 2


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Any ring: what a step costs at all and by the row, how uneven its stages are, what they lose to each other."""
    return Machine(
        num_stages=draw(st.integers(2, 6)),
        fixed=draw(st.sampled_from([0.0, 0.002, 0.01, 0.05])),
        per_row=draw(st.sampled_from([0.0, 0.0005, 0.002, 0.01])) + 1e-5,
        contention=draw(st.sampled_from([1.0, 1.05, 1.5, 2.0])),
        unevenness=draw(st.sampled_from([0.0, 0.3])),
        link=draw(st.sampled_from([0.0, 0.001])),
    )


@settings(deadline=None, max_examples=100, derandomize=True)  # of the noise too: it may mislead for 500 steps
@given(machine=machines(), crowds=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_whatever_the_ring_is_and_however_users_came_it_ends_with_about_the_best_number_of_groups(
    machine: Machine, crowds: list[int], seed: int
):
    noise = random.Random(seed)
    times, groups = StepTimes(), 1
    for rows, num_steps in [*((rows, 60) for rows in crowds), (crowds[-1], 600)]:
        for _ in range(num_steps):
            groups = choose_num_groups(rows, machine.num_stages, times, groups)
            for size in even_sizes(rows, groups):
                disturbed = 4.0 if noise.random() < 0.03 else 1.0
                jitter = disturbed * noise.uniform(1.0, 1.02)
                times.note(groups, size, [second * jitter for second in machine.stage_seconds(groups, size)])
                times.note_overhead(machine.link * machine.num_stages)
    most = min(rows, machine.num_stages)
    best = min(machine.period(rows, count) for count in range(1, most + 1))
    assert machine.period(rows, groups) <= 1.12 * best, groups


def test_a_first_user_alone_does_not_hide_that_one_group_serves_many():
    """Found by a benchmark: with one row measured in one group, eight rows in one were never tried."""
    machine = Machine(num_stages=2, fixed=0.03, per_row=0.001, contention=2.0)
    times, groups = StepTimes(), 1
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 8, 8):
        for _ in range(5):
            groups = choose_num_groups(rows, 2, times, groups)
            for size in even_sizes(rows, groups):
                times.note(groups, size, machine.stage_seconds(groups, size))
    assert groups == 1


def test_one_disturbed_step_does_not_speak_for_all():
    times = measured(2, lambda groups, rows: 0.01 * rows, [1], [1, 2, 4])
    for seconds in (0.09, 0.02, 0.02):
        times.note(2, 2, [seconds, seconds])
        assert choose_num_groups(4, 2, times, current=2) == 2
    times = measured(2, lambda groups, rows: 0.01 * rows, [1], [1, 2, 4])
    for seconds in (0.09, 0.09, 0.02):
        times.note(2, 2, [seconds, seconds])
    assert choose_num_groups(4, 2, times, current=2) == 1


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
