"""Stacked experts and the mixture layer against loops over tokens and experts, with a fixed fake router.

Shapes: N tokens, D width, H hidden width, O output width, E experts, K chosen.
"""

import numpy as np
import pytest
import reference
import reference_ac
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_lib.moe import (
    ACConfig,
    AdaptiveClusteringRouter,
    CosineRouter,
    Experts,
    LinearRouter,
    MoE,
    UniformRouter,
    route,
)
from moe_lib.moe import dispatch as expert_kernels


class FixedRouter(nn.Module):
    """Returns what it was given, whatever the tokens; remembers its last arguments."""

    def __init__(self, routing):
        super().__init__()
        self.routing = routing

    def forward(self, tokens_ND, previous=None):
        self.seen = tokens_ND, previous
        return self.routing


def tokens(num_tokens=7, dim=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64).to(dtype)


def fixed_routing(num_tokens=7, num_experts=5, top_k=None, seed=1):
    return route(tokens(num_tokens, num_experts, seed), top_k)


def moe_layer(num_experts=5, top_k=None, router=None, seed=3, out_dim=3, dtype=torch.float64):
    """Weights from the seed, with biases that are not zero."""
    layer = MoE(4, num_experts, 6, out_dim, top_k, router).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return layer


def stacked(experts):
    return experts.w1_EDH, experts.b1_EH, experts.w2_EHO, experts.b2_EO


# ---------------------------------------------------------------------------------------- experts


def test_every_expert_on_every_row():
    experts, x_ND = moe_layer().experts, tokens()
    out_NEO = experts(x_ND)
    assert out_NEO.shape == (7, 5, 3)
    for n in range(7):
        for e in range(5):
            weights = [reference.array(weight[e]) for weight in stacked(experts)]
            expected_O = reference.expert_output(reference.array(x_ND[n]), *weights)
            np.testing.assert_allclose(out_NEO[n, e].detach(), expected_O, rtol=1e-10, atol=1e-12)


def test_one_expert_alone_equals_its_share_of_all():
    experts, x_ND = moe_layer().experts, tokens()
    for e in range(5):
        torch.testing.assert_close(experts.expert(e, x_ND), experts(x_ND)[:, e])


def test_flat_weights_hold_every_number_of_each_expert_once():
    experts = moe_layer().experts
    flat_EP = experts.flat_weights()
    assert flat_EP.shape == (5, 4 * 6 + 6 + 6 * 3 + 3)
    assert not flat_EP.requires_grad
    for e in range(5):
        expected = torch.cat([weight[e].flatten() for weight in stacked(experts)])
        assert torch.equal(flat_EP[e].sort().values, expected.sort().values)


def test_initial_scale_is_kaiming_and_biases_are_zero():
    experts = Experts(50, 4, 200, 30)
    assert experts.w1_EDH.std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.03)
    assert experts.w2_EHO.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.03)
    assert not experts.b1_EH.any()
    assert not experts.b2_EO.any()
    assert not torch.equal(experts.w1_EDH[0], experts.w1_EDH[1])


# ---------------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize("top_k", [None, 1, 2, 4, 5])
def test_equals_the_dense_loop(top_k):
    routing = fixed_routing()
    layer, x_ND = moe_layer(top_k=top_k, router=FixedRouter(routing)), tokens()
    out_NO, used = layer(x_ND)
    whole = top_k in (None, 5)  # nothing to choose: the decision is passed on as it is
    for field, expected in zip(used, routing if whole else routing.top(top_k), strict=True):
        assert torch.equal(field, expected)
    expected_NO = reference.moe(x_ND, used.indices_NK, used.weights_NK, *stacked(layer.experts))
    np.testing.assert_allclose(out_NO.detach(), expected_NO, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_a_router_that_chooses_itself_is_obeyed(top_k):
    """Also with all experts chosen, where the order of the choices is the router's."""
    routing = fixed_routing(top_k=top_k)
    layer, x_ND = moe_layer(router=FixedRouter(routing)), tokens()
    out_NO, used = layer(x_ND)
    assert used is routing
    expected_NO = reference.moe(x_ND, routing.indices_NK, routing.weights_NK, *stacked(layer.experts))
    np.testing.assert_allclose(out_NO.detach(), expected_NO, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("gate", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float32)],
)
def test_weights_of_another_type_leave_the_sum_in_that_of_the_experts(gate, dtype, top_k):
    """From a router of somebody's own."""
    routing = fixed_routing(top_k=top_k)
    given = routing._replace(probs_NE=routing.probs_NE.to(gate), weights_NK=routing.weights_NK.to(gate))
    layer, x_ND = moe_layer(router=FixedRouter(given), dtype=dtype), tokens(dtype=dtype)
    out_NO, _ = layer(x_ND)
    assert out_NO.dtype == dtype
    expected_NO = reference.moe(x_ND, given.indices_NK, given.weights_NK.double(), *stacked(layer.experts))
    np.testing.assert_allclose(out_NO.detach(), expected_NO, rtol=1e-5, atol=1e-5)


