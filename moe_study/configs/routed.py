"""What the AC studies and the crossed one share: small models, and how their runs are planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_lib.moe import ACConfig
from moe_study.configs.arms import (
    CONFIRMATORY,
    CONFIRMATORY_SEEDS,
    SEEDS,
    TUNING_SEEDS,
    RoutedArm,
    RoutedSettings,
    routed_arms,
)
from moe_study.configs.run import VERSIONS, Plan, Run
from moe_study.train import TrainConfig

# profile -> data set
Settings = dict[str, dict[str, RoutedSettings]]
# profile -> data set -> groups of arms and how many seeds each gets
SeedCounts = Mapping[str, Mapping[str, list[tuple[Sequence[str], int]]]]
# arms, learning rates and settings to try
Grid = Callable[[RoutedSettings], list[tuple[str, float, RoutedSettings]]]

SWIN_FORM = ACConfig(normalize="global", max_ratio=1.5)
SMALL = TransformerConfig(
    dim=32, depth=3, num_heads=2, mlp_hidden=64, moe_blocks=(1, 2), num_experts=4, expert_hidden=32
)
DIGITS_VISION = RoutedSettings(
    VisionConfig(SMALL, patch=2),
    SWIN_FORM,
    TrainConfig(epochs=3, batch_size=64, learning_rate=6e-3, precision="float64", warmup=0.1),
    attack_images=16,
    corrupted_images=64,
)
CORE_VISION = RoutedSettings(
    VisionConfig(TransformerConfig(), patch=8),
    SWIN_FORM,
    TrainConfig(epochs=6, batch_size=256, learning_rate=3e-3, warmup=0.1),
    train_images=20_000,
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
    attack_images=10_000,
    corrupted_images=10_000,
    augment=True,
)


@dataclass(frozen=True, kw_only=True)
class RoutedStudy:
    """A study of routers, and the tuning behind its settings."""

    name: str
    settings: Settings
    counts: SeedCounts
    grid: Grid  # what tuning tries
    seeds: Sequence[int] = SEEDS
    tuned_in_full: bool = False  # tuning takes all of the epochs, not a third

    def arms(self, own: RoutedSettings) -> dict[str, RoutedArm]:
        return routed_arms(CONFIRMATORY.get(self.name, self.name), own)

    def runs(self, profile: str) -> Iterator[Run]:
        """The main arms seed by seed, then the controls."""
        for dataset, groups in self.counts.get(profile, {}).items():
            own = self.settings[profile][dataset]
            arms = self.arms(own)
            for names, count in groups:
                for seed in self.seeds[:count]:
                    for arm in names:
                        model, objective = arms[arm]
                        yield Run(
                            profile, self.name, dataset, arm, seed, VERSIONS[self.name], model, objective,
                            own.train, **own.run_options(),
                        )  # fmt: skip

    def tuning_runs(self, profile: str) -> Iterator[Run]:
        """The grid on the first data set, two seeds outside the study, validation data alone."""
        if profile != "core":
            return
        dataset, own = next(iter(self.settings[profile].items()))
        study = f"{self.name}-tuning"
        epochs = own.train.epochs if self.tuned_in_full else max(own.train.epochs // 3, 1)
        for seed in TUNING_SEEDS:
            for arm, rate, tried in self.grid(own):
                model, objective = self.arms(tried)[arm]
                yield Run(
                    profile, study, dataset, arm, seed, VERSIONS[study], model, objective,
                    replace(own.train, epochs=epochs, learning_rate=rate),
                    train_images=own.train_images, epoch_tokens=own.epoch_tokens, augment=own.augment,
                )  # fmt: skip

    @property
    def plans(self) -> dict[str, Plan]:
        return {self.name: self.runs, f"{self.name}-tuning": self.tuning_runs}


def confirming(
    name: str,
    settings: Settings,
    counts: SeedCounts,
    arms: Sequence[str],
    tried: Sequence[float] = (3e-3, 1e-2, 3e-2),
) -> RoutedStudy:
    """A confirmation on seeds that nobody has seen: learning rates `tried` for each of `arms` at the full
    budget, of which all arms get the one of the lowest validation cross-entropy at the last epoch."""
    return RoutedStudy(
        name=name, settings=settings, counts=counts, grid=rates(tried, arms), seeds=CONFIRMATORY_SEEDS,
        tuned_in_full=True,
    )  # fmt: skip


def rates(tried: Sequence[float], arms: Sequence[str]) -> Grid:
    """The same learning rates for each of these arms."""
    return lambda own: [(arm, rate, own) for rate in tried for arm in arms]
