"""Figures of the collapse study: three domains, one label space.

Shapes: G domains, E experts, S seeds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon
from scipy.special import entr

from moe_study.columns import Result
from moe_study.configs.arms import MAIN_ARMS
from moe_study.data import DATASETS, Dataset
from moe_study.report.plots import (
    DATASET_TITLES,
    PALETTE,
    SHARES,
    arm_style,
    arms_of,
    at_one_seed,
    captioned,
    hide_from,
    matched,
    new_figure,
    seeds_in_words,
    which_seed,
    write_values,
)
from moe_study.report.verdicts import in_words


def domain_images(dataset: Dataset) -> Figure:
    """One test image of each label (column) and domain (row): one label means three things."""
    test = dataset.test
    assert test.domains_N is not None
    names = DATASETS[dataset.name].domains
    figure, axes = new_figure(9, 0.95 * len(names) + 0.3, len(names), dataset.num_classes)
    for domain, name in enumerate(names):
        for label in range(dataset.num_classes):
            axis = axes[domain, label]
            at = ((test.domains_N == domain) & (test.labels_N == label)).nonzero()[0, 0]
            axis.imshow(test.images_NCHW[at, 0].cpu(), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            if domain == 0:
                axis.set_title(f"label {label}", fontsize=9)
        axes[domain, 0].set_ylabel(name, fontsize=9)
    return captioned(
        figure,
        f"One label means {len(names)} things: a test image of each label (column) in each domain (row).",
    )


def collapse_and_accuracy(results: Sequence[Result]) -> Figure:
    """Each run as a dot: effective experts, exp H(E), against test accuracy; large: the mean of an arm. Lines
    for the networks of one expert, which have none to lose."""
    figure, axes = new_figure(8.4, 4.3)
    axis = axes[0, 0]
    lines = iter(("--", ":", "-."))
    aside = []  # what some arms are, for the caption
    for arm, own in arms_of(results).items():
        colour, marker = arm_style(arm)
        accuracy_S = np.array([100 * r["task"]["accuracy"] for r in own])
        model = own[0]["run"]["model"]
        if model.get("gate") == "uniform":
            aside.append("a constant gate uses all experts")
        if model["num_experts"] == 1:
            aside.append("lines are the dense networks, which have no experts to lose")
            axis.axhline(accuracy_S.mean(), color=colour, lw=1.2, ls=next(lines, "-"), label=arm)
            continue
        effective_S = np.array([r["routing"]["load"]["effective_experts"] for r in own])
        axis.plot(effective_S, accuracy_S, marker, color=colour, alpha=0.3, ms=4, mew=0)
        centre = effective_S.mean(), accuracy_S.mean()
        axis.plot(*centre, marker, color=colour, ms=10, mec="white", mew=1.2, label=arm)
    axis.set(xlabel="effective experts, exp H(E)", ylabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9, frameon=False)
    return captioned(
        figure,
        "Is a model with more experts at work more accurate? To the right more experts are at work, upwards "
        "accuracy rises. Small marks are runs, large ones the means of arms; "
        f"{'; '.join(dict.fromkeys([*aside, seeds_in_words(results)]))}.",
    )


def domain_routing(results: Sequence[Result]) -> Figure:
    """Mean gate of each domain (row) over experts (columns), all arms at one seed; experts are ordered so
    that they match those of the first arm (Hungarian method). Arms that learn no gate are left out."""
    gated = {
        arm: own
        for arm, own in arms_of(results).items()
        if own[0]["run"]["model"]["num_experts"] > 1 and own[0]["run"]["model"]["gate"] == "mlp"
    }
    chosen = at_one_seed(gated)
    wide = min(max(len(chosen), 1), 4)
    tall = max(-(-len(chosen) // wide), 1)
    figure, axes = new_figure(2.3 * wide + 0.6, 2.1 * tall, tall, wide)
    first_GE = None
    for axis, (arm, result) in zip(axes.flat, chosen.items(), strict=False):
        gate_GE = np.array(result["domains"]["domain_expert"])
        if first_GE is None:
            first_GE = gate_GE = gate_GE[:, gate_GE.argmax(0).argsort(kind="stable")]
        else:
            gate_GE = matched(gate_GE, first_GE)
        axis.imshow(gate_GE, **SHARES)
        write_values(axis, gate_GE)
        names = DATASETS[result["run"]["dataset"]].domains
        axis.set(xticks=range(gate_GE.shape[1]), yticks=range(len(names)), xlabel="expert")
        axis.set_xticklabels(range(1, gate_GE.shape[1] + 1))
        axis.set_yticklabels(names if axis in axes[:, 0] else [], fontsize=9)
        accuracy = 100 * result["task"]["accuracy"]
        arm_named = textwrap.fill(in_words(arm), 24)
        axis.set_title(f"{arm_named}\nseed {result['run']['seed']}: {accuracy:.1f} % accurate", fontsize=10)
    hide_from(axes, len(chosen))
    return captioned(
        figure,
        "Who serves which domain: the mean gate of each domain (row) over the experts (columns), with "
        "experts matched between pictures. Rows that differ: the gate tells domains apart; one bright "
        "column: routing collapse. In the titles: accuracy on all test images. Shown is "
        f"{which_seed(chosen)}.",
    )


def idea(results: Sequence[Result]) -> Figure:
    """The study in one look: features, gate and experts, without and with SNNL. Features are drawn by hand;
    mean gate weights (domains are of one size), effective experts and accuracy are those of one seed."""
    chosen = at_one_seed(arms_of(results, MAIN_ARMS))
    figure, axes = new_figure(4.8 * max(len(chosen), 1), 3.0, 1, max(len(chosen), 1))
    draw = np.random.default_rng(0)
    measured, known = [], []
    for axis, (arm, result) in zip(axes[0], chosen.items(), strict=True):
        apart = result["run"]["objective"]["snnl"] is not None
        gate_GE = np.array(result["domains"]["domain_expert"])
        weight_E = np.sort(gate_GE.mean(0))[::-1]
        for at, angle in enumerate(np.pi * (0.5 + 2 * np.arange(3) / 3)):
            centre = 0.55 * np.array([np.cos(angle), np.sin(angle)]) * (1.0 if apart else 0.25)
            points_N2 = (
                np.array([1.0, 1.6]) + centre + draw.normal(scale=0.13 if apart else 0.33, size=(40, 2))
            )
            axis.plot(*points_N2.T, "o", color=PALETTE[1 + at], ms=3, mew=0, alpha=0.8)
        axis.add_patch(Polygon([(2.3, 1.1), (2.3, 2.1), (2.75, 1.6)], fc="#dddddd", ec="#555555"))
        places = np.linspace(2.75, 0.45, len(weight_E))
        for e, (weight, y) in enumerate(zip(weight_E, places, strict=True), 1):
            lines: Any = {"lw": 0.4 + 10 * weight, "alpha": 0.75, "solid_capstyle": "butt"}
            axis.plot([2.75, 4.0], [1.6, y], color="#333333", **lines)
            shade = 0.12 + 0.88 * weight / weight_E.max()
            box: Any = {"boxstyle": "round,pad=0.04", "fc": (0, 0.45, 0.7, shade), "ec": "#555555"}
            axis.add_patch(FancyBboxPatch((4.05, y - 0.2), 0.85, 0.4, **box))
            ink = "white" if shade > 0.6 else "black"
            axis.text(4.47, y, f"expert {e}", ha="center", va="center", fontsize=9, color=ink)
            axis.text(5.05, y, f"{100 * weight:.0f} %", va="center", fontsize=9)
        for x, label in ((1.0, "features"), (2.5, "gate"), (4.47, "experts")):
            axis.text(x, 3.15, label, ha="center", fontsize=10)
        effective = np.exp(entr(weight_E).sum())
        told_apart = entr(weight_E).sum() - entr(gate_GE).sum(1).mean()
        known.append(float(told_apart))
        measured.append(f"{in_words(arm)} {effective:.1f} effective experts and {told_apart:.2f} nats")
        accuracy = 100 * result["task"]["accuracy"]
        title = f"{in_words(arm)}: {accuracy:.1f} % accurate, {effective:.1f} effective experts"
        axis.set_title(title, fontsize=10)
        axis.set(xlim=(-0.1, 5.5), ylim=(0.1, 3.35))
        axis.set_axis_off()
    one = next(iter(chosen.values()), None)
    where = f" ({DATASET_TITLES[one['run']['dataset']]})" if one else ""
    return captioned(
        figure,
        "The SNNL paper's idea, not a finding: a gate shares inputs out among experts by their features. "
        "Where classes overlap (left), it tells them apart badly and a few experts get most of the work: "
        "collapse. SNNL pulls each class together (right), so that the gate should tell more apart and "
        "spread the work. Dots are drawn by hand, colours are classes. Measured are the percentages (the "
        "gate's mean weights), effective experts (the exponential of their entropy), accuracy, and how far "
        f"the gate tells domains apart (mutual information of domain and expert): {', '.join(measured)}, at "
        f"{which_seed(chosen)}{where}."
        + " Here the opposite happened: with SNNL the gate tells domains apart less."
        * (known[-1:] < known[:1]),
    )
