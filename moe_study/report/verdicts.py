"""Verdicts in words: tables and sentences. `moe_study.verdicts` decides; this only says it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup

from moe_study.claims import ACCURACY, BY_KEY, PAYS
from moe_study.report import tables
from moe_study.report.plots import DATASET_TITLES
from moe_study.verdicts import MECHANISM, Cause, Verdict, Word

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
            "interval on the claimed side": f"the effect needs {one.cause}",
            "interval on the other side": f"the opposite of what would show {one.cause}",
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


# ------------------------------------------------------------------------------------- first screen

ARM_WORDS = {
    "base": "plain MoE",
    "snnl": "SNNL-MoE",
    "dense": "a dense network",
    "dense-snnl": "a dense network with SNNL",
    "base-balance": "MoE with balance loss",
    "snnl-shuffled": "MoE with SNNL of shuffled labels",
    "base-aux": "MoE with an auxiliary classifier",
    "uniform-gate": "MoE with a constant gate",
    "uniform-snnl": "SNNL-MoE with a constant gate",
    "linear": "linear router",
    "cosine": "cosine router",
    "ac": "AC router",
    "hash": "fixed random experts per position",
    "hash-token": "fixed random experts per byte",
}
MARKS: Mapping[Word, tuple[str, str]] = {  # sign and style of each word
    "supported": ("✓", "supported"),
    "contradicted": ("✗", "contradicted"),
    "smaller than claimed": ("<", "smaller"),
    "undecided": ("?", "undecided"),
    "not testable here": ("–", "untestable"),
    "pilot": ("○", "pilot"),
}
SOURCES = {  # of claims, in the order of the grid
    "SNNL-MoE": "The SNNL paper says: SNNL makes a mixture of experts ...",
    "AC router": "The AC paper says: the AC router ...",
    "this study": "We ask first: is the mixture, and its learned routing, worth having?",
}


def in_words(arm: str) -> str:
    """What an arm is, in two or three words; one of your own is called by its name."""
    return ARM_WORDS.get(arm, arm)


def contrast_in_words(verdict: Verdict) -> str:
    return f"{in_words(verdict.claim.treatment)} minus {in_words(verdict.control)}"


def grid(found: Sequence[Verdict]) -> str:
    """Claim x data set as HTML: a colour per word, difference and 95 % interval in the cell."""
    datasets = [name for name in DATASET_TITLES if any(v.dataset == name for v in found)]
    sections = []
    for source, title in SOURCES.items():
        own = [v for v in found if v.claim.source == source]
        rows: dict[tuple[str, str], list[Verdict]] = {}
        for v in own:
            rows.setdefault((v.claim.wording, v.claim.treatment), []).append(v)
        sections.append({"title": title, "rows": [_grid_row(units, datasets) for units in rows.values()]})
    used = [word for word in MARKS if any(v.word == word for v in found)]
    return _template("grid.html.j2").render(
        datasets=[DATASET_TITLES[name] for name in datasets],
        sections=[section for section in sections if section["rows"]],
        legend=[(word, *MARKS[word]) for word in used],
    )


def _grid_row(units: Sequence[Verdict], datasets: Sequence[str]) -> dict[str, Any]:
    claim = units[0].claim
    controls = list(dict.fromkeys(v.control for v in units))
    unit = f" ({claim.measure.unit})" if claim.measure.unit else ""
    against = [f"minus {in_words(control)}" for control in controls]
    return {
        "claim": claim.wording,
        "contrast": f"{in_words(claim.treatment)} {_and(against)}: {claim.measure.name}{unit}, "
        f"{claim.measure.direction} is better",
        "cells": [
            [
                {
                    "mark": MARKS[v.word][0],
                    "style": MARKS[v.word][1],
                    "title": f"{contrast_in_words(v)}: {word(v)}. {reason(v)}",
                    "difference": "no pairs" if v.comparison is None else _bare(v, v.comparison.difference),
                    "interval": ""
                    if v.comparison is None
                    else claim.measure.shown(v.comparison.low, v.comparison.high, unit=False),
                    "versus": in_words(v.control).removesuffix(" router") if len(controls) > 1 else "",
                }
                for v in units
                if v.dataset == name
            ]
            for name in datasets
        ],
    }


def _bare(verdict: Verdict, value: float) -> str:
    return verdict.claim.measure.shown(value, unit=False)


def _template(name: str) -> Template:
    folder = Path(__file__).parent / "template"
    return Environment(
        loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


GLOSSARY = {
    "mixture of experts (MoE)": "a gate shares the inputs out among several small networks, the experts",
    "expert collapse": "experts idle, or all do the same",
    "SNNL": "soft nearest neighbor loss: pulls the features of one class together",
    "AC router": "Adaptive Clustering: routes in a space scaled by each expert's cluster",
    "points": "percentage points of test accuracy",
    "+a [b, c]": "mean difference over paired seeds [95 % interval]; above it stands what minus what",
    "supported": "the claimed sign, p at most 0.05 after correction, at every checkpoint",
    "contradicted": "the 90 % interval lies on the wrong side of 0",
    "smaller than claimed": "the 90 % interval lies below the claimed or declared difference",
    "undecided": "too few seeds to say",
    "not testable here": "nothing to resolve, or learned routing is not shown to pay, so a better router cannot matter",
    "confirmatory": "on seeds declared before their first run; exploratory otherwise",
}


def first_screen(found: Sequence[Verdict]) -> str:
    """Grid and glossary side by side, as HTML."""
    glossary = {term: text for term, text in GLOSSARY.items() if term not in MARKS or _said(found, term)}
    return _template("first.html.j2").render(grid=Markup(grid(found)), glossary=glossary)


def _said(found: Sequence[Verdict], term: str) -> bool:
    return any(v.word == term for v in found)


def answers(found: Sequence[Verdict]) -> str:
    """The study's answer as a Markdown list of three: a question, and what was found where, how surely. Pilots
    are left out."""
    decided = [v for v in found if v.word != "pilot"]
    own = {
        "Did SNNL help?": _snnl_answer([v for v in decided if v.claim.source == "SNNL-MoE"]),
        "Should I use the AC router?": _ac_answer([v for v in decided if v.claim.source == "AC router"]),
        "Does learned routing pay at all?": _pays_answer(
            [v for v in decided if v.claim.wording.startswith(PAYS)]
        ),
    }
    return "\n".join(f"- **{question}** {answer}" for question, answer in own.items() if answer)


def scope(found: Sequence[Verdict]) -> str:
    """Models, budgets and seeds behind the answers, in a sentence."""
    decided = [v for v in found if v.word != "pilot"]
    scopes = list(dict.fromkeys(v.scope for v in decided))
    return (
        f"Scope: small models, trained briefly ({'; '.join(scopes)}), judged at the last epoch."
        if scopes
        else ""
    )


def _snnl_answer(found: Sequence[Verdict]) -> str:
    own = [v for v in found if v.claim.measure == ACCURACY]
    yes = [v for v in own if v.word == "supported"]
    said = []
    if yes:
        said.append(f"Yes on {_places(yes)}")
        said += filter(None, [_mechanism(v) for v in yes])
    for outcome, phrase in (
        ("contradicted", "it lowers accuracy on"),
        ("smaller than claimed", "the gain is smaller than claimed, if there is one, on"),
        ("undecided", "it is undecided on"),
    ):
        if units := [v for v in own if v.word == outcome]:
            said.append(f"{phrase} {_places(units)}")
    text = "; ".join(said)
    if any(v.depends_on_checkpoint for v in own if v.word != "supported"):
        text += " (there another choice of checkpoint would change the verdict)"
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _mechanism(verdict: Verdict) -> str:
    """Whether a gain needs the mixture; "" where nothing says so."""
    for one in verdict.causes:
        if one.contrast == MECHANISM:
            shown = verdict.claim.measure.shown(
                one.comparison.difference, one.comparison.low, one.comparison.high
            )
            return {
                "interval on the claimed side": f"the mixture gains {shown} more than a dense network does",
                "interval on the other side": f"a dense network gains more from it than the mixture ({shown})",
                "interval includes 0": f"a dense network gains as much, as far as these seeds tell ({shown})",
            }[one.reading]
    return ""


def _ac_answer(found: Sequence[Verdict]) -> str:
    own = [v for v in found if v.claim.key.endswith("-performance")]
    if not own:
        return ""
    by_dataset = {
        name: [v for v in own if v.dataset == name] for name in dict.fromkeys(v.dataset for v in own)
    }
    wins = [us for us in by_dataset.values() if all(v.word == "supported" for v in us)]
    rest = [v for us in by_dataset.values() if us not in wins for v in us]
    said = [f"Yes on {_places([v for us in wins for v in us])}."] if wins else ["There is no reason to here."]
    for unit in dict.fromkeys(v.claim.measure for v in rest):
        units = [v for v in rest if v.claim.measure == unit and v.comparison is not None]
        said.append(_no_gain(units))
    gated = [v for v in rest if v.obstacle is not None and v.obstacle.kind == "gate"]
    if gated:
        names = _and(list(dict.fromkeys(DATASET_TITLES[v.dataset] for v in gated)))
        said.append(
            f"Whether a better router matters cannot be told on {names}: learned routing is not shown to pay."
        )
    return " ".join(filter(None, said))


def _no_gain(units: Sequence[Verdict]) -> str:
    """Better, worse or neither than the two control routers, one measure, in a sentence."""
    if not units:
        return ""
    measure = units[0].claim.measure
    said = []
    for better, phrase in ((True, "better"), (False, "worse")):
        apart = [
            v
            for v in units
            if v.comparison is not None
            and (
                min(measure.sign * v.comparison.low, measure.sign * v.comparison.high) > 0
                if better
                else max(measure.sign * v.comparison.low, measure.sign * v.comparison.high) < 0
            )
        ]
        said += [
            f"on {DATASET_TITLES[v.dataset]} it is {phrase} than the {in_words(v.control)} by {difference(v)}"
            for v in apart
        ]
    same = [v for v in units if v.comparison is not None and v.comparison.low <= 0 <= v.comparison.high]
    if same:
        low = min(v.comparison.low for v in same if v.comparison)
        high = max(v.comparison.high for v in same if v.comparison)
        names = _and(list(dict.fromkeys(DATASET_TITLES[v.dataset] for v in same)))
        controls = _and(list(dict.fromkeys(in_words(v.control) for v in same)))
        if len(units) > len(same) and len(units[0].claim.controls) > 1:
            said.append(f"no difference from the {controls} shows")
        else:
            said.append(
                f"in {measure.name} no difference from the {controls} shows on {names} "
                f"(all 95 % intervals within {measure.shown(low, high)}, {_surely(same)})"
            )
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _pays_answer(found: Sequence[Verdict]) -> str:
    said = []
    for outcome, phrase in (
        ("supported", "yes on"),
        ("contradicted", "no: a gate that learns nothing is more accurate on"),
        ("smaller than claimed", "it gains less than would matter on"),
        ("undecided", "it is undecided on"),
    ):
        if units := [v for v in found if v.word == outcome]:
            said.append(f"{phrase} {_places(units)}")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _places(units: Sequence[Verdict]) -> str:
    """Data sets with their differences, and how sure they are."""
    by_stage: dict[str, list[str]] = {}
    for v in units:
        several = len({(one.claim.treatment, one.control) for one in units}) > 1
        versus = f", {contrast_in_words(v)}" if several else ""
        by_stage.setdefault(_surely([v]), []).append(f"{DATASET_TITLES[v.dataset]} ({difference(v)}{versus})")
    return "; ".join(f"{_and(parts)}, {stage}" for stage, parts in by_stage.items())


def _surely(units: Sequence[Verdict]) -> str:
    """ "40 seeds, confirmatory"."""
    seeds = sorted({v.comparison.seeds for v in units if v.comparison is not None})
    stages = {"confirmatory" if v.confirmatory else "exploratory" for v in units}
    return f"{'-'.join(str(n) for n in (seeds[:1] + seeds[1:][-1:]))} seeds, {' and '.join(sorted(stages))}"


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"
