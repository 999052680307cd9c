"""A study: its settings, arms and seeds, the runs that they make, and the tuning behind the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from moe_study.configs.arms import FACTORS, SEEDS, TUNING_SEEDS, RoutedSettings, Settings
from moe_study.configs.run import VERSIONS, Plan, Run

S = TypeVar("S", Settings, RoutedSettings)
# profile -> data set -> groups of arms and how many seeds each gets
SeedCounts = Mapping[str, Mapping[str, list[tuple[Sequence[str], int]]]]
Tried = list[tuple[str, S]]  # arms and the settings to try

TRAINING_OPTIONS = ("train_images", "epoch_tokens", "augment")  # the others are about the test set


@dataclass(frozen=True, kw_only=True)
class Study(Generic[S]):
    name: str
    settings: Mapping[str, Mapping[str, S]]  # profile -> data set
    arms: Callable[[S], Mapping[str, tuple[Any, Any]]]  # model and objective of each
    counts: SeedCounts
    seeds: Sequence[int] = SEEDS
    by_seed: bool = True  # seed by seed, so that an unfinished profile has pairs; else group by group
    trained_alone: Sequence[str] = ()  # arms with the null of expert similarity
    drawn: Sequence[str] = ()  # arms whose first seed keeps t-SNE coordinates
    grid: Callable[[S], Tried[S]] = lambda own: []  # what tuning tries
    tuned_on: Sequence[str] = ()  # data sets

    def runs(self, profile: str) -> Iterator[Run]:
        for dataset, groups in self.counts.get(profile, {}).items():
            own = self.settings[profile][dataset]
            arms = self.arms(own)
            order = [(at, arm) for names, count in groups for at in range(count) for arm in names]
            if self.by_seed:
                order.sort(key=lambda one: one[0])
            for at, arm in order:
                yield Run(
                    profile, self.name, dataset, arm, self.seeds[at], VERSIONS[self.name], *arms[arm],
                    own.training(arm),
                    independent_experts=arm in self.trained_alone,
                    tsne=arm in self.drawn and at == 0,
                    **own.options,
                )  # fmt: skip

    def tuning_runs(self, profile: str) -> Iterator[Run]:
        """The grid on two seeds outside the study, decided on validation data alone."""
        name = f"{self.name}-tuning"
        for dataset in self.tuned_on if profile == "core" else ():
            tried = self.grid(self.settings[profile][dataset])
            for seed in TUNING_SEEDS:
                for arm, own in tried:
                    options = {key: own.options[key] for key in TRAINING_OPTIONS if key in own.options}
                    yield Run(
                        profile, name, dataset, arm, seed, VERSIONS[name], *self.arms(own)[arm], own.train,
                        **options,
                    )  # fmt: skip

    @property
    def plans(self) -> dict[str, Plan]:
        tuning: dict[str, Plan] = {f"{self.name}-tuning": self.tuning_runs} if self.tuned_on else {}
        return {self.name: self.runs} | tuning


def trained(settings: S, **changes: Any) -> S:
    """The same settings with changes to the training."""
    return replace(settings, train=replace(settings.train, **changes))


def with_factors(settings: Settings, arms: Sequence[str], with_snnl: Sequence[str]) -> Tried[Settings]:
    """Some arms as they are, others with each factor of the SNNL."""
    tried = [(arm, settings) for arm in arms]
    for factor in FACTORS:
        tried += [(arm, replace(settings, factor=factor, dense_factor=factor)) for arm in with_snnl]
    return tried
