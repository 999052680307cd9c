"""The Adaptive Clustering router, its statistics, controls and the router z-loss, against plain loops.

Shapes: N tokens, D width, E experts (and clusters), K chosen.
"""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import reference
import reference_ac
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_lib.moe import (
    ACConfig,
    AdaptiveClusteringRouter,
    CosineRouter,
    LinearRouter,
    MoE,
    adaptive_scales,
    frozen_scales,
    gradient_through_scales,
    load_balancing_loss,
    route,
    router_z_loss,
)
from moe_lib.rng import initialise

E, D = 4, 6
NORMALIZE = ["feature", "row", "global", "none"]
CONTROLS = {
    "ac": {},
    "variance": {"dispersion": "variance", "eps": 1e-2},
    "swin": {"normalize": "global", "max_ratio": 1.5},
    "unscaled": {"normalize": "none", "max_ratio": None},
    "gradient": {"gradient": True},
    "shuffled": {"shuffled": True},
    "pooled": {"pooled": True, "normalize": "row"},
    "matched": {"matched": True},
    "causal": {"causal": True},
    "causal-shuffled-matched": {"causal": True, "shuffled": True, "matched": True},
    "causal-pooled": {"causal": True, "pooled": True, "normalize": "global"},
}
every_control = pytest.mark.parametrize("options", CONTROLS.values(), ids=CONTROLS)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clustered(num_tokens=24, seed=0, num_experts=E, dim=D):
    """Tokens of uneven clusters, each with its own spread along each feature, and their clusters."""
    generator = torch.Generator().manual_seed(seed)
    assignment_N = torch.randint(num_experts, (num_tokens,), generator=generator)
    spread_ED = torch.rand(num_experts, dim, generator=generator, dtype=torch.float64) * 2 + 0.05
    centre_ED = random(num_experts, dim, seed=seed + 1)
    tokens_ND = centre_ED[assignment_N] + spread_ED[assignment_N] * random(num_tokens, dim, seed=seed + 2)
    return tokens_ND, assignment_N


def decision(assignment_N, num_experts=E):
    """A decision of an earlier layer with these experts on top."""
    return route(nn.functional.one_hot(assignment_N, num_experts).double())


def router_of(seed=0, top_k=None, num_experts=E, dim=D, **options):
    """In float64, with embeddings that are neither orthogonal nor of unit norm."""
    torch.manual_seed(seed)
    router = AdaptiveClusteringRouter(dim, num_experts, top_k, ACConfig(**options)).double()
    router.embeddings_ED.data.copy_(random(num_experts, dim, seed=seed + 7))
    return router


def rows_of(router, assignment_N, tokens_ND, num_experts=E):
    """M's diagonal per token, read off the scaled tokens."""
    return router.route_and_scale(tokens_ND, decision(assignment_N, num_experts))[1] / tokens_ND


# ------------------------------------------------------------------------------------- statistics


