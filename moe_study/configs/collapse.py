"""The collapse studies: arms, settings and seeds; and the plans of their runs.

Three domains under one label space (one label means three things), and experts too narrow to serve all three,
so that the work has to be shared.

- "collapse": every arm of a soft mixture, 40 confirmatory seeds.
- "collapse-top1": one expert per image (Switch Transformer), beside a fixed random expert per image.
- "collapse-wide": FashionMNIST and sixteen experts, a third of which are no image's first choice: does it
  cost anything there?
- "collapse-map": where a mixture collapses, what a learned gate costs, and what SNNL adds, over the number of
  experts, their width and the width of the code. It explores: every arm has the rates that were tuned at one
  point of the map.

`python -m moe_study run --profile core --study collapse-map` takes 277 core-minutes, "collapse" 69,
"collapse-top1" 22, "collapse-wide" 32; "collapse-tuning" 29, "collapse-top1-tuning" 24 and
"collapse-wide-tuning" 28.

What came out (RESULTS.md, "Verdicts"): a learned gate costs accuracy in both soft mixtures, where a constant
one does better. Idle experts explain at most a part of that: the balance loss puts nearly all experts to work
in the narrow mixture and wins back less than half of the difference; among sixteen experts it puts more to
work and wins back nothing. SNNL keeps experts at work and makes the narrow mixtures more accurate; with one
expert per image, learned routing pays with SNNL. With sixteen experts on FashionMNIST SNNL gains less than
was claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.snnl import SNNLConfig
from moe_study.configs.arms import FACTORS, MAIN_ARMS, TUNING_SEEDS, Settings, snnl_arms
from moe_study.configs.run import VERSIONS, Plan, Run
from moe_study.tasks import Objective
from moe_study.train import TrainConfig

_NARROW = ClassifierConfig("mlp", 64, code_dim=8, num_experts=4, expert_hidden=4, gate_hidden=64)
COLLAPSE_SETTINGS: dict[str, dict[str, Settings]] = {
    "digits": {
        "digit_domains": Settings(
            _NARROW,
            TrainConfig(epochs=5, batch_size=64, learning_rate=1e-2, precision="float64"),
            factor=10.0,
            dense_factor=10.0,
            balance=0.1,
        )
    },
    "core": {
        "domains": Settings(
            _NARROW,
            # Chosen by "collapse-tuning", and held against its files by a test: for each arm the rate, and
            # for each extra loss the weight, of the lowest validation cross-entropy at the last epoch.
            # "snnl-shuffled" takes over from "snnl".
            TrainConfig(epochs=10, batch_size=256, learning_rate=3e-3),
            factor=10.0,
            dense_factor=1.0,
            balance=1.0,
            learning_rates=(("base", 1e-3), ("base-balance", 1e-3), ("snnl-weaker", 1e-3)),
        )
    },
}
COLLAPSE_SETTINGS["paper"] = COLLAPSE_SETTINGS["core"]


def collapse_arms(settings: Settings) -> dict[str, tuple[ClassifierConfig, Objective]]:
    """Those arms of the SNNL study that tell routing from features, and SNNL at a tenth of the factor."""
    arms = snnl_arms(settings)
    weaker = snnl_arms(replace(settings, factor=settings.factor / 10))["snnl"]
    return {name: weaker if name == "snnl-weaker" else arms[name] for name in COLLAPSE_ARMS}


COLLAPSE_ARMS = (
    "base", "snnl", "snnl-weaker", "base-balance", "dense", "dense-snnl", "uniform-gate", "uniform-snnl",
    "snnl-shuffled",
)  # fmt: skip
COLLAPSE_SEEDS = tuple(range(201, 241))  # confirmatory: see CONFIRMATORY_SEEDS
COLLAPSE_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
COLLAPSE_BALANCE_WEIGHTS = (0.01, 0.1, 1.0)

# ------------------------------------------------------------------------------ one expert per image

# Of "core": chosen by "collapse-top1-tuning" by the rule of the soft mixture, and held against its files by a
# test. All but the rates are what the soft mixture has.
TOP1_SETTINGS: dict[str, dict[str, Settings]] = {
    profile: {
        name: replace(
            settings,
            model=replace(settings.model, top_k=1),
            learning_rates=() if profile == "digits" else (("base", 1e-3),),
        )
        for name, settings in sets.items()
    }
    for profile, sets in COLLAPSE_SETTINGS.items()
}


def top1_arms(settings: Settings) -> dict[str, tuple[ClassifierConfig, Objective]]:
    """One expert per image: learned, balanced, with SNNL; and fixed at random, with and without SNNL."""
    arms = snnl_arms(settings)
    found = {name: arms[name] for name in ("base", "snnl", "base-balance")}
    hashed = replace(settings.model, gate="hash")
    return found | {
        "hash-gate": (hashed, Objective()),
        "hash-snnl": (hashed, Objective(snnl=SNNLConfig(factor=settings.dense_factor))),
    }


TOP1_SEEDS = tuple(range(301, 321))  # confirmatory: see arms.CONFIRMATORY_SEEDS

# ----------------------------------------------------------------------------------- sixteen experts

WIDE_SETTINGS: dict[str, dict[str, Settings]] = {
    "core": {
        "fashion_mnist": Settings(
            ClassifierConfig("mlp", 256, code_dim=16, num_experts=16, expert_hidden=16, gate_hidden=64),
            # Chosen by "collapse-wide-tuning" by the rule of `COLLAPSE_SETTINGS`, and held against its files.
            TrainConfig(epochs=6, batch_size=256, learning_rate=3e-3),
            factor=1.0,
            dense_factor=1.0,
            balance=0.01,
            learning_rates=(("uniform-gate", 1e-2), ("uniform-snnl", 1e-2)),
        )
    }
}
WIDE_SETTINGS["paper"] = WIDE_SETTINGS["core"]
WIDE_SEEDS = tuple(range(401, 411))  # confirmatory: see arms.CONFIRMATORY_SEEDS

# ------------------------------------------------------------------------------------------------ map


@dataclass(frozen=True, kw_only=True)
class Map:
    """Every arm at every combination of three sizes of the model."""

    dataset: str
    settings: Settings
    arms: tuple[str, ...]
    num_experts: tuple[int, ...]
    expert_hidden: tuple[int, ...]
    code_dim: tuple[int, ...]
    seeds: tuple[int, ...]

    def models(self) -> list[ClassifierConfig]:
        return [
            replace(self.settings.model, num_experts=experts, expert_hidden=hidden, code_dim=code)
            for code in self.code_dim
            for experts in self.num_experts
            for hidden in self.expert_hidden
        ]


MAPS = {
    "digits": Map(
        dataset="digit_domains",
        settings=COLLAPSE_SETTINGS["digits"]["digit_domains"],
        arms=("base", "base-balance", "uniform-gate", "snnl", "uniform-snnl"),
        num_experts=(2, 4),
        expert_hidden=(2, 4),
        code_dim=(8,),
        seeds=(501,),
    ),
    "core": Map(
        dataset="domains",
        settings=COLLAPSE_SETTINGS["core"]["domains"],
        arms=("base", "base-balance", "uniform-gate", "snnl", "snnl-weaker", "uniform-snnl"),
        num_experts=(2, 4, 8, 16),
        expert_hidden=(2, 4, 16),
        code_dim=(4, 8, 16),
        seeds=(501, 502, 503),
    ),
}
MAPS["paper"] = replace(MAPS["core"], seeds=tuple(range(501, 511)))

# ----------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True, kw_only=True)
class Confirming:
    """One of the confirmatory studies: every arm on seeds that nobody has seen; two of them with digits."""

    settings: dict[str, dict[str, Settings]]  # by profile and data set
    arms: Callable[[Settings], dict[str, tuple[ClassifierConfig, Objective]]]
    seeds: tuple[int, ...]
    tuned: tuple[str, ...]  # arms to which only the rate is to be found
    tuned_factor: tuple[str, ...]  # arms whose factor of SNNL is to be found too


_SOFT_TUNED = ("base", "dense", "uniform-gate", "uniform-snnl")
CONFIRMING = {
    "collapse": Confirming(
        settings=COLLAPSE_SETTINGS, arms=collapse_arms, seeds=COLLAPSE_SEEDS,
        tuned=_SOFT_TUNED, tuned_factor=("snnl", "dense-snnl"),
    ),
    "collapse-top1": Confirming(
        settings=TOP1_SETTINGS, arms=top1_arms, seeds=TOP1_SEEDS,
        tuned=("base", "hash-gate"), tuned_factor=("snnl", "hash-snnl"),
    ),
    "collapse-wide": Confirming(
        settings=WIDE_SETTINGS, arms=collapse_arms, seeds=WIDE_SEEDS,
        tuned=("base", "dense", "uniform-gate"), tuned_factor=("snnl", "dense-snnl", "uniform-snnl"),
    ),
}  # fmt: skip


def confirming_runs(study: str, profile: str) -> Iterator[Run]:
    """One of `CONFIRMING`: all arms, seed by seed."""
    plan = CONFIRMING[study]
    seeds = plan.seeds[:2] if profile == "digits" else plan.seeds
    for dataset, settings in plan.settings.get(profile, {}).items():
        for seed in seeds:
            for arm, (model, objective) in plan.arms(settings).items():
                yield Run(
                    profile, study, dataset, arm, seed, VERSIONS[study], model, objective,
                    settings.training(arm), independent_experts=arm in MAIN_ARMS,
                )  # fmt: skip


def tuning_runs(study: str, profile: str) -> Iterator[Run]:
    """The grid behind the settings of one of `CONFIRMING`, at the full budget, on two seeds outside.

    Every arm at every learning rate, for arms differ in the one they want; the factor of SNNL and the weight
    of the balance loss at each.
    """
    if profile != "core":
        return
    plan = CONFIRMING[study]
    for dataset, settings in plan.settings[profile].items():
        grid: list[tuple[str, Settings]] = [(arm, settings) for arm in plan.tuned]
        for factor in FACTORS:
            tried = replace(settings, factor=factor, dense_factor=factor)
            grid += [(arm, tried) for arm in plan.tuned_factor]
        grid += [("base-balance", replace(settings, balance=weight)) for weight in COLLAPSE_BALANCE_WEIGHTS]
        for seed in TUNING_SEEDS:
            for rate in COLLAPSE_RATES:
                for arm, tried in grid:
                    model, objective = plan.arms(tried)[arm]
                    yield Run(
                        profile, f"{study}-tuning", dataset, arm, seed, VERSIONS[f"{study}-tuning"], model,
                        objective, replace(settings.train, learning_rate=rate),
                    )  # fmt: skip


def map_runs(profile: str) -> Iterator[Run]:
    """The collapse map, seed by seed: every arm at every size."""
    plan = MAPS[profile]
    arms = collapse_arms(plan.settings)
    for seed in plan.seeds:
        for sizes in plan.models():
            for arm in plan.arms:
                model, objective = arms[arm]
                yield Run(
                    profile, "collapse-map", plan.dataset, arm, seed, VERSIONS["collapse-map"],
                    replace(sizes, gate=model.gate), objective, plan.settings.training(arm),
                )  # fmt: skip


STUDIES: dict[str, Plan] = {
    **{name: partial(confirming_runs, name) for name in CONFIRMING},
    "collapse-map": map_runs,
    **{f"{name}-tuning": partial(tuning_runs, name) for name in CONFIRMING},
}
