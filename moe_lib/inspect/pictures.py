"""Pictures of a panel, a comparison and a training run. Matplotlib is imported when something is drawn.

Shapes: L blocks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lib.inspect.measures import ABOUT, Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"  # Okabe and Ito
COLUMNS = 4
Line = tuple[str, str, Sequence[float]]  # label, colour, a value for each block


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _short(names: list[str]) -> list[str]:
    """Names of blocks without the parts that all of them share."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return [name if len(name) <= 24 else "…" + name[-23:] for name in names]
    while len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[1:] for p in parts]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    return [".".join(p) for p in parts]


def _drawn(layers: list[Layer]) -> list[str]:
    """The measures that have a picture and that some block has."""
    some = [name for name, about in ABOUT.items() if about.axis]
    return [name for name in some if any(not math.isnan(layer[name]) for layer in layers)]


def panel_figure(panel: Any) -> Figure:
    """Above: the load of every expert of every block. Below: each block's measures beside their nulls."""
    layers = panel.layers
    if not layers:
        raise ValueError("the panel has no block: nothing was read")
    shown = _drawn(layers)
    strip_rows = -(-len(shown) // COLUMNS)
    height = min(max(1.2 + 0.16 * len(layers), 2.4), 9.0) if len(layers) > 1 else 2.8
    figure = _figure(11, height + 2.3 * strip_rows)
    grid = figure.add_gridspec(1 + strip_rows, COLUMNS, height_ratios=[height] + [2.3] * strip_rows)
    top = figure.add_subplot(grid[0, :])
    if len(layers) == 1:
        _draw_load(top, layers[0])
    else:
        _draw_heat(figure, top, layers)
    for i, name in enumerate(shown):
        values, nulls = zip(*(layer.measures[name] for layer in layers), strict=True)
        lines = [("null", GREY, nulls), ("this model", BLUE, values)]
        _draw_strip(figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS]), name, lines, legend=i == 0)
    figure.set_label(
        "Load of every expert (above), and each measure beside its null (below). A load far from balanced is "
        "routing collapse; a measure at its null is what chance alone would give."
    )
    return figure


