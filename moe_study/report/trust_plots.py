"""Figure of which measure sees which planted fault. See `plots`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from moe_study.report.plots import PALETTE, captioned, new_figure
from moe_study.trust import TRUTH

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
