"""Expert ablations against loops, and where their outcome is known beforehand.

Shapes: N samples, E experts, C classes.
"""

import math

import numpy as np
import pytest
import reference
import torch

from moe_lib.metrics.interventions import expert_ablations
from moe_lib.moe import route

RULES = ("logits", "likelihood", "jacobs")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def specialists(num_experts=4, per_class=6):
    """Each class has one expert that knows it; the others guess the next class. [N, E], [N, E, C], [N]."""
    labels_N = torch.arange(num_experts).repeat(per_class)
    weights_NE = torch.nn.functional.one_hot(labels_N, num_experts).double()
    wrong_N = (labels_N + 1) % num_experts
    knows_NE1 = weights_NE[..., None] > 0
    said_NE = torch.where(knows_NE1[..., 0], labels_N[:, None], wrong_N[:, None])
    return weights_NE, 9 * torch.nn.functional.one_hot(said_NE, num_experts).double(), labels_N


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_experts", [2, 4])
def test_equals_the_loops(num_experts, rule, top_k):
    """With top-1 routing, dropping a sample's only expert leaves it to the others in equal parts."""
    weights_NE = route(2 * randn(30, num_experts), top_k).dense_weights()
    logits_NEC, labels_N = 3 * randn(30, num_experts, 3, seed=1), torch.arange(30) % 3
    logits_NEC = logits_NEC + 2 * torch.nn.functional.one_hot(labels_N, 3)[:, None]  # above chance
    draw = generator()
    orders = [torch.randperm(30, generator=draw).tolist() for _ in range(5)]
    expected = reference.expert_ablations(weights_NE, logits_NEC, labels_N, rule, orders)
    measured = expert_ablations(weights_NE, logits_NEC, labels_N, rule, generator())._asdict()
    assert set(measured) == set(expected)
    for name, value in measured.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_an_absent_class_has_no_damage_to_report():
    weights_NE, logits_NEC = randn(10, 3).softmax(1), randn(10, 3, 4, seed=1)
    damage_CE = np.array(
        expert_ablations(weights_NE, logits_NEC, torch.arange(10) % 3, "logits", generator()).damage_CE
    )
    assert damage_CE.shape == (4, 3)
    assert np.isnan(damage_CE[3]).all()
    assert np.isfinite(damage_CE[:3]).all()


@pytest.mark.parametrize("rule", RULES)
def test_specialists_are_missed_by_their_own_class_alone(rule):
    ablations = expert_ablations(*specialists(), rule, generator())
    np.testing.assert_allclose(ablations.damage_CE, np.eye(4))
    np.testing.assert_allclose(ablations.dropped, [0.25] * 4)
    assert ablations.swapped == pytest.approx(0.5)  # two of four classes go to the wrong expert
    assert ablations.permuted > 0.5
    assert ablations.permuted_cross_entropy > 1


def test_one_expert_has_nothing_to_ablate():
    weights_NE, logits_NEC = torch.ones(9, 1), randn(9, 1, 3).float()
    ablations = expert_ablations(weights_NE, logits_NEC, torch.arange(9) % 3, "logits", generator())
    assert len(ablations.dropped) == 1
    assert math.isnan(ablations.dropped[0])
    assert math.isnan(ablations.swapped)
    assert math.isnan(ablations.merged)
    assert np.shape(ablations.damage_CE) == (3, 1)
    assert np.isnan(ablations.damage_CE).all()
    assert ablations.permuted == ablations.permuted_cross_entropy == 0


def test_the_generator_alone_decides_and_the_arguments_stay_as_they_are():
    weights_NE, logits_NEC = randn(20, 3).softmax(1), randn(20, 3, 4, seed=1)
    labels_N = torch.arange(20) % 4
    copies = [x.clone() for x in (weights_NE, logits_NEC, labels_N)]
    state = torch.get_rng_state()
    first, again, other = (
        expert_ablations(weights_NE, logits_NEC, labels_N, "likelihood", generator(seed))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first.permuted_cross_entropy != other.permuted_cross_entropy
    assert torch.equal(torch.get_rng_state(), state)
    for copy, x in zip(copies, (weights_NE, logits_NEC, labels_N), strict=True):
        assert torch.equal(copy, x)


def test_float32_agrees_with_float64():
    weights_NE, logits_NEC = randn(40, 3).softmax(1), 3 * randn(40, 3, 4, seed=1)
    labels_N = torch.arange(40) % 4
    exact = expert_ablations(weights_NE, logits_NEC, labels_N, "likelihood", generator())
    single = expert_ablations(weights_NE.float(), logits_NEC.float(), labels_N, "likelihood", generator())
    assert single.dropped == pytest.approx(exact.dropped)
    assert single.permuted_cross_entropy == pytest.approx(exact.permuted_cross_entropy, rel=1e-5)