@given(
    assignment=st.lists(st.integers(0, E - 1), max_size=24),
    dispersion=st.sampled_from(["mad", "variance"]),
    eps=st.sampled_from([1e-4, 0.0, 0.3]),
    normalize=st.sampled_from(NORMALIZE),
    max_ratio=st.sampled_from([10.0, 1.5, 0.5, None]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    constant_feature=st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_scales_equal_the_loops_whatever_the_clusters(
    assignment, dispersion, eps, normalize, max_ratio, scale, constant_feature
):
    """Empty, one-token and two-token clusters, no tokens at all, features that do not vary."""
    assignment_N = torch.tensor(assignment, dtype=torch.int64)
    tokens_ND = random(len(assignment), D) * scale
    if constant_feature and eps:
        tokens_ND[:, 1] = 0.5  # exact in binary, so that the mean is too
    options = {"dispersion": dispersion, "eps": eps, "normalize": normalize, "max_ratio": max_ratio}
    scales_ED = adaptive_scales(tokens_ND, assignment_N, E, **options)
    assert (scales_ED > 0).all()
    expected_ED = reference_ac.adaptive_scales(tokens_ND, assignment_N, E, **options)
    np.testing.assert_allclose(scales_ED, expected_ED, rtol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_forms_of_the_authors(seed):
    tokens_ND, assignment_N = clustered(60, seed)
    np.testing.assert_allclose(
        adaptive_scales(tokens_ND, assignment_N, E),
        reference_ac.language_form(tokens_ND, assignment_N, E),
        rtol=1e-10,
    )
    np.testing.assert_allclose(
        adaptive_scales(tokens_ND, assignment_N, E, normalize="global", max_ratio=1.5),
        reference_ac.swin_form(tokens_ND, assignment_N, E),
        rtol=1e-10,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalize": "none"}, [[1, 4], [2, 1 / 2]]),
        ({"normalize": "none", "max_ratio": 0.8}, [[1, 3 / 2], [3 / 2, 1 / 2]]),
        ({"normalize": "global"}, [[8 / 15, 32 / 15], [16 / 15, 4 / 15]]),
        ({"normalize": "row"}, [[2 / 5, 8 / 5], [8 / 5, 2 / 5]]),
        ({"normalize": "feature"}, [[2 / 3, 16 / 9], [4 / 3, 2 / 9]]),
        ({"normalize": "none", "dispersion": "variance", "max_ratio": None}, [[1, 16], [4, 1 / 4]]),
    ],
)
def test_tight_features_get_large_scales(options, expected):
    """By hand: mean absolute deviations [[1, 1/4], [1/2, 2]], so W = [[1, 4], [2, 1/2]] and m = 15/8."""
    tokens_ND = torch.tensor([[0, 0], [2, 0.5], [0, 0], [1, 4]], dtype=torch.float64)
    scales_ED = adaptive_scales(tokens_ND, torch.tensor([0, 0, 1, 1]), 2, eps=0.0, **options)
    torch.testing.assert_close(scales_ED, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_an_eps_of_zero_is_refused_where_a_spread_has_no_inverse(scale):
    tokens_ND, assignment_N = clustered()
    with pytest.raises(ValueError, match="eps must be positive where a feature hardly varies"):
        adaptive_scales((tokens_ND * scale).float(), assignment_N, E, eps=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_get_float32_statistics(dtype):
    tokens_ND, assignment_N = clustered()
    tokens_ND = tokens_ND.to(dtype)
    scales_ED = adaptive_scales(tokens_ND, assignment_N, E)
    assert scales_ED.dtype == torch.float32
    assert torch.equal(scales_ED, adaptive_scales(tokens_ND.float(), assignment_N, E))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adaptive_scales(tokens_ND, assignment_N, E), scales_ED)


def test_float32_to_1e_5():
    tokens_ND, assignment_N = clustered(200)
    exact_ED = adaptive_scales(tokens_ND, assignment_N, E)
    assert exact_ED.dtype == torch.float64
    torch.testing.assert_close(
        adaptive_scales(tokens_ND.float(), assignment_N, E).double(), exact_ED, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dispersion", ["mad", "variance"])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize(("eps", "max_ratio"), [(1e-4, 10.0), (0.0, None), (1e-2, 1.3)])
def test_scales_pass_gradcheck(dispersion, normalize, eps, max_ratio):
    """With a one-token and an empty cluster beside two valid ones."""
    assignment_N = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    tokens_ND = random(8, 3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x_ND: adaptive_scales(x_ND, assignment_N, E, dispersion, eps, normalize, max_ratio),
        (tokens_ND,),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1e-4}, r"eps.*-0\.0001"),
        ({"eps": float("nan")}, "eps.*nan"),
        ({"eps": float("inf")}, "eps.*inf"),
        ({"max_ratio": 0.0}, r"max_ratio.*0\.0"),
        ({"max_ratio": -2.0}, r"max_ratio.*-2\.0"),
        ({"max_ratio": float("nan")}, "max_ratio.*nan"),
        ({"dispersion": "std"}, "dispersion 'std'"),
        ({"normalize": "expert"}, "normalize 'expert'"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive_scales(*clustered(), E, **options)
    with pytest.raises(ValueError, match=message):
        ACConfig(**options)


def test_unusable_tokens_and_assignments_are_named():
    tokens_ND, assignment_N = clustered()
    for outside in (-1, E, 99):
        wrong_N = assignment_N.clone()
        wrong_N[5] = outside
        with pytest.raises(ValueError, match=f"assignment must lie in 0 to {E - 1}, got .*{outside}"):
            adaptive_scales(tokens_ND, wrong_N, E)
    with pytest.raises(ValueError, match=r"assignment must have shape \[24\].*got \[23\]"):
        adaptive_scales(tokens_ND, assignment_N[1:], E)
    with pytest.raises(ValueError, match=r"tokens must have shape \[N, D\], got \[2, 12, 6\]"):
        adaptive_scales(tokens_ND.view(2, 12, D), assignment_N.view(2, 12), E)
    with pytest.raises(ValueError, match=r"num_experts.*0"):
        adaptive_scales(tokens_ND, assignment_N, 0)


# ---------------------------------------------------------------------------------- cosine router


def test_cosine_router_scores_with_unit_norm_experts_and_whole_tokens():
    router, tokens_ND = CosineRouter(D, E).double(), random(9, D)
    router.embeddings_ED.data.copy_(3 * random(E, D, seed=5))
    expected_NE = reference_ac.scores(tokens_ND, router.embeddings_ED)
    np.testing.assert_allclose(router(tokens_ND).logits_NE.detach(), expected_NE, rtol=1e-10)
    torch.testing.assert_close(router(2 * tokens_ND).logits_NE, 2 * router(tokens_ND).logits_NE)
    assert not router(torch.zeros(1, D, dtype=torch.float64)).logits_NE.any()  # no bias
    assert [name for name, _ in router.named_parameters()] == ["embeddings_ED"]


@pytest.mark.parametrize("num_experts", [1, 4, 6])
def test_expert_embeddings_start_orthonormal(num_experts):
    router = CosineRouter(D, num_experts)
    for _ in range(2):
        embeddings_ED = router.embeddings_ED.detach().clone()
        torch.testing.assert_close(embeddings_ED @ embeddings_ED.T, torch.eye(num_experts))
        router.reset_parameters()
        assert not torch.equal(router.embeddings_ED, embeddings_ED)


def test_more_experts_than_features():
    logits_NE = CosineRouter(3, 8)(torch.eye(3)).logits_NE
    torch.testing.assert_close(logits_NE.square().sum(0), torch.ones(8))


# -------------------------------------------------------------------------------------- AC router


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("arm", ["ac", "variance", "swin", "unscaled", "gradient"])
def test_router_equals_the_loops(arm, top_k):
    tokens_ND, assignment_N = clustered()
    router, options = router_of(top_k=top_k, **CONTROLS[arm]), dict(CONTROLS[arm])
    options.pop("gradient", None)
    scales_ED = reference_ac.adaptive_scales(tokens_ND, assignment_N, E, **options)
    expected_NE = reference_ac.scores(tokens_ND, router.embeddings_ED, assignment_N, scales_ED)
    routing, scaled_ND = router.route_and_scale(tokens_ND, decision(assignment_N))
    np.testing.assert_allclose(routing.logits_NE.detach(), expected_NE, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled_ND, tokens_ND * torch.tensor(scales_ED)[assignment_N])
    for field, expected in zip(routing, route(routing.logits_NE, top_k), strict=True):
        assert torch.equal(field, expected)
    for field, expected in zip(routing, router(tokens_ND, decision(assignment_N)), strict=True):
        assert torch.equal(field, expected)


def test_the_cluster_is_the_previous_top_1_expert():
    tokens_ND, router = random(20, D), router_of()
    previous = route(random(20, E, seed=3))
    assignment_N = torch.tensor([max(range(E), key=lambda e: row[e]) for row in previous.probs_NE.tolist()])
    expected_NE = router(tokens_ND, decision(assignment_N)).logits_NE
    for top_k in (None, 1, 3):
        used = previous if top_k is None else previous.top(top_k)
        assert torch.equal(router(tokens_ND, used).logits_NE, expected_NE)


@every_control
def test_without_a_previous_decision_it_is_the_cosine_router(options):
    tokens_ND, router = random(9, D), router_of(top_k=2, **options)
    cosine = CosineRouter(D, E, 2).double()
    cosine.load_state_dict({"embeddings_ED": router.embeddings_ED})
    for field, expected in zip(router(tokens_ND), cosine(tokens_ND), strict=True):
        assert torch.equal(field, expected)


def isotropic(factors, seed=0):
    """Clusters of 2 D tokens: a centre plus and minus a step along each axis, as long as its factor."""
    cross_ND = torch.cat([torch.eye(D), -torch.eye(D)]).double()
    tokens_ND = torch.cat([f * cross_ND + random(D, seed=seed + i) for i, f in enumerate(factors)])
    return tokens_ND, torch.arange(len(factors)).repeat_interleave(2 * D)


@pytest.mark.parametrize("dispersion", ["mad", "variance"])
def test_isotropic_clusters_under_row_are_the_cosine_router(dispersion):
    tokens_ND, assignment_N = isotropic([0.3, 1.0, 1.0, 4.0])
    router = router_of(normalize="row", dispersion=dispersion)
    torch.testing.assert_close(
        router(tokens_ND, decision(assignment_N)).logits_NE, router(tokens_ND).logits_NE
    )


@pytest.mark.parametrize("normalize", ["feature", "global", "none"])
@pytest.mark.parametrize("dispersion", ["mad", "variance"])
def test_isotropic_clusters_otherwise_differ_from_it_by_one_factor_per_cluster(normalize, dispersion):
    factors = [0.3, 1.0, 1.0, 4.0]
    tokens_ND, assignment_N = isotropic(factors)
    router = router_of(normalize=normalize, dispersion=dispersion, eps=0.0)
    routing, cosine = router(tokens_ND, decision(assignment_N)), router(tokens_ND)
    ratio_NE = routing.logits_NE / cosine.logits_NE
    factor_E = torch.tensor(factors, dtype=torch.float64) ** (-1 if dispersion == "mad" else -2)
    expected_N1 = (factor_E / factor_E[0])[assignment_N, None]
    torch.testing.assert_close(ratio_NE / ratio_NE[0, 0], expected_N1.expand_as(ratio_NE))
    assert (ratio_NE > 0).all()
    assert torch.equal(routing.top(E).indices_NK, cosine.top(E).indices_NK)


@pytest.mark.parametrize("normalize", ["feature", "row", "global"])
def test_isotropic_clusters_of_one_dispersion_are_the_cosine_router(normalize):
    tokens_ND, assignment_N = isotropic([0.7] * E)
    router = router_of(normalize=normalize)
    torch.testing.assert_close(
        router(tokens_ND, decision(assignment_N)).logits_NE, router(tokens_ND).logits_NE
    )


@pytest.mark.parametrize("num_tokens", [0, 1])
@every_control
def test_no_token_and_one_token(options, num_tokens):
    router, tokens_ND = router_of(top_k=2, **options), random(num_tokens, D).requires_grad_()
    for _ in range(2):
        routing = router(tokens_ND, decision(torch.full((num_tokens,), 1)))
        assert routing.weights_NK.shape == (num_tokens, 2)
        routing.logits_NE.sum().backward()
        assert tokens_ND.grad.isfinite().all()


@every_control
def test_nothing_depends_on_values_so_it_compiles_to_one_graph(options):
    """Neither a shape nor a branch, in training or evaluation: on a GPU nothing waits for the device."""
    tokens_ND, assignment_N = clustered()
    plain, traced = router_of(top_k=2, **options), router_of(top_k=2, **options)
    torch._dynamo.reset()
    compiled = torch.compile(traced, backend="eager", fullgraph=True, dynamic=False)
    for training in (True, True, False):
        plain.train(training)
        traced.train(training)
        expected = plain(tokens_ND, decision(assignment_N))
        torch.testing.assert_close(compiled(tokens_ND, decision(assignment_N)), expected)


# -------------------------------------------------------------------------------------- precision


@every_control
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gate_and_scaled_tokens_are_float32(options, dtype):
    tokens_ND, assignment_N = clustered()
    router = router_of(**options).to(dtype)
    tokens_ND, previous = tokens_ND.to(dtype), decision(assignment_N)
    for _ in range(2):  # the causal form has statistics in the second step
        routing, scaled_ND = router.route_and_scale(tokens_ND, previous)
        assert routing.logits_NE.dtype == routing.probs_NE.dtype == scaled_ND.dtype == torch.float32
    router.eval()
    expected = router.route_and_scale(tokens_ND, previous)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing, scaled_ND = router.route_and_scale(tokens_ND, previous)
    assert torch.equal(routing.logits_NE, expected[0].logits_NE)
    assert torch.equal(scaled_ND, expected[1])


def test_a_bfloat16_model_keeps_float32_averages():
    tokens_ND, assignment_N = clustered()
    router = router_of(causal=True).float()
    router(tokens_ND.float(), decision(assignment_N))
    averages_ED = router.running_ED.clone()
    router.bfloat16()
    assert router.embeddings_ED.dtype == torch.bfloat16
    assert router.running_ED.dtype == torch.float32
    assert torch.equal(router.running_ED, averages_ED)
    router(2 * tokens_ND.bfloat16(), decision(assignment_N))
    expected_ED = 1.1 * averages_ED  # 0.9 of the first step, 0.1 of one with twice the dispersion
    torch.testing.assert_close(router.running_ED, expected_ED, rtol=1e-2, atol=0)
    assert router.double().running_ED.dtype == torch.float64


# -------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "arm", [name for name, options in CONTROLS.items() if "gradient" not in options], ids=str
)
def test_no_gradient_flows_through_m(arm):
    """The gradient is that of the router with M held constant."""
    tokens_ND, assignment_N = clustered()
    router, weights_NE = router_of(**CONTROLS[arm]), random(24, E, seed=9)
    router(tokens_ND, decision(assignment_N))
    router.eval()
    tokens_ND.requires_grad_()
    loss = (router(tokens_ND, decision(assignment_N)).logits_NE * weights_NE).sum()
    (gradient_ND,) = torch.autograd.grad(loss, tokens_ND)

    rows_ND = router._rows(tokens_ND, assignment_N)[assignment_N].detach()
    scaled_ND = tokens_ND * rows_ND
    if router.config.matched:
        scaled_ND = scaled_ND * tokens_ND.norm(dim=1, keepdim=True) / scaled_ND.norm(dim=1, keepdim=True)
    loss = (router(scaled_ND).logits_NE * weights_NE).sum()
    torch.testing.assert_close(gradient_ND, torch.autograd.grad(loss, tokens_ND)[0])


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"dispersion": "variance", "normalize": "global", "max_ratio": 1.5}, {"shuffled": True},
        {"pooled": True, "normalize": "row"},
    ],
    ids=["ac", "swin", "shuffled", "pooled"],
)  # fmt: skip
def test_gradient_flows_through_m_as_an_option(options, matched):
    tokens_ND, assignment_N = clustered(10)
    router = router_of(gradient=True, matched=matched, **options)
    tokens_ND.requires_grad_()

    def logits(tokens_ND, embeddings_ED):
        return torch.func.functional_call(
            router, {"embeddings_ED": embeddings_ED}, (tokens_ND, decision(assignment_N))
        ).logits_NE

    assert torch.autograd.gradcheck(logits, (tokens_ND, router.embeddings_ED))
    through_M = torch.autograd.grad(router(tokens_ND, decision(assignment_N)).probs_NE[:, 0].sum(), tokens_ND)
    router.config = dataclasses.replace(router.config, gradient=False)
    around_M = torch.autograd.grad(router(tokens_ND, decision(assignment_N)).probs_NE[:, 0].sum(), tokens_ND)
    assert not torch.allclose(through_M[0], around_M[0], rtol=1e-3)


