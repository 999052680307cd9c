"""The vision transformer against plain loops; its task.

Shapes: N images, T tokens of an image, D width, E experts, C classes.
"""

from dataclasses import replace

import numpy as np
import pytest
import reference
import reference_transformer
import torch
from small_models import SMALL, shaken, tiny_dataset
from small_models import vision_task as task_of

from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig, VisionTransformer
from moe_lib.moe import ACConfig
from moe_lib.snnl import SNNLConfig
from moe_study.tasks import RoutedObjective

CAUSAL = {"router": "ac", "ac": ACConfig(causal=True)}


def images(count=3, channels=2, side=(4, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, *side, generator=generator, dtype=torch.float64)


def config_of(patch=2, **options):
    return VisionConfig(replace(SMALL, **options), patch)


def model_of(config, image_shape=(2, 4, 8), seed=0):
    return shaken(VisionTransformer(config, image_shape, 3), seed)


def trained(model, steps=2):
    """In evaluation mode, after forward passes that leave running averages behind."""
    for step in range(steps):
        model(images(6, seed=50 + step))
    return model.eval()


# ---------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(
    "options",
    [
        {"router": "linear"},
        {"router": "cosine", "top_k": 1},
        {"router": "ac"},
        {"router": "ac", "moe_blocks": (0, 2)},
        {"router": "ac", "ac": ACConfig(normalize="global", max_ratio=1.5, scale_experts=True)},
        {"router": "ac", "ac": ACConfig(mixed=True, matched=True)},
        CAUSAL,
        {"router": "ac", "depth": 4, "moe_blocks": (0, 1, 2, 3)},
    ],
    ids=str,
)
def test_the_whole_forward_equals_the_loops(options):
    config = config_of(**options)
    model = trained(model_of(config, seed=9))
    images_NCHW = images(4, seed=1)
    output = model(images_NCHW)
    expected_NC, gates, stem_ND = reference_transformer.vision_transformer(images_NCHW, model, config)
    np.testing.assert_allclose(output.log_probs_NC.detach(), expected_NC, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(output.activations["stem"].detach(), stem_ND, rtol=1e-7, atol=1e-9)
    assert len(output.routings) == len(gates) == len(config.trunk.moe_blocks)
    for routing, gates_NE in zip(output.routings, gates, strict=True):
        np.testing.assert_allclose(routing.probs_NE.detach(), gates_NE, rtol=1e-7, atol=1e-9)
    clusters = [np.bincount(gates_NE.argmax(1), minlength=4) for gates_NE in gates[:-1]]
    assert all((counts >= 2).sum() >= 2 for counts in clusters), "one cluster alone: M = I, nothing is shown"


# -------------------------------------------------------------------------------------------- task


def test_an_epoch_holds_every_image_once_in_an_order_of_seed_and_epoch():
    task = task_of(batch_size=10)
    assert task.num_batches == 3
    train = task.dataset.train
    names = {image.tobytes(): n for n, image in enumerate((train.images_NCHW.double() / 255).numpy())}

    def order(task, epoch):
        found = []
        for images_NCHW, labels_N in task.batches(epoch):
            found.append([names[image.tobytes()] for image in images_NCHW.numpy()])
            assert torch.equal(labels_N, train.labels_N[found[-1]])
        return found

    whole = [order(task, epoch) for epoch in range(3)]
    for batches in whole:
        assert [len(batch) for batch in batches] == [10, 10, 4]
        assert sorted(n for batch in batches for n in batch) == list(range(24))
    assert whole[0] != whole[1] != whole[2]
    torch.manual_seed(9)
    assert order(task_of(batch_size=10, router="ac"), 2) == whole[2]
    assert order(task_of(batch_size=10, seed=4), 2) != whole[2]


def test_losses_equal_the_loops_on_a_batch():
    objective = RoutedObjective(
        balance=0.1,
        snnl=SNNLConfig(factor=2.0, schedule="fixed", temperature=0.5, layers=("stem",)),
    )
    task = task_of(objective, router="ac")
    images_NCHW, labels_N = next(task.batches(0))
    losses = task.losses((images_NCHW, labels_N), 0)
    log_probs_NC, _, stem_ND = reference_transformer.vision_transformer(
        images_NCHW, task.model, config_of(router="ac", moe_blocks=(1, 2))
    )
    picked = [row[label] for row, label in zip(log_probs_NC, labels_N, strict=True)]
    assert losses["cross_entropy"].item() == pytest.approx(-np.mean(picked), rel=1e-8)
    assert losses["snnl"].item() == pytest.approx(reference.snnl(stem_ND, labels_N, 0.5), rel=1e-6)
    weights = {"cross_entropy": 1, "balance": 0.1, "snnl": 2}
    total = sum(weight * losses[name].item() for name, weight in weights.items())
    assert losses["total"].item() == pytest.approx(total, rel=1e-10)
    assert set(losses) == {*weights, "total"}


def test_a_split_is_predicted_in_batches_of_the_training_size():
    task = task_of(router="ac")
    split = tiny_dataset(num_other=19).test
    output = task.predict(split)
    parts = [task.model(split.images_NCHW[i : i + 8].double() / 255) for i in (0, 8, 16)]
    assert torch.equal(output.log_probs_NC, torch.cat([part.log_probs_NC for part in parts]))
    assert torch.equal(output.activations["stem"], torch.cat([part.activations["stem"] for part in parts]))
    for layer, routing in enumerate(output.routings):
        for i, field in enumerate(routing):
            assert torch.equal(field, torch.cat([part.routings[layer][i] for part in parts]))
    assert not output.log_probs_NC.requires_grad


@pytest.mark.parametrize("options", [{"router": "ac"}, CAUSAL], ids=["ac", "ac-causal"])
def test_every_weight_gets_a_gradient(options):
    task = task_of(depth=4, moe_blocks=(0, 1, 2, 3), **options)
    task.losses(next(task.batches(0)), 0)["total"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())
    assert all(parameter.grad.any() for parameter in task.parameters())


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, r"patch 3, image 4 x 8"),
        ({"patch": 0}, r"patch 0"),
        ({"patch": 8}, r"patch 8, image 4 x 8"),
        ({"moe_blocks": (3,)}, r"moe_blocks.*\(3,\)"),
        ({"num_heads": 5}, "5 and 6"),
        ({"router": "hash-token"}, "'hash-token' is for text.*use 'hash'"),
    ],
    ids=str,
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(config_of(**options), (2, 4, 8), 3)


