"""The model of the ring against what can be worked out by hand."""

from __future__ import annotations

import pytest

from bench.pipeline_model import Cost, Link, Ring, predict

GROWING = Cost(0.002, 0.002)  # 10 ms at 4 rows
CONSTANT = Cost(0.010, 0.0)


def test_one_stage_makes_a_row_of_tokens_a_step():
    predicted = predict(Ring([GROWING], Link()), num_rows=4)
    assert predicted.tokens_per_s == pytest.approx(4 / 0.010)
    assert predicted.computing == pytest.approx([1.0])


def test_one_group_visits_the_stages_one_after_the_other():
    predicted = predict(Ring([GROWING] * 4, Link(delay_s=0.001), overhead_s=0.0005), num_rows=4, num_groups=1)
    assert predicted.tokens_per_s == pytest.approx(4 / (4 * (0.010 + 0.001 + 0.0005)))
    assert predicted.computing == pytest.approx([0.010 / 0.046] * 4)


def test_as_many_groups_as_stages_keep_all_of_them_computing():
    predicted = predict(Ring([GROWING] * 4, Link()), num_rows=16, num_groups=4)
    assert predicted.tokens_per_s == pytest.approx(4 / 0.010)
    assert predicted.computing == pytest.approx([1.0] * 4)


def test_delays_leave_as_many_groups_as_stages_waiting_and_more_groups_hide_them():
    ring = Ring([CONSTANT] * 4, Link(delay_s=0.005))
    assert predict(ring, num_rows=24, num_groups=4).computing == pytest.approx([4 * 0.010 / 0.060] * 4)
    assert predict(ring, num_rows=24, num_groups=6).computing == pytest.approx([1.0] * 4)


def test_the_slowest_stage_sets_the_pace():
    predicted = predict(Ring([CONSTANT, Cost(0.020, 0.0), CONSTANT], Link()), num_rows=6, num_groups=3)
    assert predicted.tokens_per_s == pytest.approx(2 / 0.020)
    assert predicted.computing == pytest.approx([0.5, 1.0, 0.5])


def test_a_link_slower_than_the_stages_sets_the_pace():
    ring = Ring([CONSTANT] * 2, Link(bits_per_s=8e6), row_bytes=10_000)
    assert predict(ring, num_rows=8, num_groups=2).tokens_per_s == pytest.approx(1 / 0.010, rel=0.01)


def test_of_unequal_groups_the_larger_ones_way_round_the_ring_sets_the_pace():
    predicted = predict(Ring([GROWING] * 2, Link()), num_rows=7, num_groups=2)
    assert predicted.tokens_per_s == pytest.approx(7 / (2 * 0.010))
    assert predicted.computing == pytest.approx([(0.010 + 0.008) / 0.020] * 2)


def test_the_number_of_groups_is_the_engines_choice():
    assert predict(Ring([CONSTANT] * 8, Link()), num_rows=32).num_groups == 1
    assert predict(Ring([GROWING] * 8, Link()), num_rows=32).num_groups == 8
