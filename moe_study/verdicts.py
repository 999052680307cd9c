"""The rule of `claims`, applied to result files: numbers and one word per unit. `report` does the wording.

Shapes: S seeds, N test images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from moe_lib import metrics
from moe_study import stats, store
from moe_study.claims import (
    ACCURACY,
    BLIND,
    BY_KEY,
    CLAIMS,
    CROSS_ENTROPY,
    NOT_TRAINED_ABOVE,
    OUTSIDE,
    PILOT_BELOW,
    Claim,
    Condition,
    Measure,
)
from moe_study.collapse import collapse
from moe_study.columns import look_up
from moe_study.configs.arms import CONFIRMATORY

Word = Literal["supported", "contradicted", "smaller than claimed", "undecided", "not testable here", "pilot"]
Result = Mapping[str, Any]
ALPHA = 0.05


# --------------------------------------------------------------------------------------- the rule


def decide(signed_S: np.ndarray, margin: float, p: float, contradicted_elsewhere: bool = False) -> Word:
    """The word for one unit that is testable.

    Args:
        signed_S: differences, positive in the claimed direction.
        margin: the published difference, or the declared one; positive.
        p: corrected for the family.
        contradicted_elsewhere: at another endpoint the 90 % interval lies wholly below 0.
    """
    if len(signed_S) < PILOT_BELOW:
        return "pilot"
    high = stats.t_interval(signed_S, 0.90)[1]
    if high < 0:
        return "contradicted"
    if signed_S.mean() > 0 and p <= ALPHA and not contradicted_elsewhere:
        return "supported"
    return "smaller than claimed" if high < margin else "undecided"


# --------------------------------------------------------------------------------------- numbers


class Part(NamedTuple):
    """One paired contrast; a joint claim has several."""

    measure: Measure
    treatment: str
    control: str  # an arm, or "0"
    treatment_S: np.ndarray
    control_S: np.ndarray
    bound: float = 0.0  # in the claimed direction: met when the difference lies above
    condition: Condition | None = None  # None: the claimed measure itself

    @property
    def signed_S(self) -> np.ndarray:
        return self.measure.sign * (self.treatment_S - self.control_S)

    @property
    def comparison(self) -> stats.PairedComparison | None:
        if len(self.treatment_S) < 2:
            return None
        return stats.paired_comparison(self.treatment_S, self.control_S)

    @property
    def p(self) -> float:
        """Two-sided sign-flip p that the mean is the bound; 1 where it lies on the wrong side."""
        above_S = self.signed_S - self.bound
        return stats.sign_flip_p(above_S) if len(above_S) >= 2 and above_S.mean() > 0 else 1.0

    @property
    def breaks(self) -> bool:
        """Whether a condition contradicts the claim: its 90 % interval lies wholly below its margin."""
        if self.condition is None or len(self.signed_S) < 2:
            return False
        return stats.t_interval(self.signed_S, 0.90)[1] < self.condition.margin


class Obstacle(NamedTuple):
    """Why a claim cannot be tested here."""

    kind: Literal["not trained", "gate", "no control", "no collapse", "floor", "harmless"]
    text: str


Reading = Literal["interval on the claimed side", "interval on the other side", "interval includes 0"]


def reading(value: stats.PairedComparison, claimed: str) -> Reading:
    """Where the 95 % interval lies, against the claimed direction ("higher" or "lower")."""
    sign = {"higher": 1, "lower": -1}[claimed]
    low, high = sorted((sign * value.low, sign * value.high))
    if low > 0:
        return "interval on the claimed side"
    return "interval on the other side" if high < 0 else "interval includes 0"


class Cause(NamedTuple):
    """An attributing contrast, and what it says if there is an effect."""

    contrast: str
    comparison: stats.PairedComparison
    reading: Reading
    cause: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    claim: Claim
    profile: str
    study: str
    dataset: str
    control: str
    word: Word
    parts: tuple[Part, ...]  # the claimed measure first
    endpoint: str  # that the parts are measured at
    obstacle: Obstacle | None
    p: float  # the largest of the parts
    p_holm: float  # over the applicable units of the family; NaN where the unit is none of them
    at_half: Word  # of the margin
    at_twice: Word
    by_endpoint: Mapping[str, Word]  # those that the results hold
    seeds_needed: (
        int | None
    )  # for 80 % power at the difference that counts; None where undecided says nothing
    causes: tuple[Cause, ...]
    images: stats.Interval | None  # over seeds and test images, where correctness was stored
    scope: str
    where: str  # which of a model's mixtures the arms differ in; "": all

    @property
    def confirmatory(self) -> bool:
        return self.study in CONFIRMATORY

    @property
    def margin(self) -> float:
        return self.claim.worth(self.dataset)

    @property
    def comparison(self) -> stats.PairedComparison | None:
        return self.parts[0].comparison

    @property
    def depends_on_checkpoint(self) -> bool:
        return len(set(self.by_endpoint.values())) > 1

    def below(self, margin: float) -> bool:
        """Whether the 90 % interval lies wholly below a margin, whatever the word."""
        signed_S = self.parts[0].signed_S
        return len(signed_S) >= PILOT_BELOW and stats.t_interval(signed_S, 0.90)[1] < margin

    @property
    def smaller(self) -> bool:
        """Whether the 90 % interval lies wholly below the difference that counts, whatever the word."""
        return self.below(self.margin)


def pairs(
    results: Sequence[Result], measure: Measure, treatment: str, control: str, endpoint: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values of two arms over the seeds that both have, in the order of seeds; empty where they have none."""
    treatment_S, control_S = _shared(*(by_seed(results, measure, a, endpoint) for a in (treatment, control)))
    return treatment_S, control_S


