"""Every claim, published number, margin and control of the study; and the rule by which claims are decided.

This is data: `verdicts` applies the rule, and the report words it. Nothing else states a claim or a margin.

A unit is one claim on one data set against one control. The primary endpoint is the last epoch: a fixed
budget with the learning rate at 0. Differences are paired by seed: mean, 95 % t interval, exact sign-flip
p, Holm over the applicable units of a study. Five words:

- *supported*: the mean has the claimed sign, Holm p <= 0.05, and no other endpoint contradicts the claim.
- *contradicted*: the 90 % t interval lies wholly on the other side of zero. It is not corrected for the
  number of claims: the word is easier to get than *supported*.
- *smaller than claimed*: not contradicted, and the 90 % interval lies wholly below the published
  difference or, where none is known, below the margin declared here. Beside it stands the verdict at half
  and at twice that.
- *undecided*: none of these; said with the number of seeds that 80 % power for that difference would
  take, at 5 % before correction.
- *not testable here*: there is nothing to resolve, the measure is at its floor, the disturbance costs
  nothing, or routing does not pay.

Fewer than 8 paired seeds are a *pilot*: shown, never decided. A joint claim has conditions: *supported*
asks all of them, and a condition whose 90 % interval lies wholly below its margin contradicts the claim.
A verdict that is another at another endpoint is said to depend on the checkpoint rule.

Does learned routing pay? That is a claim of our own, decided by the same rule, on each data set of each
study: the learned router against one that learns nothing (`base - uniform-gate`, `linear - hash`). It is
decided first, in one family with all that hangs on it. A claim about better routing (all of the AC router's;
"routing more flexible") is decided only where it is supported.

Against the published baseline and against the fair control there are two verdicts, side by side. For SNNL
both are `base`, the same mixture without the loss. AC's published baseline is `linear`; its fair control
is `cosine`, the AC router without scaling. Shuffled-label controls, partners and the mechanism contrast
attribute a difference; they never decide a verdict.

Exploratory and confirmatory. The first ten seeds chose the endpoint, so they explore. Confirmation has
studies of its own (`arms.CONFIRMATORY`: "snnl-confirm", say), on seeds that no result had been seen of when
claims, margins, endpoint, arms and numbers of seeds were committed; REPRODUCIBILITY.md names the commits.
Such a set is never extended after a look. The claims it decides are those of `CLAIMS`, with their margins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from moe_study import store
from moe_study.columns import (
    COLUMNS,
    LANGUAGE_COLUMNS,
    VISION_COLUMNS,
    Column,
    Result,
    experts_in_use,
    shown_interval,
    signed,
)

OUTSIDE = {  # data sets that are in no family of units
    "mnist": "a ceiling, and not claimed",
    "digits": "shows the machinery",
    "digit_domains": "shows the machinery",
    "docs": "shows the machinery",
}


@dataclass(frozen=True)
class Measure:
    name: str
    direction: Literal["higher", "lower"]  # as claimed
    column: Column

    @property
    def sign(self) -> int:
        return 1 if self.direction == "higher" else -1

    def of(self, result: Result, endpoint: str | None = None) -> float | None:
        """The value at an endpoint, the file's own primary one if None; None where the file has none there.

        Raises:
            ValueError: the value is not finite; names data set, arm, seed and measure.
        """
        primary = store.primary_endpoint(result)
        value = self.column.of(result, endpoint or primary)
        if value is None and endpoint in (None, primary):
            value = math.nan
        if value is not None and not math.isfinite(value):
            run = result["run"]
            raise ValueError(
                f"{run['study']}/{run['dataset']}/{run['arm']} seed {run['seed']} has no finite {self.name} "
                f"(found {value}): a run that failed has no place in a verdict; delete its result file and "
                "run it again"
            )
        return None if value is None else float(value)

    def shown(self, *values: float, unit: bool = True) -> str:
        """One value, or "value [low, high]", or "[low, high]", with sign and unit."""
        scaled, decimals = [value * self.column.scale for value in values], self.column.decimals
        text = signed(scaled[0], decimals) if len(values) % 2 else ""
        if len(values) > 1:
            text = f"{text} {shown_interval(scaled[-2], scaled[-1], decimals)}".strip()
        return f"{text} {self.column.unit}".strip() if unit else text


class Condition(NamedTuple):
    """What a joint claim asks besides; bound and margin are signed in the measure's direction."""

    wording: str
    measure: Measure
    against: Literal["control", "zero"]  # the unit's control, or 0 in the treatment arm alone
    bound: float  # met when the difference lies above
    margin: float  # contradicts when the 90 % interval lies below


