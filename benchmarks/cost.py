"""Rates of `cost`, fitted to finished runs, and how well runs are foretold that had no say in them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.measure import Machine, probe
from moe_study import cost, study

ROUNDS = 50  # of reweighting


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in their seed alone, or in numbers that take no time."""

    study: str
    dataset: str
    arm: str
    amount: cost.Amount
    seconds: float  # median wall time
    memory_mb: float
    runs: int


def groups(profile: str = "core") -> list[Group]:
    found: dict[tuple[str, str, str, cost.Amount], list[dict[str, Any]]] = {}
    for run in study.runs(profile):
        amount = cost.amount(run)
        if amount is not None and run.path.exists():
            content = study.read(run)
            if "same_as" not in content:  # trained for another study
                found.setdefault((run.study, run.dataset, run.arm, amount), []).append(content)
    return [
        Group(
            *key,
            statistics.median(content["wall_seconds"] for content in results),
            statistics.median(content["peak_memory_mb"] for content in results),
            len(results),
        )
        for key, results in found.items()
    ]


def fit(known: Sequence[Group]) -> dict[str, float]:
    """Seconds per unit of each amount: least absolute relative error, by reweighted least squares.

    Absolute, because a run that shared its core with something else was slower by up to a factor of five.
    """
    amounts_GA = np.array([astuple(group.amount) for group in known])
    seconds_G = np.array([group.seconds for group in known])
    design_GA = amounts_GA / seconds_G[:, None]
    scale_A = np.maximum(design_GA.max(0), 1e-30)
    weight_G = np.ones(len(known))
    for _ in range(ROUNDS):
        rates_A, _ = nnls(design_GA / scale_A * weight_G[:, None], weight_G)
        error_G = np.abs(design_GA / scale_A @ rates_A - 1)
        weight_G = 1 / np.sqrt(np.maximum(error_G, 0.01))
    names = [field.name for field in fields(cost.Amount)]
    return dict(zip(names, (rates_A / scale_A).tolist(), strict=True))


def left_out(known: Sequence[Group], keys: Sequence[str]) -> list[float]:
    """Predicted over actual seconds of each group, fitted without all groups that share its `keys`."""

    def name(group: Group) -> tuple[str, ...]:
        return tuple(getattr(group, key) for key in keys)

    ratios = []
    for group in known:
        rates = fit([other for other in known if name(other) != name(group)])
        ratios.append(cost.seconds(group.amount, rates) / group.seconds)
    return ratios


def check(machine: Machine) -> dict[str, Any]:
    known = groups()
    by_arm, by_study = (left_out(known, keys) for keys in (("study", "dataset", "arm"), ("study", "dataset")))
    return {
        "seconds_per": fit(known),
        "rates": probe(machine)._asdict(),  # of the machine that made the runs: it is asked to fit them too
        "groups": [
            {
                "study": group.study,
                "dataset": group.dataset,
                "arm": group.arm,
                "runs": group.runs,
                "seconds": group.seconds,
                "without_arm": arm * group.seconds,
                "without_study": whole * group.seconds,
                "memory_mb": group.memory_mb,
            }
            for group, arm, whole in zip(known, by_arm, by_study, strict=True)
        ],
        "median_error": {
            name: statistics.median(abs(ratio - 1) for ratio in ratios)
            for name, ratios in (("without_arm", by_arm), ("without_study", by_study))
        },
    }


def figure(content: dict[str, Any]) -> Any:
    """Predicted against actual time, each without its own arm and without its own study and data set."""
    from moe_study.report import plots

    drawn, axes = plots.new_figure(9, 4.5, 1, 2)
    for axis, key, title in zip(
        axes[0], ("without_arm", "without_study"), ("arm", "study and data set"), strict=True
    ):
        found = content["fit"]["groups"]
        for at, name in enumerate(dict.fromkeys(group["study"] for group in found)):
            own = [group for group in found if group["study"] == name]
            axis.plot(
                [group["seconds"] for group in own],
                [group[key] for group in own],
                "os"[at // len(plots.PALETTE)],
                color=plots.PALETTE[at % len(plots.PALETTE)],
                ms=5,
                label=name,
            )
        ends = [group["seconds"] for group in found]
        ticks = [at for at in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if min(ends) <= at <= max(ends)]
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], "k:")
        axis.set(xscale="log", yscale="log", xlabel="measured (s)", ylabel="foretold (s)")
        axis.set_title(f"fitted without its own {title}")
        axis.set_xticks(ticks, ticks)
        axis.set_yticks(ticks, ticks)
        axis.minorticks_off()
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawn
