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
        "Did SNNL help?": _snnl([v for v in decided if v.claim.source == "SNNL-MoE"]),
        "Should I use the AC router?": _ac([v for v in decided if v.claim.source == "AC router"]),
        "Does learned routing pay at all?": _pays(
            [v for v in decided if v.claim.key.endswith(("-pays", "-beside"))]
        ),
    }
    return "\n".join(f"- **{question}** {answer}" for question, answer in own.items() if answer)


def _snnl(found: Sequence[Verdict]) -> str:
    own = [v for v in found if v.claim.measure == ACCURACY]
    said = []
    if yes := _of(own, "supported"):
        said.append(f"Yes: more accurate on {_list(yes, _where, _caveats, _mechanism)}.")
    if no := _of(own, "contradicted"):
        said.append(f"It makes the model less accurate on {_list(no, _where)}.")
    if small := _of(own, "smaller than claimed"):
        said.append(f"The gain, if there is one, is smaller than claimed on {_names(small)}.")
    if open_ := _of(own, "undecided"):
        said.append(f"{_names(open_)} {'is' if len(open_) == 1 else 'are'} undecided.")
    return " ".join(said)


def _ac(found: Sequence[Verdict]) -> str:
    own = [v for v in found if v.claim.key.endswith("-performance")]
    if not own:
        return ""
    places = [[v for v in own if _where(v) == place] for place in dict.fromkeys(map(_where, own))]
    wins = [v for units in places for v in units if all(one.word == "supported" for one in units)]
    late = [v for v in own if v.obstacle is not None and v.obstacle.kind == "not trained"]
    rest = [v for v in own if v not in wins and v not in late and v.comparison is not None]
    said = [f"Yes on {_list(wins, _where, _against)}." if wins else "We see no reason to."]
    for better, word in ((True, "Better"), (False, "Worse")):
        if apart := [v for v in rest if _apart(v) and (_gain(v) > 0) is better]:
            said.append(f"{word} on {_list(apart, _where, _against)}.")
    differ = {_where(v) for v in rest if _apart(v)}
    if same := [v for v in rest if _where(v) not in differ]:
        controls = _and(list(dict.fromkeys(f"the {in_words(v.control)}" for v in same)))
        said.append(f"No difference from {controls} is seen on {_names(same)}.")
    if late:
        said.append(f"On {_names(late)} models are not trained far enough to say.")
    if gated := [v for v in rest if v.obstacle is not None and v.obstacle.kind == "gate"]:
        where = "here" if len(gated) == len(own) else f"on {_names(gated)}"
        said.append(f"Learned routing is not shown to pay {where}, so a better router has nothing to prove.")
    if judged := [v for v in rest if v.obstacle is None]:
        small = all(v.word in ("smaller than claimed", "contradicted") for v in judged)
        gain = "any gain is smaller than would matter" if small else "a gain is neither shown nor excluded"
        said.append(f"Where it pays ({_names(judged)}), {gain}.")
    return " ".join(said)


def _pays(found: Sequence[Verdict]) -> str:
    def place(v: Verdict) -> str:
        several = len({one.control for one in found if (one.claim, one.dataset) == (v.claim, v.dataset)}) > 1
        beside = " beside SNNL" * v.claim.key.endswith("-beside")
        return f"{_where(v)}{beside}{f' against {in_words(v.control)}' if several else ''}"

    said = []
    for word, phrase in (
        ("supported", "Yes on {}."),
        ("contradicted", "No: a gate that learns nothing does better on {}."),
        ("smaller than claimed", "It gains less than would matter on {}."),
    ):
        if units := _of(found, word):
            said.append(phrase.format(_list(units, place)))
    if open_ := _of(found, "undecided"):
        said.append(f"{_and(list(map(place, open_)))} {'is' if len(open_) == 1 else 'are'} undecided.")
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
    return _and(list(dict.fromkeys(map(_where, units))))


def _against(verdict: Verdict) -> str:
    return f"against the {in_words(verdict.control)}"


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
