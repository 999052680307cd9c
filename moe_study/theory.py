"""The theory of the Adaptive Clustering (AC) router on planted clusters: who is assigned where, and how well
conditioned the router's problem is, with M = I, with the M of the true dispersions, and with an estimated M.

Each token carries an earlier assignment k* (in a network: its expert in the previous MoE layer) and is scored
against all experts in the space of *that* cluster, as in the paper. Scoring rules, with e_j the centre of
cluster j as the embedding of expert j:

- "nearest": the least (h - e_j)^T M_{k*} (h - e_j), the weighted distance behind the paper's objective.
- "inner": the largest h^T M_{k*} e_j / |e_j|, the router as it is built: no term for the length of e_j in
  that space. With M = I and centres of one length the two are one rule.

M is told k*, and k* is nearly the answer. So two baselines belong beside an error: that of repeating k*, and
that of a router trained with each token's own k* but another token's h, which is 1 - 1/E unless M reveals k*.

Shapes: N tokens, D width, E experts (and clusters), S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
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


def errors(config: ClusterConfig, seed: int, rule: Rule = "nearest") -> dict[str, float]:
    """Share of tokens that each of `spaces` assigns wrongly. M comes from the batch that is scored, as in
    the paper's router."""
    clusters = feature_clusters(config, seed)
    return {
        name: assignment_error(
            scores(clusters.tokens_ND, clusters.centres_ED, space, rule), clusters.labels_N
        )
        for name, space in spaces(clusters, seed).items()
    }


def sweep(
    configs: Mapping[float, ClusterConfig], seeds: Sequence[int], rule: Rule = "nearest"
) -> pd.DataFrame:
    """`errors` at each setting, named by the value that varies: columns value, router, seed, error."""
    return pd.DataFrame(
        {"value": value, "router": router, "seed": seed, "error": error}
        for value, config in configs.items()
        for seed in seeds
        for router, error in errors(config, seed, rule).items()
    )


def wrong_share_sweep(config: ClusterConfig, shares: Sequence[float], seeds: Sequence[int]) -> pd.DataFrame:
    """`wrong_share_errors` at each share, as columns value, router, seed, error."""
    return pd.DataFrame(
        {"value": share, "router": router, "seed": seed, "error": error}
        for share in shares
        for seed in seeds
        for router, error in wrong_share_errors(config, share, seed).items()
    )


def wrong_share_errors(config: ClusterConfig, share: float, seed: int) -> dict[str, float]:
    """Errors of the nearest-centre rule where this share of earlier assignments is wrong, the two harms
    apart: tokens that are scored in the wrong space (oracle M), and an M from mixed clusters besides."""
    clusters = feature_clusters(config, seed)
    num_clusters = config.num_clusters
    previous_N = wrong_assignment(clusters.labels_N, num_clusters, share, seed)
    rows = {
        "M = I": torch.ones_like(clusters.centres_ED),
        "oracle M, scored by k*": oracle_scales(clusters.deviation_ED),
        "M from labels": adaptive_scales(clusters.tokens_ND, previous_N, num_clusters),
    }
    found = {
        name: assignment_error(
            scores(clusters.tokens_ND, clusters.centres_ED, Space(scales_ED, previous_N), "nearest"),
            clusters.labels_N,
        )
        for name, scales_ED in rows.items()
    }
    return found | {"repeat k*": (previous_N != clusters.labels_N).double().mean().item()}


def router_hessian(scaled_ND: Tensor, probs_NE: Tensor) -> Tensor:
    """[E D, E D]: the Hessian of the mean cross-entropy of softmax(M h . e) in the embeddings e.

    It does not depend on the labels. Adding one vector to all embeddings changes nothing, so D of its
    eigenvalues are 0. With equal probabilities (a router at 0) the others are those of the second moment
    of the scaled tokens, divided by E.
    """
    curvature_NEE = torch.diag_embed(probs_NE) - probs_NE[:, :, None] * probs_NE[:, None]
    hessian = torch.einsum("nab,ni,nj->aibj", curvature_NEE, scaled_ND, scaled_ND) / len(scaled_ND)
    size = probs_NE.shape[1] * scaled_ND.shape[1]
    return hessian.reshape(size, size)