def by_seed(results: Sequence[Result], measure: Measure, arm: str, endpoint: str) -> dict[int, float]:
    values = {r["run"]["seed"]: measure.of(dict(r), endpoint) for r in results if r["run"]["arm"] == arm}
    return {seed: value for seed, value in values.items() if value is not None}


def _shared(*by_seed: Mapping[int, Any]) -> tuple[np.ndarray, ...]:
    """What each has of the seeds that all have, in their order."""
    seeds = sorted(set.intersection(*map(set, by_seed)))
    return tuple(np.array([values[seed] for seed in seeds]) for values in by_seed)


def _parts(claim: Claim, control: str, results: Sequence[Result], endpoint: str) -> tuple[Part, ...]:
    own = pairs(results, claim.measure, claim.treatment, control, endpoint)
    parts = [Part(claim.measure, claim.treatment, control, *own)]
    for c in claim.conditions:
        if c.against == "zero":
            treatment_S, _ = pairs(results, c.measure, claim.treatment, claim.treatment, endpoint)
            one = Part(c.measure, claim.treatment, "0", treatment_S, np.zeros(len(treatment_S)), c.bound, c)
        else:
            both = pairs(results, c.measure, claim.treatment, control, endpoint)
            one = Part(c.measure, claim.treatment, control, *both, c.bound, c)
        parts.append(one)
    return tuple(parts)


def endpoint_of(claim: Claim, results: Sequence[Result]) -> str:
    """The last epoch where every file measures the claim there; otherwise the files' own primary endpoint."""
    measures = [claim.measure, *(c.measure for c in claim.conditions)]
    own = [dict(r) for r in results if r["run"]["arm"] in {claim.treatment, *claim.controls}]
    if all(m.of(r, store.PRIMARY_ENDPOINT) is not None for r in own for m in measures):
        return store.PRIMARY_ENDPOINT
    primary = {store.primary_endpoint(r) for r in own}
    if len(primary) > 1:
        raise ValueError(f"results of different primary endpoints do not belong together: {sorted(primary)}")
    return primary.pop()


# ------------------------------------------------------------------------------------- obstacles


def _above(values: Sequence[float], nulls: Sequence[float]) -> bool:
    """Whether the 95 % interval of value - null, paired by run, lies above 0."""
    return stats.t_interval(np.subtract(values, nulls))[0] > 0


