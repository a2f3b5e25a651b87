"""Where the time of one rank goes: computing, idle, or waiting for the other stages.

A stopwatch of laps for the thread that computes: whatever it did, it says so afterwards, and the time since it last
said something is counted. So busy, idle and bubble add up to the time since the start; a wait is counted when it ends.
Called by the worker's and the engine's loop, read by the heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from distributed.pipeline import Pipeline
from server.frame import Frame
from server.protocol import StageCounters


class StageClock:
    """The counters of one rank. One thread calls `waited` and `computed`; any thread may read `counters`.

    Args:
        pipeline: counts the seconds of its own two threads.
        clock: seconds, for tests.
    """

    def __init__(self, pipeline: Pipeline, clock: Callable[[], float] = time.perf_counter) -> None:
        self._pipeline = pipeline
        self._clock = clock
        self._lap_began = clock()
        self._busy_s = self._idle_s = self._bubble_s = 0.0
        self._num_frames = self._num_tokens = 0

    def waited(self, *, is_bubble: bool) -> None:
        """The lap that ends now was a wait: a bubble where frames were in flight elsewhere, else there was no work."""
        seconds = self._end_lap()
        if is_bubble:
            self._bubble_s += seconds
        else:
            self._idle_s += seconds

    def computed(self, frame: Frame) -> None:
        """The lap that ends now went into `frame`: taking it in, running the stage, handing it on."""
        self._busy_s += self._end_lap()
        self._num_frames += 1
        self._num_tokens += sum(row.num_tokens for row in frame.rows)

    def counters(self) -> StageCounters:
        """The totals so far."""
        return StageCounters(
            busy_s=self._busy_s,
            idle_s=self._idle_s,
            bubble_s=self._bubble_s,
            receiving_s=self._pipeline.receiving_s,
            sending_s=self._pipeline.sending_s,
            num_frames=self._num_frames,
            num_tokens=self._num_tokens,
        )

    def _end_lap(self) -> float:
        now = self._clock()
        seconds, self._lap_began = now - self._lap_began, now
        return seconds
