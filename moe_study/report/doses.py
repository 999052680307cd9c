"""Tables and figures of the dose-response studies. See `plots`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_study import stats
from moe_study.columns import COLUMNS, shown_interval, signed
from moe_study.configs.dose import Panel
from moe_study.report.plots import captioned, hide_from, new_figure, note, too_few
from moe_study.report.tables import FEWEST_SEEDS, comparisons, contrast, paired, show

DOSE_MEASURES = ("accuracy", "cross-entropy", "H(E|c)", "I(x;E)")  # shown of each dose
BETTER = {"accuracy": 1, "cross-entropy": -1}  # of the others neither way is
# Pale enough for black text: purple better, orange worse; where neither way is better, more or less.
DOSE_COLOURS = ListedColormap(mpl.colormaps["PuOr"](np.linspace(0.19, 0.81, 255)))


def dose_effects(
    runs: pd.DataFrame, panel: Panel, name: str
) -> dict[tuple[int, int], stats.PairedComparison | None]:
    """Each dose of a panel, by row and column, minus its control; None below two seeds."""
    return {(row, column): contrast(runs, dose.name, dose.control.name, name) for row, column, dose in panel}


def dose_table(runs: pd.DataFrame, panel: Panel, name: str) -> pd.DataFrame:
    """The panel as text: difference from the control, 95 % t interval, number of seeds."""
    (down, rows), (across, heads) = panel.labels
    cells = [["-"] * len(heads) for _ in rows]
    for (row, column), found in dose_effects(runs, panel, name).items():
        if found is not None:
            shown = show(found, COLUMNS[name])
            cells[row][column] = f"{shown['difference']} {shown['95 % interval']} ({found.seeds})"
    return pd.DataFrame(cells, pd.Index(rows, name=down), pd.Index(heads, name=across))


def dose_trends(runs: pd.DataFrame, panels: Iterable[Panel], names: Sequence[str]) -> pd.DataFrame:
    """What a tenfold factor adds to each measure: every seed's least-squares slope on log10 of the factor,
    their mean and its 95 % t interval. Over the seeds that have all factors of a panel's column."""
    columns: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {}  # those of two panels once
    for panel in panels:
        (down, factors), (across, heads) = panel.labels
        for column, head in enumerate(heads if down == "factor" else ()):
            arms = tuple(line[column].name for line in panel.doses)
            columns.setdefault(arms, (factors, f"{across}: {head}"))
    rows = []
    for name in names:
        for tried, (factors, at) in columns.items():
            both = paired(runs, tried, name)
            if both is not None:
                slopes = np.polyfit(np.log10([float(f) for f in factors]), both.to_numpy().T, 1)[0]
                found = stats.paired_comparison(slopes, np.zeros(len(slopes)))
                rows.append({"measure": COLUMNS[name].title(name), "at": at} | show(found, COLUMNS[name]))
    return comparisons(rows, ["measure", "at"]).rename(columns={"difference": "slope"})


def dose_heatmaps(runs: pd.DataFrame, panel: Panel, names: Sequence[str]) -> Figure:
    """Each measure's difference from the control over a grid of doses, with its 95 % t interval below it;
    framed where that excludes 0. Colour is the difference itself. Rows and columns without any number are
    left out."""
    (down, rows), (across, heads) = panel.labels
    effects = {name: dose_effects(runs, panel, name) for name in names}
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
        column = COLUMNS[name]
        decimals = column.decimals if column.unit == "points" else 3
        sign = BETTER.get(name, 1)
        colours = np.full((len(lines), len(columns)), np.nan)
        for y, x in np.ndindex(colours.shape):
            found = effects[name][lines[y], columns[x]]
            if found is None:
                axis.text(x, y, "-", ha="center", va="center")
                continue
            colours[y, x] = sign * found.difference
            difference = signed(column.scale * found.difference, decimals)
            interval = shown_interval(column.scale * found.low, column.scale * found.high, decimals)
            axis.text(x, y - 0.16, difference, ha="center", va="center")
            if found.seeds < FEWEST_SEEDS:
                continue
            axis.text(x, y + 0.24, interval, ha="center", va="center", fontsize=8)
            if found.low > 0 or found.high < 0:
                axis.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, ec="black", lw=1.5))
        known = np.abs(colours[np.isfinite(colours)])
        reach = max(known.max(initial=0.0), np.finfo(float).tiny)
        axis.imshow(colours, cmap=DOSE_COLOURS, vmin=-reach, vmax=reach, aspect="auto")
        better = "purple: better" if name in BETTER else "purple: more"
        apart = ",\n" if len(columns) < 3 else ", "  # the panels are narrow
        axis.set_title(f"{column.title(name)}{apart}{better}", fontsize=10)
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
        "interval; framed where that excludes 0. Purple is better, orange worse (where neither way is "
        "better: more and less); the deeper, the larger, on a scale of each panel's own. Look for a slope or "
        f"a block, since one cell in twenty is framed by chance. {seeds} paired seeds a cell"
        f"{too_few(counts)}.",
    )


def _is_number(label: str) -> bool:
    return label.replace(".", "").isdigit()


def conclusion(runs: pd.DataFrame, panels: Sequence[Panel], name: str) -> str:
    """For each panel the cell furthest from its control, as a Markdown list."""
    lines = []
    column = COLUMNS[name]
    for panel in panels:
        found = {at: one for at, one in dose_effects(runs, panel, name).items() if one is not None}
        if not found:
            continue
        (down, rows), (across, heads) = panel.labels
        row, head = max(found, key=lambda at: abs(found[at].difference))
        one = found[row, head]
        shown = show(one, column)
        apart = sum(other.low > 0 or other.high < 0 for other in found.values())
        lines.append(
            f"- **{panel.title.capitalize()}**: furthest at {down} {rows[row]}, {across} {heads[head]}, "
            f"where {name} differs by {shown['difference']} {shown['95 % interval']} {column.unit} over "
            f"{one.seeds} seeds; {apart} of {len(found)} cells are told apart from 0."
        )
    return "\n".join(lines) or "No dose yet that two seeds share with its control."
