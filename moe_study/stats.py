"""Paired comparison of two arms over shared seeds, and what several comparisons together allow to say.

Shapes: S seeds, M comparisons.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats


class PairedComparison(NamedTuple):
    """Treatment minus control."""

    difference: float  # mean over seeds
    low: float  # 95 % t interval
    high: float
    p: float  # two-sided sign-flip test, exact up to 40 seeds
    seeds: int


def t_interval(values_S: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for a mean; NaN for fewer than two values."""
    values = np.asarray(values_S, dtype=float)
    if len(values) < 2:
        return float("nan"), float("nan")
    half = _student((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


@functools.cache
def _student(level: float, freedom: int) -> float:
    """Quantile of Student's t; scipy takes longer for it than for all else here."""
    return float(stats.t.ppf(level, freedom))


def sign_flip_p(differences_S: Sequence[float] | np.ndarray) -> float:
    """Two-sided p that the mean is this far from 0 if every difference could as well have the other sign.

    Exact, over all 2^S sign patterns, for S <= 40; its smallest value is 2 / 2^S. The sums of each half of
    the seeds are listed; a sorted half tells how many of its sums lift one of the other half's far enough.
    Beyond that the share of 99,999 random patterns, itself included: the same at every call, within about 2 %
    of the exact value at p = 0.05, and never below 1e-5.
    """
    differences = np.asarray(differences_S, dtype=float)
    if len(differences) > 40:
        draws = stats.permutation_test(
            (differences,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=99_999,
            batch=1000,
            rng=np.random.default_rng(0),
        )
        return float(draws.pvalue)
    observed = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()  # equal up to rounding is equal
    if observed <= 0:
        return 1.0
    middle = len(differences) // 2
    first, second = (_signed_sums(half) for half in (differences[:middle], differences[middle:]))
    second.sort()
    below = np.searchsorted(second, observed - first)  # the patterns come in pairs of opposite sums
    return float(2 * (len(second) - below).sum() / 2.0 ** len(differences))


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """Of all sign patterns, built up one value at a time."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def paired_differences(
    treatment_S: Sequence[float] | np.ndarray, control_S: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Treatment minus control, [S].

    Raises:
        ValueError: lengths differ, there are fewer than two seeds, or a value is not finite.
    """
    treatment, control = np.asarray(treatment_S, dtype=float), np.asarray(control_S, dtype=float)
    if treatment.ndim != 1 or treatment.shape != control.shape:
        raise ValueError(f"expected two lists of one length, got {treatment.shape} and {control.shape}")
    if len(treatment) < 2:
        raise ValueError(f"an interval needs at least two paired seeds, got {len(treatment)}")
    differences = treatment - control
    if not np.isfinite(differences).all():
        raise ValueError("values must be finite; a run that failed has no place in a comparison")
    return differences


def paired_comparison(
    treatment_S: Sequence[float] | np.ndarray, control_S: Sequence[float] | np.ndarray
) -> PairedComparison:
    """Compare two arms, seed by seed.

    Args:
        treatment_S, control_S: one value per seed, in the same order of seeds.

    Raises:
        ValueError: lengths differ, there are fewer than two seeds, or a value is not finite.
    """
    differences = paired_differences(treatment_S, control_S)
    low, high = t_interval(differences)
    return PairedComparison(float(differences.mean()), low, high, sign_flip_p(differences), len(differences))


def smallest_detectable_effect(sd: float, seeds: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The mean difference that a two-sided paired t test would find with the given power.

    By the noncentral t distribution; the far tail is neglected.

    Args:
        sd: standard deviation of the paired differences.
        seeds: S. NaN below two.
    """
    if not (0 < alpha < 0.5 <= power < 1):  # below a half the far tail would count
        raise ValueError(f"expected 0 < alpha < 0.5 <= power < 1, got alpha {alpha}, power {power}")
    if seeds < 2:
        return float("nan")
    freedom = seeds - 1
    critical = stats.t.ppf(1 - alpha / 2, freedom)
    return float(special.nctdtrinc(freedom, 1 - power, critical) * sd / np.sqrt(seeds))


def seeds_for_power(sd: float, effect: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """The fewest paired seeds with which a two-sided t test finds `effect` with the given power, up to 10^6.

    Args:
        sd: standard deviation of the paired differences.
        effect: positive.
    """
    if not effect > 0:
        raise ValueError(f"effect must be positive, got {effect}")
    return 2 + bisect.bisect_left(
        range(2, 10**6), True, key=lambda seeds: smallest_detectable_effect(sd, seeds, power, alpha) <= effect
    )


class Interval(NamedTuple):
    low: float
    high: float


def crossed_interval(differences_SN: np.ndarray, confidence: float = 0.95) -> Interval:
    """Interval for the mean of a seeds x images table in which both are samples: other seeds, other images.

    Two-way random effects without replication: the variance of the grand mean is
    (MS_seeds + MS_images - MS_rest) / (S N), its degrees of freedom by Satterthwaite. Source: Brennan,
    "Generalizability Theory", 2001, chapter 6. Where the sum is smaller than either part (the rest's estimate
    exceeds it by chance) the larger of the two parts counts.

    Args:
        differences_SN: treatment minus control of each seed and test image.

    Raises:
        ValueError: fewer than two seeds or images, or a value that is not finite.
    """
    d = np.asarray(differences_SN, dtype=float)
    if d.ndim != 2 or min(d.shape) < 2 or not np.isfinite(d).all():
        raise ValueError(f"expected finite differences [S, N], at least 2 x 2, got shape {d.shape}")
    s, n = d.shape
    mean, by_seed, by_image = d.mean(), d.mean(1), d.mean(0)
    squares = {
        "seeds": (n * np.square(by_seed - mean).sum() / (s - 1), s - 1),
        "images": (s * np.square(by_image - mean).sum() / (n - 1), n - 1),
    }
    rest = np.square(d - by_seed[:, None] - by_image + mean).sum() / ((s - 1) * (n - 1))
    parts = [square for square, _ in squares.values()]
    variance = max(sum(parts) - rest, *parts)
    if variance == 0:
        return Interval(float(mean), float(mean))
    spread = sum(square**2 / freedom for square, freedom in squares.values())
    freedom = variance**2 / (spread + rest**2 / ((s - 1) * (n - 1)))
    half = stats.t.ppf((1 + confidence) / 2, max(freedom, 1)) * np.sqrt(variance / (s * n))
    return Interval(float(mean - half), float(mean + half))


def holm(p_values_M: Sequence[float] | np.ndarray) -> np.ndarray:
    """P values adjusted for having been tested together, [M]: reject those at or below the level.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6, 1979.
    """
    p_M = np.asarray(p_values_M, dtype=float)
    if not ((p_M >= 0) & (p_M <= 1)).all():
        raise ValueError(f"p values must lie in [0, 1], got {p_M.tolist()}")
    order_M = p_M.argsort(kind="stable")
    adjusted_M = np.empty(len(p_M))
    factors_M = np.arange(len(p_M), 0, -1)
    adjusted_M[order_M] = np.minimum(np.maximum.accumulate(p_M[order_M] * factors_M), 1)
    return adjusted_M