def comparison_figure(comparison: Any) -> Figure:
    """Every measure before and after, block by block; last, the share of experts kept."""
    before, after = comparison.before.layers, comparison.after.layers
    shown: list[tuple[str, list[Line]]] = [
        (name, [("before", ORANGE, [la[name] for la in before]), ("after", BLUE, [la[name] for la in after])])
        for name in _drawn(after)
    ]
    kept, chance = zip(*comparison.saturation(), strict=True)
    if not all(map(math.isnan, kept)):  # needs two live panels
        shown.append(("saturation: share of experts kept", [("null", GREY, chance), ("kept", GREEN, kept)]))
    rows = -(-len(shown) // COLUMNS)
    figure = _figure(11, 2.5 * rows)
    for i, (name, lines) in enumerate(shown):
        _draw_strip(figure.add_subplot(rows, COLUMNS, i + 1), name, lines, legend=i in (0, len(shown) - 1))
    figure.set_label("Every measure of each block before and after: where the lines part, it changed.")
    return figure


def _draw_load(axis: Axes, layer: Layer) -> None:
    experts = np.arange(layer.num_experts)
    axis.bar(experts - 0.2, layer.load_E, 0.4, color=BLUE, label="load: share of the slots")
    axis.bar(experts + 0.2, layer.weight_E, 0.4, color=ORANGE, label="mean weight")
    axis.axhline(1 / layer.num_experts, color=GREY, ls=":", lw=1.3, label="balanced: 1 / E")
    axis.set(xlabel="expert", ylabel="share", title=f"{layer.name}: load of each expert")
    _whole_numbers(axis)
    axis.legend(frameon=False, fontsize=9, ncols=3)


def _draw_heat(figure: Figure, axis: Axes, layers: list[Layer]) -> None:
    """Load times E of each block's experts, from the most used to the least."""
    from matplotlib.colors import TwoSlopeNorm

    grid_LE = np.full((len(layers), max(layer.num_experts for layer in layers)), np.nan)
    for row, layer in enumerate(layers):
        grid_LE[row, : layer.num_experts] = np.sort(layer.load_E)[::-1] * layer.num_experts
        if dead := layer.load_E.count(0):
            left = layer.num_experts - dead - 0.5
            for colour, width in (("black", 3.2), ("white", 1.6)):  # seen on any load
                axis.plot([left, left], [row - 0.5, row + 0.5], color=colour, lw=width)
    top = min(max(2.0, float(np.nanmax(grid_LE))), 4.0)
    picture = axis.imshow(
        np.ma.masked_invalid(grid_LE), aspect="auto", interpolation="nearest", cmap="PuOr_r",
        norm=TwoSlopeNorm(1.0, 0.0, top),
    )  # fmt: skip
    figure.colorbar(picture, ax=axis, label=f"load x E, darkest at {top:.2g} or more", pad=0.01)
    axis.set(
        xlabel="experts of a block, from the most used to the least", facecolor="#eeeeee",
        title="load of each expert; 1: balanced",
    )  # fmt: skip
    step = -(-len(layers) // 30)
    axis.set_yticks(range(0, len(layers), step), _short([la.name for la in layers])[::step], fontsize=8)
    if grid_LE.shape[1] <= 12 and len(layers) <= 8:
        for (row, column), value in np.ndenumerate(grid_LE):
            if not math.isnan(value):
                colour = "white" if value > 1.75 or value < 0.35 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _draw_strip(axis: Axes, name: str, lines: Sequence[Line], legend: bool) -> None:
    """One measure, block after block: a line for each model, or for the null."""
    for label, colour, values in lines:
        few, null = len(values) < 13, label == "null"
        axis.plot(
            range(len(values)), values, ls="-" if len(values) > 1 else "", color=colour, label=label,
            marker="D" if null and few else "" if null else "o", mfc="none" if null else colour,
            ms=5 if few else 2.5,
        )  # fmt: skip
    known = [value for _, _, values in lines for value in values if math.isfinite(value)]
    low, high = min([*known, 0.0]), max([*known, ABOUT[name].axis if name in ABOUT else 1.0])
    axis.set_ylim(low - 0.04 * (high - low), high + 0.12 * (high - low))
    unit = ", nats" if name in ABOUT and "nats" in ABOUT[name].formula else ""
    axis.set_title(name + unit, fontsize=10)
    axis.set_xlabel("block", fontsize=9)
    axis.tick_params(labelsize=8)
    _whole_numbers(axis)
    if len(lines[0][2]) == 1:
        axis.set_xlim(-1, 1)
        axis.set_xticks([])
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize=8)


def history_figure(history: list[dict[str, float]], measure: str) -> Figure:
    """One measure over training: a line per block."""
    import matplotlib

    names = [*dict.fromkeys(key for row in history for key in row if key.endswith(f"/{measure}"))]
    if not names:
        raise ValueError(f"{measure!r} was not measured; there are {', '.join(ABOUT)}")
    figure = _figure(7, 3.6)
    axis = figure.add_subplot()
    steps = [row["step"] for row in history]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    labels = _short([name.removesuffix(f"/{measure}") for name in names])
    for name, colour, label in zip(names, colours, labels, strict=True):
        values = [row.get(name, math.nan) for row in history]
        axis.plot(steps, values, marker="o", ms=3, color=colour, label=label)
    axis.set(xlabel="training step", ylabel=measure)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if len(names) <= 8:
        axis.legend(frameon=False, fontsize=8, title="block", title_fontsize=8)
    else:
        bar: Any = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, len(names) - 1), "viridis")
        figure.colorbar(bar, ax=axis, label="block")
    figure.set_label(f"How {measure} changed over training, a line for each block.")
    return figure
