"""Intervals cover as often as they say, and two of the same are not called different: by simulation."""

import random

import numpy as np
import pytest

from quantbench.intervals import LEAST, Ratio, median_interval, ratio_of_rounds


def test_the_interval_is_a_pair_of_order_statistics():
    assert all(median_interval([1.0] * n) is None for n in range(LEAST))
    assert median_interval([6.0, 1.0, 5.0, 2.0, 4.0, 3.0]) == (1.0, 6.0)
    assert median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5]) == (2, 8)  # P(at most 1 of 9 below the median) = 2.0%


@pytest.mark.parametrize("draw", ["normal", "exponential", "standard_cauchy"])
def test_every_interval_covers_the_median(draw):
    rng = np.random.default_rng(0)
    middle = np.log(2) if draw == "exponential" else 0
    for n in range(LEAST, 41):
        low, high = median_interval(range(n))  # which places
        ordered = np.sort(getattr(rng, draw)(size=(10_000, n)), axis=1)
        assert np.mean((ordered[:, low] <= middle) & (middle <= ordered[:, high])) >= 0.94, n


def noise(kind: str, length: int, draw: random.Random) -> list[float]:
    """Logarithms of what the machine does to `length` samples in a row."""
    levels, level, burst = [], draw.gauss(0, 0.1), 0
    for _ in range(length):
        level = 0.95 * level + draw.gauss(0, 0.03) if kind == "drift" else 0.0
        burst = draw.randint(1, 4) if kind == "bursts" and not burst and draw.random() < 0.1 else max(burst - 1, 0)
        levels.append(level + draw.gauss(0, 0.02) + 0.5 * bool(burst))
    return levels


@pytest.mark.parametrize("kind", ["independent", "drift", "bursts"])
@pytest.mark.parametrize("rounds", [6, 9, 12])
def test_the_same_setting_twice_is_named_in_at_most_6_of_100(kind, rounds):
    draw, named = random.Random(f"{kind}{rounds}"), 0
    for _ in range(2000):
        levels, rates = noise(kind, 4 * rounds, draw), [{}, {}, {}, {}]
        for place in range(rounds):  # four cells in random order, each one sample
            for at, cell in enumerate(draw.sample(range(4), 4)):
                rates[cell][str(place)] = 100 * np.exp(levels[4 * place + at])
        named += ratio_of_rounds(rates[0], rates[1]).verdict in ("faster", "slower")
    assert named / 2000 <= 0.06


def test_a_real_difference_is_found_and_only_shared_rounds_count():
    slow = {str(n): 95 + n % 3 for n in range(8)}
    assert ratio_of_rounds(slow, {name: 100.0 for name in slow}).verdict == "slower"
    assert ratio_of_rounds(slow, {"0": 100.0, "x": 1.0}) == Ratio(0.95, None, 1)
    assert ratio_of_rounds(slow, {"0": 100.0}).verdict == "not compared" and ratio_of_rounds({}, slow).value is None
    assert [Ratio(1, ends, 6).verdict for ends in ((0.9, 1), (1.1, 1.2))] == ["tie", "faster"]
