"""The study on one page: what each arm scores in every setting, as a table for each remedy and one figure.

A setting is a data set and the models trained on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe_study import stats, study
from moe_study.claims import OUTSIDE
from moe_study.columns import COLUMNS, LANGUAGE_COLUMNS, VISION_COLUMNS, Column, Columns, frame_of, rounded
from moe_study.configs.arms import CONFIRMATORY
from moe_study.report import selection, tables
from moe_study.report.plots import ARM_STYLE, NO_RUNS, captioned, new_figure, note
from moe_study.report.verdicts import in_words, title


class Remedy(NamedTuple):
    """What stands side by side for one remedy: heading -> the arms that may stand there, one a setting."""

    name: str
    studies: tuple[str, ...]
    reference: str  # arm
    treatment: str
    arms: Mapping[str, tuple[str, ...]]


SNNL = Remedy(
    "SNNL",
    ("collapse", "collapse-top1", "collapse-wide", "snnl"),
    "base",
    "snnl",
    {
        "MoE": ("base",),
        "MoE + SNNL": ("snnl",),
        "no learned gate": ("uniform-gate", "hash-gate"),
        "no learned gate + SNNL": ("uniform-snnl", "hash-snnl"),
        "dense": ("dense",),
        "dense + SNNL": ("dense-snnl",),
    },
)
AC = Remedy(
    "AC router",
    ("ac-vision", "ac-language", "ac-language-everywhere"),
    "linear",
    "ac",
    {
        "linear router": ("linear",),
        "cosine router": ("cosine",),
        "AC router": ("ac",),
        "experts fixed by position": ("hash",),
        "experts fixed by byte": ("hash-token",),
        "dense": ("dense",),
    },
)


class Setting(NamedTuple):
    title: str
    study: str
    runs: list[study.Run]
    frame: pd.DataFrame  # one row a run
    columns: Columns
    measure: str  # the score: "accuracy", or of text "cross-entropy"

    @property
    def column(self) -> Column:
        return self.columns[self.measure]

    @property
    def sign(self) -> int:
        """Of a difference that is good."""
        return 1 if self.measure == "accuracy" else -1

    def arm(self, candidates: Sequence[str]) -> str | None:
        return next((arm for arm in candidates if (self.frame["arm"] == arm).any()), None)

    def contrast(
        self, treatment: str, control: str, measure: str | None = None
    ) -> stats.PairedComparison | None:
        return tables.contrast(self.frame, treatment, control, measure or self.measure)


def settings(profile: str, remedy: Remedy) -> list[Setting]:
    """Those with results whose claims count, confirmatory ones first."""
    found = []
    for name in remedy.studies:
        for dataset, runs in selection.evidence(profile, name).items():
            if dataset in OUTSIDE:
                continue
            text = "language" in name
            columns = LANGUAGE_COLUMNS if text else VISION_COLUMNS if remedy is AC else COLUMNS
            measure = "cross-entropy" if text else "accuracy"
            columns = {key: columns[key] for key in dict.fromkeys((measure, "cross-entropy", EXPERTS))}
            frame = frame_of(study.results(runs), columns)
            found.append(Setting(title(name, dataset), runs[0].study, runs, frame, columns, measure))
    return sorted(found, key=lambda one: one.study not in CONFIRMATORY)


EXPERTS = "effective experts"
EXPLORED = " (exploratory)"


def everywhere(profile: str) -> list[Setting]:
    return [one for remedy in (SNNL, AC) for one in settings(profile, remedy)]


def table(profile: str, remedy: Remedy, arms: Sequence[str] = ()) -> pd.DataFrame:
    """A row a setting: mean test score of each arm over its seeds, what the remedy gains over its reference
    [95 % interval, paired by seed], and the effective experts without and with it.

    Args:
        arms: headings of the remedy to show, and the gain alone beside them; none: all.
    """
    rows = {}
    for one in settings(profile, remedy):
        row = {}
        for heading in arms or remedy.arms:
            arm = one.arm(remedy.arms[heading])
            scale, decimals = one.column.scale, max(1, one.column.decimals - 1)
            mean = one.frame.loc[one.frame["arm"] == arm, one.measure].mean() * scale
            row[heading] = "-" if arm is None else f"{rounded(mean, decimals):.{decimals}f}"
            if arm == remedy.treatment:
                row["gain [95 %]"] = _difference(one, arm, remedy.reference)
        used = [f"{experts(one, arm)[0]:.1f}" for arm in (remedy.reference, remedy.treatment)]
        if "nan" not in used and not arms:
            row["effective experts, without → with"] = (
                f"{used[0]} → {used[1]} of {experts(one, remedy.reference)[1]}"
            )
        unit = " (nats ↓)" if one.sign < 0 else ""
        rows[f"{one.title}{unit}{'' if one.study in CONFIRMATORY else EXPLORED}"] = row
    shown = pd.DataFrame.from_dict(rows, orient="index").fillna("-").rename_axis("setting")
    return shown.loc[:, (shown != "-").any()]


def _difference(one: Setting, treatment: str, control: str) -> str:
    found = one.contrast(treatment, control)
    if found is None:
        return "-"
    shown = tables.show(found, one.column)
    return f"{shown['difference']} {shown['95 % interval']}"


def experts(one: Setting, arm: str) -> tuple[float, int]:
    """Effective experts of an arm, mean over its seeds (NaN without any), and how many it has."""
    models: list[Any] = [run.model for run in one.runs if run.arm == arm]
    number = getattr(models[0], "trunk", models[0]).num_experts if models else 0
    return one.frame.loc[one.frame["arm"] == arm, EXPERTS].mean(), number


COMPARED = (  # contrasts in accuracy and cross-entropy
    ("snnl", "base"), ("snnl", "uniform-gate"), ("snnl", "hash-gate"), ("uniform-snnl", "uniform-gate"),
    ("snnl", "dense"), ("snnl", "dense-snnl"),
)  # fmt: skip


def both_scores(profile: str) -> pd.DataFrame:
    """SNNL against what has no SNNL, no learned gate or no mixture: by accuracy, which decides, and by
    cross-entropy, which was not declared."""
    rows = []
    for one in settings(profile, SNNL):
        for treatment, control in COMPARED:
            for measure in ("accuracy", "cross-entropy"):
                if (found := one.contrast(treatment, control, measure)) is not None:
                    column = one.columns[measure]
                    rows.append(
                        {"setting": one.title, "measure": column.title(measure)}
                        | {"contrast": f"{treatment} - {control}"}
                        | tables.show(found, column)
                    )
    return tables.comparisons(rows, ["setting", "measure", "contrast"])


# ------------------------------------------------------------------------------------------ figure


def effects(profile: str) -> Figure:
    """Every arm's difference from the plain model of its setting, good to the right."""
    drawn: list[tuple[Remedy, list[Setting]]] = []
    for remedy in (SNNL, AC):
        own = settings(profile, remedy)
        for measure in ("accuracy", "cross-entropy"):
            if part := [one for one in own if one.measure == measure]:
                drawn.append((remedy, part))
    if not drawn:
        return note(NO_RUNS)
    heights = [len(part) + 1.1 for _, part in drawn]
    figure, axes = new_figure(8.7, 0.5 * sum(heights) + 0.6, len(drawn), height_ratios=heights)
    for axis, (remedy, part) in zip(axes[:, 0], drawn, strict=True):
        _effects(axis, remedy, part)
    return captioned(
        figure,
        "Test score of every arm minus that of the plain MoE, or of the linear router, paired by seed, with "
        "95 % intervals; right of 0 is better. A remedy helps where its square lies right of 0; learned "
        "routing pays where the arms without it lie left of 0. No mark: not run.",
    )


