"""What routers return, and the load-balancing loss.

Shapes: N tokens, D width, E experts, K chosen.
"""

import numpy as np
import pytest
import reference
import reference_ac
import torch

from moe_lib.moe import (
    AdaptiveClusteringRouter,
    CosineRouter,
    Experts,
    HashRouter,
    LinearRouter,
    MLPRouter,
    MoE,
    Routing,
    UniformRouter,
    joined,
    load_balancing_loss,
    route,
    router_z_loss,
)


def random_logits(num_tokens=9, num_experts=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64).to(dtype)


def random_tokens(num_tokens=9, dim=4, dtype=torch.float32):
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(1)).to(dtype)


# -------------------------------------------------------------------------------------- decisions


def test_soft_routing_keeps_every_expert_in_order():
    logits_NE = random_logits()
    routing = route(logits_NE)
    assert routing.logits_NE is logits_NE
    expected_NE = np.stack([reference.softmax(row) for row in logits_NE.numpy()])
    np.testing.assert_allclose(routing.probs_NE, expected_NE, rtol=1e-12)
    assert torch.equal(routing.indices_NK, torch.arange(5).expand(9, 5))
    assert torch.equal(routing.weights_NK, routing.probs_NE)
    assert torch.equal(routing.dense_weights(), routing.probs_NE)


@pytest.mark.parametrize("renormalize", [None, True, False])
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_top_k_chooses_the_best(k, renormalize):
    """Weights are the probabilities, divided by their sum where asked for, and by default for k > 1."""
    if k == 1 and renormalize:
        with pytest.raises(ValueError, match="renormalize"):
            route(random_logits(), 1, True)
        return
    routing = route(random_logits(), k, renormalize)
    assert routing.indices_NK.shape == routing.weights_NK.shape == (9, k)
    divided = k > 1 if renormalize is None else renormalize
    for n in range(9):
        chosen, shares = reference.top_k(routing.probs_NE[n].tolist(), k)
        assert routing.indices_NK[n].tolist() == chosen
        expected = shares if divided else [routing.probs_NE[n, e].item() for e in chosen]
        np.testing.assert_allclose(routing.weights_NK[n], expected, rtol=1e-12)
    torch.testing.assert_close(routing.probs_NE, route(random_logits()).probs_NE)  # not cut to the top k


def test_top_restricts_a_decision_that_was_already_made():
    logits_NE = random_logits()
    for restricted, direct in zip(route(logits_NE).top(2), route(logits_NE, top_k=2), strict=True):
        assert torch.equal(restricted, direct)
    for restricted, direct in zip(route(logits_NE, top_k=3).top(1), route(logits_NE, top_k=1), strict=True):
        assert torch.equal(restricted, direct)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_among_equals_k_different_experts_are_chosen(k):
    indices_NK = route(torch.zeros(4, 5), top_k=k).indices_NK
    assert all(len(set(row)) == k for row in indices_NK.tolist())


def test_extreme_logits_stay_finite_and_differentiable():
    logits_NE = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    routing = route(logits_NE, top_k=2)
    torch.testing.assert_close(routing.probs_NE, torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))
    (routing.weights_NK * torch.tensor([1.0, 2.0])).sum().backward()
    assert logits_NE.grad.isfinite().all()


def test_top_k_weights_pass_gradcheck():
    logits_NE = random_logits(4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route(z, top_k=2).dense_weights(), (logits_NE,))


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_gates(dtype):
    logits_NE = random_logits(dtype=dtype)
    routing = route(logits_NE, top_k=2)
    assert routing.logits_NE.dtype == dtype
    assert routing.probs_NE.dtype == routing.weights_NK.dtype == torch.float32
    assert torch.equal(routing.probs_NE, logits_NE.float().softmax(1))


