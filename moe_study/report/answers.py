"""The study's answer in a few sentences. Their intervals stand in the table of verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_study.claims import ACCURACY
from moe_study.report.plots import DATASET_TITLES
from moe_study.report.verdicts import in_words
from moe_study.verdicts import MECHANISM, Verdict


def answers(found: Sequence[Verdict]) -> str:
    """A Markdown list of three questions, and what was found where. Pilots are left out."""
    decided = [v for v in found if v.word != "pilot"]
    own = {
        "Did SNNL help?": _snnl(
            [v for v in decided if v.claim.source == "SNNL-MoE"],
            [v for v in decided if v.claim.key.endswith("-beside")],
        ),
        "Should I use the AC router?": _ac([v for v in decided if v.claim.source == "AC router"]),
        "Does learned routing pay at all?": _pays(
            [v for v in decided if v.claim.key.endswith(("-pays", "-beside"))]
        ),
    }
    return "\n".join(f"- **{question}** {answer}" for question, answer in own.items() if answer)


def _snnl(found: Sequence[Verdict], beside: Sequence[Verdict]) -> str:
    """`beside`: whether learned routing pays with SNNL."""
    lost = {(v.claim.study, v.dataset) for v in beside if v.word == "contradicted"}

    def still(v: Verdict) -> str:
        return "with SNNL a gate that learns nothing is better still" * ((v.claim.study, v.dataset) in lost)

    def of(word: str, key: str = "-accuracy") -> list[Verdict]:
        return _of([v for v in found if v.claim.key.endswith(key)], word)

    said = []
    if yes := of("supported"):
        places = sum(v.claim.key.endswith("-accuracy") for v in found)
        where = _list(yes, _where, _caveats, _mechanism, still)
        said.append(f"Yes, in {len(yes)} of {places} places: more accurate on {where}.")
    if more := of("supported", "-effective"):
        said.append(f"More experts are in use with it on {_names(more)}.")
    if alike := of("contradicted", "-different"):
        said.append(f"Experts become more alike on {_names(alike)}, not less.")
    if no := of("contradicted"):
        said.append(f"It makes the model less accurate on {_list(no, _where)}.")
    small = of("smaller than claimed")
    less = [
        f"smaller than {than} on {_names(units)}"
        for than, published in (("claimed", True), ("would matter", False))
        if (units := [v for v in small if (v.dataset in v.claim.published) is published])
    ]
    if less:
        said.append(f"The gain, if there is one, is {_and(less)}.")
    if open_ := of("undecided"):
        said.append(f"{_names(open_)} {'is' if len(open_) == 1 else 'are'} undecided.")
    return " ".join(said)


def _ac(found: Sequence[Verdict]) -> str:
    own = [v for v in found if v.claim.key.endswith("-performance")]
    if not own:
        return ""
    places = [[v for v in own if _where(v) == place] for place in dict.fromkeys(map(_where, own))]
    wins = [v for units in places for v in units if all(one.word == "supported" for one in units)]
    rest = [v for v in own if v not in wins and v.comparison is not None]
    kinds = {
        kind: [v for v in rest if (v.obstacle.kind if v.obstacle else None) == kind]
        for kind in ("not trained", "gate", "no control", None)
    }
    said = [f"Yes on {_list(wins, _where, _against)}." if wins else "We see no reason to."]
    tested = [v for v in rest if v not in kinds["not trained"]]
    for better, word in ((True, "Better"), (False, "Worse")):
        if apart := [v for v in tested if _apart(v) and (_gain(v) > 0) is better]:
            said.append(f"{word} on {_list(apart, _where, _against, _little)}.")
    if judged := kinds[None]:
        small = all(v.word in ("smaller than claimed", "contradicted") for v in judged)
        gain = "any gain is smaller than would matter" if small else "a gain is neither shown nor excluded"
        said.append(f"Where learned routing pays ({_names(judged)}), {gain}{_undecided(found, judged)}.")
    if late := kinds["not trained"]:
        said.append(f"On {_names(late)} models are not trained far enough to say.")
    if gated := kinds["gate"]:
        said.append(
            f"Not judged on {_names(gated)}, where learned routing is not shown to beat every router that "
            "learns nothing."
        )
    if unchecked := kinds["no control"]:
        said.append(f"Not judged on {_names(unchecked)}, where no router that learns nothing was run.")
    if aside := [*gated, *unchecked]:
        differ = {_where(v) for v in aside if _apart(v)}
        if same := [v for v in aside if _where(v) not in differ]:
            controls = _and(list(dict.fromkeys(f"the {in_words(v.control)}" for v in same)))
            said.append(
                f"No difference from {controls} is seen {f'on {_names(same)}' if differ else 'there'}."
            )
    return " ".join(said)


def _undecided(found: Sequence[Verdict], judged: Sequence[Verdict]) -> str:
    """The other claims that are undecided in the same places: "; undecided there: more robust to attack"."""
    places = {_where(v) for v in judged}
    others = [v for v in found if v.word == "undecided" and _where(v) in places and v not in judged]
    listed = ", ".join(f"{v.claim.wording} ({_against(v)})" for v in others)
    return f"; undecided there: {listed}" if listed else ""


def _pays(found: Sequence[Verdict]) -> str:
    def place(v: Verdict) -> str:
        return _where(v) + " with SNNL" * v.claim.key.endswith("-beside")

    def chosen(v: Verdict) -> str:
        return "pilots chose this set, because routing won there" * (v.dataset == "shifted_domains")

    def listed(units: Sequence[Verdict]) -> str:
        """ "against a constant gate on A (by 3.6 points) and B (by 2.5 points)", control by control."""
        by_control: dict[str, list[Verdict]] = {}
        for v in units:
            by_control.setdefault(in_words(v.control.replace("-snnl", "-gate")), []).append(v)
        return "; ".join(f"against {c} on {_list(own, place, chosen)}" for c, own in by_control.items())

    said: list[str] = []
    for word, phrase in (
        ("supported", "Yes, in {}: {}."),
        ("contradicted", "No, what learns nothing does better, in {}: {}."),
        ("smaller than claimed", "It gains less than would matter in {}: {}."),
        ("undecided", "Undecided in {}: {}."),
    ):
        if units := _of(found, word):
            count = f"{len(units)}{f' of {len(found)} comparisons' * (not said)}"
            said.append(phrase.format(count, listed(units)))
    return " ".join(said)


def _of(found: Sequence[Verdict], word: str) -> list[Verdict]:
    """Those with a word, the largest differences first, unit by unit."""
    units = [v for v in found if v.word == word]
    return sorted(units, key=lambda v: (v.claim.measure.unit != ACCURACY.unit, -abs(_gain(v))))


def _gain(verdict: Verdict) -> float:
    """The difference, positive where it is as claimed."""
    return verdict.claim.measure.sign * verdict.comparison.difference if verdict.comparison else 0.0


def _apart(verdict: Verdict) -> bool:
    return verdict.comparison is not None and not verdict.comparison.low <= 0 <= verdict.comparison.high


def _list(units: Sequence[Verdict], place: Callable[[Verdict], str], *notes: Callable[[Verdict], str]) -> str:
    """ "CIFAR-100 (by 0.5 points; less than claimed) and MNIST (by 0.1 points)"."""
    parts = []
    for v in units:
        measure = v.claim.measure
        amount = f"by {abs(_gain(v)) * measure.scale:.{max(1, measure.decimals - 1)}f} {measure.unit}"
        stage = "" if v.confirmatory else "exploratory"
        said = "; ".join(filter(None, [amount, *(note(v) for note in notes), stage]))
        parts.append(f"{place(v)} ({said})")
    return _and(parts)


def _where(verdict: Verdict) -> str:
    """The data set, and what is special about the model."""
    special = {"collapse-top1": " with one expert per image", "collapse-wide": " with sixteen experts"}
    return DATASET_TITLES[verdict.dataset] + special.get(verdict.claim.study, "")


def _names(units: Sequence[Verdict]) -> str:
    return _and(list(dict.fromkeys(_where(v) + " (exploratory)" * (not v.confirmatory) for v in units)))


def _against(verdict: Verdict) -> str:
    return f"against the {in_words(verdict.control)}"


def _little(verdict: Verdict) -> str:
    return "less than would matter" * (abs(_gain(verdict)) < verdict.margin)


def _caveats(verdict: Verdict) -> str:
    said = ["less than claimed"] * verdict.smaller
    said += ["another checkpoint gives another verdict"] * verdict.depends_on_checkpoint
    return "; ".join(said)


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
