"""Tiny classifiers and their images, for the tests of models and tasks.

Shapes: N images, C channels, H height, W width.
"""

import torch

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.snnl import SNNLConfig
from moe_study.data import Dataset, Split
from moe_study.tasks import ClassifierTask, Objective

SMALL = ClassifierConfig(
    "mlp", extractor_hidden=10, code_dim=6, num_experts=3, expert_hidden=8, gate_hidden=7
)
SNNL = SNNLConfig(factor=5.0, schedule="fixed", temperature=0.5)


def numbered_images(num_train=50, num_other=20, num_classes=4, side=4):
    """Random bytes; the first pixel of a training image is its number, so that samples can be told apart."""
    draw = torch.Generator().manual_seed(0)

    def split(n):
        images_NCHW = torch.randint(256, (n, 1, side, side), generator=draw, dtype=torch.uint8)
        images_NCHW[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8)
        return Split(images_NCHW, torch.randperm(n, generator=draw) % num_classes)

    return Dataset("tiny", split(num_train), split(num_other), split(num_other), num_classes)


def make_task(objective=None, config=SMALL, seed=7, epochs=4, batch_size=16, dtype=torch.float64, **options):
    return ClassifierTask(
        numbered_images(), config, objective or Objective(),
        seed=seed, epochs=epochs, batch_size=batch_size, dtype=dtype, **options,
    )  # fmt: skip
