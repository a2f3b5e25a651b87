"""Medians, percentiles and ratios, as the benchmarks' tables show them. Pure: numbers in, numbers or text out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NONE = "–"  # a cell without a figure


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of `values` do not exceed (nearest rank); NaN where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def median(values: Sequence[float]) -> float:
    """NaN where there are none, and those that are NaN left out."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios taken round by round, so that a machine whose speed drifts is treated fairly."""
    return median([a / b if b else math.nan for a, b in zip(over, under, strict=True)])


def cell(value: float, digits: int = 2) -> str:
    return NONE if math.isnan(value) else f"{value:.{digits}f}"


def milliseconds(seconds: float) -> str:
    return cell(seconds * 1000, 0)


def value_range(values: Sequence[float], digits: int = 1) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{min(known):.{digits}f} to {max(known):.{digits}f}" if known else NONE
