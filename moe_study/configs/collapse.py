"""The collapse studies: arms, settings and seeds; and the plans of their runs.

Three domains under one label space (one label means three things), and experts of four hidden units, so that
sharing the domains out might pay.

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe_lib.models.classifier import ClassifierConfig
from moe_lib.snnl import SNNLConfig
from moe_study.configs.arms import MAIN_ARMS, Settings, snnl_arms
from moe_study.configs.run import VERSIONS, Plan, Run
from moe_study.configs.study import SeedCounts, Study, Tried, trained, with_factors
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


def confirming(
    name: str,
    settings: dict[str, dict[str, Settings]],
    arms: Callable[[Settings], dict[str, tuple[ClassifierConfig, Objective]]],
    seeds: Sequence[int],
    tuned: Sequence[str],
    with_snnl: Sequence[str],
) -> Study[Settings]:
    """Every arm on seeds that nobody has seen; two of them with digits.

    Tuning, at the full budget: every arm at every learning rate, for arms differ in the one they want; the
    weight of the balance loss at each.

    Args:
        tuned: arms to which only the rate is to be found.
        with_snnl: arms whose factor of SNNL is to be found too.
    """

    def grid(own: Settings) -> Tried[Settings]:
        tried: Tried[Settings] = []
        for rate in COLLAPSE_RATES:
            at_rate = trained(own, learning_rate=rate)
            tried += with_factors(at_rate, tuned, with_snnl)
            tried += [("base-balance", replace(at_rate, balance=w)) for w in COLLAPSE_BALANCE_WEIGHTS]
        return tried

    counts: SeedCounts = {
        profile: {
            dataset: [(tuple(arms(own)), 2 if profile == "digits" else len(seeds))]
            for dataset, own in sets.items()
        }
        for profile, sets in settings.items()
    }
    return Study(
        name=name, settings=settings, arms=arms, counts=counts, seeds=seeds, trained_alone=MAIN_ARMS,
        grid=grid, tuned_on=tuple(settings["core"]),
    )  # fmt: skip


CONFIRMING = (
    confirming(
        "collapse", COLLAPSE_SETTINGS, collapse_arms, COLLAPSE_SEEDS,
        tuned=("base", "dense", "uniform-gate", "uniform-snnl"), with_snnl=("snnl", "dense-snnl"),
    ),
    confirming(
        "collapse-top1", TOP1_SETTINGS, top1_arms, TOP1_SEEDS,
        tuned=("base", "hash-gate"), with_snnl=("snnl", "hash-snnl"),
    ),
    confirming(
        "collapse-wide", WIDE_SETTINGS, collapse_arms, WIDE_SEEDS,
        tuned=("base", "dense", "uniform-gate"), with_snnl=("snnl", "dense-snnl", "uniform-snnl"),
    ),
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
    **{name: plan for one in CONFIRMING for name, plan in one.plans.items()},
    "collapse-map": map_runs,
}
