"""Seeded initialisation, the classifier and its mixtures.

Shapes: N samples, D code width, E experts, C classes.
"""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from small_classifiers import SMALL, SNNL, make_task
from torch import nn

from moe_lib.models.classifier import Classifier, ClassifierConfig, build_extractor, jacobs_loss, mix
from moe_lib.moe import route
from moe_lib.rng import generator, initialise, seed_of
from moe_study.data import pixels
from moe_study.tasks import Objective

RULES = ("logits", "likelihood", "jacobs")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------- initialisation


def test_seeds_are_named_and_63_bits_wide():
    seeds = {
        seed_of(*parts) for parts in ((1, "a"), (1, "b"), (2, "a"), ("1", "a"), (1,), ("1a",), (1, "a", 0))
    }
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**55
    assert seed_of(1, "a") == 1515775267073163690  # another value would move every result
    first, again = (torch.rand(3, generator=generator(1, "a")) for _ in range(2))
    assert torch.equal(first, again)


def test_shared_layers_start_equal_in_base_and_dense():
    dense = replace(SMALL, num_experts=1, expert_hidden=SMALL.num_experts * SMALL.expert_hidden)
    base_task, dense_task = make_task(), make_task(config=dense)
    base, other = base_task.model.extractor.state_dict(), dense_task.model.extractor.state_dict()
    assert base.keys() == other.keys()
    assert len(base) == 4
    for name in base:
        assert torch.equal(base[name], other[name])
    assert base["layers.code.1.weight"].any()


def test_what_an_objective_adds_moves_no_other_weight():
    plain = make_task().state_dict()
    with_more = make_task(
        Objective(snnl=replace(SNNL, schedule="learned"), auxiliary=1.0, balance=0.1)
    ).state_dict()
    assert with_more.keys() - plain.keys() == {"snnl.log_temperature", "head.weight", "head.bias"}
    assert all(torch.equal(with_more[name], value) for name, value in plain.items())


def test_weights_depend_on_the_seed_and_on_the_layers_name():
    first, again, other = (make_task(seed=seed).state_dict() for seed in (0, 0, 1))
    drawn = {name for name in first if first[name].any()}  # biases start at zero
    assert {"model.extractor.layers.code.1.weight", "model.moe.experts.w1_EDH"} <= drawn
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in drawn)
    pair = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    initialise(pair, 0)
    assert not torch.equal(pair["a"].weight, pair["b"].weight)


def test_initialisation_neither_uses_nor_disturbs_the_global_random_state():
    models = []
    for global_seed in (1, 2):
        model = Classifier(SMALL, (1, 4, 4), 4)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        initialise(model, 3)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_initial_scale_is_kaiming_with_zero_biases():
    model = nn.Sequential(nn.Linear(400, 300), nn.Conv2d(16, 64, 5), nn.Linear(8, 3, bias=False))
    initialise(model, 0)
    assert model[0].weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert model[1].weight.std().item() == pytest.approx((2 / (16 * 25)) ** 0.5, rel=0.02)
    assert not model[0].bias.any()
    assert not model[1].bias.any()


