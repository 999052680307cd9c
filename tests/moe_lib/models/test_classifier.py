"""Seeded initialisation, the classifier and its mixtures, and the task that trains it.

Shapes: N samples, D code width, E experts, C classes.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from torch import nn

from moe_lib.models.classifier import Classifier, ClassifierConfig, build_extractor, jacobs_loss, mix
from moe_lib.moe import route
from moe_lib.rng import generator, initialise, seed_of
from moe_lib.snnl import SNNLConfig
from moe_study.data import Dataset, Split, pixels
from moe_study.tasks import ClassifierTask, Objective

RULES = ("logits", "likelihood", "jacobs")
SMALL = ClassifierConfig(
    "mlp", extractor_hidden=10, code_dim=6, num_experts=3, expert_hidden=8, gate_hidden=7
)
SNNL = SNNLConfig(factor=5.0, schedule="fixed", temperature=0.5)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_dataset(num_train=50, num_other=20, num_classes=4, side=4):
    """Random bytes; the first pixel of a training image is its number, so that samples can be told apart."""
    draw = torch.Generator().manual_seed(0)

    def split(n):
        images_NCHW = torch.randint(256, (n, 1, side, side), generator=draw, dtype=torch.uint8)
        images_NCHW[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8)
        return Split(images_NCHW, torch.randperm(n, generator=draw) % num_classes)

    return Dataset("tiny", split(num_train), split(num_other), split(num_other), num_classes)


def make_task(objective=None, config=SMALL, seed=7, epochs=4, batch_size=16, dtype=torch.float64, **options):
    return ClassifierTask(
        tiny_dataset(), config, objective or Objective(),
        seed=seed, epochs=epochs, batch_size=batch_size, dtype=dtype, **options,
    )  # fmt: skip


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


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


def test_mixture_rules_differ_unless_there_is_one_expert():
    weights_NE, logits_NEC = randn(9, 3).softmax(1), 3 * randn(9, 3, 5, seed=1)
    assert not torch.allclose(
        mix(weights_NE, logits_NEC, "logits"), mix(weights_NE, logits_NEC, "likelihood")
    )
    one_N1 = torch.ones(9, 1, dtype=torch.float64)
    for rule in RULES:
        torch.testing.assert_close(mix(one_N1, logits_NEC[:, :1], rule), logits_NEC[:, 0].log_softmax(1))


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


# ----------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("batch_size", "sizes"), [(16, [16, 16, 16, 2]), (25, [25, 25]), (64, [50])])
def test_batches_cover_each_sample_once(batch_size, sizes):
    task = make_task(batch_size=batch_size)
    batches = list(task.batches(2))
    assert [len(labels_N) for _, labels_N in batches] == sizes
    assert task.num_batches == len(sizes)
    images_NCHW = torch.cat([images_NCHW for images_NCHW, _ in batches])
    numbers_N = (images_NCHW[:, 0, 0, 0] * 255).round().long()
    assert numbers_N.sort().values.tolist() == list(range(50))
    train = task.dataset.train
    assert torch.equal(images_NCHW, pixels(train.images_NCHW, torch.float64)[numbers_N])
    assert torch.equal(torch.cat([labels_N for _, labels_N in batches]), train.labels_N[numbers_N])


def test_batch_order_depends_on_seed_and_epoch_alone():
    def order(task, epoch):
        return torch.cat([images_NCHW[:, 0, 0, 0] for images_NCHW, _ in task.batches(epoch)]).tolist()

    task = make_task()
    first = order(task, 1)
    order(task, 0)
    torch.manual_seed(0)
    assert order(task, 1) == first
    other_arm = make_task(Objective(snnl=SNNL, auxiliary=1.0), config=replace(SMALL, num_experts=1))
    assert order(other_arm, 1) == first
    assert order(task, 2) != first
    assert order(make_task(seed=8), 1) != first


@pytest.mark.parametrize("together", [2, 3, 1000])
def test_images_of_a_class_come_in_groups_each_once(together):
    task = make_task(Objective(samples_per_class=together), batch_size=16)
    order_N = torch.cat([images_NCHW[:, 0, 0, 0] for images_NCHW, _ in task.batches(1)])
    assert (order_N * 255).round().long().sort().values.tolist() == list(range(50))
    labels = torch.cat([labels_N for _, labels_N in task.batches(1)]).tolist()
    counts = task.dataset.train.labels_N.bincount().tolist()
    most = sum(-(-count // together) for count in counts)  # fewer where two groups of a class meet
    runs = [len(list(run)) for _, run in itertools.groupby(labels)]
    assert most / 2 < len(runs) <= most
    assert sum(length < min(together, *counts) for length in runs) <= len(counts)  # a class's last group
    assert labels != torch.cat([labels_N for _, labels_N in task.batches(2)]).tolist()


def test_groups_of_less_than_one_are_refused():
    with pytest.raises(ValueError, match=r"samples_per_class.*0"):
        Objective(samples_per_class=0)


@pytest.mark.parametrize("batch_size", [1, 0, -3])
def test_batches_of_less_than_two_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size.*{batch_size}"):
        make_task(batch_size=batch_size)


# ------------------------------------------------------------------------------------------ losses


def test_cross_entropy_is_that_of_the_mixture():
    task = make_task()
    images_NCHW, labels_N = next(task.batches(0))
    losses = task.losses((images_NCHW, labels_N), 0)
    assert set(losses) == {"cross_entropy", "total"}
    probs_NC = task.model(images_NCHW).log_probs_NC.detach().exp().numpy()
    _, expected = reference.accuracy_and_cross_entropy(probs_NC, labels_N.numpy())
    assert losses["cross_entropy"].item() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(losses["total"], losses["cross_entropy"])


def test_total_is_the_weighted_sum_of_unweighted_losses():
    task = make_task(Objective(snnl=SNNL, balance=0.3, auxiliary=0.7))
    batch = next(task.batches(0))
    losses = {name: loss.item() for name, loss in task.losses(batch, 0).items()}
    assert set(losses) == {"cross_entropy", "snnl", "balance", "auxiliary", "total"}
    code_ND, _ = task.encode(batch[0])
    probs_NE = task.model.classify(code_ND).routing.probs_NE
    assert losses["snnl"] == pytest.approx(reference.snnl(code_ND, batch[1], 0.5), rel=1e-9)
    assert losses["balance"] == pytest.approx(
        reference.load_balancing_loss(probs_NE, probs_NE.argmax(1, keepdim=True)), rel=1e-9
    )
    head_probs_NC = task.head(code_ND).softmax(1).detach().numpy()
    _, auxiliary = reference.accuracy_and_cross_entropy(head_probs_NC, batch[1].numpy())
    assert losses["auxiliary"] == pytest.approx(auxiliary, rel=1e-9)
    expected = (
        losses["cross_entropy"] + 5 * losses["snnl"] + 0.3 * losses["balance"] + 0.7 * losses["auxiliary"]
    )
    assert losses["total"] == pytest.approx(expected, rel=1e-12)


def test_the_jacobs_mixture_trains_on_its_own_loss():
    task = make_task(Objective(snnl=SNNL), config=replace(SMALL, mixture="jacobs"))
    losses = {name: loss.item() for name, loss in task.losses(next(task.batches(0)), 0).items()}
    assert losses["total"] == pytest.approx(losses["jacobs"] + 5 * losses["snnl"], rel=1e-12)
    assert losses["cross_entropy"] != pytest.approx(losses["jacobs"])


def test_the_snnl_schedule_gets_the_epoch():
    task = make_task(Objective(snnl=SNNLConfig(schedule="annealed", temperature=2.0)))
    images_NCHW, labels_N = next(task.batches(0))
    code_ND, _ = task.encode(images_NCHW)
    for epoch in (0, 3):
        expected = reference.snnl(code_ND, labels_N, 2 / (1 + epoch) ** 0.55)
        assert task.losses((images_NCHW, labels_N), epoch)["snnl"].item() == pytest.approx(expected, rel=1e-9)


def test_a_learned_temperature_is_trained_with_the_rest():
    task = make_task(Objective(snnl=replace(SNNL, schedule="learned")))
    task.losses(next(task.batches(0)), 0)["total"].backward()
    assert task.snnl.log_temperature.grad.abs() > 0


@pytest.mark.parametrize("layers", [("code",), ("hidden", "code")])
def test_the_shuffled_label_control_pushes_as_hard_as_snnl_but_elsewhere(layers):
    """Gradients of the SNNL term on the layers' activations: equal norm, another direction."""
    kept = {}
    gradients = {}
    for shuffled in (False, True):
        config = replace(SNNL, layers=layers, combine="sum")
        task = make_task(Objective(snnl=config, shuffled=shuffled))
        for name in layers:
            task.model.extractor.layers[name].register_forward_hook(
                lambda module, args, out, name=name: kept.update({name: out})
            )
        losses = task.losses(next(task.batches(0)), 0)
        term = losses["total"] - losses["cross_entropy"]
        found = torch.autograd.grad(term, [kept[name] for name in layers])
        gradients[shuffled] = torch.cat([gradient.flatten() for gradient in found])
    real, shuffled = gradients[False], gradients[True]
    assert real.norm() > 0
    assert shuffled.norm().item() == pytest.approx(real.norm().item(), rel=1e-6)
    assert torch.cosine_similarity(real, shuffled, dim=0) < 0.9


