"""One function a figure; each takes result dictionaries or tensors and returns a matplotlib Figure.

Colours are Okabe and Ito's (told apart with any colour vision); where a colour means an arm it means
that arm in every figure.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moe_lib import metrics
from moe_lib.metrics.collapse import collapse, trajectory
from moe_study import stats, store
from moe_study.configs.dose import Panel
from moe_study.data import DATASETS, ROOT
from moe_study.data.text import CORPORA
from moe_study.report import tables
from moe_study.report.tables import Result, look_up
from moe_study.trust import TRUTH
from moe_study.verdicts import Verdict

PALETTE = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999933")
ARM_STYLE = {  # colour, marker
    "base": (PALETTE[2], "o"),
    "snnl": (PALETTE[1], "s"),
    "dense": ("#7f7f7f", "o"),
    "dense-snnl": (PALETTE[3], "s"),
    "base-balance": (PALETTE[4], "^"),
    "snnl-shuffled": (PALETTE[5], "v"),
    "base-aux": (PALETTE[6], "D"),
    "uniform-gate": (PALETTE[7], "P"),
    "uniform-snnl": ("#7b3294", "X"),
    "snnl-weaker": ("#f2a27a", "s"),
    "raw": (PALETTE[0], "X"),
    "snnl-pretrained": ("#8c564b", "<"),
    "ce-pretrained": ("#4b6e8c", ">"),
    "linear": ("#7f7f7f", "o"),
    "cosine": (PALETTE[2], "o"),
    "ac": (PALETTE[4], "s"),
    "ac-shuffled": (PALETTE[5], "v"),
    "ac-row": (PALETTE[6], "D"),
    "ac-pooled": (PALETTE[3], "P"),
    "ac-matched": (PALETTE[1], "^"),
    "ac-causal": (PALETTE[0], "X"),
    "hash": (PALETTE[7], "P"),
    "hash-token": ("#8c564b", "X"),
    "snnl-ac": (PALETTE[0], "D"),
}
RETINA = 2  # pixels of a picture per pixel of the page that shows it
OWN_COLOURS = ("#e6550d", "#31a354", "#756bb1", "#636363", "#3182bd", "#b5651d")
OWN_MARKERS = "^vD<>*"
STYLE: Any = {
    "figure.dpi": 96,
    "savefig.dpi": 96 * RETINA,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}
DATASET_TITLES = {name: info.title for name, info in (DATASETS | CORPORA).items()}
UNITS = {  # of a column of `tables`: shown is the value times this, in this unit; others as they are
    **dict.fromkeys(("accuracy", "lost to corruption", "lost to attack"), (100.0, "points")),
    **dict.fromkeys(("cross-entropy", "validation area", "lost to swap"), (1.0, "nats")),
    **dict.fromkeys(("H(E|x)", "H(E|c)", "I(x;E)"), (1.0, "nats")),
}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _note(text: str) -> Figure:
    """In place of a figure that has nothing to show."""
    figure, axes = new_figure(6, 1)
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center")
    axes[0, 0].set_axis_off()
    return figure


def arm_style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm; one of your own gets a pair that depends on its name alone."""
    if arm in ARM_STYLE:
        return ARM_STYLE[arm]
    number = zlib.crc32(arm.encode())
    return OWN_COLOURS[number % len(OWN_COLOURS)], OWN_MARKERS[number // 97 % len(OWN_MARKERS)]


def _arms(results: Sequence[Result], wanted: Sequence[str] | None = None) -> dict[str, list[dict]]:
    """Results by arm, in the order of ARM_STYLE; arms of your own follow, in the order of the results."""
    names = dict.fromkeys([*ARM_STYLE, *(r["run"]["arm"] for r in results)])
    names_wanted = [name for name in names if wanted is None or name in wanted]
    grouped = {name: [r for r in results if r["run"]["arm"] == name] for name in names_wanted}
    return {arm: group for arm, group in grouped.items() if group}


def training_curves(results: Sequence[Result], arms: Sequence[str] | None = None) -> Figure:
    """Validation cross-entropy, accuracy and a measure of routing over epochs: mean, and range over seeds."""
    routing = ("information", "I(x;E), validation (nats)", 1.0)
    if "effective_experts" in results[0]["history"]["validation"]:
        routing = ("effective_experts", "effective experts, validation", 1.0)
    panels = (
        ("cross_entropy", "validation cross-entropy (nats)", 1.0),
        ("accuracy", "validation accuracy (%)", 100.0),
        routing,
    )
    figure, axes = new_figure(11, 3.4, 1, 3)
    for axis, (key, title, scale) in zip(axes[0], panels, strict=True):
        for arm, group in _arms(results, arms).items():
            colour, marker = arm_style(arm)
            curves_SE = np.array([_curve(r["history"]["validation"], key) for r in group]) * scale
            epochs = np.arange(1, curves_SE.shape[1] + 1)
            axis.plot(epochs, curves_SE.mean(0), color=colour, marker=marker, markersize=4, label=arm)
            if len(group) > 1:
                axis.fill_between(epochs, curves_SE.min(0), curves_SE.max(0), color=colour, alpha=0.15, lw=0)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _curve(validation: dict[str, list[float]], key: str) -> list[float]:
    if key == "information":
        pairs = zip(validation["marginal"], validation["per_sample"], strict=True)
        return [marginal - per_sample for marginal, per_sample in pairs]
    return validation[key]


def accuracy_by_arm(results: Sequence[Result]) -> Figure:
    """Test accuracy: every seed a dot, the mean and its 95 % interval beside them."""
    grouped = _arms(results)
    figure, axes = new_figure(7.5, 0.42 * len(grouped) + 1.2)
    axis = axes[0, 0]
    for row, (arm, group) in enumerate(grouped.items()):
        colour, marker = arm_style(arm)
        values = np.array([r["task"]["accuracy"] for r in group]) * 100
        axis.plot(values, np.full(len(values), row), "o", color=colour, alpha=0.4, markersize=5, mew=0)
        low, high = stats.t_interval(values) if len(values) > 1 else (values[0], values[0])
        axis.plot([low, high], [row + 0.22] * 2, color=colour, lw=2, solid_capstyle="butt")
        axis.plot(values.mean(), row + 0.22, marker, color=colour, markersize=6)
    axis.set_yticks(range(len(grouped)), [f"{arm} ({len(group)})" for arm, group in grouped.items()])
    axis.set(
        xlabel="test accuracy (%): seeds as dots; mean and 95 % t interval below them",
        ylim=(len(grouped) - 0.4, -0.6),
    )
    axis.grid(axis="x", alpha=0.3)
    return figure


def tsne_panels(results: Sequence[Result]) -> Figure:
    """Test codes before and after training, arm by arm, coloured by class (ten classes at most). Before
    training they are drawn once where all arms start from the same."""
    shown = {a: g[0]["tsne"] for a, g in _arms([r for r in results if "tsne" in r]).items()}
    panels = [
        (f"{arm}, {moment} training", points[moment], np.array(points["labels"]))
        for arm, points in shown.items()
        for moment in ("before", "after")
    ]
    wide = 2
    if all(start == panels[0][1] for _, start, _ in panels[::2]):
        panels = [("before training", *panels[0][1:]), *panels[1::2]]
        wide = min(len(panels), 3)
    rows = -(-len(panels) // wide)
    figure, axes = new_figure(4.2 * wide, 3.9 * rows + 0.4, rows, wide)
    colours = sns.color_palette("colorblind", 10)
    for axis, (title, coordinates, labels) in zip(axes.flat, panels, strict=False):
        points = np.array(coordinates)
        others = labels >= 10
        axis.plot(*points[others].T, ".", color="#cccccc", markersize=3, zorder=0)
        for c in range(min(10, labels.max() + 1)):
            own = points[labels == c]
            axis.plot(*own.T, ".", color=colours[c], markersize=5)
            for x, y in own[:: max(len(own) // 3, 1)][:3]:
                axis.text(x, y, str(c), fontsize=7, color="black", ha="center", va="center")
        axis.set(title=title, xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    note = "numbers and colours: classes" + ("; classes 10 and above in grey" if others.any() else "")
    figure.supxlabel(f"t-SNE of {len(labels)} test codes, same seed; axes have no unit\n{note}", fontsize=9)
    return figure


def routing_heatmap(results: Sequence[Result], arms: Sequence[str] = ("base", "snnl")) -> Figure:
    """Mean gate of each class, for the first seed of each arm; a row is the same class in every arm, ordered
    by the first arm's preferred expert."""
    shown = {arm: group[0] for arm, group in _arms(results, arms).items()}
    first, result = next(iter(shown.items()))
    gates_CE = np.array(result["routing"]["class_expert"], dtype=float)
    order = np.lexsort((-gates_CE.max(1), gates_CE.argmax(1)))
    few = len(order) <= 20
    size = 3.4 * len(shown) + 1.4, 4.6 if few else 6.5
    figure, axes = new_figure(*size, 1, len(shown), sharey=True)
    for axis, (arm, result) in zip(axes[0], shown.items(), strict=True):
        gates_CE = np.array(result["routing"]["class_expert"], dtype=float)
        picture = axis.imshow(gates_CE[order], cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{arm}, seed {result['run']['seed']}", xlabel="expert")
        axis.set_xticks(range(gates_CE.shape[1]))
    names = DATASETS[result["run"]["dataset"]].classes or [""] * len(order)
    labels = [f"{c} {names[c]}".strip() for c in order] if few else []
    axes[0, 0].set_yticks(range(len(labels)), labels)
    whole = "class" if few else f"{len(order)} classes"
    axes[0, 0].set_ylabel(f"{whole}, by {first}'s preferred expert")
    figure.colorbar(picture, ax=axes, label="mean gate probability", shrink=0.8)
    return figure


def similarity_with_nulls(results: Sequence[Result], arms: Sequence[str] = ("base", "snnl")) -> Figure:
    """Each similarity of experts: trained together, before training, and trained alone (the null)."""
    panels = (
        ("weights", "mean |cosine| of weights"),
        ("weights_aligned", "the same, units aligned"),
        ("outputs", "cosine of centred logits"),
        ("cka", "linear CKA of logits"),
    )
    sources = (
        ("similarity", "trained together", "o", True),
        ("null.similarity", "null: trained alone", "D", False),
        ("initial.similarity", "before training", "|", False),
    )
    grouped = _arms(results, arms)
    figure, axes = new_figure(11, 3.2, 1, 4)
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        for row, (arm, group) in enumerate(grouped.items()):
            for offset, (source, label, marker, filled) in enumerate(sources):
                values = [v for r in group if (v := look_up(r, f"{source}.{key}")) is not None]
                height = row + 0.22 * (offset - 1)
                axis.plot(
                    values, [height] * len(values), marker, color=arm_style(arm)[0], alpha=0.75,
                    markersize=7 if marker == "|" else 5, mfc=None if filled else "none",
                    ls="none", label=label if row == 0 else None,
                )  # fmt: skip
        if key == "weights":
            floor = metrics.similarity_floor(results[0]["expert_parameters"])
            axis.axvline(floor, color="#555555", ls=":", lw=1.2, label="floor: random vectors")
        axis.set_yticks(range(len(grouped)), list(grouped) if key == "weights" else [])
        axis.set(title=title, ylim=(len(grouped) - 0.4, -0.6))
        axis.grid(axis="x", alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=4)
    for handle in legend.get_lines():
        handle.set_color("#333333")
    return figure


# -------------------------------------------------------------------------- AC and crossed studies


def _draw_mean(axis: Any, arm: str, x: Sequence[float], values_SX: np.ndarray) -> None:
    """Mean over seeds against x, with its 95 % t interval as a band."""
    colour, marker = arm_style(arm)
    axis.plot(x, values_SX.mean(0), color=colour, marker=marker, markersize=4, label=arm)
    if len(values_SX) > 1:
        low, high = np.array([stats.t_interval(column) for column in values_SX.T]).T
        axis.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)


def _legend(figure: Figure, axis: Any, columns: int = 4) -> None:
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))  # each arm once
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def corruption_by_severity(
    results: Sequence[Result], arms: Sequence[str] = ("linear", "cosine", "ac")
) -> Figure:
    """Accuracy lost to each kind of corruption against its severity: mean and 95 % interval over seeds."""
    grouped = _arms(results, arms)
    kinds = [kind for kind in next(iter(grouped.values()))[0]["corruption"] if kind != "clean"]
    rows = -(-len(kinds) // 3)
    figure, axes = new_figure(10, 2.7 * rows + 0.5, rows, 3, sharex=True, sharey=True)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for arm, group in grouped.items():
            lost_SX = [r["corruption"]["clean"] - np.array(r["corruption"][kind]) for r in group]
            _draw_mean(axis, arm, range(1, 6), 100 * np.array(lost_SX))
        axis.axhline(0, color="#999999", lw=0.8, zorder=0)
        axis.set(title=kind.replace("_", " "), xticks=range(1, 6))
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    figure.supylabel("accuracy lost against clean (points), by severity", fontsize=10)
    _legend(figure, axes[0, 0])
    return figure


def swap_curve(results: Sequence[Result], arms: Sequence[str] | None = None) -> Figure:
    """Cross-entropy lost against the share of words that became <unk>: on the targets left alone, and on all
    of them. Mean and 95 % interval over seeds."""
    figure, axes = new_figure(9, 3.6, 1, 2)
    for arm, group in _arms(results, arms).items():
        shares = sorted(group[0]["swap"], key=float)
        percent = [100 * float(share) for share in shares]
        swaps = [[r["swap"][share] for share in shares] for r in group]
        own_SX = np.array([[s["swapped"] - s["clean"] for s in row] for row in swaps])
        all_SX = np.array([[s["all"] - row[0]["all"] for s in row] for row in swaps])
        _draw_mean(axes[0, 0], arm, percent, own_SX)
        _draw_mean(axes[0, 1], arm, percent, all_SX)
    axes[0, 0].set(title="targets left alone", ylabel="cross-entropy lost (nats a token)")
    axes[0, 1].set(title="all targets, <unk> itself among them")
    for axis in axes[0]:
        axis.set(xlabel="words swapped (%)")
        axis.grid(axis="y", alpha=0.3)
    _legend(figure, axes[0, 0])
    return figure


def changed_choices(results: Sequence[Result]) -> Figure:
    """Share of tokens that M sends to other experts than M = I would in the same model, layer by layer: seeds
    as dots, their mean as a bar."""
    grouped = {
        arm: group
        for arm, group in _arms(results).items()
        if any(layer["changed"] for layer in group[0]["routing"]["layers"])
    }
    if not grouped:
        raise ValueError("no arm here has an M: its first layers never do, nor have other routers")
    layers = next(iter(grouped.values()))[0]["routing"]["layers"]
    with_scales = [at for at, layer in enumerate(layers) if layer["changed"]]
    figure, axes = new_figure(9, 3.4, 1, 2, sharey=True)
    width = 0.8 / max(len(grouped), 1)
    for axis, (key, title) in zip(
        axes[0], (("best", "best expert changed"), ("chosen", "set of chosen experts changed")), strict=True
    ):
        for place, (arm, group) in enumerate(grouped.items()):
            for at in with_scales:
                values = np.array([r["routing"]["layers"][at]["changed"][key] for r in group]) * 100
                x = at + 1 - 0.4 + width * (place + 0.5)
                colour, marker = arm_style(arm)
                axis.bar(x, values.mean(), 0.85 * width, color=colour, alpha=0.35)
                axis.plot(np.full(len(values), x), values, marker, color=colour, ms=4, mew=0, label=arm)
        axis.set(title=title, xlabel="MoE layer")
        axis.set_xticks(1 + np.array(with_scales), [f"{at + 1}" for at in with_scales])
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("tokens (%)")
    _legend(figure, axes[0, 0], 6)
    return figure


def expert_load(results: Sequence[Result]) -> Figure:
    """Share of the tokens that each expert is best for, one panel a MoE layer; experts are ordered by load in
    each run, then averaged over seeds."""
    grouped = _arms(results)
    layers = len(results[0]["routing"]["layers"])
    figure, axes = new_figure(3.6 * layers + 1.2, 0.34 * len(grouped) + 1.5, 1, layers, sharey=True)
    shares_LAE = 100 * np.array(
        [
            [
                np.mean(
                    [sorted(r["routing"]["layers"][at]["load"]["share"], reverse=True) for r in group], axis=0
                )
                for group in grouped.values()
            ]
            for at in range(layers)
        ]
    )
    for at, axis in enumerate(axes[0]):
        picture = axis.imshow(shares_LAE[at], cmap="viridis", vmin=0, vmax=shares_LAE.max(), aspect="auto")
        axis.set(title=f"MoE layer {at + 1}", xlabel="expert, by load", yticks=range(len(grouped)))
        axis.set_yticklabels(list(grouped))
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=axes, label="tokens (%)", shrink=0.9)
    return figure


def paired_differences(
    results: Sequence[Result],
    pairs: Sequence[tuple[str, str]],
    claims: tables.Claims,
    columns: tables.Columns,
) -> Figure:
    """For each claimed measure, treatment minus control: every seed a dot, the mean and its 95 % t interval.

    The side of zero that the claim asks for is shaded. Pairs that no two seeds have are left out.
    """
    runs = tables.frame(results, columns)
    measures = [(claim, *one) for claim, ones in claims.items() for one in ones]
    found = {(pair, column): tables.paired(runs, pair, column) for pair in pairs for _, column, _ in measures}
    pairs = [pair for pair in pairs if any(found[pair, column] is not None for _, column, _ in measures)]
    if not pairs:
        return _note("no two seeds yet that have treatment and control")
    wide = -(-len(measures) // (2 if len(measures) > 3 else 1))
    rows = -(-len(measures) // wide)
    figure, axes = new_figure(3.3 * wide + 1.4, rows * (0.36 * len(pairs) + 1.5), rows, wide, sharey=True)
    for axis, (claim, column, direction) in zip(axes.flat, measures, strict=False):
        scale, unit = UNITS.get(column, (1.0, ""))
        reach = 0.0
        for row, (treatment, control) in enumerate(pairs):
            both = found[(treatment, control), column]
            if both is None:
                continue
            differences = scale * (both[treatment] - both[control]).to_numpy()
            low, high = stats.t_interval(differences)
            colour, marker = ARM_STYLE[control]
            axis.plot(differences, np.full(len(differences), row), "o", color=colour, alpha=0.4, ms=4, mew=0)
            axis.plot([low, high], [row + 0.25] * 2, color=colour, lw=2, solid_capstyle="butt")
            axis.plot(differences.mean(), row + 0.25, marker, color=colour, markersize=6)
            reach = max(reach, abs(low), abs(high), *np.abs(differences))
        reach = 1.08 * reach or 1.0
        axis.axvspan(*((0, reach) if direction == "higher" else (-reach, 0)), color="#f0f0f0", lw=0, zorder=0)
        axis.axvline(0, color="#333333", lw=1)
        axis.set(
            title=f"{claim}:\n{column}", xlabel=unit, xlim=(-reach, reach), ylim=(len(pairs) - 0.4, -0.6)
        )
        axis.locator_params(axis="x", nbins=5)
    for axis in axes.flat[len(measures) :]:
        axis.set_visible(False)
    axes[0, 0].set_yticks(range(len(pairs)), [f"{a} - {b}" for a, b in pairs])
    figure.supxlabel(
        "difference: seeds as dots; mean and 95 % t interval below; shaded: as claimed", fontsize=9
    )
    return figure


WORD_COLOURS = {
    "supported": PALETTE[4],
    "contradicted": PALETTE[1],
    "smaller than claimed": PALETTE[3],
    "undecided": PALETTE[2],
    "not testable here": "#8a8a8a",
    "pilot": "#8a8a8a",
}
REACH = 6.0  # of the axis of `verdict_forest`, in margins


def verdict_forest(verdicts: Sequence[Verdict]) -> Figure:
    """Every claim against each of its controls, in units of the difference that counts: the published one, or
    the declared margin. 0 is no difference, 1 the claimed one. An interval that leaves the axis ends in an
    arrow."""
    figure, axes = new_figure(9.5, 0.3 * len(verdicts) + 1.3)
    axis = axes[0, 0]
    axis.axvline(0, color="#333333", lw=1)
    axis.axvline(1, color="#333333", lw=1, ls="--")
    names = []
    for row, verdict in enumerate(verdicts):
        claim, found = verdict.claim, verdict.comparison
        contrast = f"{claim.treatment} - {verdict.control}"
        names.append(f"{claim.wording}, {DATASET_TITLES[verdict.dataset]}: {contrast}")
        colour = WORD_COLOURS[verdict.word]
        axis.text(REACH + 0.2, row, verdict.word, color=colour, va="center", fontsize=9, clip_on=False)
        if found is None:
            continue
        unit = claim.measure.sign * verdict.margin
        low, high = sorted((found.low / unit, found.high / unit))
        axis.plot(np.clip([low, high], -REACH, REACH), [row] * 2, color=colour, lw=2, solid_capstyle="butt")
        for end, edge, arrow in ((low, -REACH, "<"), (high, REACH, ">")):
            if abs(end) > REACH and (end < 0) == (edge < 0):
                axis.plot(edge, row, arrow, color=colour, markersize=7)
        if abs(found.difference / unit) <= REACH:
            filled = colour if verdict.word != "pilot" else "white"
            axis.plot(found.difference / unit, row, "o", color=colour, mfc=filled, markersize=6)
    axis.set_yticks(range(len(verdicts)), names)
    axis.set(xlim=(-REACH - 0.1, REACH + 0.1), ylim=(len(verdicts) - 0.4, -0.6))
    axis.grid(axis="x", alpha=0.3)
    figure.supxlabel(
        "difference in the claimed direction and its 95 % t interval\n"
        "0: none; 1: the published difference, or the declared margin; hollow: pilot",
        fontsize=9,
    )
    return figure


def crossed_lines(results: Sequence[Result], names: Sequence[str] = tables.CROSSED_MEASURES) -> Figure:
    """Each measure without and with AC, one line without and one with SNNL: parallel lines, no interaction.
    Seeds as dots, means as lines."""
    runs = tables.frame(results, tables.VISION_COLUMNS)
    rows = -(-len(names) // 3)
    figure, axes = new_figure(9.5, 2.7 * rows + 0.5, rows, 3)
    for axis, name in zip(axes.flat, names, strict=False):
        for label, ends, shift in (("no SNNL", ("base", "ac"), -0.04), ("SNNL", ("snnl", "snnl-ac"), 0.04)):
            colour, marker = ARM_STYLE[ends[0]]
            values = [runs.loc[runs["arm"] == arm, name].dropna().to_numpy() for arm in ends]
            for x, own in enumerate(values):
                axis.plot(np.full(len(own), x + shift), own, "o", color=colour, alpha=0.4, ms=4, mew=0)
            means = [own.mean() if len(own) else np.nan for own in values]
            axis.plot((shift, 1 + shift), means, color=colour, marker=marker, label=label)
        axis.set(title=name, xticks=(0, 1), xticklabels=("cosine", "ac"), xlim=(-0.4, 1.4))
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    _legend(figure, axes[0, 0])
    return figure


BETTER = {"accuracy": 1, "cross-entropy": -1, "validation area": -1}  # of the others neither way is
FURTHEST = 3  # half-widths of an interval: where the colours of `dose_heatmaps` end
DOSE_COLOURS = {  # has a better way: colours (pale enough for black text), least value, meaning
    True: (
        ListedColormap(mpl.colormaps["PuOr_r"](np.linspace(0.19, 0.81, 255))),
        -FURTHEST,
        "orange better, purple worse",
    ),
    False: (
        ListedColormap(mpl.colormaps["Greys"](np.linspace(0, 0.5, 255))),
        0,
        "grey: neither way is better",
    ),
}


def dose_heatmaps(runs: pd.DataFrame, panel: Panel, names: Sequence[str]) -> Figure:
    """Each measure's difference from the control over a grid of doses, with its 95 % t interval below it;
    framed where that excludes 0.

    Colour is the difference in half-widths of its interval, so that 1 is just told apart from 0. Rows and
    columns without any number are left out.
    """
    (down, rows), (across, heads) = panel.labels
    effects = {name: tables.dose_effects(runs, panel, name) for name in names}
    filled = [at for found in effects.values() for at, one in found.items() if one is not None]
    if not filled:
        return _note("no dose yet that two seeds share with its control")
    lines = sorted({row for row, _ in filled})
    columns = sorted({at for _, at in filled}, key=lambda at: (not _is_number(heads[at]), at))
    wide = 2 if len(names) > 1 else 1
    tall = -(-len(names) // wide)
    schemes: dict[bool, Any] = {}  # of those in use, a picture
    bars = len({name in BETTER for name in names})
    size = (
        wide * (max(1.25 * len(columns), 1.9) + 0.9) + 0.9,
        tall * (0.48 * len(lines) + 0.6) + 0.8 * bars + 0.3,
    )
    figure, axes = new_figure(*size, tall, wide, sharex=True, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        scale, unit = UNITS.get(name, (1.0, ""))
        decimals = 2 if unit == "points" else 3
        colours = np.full((len(lines), len(columns)), np.nan)
        for y, x in np.ndindex(colours.shape):
            found = effects[name][lines[y], columns[x]]
            if found is None:
                axis.text(x, y, "-", ha="center", va="center")
                continue
            half = max((found.high - found.low) / 2, np.finfo(float).tiny)
            colours[y, x] = np.clip(found.difference / half, -FURTHEST, FURTHEST)
            difference, low, high = (
                f"{tables.rounded(scale * value, decimals):+.{decimals}f}"
                for value in (found.difference, found.low, found.high)
            )
            axis.text(x, y - 0.16, difference, ha="center", va="center")
            axis.text(x, y + 0.22, f"[{low}, {high}]", ha="center", va="center", fontsize=8)
            if found.low > 0 or found.high < 0:
                axis.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, ec="black", lw=1.5))
        colours = BETTER[name] * colours if name in BETTER else np.abs(colours)
        cmap, least, _ = DOSE_COLOURS[name in BETTER]
        schemes[name in BETTER] = axis.imshow(colours, cmap=cmap, vmin=least, vmax=FURTHEST, aspect="auto")
        axis.set(title=f"{name} ({unit})" if unit else name)
        axis.set_xticks(range(len(columns)), [heads[at] for at in columns])
        axis.set_yticks(range(len(lines)), [rows[at] for at in lines])
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(across)
    figure.supylabel(down)
    for directed, picture in sorted(schemes.items()):  # stacked upwards
        bar = figure.colorbar(
            picture, ax=axes, location="bottom", aspect=50, shrink=0.7,
            ticks=range(-FURTHEST, FURTHEST + 1), extend="both" if directed else "max",
        )  # fmt: skip
        unit = "difference in half-widths of its 95 % interval (1: just told apart from 0)"
        bar.set_label(f"{DOSE_COLOURS[directed][2]}\n{unit}", fontsize=9)
    return figure


def _is_number(label: str) -> bool:
    return label.replace(".", "").isdigit()


# ------------------------------------------------------------------------- collapse, planted and found

FAULT_TITLES = {  # of the ladders of `trust`
    "noise": "gates exchanged",
    "collapse": "sent to one expert",
    "blind": "gate goes blind",
    "split": "needless experts",
    "alike": "experts alike",
    "overlap": "groups overlap",
    "noise, crossed": "exchanged, classes unrelated",
}
SIGHT = (  # at least this score: mark, meaning, colour, text colour
    (0.9, "✓", "sees it", PALETTE[2], "white"),
    (0.3, "~", "in part", "#9CC7E4", "black"),
    (-0.3, "–", "blind", "#EDEDED", "#555555"),
    (-np.inf, "✗", "wrong sign: calls it better", PALETTE[1], "white"),
)


def trust_grid(scores: pd.DataFrame) -> Figure:
    """Which measure sees which planted fault: `trust.signed_scores`, the measures that see most on top, the
    truth below them."""
    marks = scores[list(FAULT_TITLES)].map(lambda score: next(s for s in SIGHT if score >= s[0]))
    seen = marks.map(lambda mark: {"✓": 1, "~": 0.5, "–": 0, "✗": -1}[mark[1]]).sum(axis=1)
    seen[TRUTH] = -np.inf
    marks = marks.loc[seen.sort_values(ascending=False, kind="stable").index]
    figure, axes = new_figure(5.0, 0.31 * len(marks) + 2.2)
    axis = axes[0, 0]
    for y, row in enumerate(marks.to_numpy()):
        for x, (_, mark, _, colour, ink) in enumerate(row):
            axis.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=colour, lw=0))
            axis.text(x, y, mark, color=ink, ha="center", va="center", fontsize=12)
    axis.set_xticks(range(len(FAULT_TITLES)), list(FAULT_TITLES.values()), rotation=50, ha="left", fontsize=9)
    axis.axhline(len(marks) - 1.5, color="#333333", lw=1)
    axis.set_yticks(range(len(marks)), marks.index, fontsize=10)
    axis.set(xlim=(-0.5, len(FAULT_TITLES) - 0.5), ylim=(len(marks) - 0.5, -0.5))
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    handles = [Patch(color=colour, label=f"{mark} {meaning}") for _, mark, meaning, colour, _ in SIGHT]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, handlelength=1)
    return figure


def collapse_panel(results: Sequence[Result], arms: Sequence[str] = ("base", "snnl")) -> Figure:
    """Routing and representational collapse over training (mean, and range over seeds), and all three kinds
    of the selected model beside their nulls, seed by seed. 0: specialists; 1: one expert would do."""
    kinds = ("routing", "representational", "functional")
    figure, axes = new_figure(11, 3.4, 1, 3)
    grouped = _arms(results, arms)
    for row, (arm, group) in enumerate(grouped.items()):
        colour, marker = arm_style(arm)
        for axis, kind in zip(axes[0], kinds[:2], strict=False):
            curves_SE = np.array([trajectory(r)[kind] for r in group])
            epochs = np.arange(1, curves_SE.shape[1] + 1)
            axis.plot(epochs, curves_SE.mean(0), color=colour, marker=marker, markersize=4, label=arm)
            axis.fill_between(epochs, curves_SE.min(0), curves_SE.max(0), color=colour, alpha=0.15, lw=0)
        for place, kind in enumerate(kinds):
            degrees = [getattr(collapse(r), kind) for r in group]
            height = place + (row - (len(grouped) - 1) / 2) * 0.34
            values, nulls = np.array(degrees).T
            heights = np.full(len(degrees), height)
            axes[0, 2].plot(values, heights, marker, color=colour, alpha=0.5, ms=5, mew=0)
            axes[0, 2].plot(nulls, heights + 0.12, "|", color="#333333", alpha=0.6, ms=6)
    for axis, kind in zip(axes[0], kinds[:2], strict=False):
        axis.set(title=f"{kind}, validation", xlabel="epoch", ylim=(-0.03, 1.03))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 2].set_yticks(range(3), kinds)
    axes[0, 2].set(title="selected model, test", xlim=(-0.03, 1.03), ylim=(2.6, -0.6))
    axes[0, 2].grid(axis="x", alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="#333333", marker="|", ls="none"))
    figure.legend(handles, [*labels, "null of a seed"], loc="outside lower center", ncols=len(handles))
    return figure


def target(path: str | Path) -> Path:
    """Where a figure named "profile/study/dataset/name" lies."""
    return store.figures_dir() / f"{path}.png"


def save(figure: Figure, path: str | Path, sources: Sequence[Path]) -> str:
    """Write `path` (below the figures folder, without suffix) as PNG; returns its caption, and the line that
    names it and the files it came from. The picture holds these as its PNG text "Source"."""
    listing = name_sources(sources)
    drawn, packed, text = io.BytesIO(), io.BytesIO(), PngInfo()
    with mpl.rc_context(STYLE):
        figure.savefig(drawn, format="png")
    text.add_text("Source", listing)
    picture = Image.open(drawn)  # opaque, and 256 colours are enough: it takes a quarter
    flat = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(packed, "PNG", optimize=True, pnginfo=text, dpi=picture.info["dpi"])
    store.write_bytes(target(path), packed.getvalue())
    return "\n".join(filter(None, [figure.get_label(), f"figures/{path}.png <- {listing}"]))


def name_sources(sources: Sequence[Path]) -> str:
    """Result files in short: folder, arms, number of files; of several folders, what they have in common."""
    if not sources:
        return "computed in this notebook"
    folders = {path.parent for path in sources}
    folder = Path(os.path.commonpath(folders))
    base = store.results_dir()
    name = folder.relative_to(base) if folder.is_relative_to(base) else folder.relative_to(ROOT)
    if len(folders) > 1:
        return f"results/{name.as_posix()}/**/*.json ({len(sources)} files)"
    if not any("-s" in path.name for path in sources):  # no runs
        return f"results/{name.as_posix()}/{', '.join(path.name for path in sources)}"
    arms = list(dict.fromkeys(p.name.rsplit("-s", 1)[0] for p in sources))
    joined = arms[0] if len(arms) == 1 else "{" + ",".join(arms) + "}"
    return f"results/{name.as_posix()}/{joined}-s*.json ({len(sources)} files)"
