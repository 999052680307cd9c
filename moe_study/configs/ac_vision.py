"""The AC study on images: does Adaptive Clustering help the router of a vision transformer?

`python -m moe_study run --profile core --study ac-vision` takes 239 core-minutes, "ac-vision-tuning" another
9. What came out (RESULTS.md, "Verdicts"): nothing can be tested here, for learned routing is not shown to
pay; the differences between `ac` and its controls are below a point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_study.configs import routed
from moe_study.configs.arms import ROUTED_CONTROLS, ROUTED_MAIN_ARMS, routed_arms
from moe_study.configs.routed import CORE_VISION, DIGITS_VISION, PAPER_VISION
from moe_study.configs.run import Plan, Run

VERSIONS = {"ac-vision": 1, "ac-vision-tuning": 1}
# Chosen by "ac-vision-tuning" on the first data set; the others take over from it.
SETTINGS: routed.Settings = {
    "digits": {"digits": DIGITS_VISION},
    "core": {
        "cifar10": CORE_VISION,
        "fashion_mnist": replace(CORE_VISION, model=VisionConfig(TransformerConfig(), patch=7)),
        "cifar100": CORE_VISION,
    },
    "paper": {"cifar10": PAPER_VISION, "cifar100": PAPER_VISION},
}
SEED_COUNTS: routed.SeedCounts = {
    "digits": {"digits": [((*ROUTED_MAIN_ARMS, "ac-shuffled"), 2)]},
    "core": {
        "cifar10": [(ROUTED_MAIN_ARMS, 10), (ROUTED_CONTROLS, 5)],
        "fashion_mnist": [(ROUTED_MAIN_ARMS, 10)],
        "cifar100": [(ROUTED_MAIN_ARMS, 10)],
    },
    "paper": {
        name: [((*ROUTED_MAIN_ARMS, "hash"), 10), (ROUTED_CONTROLS, 5)] for name in ("cifar10", "cifar100")
    },
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


def runs(profile: str) -> Iterator[Run]:
    arms = partial(routed_arms, "ac-vision")
    return routed.planned("ac-vision", VERSIONS["ac-vision"], SETTINGS, SEED_COUNTS, arms, profile)


def tuning_runs(profile: str) -> Iterator[Run]:
    """The same learning rates for each main arm."""
    return routed.tuning(
        "ac-vision",
        VERSIONS["ac-vision-tuning"],
        SETTINGS,
        partial(routed_arms, "ac-vision"),
        lambda own: [(arm, rate, own) for rate in LEARNING_RATES for arm in ROUTED_MAIN_ARMS],
        profile,
    )


STUDIES: dict[str, Plan] = {"ac-vision": runs, "ac-vision-tuning": tuning_runs}
