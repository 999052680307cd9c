"""What the AC studies and the crossed one share: small models, and how their runs are planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_lib.moe import ACConfig
from moe_study.configs.arms import (
    CONFIRMATORY,
    CONFIRMATORY_SEEDS,
    SEEDS,
    RoutedSettings,
    routed_arms,
)
from moe_study.configs.study import SeedCounts, Study, Tried, trained
from moe_study.train import TrainConfig

# profile -> data set
Settings = dict[str, dict[str, RoutedSettings]]
Grid = Callable[[RoutedSettings], Tried[RoutedSettings]]

SWIN_FORM = ACConfig(normalize="global", max_ratio=1.5)
SMALL = TransformerConfig(
    dim=32, depth=3, num_heads=2, mlp_hidden=64, moe_blocks=(1, 2), num_experts=4, expert_hidden=32
)
DIGITS_VISION = RoutedSettings(
    VisionConfig(SMALL, patch=2),
    SWIN_FORM,
    TrainConfig(epochs=3, batch_size=64, learning_rate=6e-3, precision="float64", warmup=0.1),
    options={"attack_images": 16, "corrupted_images": 64},
)
CORE_VISION = RoutedSettings(
    VisionConfig(TransformerConfig(), patch=8),
    SWIN_FORM,
    TrainConfig(epochs=6, batch_size=256, learning_rate=3e-3, warmup=0.1),
    options={"train_images": 20_000},
)
# About 2.8e15 float operations a run, a third of them in attacks: at 15 % of an H100's products in bfloat16,
# three minutes hold two seeds of four arms. The rate is not tuned.
PAPER_VISION = RoutedSettings(
    VisionConfig(
        TransformerConfig(
            dim=192, depth=6, num_heads=6, mlp_hidden=384, moe_blocks=(2, 3, 4, 5), expert_hidden=192
        ),
        patch=4,
    ),
    SWIN_FORM,
    TrainConfig(epochs=60, batch_size=256, learning_rate=1e-3, precision="bfloat16", warmup=0.1),
    options={"attack_images": 10_000, "corrupted_images": 10_000, "augment": True},
)


def study(
    name: str, settings: Settings, counts: SeedCounts, grid: Grid, seeds: Sequence[int] = SEEDS
) -> Study[RoutedSettings]:
    """The main arms seed by seed, then the controls; tuned on the first data set."""
    return Study(
        name=name, settings=settings, arms=partial(routed_arms, CONFIRMATORY.get(name, name)), counts=counts,
        seeds=seeds, by_seed=False, grid=grid, tuned_on=list(settings["core"])[:1],
    )  # fmt: skip


def confirming(
    name: str,
    settings: Settings,
    counts: SeedCounts,
    arms: Sequence[str],
    tried: Sequence[float] = (3e-3, 1e-2, 3e-2),
) -> Study[RoutedSettings]:
    """A confirmation on seeds that nobody has seen: learning rates `tried` for each of `arms` at the full
    budget, of which all arms get the one of the lowest validation cross-entropy at the last epoch."""
    return study(name, settings, counts, partial(rates, tried, arms), CONFIRMATORY_SEEDS)


def rates(tried: Sequence[float], arms: Sequence[str], own: RoutedSettings) -> Tried[RoutedSettings]:
    """The same learning rates for each of these arms."""
    return [(arm, trained(own, learning_rate=rate)) for rate in tried for arm in arms]


def short(own: RoutedSettings) -> RoutedSettings:
    """With a third of the epochs."""
    return trained(own, epochs=max(own.train.epochs // 3, 1))