def test_the_shuffled_label_control_permutes_the_batchs_own_labels_afresh():
    task = make_task(Objective(snnl=SNNL, shuffled=True), batch_size=16)
    seen, original = [], task.snnl.forward

    def record(activations, labels_N, epoch):
        seen.append(labels_N.tolist())
        return original(activations, labels_N, epoch)

    task.snnl.forward = record
    epochs = []
    for epoch in (0, 1, 0):
        seen.clear()
        for batch in task.batches(epoch):
            losses = task.losses(batch, epoch)
            true, permuted = seen[-2:]
            assert true == batch[1].tolist()
            assert sorted(permuted) == sorted(true)
            expected = reference.snnl(task.encode(batch[0])[0], true, 0.5)
            assert losses["snnl"].item() == pytest.approx(expected, rel=1e-9)  # the real one is reported
        epochs.append(list(seen))
    assert epochs[0] == epochs[2] != epochs[1]
    assert any(true != permuted for true, permuted in zip(epochs[0][::2], epochs[0][1::2], strict=True))


def test_the_shuffled_labels_differ_between_batches_and_epochs():
    """With a class for each sample, the permutation can be read off the labels."""
    task = ClassifierTask(
        tiny_dataset(num_classes=50), SMALL, Objective(snnl=SNNL, shuffled=True),
        seed=7, epochs=2, batch_size=25, dtype=torch.float64,
    )  # fmt: skip
    seen, original = [], task.snnl.forward

    def record(activations, labels_N, epoch):
        seen.append(labels_N.tolist())
        return original(activations, labels_N, epoch)

    task.snnl.forward = record
    for epoch in (0, 1):
        for batch in task.batches(epoch):
            task.losses(batch, epoch)
    orders = {tuple(map(true.index, permuted)) for true, permuted in zip(seen[::2], seen[1::2], strict=True)}
    assert len(orders) == 4


