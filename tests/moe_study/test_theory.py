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
    assert found["oracle M"]["nearest"] == found["M = I"]["nearest"] == found["M = I"]["inner"]


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


def test_table_has_its_baseline():
    """Error grows with wrong earlier assignments; the share of them is that of repeating k*."""
    table = theory.error_table(ClusterConfig(), range(3))
    assert table.loc["M = I", "repeat k*"] == "-"
    assert table.loc["oracle M", "repeat k*"] == "0.000"
    labels = [f"M from labels, {share:.0%} wrong" for share in theory.WRONG_SHARES]
    for column in table:
        errors = [float(cell.split()[0]) for cell in table.loc[labels, column]]
        assert errors == sorted(errors)
    assert errors == pytest.approx(theory.WRONG_SHARES, abs=0.03)


def test_bad_arguments():
    clusters = feature_clusters(ClusterConfig(5), 0)
    space = theory.spaces(clusters, 0)["M = I"]
    with pytest.raises(ValueError, match="'cosine'; use 'nearest' or 'inner'"):
        theory.scores(clusters.tokens_ND, clusters.centres_ED, space, "cosine")
    with pytest.raises(ValueError, match=r"got 1\.5, 4"):
        theory.wrong_assignment(clusters.labels_N, 4, 1.5, 0)
    with pytest.raises(ValueError, match=r"got 0\.5, 1"):
        theory.wrong_assignment(torch.zeros(4, dtype=torch.long), 1, 0.5, 0)
