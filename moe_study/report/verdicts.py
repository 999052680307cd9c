"""Verdicts in words: tables and sentences. `moe_study.verdicts` decides; this only says it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pandas as pd

from moe_study.claims import BY_KEY
from moe_study.report import tables
from moe_study.report.plots import DATASET_TITLES
from moe_study.verdicts import Cause, Verdict, Word

COLUMNS = ("claim", "against", "verdict", "difference", "95 % interval", "counts from", "p (Holm)", "seeds")


def contrast(verdict: Verdict) -> str:
    return f"{verdict.claim.treatment} - {verdict.control}"


def difference(verdict: Verdict) -> str:
    """ "+0.54 [+0.08, +0.99] points"; "no pairs" where there are none."""
    found = verdict.comparison
    if found is None:
        return "no pairs"
    return verdict.claim.measure.shown(found.difference, found.low, found.high)


def word(verdict: Verdict) -> str:
    """The word, and what must stand beside it."""
    said: str = verdict.word
    if verdict.word == "supported" and verdict.smaller:
        said += ", but smaller than claimed"
    if verdict.depends_on_checkpoint:
        said += "; depends on the checkpoint rule"
    return said


def table(found: Sequence[Verdict]) -> pd.DataFrame:
    """One row a unit: a claim on a data set against one control."""
    rows = []
    for verdict in found:
        claim, comparison = verdict.claim, verdict.comparison
        row = {
            "of": claim.source,
            "data set": DATASET_TITLES[verdict.dataset],
            "claim": claim.wording,
            "against": f"{verdict.control}: {claim.controls[verdict.control]}",
            "verdict": word(verdict),
            "counts from": claim.measure.shown(claim.measure.sign * verdict.margin),
            "p (Holm)": "-" if math.isnan(verdict.p_holm) else _p(verdict.p_holm),
        }
        if comparison is not None:
            row["difference"] = claim.measure.shown(comparison.difference)
            row["95 % interval"] = claim.measure.shown(comparison.low, comparison.high, unit=False)
            row["seeds"] = tables.show(comparison)["seeds"]
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["of", "data set", *COLUMNS]).fillna("-")
    return frame.set_index(["of", "data set"])


def firmness(found: Sequence[Verdict]) -> pd.DataFrame:
    """What each verdict hangs on: the margin, the checkpoint, the test images, the number of seeds."""
    rows = []
    for verdict in found:
        claim = verdict.claim
        images = verdict.images
        rows.append(
            {
                "data set": DATASET_TITLES[verdict.dataset],
                "claim": claim.wording,
                "contrast": contrast(verdict),
                "verdict": verdict.word,
                "at half the margin": verdict.at_half,
                "at twice the margin": verdict.at_twice,
                **{name.replace("_", " "): verdict.by_endpoint.get(name, "-") for name in _ENDPOINTS},
                "interval over seeds and images": "-" if images is None else claim.measure.shown(*images),
                "seeds for 80 % power": str(verdict.seeds_needed or "-"),
            }
        )
    return pd.DataFrame(rows).set_index(["data set", "claim"]) if rows else pd.DataFrame()


_ENDPOINTS = ("last_epoch", "best_accuracy", "best_cross_entropy")


def reasons(found: Sequence[Verdict]) -> pd.DataFrame:
    """Why each verdict is what it is, what attributes the difference, and the scope."""
    rows = [
        {
            "data set": DATASET_TITLES[verdict.dataset],
            "claim": verdict.claim.wording,
            "verdict": verdict.word,
            "reason": reason(verdict),
            "attribution": " ".join(cause(one, verdict) for one in verdict.causes) or "No control was run.",
            "scope": f"{verdict.scope}; measured at {verdict.endpoint.replace('_', ' ')}",
        }
        for verdict in found
    ]
    return pd.DataFrame(rows).set_index(["data set", "claim"]) if rows else pd.DataFrame()


def reason(verdict: Verdict) -> str:
    """One or two sentences."""
    if verdict.obstacle is not None and verdict.word == "not testable here":
        return f"{verdict.obstacle.text[0].upper()}{verdict.obstacle.text[1:]}."
    margin = verdict.claim.measure.shown(verdict.claim.measure.sign * verdict.margin)
    said: Mapping[Word, str] = {
        "supported": f"Holm p {_p(verdict.p_holm)}, and no endpoint contradicts it",
        "contradicted": "the 90 % interval lies wholly on the other side of zero",
        "smaller than claimed": f"the 90 % interval lies wholly below {margin}",
        "undecided": f"about {verdict.seeds_needed} paired seeds would find {margin} with 80 % power",
        "pilot": f"fewer than {tables.PILOT_BELOW} paired seeds",
        "not testable here": "",
    }
    broken = [part.condition.wording for part in verdict.parts if part.condition and part.breaks]
    if broken:
        return f"{contrast(verdict)} {difference(verdict)}. Not met: {'; '.join(broken)}."
    conditions = "".join(
        f" {part.condition.wording[0].upper()}{part.condition.wording[1:]}: "
        f"{part.measure.shown(float((part.treatment_S - part.control_S).mean()))}, p {_p(part.p)}."
        for part in verdict.parts
        if part.condition is not None and len(part.treatment_S)
    )
    return f"{contrast(verdict)} {difference(verdict)}: {said[verdict.word]}.{conditions}"


def cause(one: Cause, verdict: Verdict) -> str:
    """What an attributing contrast says; of the cause only where the claim is supported."""
    numbers = verdict.claim.measure.shown(one.comparison.difference, one.comparison.low, one.comparison.high)
    seeds = f"{one.comparison.seeds} seeds"
    if verdict.word != "supported":
        return f"{one.contrast} {numbers}, {seeds}."
    if one.comparison.seeds < tables.PILOT_BELOW:
        said = f"a pilot on whether it is {one.cause}"
    else:
        said = {
            "as claimed": f"the effect needs {one.cause}",
            "opposite to the claim": f"the opposite of what would show {one.cause}",
            "interval includes 0": f"we cannot tell whether it needs {one.cause}",
        }[one.reading]
    return f"{one.contrast} {numbers}, {seeds}: {said}."


def rates_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """How often the rule says each word in simulated studies, in %: of `rates.path()`, data sets averaged."""
    rows = []
    for row in found["rates"]:
        claim = BY_KEY[row["claim"]]
        effect = "none" if row["effect"] == 0 else f"{row['effect']:g} x"
        labels = {"claim": claim.wording, "seeds": str(row["seeds"]), "true effect": effect}
        rows.append(labels | {word: 100 * row["words"][word] for word in _SIMULATED})
    keys = ["claim", "seeds", "true effect"]
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).groupby(keys, sort=False).mean().map("{:.1f}".format)


_SIMULATED: tuple[Word, ...] = ("supported", "smaller than claimed", "undecided", "contradicted")


def false_support(found: Mapping[str, Any]) -> str:
    """One sentence beside `rates_table`."""
    parts = [
        f"{100 * row['as drawn']:.1f} % with {row['seeds']} seeds ({100 * row['symmetric']:.1f} % where each "
        "seed's sign is drawn too, as the sign-flip test assumes)"
        for row in found["false_support"]
    ]
    return f"Without any effect, at least one unit of a study is supported in {' and '.join(parts)}."


def tally(found: Sequence[Verdict]) -> str:
    """How many verdicts of each kind, in one sentence."""
    counts = Counter(verdict.word for verdict in found)
    return (
        f"Of {len(found)} verdicts: "
        + ", ".join(f"{counts[w]} {w}" for w in get_args(Word) if counts[w])
        + "."
    )


# Questions that the first screen answers: key of the claims, then how each word is said.
_QUESTIONS: tuple[tuple[str, tuple[str, ...], Mapping[Word, str]], ...] = (
    (
        "Does learned routing pay?",
        ("snnl-pays", "collapse-pays", "ac-vision-pays", "ac-language-pays"),
        {
            "supported": "It pays on",
            "contradicted": "A router that learns nothing does better on",
            "smaller than claimed": "It gains less than would matter on",
            "undecided": "It is undecided on",
        },
    ),
    (
        "Does SNNL make a mixture of experts more accurate?",
        ("snnl-accuracy", "collapse-accuracy"),
        {
            "supported": "Yes on",
            "contradicted": "It makes it less accurate on",
            "smaller than claimed": "By less than claimed, if at all, on",
            "undecided": "It is undecided on",
        },
    ),
    (
        "Does the AC router do better?",
        ("ac-vision-performance", "ac-language-performance"),
        {
            "supported": "Yes on",
            "contradicted": "It does worse on",
            "smaller than claimed": "By less than would matter, if at all, on",
            "undecided": "It is undecided on",
            "not testable here": "It cannot be tested, for learned routing is not shown to pay, on",
        },
    ),
)


def answers(found: Sequence[Verdict]) -> str:
    """The study's answer as a Markdown list: a question, what was found where, and the scope. Pilots are left
    out."""
    lines = []
    for question, keys, phrases in _QUESTIONS:
        own = [v for v in found if v.claim.key in keys and v.word in phrases]
        said = [
            f"{phrase} {_places([v for v in own if v.word == outcome])}."
            for outcome, phrase in phrases.items()
            if any(v.word == outcome for v in own)
        ]
        if said:
            stage = {True: "confirmatory", False: "exploratory"}
            scopes = dict.fromkeys(f"{v.scope} ({stage[v.confirmatory]})" for v in own)
            lines.append(f"- **{question}** {' '.join(said)} Scope: {'; '.join(scopes)}.")
    return "\n".join(lines)


def _places(units: Sequence[Verdict]) -> str:
    """Data sets with their differences; without, where nothing can be tested."""
    if units[0].word == "not testable here":
        return _and(list(dict.fromkeys(DATASET_TITLES[v.dataset] for v in units)))
    parts = []
    for v in units:
        checkpoint = ", which depends on the checkpoint" if v.depends_on_checkpoint else ""
        parts.append(f"{DATASET_TITLES[v.dataset]} ({contrast(v)}: {difference(v)}{checkpoint})")
    return _and(parts)


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
