"""A model of the ring: stages, links and groups that take turns, frame by frame, to see past what one machine can run.

Pure arithmetic, no clock and no processes. A frame waits for its stage and for its link, in order; its group's next
frame starts when the last stage's ids are back at the first. The number of groups is the engine's own choice
(`server.grouping`), with the costs known instead of measured. `bench.scaling` checks it against real rings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.grouping import choose_num_groups
from server.step_times import StepTimes

_LAPS = 24  # of every group; the first half lets the pipeline settle and is not counted


class Cost(NamedTuple):
    """Seconds of a step on one stage."""

    fixed_s: float
    per_row_s: float

    def seconds(self, num_rows: int) -> float:
        return self.fixed_s + self.per_row_s * num_rows


@dataclass(frozen=True)
class Link:
    """From a stage to the next, and from the last to the first. A transfer occupies it, the delay does not."""

    delay_s: float = 0.0
    bits_per_s: float = float("inf")

    def transfer_s(self, num_bytes: int) -> float:
        return num_bytes * 8 / self.bits_per_s


@dataclass(frozen=True)
class Ring:
    """A ring of stages.

    `row_bytes`: of a row's hidden states. `overhead_s`: what a frame takes each rank besides its step (headers,
    scheduling, waking up).
    """

    stages: Sequence[Cost]
    link: Link
    row_bytes: int = 0
    overhead_s: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """`computing`: the share of the time that each stage computes."""

    num_groups: int
    tokens_per_s: float
    computing: list[float]


def predict(ring: Ring, num_rows: int, num_groups: int | None = None) -> Prediction:
    """What `ring` does for `num_rows` streams, in so many groups, or in as many as the engine would choose."""
    sizes = _group_sizes(num_rows, num_groups or _engines_choice(ring, num_rows))
    returned = [0.0] * len(sizes)  # when each group's ids were back
    half = returned
    stage_free = [0.0] * len(ring.stages)
    link_free = [0.0] * len(ring.stages)
    for lap in range(_LAPS):
        if lap == _LAPS // 2:
            half = list(returned)
        for group, size in enumerate(sizes):
            returned[group] = _send_round(ring, size, returned[group], stage_free, link_free)
    seconds = returned[0] - half[0]
    num_laps = _LAPS - _LAPS // 2
    computing = [num_laps * sum(cost.seconds(size) for size in sizes) / seconds for cost in ring.stages]
    return Prediction(len(sizes), num_laps * num_rows / seconds, computing)


def _send_round(ring: Ring, size: int, start: float, stage_free: list[float], link_free: list[float]) -> float:
    """Send one frame of `size` rows round the ring from `start` on; returns when its ids are back on rank 0."""
    at = start
    last = len(ring.stages) - 1
    for stage, cost in enumerate(ring.stages):
        at = max(at, stage_free[stage]) + ring.overhead_s + cost.seconds(size)
        stage_free[stage] = at
        if last == 0:
            return at
        num_bytes = 0 if stage == last else size * ring.row_bytes  # what goes back are a few bytes
        at = max(at, link_free[stage]) + ring.link.transfer_s(num_bytes)
        link_free[stage] = at
        at += ring.link.delay_s
    return at


def _group_sizes(num_rows: int, num_groups: int) -> list[int]:
    size, larger = divmod(num_rows, num_groups)
    return [size + 1] * larger + [size] * (num_groups - larger)


def _engines_choice(ring: Ring, num_rows: int) -> int:
    """The number of groups when the engine has measured this ring: two sizes of a step tell it the straight line."""
    times = StepTimes()
    for rows in (1, num_rows, num_rows + 1):
        for _ in range(3):  # enough to be sure of it
            times.note(1, rows, [cost.seconds(rows) for cost in ring.stages])
    num_stages = len(ring.stages)
    # What a step of a few rows takes besides computing when it has the ring to itself. The median forgets the start.
    transfers = (num_stages - 1) * ring.link.transfer_s(-(-num_rows // num_stages) * ring.row_bytes)
    for _ in range(9):
        times.note_overhead(num_stages * (ring.overhead_s + ring.link.delay_s) + transfers)
    return choose_num_groups(num_rows, num_stages, times)
