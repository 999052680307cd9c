"""The fast routes of the soft nearest neighbor loss against its plain form under automatic differentiation.

Shapes: N samples, D width, L layers.
"""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lib import products
from moe_lib.snnl import LayerwiseSNNL, SNNLConfig, autograd, dense, soft_nearest_neighbor_loss, streaming

DISTANCES = ("cosine", "sqeuclidean")
REDUCTIONS = ("mean", "mean_all", "sum", "none")
ROUTES = ("dense", "panels", "streaming")


def plain(features_ND, labels_N, temperature, distance, reduction):
    """Every pair at once, in float64 and in logarithms; the gradient is left to torch."""
    x_ND = features_ND.double()
    if distance == "cosine":
        norm_N1 = x_ND.norm(dim=1, keepdim=True)
        x_ND = x_ND / norm_N1.where(norm_N1 > 0, torch.ones_like(norm_N1))
        distance_NN = 1 - x_ND @ x_ND.T
    else:
        distance_NN = (x_ND[:, None] - x_ND).square().sum(2)
    score_NN = -distance_NN / temperature
    itself_NN = torch.eye(len(x_ND), dtype=torch.bool)
    same_NN = (labels_N[:, None] == labels_N) & ~itself_NN
    counts_N = same_NN.any(1)
    log_z_N = score_NN.masked_fill(itself_NN, -1e300).logsumexp(1)
    log_p_N = score_NN.masked_fill(~same_NN, -1e300).logsumexp(1)
    loss_N = (log_z_N - log_p_N).where(counts_N, torch.zeros_like(log_z_N))
    if reduction == "none":
        return loss_N
    return loss_N.sum() / {"mean": max(counts_N.sum().item(), 1), "mean_all": len(x_ND), "sum": 1}[reduction]


def sample(num_samples, dim, num_classes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64).to(dtype)
    return features_ND, torch.randint(num_classes, (num_samples,), generator=generator)


