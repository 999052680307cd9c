"""Which measure to trust: each of them on planted routers and experts of known quality.

`python -m moe_study trust` writes what comes out to `results/planted/trust.json`.

Shapes: N samples, E experts, C classes, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from moe_lib import metrics
from moe_lib.metrics import collapse
from moe_lib.models.classifier import mix
from moe_lib.rng import generator
from moe_study import store
from moe_study.data.planted import PlantedRouting, planted_routing

LADDERS: dict[str, Callable[[float, int], PlantedRouting]] = {  # of a level in [0, 1] and a seed
    "noise": lambda level, seed: planted_routing("noise", level, seed=seed),
    "collapse": lambda level, seed: planted_routing("collapse", level, seed=seed),
    "blind": lambda level, seed: planted_routing("blind", level, seed=seed),
    "split": lambda level, seed: planted_routing("split", level, seed=seed),
    "alike": lambda level, seed: planted_routing("alike", level, seed=seed),
    "overlap": lambda level, seed: planted_routing(overlap=level, seed=seed),  # of the sub-populations
    "noise, crossed": lambda level, seed: planted_routing("noise", level, crossed=True, seed=seed),
}
CLAIMED = {  # what is commonly taken for better: higher (1) or lower (-1); each value's maximum is log E or 1
    "H(E)": 1,  # balanced
    "H(E|x)": -1,  # decided
    "H(E|c)": 1,  # "flexible routing", as the SNNL paper reads it
    "I(x;E)": 1,
    "I(c;E) - null": 1,
    "AMI(c, top-1)": 1,
    "effective experts": 1,
    "routing collapse": -1,
    "representational collapse": -1,
    "functional collapse": -1,
}
UNSEEN = ("alike", "noise, crossed")  # by any measure of routing and class
SEEDS, LEVELS = tuple(range(11)), (0, 0.2, 0.4, 0.6, 0.8, 1)
RESOLUTION = 2  # decimals: what moves less than this share of its maximum does not move
TRUTH = "ARI with the truth"  # of top-1 expert and true partition: unknown outside planted data


def routing_measures(routing: PlantedRouting, draw_seed: int = 0) -> dict[str, float]:
    """Every measure of `CLAIMED`, as a share of its maximum, and `TRUTH`."""
    probs_NE, labels_N = routing.probs_NE, routing.labels_N
    num_classes = int(labels_N.max()) + 1
    raw = metrics.routing_entropy(probs_NE, labels_N, num_classes)
    entropy = raw.normalized()
    draw = generator(draw_seed, "trust null")
    null = metrics.information_class_null(probs_NE, labels_N, num_classes, draw)
    null = raw._replace(information_class=null).normalized().information_class
    load = metrics.load(probs_NE, labels_N)
    return {
        "H(E)": entropy.marginal,
        "H(E|x)": entropy.per_sample,
        "H(E|c)": entropy.class_conditional,
        "I(x;E)": entropy.information_input,
        "I(c;E) - null": entropy.information_class - null,
        "AMI(c, top-1)": load.adjusted_mutual_information,
        "effective experts": load.effective_experts / raw.num_experts,
        "routing collapse": collapse.routing_collapse(raw.marginal, raw.num_experts),
        "representational collapse": collapse.representational_collapse(
            metrics.output_similarity(routing.answers_NEC)
        ),
        "functional collapse": _functional_collapse(routing, draw_seed),
        TRUTH: float(adjusted_rand_score(routing.partition_N.numpy(), probs_NE.argmax(1).numpy())),
    }


def _functional_collapse(routing: PlantedRouting, draw_seed: int) -> float:
    """From five exchanges of the gates between samples."""
    probs_NE, labels_N = routing.probs_NE, routing.labels_N
    draw = generator(draw_seed, "permuted routing")

    def accuracy(weights_NE: torch.Tensor) -> float:
        answer_N = mix(weights_NE, routing.answers_NEC, "logits").argmax(1)
        return (answer_N == labels_N).double().mean().item()

    clean = accuracy(probs_NE)
    permuted = [accuracy(probs_NE[torch.randperm(len(probs_NE), generator=draw)]) for _ in range(5)]
    num_experts, num_classes = routing.answers_NEC.shape[1:]
    return collapse.functional_collapse(clean - sum(permuted) / 5, clean, num_classes, num_experts)


def climb(seeds: Sequence[int], levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """`routing_measures` of every ladder, seed and level: one row each, with those three as columns too.

    The quality that was planted is 1 - level on every ladder.
    """
    return pd.DataFrame(
        {"ladder": ladder, "seed": seed, "level": level} | routing_measures(step(level, seed), seed)
        for ladder, step in LADDERS.items()
        for seed in seeds
        for level in levels
    )


def score_measures(climbed: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each measure with the planted quality: per seed, then the mean.

    1: the measure falls with every step away from the right router, in every seed. -1: it rises with every
    step. 0: it does not move by a hundredth of its maximum, or has no direction. The last column is the
    worst of the ladders under the sign that the measure is commonly read with; `UNSEEN` are left out of it.
    """
    measures = [*CLAIMED, TRUTH]
    rows = {
        ladder: {
            measure: np.mean([_agreement(one_seed, measure) for _, one_seed in of_ladder.groupby("seed")])
            for measure in measures
        }
        for ladder, of_ladder in climbed.groupby("ladder", sort=False)
    }
    table = pd.DataFrame(rows).rename_axis("measure")
    signed = table.drop(columns=list(UNSEEN)).mul(pd.Series(CLAIMED | {TRUTH: 1}), axis=0)
    return table.assign(worst=signed.min(axis=1))


def _agreement(one_seed: pd.DataFrame, measure: str) -> float:
    value_L = one_seed[measure].round(RESOLUTION).to_numpy()
    if (value_L == value_L[0]).all():
        return 0.0
    return float(stats.spearmanr(1 - one_seed["level"], value_L).statistic)


def path() -> Path:
    return store.results_dir() / "planted" / "trust.json"


def write() -> None:
    """Climb every ladder and write `path()`: scores, and each measure's mean over seeds at each level."""
    climbed = climb(SEEDS, LEVELS)
    means = {
        ladder: of_ladder.drop(columns=["ladder", "seed"]).groupby("level").mean().to_dict("list")
        for ladder, of_ladder in climbed.groupby("ladder", sort=False)
    }
    scores = score_measures(climbed).drop(columns="worst").to_dict("index")
    found: dict[str, Any] = {"seeds": SEEDS, "levels": LEVELS, "claimed": CLAIMED, "scores": scores}
    store.write(path(), found | {"means": means} | store.provenance())


def signed_scores() -> pd.DataFrame:
    """Measure by ladder, from `path()`, which is written first where it is missing: 1 where the measure gets
    worse with every step of the fault, -1 where it gets better with every step, 0 where it does not see it.
    """
    if not path().exists():
        write()
    found = store.read(path())
    scores = pd.DataFrame.from_dict(found["scores"], orient="index")
    return scores.mul(pd.Series(found["claimed"] | {TRUTH: 1}), axis=0).rename_axis("measure")