def _obstacle(
    claim: Claim, control: str, results: Sequence[Result], gates: Sequence[Verdict] | None
) -> Obstacle | None:
    """The first of: models are not trained, routing does not pay, nothing to resolve, a measure at its floor,
    no disturbance."""
    own = {arm: [dict(r) for r in results if r["run"]["arm"] == arm] for arm in (claim.treatment, control)}
    if (bound := NOT_TRAINED_ABOVE.get(results[0]["run"]["study"])) is not None:
        learn = [arm for arm in own if not claim.controls.get(arm, "").startswith(BLIND)]
        ends = [CROSS_ENTROPY.of(r, store.PRIMARY_ENDPOINT) for arm in learn for r in own[arm]]
        if late := [value for value in ends if value is not None and value > bound]:
            return Obstacle(
                "not trained", f"not trained: {len(late)} of {len(ends)} runs end above {bound:g} nats a byte"
            )
    if claim.gate is not None and gates is not None:
        closed = [gate for gate in gates if gate.word != "supported"]
        if closed:
            said = "; ".join(_gate_text(gate) for gate in closed)
            return Obstacle("gate", f"learned routing is not shown to pay: {said}")
        if not gates:
            return Obstacle("no control", "no control that learns nothing was run on these seeds")
    if claim.resolves is not None:
        degrees = [getattr(collapse(r), claim.resolves) for r in own[control]]
        value_S, null_S = [d.value for d in degrees], [d.null for d in degrees]
        if any(map(math.isnan, null_S)):
            return Obstacle(
                "no collapse", f"no null of the {claim.resolves} collapse of {control} was measured"
            )
        if not _above(value_S, null_S):
            return Obstacle(
                "no collapse",
                f"nothing to resolve: {claim.resolves} collapse of {control} is {np.mean(value_S):.2f}, "
                f"its null {np.mean(null_S):.2f}",
            )
    if claim.floor and (text := _floor(claim, own)):
        return Obstacle("floor", text)
    if claim.resists is not None:
        costs = {arm: [claim.resists.of(r) or 0.0 for r in group] for arm, group in own.items()}
        if not any(_above(cost_S, [0.0] * len(cost_S)) for cost_S in costs.values()):
            means = ", ".join(f"{arm} {claim.resists.shown(float(np.mean(c)))}" for arm, c in costs.items())
            return Obstacle(
                "harmless", f"nothing to resist: {claim.resists.name} is above 0 in no arm ({means})"
            )
    return None


def _gate_text(gate: Verdict) -> str:
    found = gate.comparison
    name = f"{gate.claim.treatment} - {gate.control}"
    if found is None:
        return f"{name} has no pairs"
    return f"{name} {gate.claim.measure.shown(found.difference, found.low, found.high)}, {gate.word}"