def test_the_router_sees_the_tokens_and_the_previous_decision():
    router, previous, x_ND = FixedRouter(fixed_routing()), fixed_routing(seed=8), tokens()
    moe_layer(router=router)(x_ND, previous)
    assert router.seen[0] is x_ND
    assert router.seen[1] is previous


def test_without_a_router_a_linear_one_is_made():
    layer = moe_layer(top_k=2)
    assert isinstance(layer.router, LinearRouter)
    out_NO, used = layer(tokens())
    expected_NO = reference.moe(tokens(), used.indices_NK, used.weights_NK, *stacked(layer.experts))
    np.testing.assert_allclose(out_NO.detach(), expected_NO, rtol=1e-10, atol=1e-12)


def test_one_expert_is_a_plain_network():
    layer, x_ND = moe_layer(num_experts=1), tokens()
    torch.testing.assert_close(layer(x_ND)[0], layer.experts.expert(0, x_ND))


@pytest.mark.parametrize("top_k", [None, 2])
def test_bfloat16_tokens_keep_a_float32_gate(top_k):
    layer = moe_layer(top_k=top_k, dtype=torch.bfloat16)
    out_NO, used = layer(tokens(dtype=torch.bfloat16))
    assert used.probs_NE.dtype == used.weights_NK.dtype == torch.float32
    assert out_NO.dtype == torch.bfloat16
    expected_NO = reference.moe(
        tokens(dtype=torch.bfloat16).float(), used.indices_NK, used.weights_NK,
        *(weight.float() for weight in stacked(layer.experts)),
    )  # fmt: skip
    np.testing.assert_allclose(out_NO.detach().float(), expected_NO, rtol=0.05, atol=0.05)


# -------------------------------------------------------------------------------------- gradients


# -------------------------------------------------------------------------------- degenerate cases


