"""Paired comparison against closed forms, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_study import stats


def test_difference_and_interval_are_those_of_the_paired_t_test():
    draw = np.random.default_rng(0)
    treatment, control = draw.normal(1, 1, 10), draw.normal(0, 1, 10)
    found = stats.paired_comparison(treatment, control)
    expected = scipy_stats.ttest_rel(treatment, control).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.difference == pytest.approx((treatment - control).mean())
    assert found.seeds == 10


@pytest.mark.parametrize("seed", range(5))
def test_sign_flip_p_counts_every_pattern(seed):
    differences = np.random.default_rng(seed).normal(0.5, 1, 8)
    patterns = itertools.product((-1, 1), repeat=8)
    as_extreme = [abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-12 for signs in patterns]
    assert stats.sign_flip_p(differences) == pytest.approx(np.mean(as_extreme))


@pytest.mark.parametrize("seeds", [2, 9, 15])
def test_sign_flip_p_is_scipys(seeds):
    """Values of few digits, so that patterns tie; scipy lists them all."""
    differences = np.random.default_rng(seeds).normal(0.3, 1, seeds).round(1)
    expected = scipy_stats.permutation_test(
        (differences * 10,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert stats.sign_flip_p(differences) == pytest.approx(expected.pvalue)


def test_sign_flip_p_of_forty_seeds():
    """Against the normal limit, and its floor."""
    differences = np.random.default_rng(0).normal(0, 1, 40)
    z = abs(differences.sum()) / np.sqrt(np.square(differences).sum())
    assert stats.sign_flip_p(differences) == pytest.approx(2 * scipy_stats.norm.sf(z), abs=0.01)
    assert stats.sign_flip_p(np.linspace(1, 2, 40)) == 2 / 2**40


@pytest.mark.parametrize(("seeds", "shift"), [(41, 0.3), (60, 0.1), (100, 0.25)])
def test_sign_flip_p_of_more_seeds_is_drawn(seeds, shift):
    """Of whole numbers the distribution of all 2^S sums is a convolution."""
    differences = np.random.default_rng(seeds).normal(10 * shift, 10, seeds).round().astype(int)
    most = np.abs(differences).sum()
    share = np.zeros(2 * most + 1)
    share[most] = 1  # of a sum of 0
    for value in differences:
        share = (np.roll(share, value) + np.roll(share, -value)) / 2
    sums = np.arange(-most, most + 1)
    exact = share[np.abs(sums) >= abs(differences.sum())].sum()
    assert 1e-3 < exact < 0.9
    found = stats.sign_flip_p(differences)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 99_999) + 1e-5)
    assert stats.paired_comparison(differences, np.zeros(seeds)).p == found


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


# ------------------------------------------------------------------------------------ simulation


def test_ninety_percent_interval_is_inside_and_covers():
    draw = np.random.default_rng(5)
    values = draw.normal(0, 1, (1000, 12))
    wide, narrow = (np.array([stats.t_interval(v, c) for v in values]) for c in (0.95, 0.90))
    assert ((wide[:, 0] < narrow[:, 0]) & (narrow[:, 1] < wide[:, 1])).all()
    assert 0.87 <= ((narrow[:, 0] <= 0) & (narrow[:, 1] >= 0)).mean() <= 0.93


def test_smallest_detectable_effect_is_found_as_often_as_promised():
    for seeds, sd in ((8, 1.0), (10, 0.3), (20, 2.0)):
        effect = stats.smallest_detectable_effect(sd, seeds)
        draws_RS = np.random.default_rng(seeds).normal(effect, sd, (20_000, seeds))
        p_R = scipy_stats.ttest_1samp(draws_RS, 0, axis=1).pvalue
        assert np.mean(p_R <= 0.05) == pytest.approx(0.8, abs=0.01)


def test_smallest_detectable_effect_at_its_ends():
    large = stats.smallest_detectable_effect(1.0, 10_000)  # the normal limit
    assert large == pytest.approx((scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(0.8)) / 100, rel=1e-3)
    assert np.isnan(stats.smallest_detectable_effect(1.0, 1))
    assert stats.smallest_detectable_effect(0.0, 5) == 0
    assert stats.smallest_detectable_effect(1.0, 2, power=0.999) > stats.smallest_detectable_effect(1.0, 2)
    with pytest.raises(ValueError, match=r"power 0\.01"):
        stats.smallest_detectable_effect(1.0, 10, power=0.01)


def power(sd, effect, seeds):
    """Of a two-sided paired t test, both tails."""
    critical, shift = scipy_stats.t.ppf(0.975, seeds - 1), effect / sd * np.sqrt(seeds)
    found = scipy_stats.nct(seeds - 1, shift)
    return found.sf(critical) + found.cdf(-critical)


@pytest.mark.parametrize(("sd", "effect"), [(1.0, 0.9), (0.005, 0.0028), (1.0, 0.15)])
def test_seeds_for_power_are_the_fewest(sd, effect):
    seeds = stats.seeds_for_power(sd, effect)
    assert power(sd, effect, seeds - 1) < 0.8 <= power(sd, effect, seeds)


def test_seeds_for_power_at_its_ends():
    assert stats.seeds_for_power(0.0, 0.1) == 2
    assert stats.seeds_for_power(1.0, 1e-9) == 10**6
    with pytest.raises(ValueError, match="effect must be positive, got 0"):
        stats.seeds_for_power(1.0, 0.0)


# ------------------------------------------------------------------------------- seeds and images


def test_crossed_interval_is_the_anova_by_hand():
    """Two seeds, three images: sums of squares 8/3 (seeds), 4 (images), 4/3 (rest)."""
    table_SN = np.array([[0.0, 1.0, 1.0], [0.0, 2.0, 4.0]])
    mean, rows, columns = 8 / 6, [2 / 3, 2.0], [0.0, 1.5, 2.5]
    seeds = 3 * sum((row - mean) ** 2 for row in rows) / 1
    images = 2 * sum((column - mean) ** 2 for column in columns) / 2
    rest = sum((table_SN[s, n] - rows[s] - columns[n] + mean) ** 2 for s in range(2) for n in range(3)) / 2
    total = seeds + images - rest
    freedom = total**2 / (seeds**2 / 1 + images**2 / 2 + rest**2 / 2)
    half = scipy_stats.t.ppf(0.975, freedom) * np.sqrt(total / 6)
    assert stats.crossed_interval(table_SN) == pytest.approx((mean - half, mean + half))


@pytest.mark.parametrize(("sd_seed", "sd_image"), [(0.3, 0.3), (0.0, 0.4), (0.3, 0.0), (0.0, 0.0)])
def test_crossed_interval_covers_the_mean_of_other_seeds_and_other_images(sd_seed, sd_image):
    """Where one kind of variation is missing the interval is wider than need be, never narrower."""
    draw = np.random.default_rng(10)
    seeds, images, repeats = 10, 40, 500
    covered = 0
    for _ in range(repeats):
        table_SN = draw.normal(0.2, 1, (seeds, images))
        table_SN += draw.normal(0, sd_seed, (seeds, 1)) + draw.normal(0, sd_image, (1, images))
        low, high = stats.crossed_interval(table_SN)
        covered += low <= 0.2 <= high
    assert covered / repeats >= 0.925
    if sd_seed and sd_image:
        assert covered / repeats <= 0.975


def test_crossed_interval_is_wider_than_that_over_seeds_where_images_matter():
    draw = np.random.default_rng(11)
    table_SN = draw.normal(0, 0.1, (10, 40)) + draw.normal(0, 1, 40)
    over_seeds, over_both = stats.t_interval(table_SN.mean(1)), stats.crossed_interval(table_SN)
    assert over_both.low < over_seeds[0] < over_seeds[1] < over_both.high
    assert stats.crossed_interval(np.full((3, 4), 0.5)) == (0.5, 0.5)


@pytest.mark.parametrize("bad", [np.zeros((1, 5)), np.zeros((5, 1)), np.zeros(5), np.full((3, 3), np.nan)])
def test_crossed_interval_refuses(bad):
    with pytest.raises(ValueError, match=r"expected finite differences \[S, N\], at least 2 x 2"):
        stats.crossed_interval(bad)


# ---------------------------------------------------------------------------------- many at once


def holm_by_steps(p_values):
    """Step down through the sorted values; each is multiplied by the number not yet passed."""
    adjusted, passed = [None] * len(p_values), 0.0
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        passed = max(passed, min(1.0, p_values[index] * (len(p_values) - step)))
        adjusted[index] = passed
    return adjusted


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_the_loop(seed):
    p_M = np.random.default_rng(seed).uniform(0, 0.3, 7).round(2)  # with ties
    assert stats.holm(p_M).tolist() == pytest.approx(holm_by_steps(p_M.tolist()))


def test_holm_on_a_case_by_hand_and_at_its_ends():
    assert stats.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.2]).tolist() == [0.2]
    assert stats.holm([]).tolist() == []
    assert stats.holm([0.9, 1.0]).tolist() == [1.0, 1.0]
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="p values must lie"):
            stats.holm([0.1, bad])


def test_holm_keeps_the_chance_of_any_false_positive():
    p_RM = np.random.default_rng(8).uniform(size=(2000, 6))
    assert 0.035 <= np.mean([(stats.holm(p_M) <= 0.05).any() for p_M in p_RM]) <= 0.065
