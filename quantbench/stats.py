"""Medians, their bootstrap intervals, and the ratio of two."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from statistics import median

Interval = tuple[float, float]
RESAMPLES = 2000
SEED = 0


def median_ci(samples: Sequence[float]) -> Interval | None:
    """95% percentile-bootstrap interval of the median (Efron & Tibshirani 1993, ch. 13); seeded.

    None below two samples. With the 3 to 10 samples of a cell it is nearly their range: wide, and honest.
    """
    if len(samples) < 2:
        return None
    return _percentiles(_medians(tuple(samples), SEED))


def ratio_ci(numerator: Sequence[float], denominator: Sequence[float]) -> Interval | None:
    """95% bootstrap interval of median(numerator) / median(denominator), resampled independently."""
    if len(numerator) < 2 or len(denominator) < 2:
        return None
    tops, bottoms = _medians(tuple(numerator), SEED), _medians(tuple(denominator), SEED + 1)
    return _percentiles([top / bottom for top, bottom in zip(tops, bottoms)])


def overlap(a: Interval | None, b: Interval | None) -> bool:
    """Whether two intervals share a point; an unknown interval overlaps everything."""
    return a is None or b is None or (a[0] <= b[1] and b[0] <= a[1])


@lru_cache(maxsize=4096)
def _medians(samples: tuple[float, ...], seed: int) -> list[float]:
    draw = random.Random(seed)
    return [median(draw.choices(samples, k=len(samples))) for _ in range(RESAMPLES)]


def _percentiles(values: list[float]) -> Interval:
    ordered = sorted(values)
    return ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered)) - 1]