class Attribution(NamedTuple):
    """A control that attributes an effect; it never decides a verdict."""

    treatment: str
    control: str
    cause: str  # of the effect, if the contrast has the claimed sign


class Published(NamedTuple):
    """Known second-hand."""

    control: float  # the published baseline, in the measure's unit
    treatment: float

    @property
    def difference(self) -> float:
        return self.treatment - self.control


@dataclass(frozen=True, kw_only=True)
class Claim:
    key: str
    source: Literal["SNNL-MoE", "AC router", "this study"]
    study: str  # the exploring one; `arms.CONFIRMATORY` names the one that confirms
    wording: str
    measure: Measure
    treatment: str
    controls: Mapping[str, str]  # arm -> its part, such as "published baseline"; a unit each
    margin: float  # smallest difference that would matter, where none is published
    margin_reason: str
    attribution: tuple[Attribution, ...] = ()
    mechanism: bool = False  # (snnl - base) - (dense-snnl - dense) says something of this measure
    conditions: tuple[Condition, ...] = ()
    published: Mapping[str, Published] = field(default_factory=dict)  # by data set
    gate: str | None = None  # key of the claim "learned routing pays" that must be supported first
    resolves: Literal["routing", "representational"] | None = None  # the collapse that must be there first
    floor: bool = False  # the measure has a floor at which it says nothing
    resists: Measure | None = None  # what the disturbance costs: it must cost some arm something
    reading: bool = (
        False  # our reading of a paper that says "resolves expert collapse" and measures otherwise
    )

    def worth(self, dataset: str) -> float:
        """The difference that counts, positive in the claimed direction: published, or else the margin."""
        published = self.published.get(dataset)
        return self.margin if published is None else self.measure.sign * published.difference


ACCURACY = Measure("accuracy", "higher", COLUMNS["accuracy"])
CROSS_ENTROPY = Measure("cross-entropy", "lower", COLUMNS["cross-entropy"])
PILOT_BELOW = 8  # paired seeds; fewer are shown, never decided on
# A run that ends above this is not trained: it has not, or only just, left the plateau of a model that knows
# the frequencies of bytes alone, and its score says when it left. A control that learns no routing may end
# anywhere. By study, exploring or confirming; nats a byte.
NOT_TRAINED_ABOVE = dict.fromkeys(("ac-language", "ac-language-confirm", "ac-language-everywhere"), 1.5)
_SMALLEST_GAIN = 0.0028
_SMALLEST_REASON = "the smaller of the two published gains"
_NAT_REASON = "one per cent of perplexity; no number of the paper is known"
_POINT_REASON = "half a point; no number of the paper is known"
_FLEXIBLE_MARGIN = 0.07  # nats
PAYS, BESIDE = "learned routing pays", "learned routing pays with SNNL"
MIXTURE = "a mixture beats a dense network"
BLIND = "learns no routing"
_BLIND_IN_TEXT = {"hash": f"{BLIND}, by position", "hash-token": f"{BLIND}, by byte"}
_BASE = {"base": "published baseline and fair control"}
_ROUTERS = {"linear": "published baseline", "cosine": "fair control"}

_SNNL_ATTRIBUTION = (
    Attribution("snnl", "snnl-shuffled", "the labels in SNNL, not a gradient of its size"),
    Attribution("snnl", "base-aux", "SNNL, not any supervision of the code"),
    Attribution("snnl", "base-balance", "SNNL, beyond what the standard remedy does"),
)
_NO_GATE = tuple(
    Attribution("snnl", gate, "SNNL, beyond taking the learned gate away")
    for gate in ("uniform-gate", "hash-gate")
)