@pytest.mark.parametrize(
    "router",
    [LinearRouter(4, 3), MLPRouter(4, 3, 8), UniformRouter(3)],
    ids=["linear", "mlp", "uniform"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gates_of_routers_are_float32_or_better(router, dtype):
    routing = router.to(dtype)(random_tokens(dtype=dtype))
    expected = torch.promote_types(dtype, torch.float32)
    assert routing.probs_NE.dtype == routing.weights_NK.dtype == expected
    torch.testing.assert_close(routing.probs_NE.sum(1), torch.ones(9, dtype=expected))


# ---------------------------------------------------------------------------------------- routers


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 7, 16])
def test_uniform_router_is_exactly_uniform_whatever_the_token(num_experts):
    for dtype in (torch.float32, torch.float64):
        probs_NE = UniformRouter(num_experts)(random_tokens(dtype=dtype) * 100).probs_NE
        assert torch.equal(probs_NE, torch.full((9, num_experts), 1 / num_experts, dtype=dtype))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(num_tokens):
    for router in (LinearRouter(4, 3, 2), MLPRouter(4, 3, 8, 2)):
        assert router(random_tokens(num_tokens)).weights_NK.shape == (num_tokens, 2)
    assert UniformRouter(3)(random_tokens(num_tokens)).weights_NK.shape == (num_tokens, 3)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "message"),
    [
        (0, None, "num_experts.*0"), (-1, None, "num_experts.*-1"), (3, 0, "top_k.*0"), (3, -2, "top_k.*-2"),
        (3, 4, "top_k.*3.*4"),
    ],
)  # fmt: skip
def test_impossible_numbers_are_named(num_experts, top_k, message):
    makers = [
        lambda e, k: LinearRouter(4, e, k), lambda e, k: MLPRouter(4, e, 8, k),
        lambda e, k: CosineRouter(4, e, k), lambda e, k: AdaptiveClusteringRouter(4, e, k),
        lambda e, k: MoE(4, e, 6, top_k=k),
    ]  # fmt: skip
    if top_k is None:
        makers += [lambda e, _: UniformRouter(e), lambda e, _: Experts(4, e, 6, 3)]
    else:
        makers += [lambda e, k: route(torch.zeros(2, e), k)]
    for make in makers:
        with pytest.raises(ValueError, match=message):
            make(num_experts, top_k)