def test_experts_without_tokens_work_forward_and_backward():
    logits_NE = torch.zeros(7, 5, dtype=torch.float64)
    logits_NE[:, 3] = 50
    layer = moe_layer(top_k=1, router=FixedRouter(route(logits_NE)))
    x_ND = tokens().requires_grad_()
    out_NO, _ = layer(x_ND)
    torch.testing.assert_close(out_NO, layer.experts.expert(3, x_ND))
    out_NO.square().sum().backward()
    for weight in layer.experts.parameters():
        assert weight.grad[3].any()
        assert not weight.grad[[0, 1, 2, 4]].any()
    assert x_ND.grad.isfinite().all()


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_no_token_and_one_token(num_tokens, top_k):
    layer, x_ND = moe_layer(top_k=top_k), tokens(num_tokens).requires_grad_()
    out_NO, used = layer(x_ND)
    assert out_NO.shape == (num_tokens, 3)
    assert len(used.probs_NE) == num_tokens
    out_NO.sum().backward()
    assert layer.experts.w1_EDH.grad.isfinite().all()
    if num_tokens:
        expected_NO = reference.moe(x_ND, used.indices_NK, used.weights_NK, *stacked(layer.experts))
        np.testing.assert_allclose(out_NO.detach(), expected_NO, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------- errors


def test_a_router_that_chooses_fewer_is_refused():
    layer = MoE(4, 3, 6, top_k=2, router=LinearRouter(4, 3, top_k=1))
    with pytest.raises(ValueError, match=r"top_k = 2.*chooses 1"):
        layer(tokens(dtype=torch.float32))


@pytest.mark.parametrize("router", [UniformRouter(3), UniformRouter(8), LinearRouter(4, 3, top_k=2)])
def test_a_router_for_another_number_of_experts_is_refused(router):
    layer = MoE(4, 5, 6, router=router)
    with pytest.raises(ValueError, match="5"):
        layer(tokens(dtype=torch.float32))


# ----------------------------------------------------------------------------- dispatch with every router


ROUTERS = {
    "linear": lambda top_k: LinearRouter(4, 3, top_k),
    "cosine": lambda top_k: CosineRouter(4, 3, top_k),
    "ac": lambda top_k: AdaptiveClusteringRouter(4, 3, top_k, ACConfig(gradient=True)),
    "ac-mixed": lambda top_k: AdaptiveClusteringRouter(4, 3, top_k, ACConfig(gradient=True, mixed=True)),
    "ac-scaled": lambda top_k: AdaptiveClusteringRouter(
        4, 3, top_k, ACConfig(gradient=True, scale_experts=True, matched=True)
    ),
}


def test_the_order_of_a_tokens_choices_does_not_matter():
    routing = fixed_routing(top_k=3)
    flipped = routing._replace(indices_NK=routing.indices_NK.flip(1), weights_NK=routing.weights_NK.flip(1))
    outs = [moe_layer(router=FixedRouter(one))(tokens())[0] for one in (routing, flipped)]
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_the_layer_passes_gradcheck_with_every_router(router, top_k):
    """By tokens, weights and the scores of the decision before; with M differentiated."""
    layer = moe_layer(3, top_k=top_k, router=router(top_k), out_dim=None)
    x_ND, earlier_NE = tokens(8), tokens(8, 3, seed=4)
    assert (torch.bincount(earlier_NE.argmax(1), minlength=3) >= 2).sum() >= 2  # or M = I
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(x_ND, earlier_NE, *values):
        arguments = x_ND, route(earlier_NE, top_k)
        out_NO, routing = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), arguments)
        return out_NO, routing.probs_NE

    inputs = (x_ND.requires_grad_(), earlier_NE.requires_grad_(), *values)
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("top_k", [2, 5])
def test_scaled_experts_see_what_the_router_sees(top_k, matched):
    config = ACConfig(scale_experts=True, matched=matched)
    layer = moe_layer(top_k=top_k, router=AdaptiveClusteringRouter(4, 5, top_k, config))
    x_ND, previous = tokens(30), fixed_routing(30)
    out_NO, used = layer(x_ND, previous)
    cluster_N = reference.array(previous.probs_NE).argmax(1)
    scales_ED = reference_ac.adaptive_scales(x_ND, cluster_N, 5)
    scaled_ND = reference.array(x_ND) * scales_ED[cluster_N]
    if matched:
        scaled_ND *= np.linalg.norm(x_ND, axis=1, keepdims=True) / np.linalg.norm(
            scaled_ND, axis=1, keepdims=True
        )
    np.testing.assert_allclose(
        used.logits_NE.detach(),
        reference_ac.scores(scaled_ND, layer.router.embeddings_ED),
        rtol=1e-9,
        atol=1e-12,
    )
    expected_NO = reference.moe(scaled_ND, used.indices_NK, used.weights_NK, *stacked(layer.experts))
    np.testing.assert_allclose(out_NO.detach(), expected_NO, rtol=1e-9, atol=1e-11)
    plain_NO = reference.moe(x_ND, used.indices_NK, used.weights_NK, *stacked(layer.experts))
    assert np.abs(expected_NO - plain_NO).max() > 0.1


def test_scaled_experts_keep_the_type_of_the_tokens():
    router = AdaptiveClusteringRouter(4, 5, 2, ACConfig(scale_experts=True))
    layer = moe_layer(top_k=2, router=router, dtype=torch.bfloat16)
    assert layer(tokens(dtype=torch.bfloat16), fixed_routing())[0].dtype == torch.bfloat16


def test_scaled_experts_of_a_router_that_chooses_more_are_restricted_too():
    router = AdaptiveClusteringRouter(4, 5, config=ACConfig(scale_experts=True))
    _, used = moe_layer(top_k=2, router=router)(tokens(), fixed_routing())
    assert used.indices_NK.shape == (7, 2)


# ------------------------------------------------------------------------------------ fast and plain


def plain(x_ND, routing, experts):
    """Every expert on every row, by what autograd knows."""
    w1_EDH, b1_EH, w2_EHO, b2_EO = experts
    hidden_ENH = (x_ND @ w1_EDH + b1_EH[:, None]).relu()
    out_ENO = hidden_ENH @ w2_EHO + b2_EO[:, None]
    return (routing.dense_weights().T[..., None] * out_ENO).sum(0)


