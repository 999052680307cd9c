"""The soft nearest neighbor loss against plain loops, at the edges of its domain, and its schedules.

Shapes: N samples, D width.
"""

import math
import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import NCALoss

from moe_lib.snnl import LayerwiseSNNL, SNNLConfig, soft_nearest_neighbor_loss

DISTANCES = ("cosine", "sqeuclidean")
REDUCTIONS = ("mean", "mean_all", "sum", "none")


def sample(num_samples, dim, num_classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64).to(dtype)
    return features_ND, torch.randint(num_classes, (num_samples,), generator=generator)


def two_clusters_with_wrong_labels():
    """Each sample's nearest neighbour is of the other class: the loss grows as 1 / temperature."""
    features_ND = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]], dtype=torch.float64)
    return features_ND, torch.tensor([0, 1, 0, 1])


# ----------------------------------------------------------------------------------------- values


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(1, 14),
    dim=st.integers(1, 5),
    num_classes=st.integers(1, 6),
    log_temperature=st.floats(-5, 4),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    distance=st.sampled_from(DISTANCES),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loops_on_any_shape(
    num_samples, dim, num_classes, log_temperature, scale, distance, reduction, seed
):
    features_ND, labels_N = sample(num_samples, dim, num_classes, seed)
    features_ND, temperature = features_ND * scale, math.exp(log_temperature)
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, temperature, distance, reduction)
    expected = reference.snnl(features_ND, labels_N, temperature, distance, reduction)
    np.testing.assert_allclose(loss, expected, rtol=1e-8, atol=1e-10)


def test_defaults_are_cosine_temperature_one_and_mean_over_anchors_with_a_positive():
    features_ND, labels_N = sample(12, 4, 6, seed=3)
    assert (labels_N.bincount() == 1).any()  # otherwise the two means agree
    expected = reference.snnl(features_ND, labels_N, 1.0, "cosine", "mean")
    assert soft_nearest_neighbor_loss(features_ND, labels_N).item() == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(reference.snnl(features_ND, labels_N, 1.0, "cosine", "mean_all"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [0.1, 0.5])  # the first asks for more digits under "sqeuclidean"
def test_features_of_up_to_float32_are_computed_in_float32(temperature, distance, dtype):
    features_ND, labels_N = sample(20, 8, 4, dtype=dtype)
    features_ND.requires_grad_()
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, temperature, distance)
    expected = reference.snnl(features_ND.detach().double(), labels_N, temperature, distance)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert features_ND.grad.dtype == dtype
    assert features_ND.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_equals_nca_loss_of_pytorch_metric_learning(temperature):
    """Same formula where every anchor has a positive and nothing underflows."""
    features_ND, _ = sample(16, 6, 1)
    labels_N = torch.arange(16) % 4
    nca = NCALoss(
        softmax_scale=1 / temperature, distance=LpDistance(normalize_embeddings=False, p=2, power=2)
    )
    features_ND = features_ND / 2
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, temperature, "sqeuclidean")
    torch.testing.assert_close(loss, nca(features_ND, labels_N), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("distance", DISTANCES)
def test_tiny_temperatures_neither_cap_nor_overflow(distance, temperature):
    features_ND, labels_N = two_clusters_with_wrong_labels()
    features_ND.requires_grad_()
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, temperature, distance)
    expected = reference.snnl(features_ND, labels_N, temperature, distance)
    assert expected > 100
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert features_ND.grad.isfinite().all()
    assert features_ND.grad.abs().max() > 0


