"""Medians and ratios with the intervals that their samples can bear: order statistics, no assumption on the noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

from scipy.stats import binom

Interval = tuple[float, float]
LEAST = 6  # samples, or rounds, of the smallest interval that covers a median 95 times in 100
# What two processes of one cell differ by for good, where their memory came to lie: rounds cannot average it away. A/A
# on an H100, 24 pairs of a captured step: medians 0.992 to 1.008 with intervals of 0.3% (docs/lab-notes.md).
PROCESSES = 0.02
_place = cache(lambda samples: int(binom.ppf(0.025, samples, 0.5)) if samples else 0)  # asked of every row


def median_interval(samples: Sequence[float]) -> Interval | None:
    """The narrowest pair of order statistics that holds the median with at least 95% (the sign test's interval:
    David & Nagaraja, Order Statistics, 2003, 7.1): of 6 samples their range, at 96.9%. None below 6 samples."""
    ordered, place = sorted(samples), _place(len(samples))
    return (ordered[place - 1], ordered[-place]) if place else None


@dataclass(frozen=True)
class Ratio:
    """A rate over another's: the median of the rounds' ratios and its interval (None below 6 shared rounds)."""

    value: float | None
    interval: Interval | None
    rounds: int

    @property
    def verdict(self) -> str:
        """ "faster", "slower", "tie" (the interval holds 1), or "not compared": the one definition of each."""
        if self.interval is None:
            return "not compared"
        low, high = self.interval
        return "tie" if low <= 1 <= high else "faster" if low > 1 else "slower"


def ratio_of_rounds(ours: Mapping[str, float], base: Mapping[str, float]) -> Ratio:
    """How `ours` compares with `base`, both round -> rate: only in rounds that both were in did they see the same
    machine. The interval is that of the rounds, wider by PROCESSES at either end."""
    shared = [ours[name] / base[name] for name in ours if name in base]
    found = median_interval(shared)
    interval = found and (found[0] / (1 + PROCESSES), found[1] * (1 + PROCESSES))
    return Ratio(median(shared) if shared else None, interval, len(shared))
