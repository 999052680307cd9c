"""PGD-20 against its peer: torchattacks' form, written down from its formula.

Both attack the same small transformer or CNN with frozen weights; the peer's loss is the cross-entropy of
logits, as in the package.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Contestant, Row, Step, Work
from benchmarks.training import CIFAR, PublicClassifier
from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig, VisionTransformer
from moe_lib.robustness.attacks import STEP, pgd

EPS, STEPS = 2 / 255, 20
Predict = Callable[[Tensor], Tensor]


def torchattacks(predict: Predict, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    start_NCHW = torch.empty_like(images_NCHW).uniform_(-EPS, EPS)
    attacked_NCHW = (images_NCHW + start_NCHW).clamp(0, 1)
    for _ in range(STEPS):
        attacked_NCHW.requires_grad_()
        cost = F.cross_entropy(predict(attacked_NCHW), labels_N)
        grad_NCHW = torch.autograd.grad(cost, attacked_NCHW)[0]
        attacked_NCHW = attacked_NCHW.detach() + STEP * EPS * grad_NCHW.sign()
        delta_NCHW = (attacked_NCHW - images_NCHW).clamp(-EPS, EPS)
        attacked_NCHW = (images_NCHW + delta_NCHW).clamp(0, 1).detach()
    return attacked_NCHW


def ours(predict: Predict, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    return pgd(predict, images_NCHW, labels_N, EPS, torch.Generator().manual_seed(0), STEPS)


def rows(quick: bool = False) -> list[Row]:
    if quick:
        return [row("transformer", 8, rounds=3), row("CNN", 8, rounds=3)]
    return [row("transformer", 128, goal_time=1, rounds=9), row("CNN", 128, goal_time=1, rounds=9)]


def row(model: str, num_images: int, **options: Any) -> Row:
    contestants = (
        Contestant("ours", partial(_build, model, num_images, ours), peer=False),
        Contestant("torchattacks", partial(_build, model, num_images, torchattacks)),
    )
    work = Work(bytes=8.0 * STEPS * num_images * 3 * 32**2)  # the images, read and written once a step
    name = f"PGD-{STEPS} of a {model}, {num_images} images"
    return Row(name, {"N": num_images}, work, contestants, **options)


def _build(model: str, num_images: int, attack: Callable[..., Tensor], device: str) -> Step:
    torch.manual_seed(0)
    if model == "CNN":
        network: torch.nn.Module = PublicClassifier(CIFAR)
        predict: Predict = network
    else:
        network = VisionTransformer(VisionConfig(TransformerConfig()), CIFAR, 10)

        def predict(images_NCHW: Tensor) -> Tensor:
            return network(images_NCHW).log_probs_NC

    network.to(device).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(1)
    images_NCHW = torch.rand(num_images, *CIFAR, generator=draw).to(device)
    labels_N = torch.randint(10, (num_images,), generator=draw).to(device)
    return lambda: attack(predict, images_NCHW, labels_N)
