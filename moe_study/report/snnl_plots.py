"""Figures of the SNNL study: codes, gates, likeness of experts, collapse. See `plots`.

Shapes: S seeds, E epochs (of gates: experts), C classes, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_lib import metrics
from moe_study.collapse import collapse, trajectory
from moe_study.columns import Result, look_up
from moe_study.configs.arms import MAIN_ARMS
from moe_study.data import DATASETS
from moe_study.report.plots import (
    SHARES,
    STYLE,
    arm_style,
    arms_of,
    at_one_seed,
    captioned,
    legend,
    matched,
    matched_order,
    mean_and_range,
    new_figure,
    note,
    seeds_in_words,
    which_seed,
    write_values,
)

NOTHING = f"no run of {' or '.join(MAIN_ARMS)} is finished yet"


def tsne_panels(results: Sequence[Result]) -> Figure:
    """Test codes of each arm (row) before and after training, coloured by class: the ten with most images,
    where there are more. A third column is coloured by expert where the results hold it."""
    shown = at_one_seed(arms_of([r for r in results if "tsne" in r]))
    if not shown:
        return note("no run that keeps these codes is finished yet")
    points = {arm: result["tsne"] for arm, result in shown.items()}
    by_expert = any("experts" in own for own in points.values())
    wide = 2 + by_expert
    figure, axes = new_figure(3.1 * wide + by_expert, 2.9 * len(shown) + 0.6, len(shown), wide)
    classes, counts = np.unique(
        np.concatenate([own["labels"] for own in points.values()]), return_counts=True
    )
    chosen = np.sort(classes[np.argsort(-counts, kind="stable")[:10]])
    info = DATASETS[next(iter(shown.values()))["run"]["dataset"]]
    names = info.classes or [f"class {c}" for c in range(max(classes) + 1)]
    colours = dict(zip(chosen, sns.color_palette("colorblind", 10), strict=False))
    for (before, after, *more), (arm, own) in zip(axes, points.items(), strict=True):
        for axis, moment in ((before, "before"), (after, "after")):
            _points(axis, f"{arm}, {moment} training", own[moment], own["labels"], colours, names)
        if "experts" in own:
            [axis], places_N = more, _places(shown[arm], results)[own["experts"]]
            kinds = {place: mpl.colormaps["Dark2"](place % 8) for place in np.unique(places_N)}
            numbers = [f"expert {place + 1}" for place in range(max(kinds) + 1)]
            which = "all images" if len(classes) > 10 else "the same"
            _points(axis, f"{which}, by expert", own["after"], places_N, kinds, numbers)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_visible(axis.has_data())
    marks: Any = {"markerscale": 2.5, "handletextpad": 0.2}
    legend(figure, axes[:1, 0], 5, **marks)
    if by_expert:
        legend(figure, axes[:, 2], 1, loc="outside right center", **marks)
    some = (
        f" In the first two columns the ten classes with most images, of {len(info.classes or classes)}."
        if len(classes) > 10
        else ""
    )
    numbered = " Right: the same codes by the expert of largest gate, numbered as in the heat map of routing."
    return captioned(
        figure,
        f"The extractor's code of {len(own['labels'])} test images as t-SNE sees it.{some} Check whether "
        f"classes form groups of one colour. {_which(shown, results)} Distances between groups mean little, "
        f"and the axes have no unit.{numbered * by_expert}",
    )


def _which(shown: Mapping[str, Result], results: Sequence[Result]) -> str:
    """The seed of each arm and how typical it is."""
    path = "routing.load.effective_experts"
    said = [
        f"`{arm}` seed {result['run']['seed']} with {look_up(result, path):.2f} effective experts (median "
        f"over seeds {np.median([look_up(r, path) for r in arms_of(results)[arm]]):.2f})"
        for arm, result in shown.items()
    ]
    return f"Only some seeds keep these codes: {', '.join(said)}."


def _reference(shown: Mapping[str, Result]) -> np.ndarray:
    """Gates [C, E] of the first arm, the busiest expert first: in all figures experts are numbered by it."""
    gates_CE = _gates(next(iter(shown.values())))
    return gates_CE[:, np.argsort(-gates_CE.sum(0), kind="stable")]


def _places(result: Result, results: Sequence[Result]) -> np.ndarray:
    """Where the heat map of routing shows each expert of a run, [E]."""
    reference_CE = _reference(at_one_seed(arms_of(results, MAIN_ARMS) or arms_of(results)))
    return np.argsort(matched_order(_gates(result), reference_CE))


def _points(
    axis: Any,
    title: str,
    xy_N2: Sequence[Sequence[float]],
    kind_N: Sequence[int] | np.ndarray,
    colours: Mapping[int, Any],
    names: Sequence[str],
) -> None:
    """Points of each kind in its colour."""
    axis.set(title=title)
    for kind, colour in colours.items():
        own_N2 = np.array(xy_N2)[np.array(kind_N) == kind]
        axis.plot(*own_N2.T, "o", color=colour, ms=2.6, mew=0, alpha=0.8, label=names[kind])


def routing_heatmap(results: Sequence[Result]) -> Figure:
    """Mean gate of each class: one seed of all arms large, all seeds small below it. Experts are matched to
    those of the first arm (Hungarian method), and a row is the same class everywhere."""
    shown = arms_of(results, MAIN_ARMS)
    if not shown:
        return note(NOTHING)
    first, chosen = next(iter(shown)), at_one_seed(shown)
    gates_CE = _reference(chosen)
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
            middle = chosen[arm]
            matched_CE = matched(_gates(middle), gates_CE)[order]
            picture = axis.imshow(matched_CE, **SHARES)
            effective = look_up(middle, "routing.load.effective_experts")
            axis.set(
                title=f"{arm}, seed {middle['run']['seed']}: {effective:.2f} effective experts",
                xlabel="expert",
            )
            axis.set_xticks(range(matched_CE.shape[1]), range(1, matched_CE.shape[1] + 1))
            if few and matched_CE.shape[1] <= 8:
                write_values(axis, matched_CE)
            names = DATASETS[group[0]["run"]["dataset"]].classes or [""] * len(order)
            labels = [f"{c} {names[c]}".strip() for c in order] if few else []
            axis.set_yticks(range(len(labels)), labels if axis is large[0] else [""] * len(labels))
            for at, result in enumerate(group):
                tile = part.add_subplot(grid[1 + at // small, at % small])
                tile.imshow(matched(_gates(result), gates_CE)[order], **SHARES)
                tile.set(xticks=[], yticks=[])
                effective = look_up(result, "routing.load.effective_experts")
                tile.set_title(f"{effective:.1f}", fontsize=8, fontweight="normal", pad=2)
        large[0].set_ylabel(f"class, by {first}'s preferred expert" if few else f"{len(order)} classes")
        figure.colorbar(picture, ax=large[-1], label="mean gate probability", shrink=0.8)
    return captioned(
        figure,
        "Who serves which class: the mean gate of each class (row) over the experts (columns). Rows that "
        f"differ: the gate tells classes apart; one bright column: routing collapse. Large, "
        f"{which_seed(chosen)}; small, every seed with its effective experts "
        f"({seeds_in_words(results, MAIN_ARMS)}). Experts are matched between pictures.",
    )


def _gates(result: Result) -> np.ndarray:
    return np.array(result["routing"]["class_expert"], dtype=float)


def similarity_with_nulls(results: Sequence[Result]) -> Figure:
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
    grouped = arms_of(results, MAIN_ARMS)
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


def collapse_panel(results: Sequence[Result]) -> Figure:
    """Routing and representational collapse over training (mean, and range over seeds), and all three kinds
    of the last epoch's model beside their nulls, seed by seed. 0: specialists; 1: one expert would do."""
    kinds = ("routing", "representational", "functional")
    grouped = arms_of(results, MAIN_ARMS)
    if not grouped:
        return note(NOTHING)
    figure, axes = new_figure(9.8, 3.2, 1, 3)
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
            axes[0, 2].plot([values, nulls], [heights, heights + 0.12], color="#333333", alpha=0.15, lw=0.6)
            axes[0, 2].plot(nulls, heights + 0.12, "|", color="#333333", alpha=0.6, ms=6)
    for axis, kind in zip(axes[0], kinds[:2], strict=False):
        axis.set(title=f"{kind}, validation", xlabel="epoch", ylabel="degree of collapse", ylim=(-0.03, 1.03))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 2].set_yticks(range(3), kinds)
    axes[0, 2].set(title="test", xlabel="degree of collapse", xlim=(-0.03, 1.03), ylim=(2.6, -0.6))
    axes[0, 2].grid(axis="x", alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="#333333", marker="|", ls="none"))
    figure.legend(
        handles, [*labels, "null of a seed"], loc="outside lower center", frameon=False, ncols=len(handles)
    )
    return captioned(
        figure,
        "How collapsed? 0: specialists; 1: one expert would do. Left and middle: over training, mean and "
        "range over seeds. Right: each seed a dot, a thin line from it to the tick of its null; a dot no "
        "further right than its tick shows no collapse. Of functional collapse the tick, at 1, is a gate "
        f"that does not matter. {seeds_in_words(results, MAIN_ARMS, 'band')}.",
    )
