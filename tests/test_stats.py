"""Paired comparison against closed forms, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_lib import stats


def test_interval_and_effect_are_those_of_the_paired_t_test():
    draw = np.random.default_rng(0)
    treatment, control = draw.normal(1, 1, 10), draw.normal(0, 1, 10)
    found = stats.paired_comparison(treatment, control)
    expected = scipy_stats.ttest_rel(treatment, control).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.difference == pytest.approx((treatment - control).mean())
    assert found.effect == pytest.approx((treatment - control).mean() / (treatment - control).std(ddof=1))
    assert found.bca_low < found.difference < found.bca_high
    assert found.seeds == 10


@pytest.mark.parametrize("seed", range(5))
def test_sign_flip_p_counts_every_pattern(seed):
    differences = np.random.default_rng(seed).normal(0.5, 1, 8)
    patterns = itertools.product((-1, 1), repeat=8)
    as_extreme = [abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-12 for signs in patterns]
    assert stats.sign_flip_p(differences) == pytest.approx(np.mean(as_extreme))


def test_sign_flip_p_of_unanimous_seeds_is_its_floor():
    assert stats.sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 2**5
    assert stats.sign_flip_p([0.0, 0.0, 0.0]) == 1.0


def test_false_positive_rate_is_nominal():
    draw = np.random.default_rng(1)
    rejections = [stats.sign_flip_p(draw.normal(0, 1, 10)) <= 0.05 for _ in range(1000)]
    assert 0.03 <= np.mean(rejections) <= 0.07


def test_t_interval_covers():
    draw = np.random.default_rng(2)
    intervals = [stats.t_interval(draw.normal(3, 2, 10)) for _ in range(1000)]
    assert 0.93 <= np.mean([low <= 3 <= high for low, high in intervals]) <= 0.97


def test_equal_arms_are_no_difference():
    found = stats.paired_comparison([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert np.isnan(found.effect)


@pytest.mark.parametrize(
    ("treatment", "control", "message"),
    [
        ([1.0, 2.0], [1.0], "one length"),
        ([1.0], [2.0], "at least two"),
        ([1.0, float("nan")], [1.0, 2.0], "finite"),
    ],
)
def test_bad_input(treatment, control, message):
    with pytest.raises(ValueError, match=message):
        stats.paired_comparison(treatment, control)
