"""How many micro-batch groups the running sequences should form: a pure function of measured step times.

While one group's step is on stage 1, another's is on stage 0. Where a step costs more the more rows it has, this
multiplies the throughput; where it costs the same at any number of rows, or the ranks share one machine's cores, one
group in lockstep is as fast or faster. The measured times say which, those of contending ranks included.
"""

from __future__ import annotations

import math

from server.step_times import StepTimes

# Regrouping copies caches, and times are noisy: more groups must promise a clear gain, and a tie goes to fewer.
_MORE_IF_FASTER_BY = 1.05
_FEWER_IF_SLOWER_BY_LESS_THAN = 1.01
_NOTICEABLE = 0.05  # of a step: what links take beyond that is worth a group that waits in their place


def choose_num_groups(num_rows: int, num_stages: int, times: StepTimes, current: int = 1) -> int:
    """The number of groups that is expected to give most tokens a second, 1 while nothing is known.

    Args:
        num_rows: running sequences.
        num_stages: of the ring.
        times: what steps took.
        current: groups now.
    """
    if num_stages == 1 or num_rows <= 1 or not times.is_known:
        return 1
    most = min(num_rows, most_groups(num_rows, num_stages, times))
    current = min(max(current, 1), most)
    if not times.is_sure(current):
        return current  # or one step that something disturbed would end what was never tried again
    periods = {groups: period_seconds(num_rows, groups, times) for groups in range(1, most + 1)}
    best = min(periods, key=lambda groups: periods[groups])
    fewest = min(groups for groups in periods if periods[groups] <= periods[best] * _FEWER_IF_SLOWER_BY_LESS_THAN)
    if fewest > current and periods[current] < periods[fewest] * _MORE_IF_FASTER_BY:
        return current
    return fewest


def most_groups(num_rows: int, num_stages: int, times: StepTimes) -> int:
    """One group a stage, and as many more as fit into the time that is spent between stages."""
    step = max(times.stage_seconds(num_stages, -(-num_rows // num_stages)))
    in_links = times.overhead_seconds / step
    return num_stages + (math.ceil(in_links) if in_links > _NOTICEABLE else 0)


def period_seconds(num_rows: int, num_groups: int, times: StepTimes) -> float:
    """Expected seconds in which every one of `num_groups` equal groups makes a step; `times` must be known.

    A group has to go round the whole ring, and every stage has to serve all groups: the longer of both.
    """
    size, num_larger = divmod(num_rows, num_groups)
    smaller = times.stage_seconds(num_groups, size) if size else []
    larger = times.stage_seconds(num_groups, size + 1) if num_larger or not size else smaller
    round_trip = sum(larger) + times.overhead_seconds
    in_turn = zip(larger, smaller or larger, strict=True)
    return max(round_trip, *(num_larger * a + (num_groups - num_larger) * b for a, b in in_turn))
