"""Figures of the verdicts, and of which measure sees which planted fault. See `plots`.

Shapes: S seeds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from moe_study import stats
from moe_study.report.first_screen import LOW_IS_GOOD
from moe_study.report.plots import PALETTE, captioned, new_figure
from moe_study.report.verdicts import against, place
from moe_study.trust import TRUTH
from moe_study.verdicts import Verdict

WORD_COLOURS = {
    "supported": PALETTE[4],
    "contradicted": PALETTE[1],
    "smaller than claimed": PALETTE[3],
    "undecided": PALETTE[2],
    "not testable here": "#8a8a8a",
    "pilot": "#8a8a8a",
}


# Of the grid, in inches: as wide as a README shows, text of 9 points, an average letter of it.
GRID_WIDTH, GRID_LEFT, LINE, LETTER = 8.7, 1.75, 0.165, 0.069


def verdict_grid(grid: dict[str, Any]) -> Figure:
    """`first_screen.grid` as a picture: data set x claim, a colour a word, difference and interval."""
    figure = Figure()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    height = 0.0
    for section in grid["sections"]:
        height = _grid_section(axis, height, section)
    height = _grid_legend(axis, height, grid["legend"]) + LINE / 2
    figure.set_size_inches(GRID_WIDTH, height)
    axis.set(xlim=(0, GRID_WIDTH), ylim=(height, 0))
    return captioned(
        figure,
        "Every data set (row) and every claim (column): a colour per verdict, mean difference and 95 % "
        "interval. What is subtracted stands beside the title, above the columns or below the numbers. "
        f"{LOW_IS_GOOD}: low is good.",
    )


def _wrapped(text: str, wide: float) -> list[str]:
    """The lines of a text in a column."""
    return textwrap.wrap(text, int(wide / LETTER))


def _write(axis: Any, x: float, y: float, lines: Sequence[str], **style: Any) -> float:
    """Write from y downwards; where the next line would begin."""
    for at, line in enumerate(lines):
        axis.text(x, y + LINE * (at + 0.5), line, va="center", **({"fontsize": 9} | style))
    return y + LINE * len(lines)


def _grid_section(axis: Any, y: float, section: dict[str, Any]) -> float:
    """Title, heads and rows; where the next section begins."""
    columns = section["columns"]
    wide = (GRID_WIDTH - GRID_LEFT) / len(columns)
    y = _write(axis, 0.05, y, [section["title"]], fontsize=10, fontweight="bold") + 0.05
    heads = [
        _wrapped(f"{column['claim']} ({column['unit']})".removesuffix(" ()"), wide - 0.1)
        + _wrapped(column["against"], wide - 0.1)
        for column in columns
    ]
    bottom = y + LINE * max(map(len, heads))
    for at, lines in enumerate(heads):
        _write(axis, GRID_LEFT + wide * at, bottom - LINE * len(lines), lines, color="#555555")
    y = bottom + 0.05
    for row, cells in section["rows"].items():
        below = [_write(axis, 0.05, y, _wrapped(row, GRID_LEFT))]
        below += [_grid_cell(axis, GRID_LEFT + wide * at, y, cell, wide) for at, cell in enumerate(cells)]
        y = max(below) + 0.06
    return y + LINE


def _grid_cell(axis: Any, x: float, y: float, cell: Sequence[dict[str, str]], wide: float) -> float:
    """The verdicts of a cell below each other, on one line each where there is room; where they end."""
    for one in cell:
        lines = [f"{one['mark']} {one['difference']}", one["interval"]]
        lines = lines if wide < 1.9 else [" ".join(lines)]
        box: Any = {"fc": WORD_COLOURS[one["word"]], "alpha": 0.3}
        axis.add_patch(Rectangle((x, y), wide - 0.05, LINE * len(lines), **box))
        y = _write(axis, x + 0.04, y, lines)
        y = _write(axis, x + 0.04, y, _wrapped(one["against"], wide - 0.1), color="#555555") + 0.03
    return y


def _grid_legend(axis: Any, y: float, legend: Sequence[tuple[str, str, str]]) -> float:
    """What the colours and marks mean; where it ends."""
    x = 0.05
    for word, mark, _ in legend:
        axis.add_patch(Rectangle((x, y + 0.02), 0.12, 0.12, fc=WORD_COLOURS[word], alpha=0.3))
        _write(axis, x + 0.16, y, [f"{mark} {word}"])
        x += 0.4 + 0.075 * len(word)
    y += 1.2 * LINE
    if any("†" in text.get_text() for text in axis.texts):
        y = _write(axis, 0.05, y, ["†: at the epoch of the lowest validation cross-entropy"], color="#555555")
    return y


def verdict_forest(verdicts: Sequence[Verdict]) -> Figure:
    """Every claim against its controls, grouped by paper, in units of the difference that counts: the
    published one, or the declared margin. 0 is no difference, 1 the claimed one. Thick: 90 %; thin: 95 %."""
    sources = list(dict.fromkeys(v.claim.source for v in verdicts))
    rows = [  # a heading, then its verdicts
        row for source in sources for row in (source, *(v for v in verdicts if v.claim.source == source))
    ]
    figure, axes = new_figure(9.8, 0.32 * len(rows) + 1.5)
    axis = axes[0, 0]
    axis.axvline(0, color="#333333", lw=1)
    axis.axvline(1, color="#333333", lw=1, ls="--")
    names = []
    reach = 3.0
    for at, row in enumerate(rows):
        if isinstance(row, str):
            names.append(row.upper())
            continue
        name = f"{row.claim.wording}, {place(row)},", against(row)
        names.append(("\n" if sum(map(len, name)) > 60 else " ").join(name))
        reach = max(reach, _forest_row(axis, at, row))
    axis.set_yticks(range(len(rows)), names)
    for row, label in zip(rows, axis.get_yticklabels(), strict=True):
        label.set_fontsize(9)
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axis.set_xscale("symlog", linthresh=2, linscale=0.9)
    shown = [x for x in (-100, -10, -3, -1, 0, 1, 3, 10, 30, 100) if abs(x) <= 1.3 * reach]
    axis.set_xticks(shown, [f"{x:g}" for x in shown])
    axis.minorticks_off()
    axis.set(xlim=(-1.4 * reach, 3.0 * reach), ylim=(len(rows) - 0.4, -0.6))
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(
        "← against the claim  |  in units of the difference that counts  |  as claimed →", fontsize=9
    )
    hollow = "; hollow dots are pilots" * any(v.word == "pilot" for v in verdicts)
    return captioned(
        figure,
        "Each verdict as a difference in units of the one that counts (dashed line at 1: the published "
        "difference, or the declared margin). Right of 0 is the claimed direction. Thick bars are 90 %, thin "
        f"ones 95 % intervals{hollow}; beside the words stand the paired seeds. The axis is linear up to 2 "
        "and logarithmic beyond.",
    )


def _forest_row(axis: Any, at: int, verdict: Verdict) -> float:
    """One verdict's intervals, mean, seeds and word; the largest value drawn."""
    colour, beside = WORD_COLOURS[verdict.word], axis.get_yaxis_transform()
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