# --------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("num_experts", [2, 3, 4, 16])
def test_shuffled_is_a_derangement_fixed_by_the_seed(num_experts):
    def drawn(seed):
        router = AdaptiveClusteringRouter(D, num_experts, config=ACConfig(shuffled=True))
        initialise(router, seed)
        return router.derangement_E

    for seed in range(20):
        derangement_E = drawn(seed)
        assert torch.equal(derangement_E.sort().values, torch.arange(num_experts))
        assert (derangement_E != torch.arange(num_experts)).all()
        assert torch.equal(derangement_E, drawn(seed))
    distinct = {tuple(drawn(seed).tolist()) for seed in range(20)}
    assert len(distinct) > 1 or num_experts == 2


def test_shuffled_uses_the_rows_of_other_clusters():
    tokens_ND, assignment_N = clustered()
    router = router_of(shuffled=True)
    scales_ED = adaptive_scales(tokens_ND, assignment_N, E)
    expected_ND = scales_ED[router.derangement_E][assignment_N]
    for _ in range(2):  # fixed
        torch.testing.assert_close(rows_of(router, assignment_N, tokens_ND), expected_ND)
    assert not torch.allclose(scales_ED[assignment_N], expected_ND)


def test_shuffled_travels_with_the_weights():
    source, other = router_of(seed=0, shuffled=True), router_of(seed=1, shuffled=True)
    assert not torch.equal(source.derangement_E, other.derangement_E)
    other.load_state_dict(source.state_dict())
    assert torch.equal(source.derangement_E, other.derangement_E)


