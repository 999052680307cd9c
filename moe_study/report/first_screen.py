"""The report's first screen: every verdict in a few tables, a glossary, and the scope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from moe_study import store
from moe_study.claims import Claim
from moe_study.data import DATASETS
from moe_study.report import verdicts as words
from moe_study.report.plots import DATASET_TITLES
from moe_study.report.tables import grouped
from moe_study.report.verdicts import in_words, place
from moe_study.verdicts import Verdict, Word

LOW_IS_GOOD = "↓"  # beside a unit
MARKS: Mapping[Word, tuple[str, str]] = {  # sign and style of each word
    "supported": ("✓", "supported"),
    "contradicted": ("✗", "contradicted"),
    "smaller than claimed": ("<", "smaller"),
    "undecided": ("?", "undecided"),
    "not testable here": ("·", "untestable"),
    "pilot": ("○", "pilot"),
}
SOURCES = {  # of claims, in the order of the grid
    "SNNL-MoE": "SNNL makes a mixture of experts",
    "this study": "Does routing, or a mixture, help at all?",
    "AC router": "The AC router",
}


def grid(found: Sequence[Verdict]) -> dict[str, Any]:
    """Data set x claim, a section a source, for page and picture. A cell has one entry a verdict."""
    by_source = grouped(found, lambda v: v.claim.source)
    used = {v.word for v in found}
    return {
        "sections": [_section(SOURCES[s], by_source[s]) for s in SOURCES if s in by_source],
        "legend": [(word, *mark) for word, mark in MARKS.items() if word in used],
    }


def _section(title: str, units: Sequence[Verdict]) -> dict[str, Any]:
    """A table. What is subtracted is said once: in the title, above a column, or in each of its cells."""
    compared = {(v.claim.treatment, *v.claim.controls) for v in units}
    treatment, *controls = map(in_words, min(compared))
    if whole := len(compared) == 1:
        title += f" ({treatment} {', then '.join(f'minus {control}' for control in controls)})"
    order = list(DATASET_TITLES)
    rows = grouped(sorted(units, key=lambda v: order.index(v.dataset)), place)
    columns, notes = [], {}
    for kind, own in grouped(units, _kind).items():
        against = {(v.control, v.where) for v in own}
        notes[kind] = len(against) > 1 and not whole
        columns.append(
            {
                "claim": ", or ".join(dict.fromkeys(v.claim.wording for v in own)),
                "unit": " or ".join(filter(None, dict.fromkeys(_unit(v.claim) for v in own))),
                "against": words.against(own[0]) if len(against) == 1 and not whole else "",
            }
        )
    cells = {
        row: [[_entry(v, notes[kind]) for v in own if _kind(v) == kind] for kind in notes]
        for row, own in rows.items()
    }
    return {"title": title, "columns": columns, "rows": cells}


def _kind(verdict: Verdict) -> str:
    """What the claims of several studies have in common."""
    return verdict.claim.key.removeprefix(verdict.claim.study)


def _unit(claim: Claim) -> str:
    shown = f"{claim.measure.column.unit} {LOW_IS_GOOD * (claim.measure.direction == 'lower')}".strip()
    return "; ".join(filter(None, [shown, "our reading" * claim.reading]))


def _entry(verdict: Verdict, against: bool) -> dict[str, str]:
    measure, found = verdict.claim.measure, verdict.comparison
    if found is None or round(found.difference * measure.column.scale, 3):
        column = measure.column._replace(decimals=min(measure.column.decimals, 3))
        measure = replace(measure, column=column)  # as fits into a cell
    interval = "" if found is None else measure.shown(found.low, found.high, unit=False)
    mark, style = MARKS[verdict.word]
    contrast = f"{in_words(verdict.claim.treatment)} minus {in_words(verdict.control)}"
    return {
        "mark": mark,
        "style": style,
        "word": verdict.word,
        "title": f"{contrast}: {words.word(verdict)}. {words.reason(verdict)}",
        "difference": "no pairs" if found is None else measure.shown(found.difference, unit=False),
        "interval": interval + words.earlier(verdict),
        "against": words.against(verdict) if against else "",
    }


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "template"),
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
GLOSSARY = {
    "mixture of experts (MoE)": "small networks (experts); a gate decides how much each answer counts",
    "collapse": "experts idle, or all do the same",
    "SNNL": "soft nearest neighbor loss: pulls features of one class together",
    "AC router": "routes in a space scaled by each expert's cluster",
    "+a [b, c]": f"mean difference over paired seeds [95 % interval]; {LOW_IS_GOOD}: low is good",
    "supported": "claimed sign, corrected p at most 0.05, no checkpoint against it",
    "contradicted": "90 % interval on the wrong side of 0, not corrected for the number of claims",
    "smaller than claimed": "90 % interval below the published difference, taken as exact; if unknown, "
    "below our margin: no gain of that size",
    "depends on the checkpoint rule": "another verdict at the epoch of another validation score",
    "undecided": "none of these words fits: too few seeds to say",
    "not testable here": "nothing to resolve, models hardly trained, or learned routing not shown to pay",
    "pays": "beats routing that learns nothing, in accuracy or cross-entropy",
    "constant gate": "gives every expert the same weight, whatever the input",
    "top-1": "each image goes to one expert; elsewhere all answer, or two of sixteen",
    "fixed random experts": "chosen once at random for each image, position or byte: no routing is learned",
    "our reading": "the paper says that SNNL resolves collapse; the measure is ours",
    "confirmatory": "seeds declared before their first run; else exploratory",
}


def first_screen(found: Sequence[Verdict]) -> str:
    """Tables of verdicts and a glossary, as HTML."""
    unused = set(MARKS) - {v.word for v in found}
    glossary = {term: text for term, text in GLOSSARY.items() if term not in unused}
    sets = [DATASETS[name] for name in dict.fromkeys(v.dataset for v in found) if name in DATASETS]
    glossary |= {info.title: info.about for info in sets if info.about}
    shown = grid(found) | {"glossary": glossary, "scope": scope(found)}
    return _TEMPLATES.get_template("first.html.j2").render(shown)


def scope(found: Sequence[Verdict]) -> str:
    """Models and budgets behind the answers, and what another epoch decided."""
    decided = [v for v in found if v.word != "pilot"]
    if not decided:
        return ""
    text = "Scope: small models, trained briefly, judged at the last epoch"
    if earlier := sum(v.endpoint != store.PRIMARY_ENDPOINT for v in decided):
        text += f"; {earlier} exploratory verdicts (†) at the epoch of the lowest validation cross-entropy"
    listed = "; ".join(
        f"{', '.join(dict.fromkeys(f'{place(v)} {v.where}'.strip() for v in own))}: {model}"
        for model, own in grouped(decided, lambda v: v.scope).items()
    )
    return f"{text}. {listed}."
