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
from moe_lib.metrics.collapse import functional_collapse, representational_collapse, routing_collapse
from moe_lib.metrics.embedding import embedding_quality
from moe_lib.metrics.interventions import expert_ablations
from moe_lib.models.classifier import Classifier, ClassifierConfig
from moe_lib.models.language import LanguageConfig, LanguageModel
from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig, VisionTransformer

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
@given(
    matrices(rows=(21, 40), columns=(1, 5)),
    st.sampled_from(["knn", "pixels"]),
)
def test_embedding_quality(given_matrix, moved):
    """Neighbours do not change with the scale of codes or pixels, however large."""
    codes_ND, generator = given_matrix
    labels_N = labels_of(len(codes_ND), generator)
    labels_N[:2] = torch.tensor([0, 1])
    pixels_NP = torch.randn(len(codes_ND), 6, generator=generator)
    found = embedding_quality(codes_ND, labels_N, codes_ND, labels_N, pixels_NP)
    assert 0 <= found.knn_accuracy <= 1
    assert -1 <= found.silhouette <= 1
    assert 0 <= found.trustworthiness <= 1
    larger = (codes_ND * 4, pixels_NP) if moved == "knn" else (codes_ND, pixels_NP * 2.0**90)
    again = embedding_quality(larger[0], labels_N, larger[0], labels_N, larger[1])
    assert again == pytest.approx(found, abs=1e-12)


RULES = st.sampled_from(["logits", "likelihood", "jacobs"])


@fixed
@given(
    matrices(rows=(1, 14), columns=(E, E)),
    st.sampled_from([None, 1, 2]),
    RULES,
    st.sampled_from([1.0, 1e19, 1e-30]),
)
def test_ablations(given_matrix, top_k, rule, scale):
    logits_NE, generator = given_matrix
    labels_N = labels_of(len(logits_NE), generator)
    weights_NE = moe_lib.route(logits_NE, top_k).dense_weights()
    expert_logits_NEC = torch.randn(len(logits_NE), E, C, generator=generator).to(logits_NE.dtype) * scale
    found = expert_ablations(weights_NE, expert_logits_NEC, labels_N, rule, torch.Generator())
    assert np.isfinite(found.dropped).all()
    assert math.isfinite(found.permuted_cross_entropy)
    if logits_NE.dtype == torch.float64 and scale == 1:
        draw = torch.Generator()
        orders = [torch.randperm(len(labels_N), generator=draw).tolist() for _ in range(5)]
        expected = reference.expert_ablations(weights_NE, expert_logits_NEC, labels_N, rule, orders)
        for name in ("dropped", "swapped", "merged", "permuted"):
            np.testing.assert_allclose(getattr(found, name), expected[name], atol=1e-9)


@fixed
@given(
    st.one_of(st.floats(allow_nan=True), st.floats(0, math.log(E))),
    st.integers(-1, E),
    st.one_of(st.floats(allow_nan=True), st.floats(-1, 1)),
)
def test_degrees_of_collapse_lie_between_0_and_1(entropy, num_experts, value):
    def degree(function, *arguments):
        try:
            found = function(*arguments)
        except ValueError as error:
            assert any(name in str(error) for name in names), error  # noqa: PT017
            return
        assert math.isnan(found) or 0 <= found <= 1

    names = ("marginal_entropy", "num_experts")
    degree(routing_collapse, entropy, num_experts)
    names = ("output_similarity",)
    degree(representational_collapse, value)
    names = ("num_classes", "num_experts")
    degree(functional_collapse, value, entropy, num_experts, 4)
    degree(functional_collapse, 0.1, 0.9, 3, num_experts)


def models():
    """Every model, small, with the name of its input."""
    trunk = TransformerConfig(
        dim=8, depth=2, num_heads=2, mlp_hidden=8, moe_blocks=(1,), num_experts=3, expert_hidden=4
    )
    classifier = ClassifierConfig("mlp", 5, 4, 3, 4, gate_hidden=4)
    return {
        "classifier": (Classifier(classifier, (1, 4, 4), C), "images"),
        "vision": (VisionTransformer(VisionConfig(trunk, patch=2), (1, 4, 4), C), "images"),
        "language": (LanguageModel(LanguageConfig(trunk, context=6), 7), "tokens"),
    }


