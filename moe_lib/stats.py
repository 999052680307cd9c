"""Paired comparison of two arms over shared seeds.

Shapes: S seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class PairedComparison(NamedTuple):
    """Treatment minus control."""

    difference: float  # mean over seeds
    low: float  # 95 % t interval
    high: float
    p: float  # exact two-sided sign-flip test
    effect: float  # mean difference / its standard deviation over seeds (Cohen's d_z)
    bca_low: float  # 95 % bias-corrected and accelerated bootstrap interval; undercovers at these sizes
    bca_high: float
    seeds: int


def t_interval(values_S: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for a mean; NaN for fewer than two values."""
    values = np.asarray(values_S, dtype=float)
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def sign_flip_p(differences_S: Sequence[float] | np.ndarray) -> float:
    """Two-sided p that the mean is this far from 0 if every difference could as well have the other sign.

    Exact, over all 2^S sign patterns, for S <= 20; its smallest value is 2 / 2^S.
    """
    differences = np.asarray(differences_S, dtype=float)
    if len(differences) > 20:
        raise ValueError(f"exact up to 20 seeds, got {len(differences)}")
    sums = np.zeros(1)
    for value in differences:  # all signed sums, built up one difference at a time
        sums = np.concatenate([sums + value, sums - value])
    observed = abs(differences.sum())
    return float(np.mean(np.abs(sums) >= observed - 1e-12 * np.abs(differences).sum()))


def paired_comparison(
    treatment_S: Sequence[float] | np.ndarray, control_S: Sequence[float] | np.ndarray
) -> PairedComparison:
    """Compare two arms, seed by seed.

    Args:
        treatment_S, control_S: one value per seed, in the same order of seeds.

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
    low, high = t_interval(differences)
    spread = differences.std(ddof=1)
    mean = float(differences.mean())
    if spread > 0:
        with warnings.catch_warnings():  # scipy warns where a bootstrap sample is degenerate
            warnings.simplefilter("ignore")
            bca = stats.bootstrap(
                (differences,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(0)
            ).confidence_interval
        bca_low, bca_high, effect = float(bca.low), float(bca.high), float(mean / spread)
    else:
        bca_low, bca_high, effect = (
            mean,
            mean,
            float("nan") if mean == 0 else float(np.copysign(np.inf, mean)),
        )
    return PairedComparison(
        mean, low, high, sign_flip_p(differences), effect, bca_low, bca_high, len(differences)
    )
