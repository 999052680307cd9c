"""The papers' claims as data, and the one rule that turns result files into a verdict on each.

A unit is one claim on one data set. Its parts are paired contrasts, each with a bound that it must pass:
the claimed measure against every fair control (bound 0), and what a joint claim asks besides. In order:

- *pilot*: fewer than 8 paired seeds in some part. Shown, never decided.
- *not applicable*: there was nothing to resolve or to resist, or the measure says nothing here.
- *supported*: in every part the 95 % t interval lies on the claimed side of its bound, and the unit's p is
  at most 0.05: the largest exact sign-flip p of the parts, Holm over all units of the study. A unit counts
  with p = 1 if it is a pilot (so that the family does not shrink while runs are missing), if it is not
  applicable, or if a part lies on the wrong side of its bound (or a clear contradiction would ease the rest).
- *refuted*: in some part the 90 % interval lies wholly below the published difference, or, where none is
  known, below the margin declared here. Holm guards *supported* alone: each such interval stands for itself.
- *undecided* otherwise, with the effect that a single paired t test at 5 % would have found.

That there must be a collapse to resolve is asked of the claims on experts and routing, not of accuracy: the
report has a section of its own on where there was one.

Fair controls decide; placebos, partners and the mechanism contrast say only whose doing it is.
`base` is SNNL's one fair control, for the claim is made of the same mixture with and without the loss:
`raw` lacks the extractor, and a placebo, another remedy or other supervision explain a gain but do not undo
it. AC has two: the published linear router, and AC with M = I.

Shapes: S seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from moe_lib import metrics
from moe_lib.metrics.collapse import collapse
from moe_study import stats
from moe_study.report import tables

ALPHA = 0.05
OUTSIDE = {  # data sets that are in no family of units
    "mnist": "a ceiling, and not claimed",
    "digits": "shows the machinery",
    "docs": "shows the machinery",
}
Outcome = Literal["supported", "refuted", "undecided", "not applicable", "pilot"]


# ----------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Measure:
    name: str
    source: str | Callable[[dict[str, Any]], float | None]  # dotted path in a result, or a function of it
    direction: Literal["higher", "lower"]  # as claimed
    decimals: int = 4
    unit: str = ""
    scale: float = 1.0  # shown is the value times this

    @property
    def sign(self) -> int:
        return 1 if self.direction == "higher" else -1

    def of(self, result: dict[str, Any]) -> float:
        """Raises:
        ValueError: the result has no finite value; names data set, arm, seed and measure.
        """
        source = self.source
        value = tables.look_up(result, source) if isinstance(source, str) else source(result)
        if value is None or not math.isfinite(value):
            run = result["run"]
            raise ValueError(
                f"{run['study']}/{run['dataset']}/{run['arm']} seed {run['seed']} has no finite "
                f"{self.name} (found {value}): a run that failed has no place in a verdict; "
                "delete its result file and run it again"
            )
        return float(value)

    def shown(self, *values: float, unit: bool = True) -> str:
        """One value, or "value [low, high]", or "[low, high]", with sign and unit."""
        texts = [f"{value * self.scale:+.{self.decimals}f}" for value in values]
        text = texts[0] if len(texts) % 2 else ""
        if len(texts) > 1:
            text = f"{text} [{texts[-2]}, {texts[-1]}]".strip()
        return f"{text} {self.unit}".strip() if unit else text


# ---------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Condition:
    """What a joint claim asks besides; all signed in the measure's direction."""

    wording: str
    measure: Measure
    against: Literal["controls", "zero"]  # each fair control, or 0 in the treatment arm alone
    bound: float  # met when the 95 % interval lies above
    margin: float  # refuted when the 90 % interval lies below


class Attribution(NamedTuple):
    """A contrast that says whose doing a difference is."""

    treatment: str
    control: str
    what: str  # does the work, if the contrast has the claimed sign


class Published(NamedTuple):
    difference: float  # in the measure's own unit, treatment minus control
    status: str  # how it is known