def test_the_eps_form_turns_nan_in_float32_where_this_one_does_not():
    """A sample's distance to itself rounds to 6e-8, so exp(-6e-8 / T) - 1 = -6e-6 is left on the diagonal."""
    features_ND, _ = sample(8, 100, 1, dtype=torch.float32)
    labels_N, temperature = torch.arange(8) % 2, 0.01
    assert math.isnan(reference.snnl_with_eps(features_ND.numpy(), labels_N, temperature))
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, temperature, reduction="mean_all").item()
    expected = reference.snnl(features_ND, labels_N, temperature, "cosine", "mean_all")
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("distance", DISTANCES)
def test_close_to_zero_the_loss_keeps_its_digits(distance):
    """Well separated classes: log(1 + q/p) must not round to 0 while q/p is still representable."""
    features_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    gap = 1.0 if distance == "cosine" else 2.0
    loss = soft_nearest_neighbor_loss(features_ND, torch.tensor([0, 0, 1, 1]), gap / 60, distance)
    assert loss.item() == pytest.approx(2 * math.exp(-60), rel=1e-9)


def test_far_from_zero_the_loss_keeps_its_digits():
    """Where q/p = exp(21) + 1 or so, log(1 + q/p) is not yet log(q/p)."""
    features_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    loss = soft_nearest_neighbor_loss(features_ND, torch.tensor([0, 1, 0, 1]), 1 / 21)
    assert loss.item() == pytest.approx(21 + math.log1p(2 * math.exp(-21)), rel=1e-13)


def test_sqeuclidean_survives_a_common_offset_in_float32():
    """The values are exact in float32 with and without the offset, so nothing may change."""
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randint(-8, 9, (16, 6), generator=generator) / 8.0
    labels_N = torch.arange(16) % 3
    plain = soft_nearest_neighbor_loss(features_ND, labels_N, 0.5, "sqeuclidean")
    moved = soft_nearest_neighbor_loss(features_ND + 4096, labels_N, 0.5, "sqeuclidean")
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=0)


# -------------------------------------------------------------------------------- degenerate cases


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_sample_at_all_is_zero(distance):
    empty_ND, empty_N = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert soft_nearest_neighbor_loss(empty_ND, empty_N, distance=distance).item() == 0
    assert soft_nearest_neighbor_loss(empty_ND, empty_N, distance=distance, reduction="mean_all").item() == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_identical_samples_have_finite_gradients(distance):
    features_ND = torch.ones(6, 3, requires_grad=True)
    loss = soft_nearest_neighbor_loss(features_ND, torch.tensor([0, 0, 1, 1, 2, 2]), 1e-3, distance)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-3)
    loss.backward()
    assert features_ND.grad.isfinite().all()


# -------------------------------------------------------------------------------------- gradients


def test_a_temperature_that_requires_grad_does_not_warn():
    features_ND, labels_N = sample(6, 3, 2)
    temperature = torch.tensor(0.5, requires_grad=True)
    torch.set_warn_always(True)  # torch would otherwise say it once per process only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            soft_nearest_neighbor_loss(features_ND, labels_N, temperature).backward()
    finally:
        torch.set_warn_always(False)
    assert temperature.grad.isfinite()


# ------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("distance", DISTANCES)
def test_order_of_samples_and_names_of_classes_do_not_matter(distance):
    features_ND, labels_N = sample(15, 4, 4)
    loss_N = soft_nearest_neighbor_loss(features_ND, labels_N, 0.4, distance, "none")
    order_N = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    permuted_N = soft_nearest_neighbor_loss(features_ND[order_N], labels_N[order_N], 0.4, distance, "none")
    torch.testing.assert_close(permuted_N, loss_N[order_N])
    names = torch.tensor([40, -3, 7, 0])
    renamed_N = soft_nearest_neighbor_loss(features_ND, names[labels_N], 0.4, distance, "none")
    assert torch.equal(renamed_N, loss_N)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_unusable_temperatures(temperature):
    features_ND, labels_N = sample(4, 3, 2)
    for value in (temperature, torch.tensor(float(temperature))):
        with pytest.raises(ValueError, match="temperature"):
            soft_nearest_neighbor_loss(features_ND, labels_N, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"distance": "manhattan"}, "manhattan"), ({"reduction": "median"}, "median")],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        soft_nearest_neighbor_loss(*sample(4, 3, 2), **options)