@fixed
@given(
    st.sampled_from(["classifier", "vision"]),
    st.integers(0, 5),
    DTYPES,
    st.sampled_from(["plain", "constant", "duplicated", "strided", "zero"]),
)
def test_image_models(name, count, dtype, kind):
    torch.manual_seed(count)
    model = models()[name][0].to(dtype)
    images_NCHW = torch.rand(count, 1, 4, 4, dtype=dtype)
    if kind == "constant":
        images_NCHW = torch.full_like(images_NCHW, 0.5)
    elif kind == "duplicated":
        images_NCHW = images_NCHW[:1].expand(count, 1, 4, 4)
    elif kind == "strided":
        images_NCHW = images_NCHW.transpose(2, 3)
    elif kind == "zero":
        images_NCHW = torch.zeros_like(images_NCHW)
    found_NC = model(images_NCHW).log_probs_NC
    assert found_NC.shape == (count, C)
    torch.testing.assert_close(found_NC.exp().sum(1), torch.ones(count, dtype=dtype))
    for i in range(count):  # no image depends on the others
        torch.testing.assert_close(found_NC[i], model(images_NCHW[i : i + 1]).log_probs_NC[0])


@fixed
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    st.sampled_from(["plain", "constant", "strided"]),
)
def test_the_language_model(count, length, integer, kind):
    torch.manual_seed(length)
    model = models()["language"][0]
    tokens_BT = torch.randint(7, (count, length))
    if kind == "constant":
        tokens_BT = torch.zeros_like(tokens_BT)
    elif kind == "strided":
        tokens_BT = torch.stack([tokens_BT, tokens_BT], 2)[:, :, 0]
    found_BTV = model(tokens_BT.to(integer)).log_probs_BTV
    torch.testing.assert_close(found_BTV, model(tokens_BT).log_probs_BTV, rtol=0, atol=0)
    torch.testing.assert_close(found_BTV.exp().sum(2), torch.ones(count, length))


@pytest.mark.parametrize("name", ["classifier", "vision", "language"])
@pytest.mark.parametrize("wrong", ["rank", "size", "numpy", "list", "complex", "type", "range"])
def test_a_model_names_its_unusable_input(name, wrong):
    model, argument = models()[name]
    good = torch.zeros(2, 6, dtype=torch.long) if argument == "tokens" else torch.rand(2, 1, 4, 4)
    bad = {
        "rank": lambda: good[None],
        "size": lambda: torch.cat([good, good], -1),
        "numpy": good.numpy,
        "list": good.tolist,
        "complex": lambda: good.to(torch.complex64),
        "type": lambda: good.float() if argument == "tokens" else good.long(),
        "range": lambda: good + 7,
    }[wrong]()
    if wrong == "range" and argument == "images":  # any finite intensity has an answer
        assert model(bad).log_probs_NC.isfinite().all()
        return
    with pytest.raises(ValueError, match=argument):
        model(bad)


# -------------------------------------------------------------------------------- unusable arguments

IMAGES = torch.full((6, 1, 4, 4), 0.5)


def scores(images_NCHW):
    return images_NCHW.flatten(1)[:, :3]


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
    "linear": (moe_lib.LinearRouter(2, 3), {"tokens": X}),
    "mlp": (moe_lib.MLPRouter(2, 3, 4), {"tokens": X}),
    "cosine": (moe_lib.CosineRouter(2, 3), {"tokens": X}),
    "uniform": (moe_lib.UniformRouter(3), {"tokens": X}),
    "hash": (lambda a, b: moe_lib.HashRouter(3, 2)(a, None, b), {"tokens": X, "keys": Y}),
    "information_class_null": (
        lambda a, b: moe_lib.information_class_null(a, b, 2, torch.Generator()),
        {"probs": P, "labels": Y},
    ),
    "expert_ablations": (
        lambda a, b, c: expert_ablations(a, b, c, "logits", torch.Generator()),
        {"weights": P, "expert_logits": torch.zeros(6, 2, 3), "labels": Y},
    ),
    "embedding_quality": (
        lambda *given: embedding_quality(
            *(torch.cat([x] * 4) if isinstance(x, torch.Tensor) else x for x in given)
        ),
        {"train_codes": X, "train_labels": Y, "codes": X, "labels": Y, "pixels": X},
    ),
    "fgsm": (lambda a, b: moe_lib.fgsm(scores, a, b, 0.1), {"images": IMAGES, "labels": Y}),
    "pgd": (lambda a, b: moe_lib.pgd(scores, a, b, 0.1, torch.Generator()), {"images": IMAGES, "labels": Y}),
    "spsa": (
        lambda a, b: moe_lib.spsa(scores, a, b, 0.1, torch.Generator()),
        {"images": IMAGES, "labels": Y},
    ),
    "corrupt": (lambda a: moe_lib.corrupt(a, "noise", 1, torch.Generator()), {"images": IMAGES.byte()}),
}
LAYERS = ("MoE", "AC", "route", "linear", "mlp", "cosine", "uniform", "hash")
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
    if wrong == "not finite" and name in LAYERS:
        return  # layers pass on what is not finite, as torch's do
    if name == "calibration_error":
        function = lambda confidence: moe_lib.calibration_error(confidence, Y)  # noqa: E731
    for argument, good in arguments.items():
        given_arguments = arguments | {argument: WRONG[wrong](good)}
        with pytest.raises(ValueError, match=argument):
            function(*given_arguments.values())