def values_and_gradients(function, x_ND, logits_NE, top_k, experts, rows=slice(None)):
    target_NO = tokens(len(x_ND), experts[-1].shape[-1], seed=9, dtype=x_ND.dtype)[rows]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x_ND[rows], logits_NE[rows], *experts)]
    out_NO = function(inputs[0], route(inputs[1], top_k), expert_kernels.Stacked(*inputs[2:]))
    return [out_NO.detach(), *torch.autograd.grad((out_NO * target_NO).sum(), inputs)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 70), *[st.integers(1, 9)] * 4),
    chosen=st.integers(1, 9),
    idle=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_fast_and_plain_forms_agree(dtype, tolerance, sizes, chosen, idle, seed):
    """Any shape, K up to E, an expert that nobody chooses.

    Relative to the largest entry of each result; for a sum over rows, to that of the sum of magnitudes: what
    cancels in the sum does not cancel in its rounding errors.
    """
    num_rows, dim, hidden_dim, out_dim, num_experts = sizes
    top_k = min(chosen, num_experts)
    shapes = (dim, hidden_dim), (hidden_dim,), (hidden_dim, out_dim), (out_dim,)
    experts = [
        tokens(num_experts, int(np.prod(shape)), seed + i).unflatten(1, shape)
        for i, shape in enumerate(shapes)
    ]
    logits_NE = tokens(num_rows, num_experts, seed + 5)
    if idle:
        logits_NE[:, 0] -= 30
    arguments = [tensor.to(dtype) for tensor in (tokens(num_rows, dim, seed + 6), logits_NE)]
    arguments += [top_k, [weight.to(dtype) for weight in experts]]
    found = values_and_gradients(expert_kernels.mixture, *arguments)
    exact = [
        tensor.double() if isinstance(tensor, torch.Tensor) else tensor
        for tensor in (arguments[0], arguments[1])
    ]
    exact += [top_k, [weight.double() for weight in arguments[3]]]
    expected = values_and_gradients(plain, *exact)
    magnitudes = [tensor.abs() for tensor in expected]
    if num_rows:
        by_row = [values_and_gradients(plain, *exact, rows=slice(row, row + 1)) for row in range(num_rows)]
        magnitudes[3:] = [sum(row[i].abs() for row in by_row) for i in range(3, len(expected))]
    for one, other, magnitude in zip(found, expected, magnitudes, strict=True):
        assert one.dtype == dtype
        if other.numel():
            bound = tolerance * max(1.0, magnitude.max().item())
            torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@pytest.mark.parametrize("top_k", [2, 5])
def test_inputs_alone_are_differentiated_where_weights_are_frozen(top_k):
    layer, x_ND = moe_layer(top_k=top_k), tokens().requires_grad_()
    (expected_ND,) = torch.autograd.grad(layer(x_ND)[0].sum(), x_ND)
    (found_ND,) = torch.autograd.grad(layer.requires_grad_(False)(x_ND)[0].sum(), x_ND)
    torch.testing.assert_close(found_ND, expected_ND)


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_second_derivatives_by_finite_differences(top_k):
    """Of smooth points: no hidden unit and no choice of an expert changes within the step."""
    layer, x_ND = moe_layer(top_k=top_k), tokens().requires_grad_()
    weights = list(layer.parameters())
    assert torch.autograd.gradgradcheck(lambda *inputs: layer(inputs[0])[0].tanh(), (x_ND, *weights))


def test_a_penalty_on_the_gradient_of_a_sum():
    """Whose incoming gradient is a constant: the case in which a second derivative was silently wrong."""
    layer, x_ND = moe_layer(top_k=2), tokens().requires_grad_()

    def penalty(x_ND):
        (gradient_ND,) = torch.autograd.grad(layer(x_ND)[0].sum(), x_ND, create_graph=True)
        return gradient_ND.square().sum()

    penalty(x_ND).backward()
    step_ND, size = torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(5)).double(), 1e-6
    above, below = (penalty((x_ND + sign * size * step_ND).detach().requires_grad_()) for sign in (1, -1))
    slope = (above - below).item() / (2 * size)
    assert (x_ND.grad * step_ND).sum().item() == pytest.approx(slope, rel=1e-5)