GOOD_ND, GOOD_N = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("features_ND", "labels_N", "temperature", "message"),
    [
        (torch.zeros(4, 3, 2), GOOD_N, 1.0, r"features must have shape \[N, D\].*flatten\(1\)"),
        (torch.zeros(4), GOOD_N, 1.0, r"features must have shape \[N, D\]"),
        (torch.zeros(4, 0), GOOD_N, 1.0, "features must have at least one column"),
        (torch.zeros(4, 3, dtype=torch.long), GOOD_N, 1.0, r"features must be floating.*\.float\(\)"),
        (np.zeros((4, 3)), GOOD_N, 1.0, r"features .*torch\.from_numpy"),
        ([[0.0]] * 4, GOOD_N, 1.0, r"features .*torch\.as_tensor"),
        (GOOD_ND, torch.zeros(5, dtype=torch.long), 1.0, r"labels must have shape \[4\]"),
        (GOOD_ND, torch.zeros(4, 1, dtype=torch.long), 1.0, r"labels must have shape \[4\]"),
        (GOOD_ND, torch.eye(4), 1.0, r"labels .*one-hot.*\.argmax\(1\)"),
        (GOOD_ND, torch.zeros(4), 1.0, r"labels must be integers.*\.long\(\)"),
        (GOOD_ND, np.zeros(4, dtype=int), 1.0, r"labels .*torch\.from_numpy"),
        (GOOD_ND, [0, 1, 0, 1], 1.0, r"labels .*torch\.tensor\(labels\)"),
        (GOOD_ND, GOOD_N, "0.5", "temperature must be a number.*str '0.5'"),
        (GOOD_ND, GOOD_N, True, "temperature must be a number.*bool True"),
        (GOOD_ND, GOOD_N, torch.ones(2), "temperature must be a number or a 0-d tensor"),
    ],
)
def test_unusable_arguments_are_named_with_the_remedy(features_ND, labels_N, temperature, message):
    with pytest.raises(ValueError, match=message):
        soft_nearest_neighbor_loss(features_ND, labels_N, temperature)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_labels_of_every_integer_type(dtype):
    features_ND, _ = sample(8, 3, 2)
    labels_N = torch.arange(8) % 2
    expected = soft_nearest_neighbor_loss(features_ND, labels_N)
    assert soft_nearest_neighbor_loss(features_ND, labels_N.to(dtype)) == expected


# ------------------------------------------------------------------- where rounding eats the distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("route", ["dense", "panels", "streaming"])
@pytest.mark.parametrize(
    ("distance", "temperature"), [("sqeuclidean", 1.0), ("cosine", 1e-9), ("cosine", 1e-13)]
)
def test_coincident_rows_far_from_the_rest(distance, temperature, route, dtype):
    """Anchors 0 to 399 coincide with one sample of their class and one of another: log 2 each."""
    draw = torch.Generator().manual_seed(0)
    features_ND = (3e3 * torch.randn(200, 32, generator=draw)).to(dtype).repeat(3, 1).requires_grad_()
    labels_N = torch.cat([torch.arange(200).repeat(2), torch.arange(200, 400)])
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, temperature, distance, route=route)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    assert features_ND.grad.abs().max() < 1e-6  # pushed and pulled from the same place


@pytest.mark.parametrize("route", ["dense", "streaming"])
@pytest.mark.parametrize(
    ("distance", "scale", "temperature"),
    [
        ("sqeuclidean", 1e15, 1e30),
        ("sqeuclidean", 1e15, 1.0),
        ("sqeuclidean", 1e-30, 1.0),
        ("cosine", 1.0, 1e30),
        ("cosine", 1e19, 1e-13),
        ("cosine", 1e-30, 0.5),
    ],
)
def test_the_slope_of_the_temperature_in_float32_at_extremes(distance, scale, temperature, route):
    """dL/dT = sum over anchors of (mean distance to all - mean distance to positives) / T^2, in loops."""
    features_ND, labels_N = sample(14, 4, 3, seed=2)
    features_ND = (features_ND * scale).float()
    learned = torch.tensor(temperature, requires_grad=True)
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, learned, distance, "sum", route)
    loss.backward()
    expected = reference.snnl_slope(features_ND, labels_N, learned.item(), distance)
    assert learned.grad.item() == pytest.approx(expected, rel=1e-6, abs=1e-38)


