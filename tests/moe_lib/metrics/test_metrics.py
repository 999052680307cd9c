"""Every measure against its loop-written form, its closed forms and its invariances.

Shapes: N samples, D width, E experts, C classes, P parameters, H hidden units.
"""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lib import metrics
from moe_lib.moe import Experts


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_gates(num_samples=23, num_experts=4, num_classes=3, seed=0, sharpness=2.0):
    labels_N = torch.randint(num_classes, (num_samples,), generator=torch.Generator().manual_seed(seed))
    return (randn(num_samples, num_experts, seed=seed) * sharpness).softmax(1), labels_N


def one_hot(index_N, num_experts):
    return torch.nn.functional.one_hot(index_N, num_experts).double()


def random_experts(num_experts=3, dim=3, hidden=4, out=2, seed=0):
    experts = Experts(dim, num_experts, hidden, out).double()
    with torch.no_grad():
        for i, parameter in enumerate(experts.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=10 * seed + i))
    return experts


# ------------------------------------------------------------------------------- routing entropy


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(1, 14),
    num_experts=st.integers(1, 5),
    num_classes=st.integers(1, 4),
    sharpness=st.sampled_from([0.0, 1.0, 5.0, 1000.0, 1e19]),  # uniform to one-hot
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    integer=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
)
def test_entropies_equal_the_loops(num_samples, num_experts, num_classes, sharpness, seed, dtype, integer):
    probs_NE, labels_N = random_gates(num_samples, num_experts, num_classes, seed, sharpness)
    probs_NE, labels_N = probs_NE.to(dtype), labels_N.to(integer)
    measured = metrics.routing_entropy(probs_NE, labels_N, num_classes)
    expected = reference.routing_entropy(probs_NE, labels_N, num_classes)
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-5, 1e-6)
    np.testing.assert_allclose(measured[:6], expected, rtol=rtol, atol=atol)
    assert metrics.load(probs_NE, labels_N).effective_experts >= 1 - 1e-6


def test_entropies_of_two_classes_for_each_expert():
    labels_N = torch.tensor([0, 1, 2, 3] * 5)
    measured = metrics.routing_entropy(one_hot(labels_N // 2, 2), labels_N, 4)
    np.testing.assert_allclose(
        measured[:6], (math.log(2), 0, 0, math.log(2), math.log(2), math.log(2)), atol=1e-12
    )
    np.testing.assert_allclose(measured.normalized()[:6], (1, 0, 0, 0.5, 1, 1), atol=1e-12)


def test_normalized_divides_each_by_its_own_maximum():
    probs_NE, labels_N = random_gates(num_experts=5, num_classes=3)
    measured = metrics.routing_entropy(probs_NE, labels_N, 3)
    log_e, log_c = math.log(5), math.log(3)
    expected = np.array(measured[:6]) / [log_e, log_e, log_e, log_c, log_e, log_c]
    np.testing.assert_allclose(measured.normalized()[:6], expected, rtol=1e-12)
    assert measured.normalized()[6:] == (5, 3)
    more_classes = metrics.routing_entropy(probs_NE, labels_N, 50)
    assert more_classes.normalized().information_class == pytest.approx(
        more_classes.information_class / log_e
    )


def test_normalized_with_one_expert_or_one_class_is_zero():
    one_expert = metrics.routing_entropy(torch.ones(6, 1), torch.arange(6) % 2, 2).normalized()
    np.testing.assert_allclose(one_expert[:6], (0, 0, 0, 1, 0, 0), atol=1e-12)
    one_class = metrics.routing_entropy(
        torch.full((6, 2), 0.5), torch.zeros(6, dtype=torch.long), 1
    ).normalized()
    np.testing.assert_allclose(one_class[:6], (1, 1, 1, 0, 0, 0), atol=1e-12)


@pytest.mark.parametrize(
    ("probs", "labels", "num_classes", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.long), 2, "probs must have shape"),
        (torch.full((3, 2), 0.5), torch.zeros(4, dtype=torch.long), 2, "labels must have shape"),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.long), 2, "probs must hold a sample"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1, 2]), 2, "labels must lie in 0 to 1, got 0 to 2"),
        (torch.full((3, 2), 0.5), torch.tensor([0, -1, 0]), 2, "-1"),
        (torch.full((3, 2), 0.7), torch.zeros(3, dtype=torch.long), 2, "sum to 1"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), 2, "non-negative"),
        (torch.tensor([[math.nan, 1.0]]), torch.tensor([0]), 2, "finite"),
        (torch.tensor([[math.inf, 0.0]]), torch.tensor([0]), 2, "finite"),
    ],
)
def test_unusable_gates_and_labels_are_refused(probs, labels, num_classes, message):
    with pytest.raises(ValueError, match=message):
        metrics.routing_entropy(probs, labels, num_classes)