# --------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_mixture_equals_the_loops(rule, top_k):
    weights_NE = route(randn(9, 3), top_k).dense_weights()
    if top_k == 1 and rule != "logits":  # as `Classifier` does: what is mixed has to stay a probability
        weights_NE = weights_NE / weights_NE.sum(1, keepdim=True)
    logits_NEC = 3 * randn(9, 3, 5, seed=1)
    log_probs_NC = mix(weights_NE, logits_NEC, rule)
    np.testing.assert_allclose(
        log_probs_NC.exp(), reference.mixture(weights_NE, logits_NEC, rule), rtol=1e-10
    )
    torch.testing.assert_close(log_probs_NC.logsumexp(1), torch.zeros(9, dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_mixture_survives_extreme_logits_and_gates(rule):
    weights_NE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    logits_NEC = torch.tensor([[300.0, -300.0], [-300.0, 300.0]]).repeat(3, 1, 1).requires_grad_()
    log_probs_NC = mix(weights_NE, logits_NEC, rule)
    torch.testing.assert_close(log_probs_NC.exp(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    log_probs_NC[:, 0].sum().backward()
    assert weights_NE.grad.isfinite().all()
    assert logits_NEC.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_classifier_combines_its_experts_by_the_rule(rule, top_k):
    model = make_task(config=replace(SMALL, mixture=rule, top_k=top_k)).model
    output = model(randn(9, 1, 4, 4).sigmoid())
    assert output.expert_logits_NEC.shape == (9, 3, 4)
    assert ((output.routing.dense_weights() > 0).sum(1) == (top_k or 3)).all()
    expected_NC = reference.mixture(output.routing.dense_weights(), output.expert_logits_NEC, rule)
    np.testing.assert_allclose(output.log_probs_NC.detach().exp(), expected_NC, rtol=1e-10)
    torch.testing.assert_close(output.log_probs_NC.logsumexp(1), torch.zeros(9, dtype=torch.float64))


def test_the_logit_mixture_is_the_moe_layers_own_output():
    model = make_task(config=replace(SMALL, top_k=2)).model
    images_NCHW = randn(9, 1, 4, 4).sigmoid()
    code_ND, _ = model.extractor(images_NCHW)
    torch.testing.assert_close(model(images_NCHW).log_probs_NC, model.moe(code_ND)[0].log_softmax(1))


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_jacobs_loss_equals_the_loops(top_k):
    """Its gates are those that predict: after a top-k, the renormalised ones."""
    model = make_task(config=replace(SMALL, mixture="jacobs", top_k=top_k)).model
    output, labels_N = model(randn(9, 1, 4, 4).sigmoid()), torch.arange(9) % 4
    expected = reference.jacobs_loss(output.routing.dense_weights(), output.expert_logits_NEC, labels_N)
    assert jacobs_loss(output, labels_N).item() == pytest.approx(expected, rel=1e-10)


# ------------------------------------------------------------------------------ extractor and gate


@pytest.mark.parametrize(
    ("config", "names", "code_dim"),
    [
        (SMALL, ["hidden", "code"], 6),
        (replace(SMALL, code_dim=None), ["hidden"], 10),
        (replace(SMALL, extractor="none"), [], 3 * 14 * 15),
        (replace(SMALL, extractor="cnn"), ["conv1", "conv2", "code"], 6),
        (replace(SMALL, extractor="cnn", code_dim=None), ["conv1", "conv2"], 128 * 1 * 1),
    ],
)
def test_extractors_name_their_layers_and_know_their_width(config, names, code_dim):
    extractor, dim = build_extractor(config, (3, 14, 15))
    code_ND, activations = extractor(torch.rand(5, 3, 14, 15))
    assert dim == code_dim
    assert code_ND.shape == (5, code_dim)
    assert list(activations) == names
    if names:
        assert torch.equal(activations[names[-1]].flatten(1), code_ND)


@pytest.mark.parametrize(("shape", "sides"), [((1, 28, 28), (12, 5)), ((3, 32, 32), (14, 6))])
def test_the_cnn_on_the_image_sizes_of_the_study(shape, sides):
    """Kernel 8, then 6, stride 2, padding 1."""
    extractor, code_dim = build_extractor(ClassifierConfig(code_dim=None), shape)
    code_ND, activations = extractor(torch.rand(2, *shape))
    assert activations["conv1"].shape == (2, 64, sides[0], sides[0])
    assert activations["conv2"].shape == (2, 128, sides[1], sides[1])
    assert code_ND.shape == (2, code_dim)


def test_the_code_is_linear_in_the_layer_below():
    extractor, _ = build_extractor(SMALL, (1, 4, 4))
    _, activations = extractor(torch.rand(20, 1, 4, 4))
    linear = extractor.layers["code"][1]
    torch.testing.assert_close(activations["code"], linear(activations["hidden"]))
    assert (activations["code"] < 0).any()
    assert (activations["hidden"] >= 0).all()


def test_without_an_extractor_the_experts_see_pixels():
    task = make_task(config=replace(SMALL, extractor="none"))
    assert not list(task.model.extractor.parameters())
    images_NCHW, labels_N = next(task.batches(0))
    code_ND, activations = task.encode(images_NCHW)
    assert torch.equal(code_ND, images_NCHW.flatten(1))
    assert not activations
    task.losses((images_NCHW, labels_N), 0)["total"].backward()
    assert all(p.grad.isfinite().all() for p in task.parameters())


def test_a_hash_gate_looks_up_each_images_expert_and_learns_nothing():
    task = make_task(config=replace(SMALL, gate="hash", top_k=1))
    test = task.dataset.test
    routing = task.predict(test)[0].routing
    table_R = task.model.moe.router.experts_RK[:, 0].tolist()
    expected = [table_R[sum(image.flatten().tolist()) % 4096] for image in test.images_NCHW]
    assert routing.indices_NK[:, 0].tolist() == expected
    assert len(set(expected)) > 1
    assert (routing.weights_NK == 1).all()
    assert not list(task.model.moe.router.parameters())
    at_work = task.model(pixels(test.images_NCHW, torch.float64))
    assert torch.equal(at_work.routing.indices_NK, routing.indices_NK)
    for n, expert in enumerate(expected):  # the prediction is that of the one expert
        alone_C = at_work.expert_logits_NEC[n, expert].log_softmax(0)
        torch.testing.assert_close(at_work.log_probs_NC[n], alone_C)


def test_a_hash_gate_needs_the_number_of_experts_per_image():
    with pytest.raises(ValueError, match="needs top_k, the number"):
        make_task(config=replace(SMALL, gate="hash"))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 7])
def test_a_uniform_gate_is_exactly_uniform(num_experts):
    model = make_task(config=replace(SMALL, gate="uniform", num_experts=num_experts)).model
    output = model(randn(9, 1, 4, 4))
    expected_NE = torch.full((9, num_experts), 1 / num_experts, dtype=torch.float64)
    assert torch.equal(output.routing.probs_NE, expected_NE)
    torch.testing.assert_close(output.log_probs_NC, output.expert_logits_NEC.mean(1).log_softmax(1))
    assert not list(model.moe.router.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_the_dense_arm_is_one_expert_without_a_choice(rule):
    task = make_task(config=replace(SMALL, num_experts=1, mixture=rule))
    batch = next(task.batches(0))
    output = task.model(batch[0])
    assert torch.equal(output.routing.probs_NE, torch.ones(16, 1, dtype=torch.float64))
    torch.testing.assert_close(output.log_probs_NC, output.expert_logits_NEC[:, 0].log_softmax(1))
    task.losses(batch, 0)["total"].backward()
    assert not any(p.grad.any() for p in task.model.moe.router.parameters())
    assert task.model.moe.experts.w1_EDH.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extractor": "resnet"}, "resnet"),
        ({"gate": "noisy"}, "noisy"),
        ({"mixture": "median"}, "median"),
        ({"num_experts": 0}, "num_experts"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 4}, "top_k"),
    ],
)
def test_unusable_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(replace(SMALL, **options), (1, 4, 4), 4)


def test_a_classifier_needs_two_classes():
    with pytest.raises(ValueError, match="num_classes must be an integer, at least 2"):
        Classifier(SMALL, (1, 4, 4), 1)


def test_one_expert_of_a_mixture_of_probabilities_would_not_train_the_gate():
    with pytest.raises(ValueError, match="'likelihood' needs top_k of 2 or more, or None, got 1"):
        make_task(config=replace(SMALL, mixture="likelihood", top_k=1))
    make_task(config=replace(SMALL, mixture="likelihood", top_k=2))
    make_task(config=replace(SMALL, mixture="likelihood", top_k=1, gate="hash"))
