"""The crossed study: SNNL and the AC router, each with and without the other, in a vision transformer.

`python -m moe_study run --profile core --study crossed` takes 43 core-minutes, "crossed-tuning" another 2.
What came out: five seeds, so a pilot that decides nothing; the scores are in RESULTS.md, "Both remedies
crossed".
"""

from __future__ import annotations

from dataclasses import replace

from moe_study.configs import routed
from moe_study.configs.arms import CROSSED_ARMS

SETTINGS: routed.Settings = {
    "digits": {"digits": routed.DIGITS_VISION},
    "core": {"cifar10": replace(routed.CORE_VISION, factor=0.1)},  # chosen by "crossed-tuning"
    "paper": {"cifar10": replace(routed.PAPER_VISION, factor=0.1)},  # two arms are those of "ac-vision"
}
SEED_COUNTS: routed.SeedCounts = {
    "digits": {"digits": [(CROSSED_ARMS, 2)]},
    "core": {"cifar10": [(CROSSED_ARMS, 5)]},
    "paper": {"cifar10": [(CROSSED_ARMS, 10)]},
}
FACTORS = (0.1, 1.0, 10.0)
STUDY = routed.study(
    "crossed",
    SETTINGS,
    SEED_COUNTS,
    # three factors of the SNNL, at the rate of the AC study
    lambda own: [("snnl", replace(routed.short(own), factor=factor)) for factor in FACTORS],
)
STUDIES = STUDY.plans
