"""Where a rank's time goes, with a clock that the test moves."""

from __future__ import annotations

import queue
import timeit

import pytest

from distributed.pipeline import Pipeline
from distributed.ring import Ring
from server.counters import StageClock
from server.frame import Frame, Row
from server.protocol import StageCounters
from server.status import RankStatus, decode_reports


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline(Ring(0, 1, (), None), None, None, queue.SimpleQueue(), bytes)


def test_every_second_is_busy_idle_or_a_bubble(pipeline: Pipeline, time: Time):
    clock = StageClock(pipeline, time)
    time.now += 5
    clock.waited(is_bubble=False)
    time.now += 2
    clock.computed(Frame(1, rows=[Row(7, 10, num_tokens=10), Row(8, 3, num_tokens=3)]))
    time.now += 0.5
    clock.waited(is_bubble=True)
    time.now += 1
    clock.computed(Frame(2, rows=[Row(7, 11)], group_id=0))
    pipeline.receiving_s, pipeline.sending_s = 0.25, 0.125
    assert clock.counters() == StageCounters(3.0, 5.0, 0.5, 0.25, 0.125, num_frames=2, num_tokens=14)


def test_counters_and_the_prefix_cache_travel_in_a_rank_s_report(pipeline: Pipeline, time: Time):
    status = RankStatus(1)
    clock = StageClock(pipeline, time)
    status.counters, status.prefix_cache_bytes = clock.counters, lambda: 4096
    time.now += 3
    clock.computed(Frame(1))
    (info,) = decode_reports([status.report()])
    assert info.counters == StageCounters(busy_s=3.0, num_frames=1)
    assert info.prefix_cache_bytes == 4096


def test_counting_a_frame_costs_microseconds(pipeline: Pipeline):
    clock = StageClock(pipeline)
    frame = Frame(1, rows=[Row(number, 5) for number in range(8)], group_id=0)

    def count() -> None:
        clock.waited(is_bubble=True)
        clock.computed(frame)

    assert min(timeit.repeat(count, number=100, repeat=5)) / 100 < 100e-6
