"""Dose-response: what the effect of SNNL depends on, a few of its options crossed at a time.

`python -m moe_study run --profile core --study snnl-dose` takes 147 core-minutes, "snnl-batches" 66.
What came out is drawn in the report, "Dose-response".

A dose is one setting of its options; its control differs in SNNL alone. A panel is a grid of doses: an option
down, another one across.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from moe_lib.models.classifier import ClassifierConfig, Mixture
from moe_lib.snnl import Combine, SNNLConfig
from moe_lib.snnl.dense import Distance, Reduction
from moe_study.configs import snnl
from moe_study.configs.arms import SEEDS, Settings
from moe_study.configs.run import VERSIONS, Plan, Run, StudyError
from moe_study.tasks import Objective
from moe_study.train import TrainConfig


@dataclass(frozen=True)
class Dose:
    """The SNNL study's `snnl`, and `base` where the factor is 0."""

    factor: float = 1.0
    temperature: float | Literal["learned"] | None = None  # fixed; None: annealed from 1
    layers: tuple[str, ...] = ("code",)
    combine: Combine = "min"
    distance: Distance = "cosine"
    reduction: Reduction = "mean"
    num_experts: int = 4
    mixture: Mixture = "logits"
    batch_size: int | None = None  # None: the study's
    samples_per_class: int = 1

    @property
    def control(self) -> Dose:
        return Dose(
            0.0,
            num_experts=self.num_experts,
            mixture=self.mixture,
            batch_size=self.batch_size,
            samples_per_class=self.samples_per_class,
        )

    @property
    def name(self) -> str:
        """The options that are not at their default: "snnl-factor=10-layers=conv1+code"."""
        shown = replace(self, factor=self.factor or 1.0)
        changed = [f.name for f in fields(shown) if getattr(shown, f.name) != f.default]
        options = [f"{name}={show(getattr(shown, name))}" for name in changed]
        return "-".join(["snnl" if self.factor else "base", *options])

    def arm(self, settings: Settings) -> tuple[ClassifierConfig, Objective, TrainConfig]:
        model = replace(settings.model, num_experts=self.num_experts, mixture=self.mixture)
        train = replace(settings.train, batch_size=self.batch_size or settings.train.batch_size)
        objective = Objective(samples_per_class=self.samples_per_class)
        if not self.factor:
            return model, objective, train
        snnl = SNNLConfig(
            self.factor,
            distance=self.distance,
            layers=self.layers,
            combine=self.combine,
            reduction=self.reduction,
        )
        if self.temperature == "learned":
            snnl = replace(snnl, schedule="learned")
        elif self.temperature is not None:
            snnl = replace(snnl, schedule="fixed", temperature=self.temperature)
        return model, replace(objective, snnl=snnl), train


def show(value: Any) -> str:
    """A value of an option, short and fit for a file's name."""
    if isinstance(value, tuple):
        return "+".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Panel:
    """A grid of doses: labels[0] names what varies down and its values, labels[1] the same across."""

    title: str
    labels: tuple[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]]
    doses: tuple[tuple[Dose, ...], ...]

    def __iter__(self) -> Iterator[tuple[int, int, Dose]]:
        """Row, column, dose."""
        for row, line in enumerate(self.doses):
            for column, dose in enumerate(line):
                yield row, column, dose

    def arms(self) -> set[str]:
        """Of every dose and its control."""
        return {one.name for _, _, dose in self for one in (dose, dose.control)}


Axis = tuple[str, dict[str, Any]]  # what varies; label -> value


def _panel(title: str, down: Axis, across: Axis, dose: Callable[[Any, Any], Dose]) -> Panel:
    lines = tuple(tuple(dose(a, b) for b in across[1].values()) for a in down[1].values())
    return Panel(title, ((down[0], tuple(down[1])), (across[0], tuple(across[1]))), lines)


def _shown(values: Sequence[Any]) -> dict[str, Any]:
    return {show(value): value for value in values}


def _one_thing(doses: dict[str, Dose]) -> Panel:
    """Doses that differ from the default in one thing, one below the other."""
    return _panel("one thing changed", ("", doses), ("factor", {"1": None}), lambda dose, _: dose)