@dataclass(frozen=True)
class Claim:
    key: str
    paper: Literal["SNNL-MoE", "AC router"]
    study: str
    wording: str
    measure: Measure
    treatment: str
    controls: tuple[str, ...]  # every one must show the claimed sign
    margin: float  # smallest difference that would matter, in the claimed direction; where none is published
    margin_reason: str
    attribution: tuple[Attribution, ...] = ()
    mechanism: bool = False  # (snnl - base) - (dense-snnl - dense) says something of this measure
    conditions: tuple[Condition, ...] = ()
    published: Mapping[str, Published] = field(default_factory=dict)  # data set -> its difference
    resolves: Literal["routing", "representational"] | None = None  # the collapse that must be there first
    floor: bool = False  # the measure has a floor at which it says nothing
    resists: bool = False  # the measure is what a disturbance costs: it must cost some arm something

    def worth(self, dataset: str) -> float:
        """The difference that refutes when it is missed: the published one, or the margin where none is."""
        published = self.published.get(dataset)
        return self.measure.sign * self.margin if published is None else published.difference


_SECOND_HAND = "second-hand"
_SNNL_ATTRIBUTION = (
    Attribution("snnl", "snnl-shuffled", "the labels in SNNL, not a gradient of its size"),
    Attribution("snnl", "base-aux", "SNNL, not any supervision of the code"),
    Attribution("snnl", "base-balance", "SNNL, beyond what the standard remedy does"),
)


def _ac_attribution(partner: str) -> tuple[Attribution, ...]:
    return (
        Attribution("ac", "ac-shuffled", "each cluster's own row of M, not any scaling"),
        Attribution(partner, "ac-pooled", "clusters, not whitening of all tokens alike"),
        Attribution("ac", "ac-matched", "the gate's sharpness"),
        Attribution("ac", "ac-causal", "statistics of the present batch"),
    )


def _ac_claims(
    study: str, partner: str, performance: Measure, margin: float, margin_reason: str
) -> tuple[Claim, ...]:
    """What the AC paper claims in images and text alike."""

    def claim(key: str, wording: str, measure: Measure, margin: float, margin_reason: str) -> Claim:
        return Claim(
            f"{study}-{key}", "AC router", study, wording, measure, "ac", ("linear", "cosine"),
            margin, margin_reason, _ac_attribution(partner),
        )  # fmt: skip

    area = Measure("validation area", tables.validation_area, "lower", 4, "nats")
    return (
        claim("convergence", "converges faster", area, 0.01, "one per cent of perplexity"),
        claim("performance", "performs better", performance, margin, margin_reason),
    )


def _degradation(study: str, partner: str, key: str, wording: str, measure: Measure, margin: float) -> Claim:
    return Claim(
        f"{study}-{key}", "AC router", study, wording, measure, "ac", ("linear", "cosine"), margin,
        "half a point of accuracy" if measure.unit == "points" else "half a per cent of perplexity",
        _ac_attribution(partner), resists=True,
    )  # fmt: skip


