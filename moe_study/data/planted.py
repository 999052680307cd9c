"""Data whose right answer is known.

Shapes: N samples or tokens, D width, E clusters or experts, G sub-populations, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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


@dataclass(frozen=True)
class ClusterConfig:
    """Of `feature_clusters`. Lengths are in the unit of the tokens."""

    num_per_cluster: int = 250
    num_clusters: int = 4  # E; at most dim
    dim: int = 16
    separation: float = 3.0  # distance between any two centres; clusters overlap as it falls
    tight: float = 0.3  # standard deviation of a cluster along its own features
    loose: float = 1.5  # along all others; equal to tight: isotropic clusters, nothing to adapt to
    noise: float = 0.0  # standard deviation of noise added to every feature of every token: corruption

    def __post_init__(self) -> None:
        if self.num_per_cluster < 1 or not 1 <= self.num_clusters <= self.dim:
            raise ValueError(
                "need at least one token per cluster and 1 <= num_clusters <= dim (centres are orthogonal), "
                f"got {self.num_per_cluster}, {self.num_clusters} and {self.dim}"
            )
        for name in ("separation", "tight", "loose", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")


class FeatureClusters(NamedTuple):
    tokens_ND: Tensor  # float64
    labels_N: Tensor  # the cluster of each token
    centres_ED: Tensor
    deviation_ED: Tensor  # true standard deviation of each cluster along each feature, noise included


def feature_clusters(config: ClusterConfig, seed: int = 0) -> FeatureClusters:
    """Gaussian clusters, each tight along its own features and loose along the others.

    A token of cluster k is

        h = centre_k + s_k * z + noise * z',    z, z' standard normal,

    where s_kq is `tight` for the features that k owns (q with q mod E = k) and `loose` for the others. The
    centres are E orthogonal vectors of one length in a random direction, so every pair is equally far
    apart, along features of both kinds. This is the Gaussian mixture of the AC paper's theory.
    """
    draw = generator(seed, "feature clusters")
    num_clusters, dim = config.num_clusters, config.dim
    centres_ED = _orthonormal(num_clusters, dim, draw) * config.separation / math.sqrt(2)
    owner_D = torch.arange(dim) % num_clusters
    own_ED = owner_D == torch.arange(num_clusters)[:, None]
    spread_ED = torch.where(own_ED, config.tight, config.loose).double()
    labels_N = torch.arange(num_clusters).repeat_interleave(config.num_per_cluster)
    z_ND, noise_ND = torch.randn(2, len(labels_N), dim, generator=draw, dtype=torch.float64)
    tokens_ND = centres_ED[labels_N] + spread_ED[labels_N] * z_ND + config.noise * noise_ND
    return FeatureClusters(tokens_ND, labels_N, centres_ED, (spread_ED.square() + config.noise**2).sqrt())


def _orthonormal(rows: int, dim: int, draw: torch.Generator) -> Tensor:
    """Random orthonormal rows [rows, dim], the same whatever sign convention the QR has."""
    q, r = torch.linalg.qr(torch.randn(dim, rows, generator=draw, dtype=torch.float64))
    return (q * r.diagonal().sign()).T


Fault = Literal["noise", "collapse", "blind", "split", "alike"]


class PlantedRouting(NamedTuple):
    """A population whose right partition is known, with a router and experts of known quality on it."""

    tokens_ND: Tensor  # float64
    labels_N: Tensor  # classes, num_groups * classes_per_group of them
    partition_N: Tensor  # the true sub-population of each token; their number is the right number of experts
    probs_NE: Tensor  # the router's gate; E = num_groups, or twice that under "split"
    answers_NEC: Tensor  # each expert's answer to each token, one-hot


def planted_routing(
    fault: Fault = "noise",
    level: float = 0.0,
    overlap: float = 0.2,
    crossed: bool = False,
    num_per_group: int = 200,
    num_groups: int = 4,
    classes_per_group: int = 2,
    dim: int = 8,
    seed: int = 0,
) -> PlantedRouting:
    """Sub-populations with a known partition, and a gate that is right up to one fault of a known level.

    Tokens are isotropic Gaussians around `num_groups` centres at distance 1 from each other. The right gate
    is the posterior probability of each sub-population given the token: nothing can route better.
    `level` in [0, 1] says how far the fault has gone:

    - noise: this share of the tokens, drawn at random, exchange their gates. At 1 the router is arbitrary:
      as decided and as balanced as the right one, and it knows nothing.
    - collapse: this share goes to expert 0, whatever it is. At 1 the router is collapsed.
    - blind: every gate is mixed with the uniform one, with this weight. At 1 the router is blind.
    - split: every sub-population gets two experts where one would do, and a token goes to the second one
      with probability level / 2. At 1 there are twice as many experts in use as are right.
    - alike: the gate stays right, but every expert has learned to be right about this share of the tokens.
      At 1 they all answer the same, and routing is for nothing.

    Args:
        overlap: standard deviation of a sub-population; at 0 the right gate is one-hot.
        crossed: classes are drawn independently of the sub-populations, instead of each lying within one:
            experts that are right then have nothing to do with classes.

    Raises:
        ValueError: an unknown fault, a level outside [0, 1], a negative overlap or an unusable count.
    """
    if fault not in get_args(Fault):
        raise ValueError(f"unknown fault {fault!r}; use {', '.join(map(repr, get_args(Fault)))}")
    if not 0 <= level <= 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if not 0 <= overlap < math.inf:
        raise ValueError(f"overlap must be finite and not negative, got {overlap}")
    if min(num_per_group, classes_per_group) < 1 or not 1 <= num_groups <= dim:
        raise ValueError(
            "need at least one token and class per group and 1 <= num_groups <= dim (centres are "
            f"orthogonal), got {num_per_group}, {classes_per_group}, {num_groups} and {dim}"
        )
    num_classes = num_groups * classes_per_group
    draw = generator(seed, "planted routing")
    partition_N = torch.arange(num_groups).repeat_interleave(num_per_group)
    if crossed:
        labels_N = torch.randint(num_classes, partition_N.shape, generator=generator(seed, "crossed classes"))
    else:
        within_N = torch.arange(num_per_group).repeat(num_groups)
        labels_N = partition_N * classes_per_group + within_N % classes_per_group
    centres_GD = _orthonormal(num_groups, dim, draw) / math.sqrt(2)
    noise_ND = torch.randn(len(partition_N), dim, generator=draw, dtype=torch.float64)
    tokens_ND = centres_GD[partition_N] + overlap * noise_ND
    known_NG = one_hot(partition_N, num_groups).bool()
    right_NG = _posterior(tokens_ND, centres_GD, overlap) if overlap else known_NG.double()
    # The first tokens of one random order: a higher level strikes those of a lower one, and more.
    struck = torch.randperm(len(partition_N), generator=draw)[: round(level * len(partition_N))]
    probs_NE = _degrade(right_NG, fault, level, struck, draw)
    known_NG[struck] |= fault == "alike"
    answers_NGC = _answers(labels_N, known_NG, num_classes, seed)
    answers_NEC = answers_NGC.repeat(1, probs_NE.shape[1] // num_groups, 1)
    return PlantedRouting(tokens_ND, labels_N, partition_N, probs_NE, answers_NEC)


def _answers(labels_N: Tensor, known_NG: Tensor, num_classes: int, seed: int) -> Tensor:
    """[N, G, C] one-hot: the label where a group's expert knows the token, else a guess."""
    guess_NG = torch.randint(num_classes, known_NG.shape, generator=generator(seed, "planted answers"))
    return one_hot(torch.where(known_NG, labels_N[:, None], guess_NG), num_classes).double()


def _posterior(tokens_ND: Tensor, centres_GD: Tensor, spread: float) -> Tensor:
    """[N, G]: probability of each group given the token, for groups of equal size and spread."""
    distance_NG = (tokens_ND[:, None] - centres_GD).square().sum(2)
    return (-distance_NG / (2 * spread**2)).softmax(1)


def _degrade(right_NG: Tensor, fault: Fault, level: float, struck: Tensor, draw: torch.Generator) -> Tensor:
    num_tokens, num_groups = right_NG.shape
    probs_NE = right_NG.clone()
    if fault == "blind":
        probs_NE = (1 - level) * right_NG + level / num_groups
    elif fault == "collapse":
        probs_NE[struck] = one_hot(torch.tensor(0), num_groups).double()
    elif fault == "noise":
        probs_NE[struck] = right_NG[struck[torch.randperm(len(struck), generator=draw)]]
    elif fault == "split":
        second_N1 = torch.zeros(num_tokens, 1, dtype=torch.float64)
        second_N1[struck[torch.rand(len(struck), generator=draw) < 0.5]] = 1
        probs_NE = torch.cat([right_NG * (1 - second_N1), right_NG * second_N1], 1)
    return probs_NE