@pytest.mark.parametrize("normalize", ["row", "global", "none"])
def test_pooled_has_equal_rows_whatever_the_clusters(normalize):
    tokens_ND, assignment_N = clustered()
    router = router_of(pooled=True, normalize=normalize)
    rows_ND = rows_of(router, assignment_N, tokens_ND)
    expected_ED = reference_ac.adaptive_scales(tokens_ND, 0 * assignment_N, 1, normalize=normalize)
    torch.testing.assert_close(rows_ND, torch.tensor(expected_ED).expand_as(rows_ND))
    torch.testing.assert_close(rows_of(router, assignment_N.roll(1), tokens_ND), rows_ND)


@every_control
def test_matched_keeps_every_norm_and_the_direction(options):
    tokens_ND, assignment_N = clustered()
    tokens_ND[3] = 0
    previous = decision(assignment_N)
    matched = router_of(**{**options, "matched": True})
    plain = router_of(**{**options, "matched": False})
    for router in (matched, plain):
        router(tokens_ND, previous)
    scaled_ND, plain_ND = (router.route_and_scale(tokens_ND, previous)[1] for router in (matched, plain))
    torch.testing.assert_close(scaled_ND.norm(dim=1), tokens_ND.norm(dim=1))
    torch.testing.assert_close(
        nn.functional.normalize(scaled_ND, dim=1), nn.functional.normalize(plain_ND, dim=1)
    )
    assert not scaled_ND[3].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooled": True}, "pooled.*'feature'"),
        ({"pooled": True, "normalize": "row", "shuffled": True}, "shuffled has no effect with pooled"),
        ({"causal": True, "gradient": True}, "gradient has no effect with causal"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ACConfig(**options)


def test_one_expert_cannot_be_shuffled():
    with pytest.raises(ValueError, match="at least 2 experts, got 1"):
        AdaptiveClusteringRouter(D, 1, config=ACConfig(shuffled=True))


@pytest.mark.parametrize("make", [CosineRouter, AdaptiveClusteringRouter])
def test_tokens_of_another_shape_are_refused(make):
    for shape in ((5, D + 1), (2, 5, D), (D,)):
        with pytest.raises(ValueError, match=rf"\[N, {D}\], got \[{shape[0]}"):
            make(D, E)(torch.zeros(shape))


def test_a_previous_decision_for_other_tokens_or_experts_is_refused():
    router = AdaptiveClusteringRouter(D, E)
    for num_tokens, num_experts in ((8, E), (9, E + 1), (9, E - 1)):
        with pytest.raises(ValueError, match=rf"\(9, {E}\), got \({num_tokens}, {num_experts}\)"):
            router(torch.zeros(9, D), route(torch.zeros(num_tokens, num_experts)))


# ----------------------------------------------------------------------------------------- causal


def trained_router(steps=3, **options):
    router = router_of(**{"causal": True, **options})
    for step in range(steps):
        tokens_ND, assignment_N = clustered(seed=10 * step)
        router(tokens_ND, decision(assignment_N))
    return router


CAUSAL = [{}, {"shuffled": True}, {"matched": True}, {"pooled": True, "normalize": "row"}, {"mixed": True}]
CAUSAL_IDS = ["ac", "shuffled", "matched", "pooled", "mixed"]
every_causal_form = pytest.mark.parametrize("options", CAUSAL, ids=CAUSAL_IDS)


def test_causal_averages_equal_the_loops():
    """A cluster's first valid step counts whole; steps without 2 of its tokens change nothing."""
    router = router_of(causal=True)
    running = {}
    assignments = [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 2], [2, 2, 2, 2, 1, 1]]
    for step, assignment in enumerate(assignments):
        tokens_ND, assignment_N = random(6, D, seed=step), torch.tensor(assignment)
        rows_ND = rows_of(router, assignment_N, tokens_ND)
        weight = {k: [1 / (s + 1e-4) for s in row] for k, row in running.items()}
        entries = [w for row in weight.values() for w in row]
        for n, k in enumerate(assignment):
            for q in range(D):
                expected = 1.0
                if k in weight:
                    limited = [min(row[q], 10 * sum(entries) / len(entries)) for row in weight.values()]
                    expected = min(weight[k][q], 10 * sum(entries) / len(entries)) / np.mean(limited)
                assert rows_ND[n, q].item() == pytest.approx(expected, rel=1e-9)
        for k, row in reference_ac.dispersions(tokens_ND, assignment_N, E).items():
            before = running.get(k, row)
            running[k] = [0.9 * old + 0.1 * new for old, new in zip(before, row, strict=True)]
    assert sorted(running) == [0, 1, 2]
    assert router.seen_E.tolist() == [True, True, True, False]
    np.testing.assert_allclose(
        router.running_ED[:3], [running[k] for k in range(3)], rtol=1e-7
    )  # float32 shares


