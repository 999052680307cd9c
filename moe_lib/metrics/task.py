"""Measures of the task: accuracy, cross-entropy and calibration, in float64.

Shapes: N samples, C classes, B bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lib.checks import check_count, check_floating, check_labels, check_tensor


class TaskScore(NamedTuple):
    accuracy: float
    cross_entropy: float  # nats
    calibration_error: float  # expected calibration error, 15 equal-width bins of confidence


def task_score(log_probs_NC: Tensor, labels_N: Tensor) -> TaskScore:
    """Accuracy, cross-entropy and calibration of predictions.

    Args:
        log_probs_NC: [N, C] logarithms of probabilities, N >= 1.
        labels_N: [N] integers, 0 to C - 1.

    Raises:
        ValueError: an argument has another shape, type or range.
    """
    check_floating(log_probs_NC, "log_probs", "N, C", finite=False)  # a class may have probability 0
    if not log_probs_NC.numel() or log_probs_NC.isnan().any() or (log_probs_NC > 1e-3).any():
        raise ValueError("log_probs must hold logarithms of probabilities of one sample or more, without NaN")
    labels_N = check_labels(labels_N, len(log_probs_NC), log_probs_NC.shape[1], like=log_probs_NC)
    log_probs_NC = log_probs_NC.double()
    if (log_probs_NC.logsumexp(1).abs() > 1e-2).any():
        raise ValueError("log_probs must be normalised: give scores.log_softmax(1)")
    confidence_N, predicted_N = log_probs_NC.exp().max(1)
    correct_N = (predicted_N == labels_N).double()
    return TaskScore(
        correct_N.mean().item(),
        -log_probs_NC.gather(1, labels_N[:, None]).mean().item(),
        calibration_error(confidence_N, correct_N),
    )


def calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| per bin, weighted by the bin's share.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 5. Bins are (a, b].
    """
    check_count(bins, "bins")
    check_floating(confidence_N, "confidence", "N")
    check_tensor(correct_N, "correct", "N")
    if not len(confidence_N) or len(correct_N) != len(confidence_N):
        raise ValueError(
            f"correct must have as many entries as confidence, at least 1, got {len(correct_N)} "
            f"and {len(confidence_N)}"
        )
    if confidence_N.min() < 0 or confidence_N.max() > 1 + 1e-3:
        raise ValueError("confidence must lie in [0, 1]")
    if not ((correct_N == 0) | (correct_N == 1)).all():
        raise ValueError("correct must hold 0 or 1, or bool")
    bin_N = (confidence_N * bins).ceil().clamp(1, bins).long() - 1
    gap_B = torch.zeros(bins, dtype=torch.float64, device=bin_N.device)
    gap_B.index_add_(0, bin_N, correct_N.double() - confidence_N.double())
    return (gap_B.abs().sum() / len(bin_N)).item()
