"""The study's answers in short sentences, and the notes behind them. Tables hold the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moe_study import stats, study
from moe_study.claims import BESIDE, MIXTURE, PAYS
from moe_study.report import map_plots, selection, side_by_side
from moe_study.report.tables import grouped
from moe_study.report.verdicts import against, capital, in_words, place
from moe_study.verdicts import Cause, Reading, Verdict, pairs, reading

CHOSEN = {  # by pilots: study -> why its data set and models
    "collapse": "a learned gate cost accuracy there",
    "collapse-top1": "a learned gate cost accuracy there",
    "collapse-wide": "experts fell idle there",
    "ac-vision-confirm": "learned routing won there",
}
OBSTACLES = {  # kinds, as a reader needs them
    "gate": "learned routing is not shown to pay there",
    "no collapse": "there is no such collapse to resolve",
    "floor": "they are no more alike than unrelated ones",
    "no control": "no gate that learns nothing was run on these seeds",
}


def answers(found: Sequence[Verdict], most: int | None = None) -> str:
    """A Markdown list of questions and answers, and below each what must be known beside it, the weightiest
    first, at most so many; None: all. Pilots are left out."""
    decided = [v for v in found if v.word != "pilot"]
    accuracy = _of(decided, "SNNL-MoE", "accuracy")
    routing = [v for v in decided if v.claim.wording in (PAYS, BESIDE)]
    own = {
        "Does learned routing pay?": _pays(routing),
        "Does SNNL make a model more accurate?": _snnl(accuracy, routing),
        "Does SNNL cure collapse?": _cure(decided, accuracy),
        "Does the AC router help?": _ac(decided),
    }
    return "\n".join(
        "\n    - ".join([f"- **{question}** {said[0]}", *[*filter(None, said[1:])][:most]])
        for question, said in own.items()
        if said
    )


def notes(found: Sequence[Verdict]) -> str:
    """What stands behind the answers, as a Markdown list."""
    decided = [v for v in found if v.word != "pilot"]
    accuracy, routed = _of(decided, "SNNL-MoE", "accuracy"), _of(decided, "AC router", "performance")
    said = [
        _chosen([v for v in [*accuracy, *routed] if v.word != "supported"]),
        _faint(decided),
        _corrected(accuracy),
        *_attributed(accuracy),
        *map(_checkpoint, accuracy),
        _dense([v for v in decided if v.claim.wording == MIXTURE]),
        _less_lost([v for v in decided if v.claim.resists and v.word != "not testable here"]),
        _untested([v for v in decided if v.claim.source == "SNNL-MoE" and v.word == "not testable here"]),
    ]
    return "\n".join(f"- {text}" for text in said if text)


# ----------------------------------------------------------------------------------------- answers


def _pays(units: Sequence[Verdict]) -> list[str]:
    if not units:
        return []
    by_side = {side: [v for v in units if _side(v) == side] for side in SIDES}
    better, worse, _ = map(len, by_side.values())
    whole = "Mostly not." if 0 < better < worse else "No." if not better else "Mostly." if worse else "Yes."
    counts = [f"{SIDES[side]} in {len(own)}" for side, own in by_side.items() if own]
    answer = (
        f"{whole} Of {len(units)} comparisons with routing that learns nothing, it is {_and(counts)} (95 % "
        "intervals, not corrected for their number)."
    )
    beaten = {_gate(v) for v in by_side["interval on the claimed side"]}
    gates = list(dict.fromkeys(map(_gate, units)))
    some = _and([gate for gate in gates if gate in beaten])
    never = " or ".join(gate for gate in gates if gate not in beaten)
    return [answer, f"It is sometimes better than {some}, never than {never}." if some and never else ""]


def _gate(verdict: Verdict) -> str:
    """The routing that learns nothing, with or without SNNL before it."""
    return in_words(verdict.control).removeprefix("SNNL with ")


SIDES: Mapping[Reading, str] = {
    "interval on the claimed side": "better",
    "interval on the other side": "worse",
    "interval includes 0": "unclear",
}


def _snnl(units: Sequence[Verdict], routing: Sequence[Verdict]) -> list[str]:
    if not units:
        return []
    yes, rest = _split(units, lambda v: v.word == "supported")
    gains = _and([f"by {_amount(v)} on {place(v)}" for v in yes])
    models = _and(list(dict.fromkeys(v.scope for v in yes)))
    answer = f"Not shown in any of {len(units)} settings."
    if yes:
        answer = f"In {len(yes)} of {len(units)} settings: more accurate {gains} (models: {models})."
    below = [_chosen(yes), _by_width(units[0].profile) if yes else ""]
    if rest:
        low, high = (f"{100 * bound(map(_gain, rest)):+.1f}" for bound in (min, max))
        below.append(
            f"In the other {len(rest)} settings it changes accuracy by {low} to {high} points; none of these "
            "gains is *supported* after correction."
            if yes
            else f"It changes accuracy by {low} to {high} points."
        )
    return [answer, *below, *(_routing_with(v, routing) for v in yes), _cross_entropy(units)]


def _routing_with(verdict: Verdict, routing: Sequence[Verdict]) -> str:
    """What learned routing is worth in one setting without SNNL, and with it."""
    own = {v.claim.wording: v for v in routing if place(v) == place(verdict)}
    if PAYS not in own:
        return ""

    def said(v: Verdict) -> str:
        verb = {"better": "gains", "worse": "loses"}.get(SIDES[_side(v)])
        return f"{verb} {_amount(v)}" if verb else f"is unclear ({_shown(v)} points)"

    text = f"{place(verdict)}: without SNNL, learned routing {said(own[PAYS])} against {_gate(own[PAYS])}"
    return f"{text}; with SNNL on both sides it {said(own[BESIDE])}." if BESIDE in own else f"{text}."


def _by_width(profile: str) -> str:
    """What the map over sizes says of the width of experts."""
    for runs in selection.finished_runs(profile, "collapse-map").values():
        gain = map_plots.mean_gains(study.results(runs), "snnl", "base")
        shown = _and([f"{points:+.1f}" for points in gain.values()])
        widths = _and(list(map(str, gain)))
        if len(gain) > 1:
            return (
                f"Exploring other sizes of these models, SNNL gains {shown} points at expert widths {widths}."
            )
    return ""


def _cross_entropy(units: Sequence[Verdict]) -> str:
    """The same comparisons by a measure that nobody declared: of which settings it says what."""
    places = {place(v) for v in units}
    profile = units[0].profile if units else ""
    better, beaten = [], []
    for one in side_by_side.settings(profile, side_by_side.SNNL) if units else ():
        if one.title not in places:
            continue
        gate = one.arm(side_by_side.SNNL.arms["no learned gate"])
        gain = one.contrast("snnl", "base", "cross-entropy")
        lost = one.contrast("snnl", gate, "cross-entropy") if gate else None
        better += [one.title] * (gain is not None and gain.high < 0)
        beaten += [one.title] * (lost is not None and lost.low > 0)
    if not better and not beaten:
        return ""
    text = f"By cross-entropy, not declared beforehand, SNNL is better than the plain MoE on {_and(better)}"
    return text + (
        f"; a constant gate without SNNL is better than SNNL on {_and(beaten)}." if beaten else "."
    )


def _cure(decided: Sequence[Verdict], accuracy: Sequence[Verdict]) -> list[str]:
    """Whether experts come into use, and whether they differ."""
    units = [v for v in decided if v.claim.key.endswith("-effective") and v.comparison]
    if not units:
        return []
    yes, rest = _split(units, lambda v: v.word == "supported")
    shown = _and([f"{v.claim.measure.name} {_shown(v)} on {place(v)}" for v in yes])
    answer = f"In part: {shown}." if yes else "Not shown."
    if rest:
        answer += f" {capital(_and([f'{v.word} on {place(v)}' for v in rest]))}."
    different = [v for v in decided if v.claim.key.endswith("-different") and v.word == "contradicted"]
    return [answer, _balance(yes, accuracy), *map(_alike, different)]


def _balance(more: Sequence[Verdict], accuracy: Sequence[Verdict]) -> str:
    """The usual remedy beside SNNL, where it says one thing."""

    def read(units: Sequence[Verdict]) -> set[str]:
        causes = [_cause(v, "snnl - base-balance") for v in units]
        return {one.reading if one else "" for one in causes}

    if not more or read(more) != {"interval on the other side"}:
        return ""
    there = {place(v) for v in more}
    less = read([v for v in accuracy if place(v) in there]) == {"interval on the claimed side"}
    return f"The usual load-balancing loss spreads the work still more{', with less accuracy' * less}."


def _ac(decided: Sequence[Verdict]) -> list[str]:
    units = _of(decided, "AC router", "performance")
    if not units:
        return []
    judged, rest = _split(units, lambda v: v.obstacle is None)
    wins = [own for own in grouped(judged, place).values() if all(v.word == "supported" for v in own)]
    answer = f"Yes, on {_and([place(own[0]) for own in wins])}." if wins else "No gain is shown."
    if judged:
        shown = "; ".join(
            f"on {where} " + _and([f"{_shown(v)} {v.claim.measure.column.unit} {against(v)}" for v in own])
            for where, own in grouped(judged, place).items()
        )
        answer += f" Where it can be judged: {shown}."
    others = [v for v in decided if v.claim.source == "AC router" and v.obstacle is None and v not in units]
    below = [_other_claims(others), _nothing_to_cure(judged)] if judged else []
    if rest:
        apart = [v for v in rest if _side(v) != "interval includes 0"]
        same = "; in the runs that count no difference is seen there either" * (not apart)
        below.append(
            f"Not judged on {_names(rest)}, where learned routing is not shown to beat every routing that "
            f"learns nothing{same}."
        )
    return [answer, *below]


def _other_claims(units: Sequence[Verdict]) -> str:
    """Each claim beside accuracy, by where the 95 % interval lies."""
    said = []
    for wording, own in grouped(units, lambda v: v.claim.wording).items():
        apart = [
            f"{SIDES[_side(v)]} {against(v)} ({_shown(v)} {v.claim.measure.column.unit})"
            for v in own
            if _side(v) != "interval includes 0"
        ]
        said.append(f"{wording}: {_and(apart) or 'no difference shown'}")
    return f"Its other claims there, {'; '.join(said)}." if said else ""


def _nothing_to_cure(judged: Sequence[Verdict]) -> str:
    """Where the linear router keeps nearly all experts in use."""
    said = []
    for one in side_by_side.settings(judged[0].profile, side_by_side.AC):
        used, number = side_by_side.experts(one, side_by_side.AC.reference)
        if one.title in map(place, judged) and used > 0.8 * number:
            said.append(f"{used:.1f} of {number} experts on {one.title}")
    without = f"The linear router uses {_and(said)}: without collapse, nothing is said about a cure."
    return without if said else ""


# ------------------------------------------------------------------------------------------- notes


def _chosen(units: Sequence[Verdict]) -> str:
    """Which settings pilots chose, and why."""
    by_reason = grouped([v for v in units if v.study in CHOSEN], lambda v: CHOSEN[v.study])
    chosen = [f"{_names(own)}, because {why}" for why, own in by_reason.items()]
    return f"Pilots, whose runs do not count here, chose {'; '.join(chosen)}." if chosen else ""


def _faint(units: Sequence[Verdict]) -> str:
    """Where the word asks less than the 95 % interval."""
    said = [
        f"{v.claim.wording} on {place(v)} ({_shown(v)} {v.claim.measure.column.unit}, {against(v)})"
        for v in units
        if v.word == "contradicted" and _side(v) == "interval includes 0"
    ]
    text = "*Contradicted* asks the 90 % interval; the 95 % interval, which the answers use, includes 0 for"
    return f"{text} {_and(said)}." if said else ""


def _corrected(units: Sequence[Verdict]) -> str:
    """Which gains the correction for our own claims takes back: without them Holm asks less."""
    back = []
    for own in grouped(units, lambda v: v.study).values():
        alone = stats.holm([v.p for v in own])
        back += [
            f"{place(v)} (p {p:.3f} instead of {v.p_holm:.3f})"
            for v, p in zip(own, alone, strict=True)
            if v.word != "supported" and _gain(v) > 0 and p <= 0.05 < v.p_holm
        ]
    if not back:
        return ""
    return (
        "The correction counts our own claims on learned routing too. For the paper's claims on accuracy "
        f"alone, SNNL's gain would be significant on {_and(back)}."
    )


ATTRIBUTIONS = {  # control -> what it is called
    "snnl-shuffled": "SNNL of shuffled labels",
    "base-balance": "the load-balancing loss",
}


def _attributed(units: Sequence[Verdict]) -> list[str]:
    """SNNL's accuracy against each control that attributes a gain, setting by setting."""
    said = []
    for control, name in ATTRIBUTIONS.items():
        shown = [
            f"{place(v)} {v.claim.measure.shown(*cause.comparison[:3], unit=False)}"
            for v in units
            if (cause := _cause(v, f"snnl - {control}")) is not None
        ]
        if shown:
            said.append(f"SNNL minus {name}, points of accuracy: {'; '.join(shown)}.")
    return said