@every_causal_form
@pytest.mark.parametrize("training", [True, False])
def test_causal_before_any_statistics_is_the_cosine_router(options, training):
    tokens_ND, assignment_N = clustered()
    router = router_of(**{"causal": True, **options}).train(training)
    torch.testing.assert_close(
        router(tokens_ND, decision(assignment_N)).logits_NE, router(tokens_ND).logits_NE
    )


def logits_of_first_tokens(router, tokens_ND, assignment_N, count):
    """In a copy, so that a training step does not count."""
    copy = router_of(**dataclasses.asdict(router.config))
    copy.load_state_dict(router.state_dict())
    copy.train(router.training)
    return copy(tokens_ND, decision(assignment_N)).logits_NE[:count]


@every_causal_form
@pytest.mark.parametrize("training", [True, False])
def test_causal_routing_of_a_token_ignores_later_tokens_and_other_sequences(options, training):
    """Four sequences of six tokens: nothing after token 3, nor another sequence, changes tokens 0 to 2."""
    router = trained_router(**options).train(training)
    tokens_ND, assignment_N = clustered()
    expected_NE = logits_of_first_tokens(router, tokens_ND, assignment_N, 3)
    for first_changed in (3, 6):
        other_ND, other_N = tokens_ND.clone(), assignment_N.clone()
        other_ND[first_changed:] = 50 * random(24 - first_changed, D, seed=77)
        other_N[first_changed:] = other_N[first_changed:].roll(1)
        actual_NE = logits_of_first_tokens(router, other_ND, other_N, 3)
        torch.testing.assert_close(actual_NE, expected_NE, rtol=1e-12, atol=1e-12)