@pytest.mark.parametrize("route", ["auto", "panels", "streaming"])
@pytest.mark.parametrize("temperature", [1e-37, 1e-39])
def test_a_temperature_whose_inverse_is_no_float32(route, temperature):
    features_ND, labels_N = sample(14, 4, 3, seed=2)
    features_ND = (features_ND * temperature**0.5).float()
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, temperature, "sqeuclidean", route=route)
    expected = soft_nearest_neighbor_loss(features_ND.double(), labels_N, temperature, "sqeuclidean")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [0, 3])
def test_without_any_positive_a_learned_temperature_gets_a_gradient_of_zero(count):
    """Not None, which several processes could not add up."""
    learned = torch.tensor(1.0, requires_grad=True)
    soft_nearest_neighbor_loss(torch.zeros(count, 4), torch.arange(count), learned).backward()
    assert learned.grad == 0


@pytest.mark.parametrize("route", ["dense", "streaming"])
@pytest.mark.parametrize("temperature", [1.0, 1e-8])
def test_the_slope_of_the_temperature_for_nearly_parallel_rows(temperature, route):
    """Angles of about 1e-4: cosines differ from 1 by less than float32 can say."""
    offsets_ND, labels_N = sample(14, 4, 3, seed=3)
    features_ND = (1 + 1e-4 * offsets_ND).float().requires_grad_()
    learned = torch.tensor(temperature, requires_grad=True)
    soft_nearest_neighbor_loss(features_ND, labels_N, learned, "cosine", "sum", route).backward()
    expected = reference.snnl_slope(features_ND, labels_N, learned.item(), "cosine")
    assert learned.grad.item() == pytest.approx(expected, rel=1e-4)


def test_a_loss_beyond_the_type_is_an_error():
    features_ND = 1e19 * torch.tensor([[0.0, 1.0], [0.0, 1.1], [1.0, 0.0], [1.1, 0.0]])
    with pytest.raises(ValueError, match="features are too large for the temperature"):
        soft_nearest_neighbor_loss(features_ND, torch.tensor([0, 1, 0, 1]), 1e-3, "sqeuclidean")


# ------------------------------------------------------------------------------ layers and schedules


def layers_of_activations():
    code_ND, labels_N = sample(12, 4, 3)
    conv_NCHW = sample(12, 2 * 3 * 3, 1, seed=9)[0].view(12, 2, 3, 3)
    return {"conv": conv_NCHW, "code": code_ND}, labels_N


def test_annealed_temperature_in_closed_form():
    snnl = LayerwiseSNNL(SNNLConfig(schedule="annealed", temperature=100.0))
    assert snnl.temperature(0) == 100
    assert snnl.temperature(1) == pytest.approx(68.30201283771976)  # 100 / 2^0.55
    assert [snnl.temperature(e) for e in range(9)] == pytest.approx([100 / (1 + e) ** 0.55 for e in range(9)])
    activations, labels_N = layers_of_activations()
    expected = reference.snnl(activations["code"], labels_N, 100 / 4**0.55)
    assert snnl(activations, labels_N, epoch=3).item() == pytest.approx(expected, rel=1e-9)


def test_fixed_temperature_ignores_the_epoch():
    snnl = LayerwiseSNNL(SNNLConfig(schedule="fixed", temperature=0.25))
    activations, labels_N = layers_of_activations()
    expected = reference.snnl(activations["code"], labels_N, 0.25)
    for epoch in (0, 7):
        assert snnl(activations, labels_N, epoch).item() == pytest.approx(expected, rel=1e-9)
    assert not list(snnl.parameters())