def _checkpoint(verdict: Verdict) -> str:
    if not verdict.depends_on_checkpoint:
        return ""
    words = {rule.replace("_", " "): word for rule, word in verdict.by_endpoint.items()}
    shown = "; ".join(f"{rule}: {word}" for rule, word in words.items())
    return f"SNNL on {place(verdict)} depends on the epoch that is judged ({shown})."


def _alike(verdict: Verdict) -> str:
    """Experts that become more alike by the claim's measure: what the other one says."""
    first, *others = verdict.parts
    said = (
        f"By the {first.measure.name.removesuffix(', by use')}, experts become more alike on {place(verdict)}"
    )
    for part in others:
        if (found := part.comparison) is not None:
            apart = not found.low <= 0 <= found.high
            less = part.measure.sign * found.difference > 0
            how = ("less alike" if less else "more alike") if apart else "neither more nor less alike"
            said += f"; by the {part.measure.name.removesuffix(', by use')}, {how}"
    return f"{said}."


def _dense(units: Sequence[Verdict]) -> str:
    if not units:
        return ""
    shown = "; ".join(f"{place(v)} {_shown(v)}" for v in units)
    return f"A plain MoE minus a dense network of its size or active width, points of accuracy: {shown}."


def _less_lost(units: Sequence[Verdict]) -> str:
    """Where what is lost to a disturbance says more than the score under it, which decides."""
    said = []
    for v in units:
        if (cost := v.claim.resists) is None:
            continue
        results = study.results(study.runs(v.profile, v.study, v.dataset))
        both = pairs(results, cost, v.claim.treatment, v.control, v.endpoint)
        if len(both[0]) < 2:
            continue
        found = stats.paired_comparison(*both)
        if reading(found, cost.direction) != "interval includes 0":
            said.append(f"{cost.name} on {place(v)}, {against(v)}: {cost.shown(*found[:3])}")
    return f"By what is lost instead of what is kept: {'; '.join(said)}." if said else ""