def test_class_expert_matrix_equals_the_loops():
    probs_NE, labels_N = random_gates(num_classes=3)
    labels_N[labels_N == 1] = 0
    measured_CE = metrics.class_expert_matrix(probs_NE, labels_N, 3)
    expected_CE = reference.class_expert(probs_NE, labels_N, 3)
    assert np.isnan(expected_CE[1]).all()
    np.testing.assert_allclose(measured_CE, expected_CE, rtol=1e-12)
    torch.testing.assert_close(measured_CE[[0, 2]].sum(1), torch.ones(2, dtype=torch.float64))


# ------------------------------------------------------------------------------------ null, load


def test_null_is_the_mean_over_permutations_from_the_generator():
    probs_NE, labels_N = random_gates()
    generator = torch.Generator().manual_seed(4)
    orders = [torch.randperm(23, generator=generator) for _ in range(3)]
    expected = [reference.routing_entropy(probs_NE, labels_N[order], 3)[5] for order in orders]
    null = metrics.information_class_null(probs_NE, labels_N, 3, torch.Generator().manual_seed(4), draws=3)
    assert null == pytest.approx(sum(expected) / 3, rel=1e-9)


def test_load_equals_the_loops():
    probs_NE, labels_N = random_gates(num_experts=6, num_samples=9)
    share, dead, effective = reference.load(probs_NE)
    measured = metrics.load(probs_NE, labels_N)
    assert dead > 0
    assert measured.share == pytest.approx(share)
    assert measured.dead_experts == dead
    assert measured.effective_experts == pytest.approx(effective, rel=1e-12)


def test_load_in_closed_form():
    labels_N = torch.tensor([0, 1, 2, 3] * 5)
    specialised = metrics.load(one_hot(labels_N, 5), labels_N)
    assert specialised.share == pytest.approx([0.25, 0.25, 0.25, 0.25, 0])
    assert specialised.dead_experts == 1
    assert specialised.effective_experts == pytest.approx(4)
    assert specialised.adjusted_mutual_information == pytest.approx(1)
    collapsed = metrics.load(one_hot(torch.full((20,), 2), 5), labels_N)
    assert collapsed.share == [0, 0, 1, 0, 0]
    assert collapsed.dead_experts == 4
    assert collapsed.effective_experts == pytest.approx(1)
    assert collapsed.adjusted_mutual_information == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("num_vectors", [2, 3, 6])
def test_pairwise_similarity_equals_the_loops_over_all_pairs(num_vectors, absolute):
    vectors_EP = randn(num_vectors, 5)
    expected = reference.pairwise_similarity(vectors_EP, absolute)
    assert metrics.pairwise_similarity(vectors_EP, absolute) == pytest.approx(expected, rel=1e-10)
    assert metrics.pairwise_similarity(vectors_EP.float(), absolute) == pytest.approx(expected, rel=1e-5)


def test_pairwise_similarity_in_closed_form():
    assert metrics.pairwise_similarity(torch.eye(4)) == 0
    assert metrics.pairwise_similarity(torch.ones(4, 3)) == pytest.approx(1)
    opposite_EP = torch.tensor([[1.0, 2.0], [-2.0, -4.0]])
    assert metrics.pairwise_similarity(opposite_EP) == pytest.approx(-1)
    assert metrics.pairwise_similarity(opposite_EP, absolute=True) == pytest.approx(1)
    # pairs (1,2), (1,3), (2,3) have cosines 0, 1, 0: all pairs count, not adjacent ones alone
    assert metrics.pairwise_similarity(torch.eye(2)[[0, 1, 0]]) == pytest.approx(1 / 3)


