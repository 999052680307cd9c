"""Alarms: which numbers are out of order, in words. Thresholds were set on planted faults.

`python -m benchmarks.inspect calibrate` plants each fault at several levels in blocks whose truth is known.
The thresholds lie between the healthy blocks' worst percent and the faults at their strongest, on the
safe side for healthy ones. results/planted/inspect.json holds them with their false alarms and misses, on
blocks that had no part in choosing them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moe_lib.inspect.layer import Layer

THRESHOLDS: dict[str, float] = {
    "collapsed": 0.6,  # effective experts over the balanced null, at most
    "dead": 0.0,  # never chosen above its null, more than
    "dropping": 0.01,  # share of tokens dropped, more than
    "alike": 0.3,  # answers alike by use above the null, more than
    "blind": 0.1,  # I(x;E) over log E, at most
    "arbitrary": 0.05,  # input separation above its null, as a share of what is left; at most
    "overridden": 0.5,  # follows scores, at most
    "unexplained": 0.02,  # mixture error, more than
}
MEANS = {
    "collapsed": "few experts do the work: {value:.1f} effective of {num_experts}",
    "dead": "{value:.0f} of {num_experts} experts serve no token",
    "dropping": "{value:.1%} of the tokens are served by no expert",
    "alike": "the experts in use compute nearly the same: mean cosine of their answers {value:.2f}",
    "blind": "the choice hardly depends on the token: I(x;E) = {value:.3f} nats",
    "arbitrary": "the choice is arbitrary: experts read inputs no more alike than chance, {value:.3f}",
    "overridden": "only {value:.0%} of the dispatch is what the router's scores prefer",
    "unexplained": "what was observed does not explain the block's output, off by {value:.0%}",
}


class Alarm(NamedTuple):
    layer: str
    kind: str
    value: float
    what: str


def severity(layer: Layer, kind: str) -> float:
    """The number that the threshold of this kind is for; larger is worse. NaN: cannot be said."""
    value = {name: v.value for name, v in layer.measures.items()}
    null = {name: v.null for name, v in layer.measures.items()}
    nan = math.nan

    def of(name: str) -> tuple[float, float]:
        return value.get(name, nan), null.get(name, nan)

    if kind == "collapsed":
        effective, balanced = of("effective experts")
        return -effective / balanced
    if kind == "dead":
        dead, chance = of("never chosen")
        return dead - chance if chance < 0.5 else nan  # too few tokens to say
    if kind == "dropping":
        return of("dropped")[0]
    if kind == "alike":
        alike, chance = of("answers alike, by use")
        return alike - max(chance, 0.0)
    if kind == "blind":
        return -of("I(x;E)")[0] / math.log(max(layer.num_experts, 2))
    if kind == "arbitrary":
        separation, chance = of("input separation")
        return -(separation - chance) / (1 - chance) if chance < 0.5 else nan
    if kind == "overridden":
        return -of("follows scores")[0]
    return of("mixture error")[0]


NUMBER = {
    "collapsed": "effective experts", "dead": "never chosen", "dropping": "dropped",
    "alike": "answers alike, by use", "blind": "I(x;E)", "arbitrary": "input separation",
    "overridden": "follows scores", "unexplained": "mixture error",
}  # fmt: skip
AT_MOST = ("collapsed", "blind", "arbitrary", "overridden")  # low values are worse


def alarms_of(layers: Sequence[Layer], thresholds: dict[str, float] | None = None) -> list[Alarm]:
    unknown = set(thresholds or {}) - set(THRESHOLDS)
    if unknown:
        raise ValueError(f"unknown alarms {sorted(unknown)}; there are {', '.join(THRESHOLDS)}")
    limits = THRESHOLDS | (thresholds or {})
    found = []
    for layer in layers:
        for kind, limit in limits.items():
            worse = severity(layer, kind)
            if worse >= -limit if kind in AT_MOST else worse > limit:
                value = layer.measures[NUMBER[kind]].value
                what = MEANS[kind].format(value=value, num_experts=layer.num_experts)
                found.append(Alarm(layer.name, kind, value, what))
    return found


def early_warning(values: Sequence[float], num_experts: int, ahead: int = 1) -> float:
    """Effective experts expected `ahead` measurements from now: a line through the last five.

    Below half the experts, collapse is under way although it has not been reached. Look often: of 744 runs
    of the study, looked at once an epoch, 256 were below half at their first look. Five fell below it later:
    two were announced, three epochs before (the median). Of the 483 that ended above half, 45 were announced
    too (`ahead` 3; `python -m benchmarks.inspect calibrate`).
    """
    last = [v for v in values if not math.isnan(v)][-5:]
    if len(last) < 2:
        return math.nan
    middle, mean = (len(last) - 1) / 2, sum(last) / len(last)
    slope = sum((t - middle) * v for t, v in enumerate(last)) / sum(
        (t - middle) ** 2 for t in range(len(last))
    )
    return min(max(mean + slope * (len(last) - 1 - middle + ahead), 1.0), float(num_experts))
