"""One function a figure; each takes result dictionaries or tensors and returns a matplotlib Figure.

Colours are Okabe and Ito's (told apart with any colour vision); where a colour means an arm it means
that arm in every figure.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
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
from scipy.optimize import linear_sum_assignment

from moe_lib import metrics
from moe_study import stats, store
from moe_study.collapse import collapse, trajectory
from moe_study.configs.dose import Panel
from moe_study.data import DATASETS
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
    "hash-gate": ("#2f4b2f", "P"),
    "hash-snnl": ("#c51b8a", "X"),
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


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns], in the project's style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def hide_from(axes: Any, count: int) -> None:
    """Of a grid of axes only the first `count` are shown."""
    for axis in axes.flat[count:]:
        axis.set_visible(False)


def note(text: str) -> Figure:
    """In place of a figure that has nothing to show."""
    figure, axes = new_figure(6, 1)
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center")
    axes[0, 0].set_axis_off()
    return figure


def captioned(figure: Figure, text: str) -> Figure:
    """A figure with what to see in it; notebook and report set it below the figure."""
    figure.set_label(" ".join(text.split()))
    return figure


def seeds_in_words(results: Sequence[Result]) -> str:
    """ "10 seeds an arm", "3 to 10 seeds an arm"."""
    counts = sorted({len(group) for group in arms_of(results).values()})
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"{many} seed{'s' if counts[-1] > 1 else ''} an arm"


def median_run(results: Sequence[Result], path: str = "routing.load.effective_experts") -> Result:
    """The run of the median seed; the lower of two."""
    ordered = sorted(results, key=lambda result: look_up(result, path) or 0.0)
    return ordered[(len(ordered) - 1) // 2]


def arm_style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm; one of your own gets a pair that depends on its name alone."""
    if arm in ARM_STYLE:
        return ARM_STYLE[arm]
    number = zlib.crc32(arm.encode())
    return OWN_COLOURS[number % len(OWN_COLOURS)], OWN_MARKERS[number // 97 % len(OWN_MARKERS)]


def arms_of(results: Sequence[Result], wanted: Sequence[str] | None = None) -> dict[str, list[dict]]:
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
    figure, axes = new_figure(9.8, 3.2, 1, 3)
    for axis, (key, title, scale) in zip(axes[0], panels, strict=True):
        for arm, group in arms_of(results, arms).items():
            mean_and_range(axis, arm, [_curve(r["history"]["validation"], key) for r in group], scale)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes[0, 0], 6)
    return captioned(
        figure,
        f"Training: does an arm learn faster (left), to a higher accuracy (middle), with more varied routing "
        f"(right)? Lines are means over seeds, bands their range; {seeds_in_words(results)}.",
    )


def mean_and_range(axis: Any, arm: str, curves: Sequence[Sequence[float]], scale: float = 1.0) -> None:
    """Mean over seeds after each epoch, and their range as a band."""
    colour, marker = arm_style(arm)
    curves_SE = scale * np.array(curves, dtype=float)
    epochs = np.arange(1, curves_SE.shape[1] + 1)
    axis.plot(epochs, curves_SE.mean(0), color=colour, marker=marker, markersize=4, label=arm)
    if len(curves) > 1:
        axis.fill_between(epochs, curves_SE.min(0), curves_SE.max(0), color=colour, alpha=0.15, lw=0)


