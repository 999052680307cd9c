"""The AC study on images: does Adaptive Clustering help the router of a vision transformer?

`python -m moe_study run --profile core --study ac-vision` takes 384 core-minutes, "ac-vision-tuning" another
9. What came out (RESULTS.md, "Verdicts"): the AC router cannot be judged there. An image's patches are so
different by position that two fixed experts per position (`hash`) beat every router on all three sets, by
two to five points. In accuracy `ac` and its controls are less than a point apart.

"ac-vision-confirm" takes position away: three domains under one label space, each image shifted around its
edges at random, so that a router has to look at the patch. In pilots (validation data, one tuning seed) a
linear router was ahead of fixed experts by three to six points. All arms have one learning rate, which has
the lowest validation cross-entropy at the last epoch, as the mean over the five arms and two seeds of
"ac-vision-confirm-tuning". `... --study ac-vision-confirm` takes 188 core-minutes, "ac-vision-confirm-tuning"
another 77. What came out: learned routing and the mixture pay there; the AC router is no better than a linear
one and a little worse than a cosine one.

"ac-vision-trained" asks on CIFAR-10 whether fixed experts still win once the models are past their plateau:
all images, flips and crops, 14 epochs, convolutions in front of the tokens. Its rate is chosen in the same
way, by "ac-vision-trained-tuning", which takes 171 core-minutes. In pilots (validation data, one tuning seed)
no form was found in which a linear router is ahead of fixed experts by more than a point: not with four
experts instead of sixteen, nor with images shifted around their edges. This is the form that learns fastest.
`... --study ac-vision-trained` takes 676 core-minutes by the clock, for some hours of which it was stopped.
What came out: fixed experts win on trained models too, so the AC router cannot be judged there; no difference
from its controls is seen.
"""

from __future__ import annotations

from dataclasses import replace

from moe_lib.models.transformer import TransformerConfig
from moe_lib.models.vision import VisionConfig
from moe_study.configs import routed
from moe_study.configs.arms import (
    ROUTED_CONTROLS,
    ROUTED_MAIN_ARMS,
    RoutedSettings,
)
from moe_study.configs.routed import CORE_VISION, DIGITS_VISION, PAPER_VISION
from moe_study.train import TrainConfig

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
        "cifar10": [(ROUTED_MAIN_ARMS, 10), (ROUTED_CONTROLS, 5), (("hash",), 10)],
        "fashion_mnist": [(ROUTED_MAIN_ARMS, 10), (("hash",), 10)],
        "cifar100": [(ROUTED_MAIN_ARMS, 10), (("hash",), 10)],
    },
    "paper": {
        name: [((*ROUTED_MAIN_ARMS, "hash"), 10), (ROUTED_CONTROLS, 5)] for name in ("cifar10", "cifar100")
    },
}
STUDY = routed.study(
    "ac-vision",
    SETTINGS,
    SEED_COUNTS,
    lambda own: routed.rates((1e-3, 3e-3, 1e-2), ROUTED_MAIN_ARMS, routed.short(own)),
)

# ------------------------------------------------------------------- where position means nothing

CONFIRM_SETTINGS: routed.Settings = {
    "core": {
        "shifted_domains": RoutedSettings(
            VisionConfig(
                TransformerConfig(
                    dim=32, depth=3, num_heads=2, mlp_hidden=64, moe_blocks=(1, 2), expert_hidden=16
                ),
                patch=7,
            ),
            routed.SWIN_FORM,
            TrainConfig(epochs=10, batch_size=256, learning_rate=1e-2, warmup=0.1),
            options={"attack_images": 2000, "corrupted_images": 10_000},
        )
    }
}
CONFIRM_ARMS = (*ROUTED_MAIN_ARMS, "hash", "dense")
CONFIRM_COUNTS: routed.SeedCounts = {"core": {"shifted_domains": [(CONFIRM_ARMS, 10)]}}
CONFIRMING = routed.confirming("ac-vision-confirm", CONFIRM_SETTINGS, CONFIRM_COUNTS, CONFIRM_ARMS)

# ---------------------------------------------------------------------------------- past the plateau

TRAINED_SETTINGS: routed.Settings = {
    "core": {
        "cifar10": RoutedSettings(
            VisionConfig(
                TransformerConfig(dim=64, depth=3, mlp_hidden=128, moe_blocks=(1, 2), expert_hidden=64),
                stem="conv",
            ),
            routed.SWIN_FORM,
            TrainConfig(epochs=14, batch_size=256, learning_rate=1e-2, warmup=0.1),
            options={"attack_images": 2000, "corrupted_images": 10_000, "augment": True},
        )
    }
}
TRAINED_ARMS = (*ROUTED_MAIN_ARMS, "hash")
TRAINED_COUNTS: routed.SeedCounts = {"core": {"cifar10": [(TRAINED_ARMS, 10)]}}
TRAINED = routed.confirming(
    "ac-vision-trained", TRAINED_SETTINGS, TRAINED_COUNTS, TRAINED_ARMS, tried=(5e-3, 1e-2, 2e-2)
)
STUDIES = STUDY.plans | CONFIRMING.plans | TRAINED.plans