def _untested(units: Sequence[Verdict]) -> str:
    said = []
    for wording, own in grouped(units, lambda v: v.claim.wording).items():
        by_kind = grouped([v for v in own if v.obstacle], lambda v: v.obstacle.kind if v.obstacle else "")
        why = [f"{_names(some)}: {OBSTACLES.get(kind, kind)}" for kind, some in by_kind.items()]
        said.append(f"{wording} ({'; '.join(why)})")
    return f"Could not be tested: {'; '.join(said)}." if said else ""


# ----------------------------------------------------------------------------------------- helpers


def _of(found: Sequence[Verdict], source: str, key: str) -> list[Verdict]:
    """Units of a paper's claim, the largest gain first."""
    own = [v for v in found if v.claim.source == source and v.claim.key.endswith(f"-{key}") and v.comparison]
    return sorted(own, key=lambda v: -_gain(v))


def _split(units: Sequence[Verdict], asked: Callable[[Verdict], bool]) -> tuple[list[Verdict], list[Verdict]]:
    return [v for v in units if asked(v)], [v for v in units if not asked(v)]


def _gain(verdict: Verdict) -> float:
    """The difference, positive where it is as claimed."""
    return verdict.claim.measure.sign * verdict.comparison.difference if verdict.comparison else 0.0


def _side(verdict: Verdict) -> Reading:
    """Of the 95 % interval."""
    if verdict.comparison is None:
        return "interval includes 0"
    return reading(verdict.comparison, verdict.claim.measure.direction)


def _cause(verdict: Verdict, contrast: str) -> Cause | None:
    return next((one for one in verdict.causes if one.contrast == contrast), None)


def _amount(verdict: Verdict) -> str:
    column = verdict.claim.measure.column
    return f"{abs(_gain(verdict)) * column.scale:.{max(1, column.decimals - 1)}f} {column.unit}"


def _shown(verdict: Verdict) -> str:
    found = verdict.comparison
    return "-" if found is None else verdict.claim.measure.shown(*found[:3], unit=False)


def _names(units: Sequence[Verdict]) -> str:
    return _and(list(dict.fromkeys(place(v) + " (exploratory)" * (not v.confirmatory) for v in units)))


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