def live_curves(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Training loss against step, a line for each model trained so far."""
    figure, axes = new_figure(6.4, 3.0)
    for arm, values in losses.items():
        axes[0, 0].plot(range(1, len(values) + 1), values, color=arm_style(arm)[0], label=arm)
    axes[0, 0].set(xlabel="step", ylabel="training cross-entropy (nats)", xlim=(0, None), ylim=(0, None))
    if losses:
        axes[0, 0].legend()
    return figure


def _curve(validation: dict[str, list[float]], key: str) -> list[float]:
    if key == "information":
        pairs = zip(validation["marginal"], validation["per_sample"], strict=True)
        return [marginal - per_sample for marginal, per_sample in pairs]
    return validation[key]


def seeds_and_mean(
    axis: Any, row: int, values_S: np.ndarray, colour: str, marker: str, size: float, below: float
) -> tuple[float, float]:
    """Every seed a dot, below them the mean and its 95 % t interval, which is returned."""
    axis.plot(values_S, np.full(len(values_S), row), "o", color=colour, alpha=0.4, markersize=size, mew=0)
    ends = stats.t_interval(values_S) if len(values_S) > 1 else (values_S[0], values_S[0])
    axis.plot(ends, [row + below] * 2, color=colour, lw=2, solid_capstyle="butt")
    axis.plot(values_S.mean(), row + below, marker, color=colour, markersize=6)
    return ends


def accuracy_by_arm(results: Sequence[Result]) -> Figure:
    """Test accuracy: every seed a dot, the mean and its 95 % interval beside them."""
    grouped = arms_of(results)
    figure, axes = new_figure(7.5, 0.33 * len(grouped) + 1.0)
    axis = axes[0, 0]
    for row, (arm, group) in enumerate(grouped.items()):
        colour, marker = arm_style(arm)
        values = np.array([r["task"]["accuracy"] for r in group]) * 100
        seeds_and_mean(axis, row, values, colour, marker, size=5, below=0.22)
    axis.set_yticks(range(len(grouped)), [f"{arm} ({len(group)})" for arm, group in grouped.items()])
    axis.set(
        xlabel="test accuracy (%)",
        ylim=(len(grouped) - 0.4, -0.6),
    )
    axis.grid(axis="x", alpha=0.3)
    return captioned(
        figure,
        "Test accuracy of every arm: each seed a dot, below them the mean and its 95 % t interval. Arms "
        "whose dots lie apart differ; in brackets the number of seeds.",
    )


def tsne_panels(results: Sequence[Result]) -> Figure:
    """Test codes before and after training, arm by arm, coloured by class: the ten with most images, where
    there are more. A second row is coloured by expert where the results hold it. Before training they are
    drawn once where all arms start from the same."""
    shown = {a: g[0] for a, g in arms_of([r for r in results if "tsne" in r]).items()}
    run = next(iter(shown.values()))["run"]
    panels = [  # title, coordinates, labels, experts where they are to be drawn
        (f"{arm}, {moment} training", points[moment], points["labels"], experts)
        for arm, points in ((arm, result["tsne"]) for arm, result in shown.items())
        for moment, experts in (("before", None), ("after", points.get("experts")))
    ]
    wide = 2
    if all(start == panels[0][1] for _, start, *_ in panels[::2]):
        panels = [("before training", *panels[0][1:]), *panels[1::2]]
        wide = min(len(panels), 3)
    rows, each = -(-len(panels) // wide), 1 + any(experts is not None for *_, experts in panels)
    figure, axes = new_figure(3.1 * wide, 2.9 * rows * each + 0.6, rows * each, wide)
    classes, counts = np.unique(np.concatenate([labels for *_, labels, _ in panels]), return_counts=True)
    chosen = np.sort(classes[np.argsort(-counts, kind="stable")[:10]])
    info = DATASETS[run["dataset"]]
    names = info.classes or [f"class {c}" for c in range(max(classes) + 1)]
    by_class = dict(zip(chosen, sns.color_palette("colorblind", 10), strict=False))
    for at, (title, coordinates, labels, experts) in enumerate(panels):
        row, column = divmod(at, wide)
        xy_N2 = np.array(coordinates)
        _points(axes[row * each, column], title, xy_N2, np.array(labels), by_class, names)
        if experts is not None:
            by_expert = {e: PALETTE[e % len(PALETTE)] for e in np.unique(experts)}
            _points(axes[row * each + 1, column], "the same, by expert", xy_N2, np.array(experts), by_expert)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_visible(axis.has_data())
    legend(figure, axes[0, 0], 5, markerscale=2.5, handletextpad=0.2)
    some = (
        f"; the ten classes with most images, of {len(info.classes or classes)}" if len(classes) > 10 else ""
    )
    return captioned(
        figure,
        f"The extractor's code of {len(panels[0][2])} test images as t-SNE sees it (seed "
        f"{run['seed']}{some}). Look whether classes form groups of one colour. Distances between groups "
        "mean little, and the axes have no unit.",
    )


def _points(
    axis: Any,
    title: str,
    xy_N2: np.ndarray,
    kind_N: np.ndarray,
    colours: Mapping[int, Any],
    names: Any = None,
) -> None:
    """Points of each kind in its colour."""
    axis.set(title=title)
    for kind, colour in colours.items():
        own = xy_N2[kind_N == kind].T
        axis.plot(*own, "o", color=colour, ms=2.6, mew=0, alpha=0.8, label=names and names[kind])


def routing_heatmap(results: Sequence[Result], arms: Sequence[str] = ("base", "snnl")) -> Figure:
    """Mean gate of each class: the seed of median effective experts large, all seeds small below it. Experts
    are matched to those of the first arm (Hungarian method), and a row is the same class everywhere."""
    shown = arms_of(results, arms)
    first = next(iter(shown))
    gates_CE = _gates(median_run(shown[first]))
    gates_CE = gates_CE[:, np.argsort(-gates_CE.sum(0), kind="stable")]
    order = np.lexsort((-gates_CE.max(1), gates_CE.argmax(1)))
    few = len(order) <= 20
    small = 5
    lines = max(-(-len(group) // small) for group in shown.values())
    figure = Figure(figsize=(4.6 * len(shown) + 0.6, 4.2 + 0.95 * lines), layout="constrained")
    with mpl.rc_context(STYLE | {"axes.titleweight": "normal", "axes.titlesize": 10}):
        parts = figure.subfigures(1, len(shown), squeeze=False)[0]
        large = [
            part.add_subplot(part.add_gridspec(1 + lines, small, height_ratios=[3.6, *[0.9] * lines])[0, :])
            for part in parts
        ]
        picture: Any = None
        for part, axis, (arm, group) in zip(parts, large, shown.items(), strict=True):
            grid = axis.get_subplotspec().get_gridspec()
            middle = median_run(group)
            matched_CE = _matched(_gates(middle), gates_CE)[order]
            picture = axis.imshow(matched_CE, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            effective = look_up(middle, "routing.load.effective_experts")
            axis.set(
                title=f"{arm}, seed {middle['run']['seed']}: {effective:.2f} effective experts",
                xlabel="expert",
            )
            axis.set_xticks(range(matched_CE.shape[1]), range(1, matched_CE.shape[1] + 1))
            if few and matched_CE.shape[1] <= 8:
                for (row, column), value in np.ndenumerate(matched_CE):
                    ink = "black" if value > 0.6 else "white"
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
            names = DATASETS[group[0]["run"]["dataset"]].classes or [""] * len(order)
            labels = [f"{c} {names[c]}".strip() for c in order] if few else []
            axis.set_yticks(range(len(labels)), labels if axis is large[0] else [""] * len(labels))
            for at, result in enumerate(group):
                tile = part.add_subplot(grid[1 + at // small, at % small])
                tile.imshow(
                    _matched(_gates(result), gates_CE)[order], cmap="viridis", vmin=0, vmax=1, aspect="auto"
                )
                tile.set(xticks=[], yticks=[])
                tile.set_title(
                    f"{look_up(result, 'routing.load.effective_experts'):.1f}",
                    fontsize=8,
                    fontweight="normal",
                    pad=2,
                )
        large[0].set_ylabel(f"class, by {first}'s preferred expert" if few else f"{len(order)} classes")
        figure.colorbar(picture, ax=large[-1], label="mean gate probability", shrink=0.8)
    return captioned(
        figure,
        "Who serves which class: the mean gate of each class (row) over the experts (columns). Rows that "
        "differ: the gate tells classes apart; one bright column: routing collapse. Large, the seed of "
        "median effective experts; small, every seed with its effective experts "
        f"({seeds_in_words([r for g in shown.values() for r in g])}). Experts are matched between pictures.",
    )


def _gates(result: Result) -> np.ndarray:
    return np.array(result["routing"]["class_expert"], dtype=float)


def _matched(gates_CE: np.ndarray, first_CE: np.ndarray) -> np.ndarray:
    """The columns in the order that is most like that of the first."""
    return gates_CE[:, linear_sum_assignment(first_CE.T @ gates_CE, maximize=True)[1]]


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
    grouped = arms_of(results, arms)
    figure, axes = new_figure(9.8, 3.0, 1, 4)
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
    for handle in legend(figure, axes[0, 0]).get_lines():
        handle.set_color("#333333")
    return captioned(
        figure,
        "How alike are the experts? Each dot a run. Trained together (filled) should lie left of trained "
        "alone (hollow diamonds, the null) if the mixture makes them different; ticks are before training.",
    )


# -------------------------------------------------------------------------- AC and crossed studies


def draw_mean(axis: Any, arm: str, x: Sequence[float], values_SX: np.ndarray) -> None:
    """Mean over seeds against x, with its 95 % t interval as a band."""
    colour, marker = arm_style(arm)
    axis.plot(x, values_SX.mean(0), color=colour, marker=marker, markersize=4, label=arm)
    if len(values_SX) > 1:
        low, high = np.array([stats.t_interval(column) for column in values_SX.T]).T
        axis.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)


def legend(figure: Figure, axis: Any, columns: int = 4, **options: Any) -> Any:
    """Below the figure: what one of its axes names, each name once."""
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    place: Any = {"loc": "outside lower center", "frameon": False, "ncols": columns}
    return figure.legend(named.values(), named.keys(), **place, **options)


def corruption_by_severity(
    results: Sequence[Result], arms: Sequence[str] = ("linear", "cosine", "ac")
) -> Figure:
    """Accuracy under each kind of corruption against its severity, minus the first arm's at the same seed:
    mean and 95 % interval over seeds. Severity 0 is the clean image."""
    grouped = arms_of(results, arms)
    first = next((arm for arm in arms if arm in grouped), next(iter(grouped)))
    kinds = [kind for kind in grouped[first][0]["corruption"] if kind != "clean"]
    rows = -(-len(kinds) // 4)
    wide = min(len(kinds), 4)
    figure, axes = new_figure(2.4 * wide + 0.4, 2.2 * rows + 0.6, rows, wide, sharey=True)
    reference = {r["run"]["seed"]: r for r in grouped[first]}
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for arm, group in grouped.items():
            paired = [
                (_severities(r, kind), _severities(reference[r["run"]["seed"]], kind))
                for r in group
                if r["run"]["seed"] in reference
            ]
            if arm != first and paired:
                own_SX, first_SX = np.array(paired).transpose(1, 0, 2)
                draw_mean(axis, arm, range(6), 100 * (own_SX - first_SX))
        axis.axhline(0, color=arm_style(first)[0], lw=1.2, label=first)
        axis.set(title=kind.replace("_", " "), xticks=range(6))
    hide_from(axes, len(kinds))
    for axis in axes[-1]:
        axis.set_xlabel("severity (0: clean)")
    figure.supylabel(f"accuracy minus {first}'s (points)", fontsize=10)
    legend(figure, axes[0, 0])
    return captioned(
        figure,
        f"Robustness to corruption, as the difference from `{first}` at the same seed: above the line is "
        "better. Means "
        f"and 95 % t intervals over seeds; {seeds_in_words([r for g in grouped.values() for r in g])}.",
    )


def _severities(result: Result, kind: str) -> list[float]:
    return [result["corruption"]["clean"], *result["corruption"][kind]]


def swap_curve(results: Sequence[Result], arms: Sequence[str] | None = None) -> Figure:
    """Cross-entropy lost against the share of words that became <unk>: on the targets left alone, and on all
    of them. Mean and 95 % interval over seeds."""
    figure, axes = new_figure(9, 3.6, 1, 2)
    for arm, group in arms_of(results, arms).items():
        shares = sorted(group[0]["swap"], key=float)
        percent = [100 * float(share) for share in shares]
        swaps = [[r["swap"][share] for share in shares] for r in group]
        own_SX = np.array([[s["swapped"] - s["clean"] for s in row] for row in swaps])
        all_SX = np.array([[s["all"] - row[0]["all"] for s in row] for row in swaps])
        draw_mean(axes[0, 0], arm, percent, own_SX)
        draw_mean(axes[0, 1], arm, percent, all_SX)
    axes[0, 0].set(
        title="targets left alone", ylabel="cross-entropy, swapped minus clean\n(nats a token; up is worse)"
    )
    axes[0, 1].set(title="all targets, <unk> itself among them")
    for axis in axes[0]:
        axis.set(xlabel="words swapped (%)")
        axis.axhline(0, color="#999999", lw=0.8, zorder=0)
        axis.grid(axis="y", alpha=0.3)
    legend(figure, axes[0, 0])
    return captioned(
        figure,
        "What swapped words cost: cross-entropy in the text with some words replaced by <unk>, minus that in "
        "the clean text. A curve that rises is a model that suffers; one below zero predicts the remaining "
        "words better. Left, only the words left alone are scored, as the verdicts do. Means, 95 % t "
        f"intervals; {seeds_in_words(results)}.",
    )


def changed_choices(results: Sequence[Result]) -> Figure:
    """Share of tokens that M sends to other experts than M = I would in the same model, layer by layer: seeds
    as dots, their mean as a bar."""
    grouped = {
        arm: group
        for arm, group in arms_of(results).items()
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
    legend(figure, axes[0, 0], 6)
    return captioned(
        figure,
        "What the scaling matrix M changes: the share of tokens that go to other experts than without "
        "scaling, layer by layer, in the same model. A bar near 0: M makes no difference there. Seeds as "
        "dots, their mean as a bar.",
    )


def expert_load(results: Sequence[Result]) -> Figure:
    """Share of the tokens that each expert is best for, one panel a MoE layer; experts are ordered by load in
    each run, then averaged over seeds. The dashed line is an even load, 1/E."""
    grouped = arms_of(results)
    layers = len(results[0]["routing"]["layers"])
    figure, axes = new_figure(3.1 * layers + 0.6, 3.2, 1, layers, sharey=True)
    for at, axis in enumerate(axes[0]):
        for arm, group in grouped.items():
            loads = [r["routing"]["layers"][at]["load"]["share"] for r in group]
            sorted_SE = 100 * np.array([sorted(share, reverse=True) for share in loads])
            colour, marker = arm_style(arm)
            axis.plot(
                range(1, sorted_SE.shape[1] + 1),
                sorted_SE.mean(0),
                color=colour,
                marker=marker,
                ms=3.5,
                label=arm,
            )
        axis.axhline(100 / sorted_SE.shape[1], color="#333333", ls="--", lw=1)
        axis.set(title=f"MoE layer {at + 1}", xlabel="expert, by load", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("share of tokens (%)")
    legend(figure, axes[0, 0], 5)
    return captioned(
        figure,
        "Are the experts used evenly? Share of the tokens of the busiest expert (left) to the idlest "
        "(right). The dashed line is an even load, 1/E; a curve that falls steeply is a collapsed layer. "
        f"Means; {seeds_in_words(results)}.",
    )


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
        return note("no two seeds yet that have treatment and control")
    wide = -(-len(measures) // (2 if len(measures) > 3 else 1))
    rows = -(-len(measures) // wide)
    figure, axes = new_figure(
        min(2.6 * wide + 1.6, 9.8), rows * (0.33 * len(pairs) + 1.3), rows, wide, sharey=True
    )
    for axis, (claim, column, direction) in zip(axes.flat, measures, strict=False):
        scale, unit = columns[column].scale, columns[column].unit
        reach = 0.0
        for row, (treatment, control) in enumerate(pairs):
            both = found[(treatment, control), column]
            if both is None:
                continue
            differences = scale * (both[treatment] - both[control]).to_numpy()
            ends = seeds_and_mean(axis, row, differences, *ARM_STYLE[control], size=4, below=0.25)
            reach = max(reach, *np.abs(ends), *np.abs(differences))
        reach = 1.08 * reach or 1.0
        axis.axvspan(*((0, reach) if direction == "higher" else (-reach, 0)), color="#f0f0f0", lw=0, zorder=0)
        axis.axvline(0, color="#333333", lw=1)
        axis.set(
            title=f"{claim}:\n{column}", xlabel=unit, xlim=(-reach, reach), ylim=(len(pairs) - 0.4, -0.6)
        )
        axis.locator_params(axis="x", nbins=5)
    hide_from(axes, len(measures))
    axes[0, 0].set_yticks(range(len(pairs)), [f"{a} - {b}" for a, b in pairs])
    return captioned(
        figure,
        "The claimed measures, treatment minus each control, paired by seed: dots are seeds, below them "
        "the mean and its "
        "95 % t interval. The claim asks for the shaded side; an interval that crosses 0 says nothing.",
    )


WORD_COLOURS = {
    "supported": PALETTE[4],
    "contradicted": PALETTE[1],
    "smaller than claimed": PALETTE[3],
    "undecided": PALETTE[2],
    "not testable here": "#8a8a8a",
    "pilot": "#8a8a8a",
}


def verdict_grid(grid: dict[str, Any]) -> Figure:
    """`report.verdicts.grid` as a picture: claim x data set, a colour per word, difference and interval."""
    lines = [
        (row, units)
        for section in grid["sections"]
        for row in (section["title"], *section["rows"])
        for units in [1 if isinstance(row, str) else max(map(len, row["cells"]))]
    ]
    datasets = grid["datasets"]
    left, wide, unit = 4.2, 1.5, 0.2
    width, height = left + wide * len(datasets), unit * (sum(n for _, n in lines) + 2.4)
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    for at, name in enumerate(datasets):
        axis.text(left + wide * at, unit / 2, name, fontsize=8, fontweight="bold", va="center")
    y = 1.1 * unit
    for row, units in lines:
        if isinstance(row, str):
            axis.text(0.05, y + unit / 2, row, fontsize=8, fontweight="bold", va="center")
        else:
            label = f"{row['claim']} ({row['measure']})" if row["measure"] else row["claim"]
            axis.text(0.05, y + unit / 2, label, fontsize=7, va="center")
            if row["contrast"]:
                axis.text(
                    left - 0.08,
                    y + unit / 2,
                    row["contrast"],
                    fontsize=5.5,
                    va="center",
                    ha="right",
                    color="#555555",
                )
            for at, cell in enumerate(row["cells"]):
                for line, one in enumerate(cell):
                    x, top = left + wide * at, y + line * unit
                    colour = WORD_COLOURS[one["word"]]
                    axis.add_patch(Rectangle((x, top + 0.01), wide - 0.05, unit - 0.02, fc=colour, alpha=0.3))
                    text = f"{one['mark']} {one['difference']} {one['interval']}"
                    axis.text(x + 0.04, top + unit / 2, text, fontsize=6.5, va="center")
        y += unit * units
    x = 0.05
    for word, mark, _ in grid["legend"]:
        axis.add_patch(Rectangle((x, y + 0.06), 0.12, 0.12, fc=WORD_COLOURS[word], alpha=0.3))
        axis.text(x + 0.16, y + 0.13, f"{mark} {word}", fontsize=7, va="center")
        x += 0.45 + 0.066 * len(word)
    return captioned(
        figure,
        "Every claim (row) on every data set (column): a colour per verdict, mean difference and 95 % "
        "interval. What is subtracted stands beside the claims.",
    )


def verdict_forest(verdicts: Sequence[Verdict]) -> Figure:
    """Every claim against its controls, grouped by paper, in units of the difference that counts: the
    published one, or the declared margin. 0 is no difference, 1 the claimed one. Thick: 90 %; thin: 95 %."""
    sources = list(dict.fromkeys(v.claim.source for v in verdicts))
    rows = [  # a heading, then its verdicts
        row for source in sources for row in (source, *(v for v in verdicts if v.claim.source == source))
    ]
    figure, axes = new_figure(9.8, 0.27 * len(rows) + 1.5)
    axis = axes[0, 0]
    axis.axvline(0, color="#333333", lw=1)
    axis.axvline(1, color="#333333", lw=1, ls="--")
    names = []
    reach = 3.0
    for at, row in enumerate(rows):
        if isinstance(row, str):
            names.append(row.upper())
            continue
        claim = row.claim
        names.append(f"{claim.wording}, {DATASET_TITLES[row.dataset]}: {claim.treatment} - {row.control}")
        same = [v for v in verdicts if (v.claim.key, v.dataset) == (claim.key, row.dataset)]
        reach = max(reach, _forest_row(axis, at, row, row is min(same, key=_in_favour)))
    axis.set_yticks(range(len(rows)), names)
    for row, label in zip(rows, axis.get_yticklabels(), strict=True):
        label.set_fontsize(9)
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axis.set_xscale("symlog", linthresh=2, linscale=0.9)
    shown = [x for x in (-100, -30, -10, -5, -2, -1, 0, 1, 2, 5, 10, 30, 100) if abs(x) <= 1.3 * reach]
    axis.set_xticks(shown, [f"{x:g}" for x in shown])
    axis.minorticks_off()
    axis.set(xlim=(-1.4 * reach, 1.9 * reach), ylim=(len(rows) - 0.4, -0.6))
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("← against the claim     in units of the difference that counts     as claimed →")
    return captioned(
        figure,
        "Each verdict as a difference in units of the one that counts (dashed line at 1: the published "
        "difference, or the declared margin). Right of 0 is the claimed direction. Thick bars are 90 %, thin "
        "ones 95 % intervals, at their right end the paired seeds; hollow dots are pilots. Only the deciding "
        "contrast carries the word. The axis is linear up to 2 and logarithmic beyond.",
    )


def _forest_row(axis: Any, at: int, verdict: Verdict, decides: bool) -> float:
    """One verdict's intervals, mean and seeds, and its word if it decides; the largest value drawn."""
    colour, beside = WORD_COLOURS[verdict.word], axis.get_yaxis_transform()
    if decides:
        axis.text(1.02, at, verdict.word, color=colour, va="center", fontsize=9, transform=beside)
    if verdict.comparison is None:
        return 0.0
    signed_S = verdict.parts[0].signed_S / verdict.margin
    for level, width in ((0.95, 1.4), (0.90, 4.0)):
        axis.plot(stats.t_interval(signed_S, level), [at] * 2, color=colour, lw=width, solid_capstyle="butt")
    filled = colour if verdict.word != "pilot" else "white"
    axis.plot(signed_S.mean(), at, "o", color=colour, mfc=filled, markersize=6)
    count = {"ha": "right", "va": "center", "fontsize": 8, "color": "#555555", "transform": beside}
    axis.text(1.0, at, f"{len(signed_S)}", **count)
    return float(np.abs(stats.t_interval(signed_S, 0.95)).max())


def _in_favour(verdict: Verdict) -> float:
    """How far the claimed direction is reached, in margins; without pairs not at all."""
    signed_S = verdict.parts[0].signed_S
    return float(signed_S.mean() / verdict.margin) if len(signed_S) else -np.inf


def crossed_lines(results: Sequence[Result], names: Sequence[str] = tables.CROSSED_MEASURES) -> Figure:
    """Each measure without and with AC, one line without and one with SNNL: parallel lines, no interaction.
    Seeds as dots, means with their 95 % t intervals as lines."""
    columns = tables.VISION_COLUMNS
    runs = tables.frame(results, columns)
    rows = -(-len(names) // 3)
    figure, axes = new_figure(9.5, 2.6 * rows + 0.5, rows, 3)
    for axis, name in zip(axes.flat, names, strict=False):
        for label, ends, shift in (("no SNNL", ("base", "ac"), -0.05), ("SNNL", ("snnl", "snnl-ac"), 0.05)):
            colour, marker = ARM_STYLE[ends[0]]
            values = [
                columns[name].scale * runs.loc[runs["arm"] == arm, name].dropna().to_numpy() for arm in ends
            ]
            for x, own in enumerate(values):
                axis.plot(
                    np.full(len(own), x + 2.2 * shift), own, "o", color=colour, alpha=0.3, ms=3.5, mew=0
                )
                if len(own) > 1:
                    axis.plot([x + shift] * 2, stats.t_interval(own), color=colour, lw=2.2)
            means = [own.mean() if len(own) else np.nan for own in values]
            axis.plot((shift, 1 + shift), means, color=colour, marker=marker, lw=1.2, label=label)
        axis.set(title=columns[name].title(name, level=True), xticks=(0, 1), xlim=(-0.4, 1.4))
        axis.set_xticklabels(("cosine router", "AC router"))
    hide_from(axes, len(names))
    legend(figure, axes[0, 0])
    return captioned(
        figure,
        "Both remedies at once: without (left) and with the AC router (right), one line without and one with "
        "SNNL. Parallel lines: the two add up; lines that meet or cross: one changes what the other does. "
        f"Dots are seeds, bars 95 % t intervals of the means; {seeds_in_words(results)}. Axes do not begin "
        "at 0.",
    )


BETTER = {"accuracy": 1, "cross-entropy": -1, "validation area": -1}  # of the others neither way is
# Pale enough for black text: orange better, purple worse; where neither way is better, more or less.
DOSE_COLOURS = ListedColormap(mpl.colormaps["PuOr_r"](np.linspace(0.19, 0.81, 255)))


def dose_heatmaps(runs: pd.DataFrame, panel: Panel, names: Sequence[str]) -> Figure:
    """Each measure's difference from the control over a grid of doses, with its 95 % t interval below it;
    framed where that excludes 0. Colour is the difference itself. Rows and columns without any number are
    left out."""
    columns_of = tables.COLUMNS | tables.LANGUAGE_COLUMNS
    (down, rows), (across, heads) = panel.labels
    effects = {name: tables.dose_effects(runs, panel, name) for name in names}
    filled = [at for found in effects.values() for at, one in found.items() if one is not None]
    if not filled:
        return note("no dose yet that two seeds share with its control")
    lines = sorted({row for row, _ in filled})
    columns = sorted({at for _, at in filled}, key=lambda at: (not _is_number(heads[at]), at))
    wide = 2 if len(names) > 1 else 1
    tall = -(-len(names) // wide)
    size = (wide * (max(1.15 * len(columns), 1.9) + 0.6) + 0.5, tall * (0.46 * len(lines) + 0.65) + 0.3)
    figure, axes = new_figure(*size, tall, wide, sharex=True, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        column = columns_of[name]
        decimals = column.decimals if column.unit == "points" else 3
        sign = BETTER.get(name, 1)
        colours = np.full((len(lines), len(columns)), np.nan)
        for y, x in np.ndindex(colours.shape):
            found = effects[name][lines[y], columns[x]]
            if found is None:
                axis.text(x, y, "-", ha="center", va="center")
                continue
            colours[y, x] = sign * found.difference
            difference, low, high = (
                f"{tables.rounded(column.scale * value, decimals):+.{decimals}f}"
                for value in (found.difference, found.low, found.high)
            )
            axis.text(x, y - 0.16, difference, ha="center", va="center")
            axis.text(x, y + 0.24, f"[{low}, {high}]", ha="center", va="center", fontsize=8)
            if found.low > 0 or found.high < 0:
                axis.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, ec="black", lw=1.5))
        known = np.abs(colours[np.isfinite(colours)])
        reach = max(known.max(initial=0.0), np.finfo(float).tiny)
        axis.imshow(colours, cmap=DOSE_COLOURS, vmin=-reach, vmax=reach, aspect="auto")
        better = "orange: better" if name in BETTER else "orange: more"
        axis.set_title(f"{column.title(name)}, {better}", fontsize=10)
        axis.set_xticks(range(len(columns)), [heads[at] for at in columns])
        axis.set_yticks(range(len(lines)), [rows[at] for at in lines])
        axis.spines[:].set_visible(False)
    hide_from(axes, len(names))
    for axis in axes[-1]:
        axis.set_xlabel(across)
    figure.supylabel(down)
    counts = sorted({one.seeds for found in effects.values() for one in found.values() if one is not None})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return captioned(
        figure,
        f"{panel.title.capitalize()}: difference from the control without the remedy, below it the 95 % t "
        "interval; framed where that excludes 0. Orange is better, purple worse (where neither way is "
        "better: more and less), the deeper the larger. Look for a slope or a block, since one cell in "
        f"twenty is framed by chance. {seeds} paired seeds a cell.",
    )


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
    figure.legend(
        handles=handles, loc="outside lower center", frameon=False, ncols=2, fontsize=9, handlelength=1
    )
    return captioned(
        figure,
        "Which measure (row) notices which planted fault (column)? Blue with a tick: it gets worse with "
        "every step; red with a cross: it calls the fault an improvement. No measure sees all, so several "
        "are read together. Eleven seeds.",
    )


def collapse_panel(results: Sequence[Result], arms: Sequence[str] = ("base", "snnl")) -> Figure:
    """Routing and representational collapse over training (mean, and range over seeds), and all three kinds
    of the selected model beside their nulls, seed by seed. 0: specialists; 1: one expert would do."""
    kinds = ("routing", "representational", "functional")
    figure, axes = new_figure(9.8, 3.2, 1, 3)
    grouped = arms_of(results, arms)
    for row, (arm, group) in enumerate(grouped.items()):
        colour, marker = arm_style(arm)
        for axis, kind in zip(axes[0], kinds[:2], strict=False):
            mean_and_range(axis, arm, [trajectory(r)[kind] for r in group])
        for place, kind in enumerate(kinds):
            degrees = [getattr(collapse(r), kind) for r in group]
            height = place + (row - (len(grouped) - 1) / 2) * 0.34
            values, nulls = np.array(degrees).T
            heights = np.full(len(degrees), height)
            axes[0, 2].plot(values, heights, marker, color=colour, alpha=0.5, ms=5, mew=0)
            axes[0, 2].plot(nulls, heights + 0.12, "|", color="#333333", alpha=0.6, ms=6)
    for axis, kind in zip(axes[0], kinds[:2], strict=False):
        axis.set(title=f"{kind}, validation", xlabel="epoch", ylabel="degree of collapse", ylim=(-0.03, 1.03))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 2].set_yticks(range(3), kinds)
    axes[0, 2].set(
        title="end of training, test", xlabel="degree of collapse", xlim=(-0.03, 1.03), ylim=(2.6, -0.6)
    )
    axes[0, 2].grid(axis="x", alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="#333333", marker="|", ls="none"))
    figure.legend(
        handles, [*labels, "null of a seed"], loc="outside lower center", frameon=False, ncols=len(handles)
    )
    return captioned(
        figure,
        "How collapsed? 0: specialists; 1: one expert would do. Left and middle: over training, mean and "
        "range over seeds. Right: each seed a dot at the end, beside the tick of its null; a dot no further "
        f"right than its tick shows no collapse. {seeds_in_words([r for g in grouped.values() for r in g])}.",
    )


def target(path: str | Path) -> Path:
    """Where a figure named "profile/study/dataset/name" lies."""
    return store.figures_dir() / f"{path}.png"


def save(figure: Figure, path: str | Path, source: str = "computed in this notebook") -> None:
    """Write `path` (below the figures folder, without suffix) as PNG, which says in its text "Source" where
    its numbers come from."""
    drawn, packed, text = io.BytesIO(), io.BytesIO(), PngInfo()
    with mpl.rc_context(STYLE):
        figure.savefig(drawn, format="png")
    text.add_text("Source", source)
    picture = Image.open(drawn)  # opaque, and 256 colours are enough: it takes a quarter
    flat = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(packed, "PNG", optimize=True, pnginfo=text, dpi=picture.info["dpi"])
    store.write_bytes(target(path), packed.getvalue())
