"""The study's answer in three sentences. Their intervals stand in the table of verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_study.claims import ACCURACY, BESIDE, PAYS
from moe_study.report.tables import grouped
from moe_study.report.verdicts import in_words, place
from moe_study.verdicts import MECHANISM, Verdict

Answer = tuple[str, list[str]]  # one sentence a newspaper could print, and what must stand below it


def answers(found: Sequence[Verdict]) -> str:
    """A Markdown list of three answers, and below each what was found where. Pilots are left out."""
    decided = [v for v in found if v.word != "pilot"]
    own = {
        "Did SNNL help?": _snnl(
            [v for v in decided if v.claim.source == "SNNL-MoE"],
            [v for v in decided if v.claim.wording == BESIDE],
        ),
        "Should I use the AC router?": _ac([v for v in decided if v.claim.source == "AC router"]),
        "Does learned routing pay at all?": _pays([v for v in decided if v.claim.wording in (PAYS, BESIDE)]),
    }
    lines = []
    for question, (answer, below) in own.items():
        if answer:
            lines += [f"- **{question}** {answer}", *(f"    - {text}" for text in below)]
    return "\n".join(lines)


def _snnl(found: Sequence[Verdict], beside: Sequence[Verdict]) -> Answer:
    """`beside`: whether learned routing pays with SNNL."""
    lost = {place(v) for v in beside if v.word == "contradicted"}

    def of(word: str, key: str = "-accuracy") -> list[Verdict]:
        return _of([v for v in found if v.claim.key.endswith(key)], word)

    def but(v: Verdict) -> str:
        said = [*_caveats(v), _mechanism(v)]
        said += ["with SNNL a gate that learns nothing is better still"] * (place(v) in lost)
        return "; ".join(filter(None, said))

    places = sum(v.claim.key.endswith("-accuracy") for v in found)
    if not places:
        return "", []
    yes = of("supported")
    answer = f"Not shown in any of {places} places."
    if yes:
        answer = f"Yes, in {len(yes)} of {places} places: more accurate on {_list(yes)}."
    below = [f"On {place(v)}: {but(v)}." for v in yes if but(v)]
    if more := of("supported", "-effective"):
        below.append(f"More experts are in use with it on {_names(more)}.")
    if alike := of("contradicted", "-different"):
        below.append(f"Experts become more alike on {_names(alike)}, not less.")
    if no := of("contradicted"):
        below.append(f"It makes the model less accurate on {_list(no)}.")
    small = of("smaller than claimed")
    less = [
        f"smaller than {than} on {_names(units)}"
        for than, published in (("claimed", True), ("would matter", False))
        if (units := [v for v in small if (v.dataset in v.claim.published) is published])
    ]
    if less:
        below.append(f"The gain, if there is one, is {_and(less)}.")
    if open_ := of("undecided"):
        below.append(f"Undecided on {_names(open_)}.")
    return answer, below


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
    answer = f"Yes on {_list(wins, _against)}." if wins else "We see no reason to."
    if judged := kinds[None]:
        small = all(v.word in ("smaller than claimed", "contradicted") for v in judged)
        gain = "any gain is smaller than would matter" if small else "a gain is neither shown nor excluded"
        answer += f" Where learned routing pays ({_names(judged)}), {gain}."
    below = []
    tested = [v for v in rest if v not in kinds["not trained"]]
    for better, word in ((True, "Better"), (False, "Worse")):
        if apart := [v for v in tested if _apart(v) and (_gain(v) > 0) is better]:
            below.append(f"{word} on {_list(apart, _against, _little)}.")
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
        where = f"on {_names(same)}" if differ else "there"
        below.append(f"No difference from {controls} is seen {where}.")
    return answer, below


def _undecided(found: Sequence[Verdict], judged: Sequence[Verdict]) -> list[str]:
    """The other claims that are undecided in the same places."""
    places = {place(v) for v in judged}
    others = [v for v in found if v.word == "undecided" and place(v) in places and v not in judged]
    return [
        f"Undecided there, {against}: {_and([v.claim.wording for v in own])}."
        for against, own in grouped(others, _against).items()
    ]


def _pays(found: Sequence[Verdict]) -> Answer:
    def chosen(v: Verdict) -> str:
        return "pilots chose this set, because routing won there" * (v.dataset == "shifted_domains")

    def listed(units: Sequence[Verdict]) -> str:
        """ "against a constant gate on A (by 3.6 points) and B (by 2.5 points)", control by control."""
        by_control = grouped(units, lambda v: in_words(v.control.replace("-snnl", "-gate")))
        return "; ".join(f"against {c} on {_list(own, chosen)}" for c, own in by_control.items())

    words = {
        "supported": ("it is better", "Yes"),
        "contradicted": ("it is worse", "No"),
        "smaller than claimed": ("it gains less than would matter", "Less than would matter"),
        "undecided": ("it is undecided", "Undecided"),
    }
    units = {word: own for word in words if (own := _of(found, word))}
    if not units:
        return "", []
    counts = [f"in {len(own)} {words[word][0]}" for word, own in units.items()]
    answer = f"Of {len(found)} comparisons with routing that learns nothing, {_and(counts)}."
    return answer, [f"{words[word][1]}: {listed(own)}." for word, own in units.items()]


def _of(found: Sequence[Verdict], word: str) -> list[Verdict]:
    """Those with a word, the largest differences first, unit by unit."""
    units = [v for v in found if v.word == word]
    return sorted(units, key=lambda v: (v.claim.measure.unit != ACCURACY.unit, -abs(_gain(v))))


def _gain(verdict: Verdict) -> float:
    """The difference, positive where it is as claimed."""
    return verdict.claim.measure.sign * verdict.comparison.difference if verdict.comparison else 0.0


def _apart(verdict: Verdict) -> bool:
    return verdict.comparison is not None and not verdict.comparison.low <= 0 <= verdict.comparison.high


def _list(units: Sequence[Verdict], *notes: Callable[[Verdict], str]) -> str:
    """ "CIFAR-100 (by 0.5 points; less than would matter) and MNIST (by 0.1 points)"."""
    parts = []
    for v in units:
        measure = v.claim.measure
        amount = f"by {abs(_gain(v)) * measure.scale:.{max(1, measure.decimals - 1)}f} {measure.unit}"
        stage = "" if v.confirmatory else "exploratory"
        said = "; ".join(filter(None, [amount, *(note(v) for note in notes), stage]))
        parts.append(f"{place(v)}{' with SNNL' * (v.claim.wording == BESIDE)} ({said})")
    return _and(parts)


def _names(units: Sequence[Verdict]) -> str:
    return _and(list(dict.fromkeys(place(v) + " (exploratory)" * (not v.confirmatory) for v in units)))


def _against(verdict: Verdict) -> str:
    return f"against the {in_words(verdict.control)}"


def _little(verdict: Verdict) -> str:
    return "less than would matter" * (abs(_gain(verdict)) < verdict.margin)


def _caveats(verdict: Verdict) -> list[str]:
    said = ["less than claimed"] * verdict.smaller
    return said + ["another checkpoint gives another verdict"] * verdict.depends_on_checkpoint


def _mechanism(verdict: Verdict) -> str:
    """Whether a gain needs the mixture; "" where nothing says so."""
    readings = {
        "interval on the claimed side": "a dense network gains less",
        "interval on the other side": "a dense network gains more",
        "interval includes 0": "a dense network may gain as much",
    }
    return next((readings[one.reading] for one in verdict.causes if one.contrast == MECHANISM), "")


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