ACCURACY = Measure("accuracy", "task.accuracy", "higher", 2, "points", 100)
_FLEXIBLE_MARGIN = 0.07  # nats
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "snnl-accuracy", "SNNL-MoE", "snnl", "more accurate", ACCURACY, "snnl", ("base",),
        margin=0.0028,
        margin_reason="the smaller of the two published gains",
        attribution=_SNNL_ATTRIBUTION,
        mechanism=True,
        published={
            "fashion_mnist": Published(0.0028, _SECOND_HAND),
            "cifar100": Published(0.0099, _SECOND_HAND),
        },
    ),
    Claim(
        "snnl-orthogonal", "SNNL-MoE", "snnl", "experts' weights more orthogonal",
        Measure("|cos| weights", "similarity.weights", "lower"), "snnl", ("base",),
        margin=0.01,
        margin_reason="half a degree off a right angle",
        attribution=_SNNL_ATTRIBUTION,
        resolves="representational",
        floor=True,
    ),
    Claim(
        "snnl-flexible", "SNNL-MoE", "snnl", "routing more flexible",
        Measure("H(E|c)", "routing.entropy.class_conditional", "higher", 3, "nats"), "snnl", ("base",),
        margin=_FLEXIBLE_MARGIN,
        margin_reason="a twentieth of log 4, the largest entropy of four experts",
        attribution=_SNNL_ATTRIBUTION,
        conditions=(
            Condition(
                "the gate depends on its input no less",
                Measure("I(x;E)", "routing.entropy.information_input", "higher", 3, "nats"),
                "controls", bound=-_FLEXIBLE_MARGIN, margin=-_FLEXIBLE_MARGIN,
            ),
            Condition(  # equal experts, or a gate that ignores its input, cost exactly 0: the null
                "permuting the routing costs accuracy",
                Measure("cost of permuted routing", "ablation.permuted", "higher", 2, "points", 100),
                "zero", bound=0.0, margin=0.005,
            ),
        ),
        resolves="routing",
    ),
    *_ac_claims("ac-vision", "ac", ACCURACY, 0.005, "half a point; no number of the paper is known"),
    _degradation(
        "ac-vision", "ac", "corruption", "more robust to corruption",
        Measure("accuracy lost to corruption", tables.corruption_loss, "lower", 2, "points", 100), 0.005,
    ),
    _degradation(
        "ac-vision", "ac", "attack", "more robust to attack",
        Measure(
            "accuracy lost to attack", partial(tables.attack_loss, tables.GRADIENT_ATTACKS), "lower", 2,
            "points", 100,
        ),
        0.005,
    ),
    *_ac_claims(
        "ac-language", "ac-row", Measure("cross-entropy", "task.cross_entropy", "lower", 4, "nats"),
        0.01, "one per cent of perplexity; no number of the paper is known",
    ),
    _degradation(
        "ac-language", "ac-row", "swap", "more robust to swapped words",
        Measure(
            "cross-entropy gained by word swap", partial(tables.swap_loss, tables.SWAP_SHARES), "lower", 4,
            "nats",
        ),
        0.005,
    ),
)  # fmt: skip


# -------------------------------------------------------------------------------------- evidence


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    profile: str
    dataset: str
    outcome: Outcome
    reason: str
    contrasts: dict[str, stats.PairedComparison | None]  # by "measure: treatment - control"; None: no pairs
    deciding: str | None  # the contrast with the largest p; None where one is missing
    refuting: str | None  # the contrast that refutes; None if the outcome is another
    measure: Measure  # of the deciding contrast
    p: float  # the largest of them; NaN where one is missing
    p_holm: float  # over the study's units; NaN for a pilot
    attribution: tuple[str, ...]  # one sentence a contrast
    detectable: float  # smallest effect of the deciding contrast, 80 % power at 5 %, in the measure's unit
    correlation: float  # of the pairs of the deciding contrast


class _Limits(NamedTuple):
    """Of one part, signed in the claimed direction."""

    bound: float
    refuted_below: float
    refuted_by: str  # what that limit is
    claimed: bool  # of the claimed measure, not of a condition


@dataclass(frozen=True)
class _Part:
    label: str
    measure: Measure
    treatment_S: np.ndarray
    control_S: np.ndarray  # zeros where the null is 0
    limits: _Limits

    @property
    def seeds(self) -> int:
        return len(self.treatment_S)

    @cached_property
    def comparison(self) -> stats.PairedComparison | None:
        return stats.paired_comparison(self.treatment_S, self.control_S) if self.seeds >= 2 else None

    @property
    def signed_S(self) -> np.ndarray:
        return self.measure.sign * (self.treatment_S - self.control_S)

    @property
    def p(self) -> float:
        """Sign-flip p that the mean is the bound."""
        return stats.sign_flip_p(self.signed_S - self.limits.bound) if self.seeds >= 2 else math.nan

    @property
    def holds(self) -> bool:
        return stats.t_interval(self.signed_S, 0.95)[0] > self.limits.bound

    @property
    def refuted(self) -> bool:
        """A condition that holds is not refuted; a claimed difference may hold, and yet be too small."""
        below = stats.t_interval(self.signed_S, 0.90)[1] < self.limits.refuted_below
        return below and (self.limits.claimed or not self.holds)

    def text(self) -> str:
        found = self.comparison
        if found is None:
            return f"{self.label}: {self.seeds} paired seeds"
        against = (
            f" against {self.measure.shown(self.measure.sign * self.limits.bound)}"
            if self.limits.bound
            else ""
        )
        return (
            f"{self.label} {self.measure.shown(found.difference, found.low, found.high)}, "
            f"p {_p_text(self.p)}{against}, {found.seeds} seeds"
        )


