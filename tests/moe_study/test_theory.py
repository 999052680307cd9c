"""The AC router on planted clusters: closed forms, loops, automatic differentiation, the router itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import reference_ac
import torch
from scipy.stats import norm

from moe_lib.moe import AdaptiveClusteringRouter, Routing, adaptive_scales
from moe_study import theory
from moe_study.data.planted import ClusterConfig, feature_clusters
from moe_study.theory import Space


def test_two_gaussians_have_their_closed_form():
    """A token of a, scored in the space of M, is nearer to b with probability
    Phi(-d^T M d / (2 sqrt(d^T M S M d))), d the difference of the centres and S the covariance of a."""
    config = ClusterConfig(20_000, num_clusters=2, dim=4, separation=2.0, tight=0.4, loose=1.5)
    clusters = feature_clusters(config, seed=3)
    d = (clusters.centres_ED[0] - clusters.centres_ED[1]).numpy()
    variance_ED = clusters.deviation_ED.square().numpy()

    def expected(scales_ED, wrong):
        error = 0.0
        for own in range(2):
            for share, space in ((1 - wrong, own), (wrong, 1 - own)):
                m = scales_ED[space].numpy()
                spread = math.sqrt((d * m * variance_ED[own] * m * d).sum())
                error += share / 2 * norm.cdf(-(d * m * d).sum() / (2 * spread))
        return error

    found = {}
    for name, scales_ED in {
        "identity": torch.ones_like(clusters.centres_ED),
        "mad": theory.oracle_scales(clusters.deviation_ED),
        "variance": theory.oracle_scales(clusters.deviation_ED, "variance"),
    }.items():
        for wrong in (0.0, 0.3):
            previous_N = theory.wrong_assignment(clusters.labels_N, 2, wrong, seed=0)
            scores_NE = theory.scores(
                clusters.tokens_ND, clusters.centres_ED, Space(scales_ED, previous_N), "nearest"
            )
            found[name, wrong] = theory.assignment_error(scores_NE, clusters.labels_N)
            assert found[name, wrong] == pytest.approx(expected(scales_ED, wrong), abs=0.008)
    # With one over the variance it is Phi(-sqrt(d^T S^-1 d) / 2), the least that any M can reach.
    best = np.mean([norm.cdf(-math.sqrt((d**2 / variance_ED[k]).sum()) / 2) for k in range(2)])
    assert found["variance", 0.0] == pytest.approx(best, abs=0.008)
    assert best < expected(theory.oracle_scales(clusters.deviation_ED), 0.0)


def test_scores_agree_with_loops_and_with_the_router():
    config = ClusterConfig(15, num_clusters=3, dim=5)
    clusters = feature_clusters(config, seed=1)
    previous_N = theory.wrong_assignment(clusters.labels_N, 3, 0.3, seed=1)
    scales_ED = adaptive_scales(clusters.tokens_ND, previous_N, 3)
    space = Space(scales_ED, previous_N)
    inner_NE = theory.scores(clusters.tokens_ND, clusters.centres_ED, space, "inner")
    looped = reference_ac.scores(clusters.tokens_ND, clusters.centres_ED, previous_N, scales_ED.numpy())
    np.testing.assert_allclose(inner_NE, looped, rtol=1e-10)

    router = AdaptiveClusteringRouter(5, 3).double()
    with torch.no_grad():
        router.embeddings_ED.copy_(clusters.centres_ED)
    one_hot_NE = torch.nn.functional.one_hot(previous_N, 3).double()
    previous = Routing(one_hot_NE, one_hot_NE, previous_N[:, None], torch.ones(45, 1))
    torch.testing.assert_close(router(clusters.tokens_ND, previous).logits_NE, inner_NE)

    nearest_N = theory.scores(clusters.tokens_ND, clusters.centres_ED, space, "nearest").argmax(1)
    for n in range(45):
        distances = [
            sum(
                float(scales_ED[previous_N[n], q] * (clusters.tokens_ND[n, q] - centre[q]) ** 2)
                for q in range(5)
            )
            for centre in clusters.centres_ED
        ]
        assert int(nearest_N[n]) == int(np.argmin(distances))


def test_without_scales_both_rules_are_one():
    config = ClusterConfig()
    nearest, inner = (theory.errors(config, 0, rule)["M = I"] for rule in ("nearest", "inner"))
    assert nearest == inner


def test_oracle_scales_are_the_limit_of_the_estimated_ones():
    clusters = feature_clusters(ClusterConfig(50_000), seed=0)
    for dispersion in ("mad", "variance"):
        estimated_ED = adaptive_scales(clusters.tokens_ND, clusters.labels_N, 4, dispersion)
        oracle_ED = theory.oracle_scales(clusters.deviation_ED, dispersion)
        torch.testing.assert_close(estimated_ED, oracle_ED, rtol=0.03, atol=0)


def test_equal_tightness_gives_the_identity():
    isotropic = replace(ClusterConfig(), tight=1.5)
    scales_ED = theory.oracle_scales(feature_clusters(isotropic, 0).deviation_ED)
    torch.testing.assert_close(scales_ED, torch.ones_like(scales_ED))
    found = theory.errors(isotropic, 0)
    assert found["oracle M"] == found["M = I"]


def test_wrong_assignments_are_nested_and_of_the_asked_share():
    labels_N = torch.arange(5000) % 5
    few_N, many_N = (theory.wrong_assignment(labels_N, 5, share, seed=4) for share in (0.1, 0.6))
    few, many = few_N != labels_N, many_N != labels_N
    assert few.double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert many.double().mean().item() == pytest.approx(0.6, abs=0.03)
    assert (many | ~few).all()
    assert torch.equal(theory.wrong_assignment(labels_N, 5, 0.0, seed=4), labels_N)
    assert (theory.wrong_assignment(labels_N, 5, 1.0, seed=4) != labels_N).all()
    assert torch.equal(theory.wrong_assignment(torch.zeros(3, dtype=torch.long), 1, 0.0, 0), torch.zeros(3))


def test_error_grows_with_overlap_noise_and_wrong_assignments():
    seeds = range(3)

    def means(configs):
        return theory.sweep(configs, seeds).groupby(["router", "value"])["error"].mean()

    config = ClusterConfig()
    closer = means({-x: replace(config, separation=x) for x in (6.0, 4.0, 2.0)})
    noisier = means({x: replace(config, noise=x) for x in (0.0, 1.0, 3.0)})
    for errors in (closer, noisier):
        for router in errors.index.unique("router"):
            assert errors[router].is_monotonic_increasing
    wrong = (
        theory.wrong_share_sweep(config, (0.0, 0.2, 0.4), seeds).groupby(["router", "value"])["error"].mean()
    )
    assert wrong["M from labels"].is_monotonic_increasing
    assert wrong["oracle M, scored by k*"].is_monotonic_increasing
    assert wrong["M = I"].nunique() == 1
    assert wrong["repeat k*"].tolist() == pytest.approx([0, 0.2, 0.4], abs=0.03)


def test_hessian_is_that_of_autograd():
    draw = torch.Generator().manual_seed(0)
    tokens_ND = torch.randn(30, 3, generator=draw, dtype=torch.float64)
    labels_N = torch.randint(0, 4, (30,), generator=draw)
    embeddings = torch.randn(4, 3, generator=draw, dtype=torch.float64)

    def loss(flat):
        return torch.nn.functional.cross_entropy(tokens_ND @ flat.view(4, 3).T, labels_N)

    expected = torch.autograd.functional.hessian(loss, embeddings.flatten())
    found = theory.router_hessian(tokens_ND, (tokens_ND @ embeddings.T).softmax(1))
    torch.testing.assert_close(found, expected)

    moment = np.linalg.eigvalsh((tokens_ND.T @ tokens_ND).numpy())
    assert theory.hessian_condition(tokens_ND, 4) == pytest.approx(moment[-1] / moment[0])


def test_trained_embeddings_are_a_minimum():
    clusters = feature_clusters(ClusterConfig(40, 3, 4), seed=0)
    found = theory.trained_embeddings(clusters.tokens_ND, clusters.labels_N, 3, ridge=0.01).requires_grad_()
    loss = torch.nn.functional.cross_entropy(clusters.tokens_ND @ found.T, clusters.labels_N)
    (gradient,) = torch.autograd.grad(loss + 0.005 * found.square().sum(), found)
    assert gradient.abs().max() < 1e-9


def test_cluster_condition():
    deviation_ED = torch.tensor([[0.5, 2.0], [1.0, 1.0]], dtype=torch.float64)
    assert theory.cluster_condition(torch.ones(2, 2), deviation_ED) == pytest.approx((16 + 1) / 2)
    assert theory.cluster_condition(1 / deviation_ED, deviation_ED) == pytest.approx(1)


def test_table_has_its_baselines():
    config = replace(ClusterConfig(), num_per_cluster=60)
    table = theory.router_table(config, range(3))
    assert table.loc["M = I", "repeat k*"] == "-"
    assert table.loc["oracle M", "repeat k*"] == "0.000"
    assert table.loc["oracle M", "cond. cluster"] == "1.0"
    blind = float(table.loc["M = I", "trained, h shuffled"].split()[0])
    leaking = float(table.loc["oracle M", "trained, h shuffled"].split()[0])
    assert leaking + 0.1 < blind
    assert blind == pytest.approx(0.75, abs=0.07)


def test_bad_arguments():
    clusters = feature_clusters(ClusterConfig(5), 0)
    space = theory.spaces(clusters, 0)["M = I"]
    with pytest.raises(ValueError, match="'cosine'; use 'nearest' or 'inner'"):
        theory.scores(clusters.tokens_ND, clusters.centres_ED, space, "cosine")
    with pytest.raises(ValueError, match=r"got 1\.5, 4"):
        theory.wrong_assignment(clusters.labels_N, 4, 1.5, 0)
    with pytest.raises(ValueError, match=r"got 0\.5, 1"):
        theory.wrong_assignment(torch.zeros(4, dtype=torch.long), 1, 0.5, 0)
