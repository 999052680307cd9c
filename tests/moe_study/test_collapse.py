"""The three kinds of collapse where each is known beforehand, and on the committed runs.

Shapes: N samples, E experts, C classes.
"""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_lib import metrics
from moe_lib.metrics.collapse import (
    functional_collapse,
    representational_collapse,
    routing_collapse,
)
from moe_lib.metrics.interventions import expert_ablations
from moe_study import store
from moe_study.collapse import collapse, trajectory

E, C, N = 4, 8, 4000
RESULTS = sorted((Path(__file__).parents[2] / "results/core/snnl").glob("*/*.json"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels():
    return torch.arange(N) % C


def said(labels_N):
    """Sure and right. [N, C]"""
    return 9 * torch.nn.functional.one_hot(labels_N, C).double()


def measured(weights_NE, logits_NEC, labels_N):
    """A result file of a mixture with these weights and experts, by the project's own measures."""
    entropy = metrics.routing_entropy(weights_NE, labels_N, C)
    mixed_NC = torch.einsum("ne,nec->nc", weights_NE, logits_NEC)
    return {
        "routing": {"entropy": entropy._asdict()},
        "initial": {"routing": {"entropy": {"marginal": math.log(E)}}},
        "similarity": {"outputs": metrics.output_similarity(logits_NEC)},
        "null": {"similarity": {"outputs": 0.25}},
        "ablation": expert_ablations(weights_NE, logits_NEC, labels_N, "logits", generator())._asdict(),
        "task": {"accuracy": (mixed_NC.argmax(1) == labels_N).double().mean().item()},
    }


def hard(expert_N):
    return torch.nn.functional.one_hot(expert_N, E).double()


def noise():
    return torch.randn(N, E, C, generator=generator(1), dtype=torch.float64)


def specialists(expert_N, labels_N):
    """Each expert knows its own samples and nothing of the others'. [N, E, C]"""
    return hard(expert_N)[..., None] * said(labels_N)[:, None]


def test_perfect_specialists_have_collapsed_in_no_way():
    labels_N = labels()
    found = collapse(measured(hard(labels_N % E), specialists(labels_N % E, labels_N), labels_N))
    assert found.routing == pytest.approx((0, 0), abs=1e-9)
    assert found.representational == pytest.approx((0, 0.25), abs=0.05)  # 0.04: logits share a mean
    assert found.functional == pytest.approx((0, 1), abs=0.03)


def test_equal_experts_in_full_use_are_alike_and_routing_does_not_matter():
    labels_N = labels()
    logits_NEC = (said(labels_N) + noise()[:, 0])[:, None].expand(N, E, C)
    found = collapse(measured(hard(labels_N % E), logits_NEC, labels_N))
    assert found.routing.value == pytest.approx(0, abs=1e-9)
    assert found.representational.value == pytest.approx(1)
    assert found.functional.value == 1


def test_one_used_expert_among_untrained_ones_is_routing_collapse_alone_among_the_causes():
    labels_N = labels()
    logits_NEC = noise()
    logits_NEC[:, 2] = said(labels_N)
    found = collapse(measured(hard(torch.full((N,), 2)), logits_NEC, labels_N))
    assert found.routing.value == 1
    assert found.representational.value < 0.05
    assert found.functional.value == 1


def test_a_gate_that_ignores_its_input_before_unlike_experts_is_functional_collapse_alone():
    labels_N = labels()
    logits_NEC = 4 * noise() + said(labels_N)[:, None]
    found = collapse(measured(torch.full((N, E), 1 / E).double(), logits_NEC, labels_N))
    assert found.routing.value == pytest.approx(0, abs=1e-9)
    assert found.representational.value < 0.6
    assert found.functional.value == 1


def test_functional_collapse_follows_the_load_of_hard_specialists():
    """A permuted sample meets its own expert with probability sum_e p_e^2, and is else at chance."""
    labels_N = labels()
    expert_N = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3]).repeat_interleave(N // 8)[
        torch.randperm(N, generator=generator(2))
    ]
    found = collapse(measured(hard(expert_N), specialists(expert_N, labels_N), labels_N))
    met = sum((count / N) ** 2 for count in Counter(expert_N.tolist()).values())
    assert found.functional.value == pytest.approx(1 - (1 - met) / (1 - 1 / E), abs=0.03)


@pytest.mark.parametrize("num_experts", [2, 4, 7])
def test_routing_collapse_counts_the_experts_in_use(num_experts):
    for used in range(1, num_experts + 1):
        entropy = -sum(1 / used * math.log(1 / used) for _ in range(used))
        expected = (num_experts - used) / (num_experts - 1)
        assert routing_collapse(entropy, num_experts) == pytest.approx(expected)


def test_every_measure_moves_one_way():
    entropies = [routing_collapse(h, 4) for h in (0, 0.3, 0.6, 1.0, math.log(4))]
    assert entropies == sorted(entropies, reverse=True)
    costs = [functional_collapse(c, 0.9, 10, 4) for c in (-0.1, 0, 0.1, 0.3, 0.6, 0.9)]
    assert costs[:2] == [1, 1]
    assert costs == sorted(costs, reverse=True)
    assert costs[-2:] == pytest.approx([0, 0])
    alike = [representational_collapse(s) for s in (-1, 0, 0.2, 1)]
    assert alike == [0, 0, 0.2, 1]


def test_what_a_measure_cannot_say_is_nan_and_what_cannot_be_is_refused():
    assert math.isnan(functional_collapse(0.0, 0.1, 10, 4))  # at chance nothing can be lost
    assert math.isnan(routing_collapse(0.0, 1))
    assert math.isnan(representational_collapse(math.nan))
    assert math.isnan(functional_collapse(0.0, 0.9, 10, 1))
    for experts in range(2, 33):  # result files keep six digits
        entropy = store.compact(math.log(experts))
        assert routing_collapse(entropy, experts) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        routing_collapse(1.5, 4)
    with pytest.raises(ValueError, match=r"got 1\.2"):
        representational_collapse(1.2)


@pytest.mark.skipif(not RESULTS, reason="no committed runs")
def test_committed_runs():
    """Loops over the files' own numbers; a dense network says nothing."""
    for path in RESULTS:
        result = json.loads(path.read_text())
        found, arm = collapse(result), result["run"]["arm"]
        follow = trajectory(result)
        if arm.startswith("dense"):
            assert all(math.isnan(d) for degree in found for d in degree), path
            assert all(math.isnan(v) for values in follow.values() for v in values), path
            continue
        effective = result["routing"]["load"]["effective_experts"]
        assert found.routing.value == pytest.approx(1 - (effective - 1) / 3, abs=1e-4), path
        num_classes = result["routing"]["entropy"]["num_classes"]
        kept = (result["task"]["accuracy"] - result["ablation"]["permuted"] - 1 / num_classes) / (
            result["task"]["accuracy"] - 1 / num_classes
        )
        assert found.functional.value == pytest.approx(min(1 - (1 - kept) / 0.75, 1), abs=1e-9), path
        for degree in found[:3]:
            assert 0 <= degree.value <= 1, path
        assert len(follow["routing"]) == len(follow["representational"]) == result["run"]["train"]["epochs"]
        assert all(0 <= v <= 1 for values in follow.values() for v in values), path
        if arm in ("base", "snnl"):
            assert 0 <= found.representational.null <= 1, path
