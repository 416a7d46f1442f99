"""Medians and their intervals, against what a pencil gives."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from quantbench.stats import median_ci, overlap, ratio_ci

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("samples, interval", [
    # how often a resample's median is the smallest: where that is over 2.5%, the interval is the range
    ([3.0, 1.0], (1.0, 3.0)),  # 1/4
    ([2.0, 9.0, 4.0], (2.0, 9.0)),  # 7/27
    ([5.0, 1.0, 4.0, 2.0, 3.0], (1.0, 5.0)),  # 5.8%
    ([7.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0], (2.0, 6.0)),  # 1.0%; one of the two smallest: 11%
    ([1.5, 1.5, 1.5], (1.5, 1.5)),
])
def test_the_interval_of_a_median(samples, interval):
    assert median_ci(samples) == interval


@pytest.mark.parametrize("samples", [[], [2.0]])
def test_one_sample_has_no_interval(samples):
    assert median_ci(samples) is None
    assert ratio_ci(samples, [1.0, 2.0]) is None and ratio_ci([1.0, 2.0], samples) is None


def test_the_interval_scales_with_its_samples():
    samples = [random.Random(7).lognormvariate(0, 1) for _ in range(10)]
    low, high = median_ci(samples)
    assert median_ci([4 * s for s in samples]) == (4 * low, 4 * high)


def test_the_interval_is_the_same_in_every_process():
    draw = random.Random(7)
    top, bottom = ([draw.gauss(10, 1) for _ in range(20)] for _ in range(2))  # so many ratios that any other seed shows
    code = f"from quantbench.stats import ratio_ci; print(ratio_ci({top}, {bottom}))"
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(ratio_ci(top, bottom))


@pytest.mark.parametrize("top, bottom, interval", [
    ([4.0, 4.0], [2.0, 2.0], (2.0, 2.0)),
    ([10.0, 20.0, 30.0], [2.0, 2.0, 2.0], (5.0, 15.0)),
    ([6.0, 6.0], [1.0, 2.0, 3.0], (2.0, 6.0)),
])
def test_the_interval_of_a_ratio(top, bottom, interval):
    assert ratio_ci(top, bottom) == interval


def test_both_sides_of_a_ratio_are_resampled_apart():
    assert ratio_ci([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (1 / 3, 3.0)  # together it would be (1, 1)


@pytest.mark.parametrize("a, b, shared", [
    ((1, 2), (2, 3), True), ((1, 2), (2.1, 3), False), ((1, 9), (4, 5), True), ((1, 2), None, True),
    (None, None, True)])
def test_intervals_overlap_where_they_share_a_point(a, b, shared):
    assert overlap(a, b) is shared and overlap(b, a) is shared
