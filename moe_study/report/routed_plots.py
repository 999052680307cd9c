"""Figures of the AC router's studies and of both remedies crossed. See `plots`.

Shapes: S seeds, X points along an axis, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_study import stats, store
from moe_study.claims import claimed
from moe_study.columns import VISION_COLUMNS, Result, frame_of
from moe_study.configs.run import Run
from moe_study.report import tables
from moe_study.report.plots import (
    ARM_STYLE,
    NO_RUNS,
    arm_style,
    arms_of,
    captioned,
    hide_from,
    legend,
    new_figure,
    note,
    seeds_and_mean,
    seeds_in_words,
    too_few,
)


def draw_mean(axis: Any, arm: str, x: Sequence[float], values_SX: np.ndarray) -> None:
    """Mean over seeds against x, with its 95 % t interval as a band."""
    colour, marker = arm_style(arm)
    axis.plot(x, values_SX.mean(0), color=colour, marker=marker, markersize=4, label=arm)
    if len(values_SX) >= tables.FEWEST_SEEDS:
        low, high = np.array([stats.t_interval(column) for column in values_SX.T]).T
        axis.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)


def corruption_by_severity(results: Sequence[Result]) -> Figure:
    """Accuracy under each kind of corruption against its severity, minus the baseline's at the same seed:
    mean and 95 % interval over seeds. Severity 0 is the clean image."""
    if not results:
        return note(NO_RUNS)
    grouped = arms_of(results)
    first = next((arm for arm in ("linear", "base") if arm in grouped), next(iter(grouped)))
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
    legend(figure, axes[0, 0], 6)
    return captioned(
        figure,
        f"Robustness to corruption, as the difference from `{first}` at the same seed: above the line is "
        f"better. {_severity_0(grouped[first][0])} Means and 95 % t intervals over seeds; "
        f"{seeds_in_words(results, drawn='interval')}.",
    )


def _severity_0(result: Result) -> str:
    """What the first point is, since a table may give another accuracy."""
    images = result["run"].get("corrupted_images", Run.corrupted_images)  # older files lack the option
    last = store.primary_endpoint(result) == store.PRIMARY_ENDPOINT
    epoch = "last epoch" if last else "epoch of the lowest validation cross-entropy"
    return (
        f"Severity 0 is the accuracy on the {images:,} test images that were then corrupted, at the {epoch}: "
        "it need not equal the accuracy in a table."
    )


def _severities(result: Result, kind: str) -> list[float]:
    return [result["corruption"]["clean"], *result["corruption"][kind]]


def swap_curve(results: Sequence[Result]) -> Figure:
    """Cross-entropy lost against the share of words that became <unk>: on the targets left alone, and on all
    of them. Mean and 95 % interval over seeds."""
    if not results:
        return note(NO_RUNS)
    figure, axes = new_figure(9, 3.6, 1, 2)
    for arm, group in arms_of(results).items():
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
    legend(figure, axes[0, 0], 6)
    return captioned(
        figure,
        "What swapped words cost: cross-entropy in the text with some words replaced by <unk>, minus that in "
        "the clean text. A curve that rises is a model that suffers. Left, only the words left alone are "
        "scored, as the verdicts do: below zero they are predicted better. Right, all targets are scored: a "
        "curve may fall because <unk> itself is easy to predict. Means, 95 % t intervals; "
        f"{seeds_in_words(results, drawn='interval')}.",
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
    each run, then averaged over seeds. The dashed line is an even load, 1/E. Networks of one expert
    are left out."""
    mixtures = [r for r in results if len(r["routing"]["layers"][0]["load"]["share"]) > 1]
    if not mixtures:
        return note("no run of a mixture is finished yet")
    grouped = arms_of(mixtures)
    layers = len(mixtures[0]["routing"]["layers"])
    figure, axes = new_figure(3.1 * layers + 0.6, 3.2, 1, layers, sharey=True)
    for at, axis in enumerate(axes[0]):
        for arm, group in grouped.items():
            loads = [r["routing"]["layers"][at]["load"]["share"] for r in group]
            sorted_SE = 100 * np.array([sorted(share, reverse=True) for share in loads])
            colour, marker = arm_style(arm)
            experts = range(1, sorted_SE.shape[1] + 1)
            axis.plot(experts, sorted_SE.mean(0), color=colour, marker=marker, ms=3.5, label=arm)
        axis.axhline(100 / sorted_SE.shape[1], color="#333333", ls="--", lw=1)
        axis.set(title=f"MoE layer {at + 1}", xlabel="expert, by load", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("share of tokens (%)")
    legend(figure, axes[0, 0], len(grouped))
    return captioned(
        figure,
        "Are the experts used evenly? Share of the tokens of the busiest expert (left) to the idlest "
        "(right). The dashed line is an even load, 1/E; a curve that falls steeply is a collapsed layer. "
        f"Means; {seeds_in_words(mixtures)}.",
    )


def paired_differences(results: Sequence[Result], study: str) -> Figure:
    """For each claimed measure of the AC router in a study, treatment minus control.

    Every seed is a dot; below are the mean and its 95 % t interval. The side of zero that the claim asks for
    is shaded. Pairs that no two seeds have are left out.
    """
    measures = claimed(study)
    pairs = list(dict.fromkeys(pair for _, _, contrasts in measures for pair in contrasts))
    runs = frame_of(results, {measure.name: measure.column for _, measure, _ in measures})
    found = {
        (pair, measure.name): tables.paired(runs, pair, measure.name)
        for pair in pairs
        for _, measure, _ in measures
    }
    pairs = [pair for pair in pairs if any(found[pair, m.name] is not None for _, m, _ in measures)]
    if not pairs:
        return note("no two seeds yet that have treatment and control")
    wide = -(-len(measures) // (2 if len(measures) > 3 else 1))
    rows = -(-len(measures) // wide)
    figure, axes = new_figure(
        min(2.6 * wide + 1.6, 9.8), rows * (0.33 * len(pairs) + 1.3), rows, wide, sharey=True
    )
    for axis, (claim, measure, _) in zip(axes.flat, measures, strict=False):
        scale, unit = measure.column.scale, measure.column.unit
        reach = 0.0
        for row, (treatment, control) in enumerate(pairs):
            both = found[(treatment, control), measure.name]
            if both is None:
                continue
            differences = scale * (both[treatment] - both[control]).to_numpy()
            ends = seeds_and_mean(axis, row, differences, *ARM_STYLE[control], size=4, below=0.25)
            reach = max(reach, *np.abs(ends), *np.abs(differences))
        reach = 1.08 * reach or 1.0
        axis.axvspan(*sorted((0, measure.sign * reach)), color="#f0f0f0", lw=0, zorder=0)
        axis.axvline(0, color="#333333", lw=1)
        axis.set(title=f"{claim.wording}:\n{measure.name}", xlabel=unit)
        axis.set(xlim=(-reach, reach), ylim=(len(pairs) - 0.4, -0.6))
        axis.locator_params(axis="x", nbins=5)
    hide_from(axes, len(measures))
    axes[0, 0].set_yticks(range(len(pairs)), [f"{a} - {b}" for a, b in pairs])
    few = too_few(len(both) for both in found.values() if both is not None)
    return captioned(
        figure,
        "The claimed measures, treatment minus each control, paired by seed: dots are seeds, below them "
        f"the mean and its 95 % t interval{few}. The claim asks for the shaded side; an interval that "
        "crosses 0 leaves the sign open.",
    )


def crossed_lines(results: Sequence[Result]) -> Figure:
    """Each measure without and with AC, one line without and one with SNNL: parallel lines, no interaction.
    Seeds as dots, means with their 95 % t intervals as lines."""
    columns, names = VISION_COLUMNS, tables.CROSSED_MEASURES
    runs = frame_of(results, columns)
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
                if len(own) >= tables.FEWEST_SEEDS:
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
        "SNNL. Parallel lines: the two add up. Lines that meet or cross would hint that one changes what the "
        "other does; the table of interactions says whether that is more than chance. Dots are seeds, bars "
        f"95 % t intervals of the means; {seeds_in_words(results, drawn='interval')}. Axes do not begin "
        "at 0.",
    )
