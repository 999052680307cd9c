"""Data whose right answer is known.

Shapes: N samples, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lib.rng import generator


def ring_clusters(
    num_per_cluster: int = 100,
    num_clusters: int = 8,
    num_classes: int = 4,
    spread: float = 0.15,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian clusters on the unit circle in 2-D; classes alternate around it, so that every class is
    made of far-apart pieces and borders on the others.

    Args:
        spread: standard deviation of a cluster; neighbours are 2 sin(pi / num_clusters) apart.

    Returns:
        points [N, 2] (float64), class labels [N], cluster labels [N].

    Raises:
        ValueError: a count is below 1, or spread is negative.
    """
    if min(num_per_cluster, num_clusters, num_classes) < 1 or spread < 0:
        raise ValueError(
            "need at least one point, cluster and class and spread >= 0, got "
            f"{num_per_cluster}, {num_clusters}, {num_classes} and {spread}"
        )
    cluster_N = torch.arange(num_clusters).repeat_interleave(num_per_cluster)
    angle_N = 2 * math.pi * cluster_N.double() / num_clusters
    centres_N2 = torch.stack([angle_N.cos(), angle_N.sin()], 1)
    noise_N2 = torch.randn(centres_N2.shape, generator=generator(seed, "ring"), dtype=torch.float64)
    return centres_N2 + spread * noise_N2, cluster_N % num_classes, cluster_N
