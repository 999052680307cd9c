"""The theory of the Adaptive Clustering (AC) router on planted clusters: who is assigned where, without
scaling (M = I), with the M of the true dispersions, and with an estimated M.

Each token carries an earlier assignment k* (in a network: its expert in the previous MoE layer) and is scored
against all experts in the space of *that* cluster, as in the paper. Scoring rules, with e_j the centre of
cluster j as the embedding of expert j:

- "nearest": the least (h - e_j)^T M_{k*} (h - e_j), the weighted distance behind the paper's objective.
- "inner": the largest h^T M_{k*} e_j / |e_j|, the router as it is built: no term for the length of e_j in
  that space. With M = I and centres of one length the two are one rule.

M is told k*, and k* is nearly the answer: beside an error belongs that of repeating k*.

Shapes: N tokens, D width, E experts (and clusters), S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import pandas as pd
import torch
from torch import Tensor

from moe_lib.moe.scaling import Dispersion, adaptive_scales, scales_of_dispersion
from moe_lib.rng import generator
from moe_study import stats
from moe_study.data.planted import ClusterConfig, FeatureClusters, feature_clusters

Rule = Literal["nearest", "inner"]
WRONG_SHARES = (0.0, 0.1, 0.3, 0.5)


class Space(NamedTuple):
    """What the router scores in: token n in the space scales_ED[previous_N[n]]."""

    scales_ED: Tensor  # rows of M
    previous_N: Tensor  # k*

    def scaled(self, tokens_ND: Tensor) -> Tensor:
        return tokens_ND * self.scales_ED[self.previous_N]


def wrong_assignment(labels_N: Tensor, num_clusters: int, share: float, seed: int) -> Tensor:
    """Labels of which each is, with probability `share`, replaced by one of the others.

    Under one seed, the tokens that are wrong at one share are wrong at every larger one.
    """
    if not 0 <= share <= 1 or (share > 0 and num_clusters < 2):
        raise ValueError(f"share must lie in [0, 1], and be 0 for one cluster, got {share}, {num_clusters}")
    draw = generator(seed, "wrong assignment")
    wrong_N = torch.rand(len(labels_N), generator=draw, dtype=torch.float64) < share
    shift_N = torch.randint(1, max(num_clusters, 2), labels_N.shape, generator=draw)
    return torch.where(wrong_N, (labels_N + shift_N) % num_clusters, labels_N)


def oracle_scales(deviation_ED: Tensor, dispersion: Dispersion = "mad") -> Tensor:
    """What `adaptive_scales` would give from infinitely many tokens of Gaussian clusters, [E, D]."""
    true_ED = deviation_ED * math.sqrt(2 / math.pi) if dispersion == "mad" else deviation_ED.square()
    valid_E = torch.ones(len(true_ED), dtype=torch.bool)
    return scales_of_dispersion(true_ED, valid_E, eps=1e-4, normalize="feature", max_ratio=10.0)


def spaces(clusters: FeatureClusters, seed: int) -> dict[str, Space]:
    """The routers that are compared, by name. The share is that of wrong earlier assignments: M is
    estimated from them, and each token is scored by them."""
    num_clusters = len(clusters.centres_ED)
    identity = torch.ones_like(clusters.centres_ED)
    found = {
        "M = I": Space(identity, clusters.labels_N),
        "oracle M": Space(oracle_scales(clusters.deviation_ED), clusters.labels_N),
        "oracle M, 1 / variance": Space(oracle_scales(clusters.deviation_ED, "variance"), clusters.labels_N),
    }
    for share in WRONG_SHARES:
        previous_N = wrong_assignment(clusters.labels_N, num_clusters, share, seed)
        scales_ED = adaptive_scales(clusters.tokens_ND, previous_N, num_clusters)
        found[f"M from labels, {share:.0%} wrong"] = Space(scales_ED, previous_N)
    return found


def scores(tokens_ND: Tensor, centres_ED: Tensor, space: Space, rule: Rule) -> Tensor:
    """[N, E]: the highest is the expert that a token is assigned to. See the head of this file."""
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; use 'nearest' or 'inner'")
    scaled_ND = space.scaled(tokens_ND)
    if rule == "inner":
        return scaled_ND @ torch.nn.functional.normalize(centres_ED, dim=1).T
    # -(h - e)^T M (h - e) / 2 without h^T M h, which is the same for every expert
    length_EE = space.scales_ED @ centres_ED.square().T
    return scaled_ND @ centres_ED.T - length_EE[space.previous_N] / 2


def assignment_error(scores_NE: Tensor, labels_N: Tensor) -> float:
    return (scores_NE.argmax(1) != labels_N).double().mean().item()


def errors(config: ClusterConfig, seed: int) -> dict[str, dict[str, float]]:
    """Share of tokens that each of `spaces` assigns wrongly, by rule, and beside it that of repeating k*. M
    comes from the batch that is scored, as in the paper's router."""
    clusters = feature_clusters(config, seed)
    tokens_ND, labels_N = clusters.tokens_ND, clusters.labels_N
    rows = {}
    for name, space in spaces(clusters, seed).items():
        by_rule = {
            rule: assignment_error(scores(tokens_ND, clusters.centres_ED, space, rule), labels_N)
            for rule in get_args(Rule)
        }
        rows[name] = by_rule | {"repeat k*": (space.previous_N != labels_N).double().mean().item()}
    rows["M = I"]["repeat k*"] = math.nan  # it uses no k*
    return rows


def error_table(config: ClusterConfig, seeds: Sequence[int]) -> pd.DataFrame:
    """`errors`: mean and half the width of the 95 % t interval over the seeds."""
    per_seed = pd.concat({seed: pd.DataFrame(errors(config, seed)).T for seed in seeds})

    def cell(values_S: pd.Series) -> str:
        low, high = stats.t_interval(values_S.to_numpy())
        half = (high - low) / 2
        return (
            "-" if math.isnan(low) else f"{values_S.mean():.3f}" + (f" ± {half:.3f}" if half > 1e-9 else "")
        )

    return per_seed.groupby(level=1, sort=False).agg(cell).rename_axis("router")