def test_the_shuffled_label_control_without_any_positive_is_zero_and_finite():
    task = make_task(Objective(snnl=SNNL, shuffled=True))
    next(task.batches(0))
    batch = pixels(task.dataset.train.images_NCHW[:4], torch.float64), torch.arange(4)
    losses = task.losses(batch, 0)
    assert losses["total"].item() == losses["cross_entropy"].item()
    losses["total"].backward()
    assert all(p.grad.isfinite().all() for p in task.parameters())


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(snnl=SNNL), Objective(snnl=SNNL, shuffled=True)]
)
def test_a_batch_of_one_trains(objective):
    """The ragged last batch can be that small."""
    task = make_task(objective, batch_size=49)
    images_NCHW, labels_N = list(task.batches(0))[-1]
    assert len(labels_N) == 1
    losses = task.losses((images_NCHW, labels_N), 0)
    losses["total"].backward()
    assert math.isfinite(losses["total"].item())
    assert all(p.grad.isfinite().all() for p in task.parameters())


def test_bfloat16_covers_the_extractor_alone():
    config = replace(SMALL, extractor="cnn", code_dim=6)
    dataset = tiny_dataset(side=14)
    tasks = [
        ClassifierTask(dataset, config, Objective(snnl=SNNL), seed=0, epochs=2, batch_size=16, bf16=bf16)
        for bf16 in (False, True)
    ]
    batch = next(tasks[0].batches(0))
    codes = [task.encode(batch[0]) for task in tasks]
    assert codes[1][0].dtype == torch.float32
    assert codes[1][1]["code"].dtype == torch.bfloat16
    assert not torch.equal(codes[0][0], codes[1][0])
    losses = [task.losses(batch, 0) for task in tasks]
    for name in losses[0]:
        assert losses[1][name].dtype == torch.float32
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=0.1)
    losses[1]["total"].backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in tasks[1].parameters())


# -------------------------------------------------------------------------------------- pretraining


def one_epoch(task, optimizer, epoch):
    names = set()
    for batch in task.batches(epoch):
        losses = task.losses(batch, epoch)
        names |= set(losses)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    return names