# --------------------------------------------------------------------------- load-balancing loss


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_balance_is_one_for_uniform_routing(num_experts):
    assert load_balancing_loss(UniformRouter(num_experts)(random_tokens())).item() == pytest.approx(1)
    one_each_NE = torch.eye(num_experts, dtype=torch.float64)
    routing = Routing(
        one_each_NE, one_each_NE, torch.arange(num_experts)[:, None], torch.ones(num_experts, 1)
    )
    assert load_balancing_loss(routing).item() == pytest.approx(1)


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_balance_is_the_number_of_experts_for_collapse(num_experts):
    logits_NE = torch.zeros(6, num_experts, dtype=torch.float64)
    logits_NE[:, 1] = 1000
    assert load_balancing_loss(route(logits_NE, top_k=1)).item() == pytest.approx(num_experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_balance_counts_tokens_beyond_the_digits_of_a_half_type(dtype):
    logits_NE = torch.zeros(20_000, 4, requires_grad=True)
    probs_NE = (logits_NE + torch.tensor([3.0, 0.0, 0.0, 0.0])).softmax(1)
    exact = route(probs_NE.log(), top_k=1)
    rounded = exact._replace(probs_NE=exact.probs_NE.to(dtype))
    assert load_balancing_loss(rounded).item() == pytest.approx(load_balancing_loss(exact).item(), rel=1e-2)


# ------------------------------------------------------------------------------ several, and all losses


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_losses_of_a_decision_equal_the_loops(seed, top_k):
    routing = route(3 * random_logits(11, 4, seed), top_k)
    balance = reference.load_balancing_loss(routing.probs_NE, routing.indices_NK)
    assert load_balancing_loss(routing).item() == pytest.approx(balance, rel=1e-12)
    z_loss = reference_ac.router_z_loss(routing.logits_NE)
    assert router_z_loss(routing).item() == pytest.approx(z_loss, rel=1e-12)


@pytest.mark.parametrize("build", [lambda: LinearRouter(64, 8, 2), lambda: MLPRouter(64, 8, 16, 2)])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gates_run_in_float32_under_autocast(build, weights):
    """In bfloat16 some of these tokens would go to other experts."""
    torch.manual_seed(0)
    router, tokens_ND = build().to(weights), random_tokens(4000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(tokens_ND)
        rounded_NE = router.gate.to(torch.float32)(tokens_ND)
    expected_NE = router.gate.to(torch.float64)(tokens_ND.double())
    assert found.logits_NE.dtype == found.probs_NE.dtype == torch.float32
    torch.testing.assert_close(found.logits_NE.double(), expected_NE, rtol=1e-5, atol=1e-5)
    chosen_N2 = expected_NE.topk(2).indices
    assert torch.equal(found.indices_NK, chosen_N2)
    assert not torch.equal(rounded_NE.topk(2).indices, chosen_N2)


def test_joined_decisions_are_those_of_the_joined_tokens():
    logits_NE = random_logits(12)
    parts = [route(part, 2) for part in logits_NE.split([5, 0, 1, 6])]
    for field, expected in zip(joined(parts), route(logits_NE, 2), strict=True):
        assert torch.equal(field, expected)


# ----------------------------------------------------------------------------------- fixed experts


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_hash_router_gives_each_key_its_own_experts_whatever_the_token(top_k):
    router = HashRouter(num_experts=5, num_keys=7, top_k=top_k)
    keys_N = torch.tensor([0, 3, 6, 3, 0, 1, 2, 4, 5])
    first, second = (router(random_tokens() + shift, keys_N=keys_N) for shift in (0, 10))
    assert torch.equal(first.indices_NK, second.indices_NK)
    assert torch.equal(first.indices_NK, router.experts_RK[keys_N])
    assert all(len(set(row)) == top_k for row in first.indices_NK.tolist())
    for n, chosen_K in enumerate(first.indices_NK.tolist()):
        expected = [1 / top_k if e in chosen_K else 0.0 for e in range(5)]
        assert first.probs_NE[n].tolist() == pytest.approx(expected)
        assert first.dense_weights()[n].tolist() == pytest.approx(expected)


def test_a_hash_router_learns_nothing_and_is_kept_with_the_model():
    router, other = HashRouter(8, 40, 2), HashRouter(8, 40, 2)
    assert list(router.parameters()) == []
    assert not torch.equal(router.experts_RK, other.experts_RK)
    other.load_state_dict(router.state_dict())
    assert torch.equal(router.experts_RK, other.experts_RK)


def test_a_hash_router_uses_all_experts_alike():
    counts_E = HashRouter(8, 20_000, 2).experts_RK.flatten().bincount(minlength=8)
    np.testing.assert_allclose(counts_E / 40_000, 1 / 8, atol=0.01)


def test_a_hash_router_needs_a_key_for_every_token():
    router = HashRouter(4, 3)
    with pytest.raises(ValueError, match=r"keys must hold one key per token, \[9\]"):
        router(random_tokens())
    with pytest.raises(ValueError, match="keys"):
        router(random_tokens(), keys_N=torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"num_keys must be .*at least 1, got 0"):
        HashRouter(4, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_are_drawn_in_half_types(dtype):
    with torch.device("meta"):
        router = CosineRouter(8, 4)
    router = router.to(dtype).to_empty(device="cpu")
    router.reset_parameters()
    gram_EE = router.embeddings_ED.float() @ router.embeddings_ED.float().T
    torch.testing.assert_close(gram_EE, torch.eye(4), rtol=0, atol=0.02)