def snnl_panels(
    factors: Sequence[float],
    temperatures: Sequence[float],
    layers: Sequence[tuple[str, ...]],
    experts: Sequence[int],
    others: dict[str, Dose],
) -> tuple[Panel, ...]:
    down = "factor", _shown(factors)
    steps = {"annealed from 1": None} | _shown(temperatures)
    panels = [
        _panel("factor × temperature", down, ("temperature", steps), lambda f, t: Dose(f, t)),
        _panel("factor × layer", down, ("layer", _shown(layers)), lambda f, at: Dose(f, layers=at)),
        _panel(
            "factor × number of experts",
            down,
            ("experts", _shown(experts)),
            lambda f, e: Dose(f, num_experts=e),
        ),
    ]
    return (*panels, _one_thing(others)) if others else tuple(panels)


@dataclass(frozen=True)
class Doses:
    """What a profile runs of a dose-response study: one data set, less of it than the study itself."""

    dataset: str
    settings: Settings
    panels: tuple[Panel, ...]
    num_seeds: int
    train_images: int | None = None

    def doses(self) -> list[Dose]:
        """Each once, controls first."""
        treated = [dose for panel in self.panels for _, _, dose in panel]
        return list(dict.fromkeys([*(dose.control for dose in treated), *treated]))


_LAYERS = (("code",), ("conv2",), ("conv1",), ("conv1", "conv2", "code"))  # several: their least loss
_SNNL = snnl_panels(
    (0.1, 0.3, 1.0, 10.0),
    (0.1, 1.0, 10.0),
    _LAYERS,
    (2, 4, 8, 16),
    {
        "mixture of probabilities": Dose(mixture="likelihood"),
        "competitive experts (Jacobs)": Dose(mixture="jacobs"),
        "batches of 64": Dose(batch_size=64),
        "batches of 512": Dose(batch_size=512),
        "squared Euclidean distance": Dose(distance="sqeuclidean"),
        "temperature learned": Dose(temperature="learned"),
        "sum over three layers": Dose(layers=_LAYERS[-1], combine="sum"),
    },
)
# With a hundred classes a batch of 256 holds 2.55 others of an image's class, and for 8 % none.
_BATCHES = (
    _panel(
        "factor × images of one class in a row",
        ("factor", _shown((1.0, 10.0))),
        ("images of one class in a row", _shown((1, 2, 4, 8))),
        lambda f, m: Dose(f, samples_per_class=m),
    ),
    _one_thing(
        {
            "mean over all images": Dose(reduction="mean_all"),
            "batches of 64": Dose(batch_size=64),
            "batches of 1024": Dose(batch_size=1024),
        }
    ),
)

# study -> profile
PLANS: dict[str, dict[str, Doses]] = {
    "snnl-dose": {
        "digits": Doses(
            "digits",
            snnl.SETTINGS["digits"]["digits"],
            snnl_panels((0.1, 10.0), (0.1,), (("code",), ("hidden",)), (4, 8), {}),
            num_seeds=2,
        ),
        "core": Doses("fashion_mnist", snnl.SETTINGS["core"]["fashion_mnist"], _SNNL, 5, train_images=10_000),
        "paper": Doses(
            "fashion_mnist", snnl.SETTINGS["paper"]["fashion_mnist"], _SNNL, 10, train_images=10_000
        ),
    },
    "snnl-batches": {
        "core": Doses("cifar100", snnl.SETTINGS["core"]["cifar100"], _BATCHES, 3, train_images=20_000),
        "paper": Doses("cifar100", snnl.SETTINGS["paper"]["cifar100"], _BATCHES, 10),
    },
}


def dose_runs(study: str, profile: str) -> Iterator[Run]:
    """Every dose of a dose-response study and its controls, seed by seed."""
    planned = PLANS[study].get(profile)
    if planned is None:
        return
    settings = planned.settings
    for seed in SEEDS[: planned.num_seeds]:
        for dose in planned.doses():
            yield Run(
                profile, study, planned.dataset, dose.name, seed, VERSIONS[study], *dose.arm(settings),
                train_images=planned.train_images,
            )  # fmt: skip


def dose_study(profile: str, dataset: str) -> str:
    """The dose-response study that a profile has on a data set.

    Raises:
        StudyError: it has none.
    """
    names = {plans[profile].dataset: name for name, plans in PLANS.items() if profile in plans}
    if dataset not in names:
        raise StudyError(
            f"unknown dataset {dataset!r} in the dose-response of profile {profile!r}; "
            f"known: {', '.join(names) or 'none'}"
        )
    return names[dataset]


STUDIES: dict[str, Plan] = {name: partial(dose_runs, name) for name in PLANS}
