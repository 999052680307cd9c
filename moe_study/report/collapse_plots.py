"""Figures of the collapse study: three domains, one label space.

Shapes: G domains, E experts, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from moe_study.data import Dataset
from moe_study.report.plots import ARM_STYLE, arm_style, new_figure
from moe_study.report.tables import Result

DOMAIN_NAMES = {
    "domains": ("MNIST", "FashionMNIST", "CIFAR-10, grey"),
    "digit_domains": ("upright", "turned", "inverted"),
}


def domain_images(dataset: Dataset) -> Figure:
    """One test image of each label (column) and domain (row): one label means three things."""
    test = dataset.test
    assert test.domains_N is not None
    names = DOMAIN_NAMES[dataset.name]
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
    return figure


def collapse_and_accuracy(results: Sequence[Result]) -> Figure:
    """Each run as a dot: effective experts, exp H(E), against test accuracy; large: the mean of an arm. Lines
    for the dense networks, which have no experts to lose."""
    figure, axes = new_figure(7.5, 4.6)
    axis = axes[0, 0]
    tried = dict.fromkeys(r["run"]["arm"] for r in results)
    for arm in [*(arm for arm in ARM_STYLE if arm in tried), *(arm for arm in tried if arm not in ARM_STYLE)]:
        own = [r for r in results if r["run"]["arm"] == arm]
        colour, marker = arm_style(arm)
        accuracy_S = np.array([100 * r["task"]["accuracy"] for r in own])
        if own[0]["run"]["model"]["num_experts"] == 1:
            style = "--" if arm == "dense" else ":"
            axis.axhline(accuracy_S.mean(), color=colour, lw=1.2, ls=style, label=arm)
            continue
        effective_S = np.array([r["routing"]["load"]["effective_experts"] for r in own])
        axis.plot(effective_S, accuracy_S, marker, color=colour, alpha=0.3, ms=4, mew=0)
        axis.plot(
            effective_S.mean(),
            accuracy_S.mean(),
            marker,
            color=colour,
            ms=10,
            mec="white",
            mew=1.2,
            label=arm,
        )
    axis.set(xlabel="effective experts, exp H(E)", ylabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    return figure


def domain_routing(results: Sequence[Result], arms: Sequence[str]) -> Figure:
    """Mean gate of each domain (row) over experts (columns), at each arm's seed of median accuracy; experts
    are ordered so that they match those of the first arm (Hungarian method)."""
    chosen = {}
    for arm in arms:
        own = sorted((r for r in results if r["run"]["arm"] == arm), key=lambda r: r["task"]["accuracy"])
        if own:
            chosen[arm] = own[len(own) // 2]
    figure, axes = new_figure(2.9 * max(len(chosen), 1), 2.5, 1, max(len(chosen), 1))
    first_GE = None
    for axis, (arm, result) in zip(axes[0], chosen.items(), strict=True):
        gate_GE = np.array(result["domains"]["domain_expert"])
        if first_GE is None:
            first_GE = gate_GE = gate_GE[:, gate_GE.argmax(0).argsort(kind="stable")]
        else:
            gate_GE = gate_GE[:, linear_sum_assignment(first_GE.T @ gate_GE, maximize=True)[1]]
        axis.imshow(gate_GE, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(gate_GE):
            shade = "white" if value > 0.6 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
        names = DOMAIN_NAMES[result["run"]["dataset"]]
        axis.set(xticks=range(gate_GE.shape[1]), yticks=range(len(names)), xlabel="expert")
        axis.set_xticklabels(range(1, gate_GE.shape[1] + 1))
        axis.set_yticklabels(names if axis is axes[0, 0] else [], fontsize=8)
        accuracy = 100 * result["task"]["accuracy"]
        axis.set_title(f"{arm}, seed {result['run']['seed']}\n{accuracy:.1f} %", fontsize=9)
    return figure
