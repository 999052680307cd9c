"""Figures and table of the collapse map: where mixtures collapse, what a learned gate costs, what SNNL adds.

A cell is one size of the model: experts across, their width down, a panel for each width of the code.

Shapes: E experts, H expert hidden width, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe_study.columns import Result, signed
from moe_study.report.plots import STYLE, captioned, note

Size = tuple[int, int, int]  # code width, E, H
Cell = dict[tuple[str, int], Result]  # by arm and seed
Quantity = Callable[[Cell], np.ndarray]  # values over the seeds that it is finished for
LEAST_WIDTH = 5.5  # inches: room for the title of a row


def _cells(results: Sequence[Result]) -> dict[Size, Cell]:
    found: dict[Size, Cell] = {}
    for result in results:
        run, model = result["run"], result["run"]["model"]
        size = model["code_dim"], model["num_experts"], model["expert_hidden"]
        found.setdefault(size, {})[run["arm"], run["seed"]] = result
    return found


def evenness(of: str, cell: Cell) -> np.ndarray:
    """(exp H(E) - 1) / (E - 1) of an arm: 1 where all experts are used alike, 0 where one does all."""
    values = []
    for (arm, _), result in cell.items():
        if arm == of:
            experts = result["run"]["model"]["num_experts"]
            values.append((result["routing"]["load"]["effective_experts"] - 1) / (experts - 1))
    return np.array(values)


def gain(treatment: str, control: str, cell: Cell) -> np.ndarray:
    """Accuracy of one arm less that of another, in points, paired by seed."""
    seeds = [seed for arm, seed in cell if arm == treatment and (control, seed) in cell]
    accuracy = {key: 100 * result["task"]["accuracy"] for key, result in cell.items()}
    return np.array([accuracy[treatment, seed] - accuracy[control, seed] for seed in seeds])


COSTS: dict[str, Quantity] = {
    "base − uniform-gate: does learned routing pay?": partial(gain, "base", "uniform-gate"),
    "base-balance − base: does balance help?": partial(gain, "base-balance", "base"),
    "base-balance − uniform-gate: does it pay with balance?": partial(gain, "base-balance", "uniform-gate"),
}
GAINS: dict[str, Quantity] = {
    "snnl − base": partial(gain, "snnl", "base"),
    "snnl at a tenth of the factor − base": partial(gain, "snnl-weaker", "base"),
    "snnl − uniform-snnl: does routing pay with SNNL?": partial(gain, "snnl", "uniform-snnl"),
}


def collapse_map(results: Sequence[Result]) -> Figure:
    """How evenly `base` uses its experts, median over seeds: dark where it has collapsed."""
    of_base: dict[str, Quantity] = {"evenness of use, base": partial(evenness, "base")}
    return captioned(
        _map(results, _with_values(results, of_base), even=True),
        "Where a mixture collapses: how evenly `base` uses its E experts, (exp H(E) - 1) / (E - 1), over "
        "their number (across), their width (down) and the code's (panels). 1: all alike; 0: one does all; "
        f"dark: collapsed. {_medians(results)}.",
    )


def cost_map(results: Sequence[Result]) -> Figure:
    """Accuracy in points: learned routing against a constant gate, and what balancing the load changes."""
    cells = _cells(results).values()
    lost = [
        np.median(values_S) < 0 for c in cells if (values_S := gain("base-balance", "uniform-gate", c)).size
    ]
    even = [np.median(values_S) for c in cells if (values_S := evenness("base-balance", c)).size]
    said = (
        f"With that loss a learned gate is less accurate than a constant one in {sum(lost)} of {len(lost)} "
        f"cells; its evenness is {math.floor(100 * min(even)) / 100:.2f} or more in all of them."
        if lost
        else ""
    )
    shown = _with_values(results, COSTS)
    return captioned(
        _map(results, shown),
        "What a learned gate costs in accuracy against a constant one (`uniform-gate`), without and with the "
        f"balance loss, row by row: {_rows(shown)}. {said} {_differences(results)}",
    )


def gain_map(results: Sequence[Result]) -> Figure:
    """Accuracy in points: what SNNL adds to `base`, and learned against constant routing with SNNL."""
    shown = _with_values(results, GAINS)
    return captioned(
        _map(results, shown),
        "What SNNL adds to accuracy, and what learned routing adds with it, row by row: "
        f"{_rows(shown)}. {_differences(results)}",
    )


def _with_values(results: Sequence[Result], quantities: dict[str, Quantity]) -> dict[str, Quantity]:
    """Those that some cell has a value of: not every profile has every arm."""
    cells = _cells(results).values()
    return {title: of for title, of in quantities.items() if any(of(cell).size for cell in cells)}


def _rows(quantities: dict[str, Quantity]) -> str:
    """Their titles, without the question behind each colon."""
    return "; ".join(title.split(":")[0] for title in quantities) or "none finished"


def _medians(results: Sequence[Result]) -> str:
    seeds = len({result["run"]["seed"] for result in results})
    return f"Medians over {seeds} seeds" if seeds > 1 else "One seed"


def _differences(results: Sequence[Result]) -> str:
    """How to read a map of differences."""
    seeds = len({result["run"]["seed"] for result in results})
    chance = f"; bold where all seeds agree on the sign, as 1 cell in {2 ** (seeds - 1)} does by chance"
    return (
        f"{_medians(results)}, in points. Red: higher, each row on a scale of its own{chance * (seeds > 1)}."
    )


def map_table(results: Sequence[Result]) -> pd.DataFrame:
    """Each difference over the map: in how many cells all seeds agree on its sign, and of its median over
    seeds the mean and the range."""
    cells = _cells(results)
    rows = {}
    for title, quantity in (COSTS | GAINS).items():
        per_cell = [values_S for cell in cells.values() if (values_S := quantity(cell)).size]
        if per_cell:
            medians = [np.median(values_S) for values_S in per_cell]
            rows[title] = {
                "cells": len(per_cell),
                "seeds": max(map(len, per_cell)),
                "higher in all seeds": sum((values_S > 0).all() for values_S in per_cell),
                "lower in all seeds": sum((values_S < 0).all() for values_S in per_cell),
                "mean of medians, points": f"{np.mean(medians):+.2f}",
                "lowest": f"{min(medians):+.2f}",
                "highest": f"{max(medians):+.2f}",
            }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "difference in accuracy"
    return table


def _medians_by_width(results: Sequence[Result], treatment: str, control: str) -> dict[int, list[float]]:
    """Median over seeds of the difference in accuracy, in points: one a size, by expert width."""
    found: dict[int, list[float]] = {}
    for (_, _, width), cell in sorted(_cells(results).items()):
        if (values_S := gain(treatment, control, cell)).size:
            found.setdefault(width, []).append(float(np.median(values_S)))
    return dict(sorted(found.items()))


def mean_gains(results: Sequence[Result], treatment: str, control: str) -> dict[int, float]:
    """By expert width: the mean of these medians."""
    return {w: float(np.mean(own)) for w, own in _medians_by_width(results, treatment, control).items()}


def by_width(results: Sequence[Result]) -> pd.DataFrame:
    """By expert width: mean over sizes of the median difference in accuracy, and how many lie below 0."""
    rows: dict[str, dict[int, str]] = {}
    for a, b in (("base", "uniform-gate"), ("snnl", "base"), ("snnl", "uniform-gate")):
        rows[f"{a} - {b}, points"] = {
            width: f"{signed(float(np.mean(own)), 2)} ({sum(one < 0 for one in own)} of {len(own)})"
            for width, own in _medians_by_width(results, a, b).items()
        }
    return pd.DataFrame(rows).rename_axis("expert width")


def _map(results: Sequence[Result], quantities: dict[str, Quantity], even: bool = False) -> Figure:
    """A row of panels for each quantity, with medians over seeds in the cells. Evenness lies in [0, 1];
    differences have colours that are even around 0."""
    cells = _cells(results)
    if not quantities:
        return note("no seed yet that has both arms of a difference")
    codes, experts, widths = (sorted({size[i] for size in cells}) for i in range(3))
    with mpl.rc_context(STYLE):
        size = max(0.9 + 2.5 * len(codes), LEAST_WIDTH), 0.3 + 2.1 * len(quantities)
        figure = Figure(figsize=size, layout="constrained")
        for part, (title, quantity) in zip(
            figure.subfigures(len(quantities), 1, squeeze=False)[:, 0], quantities.items(), strict=True
        ):
            values = {at: quantity(cell) for at, cell in cells.items()}
            medians = {at: np.median(values_S) for at, values_S in values.items() if values_S.size}
            bound = max(map(abs, medians.values()))
            low, high, colours = (0, 1, "viridis") if even else (-bound, bound, "RdBu_r")
            axes = part.subplots(1, len(codes), squeeze=False)[0]
            for axis, code in zip(axes, codes, strict=True):
                shown_HE = np.array([[medians.get((code, e, h), np.nan) for e in experts] for h in widths])
                image = axis.imshow(shown_HE, cmap=colours, vmin=low, vmax=high, aspect="auto")
                for y, x in np.argwhere(np.isfinite(shown_HE)):
                    _write(image, x, y, shown_HE[y, x], values[code, experts[x], widths[y]], even)
                axis.set(xticks=range(len(experts)), yticks=range(len(widths)), xlabel="experts")
                axis.set_xticklabels(map(str, experts))
                axis.set_yticklabels(map(str, widths))
                axis.set_title(f"code of {code}", fontsize=9)
            axes[0].set_ylabel("expert width")
            part.suptitle(title, fontsize=10, weight="bold", x=0.01, ha="left")
            part.colorbar(image, ax=axes.tolist(), shrink=0.9, label="evenness" if even else "points")
    return figure


def _write(image: Any, x: int, y: int, median: float, values_S: np.ndarray, even: bool) -> None:
    """A median in its cell, in an ink that shows; of a difference bold where all seeds agree on the sign."""
    red, green, blue, _ = image.cmap(image.norm(median))
    ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
    agree = not even and values_S.size > 1 and abs(np.sign(values_S).sum()) == values_S.size
    text, weight = f"{median:.2f}" if even else signed(median, 1), "bold" if agree else "normal"
    image.axes.text(x, y, text, ha="center", va="center", fontsize=8, weight=weight, color=ink)
