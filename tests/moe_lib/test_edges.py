"""Hard inputs of the public functions: the float64 oracle's value, or a ValueError that names the argument.

Shapes: N samples, D width, E experts, C classes.
"""

import contextlib
import math

import numpy as np
import pytest
import reference
import reference_ac
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lib
from moe_lib import metrics

C, E = 3, 4
fixed = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.float64])


@st.composite
def matrices(draw, rows=(1, 14), columns=(1, 5)):
    """Tied, constant, duplicated, huge, tiny, non-contiguous; float32 or float64."""
    count, width = draw(st.integers(*rows)), draw(st.integers(*columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x_ND = torch.randn(count, width, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["plain", "tied", "constant", "duplicated", "zero row", "strided"]))
    if kind == "tied":
        x_ND = x_ND.round()
    elif kind == "constant":
        x_ND = x_ND[:1].expand(count, width).clone()
    elif kind == "duplicated":
        x_ND = x_ND[torch.randint(max(1, count // 2), (count,), generator=generator)]
    elif kind == "zero row":
        x_ND[0] = 0
    x_ND = (x_ND * draw(st.sampled_from([1.0, 1e19, 1e-30]))).to(draw(DTYPES))
    if kind == "strided":
        x_ND = torch.stack([x_ND, x_ND], 2)[:, :, 0]
    return x_ND, generator


def labels_of(count, generator, classes=C):
    return torch.randint(classes, (count,), generator=generator)


@fixed
@given(matrices(), st.sampled_from(["cosine", "sqeuclidean"]), st.sampled_from([1e-13, 1e-9, 0.1, 1.0, 1e30]))
def test_loss(given_matrix, distance, temperature):
    features_ND, generator = given_matrix
    labels_N = labels_of(len(features_ND), generator)
    features_ND = features_ND.requires_grad_()
    expected = reference.snnl(features_ND, labels_N, temperature, distance)
    if expected > torch.finfo(features_ND.dtype).max:
        with pytest.raises(ValueError, match="features are too large"):
            moe_lib.soft_nearest_neighbor_loss(features_ND, labels_N, temperature, distance)
        return
    loss = moe_lib.soft_nearest_neighbor_loss(features_ND, labels_N, temperature, distance)
    # Angles themselves are only known to the type's rounding where rows are parallel but not equal.
    noise = 1e-15 / temperature if distance == "cosine" else 0.0
    assert loss.item() == pytest.approx(expected, rel=2e-5, abs=1e-6 + noise)
    loss.backward()
    assert not features_ND.grad.isnan().any()


@fixed
@given(matrices(columns=(1, 6)))
def test_pairwise_similarity(given_matrix):
    vectors_EP, _ = given_matrix
    found = moe_lib.pairwise_similarity(vectors_EP)
    if len(vectors_EP) < 2:
        assert math.isnan(found)
    else:
        unit_EP = reference.array(vectors_EP)
        norm_E1 = np.array([[math.hypot(*row)] for row in unit_EP])
        unit_EP = unit_EP / np.where(norm_E1 > 0, norm_E1, 1)
        cosine_EE = unit_EP @ unit_EP.T
        expected = cosine_EE[np.triu_indices(len(unit_EP), 1)].mean()
        assert found == pytest.approx(expected, abs=1e-9)


@fixed
@given(matrices(), st.sampled_from(["mad", "variance"]))
def test_adaptive_scales(given_matrix, dispersion):
    tokens_ND, generator = given_matrix
    assignment_N = labels_of(len(tokens_ND), generator)
    away_N = tokens_ND.double() - tokens_ND.double().mean(0)
    if dispersion == "variance" and tokens_ND.dtype == torch.float32 and away_N.abs().max() > 1e18:
        with contextlib.suppress(ValueError):  # squares leave float32: an error, unless they just do not
            assert moe_lib.adaptive_scales(tokens_ND, assignment_N, C, dispersion).isfinite().all()
        return
    found_ED = moe_lib.adaptive_scales(tokens_ND, assignment_N, C, dispersion)
    expected_ED = reference_ac.adaptive_scales(tokens_ND, assignment_N, C, dispersion=dispersion)
    # Where a float32 mean of huge equal tokens rounds, so does the dispersion.
    if tokens_ND.abs().max() < 1e18:
        np.testing.assert_allclose(found_ED, expected_ED, rtol=1e-3)
    assert found_ED.isfinite().all()


@fixed
@given(matrices(rows=(1, 14), columns=(1, E)), st.sampled_from([None, 1, 2]))
def test_routers_and_layer(given_matrix, top_k):
    tokens_ND, _ = given_matrix
    layer = moe_lib.MoE(tokens_ND.shape[1], E, 5, 2, top_k=top_k).to(tokens_ND.dtype)
    out_NO, routing = layer(tokens_ND)
    expected_NE = reference.array(tokens_ND) @ reference.array(layer.router.gate.weight).T
    expected_NE = expected_NE + reference.array(layer.router.gate.bias)
    np.testing.assert_allclose(
        routing.logits_NE.detach(), expected_NE, rtol=1e-4, atol=1e-4 * np.abs(expected_NE).max()
    )
    assert out_NO.isfinite().all()
    assert moe_lib.load_balancing_loss(routing).isfinite()


@fixed
@given(matrices(columns=(1, E)), st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_routing_measures(given_matrix, integer):
    logits_NE, generator = given_matrix
    labels_N = labels_of(len(logits_NE), generator)
    probs_NE = moe_lib.route(logits_NE).probs_NE
    entropy = moe_lib.routing_entropy(probs_NE, labels_N.to(integer), C)
    expected = reference.routing_entropy(probs_NE, labels_N, C)
    np.testing.assert_allclose(entropy[:6], list(expected)[:6], atol=1e-6)
    assert moe_lib.load(probs_NE, labels_N).effective_experts >= 1 - 1e-6


# -------------------------------------------------------------------------------- unusable arguments

X, Y, P = torch.zeros(6, 2), torch.zeros(6, dtype=torch.long), torch.full((6, 2), 0.5)
FUNCTIONS = {
    "soft_nearest_neighbor_loss": (moe_lib.soft_nearest_neighbor_loss, {"features": X, "labels": Y}),
    "routing_entropy": (lambda a, b: moe_lib.routing_entropy(a, b, 2), {"probs": P, "labels": Y}),
    "class_expert_matrix": (lambda a, b: moe_lib.class_expert_matrix(a, b, 2), {"probs": P, "labels": Y}),
    "load": (moe_lib.load, {"probs": P, "labels": Y}),
    "adaptive_scales": (lambda a, b: moe_lib.adaptive_scales(a, b, 2), {"tokens": X, "assignment": Y}),
    "pairwise_similarity": (moe_lib.pairwise_similarity, {"vectors": X}),
    "output_similarity": (moe_lib.output_similarity, {"expert_logits": torch.zeros(6, 2, 3)}),
    "expert_cka": (moe_lib.expert_cka, {"expert_logits": torch.zeros(6, 2, 3)}),
    "linear_cka": (moe_lib.linear_cka, {"x": X, "y": X}),
    "task_score": (moe_lib.task_score, {"log_probs": P.log(), "labels": Y}),
    "calibration_error": (moe_lib.calibration_error, {"confidence": P[:, 0]}),
    "MoE": (moe_lib.MoE(2, 3, 4), {"tokens": X}),
    "AC": (moe_lib.AdaptiveClusteringRouter(2, 3), {"tokens": X}),
    "route": (moe_lib.route, {"logits": P}),
}
WRONG = {
    "rank": lambda x: x[None, None],
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "complex": lambda x: x.to(torch.complex64),
    "integers for numbers": lambda x: x.long() if x.is_floating_point() else x.float(),
    "not finite": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x.float(),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_unusable_argument_is_named(name, wrong):
    function, arguments = FUNCTIONS[name]
    if wrong == "not finite" and name in ("MoE", "AC", "route"):
        return  # layers pass on what is not finite, as torch's do
    if name == "calibration_error":
        function = lambda confidence: moe_lib.calibration_error(confidence, Y)  # noqa: E731
    for argument, good in arguments.items():
        given_arguments = arguments | {argument: WRONG[wrong](good)}
        with pytest.raises(ValueError, match=argument):
            function(*given_arguments.values())


def test_every_public_name_is_importable():
    assert all(hasattr(moe_lib, name) for name in moe_lib.__all__)
    assert metrics.routing_entropy is moe_lib.routing_entropy