def _ours(
    study: str,
    key: str,
    wording: str,
    treatment: str,
    controls: Mapping[str, str],
    measure: Measure = ACCURACY,
    margin: float = _SMALLEST_GAIN,
) -> Claim:
    """A claim of our own."""
    reason = _SMALLEST_REASON if margin == _SMALLEST_GAIN else "as for the claims it gates"
    more = {"source": "this study", "treatment": treatment, "controls": controls}
    return _claim(study, key, wording, measure, margin, reason, **more)


def _claim(
    study: str, key: str, wording: str, measure: Measure, margin: float, reason: str, **more: Any
) -> Claim:
    return Claim(
        key=f"{study}-{key}", study=study, wording=wording, measure=measure, margin=margin,
        margin_reason=reason, **more,
    )  # fmt: skip


def _snnl_claim(
    key: str, wording: str, measure: Measure, margin: float, reason: str, study: str = "snnl", **more: Any
) -> Claim:
    """A claim of the SNNL paper."""
    own = {"source": "SNNL-MoE", "treatment": "snnl", "controls": _BASE, "attribution": _SNNL_ATTRIBUTION}
    return _claim(study, key, wording, measure, margin, reason, **(own | more))


def _snnl_accuracy(study: str, **more: Any) -> Claim:
    more["attribution"] = (*_SNNL_ATTRIBUTION, *_NO_GATE)
    return _snnl_claim("accuracy", "more accurate", ACCURACY, _SMALLEST_GAIN, _SMALLEST_REASON, study, **more)


def _snnl_effective(study: str, margin: float, reason: str) -> Claim:
    measure = Measure("effective experts", "higher", COLUMNS["effective experts"])
    more = {"resolves": "routing", "reading": True}
    return _snnl_claim("effective", "more effective experts", measure, margin, reason, study, **more)


def _ac_claims(study: str, partner: str, performance: Measure, margin: float, reason: str) -> list[Claim]:
    """What the AC paper claims in images and text alike.

    Args:
        partner: the arm that differs from "ac-pooled" in the clusters alone.
    """
    attribution = (
        Attribution("ac", "ac-shuffled", "each cluster's own row of M, not any scaling"),
        Attribution(partner, "ac-pooled", "clusters, not whitening of all tokens alike"),
        Attribution("ac", "ac-matched", "the gate's sharpness"),
        Attribution("ac", "ac-causal", "statistics of the current batch"),
    )

    claim = partial(
        _claim, study, source="AC router", treatment="ac", controls=_ROUTERS, attribution=attribution,
        gate=f"{study}-pays",
    )  # fmt: skip
    columns = LANGUAGE_COLUMNS if study == "ac-language" else VISION_COLUMNS
    area = Measure("validation area", "lower", columns["validation area"])
    found = [
        claim("convergence", "converges faster", area, 0.01, "one per cent of perplexity"),
        claim("performance", "performs better", performance, margin, reason),
    ]
    if study == "ac-language":
        lost = Measure("cost of word swap", "lower", columns["lost to swap"])
        swapped = "cross-entropy under word swap"
        under = Measure(swapped, "lower", columns[swapped])
        found.append(claim("swap", "more robust to swapped words", under, 0.01, _NAT_REASON, resists=lost))
        return found
    for kind in ("corruption", "attack"):
        kept, given_up = f"accuracy under {kind}", f"lost to {kind}"
        measure = Measure(kept, "higher", columns[kept])
        cost = Measure(f"accuracy {given_up}", "lower", columns[given_up])
        found.append(claim(kind, f"more robust to {kind}", measure, 0.005, _POINT_REASON, resists=cost))
    return found