def test_the_papers_form_leaks_from_later_tokens_and_other_sequences():
    """What the causal form is there to avoid; without this the test above might be empty."""
    router = router_of().eval()
    tokens_ND, assignment_N = clustered()
    expected_NE = logits_of_first_tokens(router, tokens_ND, assignment_N, 3)
    for first_changed in (3, 6):
        other_ND = tokens_ND.clone()
        other_ND[first_changed:] = 50 * random(24 - first_changed, D, seed=77)
        actual_NE = logits_of_first_tokens(router, other_ND, assignment_N, 3)
        assert (actual_NE - expected_NE).abs().max() > 0.1


@every_causal_form
def test_causal_evaluation_one_by_one_equals_256_at_once(options):
    router = trained_router(top_k=2, **options).eval()
    tokens_ND, assignment_N = clustered(256, seed=99)
    whole = router(tokens_ND, decision(assignment_N))
    for n in range(256):
        single = router(tokens_ND[n : n + 1], decision(assignment_N[n : n + 1]))
        torch.testing.assert_close(single.logits_NE[0], whole.logits_NE[n], rtol=1e-12, atol=1e-12)
        assert torch.equal(single.indices_NK[0], whole.indices_NK[n])


@every_causal_form
def test_only_training_steps_with_a_previous_decision_count(options):
    router, (tokens_ND, assignment_N) = trained_router(**options), clustered(seed=99)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    router(tokens_ND)
    router.eval()
    router(tokens_ND, decision(assignment_N))
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    router.train()
    router(tokens_ND, decision(assignment_N))
    changed = {name for name, value in router.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"running_ED"}


def test_causal_training_resumes_from_its_state():
    whole, resumed = trained_router(4), router_of(causal=True)
    resumed.load_state_dict(trained_router(2).state_dict())
    for step in (2, 3):
        tokens_ND, assignment_N = clustered(seed=10 * step)
        resumed(tokens_ND, decision(assignment_N))
    assert torch.equal(whole.running_ED, resumed.running_ED)
    assert torch.equal(whole.seen_E, resumed.seen_E)


def test_causal_backward_after_the_averages_moved_on():
    tokens_ND, assignment_N = clustered()
    router, tokens_ND = trained_router(), tokens_ND.requires_grad_()
    expected_ND = torch.autograd.grad(
        router(tokens_ND, decision(assignment_N)).logits_NE[:, 0].sum(), tokens_ND
    )[0]
    router = trained_router()
    loss = router(tokens_ND, decision(assignment_N)).logits_NE[:, 0].sum()
    router(5 * tokens_ND, decision(assignment_N))
    assert torch.equal(torch.autograd.grad(loss, tokens_ND)[0], expected_ND)
    assert not router.running_ED.requires_grad


def test_a_fresh_start_forgets_the_averages():
    router = trained_router()
    initialise(router, 0)
    assert not router.seen_E.any()
    assert not router.running_ED.any()


# ----------------------------------------------------------------------------------------- losses


def test_z_loss_passes_gradcheck_and_stays_finite():
    logits_NE = random(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: router_z_loss(route(z, top_k=2)), (logits_NE,))
    extreme_NE = torch.tensor([[1e4, -1e4], [-1e4, -1e4]], requires_grad=True)
    loss = router_z_loss(route(extreme_NE))
    loss.backward()
    assert loss.item() == pytest.approx(1e8, rel=1e-3)
    assert extreme_NE.grad.isfinite().all()


def test_z_loss_of_half_precision_scores_is_float32():
    logits_NE = random(5, 4).bfloat16()
    loss = router_z_loss(route(logits_NE))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_ac.router_z_loss(logits_NE.double()), rel=1e-6)


# ----------------------------------------------------------------------------------------- layers


class Chain(nn.Module):
    """Three residual MoE layers: an ordinary router, then AC routers fed with the decision before."""

    def __init__(self, config, top_k=2, num_experts=3, dim=4):
        super().__init__()
        routers = [LinearRouter(dim, num_experts, top_k)]
        routers += [AdaptiveClusteringRouter(dim, num_experts, top_k, config) for _ in range(2)]
        self.layers = nn.ModuleList(MoE(dim, num_experts, 5, router=router) for router in routers)

    def forward(self, x_ND):
        routings = []
        for layer in self.layers:
            out_ND, routing = layer(x_ND, routings[-1] if routings else None)
            routings.append(routing)
            x_ND = x_ND + out_ND
        return x_ND, routings


def chain(config=None, **options):
    model = Chain(config, **options).double()
    initialise(model, 5)
    return model


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("options", [{"gradient": True}, {"causal": True}], ids=["gradient", "causal"])
def test_chained_layers_and_their_losses_pass_gradcheck(options, top_k):
    """Where M is a function of the tokens with gradient, or does not depend on them."""
    model = chain(ACConfig(**options), top_k=top_k)
    for step in range(2):
        model(random(9, 4, seed=step))
    model.eval()
    names, values = zip(*model.named_parameters(), strict=True)

    def outputs(x_ND, *values):
        out_ND, routings = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x_ND,))
        return out_ND, sum(load_balancing_loss(r) + router_z_loss(r) for r in routings)

    assert torch.autograd.gradcheck(outputs, (random(6, 4, seed=8).requires_grad_(), *values), fast_mode=True)


