"""How long steps take on each stage: medians of recent ones, and what they say of steps not seen yet.

Rank 0 notes every decode step and every chunk of a prompt with the seconds that each stage measured for it. Times are
kept apart by how many groups were in flight, because ranks on one machine slow each other down. Pure: no clock, no
mlx; `grouping` and `chunking` decide by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

_RECENT = 9  # steps of one kind whose median counts: long enough to shrug off a hiccup, short enough to follow
_SURE = 3  # steps of one kind after which one that was disturbed decides nothing
_FORGET_AFTER = 500  # steps without news of one kind, after which it is tried again: contexts and machines change
_RECENT_CHUNKS = 32
_WIDE_ENOUGH = 1.5  # how much longer one chunk must be than another for a slope between them to be more than noise


class StepTimes:
    """Seconds of decode steps for each stage, by groups in flight and rows."""

    def __init__(self) -> None:
        self._recent: dict[tuple[int, int], deque[Sequence[float]]] = {}
        self._noted_at: dict[tuple[int, int], int] = {}
        self._medians: dict[tuple[int, int], list[float]] = {}
        self._num_noted = 0
        self._overheads: deque[float] = deque([0.0], maxlen=_RECENT)

    def note(self, num_groups: int, num_rows: int, stage_seconds: Sequence[float]) -> None:
        """A decode step of `num_rows` that ran while `num_groups` groups took turns."""
        key = num_groups, num_rows
        self._num_noted += 1
        self._noted_at[key] = self._num_noted
        recent = self._recent.setdefault(key, deque(maxlen=_RECENT))
        recent.append(stage_seconds)
        typical = min if len(recent) < _SURE else median
        self._medians[key] = [typical(seconds) for seconds in zip(*recent, strict=True)]
        if self._num_noted % _FORGET_AFTER == 0:
            self._forget_old()

    def note_overhead(self, seconds: float) -> None:
        """What a step that found free stages took besides computing: links, headers, waking up."""
        self._overheads.append(max(0.0, seconds))

    @property
    def overhead_seconds(self) -> float:
        return median(self._overheads)

    @property
    def is_known(self) -> bool:
        """True once a decode step was measured."""
        return bool(self._medians)

    def is_sure(self, num_groups: int) -> bool:
        """True once enough steps in so many groups were measured, of whatever size: groups need not be even."""
        return sum(len(recent) for (groups, _), recent in self._recent.items() if groups == num_groups) >= _SURE

    def stage_seconds(self, num_groups: int, num_rows: int) -> list[float]:
        """What each stage is expected to take for a step of `num_rows`; something must be known.

        Where it was never measured, the nearest number of groups stands in, and between and beyond the numbers of rows
        that were measured a straight line. Where only one number of rows was measured, times grow as they do with other
        numbers of groups; where nobody knows how, smaller steps are hoped to take less in proportion and larger ones no
        more, so that both are tried, and measured.
        """
        if (exact := self._medians.get((num_groups, num_rows))) is not None:
            return exact
        measured = {groups for groups, _ in self._medians}
        nearest = min(measured, key=lambda groups: (abs(groups - num_groups), groups))
        known = self._known(nearest)
        if len(known) > 1:
            return _on_line(known, num_rows)
        rows, seconds = known[0]
        others = [other for groups in sorted(measured) if len(other := self._known(groups)) > 1]
        if not others:
            return [second * min(1.0, num_rows / rows) for second in seconds]
        here, there = _on_line(others[0], rows), _on_line(others[0], num_rows)
        return [second * b / a for second, a, b in zip(seconds, here, there, strict=True)]

    def _known(self, num_groups: int) -> list[tuple[int, list[float]]]:
        """Rows and seconds of the steps that ran in so many groups, by rows."""
        return sorted((rows, seconds) for (groups, rows), seconds in self._medians.items() if groups == num_groups)

    def _forget_old(self) -> None:
        """Of one group the quickest stays: what groups lose to each other on one machine is in all other times."""
        for key, noted_at in list(self._noted_at.items()):
            if self._num_noted - noted_at <= _FORGET_AFTER:
                continue
            recent = self._recent.pop(key)
            del self._noted_at[key], self._medians[key]
            if key[0] == 1:
                self._medians[key] = [min(seconds) for seconds in zip(*recent, strict=True)]


def _on_line(known: list[tuple[int, list[float]]], num_rows: int) -> list[float]:
    """Between two numbers of rows that were measured, or beyond them along the line through all.

    More rows never take less, and never more than in proportion; so noise cannot lead far astray.
    """
    below = [point for point in known if point[0] <= num_rows]
    above = [point for point in known if point[0] >= num_rows]
    if below and above:
        (rows_a, seconds_a), (rows_b, seconds_b) = below[-1], above[0]
        share = (num_rows - rows_a) / (rows_b - rows_a) if rows_b > rows_a else 0.0
        return [a + share * (b - a) for a, b in zip(seconds_a, seconds_b, strict=True)]
    rows, seconds = below[-1] if below else above[0]
    in_proportion = num_rows / rows
    low, high = sorted((1.0, in_proportion))
    mean_rows = fmean(rows for rows, _ in known)
    spread = sum((rows - mean_rows) ** 2 for rows, _ in known)
    result = []
    for stage, second in enumerate(seconds):
        slope = sum((rows - mean_rows) * times[stage] for rows, times in known) / spread
        result.append(min(max(second + slope * (num_rows - rows), low * second), high * second))
    return result


class Line(NamedTuple):
    """Seconds of a pass: `fixed` and so many `per_token`."""

    fixed: float
    per_token: float


class ChunkTimes:
    """Seconds that the slowest stage took for recent chunks of prompts, as a straight line over their tokens."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_CHUNKS)
        self.line: Line | None = None  # None until it is known

    def note(self, num_tokens: int, stage_seconds: Sequence[float]) -> None:
        """A prefill frame of `num_tokens`, padding counted."""
        self._recent.append((num_tokens, max(stage_seconds)))
        self.line = _fitted(self._recent)


def _fitted(points: Sequence[tuple[int, float]]) -> Line | None:
    """Least squares; through the origin where all chunks are about as long; None where time does not grow with them."""
    mean_tokens, mean_seconds = (fmean(column) for column in zip(*points, strict=True))
    if len(points) < 2:
        return None
    if max(points)[0] < _WIDE_ENOUGH * min(points)[0]:
        return Line(0.0, mean_seconds / mean_tokens)
    spread = sum((tokens - mean_tokens) ** 2 for tokens, _ in points)
    slope = sum((tokens - mean_tokens) * (seconds - mean_seconds) for tokens, seconds in points) / spread
    slope = min(slope, mean_seconds / mean_tokens)  # noise must not make the fixed part negative
    return Line(mean_seconds - slope * mean_tokens, slope) if slope > 0 else None