def test_renormalize_reaches_the_decision():
    x_ND = tokens()
    for renormalize, whole in ((None, True), (True, True), (False, False)):
        routing = MoE(x_ND.shape[1], 4, 8, top_k=2, renormalize=renormalize).double().route(x_ND)
        sums_N = routing.weights_NK.sum(1)
        assert torch.allclose(sums_N, torch.ones_like(sums_N)) == whole
    with pytest.raises(ValueError, match="renormalize"):
        MoE(8, 4, 16, top_k=1, renormalize=True)


def test_a_batch_of_sequences_is_refused_with_the_remedy():
    layer = MoE(8, 4, 16, top_k=2)
    with pytest.raises(ValueError, match=r"tokens must have shape \[N, 8\], got \[2, 3, 8\].*flatten"):
        layer(torch.zeros(2, 3, 8))


@pytest.mark.parametrize("top_k", [2, 5])
def test_autocast_computes_experts_in_its_type(top_k):
    layer, x_ND = moe_layer(top_k=top_k, dtype=torch.float32), tokens(dtype=torch.float32)
    expected_NO = layer(x_ND)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out_NO = layer(x_ND)[0]
    assert out_NO.dtype == torch.bfloat16
    torch.testing.assert_close(out_NO.float(), expected_NO, rtol=0.05, atol=0.05)
    out_NO.float().sum().backward()
    assert layer.experts.w1_EDH.grad.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_grouped_products_agree(device, dtype, rtol):
    """Expert 2 has no row."""
    logits_NE = tokens(40, 4, 1)
    logits_NE[:, 2] -= 50
    experts = [weight.detach() / 4 for weight in MoE(16, 4, 24, 8).double().experts.stacked()]
    arguments = [tensor.to(device, dtype) for tensor in (tokens(40, 16), logits_NE)]
    experts = [weight.to(device, dtype) for weight in experts]
    found = values_and_gradients(expert_kernels._by_grouped_products, *arguments, 2, experts)
    expected = values_and_gradients(
        plain, *(tensor.double() for tensor in arguments), 2, [weight.double() for weight in experts]
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=rtol * other.abs().max().item())


@pytest.mark.parametrize("top_k", [None, 2, 4])
@pytest.mark.parametrize(("constant", "value"), [("CACHED", 0), ("FEW_ROWS", 0), ("FEW_ROWS", 2**30)])
def test_no_size_changes_what_is_computed(monkeypatch, top_k, constant, value):
    monkeypatch.setattr(expert_kernels, constant, value)
    x_ND, logits_NE = tokens(400, 64, dtype=torch.float32), tokens(400, 4, 1, dtype=torch.float32)
    experts = [weight.detach() for weight in MoE(64, 4, 128, 32).experts.stacked()]
    found = values_and_gradients(expert_kernels.mixture, x_ND, logits_NE, top_k, experts)
    doubles = x_ND.double(), logits_NE.double(), top_k, [weight.double() for weight in experts]
    expected = values_and_gradients(plain, *doubles)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_a_constant_gate_has_no_best_experts():
    """All tie: every token would go to the first ones."""
    with pytest.raises(ValueError, match="top_k must not be 1 behind a UniformRouter"):
        MoE(8, 4, 16, top_k=1, router=UniformRouter(4))
    MoE(8, 4, 16, top_k=4, router=UniformRouter(4))


def test_keys_without_a_use_are_refused():
    with pytest.raises(ValueError, match="keys_N has no effect on a LinearRouter"):
        moe_layer()(tokens(), keys_N=torch.zeros(7, dtype=torch.int64))


def test_a_soft_mixture_of_many_experts_sums_in_float32(monkeypatch):
    """In bfloat16 the sum over 64 experts would lose three times as much."""
    monkeypatch.setattr(expert_kernels, "CACHED", 0)
    x_ND, logits_NE = tokens(200, 32, dtype=torch.bfloat16), tokens(200, 64, 1, dtype=torch.bfloat16)
    experts = [weight.detach().bfloat16() for weight in MoE(32, 64, 16, 8).experts.stacked()]
    found_NO = expert_kernels.mixture(x_ND, route(logits_NE), expert_kernels.Stacked(*experts)).double()
    doubles = expert_kernels.Stacked(*(weight.double() for weight in experts))
    expected_NO = expert_kernels.mixture(x_ND.double(), route(logits_NE.double()), doubles)
    assert (found_NO - expected_NO).norm() < 0.006 * expected_NO.norm()