@every_control
def test_backward_through_a_chain_reaches_every_parameter(options):
    model, x_ND = chain(ACConfig(**options)), random(9, 4).requires_grad_()
    for _ in range(2):
        model(x_ND)[0].square().sum().backward()
    assert x_ND.grad.isfinite().all()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


# ------------------------------------------------------------------------------------------- mixed


@pytest.mark.parametrize("top_k", [1, 2, 4, None])
@pytest.mark.parametrize(
    "options", [{}, {"matched": True}, {"normalize": "global", "max_ratio": 1.5}], ids=str
)
def test_mixed_scales_equal_the_loops(options, top_k):
    """The mean of the rows that the previous choice names, by its weights; statistics stay top-1."""
    tokens_ND, router = random(30, D), router_of(mixed=True, **options)
    previous = route(random(30, E, seed=3), top_k)
    cluster_N = reference.array(previous.probs_NE).argmax(1)
    settings = {key: value for key, value in options.items() if key != "matched"}
    rows_ED = reference_ac.adaptive_scales(tokens_ND, cluster_N, E, **settings)
    expected_ND = np.zeros((30, D))
    for n in range(30):
        for k, weight in zip(previous.indices_NK[n].tolist(), previous.weights_NK[n].tolist(), strict=True):
            weight /= previous.weights_NK[n].sum().item()  # 1, but for the probability of a single expert
            expected_ND[n] += weight * rows_ED[k] * reference.array(tokens_ND[n])
        if "matched" in options:
            expected_ND[n] *= np.linalg.norm(tokens_ND[n]) / np.linalg.norm(expected_ND[n])
    routing, scaled_ND = router.route_and_scale(tokens_ND, previous)
    np.testing.assert_allclose(scaled_ND, expected_ND, rtol=1e-9, atol=1e-12)
    expected_NE = reference_ac.scores(expected_ND, router.embeddings_ED)
    np.testing.assert_allclose(routing.logits_NE.detach(), expected_NE, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"mixed": True}, {"mixed": True, "causal": True}, {"mixed": True, "gradient": True}], ids=str
)
def test_mixed_shares_are_part_of_m(options):
    """Its gradient reaches the decision before as an option alone."""
    earlier_NE = random(30, E, seed=3).requires_grad_()
    router = router_of(**options)
    for _ in range(2):
        logits_NE = router(random(30, D), route(earlier_NE, 2)).logits_NE
    gradient = torch.autograd.grad(logits_NE.square().sum(), earlier_NE, allow_unused=True)[0]
    assert (gradient is not None and gradient.abs().max() > 1e-3) == ("gradient" in options)


def test_pooled_rows_cannot_be_mixed():
    with pytest.raises(ValueError, match=r"mixed.*pooled"):
        ACConfig(pooled=True, mixed=True, normalize="row")


# ----------------------------------------------------------------------------- M held, M differentiated


