"""One function a figure; each takes result dictionaries or tensors and returns a matplotlib Figure.

Colours are Okabe and Ito's (told apart with any colour vision); where a colour means an arm it means
that arm in every figure.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from moe_lib import metrics, stats, store
from moe_lib.data import ROOT
from moe_lib.tables import look_up

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
    "raw": (PALETTE[0], "X"),
    "snnl-pretrained": ("#8c564b", "<"),
    "ce-pretrained": ("#4b6e8c", ">"),
}
STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}
DATASET_TITLES = {
    "digits": "Digits (8×8)",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _arms(results: Sequence[dict[str, Any]], wanted: Sequence[str] | None = None) -> dict[str, list[dict]]:
    """Results by arm, in the order of ARM_STYLE."""
    names = [a for a in ARM_STYLE if wanted is None or a in wanted]
    grouped = {a: [r for r in results if r["run"]["arm"] == a] for a in names}
    return {arm: group for arm, group in grouped.items() if group}


def training_curves(results: Sequence[dict[str, Any]], arms: Sequence[str] | None = None) -> Figure:
    """Validation cross-entropy, accuracy and routing information over epochs: mean, and range over seeds."""
    panels = (
        ("cross_entropy", "validation cross-entropy (nats)", 1.0),
        ("accuracy", "validation accuracy (%)", 100.0),
        ("information", "I(x;E), validation (nats)", 1.0),
    )
    figure, axes = new_figure(11, 3.4, 1, 3)
    for axis, (key, title, scale) in zip(axes[0], panels, strict=True):
        for arm, group in _arms(results, arms).items():
            colour, marker = ARM_STYLE[arm]
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


def accuracy_by_arm(results: Sequence[dict[str, Any]]) -> Figure:
    """Test accuracy: every seed a dot, the mean and its 95 % interval beside them."""
    grouped = _arms(results)
    figure, axes = new_figure(7.5, 0.42 * len(grouped) + 1.2)
    axis = axes[0, 0]
    for row, (arm, group) in enumerate(grouped.items()):
        colour, marker = ARM_STYLE[arm]
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


def tsne_panels(results: Sequence[dict[str, Any]]) -> Figure:
    """Test codes before and after training, arm by arm, coloured by class (ten classes at most)."""
    shown = {a: g[0] for a, g in _arms([r for r in results if "tsne" in r]).items()}
    figure, axes = new_figure(4.2 * 2, 3.9 * len(shown), len(shown), 2)
    colours = sns.color_palette("colorblind", 10)
    for row, (arm, result) in zip(axes, shown.items(), strict=True):
        labels = np.array(result["tsne"]["labels"])
        for axis, moment in zip(row, ("before", "after"), strict=True):
            points = np.array(result["tsne"][moment])
            others = labels >= 10
            axis.plot(*points[others].T, ".", color="#cccccc", markersize=3, zorder=0)
            for c in range(min(10, labels.max() + 1)):
                own = points[labels == c]
                axis.plot(*own.T, ".", color=colours[c], markersize=5)
                for x, y in own[:: max(len(own) // 3, 1)][:3]:
                    axis.text(x, y, str(c), fontsize=7, color="black", ha="center", va="center")
            axis.set(title=f"{arm}, {moment} training", xticks=[], yticks=[])
            axis.set_aspect("equal", adjustable="datalim")
    note = "numbers and colours: classes" + ("; classes 10 and above in grey" if others.any() else "")
    figure.supxlabel(f"t-SNE of {len(labels)} test codes, same seed; axes have no unit\n{note}", fontsize=9)
    return figure


def routing_heatmap(results: Sequence[dict[str, Any]], arms: Sequence[str] = ("base", "snnl")) -> Figure:
    """Mean gate of each class, for the first seed of each arm; classes ordered by their preferred expert."""
    shown = {arm: group[0] for arm, group in _arms(results, arms).items()}
    num_classes = len(next(iter(shown.values()))["routing"]["class_expert"])
    figure, axes = new_figure(3.4 * len(shown) + 0.8, 4.6 if num_classes <= 20 else 6.5, 1, len(shown))
    for axis, (arm, result) in zip(axes[0], shown.items(), strict=True):
        gates_CE = np.array(result["routing"]["class_expert"], dtype=float)
        order = np.lexsort((-gates_CE.max(1), gates_CE.argmax(1)))
        picture = axis.imshow(gates_CE[order], cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{arm}, seed {result['run']['seed']}", xlabel="expert")
        axis.set_xticks(range(gates_CE.shape[1]))
        if num_classes <= 20:
            axis.set_yticks(range(num_classes), [str(c) for c in order])
        else:
            axis.set_yticks([])
    axes[0, 0].set_ylabel("class" if num_classes <= 20 else f"{num_classes} classes, by preferred expert")
    figure.colorbar(picture, ax=axes, label="mean gate probability", shrink=0.8)
    return figure


def similarity_with_nulls(
    results: Sequence[dict[str, Any]], arms: Sequence[str] = ("base", "snnl")
) -> Figure:
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
                    values, [height] * len(values), marker, color=ARM_STYLE[arm][0], alpha=0.75,
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


def target(path: str | Path) -> Path:
    """Where a figure named "profile/study/dataset/name" lies."""
    return store.figures_dir() / f"{path}.png"


def save(figure: Figure, path: str | Path, sources: Sequence[Path]) -> str:
    """Write `path` (below the figures folder, without suffix) as PNG; returns the line that names it and the
    files it came from, which the picture holds too, as its PNG text "Source"."""
    listing = name_sources(sources)
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", metadata={"Source": listing, "Software": None})
    store.write_bytes(target(path), buffer.getvalue())
    return f"figures/{path}.png <- {listing}"


def name_sources(sources: Sequence[Path]) -> str:
    """Result files in short: folder, arms, number of files."""
    if not sources:
        return "computed in this notebook"
    folder = sources[0].parent
    base = store.results_dir()
    name = folder.relative_to(base) if folder.is_relative_to(base) else folder.relative_to(ROOT)
    arms = list(dict.fromkeys(p.name.rsplit("-s", 1)[0] for p in sources))
    joined = arms[0] if len(arms) == 1 else "{" + ",".join(arms) + "}"
    return f"results/{name.as_posix()}/{joined}-s*.json ({len(sources)} files)"