def test_learned_temperature_starts_where_told_and_descends():
    snnl = LayerwiseSNNL(SNNLConfig(schedule="learned", temperature=0.4)).double()
    activations, labels_N = layers_of_activations()
    assert snnl.temperature(0).item() == pytest.approx(0.4, rel=1e-6)
    optimizer = torch.optim.SGD(snnl.parameters(), lr=0.5)
    before = snnl(activations, labels_N, 0)
    before.backward()
    assert snnl.log_temperature.grad.abs() > 0
    optimizer.step()
    assert snnl(activations, labels_N, 0) < before


def test_settings_that_cannot_train_are_refused():
    with pytest.raises(ValueError, match="factor must be a finite number, got nan"):
        LayerwiseSNNL(SNNLConfig(factor=math.nan))
    with pytest.raises(ValueError, match="a learned temperature must lie in 1e-13 to 1e13, got 1e-60"):
        LayerwiseSNNL(SNNLConfig(schedule="learned", temperature=1e-60))


@pytest.mark.parametrize("wrong_labels", [False, True], ids=["colder", "hotter"])
def test_learned_temperature_stays_usable_under_huge_steps(wrong_labels):
    """Separable classes ask for T -> 0, inseparable ones for T -> infinity; steps of 60 in log T."""
    features_ND, labels_N = two_clusters_with_wrong_labels()
    if not wrong_labels:
        labels_N = torch.tensor([0, 0, 1, 1])
    snnl = LayerwiseSNNL(SNNLConfig(schedule="learned", temperature=1.0))
    optimizer = torch.optim.Adam(snnl.parameters(), lr=60.0)
    for _ in range(6):
        optimizer.zero_grad()
        loss = snnl({"code": features_ND}, labels_N, 0)
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        assert 0 < snnl.temperature(0).item() < math.inf


@pytest.mark.parametrize("combine", ["min", "sum"])
def test_layers_are_combined(combine):
    snnl = LayerwiseSNNL(SNNLConfig(schedule="fixed", layers=("conv", "code"), combine=combine))
    activations, labels_N = layers_of_activations()
    values = [reference.snnl(x.flatten(1), labels_N, 1.0) for x in activations.values()]
    expected = {"min": min(values), "sum": sum(values)}[combine]
    assert values[0] != pytest.approx(values[1])
    assert snnl(activations, labels_N, 0).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("number", [5, 700])  # dense, streamed
def test_layers_of_several_lengths_are_refused(number):
    snnl = LayerwiseSNNL(SNNLConfig(schedule="fixed", layers=("conv", "code"), combine="sum"))
    activations = {"conv": torch.randn(number, 4), "code": torch.randn(number + 1, 4)}
    with pytest.raises(ValueError, match=rf"{number + 1}"):
        snnl(activations, torch.zeros(number, dtype=torch.long), 0)


def test_distance_and_reduction_are_passed_on():
    snnl = LayerwiseSNNL(SNNLConfig(schedule="fixed", distance="sqeuclidean", reduction="sum"))
    activations, labels_N = layers_of_activations()
    expected = reference.snnl(activations["code"], labels_N, 1.0, "sqeuclidean", "sum")
    assert snnl(activations, labels_N, 0).item() == pytest.approx(expected, rel=1e-9)


def test_an_unknown_layer_is_named_with_those_that_exist():
    activations, labels_N = layers_of_activations()
    with pytest.raises(ValueError, match=r"'conv9'.*conv, code"):
        LayerwiseSNNL(SNNLConfig(layers=("conv9",)))(activations, labels_N, 0)
    with pytest.raises(ValueError, match=r"'code'.*none"):
        LayerwiseSNNL(SNNLConfig())({}, labels_N, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"schedule": "warm"}, "warm"),
        ({"combine": "max"}, "max"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"layers": ()}, "layers"),
    ],
)
def test_unusable_configurations_are_refused_at_once(config, message):
    with pytest.raises(ValueError, match=message):
        LayerwiseSNNL(SNNLConfig(**config))