def _effects(axis: Any, remedy: Remedy, part: Sequence[Setting]) -> None:
    shown = {heading: arms for heading, arms in remedy.arms.items() if remedy.reference not in arms}
    shown = {heading: arms for heading, arms in shown.items() if any(one.arm(arms) for one in part)}
    offsets = np.linspace(-0.32, 0.32, len(shown))
    for offset, (heading, arms) in zip(offsets, shown.items(), strict=True):
        colour, marker = ARM_STYLE[arms[0]]
        label: str | None = heading
        for at, one in enumerate(part):
            arm = one.arm(arms)
            found = one.contrast(arm, remedy.reference) if arm else None
            if found is None:
                continue
            scale = one.sign * one.column.scale
            ends = [scale * found.low, scale * found.high]
            axis.plot(ends, [at + offset] * 2, color=colour, lw=1.6)
            style = {"color": colour, "ms": 7, "mec": "white", "mew": 0.6, "label": label}
            axis.plot(scale * found.difference, at + offset, marker, **style)
            label = None
    axis.axvline(0, color="#333333", lw=1)
    for at in range(1, len(part)):
        axis.axhline(at - 0.5, color="#dddddd", lw=0.8)
    names = [one.title + ("" if one.study in CONFIRMATORY else f"\n{EXPLORED.strip()}") for one in part]
    axis.set_yticks(range(len(part)), names)
    axis.set(ylim=(len(part) - 0.5, -0.5))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    accuracy = part[0].measure == "accuracy"
    unit = "points of accuracy above" if accuracy else "nats of cross-entropy below"
    axis.set_title(f"{remedy.name}: {unit} the {in_words(remedy.reference)}", loc="left", fontsize=10)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, handletextpad=0.2, frameon=False)
