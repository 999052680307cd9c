"""The task that trains a classifier: batches, losses, pretraining, predictions.

Shapes: N samples, D code width, E experts, C classes.
"""

import itertools
import math
from dataclasses import replace

import pytest
import reference
import torch
from small_classifiers import SMALL, SNNL, make_task, numbered_images

from moe_lib.snnl import SNNLConfig
from moe_study.data import pixels
from moe_study.tasks import ClassifierTask, Objective


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


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
        numbered_images(num_classes=50), SMALL, Objective(snnl=SNNL, shuffled=True),
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
    batch = pixels(task.dataset.train.images_NCHW[:4], torch.float64), torch.arange(4), torch.arange(4)
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
    batch = list(task.batches(0))[-1]
    assert len(batch[1]) == 1
    losses = task.losses(batch, 0)
    losses["total"].backward()
    assert math.isfinite(losses["total"].item())
    assert all(p.grad.isfinite().all() for p in task.parameters())


def test_bfloat16_covers_the_extractor_alone():
    config = replace(SMALL, extractor="cnn", code_dim=6)
    dataset = numbered_images(side=14)
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