class TwoLayers(nn.Module):
    """What the two contexts are used on: a model whose second router is fed by its first."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.second = router_of(1, 2), router_of(2, 2, **options)
        self.eval()

    def forward(self, tokens_ND):
        return self.second(tokens_ND, self.first(tokens_ND))


FORMS = [
    {}, {"shuffled": True}, {"pooled": True, "normalize": "row"}, {"matched": True}, {"mixed": True},
    {"normalize": "global", "max_ratio": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_frozen_scales_are_those_of_the_clean_tokens(options):
    """Whatever goes in, and however many tokens: M's rows stay, a token's cluster is its own."""
    model, clean_ND = TwoLayers(**options), random(40, D)
    first = model.first(clean_ND)
    rows_ED = model.second._rows(clean_ND, first.probs_NE.argmax(1))
    before = model(clean_ND).logits_NE
    with frozen_scales(model, lambda: model(clean_ND)):
        torch.testing.assert_close(model(clean_ND).logits_NE, before)
        for other_ND in (3 * random(25, D, seed=5), random(1, D, seed=6), clean_ND[:7]):
            previous = model.first(other_ND)
            if "mixed" in options:
                scaled_ND = other_ND * (previous.dense_weights() @ rows_ED)
            else:
                scaled_ND = other_ND * rows_ED[previous.probs_NE.argmax(1)]
            if "matched" in options:
                scaled_ND *= other_ND.norm(dim=1, keepdim=True) / scaled_ND.norm(dim=1, keepdim=True)
            expected_NE = reference_ac.scores(scaled_ND, model.second.embeddings_ED)
            np.testing.assert_allclose(model(other_ND).logits_NE.detach(), expected_NE, rtol=1e-9, atol=1e-12)
    for tokens_ND in (clean_ND, random(25, D, seed=5)):
        torch.testing.assert_close(model(tokens_ND), TwoLayers(**options)(tokens_ND))


def test_nothing_is_frozen_after_an_exception():
    model, clean_ND, other_ND = TwoLayers(), random(40, D), random(40, D, seed=5)
    expected = model(other_ND)
    with pytest.raises(RuntimeError, match="inside"), frozen_scales(model, lambda: model(clean_ND)):
        raise RuntimeError("inside")
    torch.testing.assert_close(model(other_ND), expected)

    def broken():
        model(clean_ND)
        raise RuntimeError("clean")

    with pytest.raises(RuntimeError, match="clean"), frozen_scales(model, broken):
        pass
    torch.testing.assert_close(model(other_ND), expected)


@pytest.mark.parametrize("gradient", [False, True])
def test_no_gradient_flows_through_frozen_scales(gradient):
    model, clean_ND = TwoLayers(gradient=gradient), random(20, D)
    rows_ED = model.second._rows(clean_ND, model.first(clean_ND).probs_NE.argmax(1)).detach()
    tokens_ND = random(20, D, seed=5).requires_grad_()
    scales_ND = rows_ED[model.first(tokens_ND).probs_NE.argmax(1)]
    expected = torch.autograd.grad(model.second(tokens_ND * scales_ND).logits_NE.square().sum(), tokens_ND)
    with frozen_scales(model, lambda: model(clean_ND)):
        actual = torch.autograd.grad(model(tokens_ND).logits_NE.square().sum(), tokens_ND)
    torch.testing.assert_close(actual, expected)


def test_freezing_a_causal_router_changes_nothing():
    model = TwoLayers(causal=True).train()
    for step in range(2):
        model(random(30, D, seed=step))
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other_ND = random(9, D, seed=5)
    expected = model(other_ND)
    with frozen_scales(model, lambda: model(random(30, D, seed=8))):
        torch.testing.assert_close(model(other_ND), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def input_gradient(model, tokens_ND):
    tokens_ND = tokens_ND.clone().requires_grad_()
    return torch.autograd.grad(model(tokens_ND).logits_NE.square().sum(), tokens_ND)[0]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradients_go_through_scales_where_asked(options):
    model, tokens_ND = TwoLayers(**options), random(20, D)
    config, around_ND = model.second.config, input_gradient(model, tokens_ND)
    with gradient_through_scales(model):
        through_ND = input_gradient(model, tokens_ND)
        torch.testing.assert_close(model(tokens_ND), TwoLayers(**options)(tokens_ND))  # the values stay
    torch.testing.assert_close(through_ND, input_gradient(TwoLayers(gradient=True, **options), tokens_ND))
    assert not torch.allclose(through_ND, around_ND, rtol=1e-3)
    assert model.second.config is config
    assert torch.equal(input_gradient(model, tokens_ND), around_ND)


def test_gradients_stop_again_after_an_exception():
    model = TwoLayers()
    with pytest.raises(RuntimeError, match="halt"), gradient_through_scales(model):
        raise RuntimeError("halt" if model.second.config.gradient else "not asked")
    assert model.second.config == ACConfig()


def test_causal_scales_have_no_gradient_to_ask_for():
    model, tokens_ND = TwoLayers(causal=True), random(20, D)
    model.train()
    model(random(20, D, seed=4))
    model.eval()
    expected_ND = input_gradient(model, tokens_ND)
    with gradient_through_scales(model):
        assert model.second.config == ACConfig(causal=True)
        assert torch.equal(input_gradient(model, tokens_ND), expected_ND)


# ------------------------------------------------------------------- second derivatives and checkpoints


def test_second_derivatives_are_those_of_the_plain_product():
    tokens_ND, assignment_N = clustered()
    router, previous = router_of(), decision(assignment_N)
    x_ND = tokens_ND.clone().requires_grad_()
    rows_ND = (router.route_and_scale(x_ND, previous)[1] / x_ND).detach()
    found = []
    for scores in (
        lambda: router(x_ND, previous).logits_NE,
        lambda: (x_ND * rows_ND) @ nn.functional.normalize(router.embeddings_ED, dim=1).T,
    ):
        (gradient_ND,) = torch.autograd.grad(scores().tanh().sum(), x_ND, create_graph=True)
        found.append(torch.autograd.grad(gradient_ND.square().sum(), [x_ND, router.embeddings_ED]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_derivative_through_the_scaling_matrix_is_refused():
    tokens_ND, assignment_N = clustered()
    x_ND = tokens_ND.clone().requires_grad_()
    logits_NE = router_of(gradient=True)(x_ND, decision(assignment_N)).logits_NE
    (gradient_ND,) = torch.autograd.grad(logits_NE.tanh().sum(), x_ND, create_graph=True)
    with pytest.raises(NotImplementedError):
        gradient_ND.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_step_once(reentrant):
    """Averages, decisions and gradients are those without it, over three steps."""
    results = []
    for checkpointed in (False, True):
        router = router_of(causal=True).train()
        found = []
        for seed in range(3):
            tokens_ND, assignment_N = clustered(seed=seed)
            x_ND, previous = tokens_ND.clone().requires_grad_(), decision(assignment_N)

            def forward(x_ND, router=router, previous=previous):
                return router(x_ND, previous).logits_NE

            run = partial(checkpoint, forward, use_reentrant=reentrant) if checkpointed else forward
            logits_NE = run(x_ND)
            logits_NE.square().sum().backward()
            found += [logits_NE.detach(), x_ND.grad, router.running_ED.clone()]
        results.append(found)
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_causal_router_can_be_copied_after_a_functional_gradient():
    tokens_ND, assignment_N = clustered()
    router, previous = router_of(causal=True).eval(), decision(assignment_N)

    def loss(parameters):
        return torch.func.functional_call(router, parameters, (tokens_ND, previous)).weights_NK.sum()

    torch.func.grad(loss)(dict(router.named_parameters()))
    twin = copy.deepcopy(router)
    for name, value in router.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)
