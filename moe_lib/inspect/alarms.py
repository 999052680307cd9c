"""Alarms: which numbers are out of order, in words. Thresholds were set on planted faults.

`python -m benchmarks.inspect calibrate` plants each fault at several levels in blocks whose truth is known.
The thresholds lie between the healthy blocks' worst percent and the faults at their strongest, on the
safe side for healthy ones. results/planted/inspect.json holds them with their false alarms and misses, on
blocks that had no part in choosing them.

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from moe_lib.inspect.measures import Layer


class Kind(NamedTuple):
    """`reading` makes of a measure's value, its null and the block the number that the threshold is for."""

    measure: str
    threshold: float
    low_is_worse: bool
    reading: Callable[[float, float, Layer], float]  # NaN: cannot be said
    means: str
    advice: str  # what to try

    def raised(self, reading: float, threshold: float) -> bool:
        return reading <= threshold if self.low_is_worse else reading > threshold


def _value(value: float, null: float, layer: Layer) -> float:
    return value


def _dead(value: float, null: float, layer: Layer) -> float:
    """None, if chance alone leaves as many out at least once in a thousand times (Poisson)."""
    chance = torch.special.gammainc(*torch.tensor([max(value, 1e-9), null], dtype=torch.float64))
    return value if chance < 1e-3 else 0.0


def _blind(value: float, null: float, layer: Layer) -> float:
    """As a share of the most that equal weights of K experts allow."""
    num_experts, num_slots = layer.num_experts, layer.top_k
    most = math.log(num_experts / num_slots if 0 < num_slots < num_experts else num_experts)
    return value / most if most > 0 else math.nan


def _arbitrary(value: float, null: float, layer: Layer) -> float:
    """As a share of the variance that chance leaves; 4 standard deviations of chance count as 5 % of it.

    NaN with too few tokens to tell, and where one expert has them all.
    """
    beyond = layer["separation beyond chance"]
    if math.isnan(beyond) or not null < 0.5:
        return math.nan
    return max((value - null) / (1 - null), beyond / 80)


KINDS = {
    "collapsed": Kind(
        "effective experts", 0.6, True, lambda value, null, _: value / null,
        "few experts do the work: {value:.1f} effective of {num_experts}",
        "give the load-balancing loss more weight (panel.explain_balance_loss checks its value), or the "
        "router a lower learning rate; then compare with a gate that learns nothing: balance is not quality",
    ),
    "dead": Kind(
        "never chosen", 0.0, False, _dead, "{value:.0f} of {num_experts} experts {serve_none}",
        "an expert that serves nobody gets hardly any gradient and does not come back by itself: choose by "
        "noisy scores for a while, or start it again as a noisy copy of a busy one, with a balancing loss",
    ),
    "dropping": Kind(
        "dropped", 0.01, False, _value, "{value:.1%} of the tokens are served by no expert",
        "raise the experts' capacity, or balance the load so that the capacity is enough",
    ),
    "alike": Kind(
        "answers alike, by use", 0.3, False, lambda value, null, _: value - max(null, 0.0),
        "the experts in use answer much alike: mean cosine of their answers {value:.2f}; 1 is the same",
        "are they copies of one layer? Start them apart or train longer; if they stay alike, one dense layer "
        "does the same for less",
    ),
    "blind": Kind(
        "I(x;E)", 0.1, True, _blind,
        "the choice hardly depends on the token: I(x;E) = {value:.3f} nats",
        "look at the scale of what the gate reads, its temperature, its bias and its learning rate, and "
        "whether softmax is applied twice",
    ),
    "arbitrary": Kind(
        "input separation", 0.05, True, _arbitrary,
        "the choice is arbitrary: experts read inputs no more alike than chance, {value:.3f}",
        "is noise left on, or are routing and tokens in different orders? If the router has learned nothing, "
        "a fixed random choice costs less and may do as well",
    ),
    "overridden": Kind(
        "follows scores", 0.5, True, _value,
        "only {value:.0%} of the dispatch is what the router's scores prefer",
        "a selection bias, groups or a small capacity decide: slow the bias down, or raise the capacity",
    ),
    "unexplained": Kind(
        "mixture error", 0.02, False, _value,
        "what was observed does not explain the block's output, off by {value:.1%}",
        "is there a path that all tokens take? Trust this block's numbers when an Adapter explains it",
    ),
}  # fmt: skip
THRESHOLDS: dict[str, float] = {name: kind.threshold for name, kind in KINDS.items()}


class Alarm(NamedTuple):
    layer: str
    kind: str
    value: float
    what: str


def reading(layer: Layer, kind: str) -> float:
    """The number that the threshold of this kind is for. NaN: cannot be said."""
    return KINDS[kind].reading(*layer.measures[KINDS[kind].measure], layer)


def limits(thresholds: dict[str, float] | None = None) -> dict[str, float]:
    """All thresholds, with some changed."""
    unknown = set(thresholds or {}) - set(THRESHOLDS)
    if unknown:
        raise ValueError(f"unknown alarms {sorted(unknown)}; there are {', '.join(THRESHOLDS)}")
    return THRESHOLDS | (thresholds or {})


def alarms_of(layers: Sequence[Layer], thresholds: dict[str, float] | None = None) -> list[Alarm]:
    wanted, found = limits(thresholds), []
    for layer in layers:
        for name, limit in wanted.items():
            if KINDS[name].raised(reading(layer, name), limit):
                value = layer[KINDS[name].measure]
                serve_none = "have hardly any weight" if layer.soft else "serve no token"
                what = KINDS[name].means.format(
                    value=value, num_experts=layer.num_experts, serve_none=serve_none
                )
                found.append(Alarm(layer.name, name, value, what))
    return found


def early_warning(values: Sequence[float], num_experts: int, ahead: int = 1) -> float:
    """Effective experts expected `ahead` measurements from now: a line through the last five.

    Below half the experts, collapse is under way although it has not been reached. Look often: looked at once
    an epoch, most runs of the study that collapse are below half at their first look. How many of the others
    were announced, and how many false alarms there were: results/planted/inspect.json.
    """
    last = [v for v in values if not math.isnan(v)][-5:]
    if len(last) < 2:
        return math.nan
    slope, start = np.polyfit(range(len(last)), last, 1)
    return min(max(float(start + slope * (len(last) - 1 + ahead)), 1.0), float(num_experts))