def trained_embeddings(scaled_ND: Tensor, labels_N: Tensor, num_experts: int, ridge: float = 1e-3) -> Tensor:
    """[E, D] embeddings that minimise the cross-entropy of M h . e plus ridge / 2 |e|^2: what a router would
    learn, knowing the clusters, if it may use all that M tells it. Newton's method, to convergence."""
    embeddings = scaled_ND.new_zeros(num_experts, scaled_ND.shape[1])
    target_NE = torch.nn.functional.one_hot(labels_N, num_experts).to(scaled_ND.dtype)
    for _ in range(50):
        probs_NE = (scaled_ND @ embeddings.T).softmax(1)
        gradient = (probs_NE - target_NE).T @ scaled_ND / len(scaled_ND) + ridge * embeddings
        hessian = router_hessian(scaled_ND, probs_NE)
        hessian.diagonal().add_(ridge)
        step = torch.linalg.solve(hessian, gradient.flatten()).view_as(embeddings)
        embeddings = embeddings - step
        if step.abs().max() < 1e-10:
            return embeddings
    raise RuntimeError(f"no convergence in 50 steps, last step {step.abs().max().item():.1e}; raise ridge")


def cluster_condition(scales_ED: Tensor, deviation_ED: Tensor) -> float:
    """Condition number of the covariance of a cluster's own scaled tokens, mean over the clusters."""
    variance_ED = (scales_ED * deviation_ED).square()
    return (variance_ED.amax(1) / variance_ED.amin(1)).mean().item()


def hessian_condition(scaled_ND: Tensor, num_experts: int) -> float:
    """Condition number of `router_hessian` at a router of zeros, without its D directions that change
    nothing: that of the second moment of all scaled tokens."""
    uniform_NE = scaled_ND.new_full((len(scaled_ND), num_experts), 1 / num_experts)
    eigenvalues = torch.linalg.eigvalsh(router_hessian(scaled_ND, uniform_NE))[scaled_ND.shape[1] :]
    return (eigenvalues[-1] / eigenvalues[0]).item()


def router_measures(config: ClusterConfig, seed: int) -> dict[str, dict[str, float]]:
    """Everything about each of `spaces` at one setting: errors by rule, the baselines, the conditioning.

    "trained" is `trained_embeddings`, tested on as many other tokens with an M of their own.
    """
    both = feature_clusters(replace(config, num_per_cluster=2 * config.num_per_cluster), seed)
    clusters, fresh = (
        both._replace(tokens_ND=both.tokens_ND[half::2], labels_N=both.labels_N[half::2]) for half in (0, 1)
    )
    labels_N, num_experts = clusters.labels_N, config.num_clusters
    shuffled_N = torch.randperm(len(labels_N), generator=generator(seed, "shuffled tokens"))
    fresh_spaces = spaces(fresh, seed + 1)
    rows = {}
    for name, space in spaces(clusters, seed).items():
        found: dict[str, float] = {}
        for rule in get_args(Rule):
            scores_NE = scores(clusters.tokens_ND, clusters.centres_ED, space, rule)
            found[rule] = assignment_error(scores_NE, labels_N)
        for title, order_N in (("trained", torch.arange(len(labels_N))), ("trained, h shuffled", shuffled_N)):
            embeddings_ED = trained_embeddings(
                space.scaled(clusters.tokens_ND[order_N]), labels_N, num_experts
            )
            tested_ND = fresh_spaces[name].scaled(fresh.tokens_ND[order_N])
            found[title] = assignment_error(tested_ND @ embeddings_ED.T, labels_N)
        found["repeat k*"] = (space.previous_N != labels_N).double().mean().item()
        found["cond. cluster"] = cluster_condition(space.scales_ED, clusters.deviation_ED)
        found["cond. Hessian"] = hessian_condition(space.scaled(clusters.tokens_ND), num_experts)
        rows[name] = found
    rows["M = I"]["repeat k*"] = math.nan  # it uses no k*
    return rows


def router_table(config: ClusterConfig, seeds: Sequence[int]) -> pd.DataFrame:
    """`router_measures`: mean and half the width of the 95 % t interval over the seeds."""
    per_seed = [router_measures(config, seed) for seed in seeds]

    def cell(name: str, column: str) -> str:
        values_S = [rows[name][column] for rows in per_seed]
        low, high = stats.t_interval(values_S)
        if math.isnan(low):
            return "-"
        digits = 1 if column.startswith("cond") else 3
        mean, half = (low + high) / 2, (high - low) / 2
        return f"{mean:.{digits}f}" if half < 1e-9 else f"{mean:.{digits}f} ± {half:.{digits}f}"

    names, columns = per_seed[0], per_seed[0]["oracle M"]
    cells = {name: {column: cell(name, column) for column in columns} for name in names}
    return pd.DataFrame.from_dict(cells, orient="index").rename_axis("router")
