"""What breaks when experts, or the routing between them, are tampered with.

Shapes: N samples, E experts, C classes.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lib.checks import check_floating, check_labels
from moe_lib.models.classifier import Mixture, mix


class Ablations(NamedTuple):
    """Accuracy lost (clean minus ablated; a negative value is a gain)."""

    dropped: list[float]  # one per expert: its weight set to 0, the others' renormalised (alike if tiny)
    swapped: float  # mean over pairs: each gets the other's weight
    merged: float  # mean over pairs: both replaced by the mean of their logits
    permuted: float  # routing weights exchanged between samples at random, mean of 5 draws
    permuted_cross_entropy: float  # likewise, cross-entropy gained, nats
    damage_CE: list[list[float]]  # per class and dropped expert


def expert_ablations(
    weights_NE: Tensor,
    expert_logits_NEC: Tensor,
    labels_N: Tensor,
    mixture: Mixture,
    generator: torch.Generator,
) -> Ablations:
    """Ablate a trained mixture on a data set, from its routing weights and expert logits alone.

    With one expert nothing is left to drop or swap: the lists hold NaN and the means are NaN.

    Raises:
        ValueError: an argument has another shape, type or range, or there is no sample.
    """
    num_experts, num_classes = _checked_shape(weights_NE, expert_logits_NEC)
    labels_N = check_labels(labels_N, len(weights_NE), num_classes, like=weights_NE)

    def score(weights_NE: Tensor, logits_NEC: Tensor = expert_logits_NEC) -> tuple[Tensor, float]:
        log_probs_NC = mix(weights_NE, logits_NEC, mixture)
        cross_entropy = -log_probs_NC.gather(1, labels_N[:, None]).mean().item()
        return (log_probs_NC.argmax(1) == labels_N).double(), cross_entropy

    clean_N, clean_cross_entropy = score(weights_NE)
    one_hot_NC = torch.nn.functional.one_hot(labels_N, num_classes).double()
    counts_C = one_hot_NC.sum(0)
    dropped, damage = [], []
    for e in range(num_experts):
        lost_N = clean_N - score(_without(weights_NE, e))[0]
        alone = num_experts == 1
        dropped.append(float("nan") if alone else lost_N.mean().item())
        damage.append((lost_N @ one_hot_NC / counts_C) * (float("nan") if alone else 1))

    swapped, merged = [], []
    for a, b in itertools.combinations(range(num_experts), 2):
        order = list(range(num_experts))
        order[a], order[b] = b, a
        swapped.append((clean_N - score(weights_NE[:, order])[0]).mean().item())
        logits_NEC = expert_logits_NEC.clone()
        logits_NEC[:, [a, b]] = logits_NEC[:, [a, b]].mean(1, keepdim=True)
        merged.append((clean_N - score(weights_NE, logits_NEC)[0]).mean().item())

    permuted = []
    for _ in range(5):
        order_N = torch.randperm(len(labels_N), generator=generator).to(labels_N.device)
        correct_N, cross_entropy = score(weights_NE[order_N])
        permuted.append(((clean_N - correct_N).mean().item(), cross_entropy - clean_cross_entropy))

    return Ablations(
        dropped,
        _mean(swapped),
        _mean(merged),
        _mean([accuracy for accuracy, _ in permuted]),
        _mean([cross_entropy for _, cross_entropy in permuted]),
        torch.stack(damage, 1).tolist(),
    )


def _checked_shape(weights_NE: Tensor, expert_logits_NEC: Tensor) -> tuple[int, int]:
    """Numbers of experts and classes; raises ValueError as `expert_ablations` says."""
    check_floating(weights_NE, "weights", "N, E")
    check_floating(expert_logits_NEC, "expert_logits", "N, E, C")
    if not expert_logits_NEC.numel() or weights_NE.shape != expert_logits_NEC.shape[:2]:
        raise ValueError(
            "expert_logits must hold the classes of every weight, for one sample or more, "
            f"got {list(expert_logits_NEC.shape)} for weights {list(weights_NE.shape)}"
        )
    if (weights_NE < 0).any():
        raise ValueError(f"weights must not be negative, got {weights_NE.min():g}")
    num_experts, num_classes = expert_logits_NEC.shape[1:]
    return num_experts, num_classes


def _without(weights_NE: Tensor, expert: int) -> Tensor:
    """The weights without one expert, shared out among the others; where it had all but a millionth, they
    share alike."""
    kept_NE = weights_NE.clone()
    kept_NE[:, expert] = 0
    total_N1 = kept_NE.sum(1, keepdim=True)
    others_NE = torch.full_like(kept_NE, 1 / max(weights_NE.shape[1] - 1, 1))
    others_NE[:, expert] = 0
    return torch.where(total_N1 > 1e-6, kept_NE / total_N1.clamp(min=1e-6), others_NE)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
