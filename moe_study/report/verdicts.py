"""Verdicts in words: tables and sentences. `moe_study.verdicts` decides; this only says it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pandas as pd

from moe_study import store
from moe_study.claims import BY_KEY, PILOT_BELOW
from moe_study.columns import COLUMNS, Columns
from moe_study.configs.arms import CONFIRMATORY
from moe_study.report import tables
from moe_study.report.plots import DATASET_TITLES
from moe_study.verdicts import Cause, Part, Verdict, Word

# Studies of one data set are told apart by what is special about the models of all but one of them, or, where
# both papers' claims are judged on it, by what their models are.
SPECIAL = {
    "collapse-top1": " (top-1)",
    "collapse-wide": " (16 experts)",
    "ac-language-everywhere": ", every mixture",
}
MODELS = {"snnl": " (CNN)", "ac-vision": " (ViT)"}
SHARED = ("fashion_mnist", "cifar10", "cifar100")


def title(study: str, dataset: str) -> str:
    """The data set, and what is special about the models of a study."""
    explored = CONFIRMATORY.get(study, study)
    special = MODELS.get(explored, "") if dataset in SHARED else ""
    return DATASET_TITLES[dataset] + SPECIAL.get(explored, special)


def place(verdict: Verdict) -> str:
    return title(verdict.claim.study, verdict.dataset)


def against(verdict: Verdict) -> str:
    """ "against the linear router", and in which of the model's mixtures."""
    name = in_words(verdict.control)
    return " ".join(filter(None, ["against", "the" * name.endswith("router"), name, verdict.where]))


def contrast(verdict: Verdict) -> str:
    return f"{verdict.claim.treatment} - {verdict.control}"


def difference(verdict: Verdict) -> str:
    """ "+0.54 [+0.08, +0.99] points"; "no pairs" where there are none."""
    found = verdict.comparison
    if found is None:
        return "no pairs"
    return verdict.claim.measure.shown(found.difference, found.low, found.high)


def _qualified(verdict: Verdict, said: Word, factor: float = 1) -> str:
    """A word at a multiple of the margin, and whether the difference is smaller than that all the same."""
    smaller = said == "supported" and verdict.below(factor * verdict.margin)
    return f"{said}, but smaller than {'claimed' if factor == 1 else 'that'}" if smaller else said


def word(verdict: Verdict) -> str:
    """The word, and what must stand beside it."""
    said = _qualified(verdict, verdict.word)
    if verdict.depends_on_checkpoint:
        said += "; depends on the checkpoint rule"
    return said


def earlier(verdict: Verdict) -> str:
    """The mark of a verdict that is not measured at the last epoch."""
    return " †" * (verdict.endpoint != store.PRIMARY_ENDPOINT)


def table(found: Sequence[Verdict]) -> pd.DataFrame:
    """One row a unit: a claim on a data set against one control."""
    rows = []
    for verdict in found:
        claim, comparison = verdict.claim, verdict.comparison
        row = {
            "of": claim.source + ", as we read it" * claim.reading,
            "data set": place(verdict),
            "claim": claim.wording,
            "against": f"{verdict.control}: {claim.controls[verdict.control]}, {verdict.where}".removesuffix(
                ", "
            ),
            "verdict": word(verdict) + earlier(verdict),
            "counts from": claim.measure.shown(claim.measure.sign * verdict.margin),
            "p": "-" if math.isnan(verdict.p_holm) else tables.shown_p(verdict.p),
            "p (Holm)": "-" if math.isnan(verdict.p_holm) else tables.shown_p(verdict.p_holm),
        }
        if comparison is not None:
            row["difference"] = claim.measure.shown(comparison.difference)
            row["95 % interval"] = claim.measure.shown(comparison.low, comparison.high, unit=False)
            row["seeds"] = tables.show(comparison)["seeds"]
        rows.append(row)
    columns = ["of", "data set", "claim", "against", "verdict", "difference", "95 % interval"]
    frame = pd.DataFrame(rows, columns=[*columns, "counts from", "p", "p (Holm)", "seeds"]).fillna("-")
    return frame.set_index(["of", "data set"])


def firmness(found: Sequence[Verdict]) -> pd.DataFrame:
    """What each verdict depends on: margin, checkpoint, test images, number of seeds. "=": the same word."""
    rows = []
    for verdict in found:
        claim = verdict.claim
        images = verdict.images
        elsewhere = {
            "at half the margin": _qualified(verdict, verdict.at_half, 0.5),
            "at twice the margin": _qualified(verdict, verdict.at_twice, 2),
            **{name.replace("_", " "): verdict.by_endpoint.get(name, "-") for name in store.ENDPOINTS},
        }
        rows.append(
            {
                "data set": place(verdict),
                "claim": claim.wording,
                "contrast": contrast(verdict),
                "verdict": verdict.word,
                **{at: "=" if said == verdict.word else said for at, said in elsewhere.items()},
                "interval over seeds and images": "-" if images is None else claim.measure.shown(*images),
                "seeds to find the difference that counts (80 % power, uncorrected)": str(
                    verdict.seeds_needed or "-"
                ),
            }
        )
    return pd.DataFrame(rows).set_index(["data set", "claim"]) if rows else pd.DataFrame()


def reasons(found: Sequence[Verdict]) -> pd.DataFrame:
    """Why each verdict is what it is, what attributes the difference, and the scope."""
    rows = [
        {
            "data set": place(verdict),
            "claim": verdict.claim.wording,
            "verdict": verdict.word,
            "reason": reason(verdict),
            "attribution": " ".join(cause(one, verdict) for one in verdict.causes) or "No further control.",
            "scope": f"{verdict.scope}; measured at {verdict.endpoint.replace('_', ' ')}",
        }
        for verdict in found
    ]
    return pd.DataFrame(rows).set_index(["data set", "claim"]) if rows else pd.DataFrame()