def with_gradients(loss, features_ND, temperature, seed=0):
    """The loss, and the gradients of a random combination of its elements."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(loss.shape, generator=draw, dtype=torch.float64).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad((loss * weights).sum(), (features_ND, temperature))


@pytest.fixture
def small_tiles(monkeypatch):
    """So that a handful of samples fills several tiles, ragged ones included."""
    monkeypatch.setattr(streaming, "TILE", (3, 9))


def agrees(features_ND, labels_N, temperature, distance, reduction, route, rtol, rtol_grad):
    """To `rtol`, and no further than that below what one pair of samples can contribute: terms cancel."""
    features_ND = features_ND.clone().requires_grad_()
    exact_T = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    expected = with_gradients(
        plain(features_ND, labels_N, exact_T, distance, reduction), features_ND, exact_T
    )
    found = with_gradients(
        soft_nearest_neighbor_loss(features_ND, labels_N, exact_T, distance, reduction, route),
        features_ND,
        exact_T,
    )
    length_N = features_ND.detach().double().norm(dim=1)
    farthest = 2 if distance == "cosine" else 4 * length_N.max().item() ** 2
    steepest = 1 / length_N.min().item() if distance == "cosine" else 4 * length_N.max().item()
    sizes = (1.0, steepest / temperature, farthest / temperature**2)
    for value, wanted, size, tolerance in zip(
        found, expected, sizes, (rtol, rtol_grad, rtol_grad), strict=True
    ):
        size = max(wanted.abs().max().item(), size)
        np.testing.assert_allclose(value.double(), wanted.double(), rtol=tolerance, atol=tolerance * size)


shapes = {
    "num_samples": st.integers(1, 40),
    "dim": st.integers(1, 12),
    "num_classes": st.integers(1, 12),
    "distance": st.sampled_from(DISTANCES),
    "reduction": st.sampled_from(REDUCTIONS),
    "route": st.sampled_from(ROUTES),
    "seed": st.integers(0, 2**31),
}
fixed = settings(max_examples=80, deadline=None, derandomize=True)


class TestRoutesAgreeWithThePlainForm:
    """The fixture is the same for every example, which hypothesis cannot know of a function."""

    @pytest.fixture(autouse=True)
    def _tiles(self, small_tiles):
        pass

    @fixed
    @given(log_temperature=st.floats(-5, 5), scale=st.sampled_from([1e-2, 1.0, 30.0]), **shapes)
    def test_float64_to_1e_10(
        self, num_samples, dim, num_classes, distance, reduction, route, seed, log_temperature, scale
    ):
        features_ND, labels_N = sample(num_samples, dim, num_classes, seed)
        agrees(
            features_ND * scale, labels_N, math.exp(log_temperature), distance, reduction, route, 1e-10, 1e-10
        )

    @fixed
    @given(log_temperature=st.floats(-1, 3), **shapes)
    def test_float32_to_1e_5(
        self, num_samples, dim, num_classes, distance, reduction, route, seed, log_temperature
    ):
        features_ND, labels_N = sample(num_samples, dim, num_classes, seed, torch.float32)
        temperature = math.exp(log_temperature)
        agrees(features_ND, labels_N, temperature, distance, reduction, route, 1e-5, 1e-5)

    @fixed
    @given(log_temperature=st.floats(-1, 3), **shapes)
    def test_bfloat16_loses_no_more_than_the_rounding_of_its_gradient(
        self, num_samples, dim, num_classes, distance, reduction, route, seed, log_temperature
    ):
        features_ND, labels_N = sample(num_samples, dim, num_classes, seed, torch.bfloat16)
        temperature = math.exp(log_temperature)
        agrees(features_ND, labels_N, temperature, distance, reduction, route, 1e-5, 2**-8)


# -------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.usefixtures("small_tiles")
def test_rows_that_underflow_beside_rows_that_do_not(distance, route, dtype):
    """Samples 0 to 4 lie far from all of their class, the others close to it."""
    features_ND, labels_N = sample(30, 6, 5, 4, dtype)
    labels_N[:5] = torch.arange(5)
    factor = 1 if dtype == torch.float32 else 10
    if distance == "cosine":
        features_ND[5:] = features_ND[5:].abs() + 4 * factor
        features_ND[:5] *= -torch.sign(features_ND[:5])
        temperature = 0.03 / factor
    else:
        features_ND[:5] *= 20 * factor
        temperature = 5.0
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    agrees(features_ND, labels_N, temperature, distance, "mean", route, tolerance, tolerance)
    agrees(features_ND, labels_N, temperature, distance, "none", route, tolerance, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("near", [0, 3, 30])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.usefixtures("small_tiles")
def test_scores_counted_from_the_nearest_sample(distance, route, near, dtype):
    """Some pairs lie so close, and all others so far apart, that both cannot be counted from one score."""
    features_ND, labels_N = sample(40, 12, 4, 3, dtype)
    features_ND[1 : near + 1] = features_ND[0] + 1e-4 * features_ND[1 : near + 1]
    temperature = (0.005 if distance == "cosine" else 0.1) / (1 if dtype == torch.float32 else 10)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    for reduction in ("mean", "none"):
        agrees(features_ND, labels_N, temperature, distance, reduction, route, tolerance, tolerance)


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.usefixtures("small_tiles")
def test_tiny_temperatures(distance, route, temperature):
    features_ND, labels_N = sample(20, 4, 5, 1)
    agrees(features_ND, labels_N, temperature, distance, "mean", route, 1e-8, 1e-8)


@pytest.mark.parametrize("route", ROUTES)
def test_float32_losses_above_88_are_finite(route):
    """Where exp(loss) overflows in float32, and softplus must not."""
    features_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    labels_N = torch.tensor([0, 1, 0, 1])
    for wanted in (85.0, 90.0, 95.0, 99.0, 101.0):
        loss = soft_nearest_neighbor_loss(features_ND, labels_N, 1 / wanted, route=route)
        assert loss.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.usefixtures("small_tiles")
def test_no_denormal_number_reaches_the_gradients_product(distance, route, monkeypatch):
    """They would be correct, but cost 4 to 60 times as much."""
    features_ND, labels_N = sample(24, 3, 4, 2, torch.float32)
    features_ND.requires_grad_()
    seen = []
    for module, name in ((dense, "product"), (streaming, "add_product")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original: seen.extend(a) or f(*a))
    soft_nearest_neighbor_loss(features_ND, labels_N, 0.01, distance, route=route).backward()
    assert seen
    for tensor in seen:
        if isinstance(tensor, torch.Tensor):
            tiny = torch.finfo(tensor.dtype).tiny
            assert not ((tensor != 0) & (tensor.abs() < tiny)).any()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [2] * 9, [7]], ids=["no positive", "one", "N=1"]
)
@pytest.mark.usefixtures("small_tiles")
def test_zero_with_zero_gradients(labels, reduction, route):
    features_ND, _ = sample(len(labels), 3, 1, 0)
    features_ND.requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for distance in DISTANCES:
        loss = soft_nearest_neighbor_loss(
            features_ND, torch.tensor(labels), temperature, distance, reduction, route
        )
        assert loss.shape == ((len(labels),) if reduction == "none" else ())
        assert torch.equal(loss, torch.zeros_like(loss))
        grads = torch.autograd.grad(loss.sum(), (features_ND, temperature))
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("zeros", [[], [2, 7]])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("small_tiles")
def test_rows_of_zeros_and_extreme_lengths_under_cosine(route, scale, zeros):
    """The squares of such lengths leave float32."""
    features_ND, labels_N = sample(12, 4, 3, 1, torch.float32)
    features_ND[zeros] = 0
    features_ND.requires_grad_()
    scaled_ND = features_ND * torch.tensor(scale)
    loss = soft_nearest_neighbor_loss(scaled_ND, labels_N, 0.5, route=route)
    expected = reference.snnl(features_ND, labels_N, 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    wanted_ND = torch.autograd.grad(plain(features_ND, labels_N, 0.5, "cosine", "mean"), features_ND)[0]
    wanted_ND[zeros] *= scale  # they have no direction to keep: their gradient is that of length 1
    torch.testing.assert_close(features_ND.grad, wanted_ND, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_features_that_are_not_finite(route):
    features_ND, labels_N = sample(6, 3, 2, 0)
    for value in (math.nan, math.inf):
        features_ND[1, 2] = value
        for distance in DISTANCES:
            with pytest.raises(ValueError, match="NaN or infinity"):
                soft_nearest_neighbor_loss(features_ND, labels_N, distance=distance, route=route)


# --------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("small_tiles")
def test_a_retained_graph_gives_the_same_gradient_again(reduction, route):
    features_ND, labels_N = sample(14, 4, 3, 0)
    features_ND.requires_grad_()
    loss = soft_nearest_neighbor_loss(features_ND, labels_N, 0.4, reduction=reduction, route=route).sum()
    first, second = (torch.autograd.grad(loss, features_ND, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    doubled = torch.autograd.grad(2 * loss, features_ND)[0]
    torch.testing.assert_close(doubled, 2 * first)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_second_derivatives_by_finite_differences(distance, reduction):
    features_ND, labels_N = sample(9, 4, 3, 0)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(x_ND, temperature):
        return soft_nearest_neighbor_loss(x_ND, labels_N, temperature, distance, reduction)

    assert torch.autograd.gradgradcheck(loss, (features_ND.requires_grad_(), temperature))


def test_second_derivatives_where_samples_coincide():
    """The distance is 0 there, and its slope, but not its curvature: against differences of the gradient."""
    features_ND = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.5]], dtype=torch.float64)
    labels_N = torch.tensor([0, 0, 1, 1])

    def loss(x_ND):
        return soft_nearest_neighbor_loss(x_ND, labels_N, 1.0, "sqeuclidean")

    def gradient(x_ND):
        x_ND = x_ND.clone().requires_grad_()
        return torch.autograd.grad(loss(x_ND), x_ND)[0].flatten()

    steps = 1e-5 * torch.eye(8, dtype=torch.float64).view(8, 4, 2)
    expected = torch.stack([(gradient(features_ND + s) - gradient(features_ND - s)) / 2e-5 for s in steps])
    twice = torch.func.jacrev(torch.func.jacrev(loss))
    ours = torch.autograd.functional.hessian(loss, features_ND), twice(features_ND)
    for found in ours:
        torch.testing.assert_close(found.reshape(8, 8), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.usefixtures("small_tiles")
def test_without_gradients_the_value_is_the_same(route):
    features_ND, labels_N = sample(14, 4, 3, 0)
    recorded = soft_nearest_neighbor_loss(features_ND.clone().requires_grad_(), labels_N, 0.4, route=route)
    assert soft_nearest_neighbor_loss(features_ND, labels_N, 0.4, route=route) == recorded
    with torch.no_grad():
        assert soft_nearest_neighbor_loss(features_ND, labels_N, 0.4, route=route) == recorded


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_reaches_neither_value_nor_gradient(route):
    features_ND, labels_N = sample(40, 16, 4, 0, torch.float32)
    features_ND.requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            alone = soft_nearest_neighbor_loss(features_ND.detach(), labels_N, 0.1, route=route)
            loss = soft_nearest_neighbor_loss(features_ND, labels_N, 0.1, route=route)
            found.append([alone, loss, *torch.autograd.grad(loss, features_ND)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("route", ROUTES)
def test_strided_features(route):
    wide_ND, labels_N = sample(40, 16, 4, 0)
    strided_ND = wide_ND[:, ::2]
    loss = soft_nearest_neighbor_loss(strided_ND, labels_N, 0.3, route=route)
    assert loss == soft_nearest_neighbor_loss(strided_ND.contiguous(), labels_N, 0.3, route=route)


def test_an_unknown_route_is_named():
    with pytest.raises(ValueError, match="'cubic'"):
        soft_nearest_neighbor_loss(*sample(4, 3, 2, 0), route="cubic")


# ------------------------------------------------------------------------------- memory and products


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize(("route", "quadratic"), [("dense", True), ("streaming", False)])
def test_only_the_dense_route_holds_all_pairs(route, quadratic, monkeypatch):
    monkeypatch.setattr(streaming, "TILE", (10, 30))
    features_ND, labels_N = sample(300, 4, 5, 0)
    for distance in DISTANCES:
        with LargestTensor() as largest:
            soft_nearest_neighbor_loss(
                features_ND.requires_grad_(), labels_N, 0.4, distance, route=route
            ).backward()
        assert (largest.elements >= 300 * 300) == quadratic
        assert quadratic or largest.elements <= 300 * 4


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_either_library_of_products_will_do(distance, route, monkeypatch):
    """N and D large enough for oneDNN, where torch has it."""
    features_ND, labels_N = sample(200, 40, 5, 0, torch.float32)
    assert features_ND.numel() * len(labels_N) >= products.ONEDNN_FROM
    temperature = 1.0 if distance == "cosine" else 40.0
    agrees(features_ND, labels_N, temperature, distance, "mean", route, 1e-5, 1e-5)
    monkeypatch.setattr(products, "_onednn", lambda: None)
    agrees(features_ND, labels_N, temperature, distance, "mean", route, 1e-5, 1e-5)


# ---------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("route", ROUTES)
def test_layers_together_equal_layers_apart(route, monkeypatch):
    monkeypatch.setattr(autograd, "choose", lambda *_: route)
    widths = {"a": 3, "b": 7, "c": 7}
    activations = {name: sample(20, dim, 4, dim)[0].requires_grad_() for name, dim in widths.items()}
    labels_N = sample(20, 1, 4, 0)[1]
    snnl = LayerwiseSNNL(
        SNNLConfig(schedule="learned", temperature=0.5, layers=("a", "b", "c"), combine="sum")
    )
    inputs = [*activations.values(), snnl.log_temperature]
    together = torch.autograd.grad(snnl(activations, labels_N, 0), inputs)
    temperature = snnl.temperature(0)
    apart = sum(soft_nearest_neighbor_loss(x_ND, labels_N, temperature) for x_ND in activations.values())
    for found, expected in zip(together, torch.autograd.grad(apart, inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_least_layer_alone_is_pushed():
    activations = {"far": torch.eye(6, 9), "near": F.one_hot(torch.arange(6) % 2).float()}
    for features_ND in activations.values():
        features_ND.requires_grad_()
    snnl = LayerwiseSNNL(SNNLConfig(schedule="fixed", temperature=0.5, layers=("far", "near"), combine="min"))
    loss = snnl(activations, torch.arange(6) % 2, 0)
    loss.backward()
    assert loss.item() == pytest.approx(
        reference.snnl(activations["near"], torch.arange(6) % 2, 0.5), rel=1e-5
    )
    assert torch.equal(activations["far"].grad, torch.zeros(6, 9))


def test_layers_of_two_types():
    activations = {"a": sample(10, 3, 2, 0)[0], "b": sample(10, 5, 2, 1, torch.float32)[0]}
    labels_N = torch.arange(10) % 3
    snnl = LayerwiseSNNL(SNNLConfig(schedule="fixed", layers=("a", "b"), combine="sum"))
    expected = sum(reference.snnl(x_ND, labels_N, 1.0) for x_ND in activations.values())
    assert snnl(activations, labels_N, 0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [1e-3, 0.5, 50.0])
def test_a_gpu_agrees_with_the_cpu(temperature, distance, route):
    features_ND, labels_N = sample(200, 8, 6, 0)
    found = []
    for device in ("cpu", "cuda"):
        x_ND = features_ND.to(device).requires_grad_()
        learned = torch.tensor(temperature, dtype=torch.float64, device=device, requires_grad=True)
        loss = soft_nearest_neighbor_loss(x_ND, labels_N.to(device), learned, distance, route=route)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x_ND, learned))])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("route", ["streaming", "panels"])
def test_a_temperature_on_a_gpu_gets_the_digits_of_a_number(monkeypatch, route):
    """A device whose values cannot be read for nothing: the loss waits for it all the same."""
    monkeypatch.setattr(products, "HOST", ())
    features_ND, labels_N = sample(40, 8, 3, 0, torch.float32)
    doubles_ND = features_ND.double().requires_grad_()
    exact_ND = torch.autograd.grad(plain(doubles_ND, labels_N, 1e-5, "cosine", "mean"), doubles_ND)[0]
    for temperature in (1e-5, torch.tensor(1e-5)):
        x_ND = features_ND.clone().requires_grad_()
        loss = soft_nearest_neighbor_loss(x_ND, labels_N, temperature, "cosine", "mean", route)
        found_ND = torch.autograd.grad(loss, x_ND)[0]
        assert (found_ND - exact_ND).abs().max() < 1e-6 * exact_ND.abs().max()
