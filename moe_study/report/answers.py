"""The study's answer in three sentences. Their intervals stand in the table of verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moe_study import stats
from moe_study.claims import ACCURACY, BESIDE, MIXTURE, PAYS
from moe_study.report.tables import grouped
from moe_study.report.verdicts import against, in_words, place
from moe_study.verdicts import Cause, Verdict

Answer = tuple[str, list[str]]  # one sentence a newspaper could print, and what must stand below it


CHOSEN = {  # by pilots: study -> why its data set and models
    "collapse": "experts fall idle and learned routing costs accuracy there",
    "collapse-top1": "experts fall idle and learned routing costs accuracy there",
    "collapse-wide": "experts fall idle there",
    "ac-vision-confirm": "learned routing won there",
}
OBSTACLES = {  # kinds, as a reader needs them
    "gate": "learned routing is not shown to pay",
    "no collapse": "there is no such collapse to resolve",
    "floor": "they are no more alike than unrelated ones",
    "no control": "no gate that learns nothing was run on these seeds",
}


def answers(found: Sequence[Verdict], most: int | None = None) -> str:
    """A Markdown list of three answers, and below each what was found where, the weightiest first, at most so
    many; None: all. Pilots are left out."""
    decided = [v for v in found if v.word != "pilot"]
    own = {
        "Did SNNL help?": _snnl(
            [v for v in decided if v.claim.source == "SNNL-MoE"],
            [v for v in decided if v.claim.wording == BESIDE],
        ),
        "Should I use the AC router?": _ac([v for v in decided if v.claim.source == "AC router"]),
        "Does learned routing pay at all?": _pays(
            [v for v in decided if v.claim.wording in (PAYS, BESIDE)],
            [v for v in decided if v.claim.wording == MIXTURE],
        ),
    }
    lines = []
    for question, (answer, below) in own.items():
        if answer:
            lines += [
                f"- **{question}** {answer}",
                *(f"    - {text}" for text in [*filter(None, below)][:most]),
            ]
    return "\n".join(lines)


def _snnl(found: Sequence[Verdict], beside: Sequence[Verdict]) -> Answer:
    """`beside`: whether learned routing pays with SNNL."""
    lost = {place(v) for v in beside if v.word == "contradicted"}
    accuracy = {place(v): v for v in found if v.claim.key.endswith("-accuracy")}
    if not accuracy:
        return "", []

    def of(word: str, key: str = "-accuracy") -> list[Verdict]:
        return _of([v for v in found if v.claim.key.endswith(key)], word)

    def but(v: Verdict) -> str:
        said = [*_caveats(v), _beyond_the_gate(v)]
        said += ["with SNNL a gate that learns nothing is better still"] * (place(v) in lost)
        return "; ".join(filter(None, said))

    yes, small = of("supported"), of("smaller than claimed")
    answer = f"Not shown in any of {len(accuracy)} settings."
    if yes:
        models = "; ".join(dict.fromkeys(v.scope for v in yes))
        answer = (
            f"Yes, in {len(yes)} of {len(accuracy)} settings: more accurate on {_list(yes)}. Models there: "
            f"{models}."
        )
    below = [*(f"On {place(v)}: {but(v)}." for v in yes if but(v)), _chosen([*accuracy.values()])]
    if no := of("contradicted"):
        below.append(f"It makes the model less accurate on {_list(no, _checkpoint)}.")
    kinds = {
        "smaller than claimed": [v for v in small if v.dataset in v.claim.published],
        "smaller than would matter": [v for v in small if v.dataset not in v.claim.published],
        "undecided": of("undecided"),
    }
    other = [v for units in kinds.values() for v in units if v.depends_on_checkpoint]
    by_words = grouped(other, lambda v: _and(sorted({*v.by_endpoint.values()} - {v.word})))
    depends = [
        f"at an epoch that another rule selects, {said} on {_names(own)}" for said, own in by_words.items()
    ]
    if rest := [f"{said} on {_names(units)}" for said, units in kinds.items() if units]:
        seen = [v for units in kinds.values() for v in units if _apart(v) and _gain(v) > 0]
        unsure = [f"not corrected for the number of claims, the 95 % interval lies above 0 on {_names(seen)}"]
        the = "Elsewhere the" if yes else "The"
        below.append(
            "; ".join([f"{the} gain, if there is one, is {_and(rest)}", *unsure * bool(seen), *depends]) + "."
        )
    if more := of("supported", "-effective"):
        below.append(f"More experts are in use with it on {_names(more)}{_balance(more, accuracy)}.")
    below += [_alike(v) for v in of("contradicted", "-different")]
    below.append(_untested([v for v in found if v.word == "not testable here"]))
    return answer, below


def _beyond_the_gate(verdict: Verdict) -> str:
    """What is left of a gain over a gate that learns nothing, without SNNL; "" where that was not run."""
    for gate in ("uniform-gate", "hash-gate"):
        if (one := _cause(verdict, f"snnl - {gate}")) is None:
            continue
        gain = verdict.claim.measure.sign * one.comparison.difference
        if one.reading == "interval includes 0":
            return f"it is not told apart from {in_words(gate)} without SNNL"
        if gain < 0:
            return f"{in_words(gate)} without SNNL is better"
        most = "; most of the gain makes up for what the learned gate costs" * (2 * gain < _gain(verdict))
        return f"over {in_words(gate)} without SNNL it gains {_amount(verdict, gain)}{most}"
    return ""


def _balance(more: Sequence[Verdict], accuracy: Mapping[str, Verdict]) -> str:
    """Beside more experts in use: what the usual load-balancing loss does, where it says one thing."""

    def read(units: Sequence[Verdict]) -> set[str]:
        causes = [_cause(v, "snnl - base-balance") for v in units]
        return {one.reading if one else "" for one in causes}

    if read(more) != {"interval on the other side"}:
        return ""
    beaten = read([accuracy[place(v)] for v in more]) == {"interval on the claimed side"}
    return "; the usual load-balancing loss brings in still more" + ", but less accuracy" * beaten


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


def _untested(units: Sequence[Verdict]) -> str:
    said = []
    for wording, own in grouped(units, lambda v: v.claim.wording).items():
        kinds = dict.fromkeys(v.obstacle.kind for v in own if v.obstacle is not None)
        why = _and([OBSTACLES[kind] for kind in kinds if kind in OBSTACLES])
        said.append(f"{wording}, on {_names(own)} ({why})")
    return f"Could not be tested: {'; '.join(said)}." if said else ""


def _chosen(units: Sequence[Verdict]) -> str:
    """Which places pilots chose, and why."""
    by_reason = grouped([v for v in units if v.study in CHOSEN], lambda v: CHOSEN[v.study])
    chosen = [f"{_names(own)}, because {why}" for why, own in by_reason.items()]
    return f"Pilots chose {'; and '.join(chosen)}." if chosen else ""


def _ac(found: Sequence[Verdict]) -> Answer:
    own = [v for v in found if v.claim.key.endswith("-performance")]
    if not own:
        return "", []
    places = [[v for v in own if place(v) == one] for one in dict.fromkeys(map(place, own))]
    wins = [v for units in places for v in units if all(one.word == "supported" for one in units)]
    rest = [v for v in own if v not in wins and v.comparison is not None]
    kinds = {
        kind: [v for v in rest if (v.obstacle.kind if v.obstacle else None) == kind]
        for kind in ("not trained", "gate", "no control", None)
    }
    answer = f"Yes on {_list(wins, against)}." if wins else "Not shown to help."
    if judged := kinds[None]:
        small = all(v.word in ("smaller than claimed", "contradicted") for v in judged)
        what = _and(list(dict.fromkeys(v.claim.measure.name for v in judged)))
        gain = (
            f"any gain in {what} is smaller than would matter"
            if small
            else "a gain is neither shown nor excluded"
        )
        answer += f" It could be judged on {_names(judged)} alone: {gain}."
    below = [_chosen(judged)]
    tested = [v for v in rest if v not in kinds["not trained"]]
    for better, word in ((True, "Better"), (False, "Worse")):
        if apart := [v for v in tested if _apart(v) and (_gain(v) > 0) is better]:
            below.append(f"{word} on {_list(apart, against, _little, _uncorrected)}.")
    below += _undecided(found, judged)
    if late := kinds["not trained"]:
        below.append(f"On {_names(late)} models are not trained far enough to say.")
    if gated := kinds["gate"]:
        below.append(
            f"Not judged on {_names(gated)}, where learned routing is not shown to beat every router that "
            "learns nothing."
        )
    if unchecked := kinds["no control"]:
        below.append(f"Not judged on {_names(unchecked)}, where no router that learns nothing was run.")
    differ = {place(v) for v in (*gated, *unchecked) if _apart(v)}
    if same := [v for v in (*gated, *unchecked) if place(v) not in differ]:
        controls = _and(list(dict.fromkeys(f"the {in_words(v.control)}" for v in same)))
        where = _names(same) if differ else "any of these"
        what = " or ".join(dict.fromkeys(v.claim.measure.name for v in same))
        below.append(f"No difference in {what} from {controls} is seen on {where}.")
    return answer, below


def _undecided(found: Sequence[Verdict], judged: Sequence[Verdict]) -> list[str]:
    """The other claims that are undecided in the same places."""
    places = {place(v) for v in judged}
    others = [v for v in found if v.word == "undecided" and place(v) in places and v not in judged]
    return [
        f"Undecided there, {control}: whether it is {' or '.join(v.claim.wording for v in own)}."
        for control, own in grouped(others, against).items()
    ]


def _pays(found: Sequence[Verdict], mixtures: Sequence[Verdict]) -> Answer:
    """`mixtures`: whether a mixture beats a dense network."""

    def listed(units: Sequence[Verdict]) -> str:
        """ "against a constant gate on A (by 3.6 points) and B (by 2.5 points)", control by control."""
        by_control = grouped(
            units, lambda v: against(v).removesuffix(f" {v.where}").replace("SNNL with ", "")
        )
        return "; ".join(f"{control} on {_list(own, _faint)}" for control, own in by_control.items())

    words = {
        "supported": ("it is better", "Yes"),
        "contradicted": ("it is worse", "No (not corrected for the number of claims)"),
        "smaller than claimed": ("it gains less than would matter", "Less than would matter"),
        "undecided": ("it is undecided", "Undecided"),
    }
    units = {word: own for word in words if (own := _of(found, word))}
    if not units:
        return "", []
    counts = [f"in {len(own)} {words[word][0]}" for word, own in units.items()]
    answer = f"Of {len(found)} comparisons with routing that learns nothing, {_and(counts)}."
    below = [f"{words[word][1]}: {listed(own)}." for word, own in units.items()]
    dense = [
        f"{said} on {_list(own)}"
        for word, said in (("supported", "better"), ("contradicted", "worse"))
        if (own := _of(mixtures, word))
    ]
    if dense:
        unsure = f"; undecided on {_list(own)}" if (own := _of(mixtures, "undecided")) else ""
        below.append(
            f"Against a dense network of its size or active width, the mixture is {_and(dense)}{unsure}."
        )
    return answer, below


def _of(found: Sequence[Verdict], word: str) -> list[Verdict]:
    """Those with a word, the largest differences first, unit by unit."""
    units = [v for v in found if v.word == word]
    return sorted(units, key=lambda v: (v.claim.measure.column.unit != ACCURACY.column.unit, -abs(_gain(v))))


def _gain(verdict: Verdict) -> float:
    """The difference, positive where it is as claimed."""
    return verdict.claim.measure.sign * verdict.comparison.difference if verdict.comparison else 0.0


def _cause(verdict: Verdict, contrast: str) -> Cause | None:
    return next((one for one in verdict.causes if one.contrast == contrast), None)


def _apart(verdict: Verdict) -> bool:
    return verdict.comparison is not None and not verdict.comparison.low <= 0 <= verdict.comparison.high


def _amount(verdict: Verdict, gain: float) -> str:
    column = verdict.claim.measure.column
    return f"{abs(gain) * column.scale:.{max(1, column.decimals - 1)}f} {column.unit}"


def _list(units: Sequence[Verdict], *notes: Callable[[Verdict], str]) -> str:
    """ "CIFAR-100 (by 0.5 points; less than would matter) and MNIST (by 0.1 points)"."""
    parts = []
    for v in units:
        stage = "" if v.confirmatory else "exploratory"
        side = "" if v.word != "undecided" else "ahead " if _gain(v) > 0 else "behind "
        said = [f"{side}by {_amount(v, _gain(v))}", *(note(v) for note in notes), stage]
        where = f", {v.where.removeprefix('in ')}" * (bool(v.where) and against not in notes)
        where += " with SNNL" * (v.claim.wording == BESIDE)
        parts.append(f"{place(v)}{where} ({'; '.join(filter(None, said))})")
    return _and(parts)


def _names(units: Sequence[Verdict]) -> str:
    return _and(list(dict.fromkeys(place(v) + " (exploratory)" * (not v.confirmatory) for v in units)))


def _little(verdict: Verdict) -> str:
    """Of a difference that matters in neither direction, by its 90 % interval."""
    low, high = stats.t_interval(verdict.parts[0].signed_S, 0.90)
    return "less than would matter" * (-verdict.margin < low and high < verdict.margin)


def _uncorrected(verdict: Verdict) -> str:
    """Of what *contradicted* asks less of than *supported*."""
    return "not corrected for the number of claims" * (verdict.word == "contradicted")


def _faint(verdict: Verdict) -> str:
    """Of *contradicted*, which asks the 90 % interval, where the 95 % one leaves it open."""
    return "its 95 % interval includes 0" * (verdict.word == "contradicted" and not _apart(verdict))


def _caveats(verdict: Verdict) -> list[str]:
    return [*["less than claimed"] * verdict.smaller, _checkpoint(verdict)]


def _checkpoint(verdict: Verdict) -> str:
    return "another checkpoint gives another verdict" * verdict.depends_on_checkpoint


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