def _floor(claim: Claim, own: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Both arms no higher than what independent experts have; "" otherwise."""
    texts = []
    for arm, group in own.items():
        value_S = [claim.measure.of(r) or 0.0 for r in group]
        nulls = {
            "independent vectors": [metrics.similarity_floor(r["expert_parameters"]) for r in group],
            "before training": [look_up(r, "initial.similarity.weights") for r in group],
            "trained alone": [look_up(r, "null.similarity.weights") for r in group],
        }
        known = {name: null_S for name, null_S in nulls.items() if None not in null_S}
        if all(_above(value_S, null_S) for null_S in known.values()):
            return ""
        beside = ", ".join(f"{name} {np.mean(null_S):.4f}" for name, null_S in known.items())
        texts.append(f"{arm} {np.mean(value_S):.4f} ({beside})")
    return f"uninformative: {claim.measure.name} of both arms is no higher than a null: {'; '.join(texts)}"


# ------------------------------------------------------------------------------------ attribution


def _causes(claim: Claim, results: Sequence[Result], endpoint: str) -> tuple[Cause, ...]:
    def arms(*names: str) -> tuple[np.ndarray, ...]:
        return _shared(*(by_seed(results, claim.measure, name, endpoint) for name in names))

    found: list[Any] = [
        (f"{one.treatment} - {one.control}", one.cause, *arms(one.treatment, one.control))
        for one in claim.attribution
    ]
    if claim.mechanism:
        snnl_S, base_S, dense_snnl_S, dense_S = arms("snnl", "base", "dense-snnl", "dense")
        cause = "SNNL in a mixture with a learned gate, not better features alone"
        found.append((MECHANISM, cause, snnl_S - base_S, dense_snnl_S - dense_S))
    causes = []
    for name, cause, treatment_S, control_S in found:
        if len(treatment_S) >= 2:
            comparison = stats.paired_comparison(treatment_S, control_S)
            side = reading(comparison, claim.measure.direction)
            causes.append(Cause(name, comparison, side, cause))
    return tuple(causes)


MECHANISM = "(snnl - base) - (dense-snnl - dense)"


# ----------------------------------------------------------------------------------------- units


def _check(results: Sequence[Result]) -> None:
    """Raises:
    ValueError: results are of several profiles, data sets or versions; or an arm has two with one seed.
    """
    runs = [result["run"] for result in results]
    for key in ("profile", "study", "dataset", "version"):
        found = sorted({str(run[key]) for run in runs})
        if len(found) != 1:
            raise ValueError(f"a verdict needs results of one {key}, got {', '.join(found) or 'none'}")
    seen = set()
    for run in runs:
        if (run["arm"], run["seed"]) in seen:
            raise ValueError(
                f"two results of {run['study']}/{run['dataset']}/{run['arm']} seed {run['seed']}: "
                "keep the one whose id the profile plans"
            )
        seen.add((run["arm"], run["seed"]))


def image_interval(
    results: Sequence[Result], claim: Claim, control: str, endpoint: str
) -> stats.Interval | None:
    """Interval of a difference in accuracy over seeds *and* test images; None if correctness is missing."""
    if claim.measure != ACCURACY:
        return None
    bits: dict[str, dict[int, np.ndarray]] = {claim.treatment: {}, control: {}}
    for result in results:
        run, found = result["run"], store.at_endpoint(dict(result), endpoint)
        if run["arm"] in bits:
            if "correct" not in found:
                return None
            bits[run["arm"]][run["seed"]] = store.unpack_bits(found["correct"]).astype(float)
    treatment_SN, control_SN = _shared(bits[claim.treatment], bits[control])
    return stats.crossed_interval(treatment_SN - control_SN) if len(treatment_SN) >= 2 else None


def scope(results: Sequence[Result]) -> str:
    """Model, budget and data of some runs, in words."""
    run = results[0]["run"]
    model, trunk = run["model"], run["model"].get("trunk")
    if trunk:
        kind = "vision transformer" if "patch" in model else "language model"
        made = f"{kind} of {trunk['depth']} blocks and width {trunk['dim']}, {trunk['num_experts']} experts"
    else:
        kind = {"cnn": "CNN", "mlp": "MLP", "none": "no extractor"}[model["extractor"]]
        made = f"{kind}, {model['num_experts']} experts of width {model['expert_hidden']}"
    sizes = {"images": run.get("train_images"), "tokens": run.get("epoch_tokens")}
    each = "".join(f" of {size:,} {unit}" for unit, size in sizes.items() if size)
    return f"{made}, {run['train']['epochs']} epochs{each}"


def _where(results: Sequence[Result], control: str) -> str:
    """ "in the last of 3 mixtures", if the control has a linear router in the others, as all arms have."""
    trunk = next((r["run"]["model"].get("trunk") for r in results if r["run"]["arm"] == control), None) or {}
    blocks, chosen = trunk.get("moe_blocks", ()), trunk.get("router_blocks")
    if chosen is None or len(chosen) == len(blocks):
        return ""
    which = "the last" if list(chosen) == [blocks[-1]] else f"{len(chosen)}"
    return f"in {which} of {len(blocks)} mixtures"


def _judge(
    claim: Claim, control: str, results: Sequence[Result], gates: Sequence[Verdict] | None, endpoint: str
) -> Verdict:
    """One unit before Holm: its p alone counts."""
    parts = _parts(claim, control, results, endpoint)
    run = results[0]["run"]
    seeds = min(len(part.signed_S) for part in parts)
    obstacle = _obstacle(claim, control, results, gates) if seeds >= PILOT_BELOW else None
    p = max(part.p for part in parts)
    own = [r for r in results if r["run"]["arm"] in (claim.treatment, control)] or list(results)
    return Verdict(
        claim=claim, profile=run["profile"], study=run["study"], dataset=run["dataset"], control=control,
        word="pilot" if seeds < PILOT_BELOW else "undecided", parts=parts, endpoint=endpoint,
        obstacle=obstacle, p=p, p_holm=math.nan, at_half="undecided", at_twice="undecided", by_endpoint={},
        seeds_needed=None, causes=(), images=None, scope=scope(own), where=_where(own, control),
    )  # fmt: skip


def _word(unit: Verdict, p_holm: float, contradicted_elsewhere: bool, margin: float) -> Word:
    if min(len(part.signed_S) for part in unit.parts) < PILOT_BELOW:
        return "pilot"
    if unit.obstacle is not None:
        return "not testable here"
    if any(part.breaks for part in unit.parts):
        return "contradicted"
    return decide(unit.parts[0].signed_S, margin, p_holm, contradicted_elsewhere)


def _family(units: Sequence[Verdict], by_endpoint: Mapping[str, Sequence[Verdict]]) -> list[Verdict]:
    """Words for the units of one family: Holm over those that are applicable, a pilot with p = 1."""

    def holm(own: Sequence[Verdict]) -> list[float]:
        applicable = [i for i, unit in enumerate(own) if unit.obstacle is None]
        p = [1.0 if own[i].word == "pilot" else own[i].p for i in applicable]
        adjusted = [math.nan] * len(own)
        for i, value in zip(applicable, stats.holm(p), strict=True):
            adjusted[i] = float(value)
        return adjusted

    elsewhere = {name: (own, holm(own)) for name, own in by_endpoint.items()}
    judged = []
    for i, (unit, p_holm) in enumerate(zip(units, holm(units), strict=True)):

        def against(other: Verdict) -> bool:
            signed_S = other.parts[0].signed_S
            wrong_side = len(signed_S) >= 2 and stats.t_interval(signed_S, 0.90)[1] < 0
            return wrong_side or any(part.breaks for part in other.parts)

        others = {
            name: own[i]
            for name, (own, _) in elsewhere.items()
            # Conditions may be measured at the last epoch alone, which is the best one of some seeds.
            if all(
                0 < len(there.signed_S) == len(part.signed_S)
                for there, part in zip(own[i].parts, unit.parts, strict=True)
            )
        }
        contradicted = any(against(o) for name, o in others.items() if name != unit.endpoint)
        words = {
            name: _word(
                o, elsewhere[name][1][i], any(against(x) for n, x in others.items() if n != name), unit.margin
            )
            for name, o in others.items()
        }
        word = _word(unit, p_holm, contradicted, unit.margin)
        needed = None
        if word == "undecided":
            sd = float(unit.parts[0].signed_S.std(ddof=1))
            needed = stats.seeds_for_power(sd, unit.margin)
        judged.append(
            replace(
                unit,
                word=word,
                p_holm=p_holm,
                at_half=_word(unit, p_holm, contradicted, unit.margin / 2),
                at_twice=_word(unit, p_holm, contradicted, unit.margin * 2),
                by_endpoint=words,
                seeds_needed=needed,
            )
        )
    return judged


def verdicts(results: Sequence[Result], study: str) -> list[Verdict]:
    """Every claim on every data set of one study: our own first, then the paper's, which they gate.

    Args:
        results: finished ones of one study and profile.
        study: an exploring study that claims name, or the one that confirms it.

    Raises:
        ValueError: results do not belong together, or one that counts has no finite value.
    """
    explored = CONFIRMATORY.get(study, study)
    claims = [claim for claim in CLAIMS if claim.study == explored]
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        if result["run"]["dataset"] not in OUTSIDE:
            by_dataset.setdefault(result["run"]["dataset"], []).append(result)
    for own in by_dataset.values():
        _check(own)
    ours = [v for v in _decide(claims, by_dataset, None) if v.claim.source == "this study"]
    papers = [v for v in _decide(claims, by_dataset, ours) if v.claim.source != "this study"]
    return [
        replace(
            v,
            causes=_causes(v.claim, own, v.endpoint),
            images=image_interval(own, v.claim, v.control, v.endpoint),
        )
        for v in ours + papers
        for own in [by_dataset[v.dataset]]
    ]


def _decide(
    claims: Sequence[Claim], by_dataset: Mapping[str, Sequence[Result]], gates: Sequence[Verdict] | None
) -> list[Verdict]:
    """The family of a study: every claim, data set and control that has both arms.

    Args:
        gates: our own claims, decided. None: while those are decided their gates count as open, so that the
            family is never smaller than the one that the gated units join.
    """
    found = [
        (claim, control, own)
        for claim in claims
        for own in by_dataset.values()
        for control in claim.controls
        if {claim.treatment, control} <= {result["run"]["arm"] for result in own}
    ]
    present = {(claim.key, own[0]["run"]["dataset"]) for claim, _, own in found}

    def units(endpoint: str | None) -> list[Verdict]:
        judged = []
        for claim, control, own in found:
            dataset = own[0]["run"]["dataset"]
            gate = claim.gate, dataset
            opening = [one for one in gates or () if (one.claim.key, one.dataset) == gate]
            not_yet = gates is None and gate in present
            judged.append(
                _judge(claim, control, own, None if not_yet else opening, endpoint or endpoint_of(claim, own))
            )
        return judged

    return _family(units(None), {name: units(name) for name in store.ENDPOINTS})


assert all(claim.gate is None or claim.gate in BY_KEY for claim in CLAIMS)