def test_pairwise_similarity_of_fewer_than_two_and_of_zeros():
    assert math.isnan(metrics.pairwise_similarity(torch.ones(1, 3)))
    assert math.isnan(metrics.pairwise_similarity(torch.ones(0, 3)))
    with_zeros_EP = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert metrics.pairwise_similarity(with_zeros_EP) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="vectors must have shape"):
        metrics.pairwise_similarity(torch.ones(2, 3, 4))


@pytest.mark.parametrize("num_parameters", [50, 400])
def test_similarity_floor_is_what_random_vectors_score(num_parameters):
    measured = metrics.pairwise_similarity(randn(300, num_parameters), absolute=True)
    assert measured == pytest.approx(metrics.similarity_floor(num_parameters), rel=0.02)
    assert metrics.similarity_floor(num_parameters) == pytest.approx(math.sqrt(2 / math.pi / num_parameters))


def test_aligned_similarity_equals_trying_every_permutation():
    experts = random_experts()
    expected = reference.aligned_similarity(experts.w1_EDH, experts.b1_EH, experts.w2_EHO, experts.b2_EO)
    assert metrics.aligned_similarity(experts) == pytest.approx(expected, rel=1e-10)


def test_aligned_similarity_sees_through_a_permutation_of_hidden_units():
    experts = random_experts(num_experts=2, hidden=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        experts.w1_EDH[1] = experts.w1_EDH[0][:, order]
        experts.b1_EH[1] = experts.b1_EH[0][order]
        experts.w2_EHO[1] = experts.w2_EHO[0][order]
        experts.b2_EO[1] = experts.b2_EO[0]
    x_ND = randn(5, 3, seed=9)
    torch.testing.assert_close(experts.expert(0, x_ND), experts.expert(1, x_ND))  # equal as functions
    assert metrics.aligned_similarity(experts) == pytest.approx(1, abs=1e-12)
    assert metrics.pairwise_similarity(experts.flat_weights()) < 0.5


def test_output_similarity_equals_the_loops_and_ignores_constants():
    logits_NEC = randn(8, 3, 4)
    measured = metrics.output_similarity(logits_NEC)
    assert measured == pytest.approx(reference.output_similarity(logits_NEC), rel=1e-10)
    shifted = logits_NEC + randn(8, 3, 1, seed=1) + randn(1, 3, 4, seed=2)  # per input and expert; per expert
    assert metrics.output_similarity(shifted) == pytest.approx(measured, rel=1e-9)
    assert metrics.output_similarity(logits_NEC[:, [0, 0, 0]]) == pytest.approx(1)
    assert math.isnan(metrics.output_similarity(logits_NEC[:, :1]))


@pytest.mark.parametrize("measure", ["output_similarity", "expert_cka"])
def test_similarity_by_use_weighs_each_pair_by_the_product_of_its_usage(measure):
    logits_NEC, usage_E = randn(8, 3, 4), torch.tensor([0.5, 0.3, 0.2])
    function = getattr(metrics, measure)
    weighted = total = 0.0
    for a in range(3):
        for b in range(a):
            one = logits_NEC[:, [a, b]]
            value = (
                reference.output_similarity(one)
                if measure == "output_similarity"
                else reference.linear_cka(one[:, 0], one[:, 1])
            )
            weight = float(usage_E[a] * usage_E[b])
            weighted, total = weighted + weight * value, total + weight
    assert function(logits_NEC, usage_E=usage_E) == pytest.approx(weighted / total, rel=1e-6)
    plain = function(logits_NEC)
    assert function(logits_NEC, usage_E=torch.full((3,), 1 / 3)) == pytest.approx(plain, rel=1e-6)
    dead = torch.tensor([0.6, 0.4, 0.0])  # a dead expert is not a different one
    assert function(logits_NEC, usage_E=dead) == pytest.approx(function(logits_NEC[:, :2]), rel=1e-6)
    assert math.isnan(function(logits_NEC, usage_E=torch.tensor([1.0, 0.0, 0.0])))


# -------------------------------------------------------------------------------------------- CKA


@pytest.mark.parametrize("num_samples", [4, 5, 7])
def test_cka_equals_the_u_statistic(num_samples):
    x_NA, y_NB = randn(num_samples, 3) + 5, randn(num_samples, 2, seed=1)
    expected = reference.linear_cka(x_NA, y_NB)
    assert metrics.linear_cka(x_NA, y_NB) == pytest.approx(expected, rel=1e-7)


def test_cka_of_independent_representations_is_zero_on_average():
    """Width 40 at 30 samples: the biased estimate would be above 0.5."""
    values = [metrics.linear_cka(randn(30, 40, seed=2 * i), randn(30, 40, seed=2 * i + 1)) for i in range(40)]
    assert abs(np.mean(values)) < 0.02
    assert min(values) < 0 < max(values)


def test_cka_of_a_constant_is_nan_and_of_too_little_an_error():
    y_NB = randn(9, 3)
    for constant_A in (torch.zeros(3), torch.tensor([0.1, -0.7, 1 / 3])):
        assert math.isnan(metrics.linear_cka(constant_A.expand(9, 3), y_NB))
    with pytest.raises(ValueError, match="at least 4"):
        metrics.linear_cka(y_NB[:3], y_NB[:3])
    with pytest.raises(ValueError, match="y must have as many rows as x, 9, got 8"):
        metrics.linear_cka(y_NB, y_NB[:8])
    with pytest.raises(ValueError, match="x must have shape"):
        metrics.linear_cka(y_NB.flatten(), y_NB)


def test_expert_cka_is_the_mean_over_all_pairs_of_the_first_samples():
    logits_NEC = randn(12, 3, 2)
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([reference.linear_cka(logits_NEC[:6, a], logits_NEC[:6, b]) for a, b in pairs])
    assert metrics.expert_cka(logits_NEC, max_samples=6) == pytest.approx(expected, rel=1e-7)
    assert math.isnan(metrics.expert_cka(logits_NEC[:, :1]))


# -------------------------------------------------------------------------------------- embedding


def test_embedding_of_separated_classes_is_perfect():
    labels_N = torch.arange(40) % 4
    codes_ND = 100.0 * one_hot(labels_N, 4) + randn(40, 4)
    codes_ND.requires_grad_()  # as they come from a model
    quality = metrics.embedding_quality(codes_ND, labels_N, codes_ND, labels_N, codes_ND * 2)
    assert quality.knn_accuracy == 1
    assert quality.silhouette > 0.9
    assert quality.trustworthiness == pytest.approx(1)


def test_embedding_of_noise_is_at_chance():
    codes_ND, labels_N = randn(200, 3), torch.arange(200) % 4
    quality = metrics.embedding_quality(
        randn(200, 3, seed=1), labels_N, codes_ND, labels_N, randn(200, 6, seed=2)
    )
    assert 0.15 < quality.knn_accuracy < 0.35
    assert abs(quality.silhouette) < 0.1
    assert 0.4 < quality.trustworthiness < 0.6


def test_knn_accuracy_equals_the_loops():
    train_MD, codes_ND = randn(40, 3), randn(25, 3, seed=1)
    train_M, labels_N = (train_MD[:, 0] > 0).long(), (codes_ND[:, 0] > 0.3).long()
    quality = metrics.embedding_quality(train_MD, train_M, codes_ND, labels_N, codes_ND)
    expected = reference.knn_accuracy(train_MD, train_M, codes_ND, labels_N)
    assert 0 < expected < 1
    assert quality.knn_accuracy == pytest.approx(expected)


# ------------------------------------------------------------------------------------------- task


def test_task_score_equals_the_loops():
    log_probs_NC = (randn(40, 5) * 2).log_softmax(1)
    labels_N = torch.arange(40) % 5
    probs_NC = log_probs_NC.exp().numpy()
    right_N, cost = reference.accuracy_and_cross_entropy(probs_NC, labels_N.numpy())
    score = metrics.task_score(log_probs_NC, labels_N)
    assert score.accuracy == pytest.approx(right_N.mean())
    assert score.cross_entropy == pytest.approx(cost, rel=1e-10)
    expected = reference.calibration_error(probs_NC.max(1), right_N)
    assert score.calibration_error == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_equals_the_loops(bins):
    confidence_N = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    correct_N = (torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    expected = reference.calibration_error(confidence_N, correct_N, bins)
    assert metrics.calibration_error(confidence_N, correct_N, bins) == pytest.approx(expected, rel=1e-10)
    assert metrics.calibration_error(confidence_N.float(), correct_N, bins) == pytest.approx(
        expected, rel=1e-5
    )


def test_calibration_error_in_closed_form():
    ones_N = torch.ones(8)
    assert metrics.calibration_error(ones_N, ones_N) == 0
    assert metrics.calibration_error(ones_N, torch.zeros(8)) == 1
    half_right_N = torch.tensor([1.0, 0.0] * 4)
    assert metrics.calibration_error(ones_N * 0.9, half_right_N) == pytest.approx(0.4)
    # over-confident in one bin and under-confident in another: gaps do not cancel across bins
    confidence_N, correct_N = torch.tensor([0.95, 0.95, 0.25, 0.25]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert metrics.calibration_error(confidence_N, correct_N) == pytest.approx((0.45 + 0.25) / 2)
    # but they do within a bin, whose upper edge belongs to it: 0.75 and 0.6 share (0.5, 0.75]
    confidence_N, correct_N = torch.tensor([0.75, 0.6]), torch.tensor([1.0, 0.0])
    assert metrics.calibration_error(confidence_N, correct_N, bins=4) == pytest.approx(0.35 / 2)
    assert metrics.calibration_error(torch.zeros(2), torch.tensor([0.0, 1.0])) == pytest.approx(0.5)


def test_experts_that_tie_share_a_sample_and_none_is_dead():
    probs_NE = torch.tensor([[0.25] * 4, [0.4, 0.4, 0.1, 0.1]])
    found = metrics.load(probs_NE, torch.tensor([0, 1]))
    assert found.share == pytest.approx([0.375, 0.375, 0.125, 0.125])
    assert found.dead_experts == 0


def test_cka_of_what_differs_in_one_sample_is_undefined():
    """Without the diagonal nothing is left of it: rounding must not decide."""
    once_NA = torch.zeros(50, 3)
    once_NA[1] = torch.tensor([3.0, -1.0, 2.0])
    for one, other in ((once_NA, once_NA), (once_NA, 2 * once_NA + 1), (torch.eye(50), torch.eye(50))):
        assert math.isnan(metrics.linear_cka(one, other))


def test_an_expert_that_is_never_used_counts_for_nothing_in_cka():
    logits_NEC = torch.randn(200, 4, 3, generator=torch.Generator().manual_seed(0))
    logits_NEC[:, 3] = 1.0  # constant: its CKA with any other is undefined
    usage_E = torch.tensor([0.4, 0.3, 0.3, 0.0])
    expected = metrics.expert_cka(logits_NEC[:, :3], usage_E=usage_E[:3])
    assert metrics.expert_cka(logits_NEC, usage_E=usage_E) == pytest.approx(expected, rel=1e-12)


def test_scores_that_are_no_log_probabilities_are_refused():
    with pytest.raises(ValueError, match="log_softmax"):
        metrics.task_score(torch.tensor([[-10.0, -12.0], [-9.0, -8.0]]), torch.tensor([0, 1]))


def test_rounded_gates_are_those_that_sum_to_one():
    """A third in bfloat16 is 0.33398."""
    gates_NE = torch.full((9, 3), 1 / 3, dtype=torch.bfloat16)
    found = metrics.load(gates_NE, torch.arange(9) % 3)
    assert found.effective_experts == pytest.approx(3, abs=1e-12)