CLAIMS: tuple[Claim, ...] = (
    _ours("snnl", "pays", PAYS, "base", {"uniform-gate": BLIND}),
    _ours("snnl", "mixture", MIXTURE, "base", {"dense": "no mixture, of the same size"}),
    _snnl_accuracy(
        "snnl",
        mechanism=True,
        published={
            "fashion_mnist": Published(0.9133, 0.9161),
            "cifar100": Published(0.3575, 0.3674),
        },
    ),
    _snnl_claim(
        "orthogonal",
        "experts' weights more orthogonal",
        Measure("|cos| weights", "lower", COLUMNS["|cos| weights"]),
        0.01,
        "half a degree off a right angle",
        resolves="representational",
        floor=True,
    ),
    _snnl_claim(
        "flexible",
        "routing more flexible",
        Measure("H(E|c)", "higher", COLUMNS["H(E|c)"]),
        _FLEXIBLE_MARGIN,
        "a twentieth of log 4, the largest entropy of four experts",
        conditions=(
            Condition(
                "the gate depends on its input no less",
                Measure("I(x;E)", "higher", COLUMNS["I(x;E)"]),
                "control",
                -_FLEXIBLE_MARGIN,
                -_FLEXIBLE_MARGIN,
            ),
            Condition(  # equal experts, or a gate that ignores its input, cost exactly 0: the null
                "permuting the routing costs accuracy",
                Measure("cost of permuted routing", "higher", COLUMNS["cost of permuted routing"]),
                "zero",
                0.0,
                0.005,
            ),
        ),
        resolves="routing",
        gate="snnl-pays",
    ),
    _ours("collapse", "pays", PAYS, "base", {"uniform-gate": BLIND}),
    _ours("collapse", "mixture", MIXTURE, "base", {"dense": "no mixture, of the same size"}),
    _snnl_effective("collapse", 0.5, "half an expert"),
    _snnl_claim(
        "different",
        "experts compute more different things",
        Measure("cosine of outputs, by use", "lower", COLUMNS["cos outputs, by use"]),
        0.05,
        "a twentieth of the range from unrelated to equal",
        study="collapse",
        reading=True,
        conditions=(
            Condition(
                "CKA by use no higher",
                Measure("CKA of outputs, by use", "lower", COLUMNS["CKA outputs, by use"]),
                "control",
                -0.02,
                -0.02,
            ),
        ),
    ),
    _snnl_accuracy("collapse", mechanism=True),
    _ours("collapse", "beside", BESIDE, "snnl", {"uniform-snnl": BLIND}),
    _ours("collapse-top1", "pays", PAYS, "base", {"hash-gate": BLIND}),
    _snnl_claim(
        "effective",
        "more experts in use",
        Measure("experts in use", "higher", Column(experts_in_use, 2)),
        0.5,
        "half an expert",
        study="collapse-top1",
        reading=True,
    ),
    _snnl_accuracy("collapse-top1"),
    _ours("collapse-top1", "beside", BESIDE, "snnl", {"hash-snnl": BLIND}),
    _ours("collapse-wide", "pays", PAYS, "base", {"uniform-gate": BLIND}),
    _ours("collapse-wide", "mixture", MIXTURE, "base", {"dense": "no mixture, of the same size"}),
    _snnl_effective("collapse-wide", 2.0, "an eighth of the experts"),
    _snnl_accuracy("collapse-wide", mechanism=True),
    _ours("collapse-wide", "beside", BESIDE, "snnl", {"uniform-snnl": BLIND}),
    _ours("ac-vision", "pays", PAYS, "linear", {"hash": BLIND}, margin=0.005),
    _ours(
        "ac-vision", "mixture", MIXTURE, "linear", {"dense": "no mixture, of the active width"}, margin=0.005
    ),
    *_ac_claims("ac-vision", "ac", ACCURACY, 0.005, _POINT_REASON),
    _ours(
        "ac-language",
        "pays",
        PAYS,
        "linear",
        _BLIND_IN_TEXT,
        CROSS_ENTROPY,
        0.01,
    ),
    *_ac_claims("ac-language", "ac-row", CROSS_ENTROPY, 0.01, _NAT_REASON),
    _ours("ac-language-everywhere", "pays", PAYS, "linear", _BLIND_IN_TEXT, CROSS_ENTROPY, 0.01),
)
BY_KEY = {claim.key: claim for claim in CLAIMS}


def claimed(study: str) -> list[tuple[Claim, Measure, list[tuple[str, str]]]]:
    """What the AC paper claims in a study: each claim with its measure, and with what a disturbance costs,
    beside the contrasts that decide or attribute it."""
    return [
        (
            claim,
            measure,
            [(claim.treatment, control) for control in claim.controls]
            + [(one.treatment, one.control) for one in claim.attribution],
        )
        for claim in CLAIMS
        if claim.study == study and claim.source == "AC router"
        for measure in (claim.measure, claim.resists)
        if measure is not None
    ]
