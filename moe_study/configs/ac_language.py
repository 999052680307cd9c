"""The AC study on text: does Adaptive Clustering help the router of a language model over bytes?

`python -m moe_study run --profile core --study ac-language` takes 107 core-minutes, "ac-language-tuning"
another 8. Every run of it ends on, or has just left, the plateau of a model that knows only the frequencies
of bytes.

"ac-language-confirm" is past that plateau: one pass over WikiText-2 (10.8 MB), and the AC router in the last
block alone, as in the authors' small language model. Its runs shared an H100 and took up to two minutes each.
All arms have one learning rate, which has the lowest validation cross-entropy at the last epoch, as the mean
over the five arms and two seeds of "ac-language-confirm-tuning". What came out (RESULTS.md, "Verdicts"): a
linear router beats fixed experts per position and loses to fixed experts per byte; the AC router is not told
apart from it.

In that study the other two blocks keep a learned router, beside fixed experts too. "ac-language-everywhere"
asks what learned routing is worth in all three: the same linear router, taken over from there, against fixed
experts in every block. `... --study ac-language-everywhere` takes 299 core-minutes. What came out: learned
routing is far better than fixed experts per position there, and worse than fixed experts per byte, by more
than in the last block alone.
"""

from __future__ import annotations

from dataclasses import replace

from moe_lib.models.language import LanguageConfig
from moe_lib.models.transformer import TransformerConfig
from moe_lib.moe import ACConfig
from moe_study.configs import routed
from moe_study.configs.arms import (
    AC_VARIANTS,
    CONFIRMATORY_SEEDS,
    ROUTED_MAIN_ARMS,
    RoutedArm,
    RoutedSettings,
    routed_arms,
)
from moe_study.configs.study import Study
from moe_study.train import TrainConfig

SETTINGS: routed.Settings = {
    "digits": {
        "docs": RoutedSettings(
            LanguageConfig(replace(routed.SMALL, depth=2, moe_blocks=(0, 1)), context=32),
            ACConfig(),
            TrainConfig(epochs=2, batch_size=32, learning_rate=1e-2, precision="float64", warmup=0.1),
            options={"epoch_tokens": 24 * 1024, "test_tokens": 2**13},
        )
    },
    "core": {  # chosen by "ac-language-tuning"
        "wikitext2": RoutedSettings(
            LanguageConfig(TransformerConfig(depth=3, moe_blocks=(0, 1, 2))),
            ACConfig(),
            TrainConfig(epochs=8, batch_size=32, learning_rate=1e-2, warmup=0.1),
            options={"epoch_tokens": 256 * 1024},  # 8 epochs: 2 MB of text
        )
    },
    # The shape of the authors' small model, with the arm's router in the last block alone; ten passes over
    # the text, 3,300 steps, in about 3e14 float operations: the fifty main runs take about three minutes of
    # an H100. The rate is not tuned.
    "paper": {
        "wikitext2": RoutedSettings(
            LanguageConfig(
                TransformerConfig(
                    dim=128, depth=3, moe_blocks=(0, 1, 2), expert_hidden=128, router_blocks=(2,)
                ),
                context=256,
            ),
            ACConfig(),
            TrainConfig(epochs=10, batch_size=128, learning_rate=3e-3, precision="bfloat16", warmup=0.1),
            options={"test_tokens": 2**21},  # all of it
        )
    },
}
SEED_COUNTS: routed.SeedCounts = {
    "digits": {"docs": [((*ROUTED_MAIN_ARMS, "ac-causal"), 2)]},
    "core": {"wikitext2": [(ROUTED_MAIN_ARMS, 10), (AC_VARIANTS, 5)]},
    "paper": {"wikitext2": [((*ROUTED_MAIN_ARMS, "hash", "hash-token"), 10), (AC_VARIANTS, 5)]},
}
STUDY = routed.study(
    "ac-language",
    SETTINGS,
    SEED_COUNTS,
    # The best of the first three was the highest, for every arm: hence the fourth.
    lambda own: routed.rates((1e-3, 3e-3, 1e-2, 3e-2), ROUTED_MAIN_ARMS, routed.short(own)),
)

# ------------------------------------------------------------------------------- past the plateau

CONFIRM_SETTINGS: routed.Settings = {
    "core": {
        "wikitext2": RoutedSettings(
            LanguageConfig(TransformerConfig(depth=3, moe_blocks=(0, 1, 2), router_blocks=(2,))),
            ACConfig(),
            TrainConfig(epochs=8, batch_size=32, learning_rate=1e-2, warmup=0.1),
            options={"epoch_tokens": 1_349_000},  # 8 epochs: the whole text once
        )
    }
}
CONFIRM_ARMS = (*ROUTED_MAIN_ARMS, "hash", "hash-token")
CONFIRM_COUNTS: routed.SeedCounts = {"core": {"wikitext2": [(CONFIRM_ARMS, 10), (AC_VARIANTS, 8)]}}
CONFIRMING = routed.confirming("ac-language-confirm", CONFIRM_SETTINGS, CONFIRM_COUNTS, CONFIRM_ARMS)


def everywhere_arms(own: RoutedSettings) -> dict[str, RoutedArm]:
    """Learned routing in all blocks, and none in any."""
    trunk = replace(own.model.trunk, router_blocks=None)
    hashed = routed_arms("ac-language", replace(own, model=replace(own.model, trunk=trunk)))
    return hashed | {"linear": routed_arms("ac-language", own)["linear"]}


EVERYWHERE = Study(
    name="ac-language-everywhere",
    settings=CONFIRM_SETTINGS,  # the rate is that of "…-confirm"
    arms=everywhere_arms,
    counts={"core": {"wikitext2": [(("linear", "hash", "hash-token"), 10)]}},
    seeds=CONFIRMATORY_SEEDS,
)
STUDIES = STUDY.plans | CONFIRMING.plans | EVERYWHERE.plans