@pytest.mark.parametrize(
    ("objective", "first_names"),
    [
        (Objective(snnl=SNNL, pretrain="snnl"), {"snnl", "total"}),
        (Objective(pretrain="ce"), {"auxiliary", "total"}),
    ],
    ids=["snnl", "ce"],
)
def test_pretraining_trains_the_extractor_alone_and_then_freezes_it(objective, first_names):
    task = make_task(objective, epochs=4)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    for epoch in range(4):
        before = weights_of(task)
        names = one_epoch(task, optimizer, epoch)
        moved = changed(before, task)
        extractor = {name for name in moved if name.startswith("model.extractor")}
        mixture = {name for name in moved if name.startswith("model.moe")}
        if epoch < 2:
            assert names == first_names
            assert len(extractor) == 4
            assert not mixture
        else:
            assert names == {"cross_entropy", "total"}
            assert not extractor
            assert {"model.moe.experts.w1_EDH", "model.moe.router.gate.0.weight"} <= mixture


def test_pretraining_losses_are_those_of_code_and_head():
    batch = next(make_task().batches(0))
    task = make_task(Objective(snnl=SNNL, pretrain="snnl"))
    code_ND, _ = task.encode(batch[0])
    assert task.losses(batch, 1)["total"].item() == pytest.approx(
        reference.snnl(code_ND, batch[1], 0.5), rel=1e-9
    )
    task = make_task(Objective(pretrain="ce"))
    head_probs_NC = task.head(code_ND).softmax(1).detach().numpy()
    _, expected = reference.accuracy_and_cross_entropy(head_probs_NC, batch[1].numpy())
    assert task.losses(batch, 1)["total"].item() == pytest.approx(expected, rel=1e-9)


def test_pretraining_needs_two_epochs():
    """Of one epoch there is no first half: the option would have no effect."""
    with pytest.raises(ValueError, match="epoch"):
        make_task(Objective(pretrain="ce"), epochs=1)


# ------------------------------------------------------------------------------------------ predict


def test_predict_equals_the_model_whatever_the_batch_size():
    task = make_task(config=replace(SMALL, top_k=2))
    split = task.dataset.train
    whole = task.model(pixels(split.images_NCHW, torch.float64))
    for batch_size in (50, 7, 1000):
        output, codes_ND = task.predict(split, batch_size)
        torch.testing.assert_close(output.log_probs_NC, whole.log_probs_NC)
        torch.testing.assert_close(output.expert_logits_NEC, whole.expert_logits_NEC)
        for part, expected in zip(output.routing, whole.routing, strict=True):
            torch.testing.assert_close(part, expected)
        torch.testing.assert_close(codes_ND, whole.activations["code"])
        assert not output.activations
        assert not output.log_probs_NC.requires_grad
        assert not codes_ND.requires_grad


def test_predict_changes_nothing():
    task = make_task(Objective(snnl=SNNL, shuffled=True, auxiliary=1.0))
    before, state = weights_of(task), torch.get_rng_state()
    task.predict(task.dataset.test)
    assert not changed(before, task)
    assert all(p.grad is None for p in task.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_lowers_the_loss():
    task = make_task(Objective(snnl=SNNL), epochs=30)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    batch = next(task.batches(0))
    before = task.losses(batch, 0)["total"].item()
    for epoch in range(30):
        one_epoch(task, optimizer, epoch)
    assert task.losses(batch, 0)["total"].item() < 0.75 * before


# ------------------------------------------------------------------------------- misuse of options


@pytest.mark.parametrize(
    "options",
    [
        {"shuffled": True},
        {"pretrain": "snnl"},
        {"shuffled": True, "pretrain": "ce"},
        {"snnl": SNNL, "pretrain": "ce"},  # the loss would never be used
        {"snnl": SNNL, "pretrain": "snnl", "shuffled": True},  # nor its control
    ],
    ids=lambda options: "+".join(options) + ":" + str(options.get("pretrain")),
)
def test_options_without_effect_are_refused(options):
    with pytest.raises(ValueError, match="no effect"):
        Objective(**options)


def test_an_unknown_pretraining_is_named():
    with pytest.raises(ValueError, match="autoencoder"):
        make_task(Objective(pretrain="autoencoder"))


def test_snnl_on_a_layer_that_the_extractor_does_not_have():
    batch = next(make_task().batches(0))
    for config in (replace(SMALL, extractor="none"), replace(SMALL, code_dim=None)):
        task = make_task(Objective(snnl=SNNL), config=config)
        with pytest.raises(ValueError, match="'code'"):
            task.losses(batch, 0)
