"""From samples to figures. Pure.

Percentiles are nearest rank: each one is a sample that really occurred, so the p99 of fewer than
100 samples is their largest, and that of a few more is an accident.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Figures = dict[str, float]
P99_FROM = 200  # samples: two of them are above it


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest sample that ``percent`` of all samples do not exceed."""
    if not values:
        raise ValueError("no samples")
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def figures(values: Sequence[float]) -> Figures:
    """Return what is told of one series."""
    return {
        "samples": len(values),
        "median": statistics.median(values),
        "p99": percentile(values, 99),
        "min": min(values),
        "max": max(values),
    }


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return how many times the median of ``theirs`` the median of ``ours`` is."""
    return statistics.median(ours) / statistics.median(theirs)


def median_of_ratios(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over the pairs: neighbours in time share what disturbed the machine."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