def test_one_class_is_no_classifier():
    with pytest.raises(ValueError, match="num_classes must be an integer, at least 2, got 1"):
        VisionTransformer(config_of(), (2, 4, 8), 1)


@pytest.mark.parametrize("batch_size", [1, 0, -3])
def test_a_batch_without_company_is_named(batch_size):
    with pytest.raises(ValueError, match=f"batch_size.*{batch_size}"):
        task_of(batch_size=batch_size)


def test_a_layer_that_the_snnl_does_not_find_is_named():
    task = task_of(RoutedObjective(snnl=SNNLConfig()))
    with pytest.raises(ValueError, match=r"'code'.*stem"):
        task.losses(next(task.batches(0)), 0)


def test_the_convolutional_stem_makes_one_token_a_patch_and_no_image_sees_another():
    trunk = TransformerConfig(dim=32, depth=2, num_heads=2, moe_blocks=(1,), num_experts=4)
    model = VisionTransformer(VisionConfig(trunk, patch=8, stem="conv"), (3, 32, 32), 10)
    images_NCHW = torch.rand(3, 3, 32, 32)
    tokens_NTD = model.embed(images_NCHW)
    assert tokens_NTD.shape == (3, 16, 32)
    torch.testing.assert_close(model(images_NCHW).log_probs_NC[:1], model(images_NCHW[:1]).log_probs_NC)
    with pytest.raises(ValueError, match=r"patch must be 2, 4, 8.*got 7"):
        VisionConfig(trunk, patch=7, stem="conv")