def reason(verdict: Verdict) -> str:
    """One or two sentences."""
    if verdict.obstacle is not None and verdict.word == "not testable here":
        return _sentence(verdict.obstacle.text)
    margin = verdict.claim.measure.shown(verdict.claim.measure.sign * verdict.margin)
    said: Mapping[Word, str] = {
        "supported": f"Holm p {tables.shown_p(verdict.p_holm)}, and no endpoint contradicts it",
        "contradicted": "the 90 % interval lies wholly on the other side of zero",
        "smaller than claimed": f"by the 90 % interval any gain is smaller than {margin}",
        "undecided": f"about {verdict.seeds_needed} paired seeds would find {margin} with 80 % power, before "
        "correction for the number of claims",
        "pilot": f"fewer than {PILOT_BELOW} paired seeds",
        "not testable here": "",
    }
    broken = [part.condition.wording for part in verdict.parts if part.condition and part.breaks]
    if broken:
        return f"{contrast(verdict)} {difference(verdict)}. Not met: {'; '.join(broken)}."
    conditions = "".join(
        f" {capital(part.condition.wording)}: "
        f"{part.measure.shown(float((part.treatment_S - part.control_S).mean()))}, "
        f"p {tables.shown_p(part.p)}{_bound(part)}."
        for part in verdict.parts
        if part.condition is not None and len(part.treatment_S)
    )
    return f"{contrast(verdict)} {difference(verdict)}: {said[verdict.word]}.{conditions}"


def _bound(part: Part) -> str:
    """What a condition's p is against, if not 0."""
    return f" against {part.measure.shown(part.measure.sign * part.bound)}" if part.bound else ""


def cause(one: Cause, verdict: Verdict) -> str:
    """What an attributing contrast says; of the cause only where the claim is supported."""
    numbers = verdict.claim.measure.shown(one.comparison.difference, one.comparison.low, one.comparison.high)
    seeds = f"{one.comparison.seeds} seeds"
    if verdict.word != "supported":
        return f"{one.contrast} {numbers}, {seeds}."
    if one.comparison.seeds < PILOT_BELOW:
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
        of = claim.wording + SPECIAL.get(claim.study, "")
        labels = {"claim": of, "seeds": str(row["seeds"]), "true effect": effect}
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


# ---------------------------------------------------------------------------------- ends of notebooks

ARM_WORDS = {
    "base": "plain MoE",
    "snnl": "SNNL-MoE",
    "snnl-weaker": "SNNL-MoE at a tenth of the factor",
    "dense": "a dense network",
    "dense-snnl": "a dense network with SNNL",
    "base-balance": "MoE with balance loss",
    "snnl-shuffled": "MoE with SNNL of shuffled labels",
    "base-aux": "MoE with an auxiliary classifier",
    "uniform-gate": "a constant gate",
    "uniform-snnl": "SNNL with a constant gate",
    "hash-gate": "a random expert",
    "hash-snnl": "SNNL with a random expert",
    "linear": "linear router",
    "cosine": "cosine router",
    "ac": "AC router",
    "hash": "fixed random experts per position",
    "hash-token": "fixed random experts per byte",
}


CROSSED_WORDS = {
    "base": "neither remedy",
    "snnl": "SNNL alone",
    "ac": "the AC router alone",
    "snnl-ac": "both remedies",
}


def in_words(arm: str, study: str = "") -> str:
    """What an arm is, in two or three words; one of your own is called by its name."""
    return (CROSSED_WORDS if study == "crossed" else ARM_WORDS).get(arm, arm)


def differences(
    runs: pd.DataFrame, asked: Sequence[tuple[str, str, str]], columns: Columns = COLUMNS
) -> list[str]:
    """Sentences on (treatment, control, measure): both levels, the difference, and what it says."""
    said = []
    name_of = {arm: in_words(arm, own) for arm, own in zip(runs["arm"], runs["study"], strict=True)}
    for treatment, control, name in asked:
        both = tables.paired(runs, [treatment, control], name)
        found = tables.contrast(runs, treatment, control, name)
        if both is None or found is None:
            continue
        column = columns[name]
        unit = "%" if column.unit == "points" else column.unit
        a, b = (
            f"{column.scale * both[arm].mean():.{column.decimals}f} {unit}".strip()
            for arm in (treatment, control)
        )
        shown = tables.show(found, column)
        if found.seeds < tables.FEWEST_SEEDS:
            interval, reading = "", "too few for an interval"
        else:
            interval = f" {shown['95 % interval']}"
            reading = f"{name_of[treatment]} is {'higher' if found.difference > 0 else 'lower'}"
            reading = "the interval includes 0" if found.low <= 0 <= found.high else reading
            reading += ", and the seeds are too few to decide" * (found.seeds < PILOT_BELOW)
        difference = f"{shown['difference']}{interval} {column.unit}".strip()
        said.append(
            f"{name}: {name_of[treatment]} {a}, {name_of[control]} {b}; difference {difference} on "
            f"{found.seeds} seeds, {reading}."
        )
    return said


def conclusion(runs: pd.DataFrame, asked: Sequence[tuple[str, str, str]], columns: Columns = COLUMNS) -> str:
    """The end of a notebook: `differences` as a Markdown list."""
    said = differences(runs, asked, columns)
    return "\n".join(f"- {text}" for text in said) or "No two seeds have both arms yet."


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    return f"{capital(text)}." if text else ""