@dataclass(frozen=True)
class _Evidence:
    claim: Claim
    profile: str
    dataset: str
    parts: list[_Part]
    nothing_to_decide: str  # why the claim is not applicable; "" where it is
    results: Sequence[dict[str, Any]]

    @property
    def pilot(self) -> bool:
        return min(part.seeds for part in self.parts) < tables.PILOT_BELOW

    @property
    def p(self) -> float:
        return float(np.max([part.p for part in self.parts]))  # NaN if one is

    @property
    def p_in_family(self) -> float:
        """What Holm is given."""
        wrong = any(part.seeds >= 2 and part.signed_S.mean() <= part.limits.bound for part in self.parts)
        return 1.0 if self.pilot or self.nothing_to_decide or wrong else self.p


def _p_text(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def _check_alike(claim: Claim, results: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Profile and data set of a unit.

    Raises:
        ValueError: there are no results, they are of several profiles, data sets or versions, or of another
            study; or an arm has two with one seed.
    """
    runs = [result["run"] for result in results]
    for key in ("profile", "study", "dataset", "version"):
        found = sorted({str(run[key]) for run in runs})
        if len(found) != 1:
            raise ValueError(f"a verdict needs results of one {key}, got {', '.join(found) or 'none'}")
    if runs[0]["study"] != claim.study:
        raise ValueError(f"claim {claim.key!r} is of study {claim.study!r}, got {runs[0]['study']!r}")
    seen = set()
    for run in runs:
        if (run["arm"], run["seed"]) in seen:
            raise ValueError(
                f"two results of {claim.study}/{run['dataset']}/{run['arm']} seed {run['seed']}: keep the "
                "one whose id the profile plans"
            )
        seen.add((run["arm"], run["seed"]))
    return runs[0]["profile"], runs[0]["dataset"]


def _values(measure: Measure, results: Sequence[dict[str, Any]], arms: Sequence[str]) -> pd.DataFrame:
    rows = [
        (result["run"]["arm"], result["run"]["seed"], measure.of(result))
        for result in results
        if result["run"]["arm"] in arms
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "value"]).astype({"value": float})


def _pairs(values: pd.DataFrame, treatment: str, control: str) -> tuple[np.ndarray, np.ndarray]:
    both = values.pivot(index="seed", columns="arm", values="value")
    both = both.reindex(columns=[treatment, control]).dropna()
    return both[treatment].to_numpy(), both[control].to_numpy()


def _parts(claim: Claim, dataset: str, results: Sequence[dict[str, Any]]) -> list[_Part]:
    published = claim.published.get(dataset)
    by = (
        f"the declared margin ({claim.margin_reason})"
        if published is None
        else f"the published difference ({published.status})"
    )
    below = claim.measure.sign * claim.worth(dataset)
    asked = [(claim.measure, "controls", _Limits(0.0, below, by, True))]
    for c in claim.conditions:
        limits = _Limits(c.bound, c.margin, f'the margin of "{c.wording}"', False)
        asked.append((c.measure, c.against, limits))
    parts = []
    for measure, against, limits in asked:
        values = _values(measure, results, (claim.treatment, *claim.controls))
        if against == "zero":
            own_S = values.loc[values["arm"] == claim.treatment, "value"].to_numpy()
            label = f"{measure.name}: {claim.treatment}"
            parts.append(_Part(label, measure, own_S, np.zeros(len(own_S)), limits))
        for control in claim.controls if against == "controls" else ():
            label = f"{measure.name}: {claim.treatment} - {control}"
            pair = _pairs(values, claim.treatment, control)
            parts.append(_Part(label, measure, *pair, limits))
    return parts


def _shown_above(values: Sequence[float], nulls: Sequence[float]) -> bool:
    """Whether the 95 % interval of value - null, paired by run, lies above 0."""
    return stats.t_interval(np.subtract(values, nulls))[0] > 0


def _floor_reason(claim: Claim, results: Sequence[dict[str, Any]]) -> str:
    """Both arms no higher than what independent experts have."""
    texts = []
    for arm in (claim.treatment, *claim.controls):
        own = [result for result in results if result["run"]["arm"] == arm]
        value_S = [claim.measure.of(result) for result in own]
        nulls = {
            "independent vectors": [metrics.similarity_floor(result["expert_parameters"]) for result in own],
            "before training": [tables.look_up(result, "initial.similarity.weights") for result in own],
            "trained alone": [tables.look_up(result, "null.similarity.weights") for result in own],
        }
        known = {name: null_S for name, null_S in nulls.items() if None not in null_S}
        if all(_shown_above(value_S, null_S) for null_S in known.values()):
            return ""
        beside = ", ".join(f"{name} {np.mean(null_S):.4f}" for name, null_S in known.items())
        texts.append(f"{arm} {np.mean(value_S):.4f} ({beside})")
    return f"uninformative: both arms' {claim.measure.name} are no higher than a null: {'; '.join(texts)}"


def _collapse_reason(claim: Claim, results: Sequence[dict[str, Any]]) -> str:
    """No collapse of the kind to be resolved in the first fair control."""
    control, kind = claim.controls[0], claim.resolves or ""
    own = [result for result in results if result["run"]["arm"] == control]
    value_S, null_S = (
        [Measure(name, at, "higher").of(result) for result in own]
        for name, at in (
            (f"{kind} collapse", lambda result: getattr(collapse(result), kind).value),
            (f"null of {kind} collapse", lambda result: getattr(collapse(result), kind).null),
        )
    )
    if _shown_above(value_S, null_S):
        return ""
    difference = np.subtract(value_S, null_S)
    low, high = stats.t_interval(difference)
    return (
        f"nothing to resolve: {kind} collapse of {control} is {np.mean(value_S):.2f} beside "
        f"{np.mean(null_S):.2f} of its null ({difference.mean():+.2f} [{low:+.2f}, {high:+.2f}])"
    )


def _harmless_reason(claim: Claim, results: Sequence[dict[str, Any]]) -> str:
    """The disturbance costs neither the treatment nor a fair control anything."""
    means = []
    for arm in (claim.treatment, *claim.controls):
        cost_S = [claim.measure.of(result) for result in results if result["run"]["arm"] == arm]
        if _shown_above(cost_S, [0.0] * len(cost_S)):
            return ""
        means.append(f"{arm} {claim.measure.shown(float(np.mean(cost_S)))}")
    return f"nothing to resist: {claim.measure.name} is above 0 in no arm ({', '.join(means)})"


def _attribution(claim: Claim, results: Sequence[dict[str, Any]], said: bool) -> tuple[str, ...]:
    """One sentence a contrast, for those that have pairs; what it says of the cause if there is an effect."""
    measure = claim.measure
    arms = {arm for contrast in claim.attribution for arm in (contrast.treatment, contrast.control)}
    if claim.mechanism:
        arms |= {"snnl", "base", "dense-snnl", "dense"}
    values = _values(measure, results, sorted(arms))
    found = [
        (f"{a.treatment} - {a.control}", a.what, tables.contrast(values, a.treatment, a.control, "value"))
        for a in claim.attribution
    ]
    if claim.mechanism:
        name = "(snnl - base) - (dense-snnl - dense)"
        found.append(
            (name, "SNNL in a mixture, not better features alone", tables.mechanism(values, "value"))
        )
    sentences = []
    for name, what, contrast in found:
        if contrast is None:
            continue
        cause = {
            "as claimed": f"so it is {what}",
            "opposite to the claim": f"the opposite of the claim, so it is not {what}",
            "interval includes 0": f"whether it is {what} is open",
        }[tables.reading(contrast, measure.direction)]
        if contrast.seeds < tables.PILOT_BELOW:
            cause = f"a pilot on whether it is {what}"
        sentences.append(
            f"{name} {measure.shown(contrast.difference, contrast.low, contrast.high)}, "
            f"{contrast.seeds} seeds{f': {cause}' if said else ''}."
        )
    return tuple(sentences)


def _weigh(claim: Claim, results: Sequence[dict[str, Any]]) -> _Evidence:
    profile, dataset = _check_alike(claim, results)
    parts = _parts(claim, dataset, results)
    evidence = _Evidence(claim, profile, dataset, parts, "", results)
    if evidence.pilot:
        return evidence
    reason = _floor_reason(claim, results) if claim.floor else ""
    if not reason and claim.resolves is not None:
        reason = _collapse_reason(claim, results)
    if not reason and claim.resists:
        reason = _harmless_reason(claim, results)
    return replace(evidence, nothing_to_decide=reason)


# -------------------------------------------------------------------------------------- the rule


def _judge(evidence: _Evidence, p_holm: float) -> Verdict:
    parts, claim = evidence.parts, evidence.claim
    deciding = None if math.isnan(evidence.p) else max(parts, key=lambda part: part.p)
    detectable = correlation = math.nan
    if deciding is not None:
        sd = float(deciding.signed_S.std(ddof=1))
        detectable = stats.smallest_detectable_effect(sd, deciding.seeds)
        correlation = stats.pair_correlation(deciding.treatment_S, deciding.control_S)
    numbers = "; ".join(part.text() for part in parts)
    refuting = min(
        (part for part in parts if part.seeds >= 2 and part.refuted),
        key=lambda part: (not part.limits.claimed, part.signed_S.mean()),
        default=None,
    )

    outcome: Outcome
    if evidence.pilot:
        outcome = "pilot"
        reason = f"fewer than {tables.PILOT_BELOW} paired seeds: {numbers}"
    elif evidence.nothing_to_decide:
        outcome, reason = "not applicable", f"{evidence.nothing_to_decide}; {numbers}"
    elif all(part.holds for part in parts) and p_holm <= ALPHA:
        outcome = "supported"
        reason = f"{numbers}; Holm p {_p_text(p_holm)}"
        if refuting is not None:
            reason += f"; yet {_limit(refuting)}"
    elif refuting is not None:
        outcome = "refuted"
        margin = abs(refuting.limits.refuted_below)
        alike = stats.equivalence_test(refuting.treatment_S, refuting.control_S, margin).equivalent
        reason = f"{_limit(refuting)}{' (equivalent to within it)' if alike else ''}; {numbers}"
    else:
        assert deciding is not None
        outcome = "undecided"
        reason = (
            f"{numbers}; Holm p {_p_text(p_holm)}; a single paired t test of {deciding.seeds} seeds would "
            f"have found {deciding.measure.shown(detectable).lstrip('+')} in {deciding.label}"
        )
    return Verdict(
        claim,
        evidence.profile,
        evidence.dataset,
        outcome,
        reason,
        {part.label: part.comparison for part in parts},
        None if deciding is None else deciding.label,
        refuting.label if refuting is not None and outcome == "refuted" else None,
        claim.measure if deciding is None else deciding.measure,
        evidence.p,
        math.nan if evidence.pilot else p_holm,
        _attribution(claim, evidence.results, said=outcome == "supported"),
        detectable,
        correlation,
    )


def _limit(part: _Part) -> str:
    """ "90 % interval [..] of .. lies wholly below ..", in the measure's own direction."""
    low, high = stats.t_interval(part.treatment_S - part.control_S, 0.90)
    side = "below" if part.measure.direction == "higher" else "above"
    limit = part.measure.sign * part.limits.refuted_below
    return (
        f"90 % interval {part.measure.shown(low, high)} of {part.label} lies wholly {side} "
        f"{part.measure.shown(limit)}, {part.limits.refuted_by}"
    )


def _family(units: Sequence[_Evidence]) -> list[Verdict]:
    """Verdicts of the units of one study, Holm over all of them."""
    adjusted = stats.holm([unit.p_in_family for unit in units])
    return [_judge(unit, float(p)) for unit, p in zip(units, adjusted, strict=True)]


def decide(claim: Claim, results: Sequence[dict[str, Any]]) -> Verdict:
    """The verdict on one claim from the result files of one data set, as if it were the study's only unit.

    Raises:
        ValueError: a result of an arm that counts has no finite value, or results do not belong together.
    """
    return _family([_weigh(claim, results)])[0]


def verdicts(results_by_study: Mapping[str, Sequence[dict[str, Any]]], profile: str) -> list[Verdict]:
    """Every claim on every data set that has results, in the order of `CLAIMS`, Holm over each study.

    Args:
        results_by_study: study -> its finished results; studies without claims are passed over.
        profile: all results are of this one; profiles are never pooled.
    """
    found = []
    for study in dict.fromkeys(claim.study for claim in CLAIMS):
        results = results_by_study.get(study, ())
        for result in results:
            if result["run"]["profile"] != profile:
                raise ValueError(
                    f"profiles are never pooled: expected {profile!r}, got {result['run']['profile']!r}"
                )
        datasets = dict.fromkeys(result["run"]["dataset"] for result in results)
        units = [
            _weigh(claim, [result for result in results if result["run"]["dataset"] == dataset])
            for claim in CLAIMS
            if claim.study == study
            for dataset in datasets
            if dataset not in OUTSIDE
        ]
        found += _family(units)
    return found


def telling_contrast(verdict: Verdict) -> str | None:
    """The contrast of the claimed measure that refutes the claim; otherwise the one that lies furthest from
    the claim, counted in its own interval's width; None where no control has pairs."""
    claim = verdict.claim
    known = {
        label: contrast
        for label, contrast in verdict.contrasts.items()
        if contrast is not None and label.startswith(f"{claim.measure.name}: ")
    }

    if verdict.refuting in known:
        return verdict.refuting

    def favour(label: str) -> float:
        contrast = known[label]
        return claim.measure.sign * contrast.difference / max(contrast.high - contrast.low, 1e-300)

    return min(known, key=favour, default=None)


def tally(found: Sequence[Verdict]) -> str:
    """How many verdicts of each kind, in one sentence."""
    counts = Counter(verdict.outcome for verdict in found)
    kinds = [f"{counts[kind]} {kind}" for kind in get_args(Outcome) if counts[kind]]
    return f"Of {len(found)} verdicts: {', '.join(kinds)}."


VERDICT_COLUMNS = (
    "paper", "study", "data set", "claim", "verdict", "contrast", "difference", "95 % interval",
    "would matter", "p (Holm)", "seeds", "published", "smallest detectable", "BCa 95 %",
    "correlation of pairs", "reason", "attribution",
)  # fmt: skip


def verdict_table(found: Sequence[Verdict]) -> pd.DataFrame:
    """One row a unit: its telling contrast, the verdict and its reason; "-" where there is nothing to say.

    p is shown where it decides: a claim that is refuted or not applicable is so by intervals.
    """
    rows = []
    for verdict in found:
        claim, published = verdict.claim, verdict.claim.published.get(verdict.dataset)
        row = dict.fromkeys(VERDICT_COLUMNS, "-") | {
            "paper": claim.paper,
            "study": claim.study,
            "data set": verdict.dataset,
            "claim": claim.wording,
            "verdict": verdict.outcome,
            "reason": verdict.reason,
            "attribution": " ".join(verdict.attribution) or "No placebo or partner has paired runs.",
        }
        if not claim.floor:
            row["would matter"] = claim.measure.shown(claim.worth(verdict.dataset), unit=False)
        if verdict.outcome in ("supported", "undecided"):
            row["p (Holm)"] = _p_text(verdict.p_holm)
        label = telling_contrast(verdict)
        contrast = None if label is None else verdict.contrasts[label]
        if label is not None:
            row["contrast"] = label
        if contrast is not None:
            row["difference"] = claim.measure.shown(contrast.difference)
            row["95 % interval"] = claim.measure.shown(contrast.low, contrast.high, unit=False)
            row["BCa 95 %"] = claim.measure.shown(contrast.bca_low, contrast.bca_high, unit=False)
            row["seeds"] = tables.show(contrast)["seeds"]
        if verdict.deciding is not None:
            row["smallest detectable"] = verdict.measure.shown(verdict.detectable).lstrip("+")
            row["correlation of pairs"] = f"{verdict.correlation:+.2f}"
        if published is not None:
            row["published"] = f"{claim.measure.shown(published.difference)} ({published.status})"
        rows.append(row)
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS))
