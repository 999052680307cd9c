"""The pieces of the tour notebook: hand-made gates, SNNL on points in the plane, a mixture to look at, the
space of the AC router.

Shapes: N samples, E experts, C classes, D code width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from moe_lib import MoE, metrics
from moe_lib.rng import generator
from moe_lib.snnl import soft_nearest_neighbor_loss
from moe_study import theory
from moe_study.data.planted import ClusterConfig, feature_clusters
from moe_study.report.plots import PALETTE, captioned, legend, new_figure

CLASS_COLOURS = PALETTE[1:5]
CLASS_MARKERS = ("o", "s", "^", "D")
LIMIT = 1.75  # of the plane that is drawn
GREYS = ("#f2f2f2", "#d4d4d4", "#b0b0b0", "#8c8c8c")  # the ground of each expert


def gates_table(gates: Mapping[str, Tensor], labels_N: Tensor, seed: int) -> pd.DataFrame:
    """Routing measures of some gates, [N, E] each, on samples with these labels."""
    draw = generator(seed, "gates")
    classes = int(labels_N.max()) + 1
    rows = {}
    for name, probs_NE in gates.items():
        entropy = metrics.routing_entropy(probs_NE, labels_N, classes)
        rows[name] = {
            "H(E)": entropy.marginal,
            "H(E|x)": entropy.per_sample,
            "H(E|c)": entropy.class_conditional,
            "I(x;E)": entropy.information_input,
            "I(c;E)": entropy.information_class,
            "I(c;E) null": metrics.information_class_null(probs_NE, labels_N, classes, draw),
            "AMI": metrics.load(probs_NE, labels_N).adjusted_mutual_information,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("gate").round(3) + 0.0  # no -0.0


def eps_form(points_ND: Tensor, labels_N: Tensor, temperature: float, eps: float = 1e-5) -> float:
    """SNNL as the authors' earlier code (pt-snnl) guards it: eps inside the sum and inside the logarithm."""
    distance_NN = (points_ND[:, None] - points_ND[None]).square().sum(2)
    mass_NN = (-distance_NN / temperature).exp().fill_diagonal_(0)
    same_NN = labels_N[:, None] == labels_N[None]
    share_N = (mass_NN * same_NN).sum(1) / (eps + mass_NN.sum(1))
    return -(eps + share_N).log().mean().item()


def temperature_table(points_N2: Tensor, labels_N: Tensor) -> pd.DataFrame:
    rows = []
    for temperature in (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5):
        exact = soft_nearest_neighbor_loss(points_N2, labels_N, temperature, "sqeuclidean").item()
        rows.append(
            {"T": f"{temperature:g}", "exact": exact, "with eps": eps_form(points_N2, labels_N, temperature)}
        )
    return pd.DataFrame(rows).set_index("T").round(3) + 0.0


def snnl_figure(points_N2: Tensor, labels_N: Tensor, temperatures: Sequence[float] = (0.05, 1.0)) -> Figure:
    """The points, coloured by class, and then by their own loss at each temperature."""
    figure, axes = new_figure(3.6 * len(temperatures) + 3.8, 3.6, 1, len(temperatures) + 1)
    _scatter(axes[0, 0], points_N2, labels_N)
    axes[0, 0].set_title("eight clusters, four classes")
    legend(figure, axes[0, 0], loc="outside left center", columns=1, title="class", markerscale=2)
    for axis, temperature in zip(axes[0, 1:], temperatures, strict=True):
        loss_N = soft_nearest_neighbor_loss(points_N2, labels_N, temperature, "sqeuclidean", "none")
        picture = axis.scatter(*points_N2.T.numpy(), c=loss_N, s=8, cmap="viridis", vmin=0, vmax=3)
        axis.set_title(f"loss at T = {temperature:g}: mean {loss_N.mean():.2f}")
    figure.colorbar(picture, ax=axes[0, 1:], label="loss of a point (nats)")
    for axis in axes[0]:
        axis.set_aspect("equal")
        axis.set(xlabel="$x_1$", ylabel="$x_2$")
    return captioned(
        figure, "The loss of each point: dark points have neighbours of their own class, as far as T looks."
    )


def _scatter(axis: Any, points_N2: Tensor, labels_N: Tensor) -> None:
    for c in range(int(labels_N.max()) + 1):
        own = points_N2[labels_N == c].numpy()
        axis.plot(*own.T, CLASS_MARKERS[c], color=CLASS_COLOURS[c], ms=3, mew=0, alpha=0.8, label=str(c))


@torch.no_grad()
def experts_figure(
    trained: Mapping[str, tuple[Callable[[Tensor], Tensor], MoE]], points_N2: Tensor, labels_N: Tensor
) -> Figure:
    """Per arm (extractor and mixture): the data plane by preferred expert, and the code by class."""
    ticks = np.linspace(-LIMIT, LIMIT, 120)
    grid = torch.tensor(np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2))
    figure, axes = new_figure(8.4, 4 * len(trained), len(trained), 2)
    grounds = [Patch(fc=grey, ec="#555555", label=f"expert {e}") for e, grey in enumerate(GREYS)]
    for row, (arm, (extractor, mixture)) in zip(axes, trained.items(), strict=True):
        preferred = mixture(extractor(grid))[1].first_choices().reshape(len(ticks), len(ticks)).numpy()
        row[0].imshow(
            preferred,
            origin="lower",
            extent=(-LIMIT, LIMIT) * 2,
            cmap=ListedColormap(GREYS),
            vmin=0,
            vmax=3,
            alpha=0.9,
        )
        _scatter(row[0], points_N2, labels_N)
        row[0].set(title=f"{arm}: who is asked where", xlabel="$x_1$", ylabel="$x_2$")
        _scatter(row[1], extractor(points_N2), labels_N)
        row[1].set(title=f"{arm}: the code", xlabel="code 1", ylabel="code 2")
    below: Any = {"frameon": False, "ncols": 4}
    figure.legend(handles=grounds, title="ground", loc="outside lower left", **below)
    figure.legend(handles=axes[0, 1].lines, title="class", loc="outside lower right", **below)
    return captioned(
        figure,
        "Left: the ground is shaded by the expert with the largest gate there. A ground of one grey is "
        "routing collapse; grounds that follow the classes are specialists. Right: the code that the gate "
        "sees, by class. Does a class lie together, and does one expert own it?",
    )


def space_figure(seed: int) -> Figure:
    """Two clusters, each tight along its own feature, as the AC router sees them: M_{k*} h of each token.

    Rows: centres that differ along both features, and along one. Columns: M = I; the true M of each token's
    own cluster; and the same M with tokens exchanged at random, so that nothing but M knows the cluster.
    """
    config = ClusterConfig(200, num_clusters=2, dim=2, separation=1.5, tight=0.15, loose=0.8)
    drawn = feature_clusters(config, seed)
    spaces = theory.spaces(drawn, seed)
    exchanged_N = torch.randperm(len(drawn.labels_N), generator=generator(seed, "tokens exchanged"))
    side = config.separation / 2
    geometries = {
        "centres differ in both features": [[0, 2**0.5 * side], [2**0.5 * side, 0]],
        "centres differ in feature 1 alone": [[-side, side], [side, side]],
    }
    figure, axes = new_figure(11, 7.4, 2, 3)
    for row, (geometry, centres) in zip(axes, geometries.items(), strict=True):
        centres_ED = torch.tensor(centres, dtype=torch.float64)
        tokens_N2 = drawn.tokens_ND + (centres_ED - drawn.centres_ED)[drawn.labels_N]
        panels = (
            (geometry, "M = I", tokens_N2),
            ("each in its cluster's space", "oracle M", tokens_N2),
            ("the same M, tokens exchanged", "oracle M", tokens_N2[exchanged_N]),
        )
        for axis, (title, name, shown_N2) in zip(row, panels, strict=True):
            scores_NE = theory.scores(shown_N2, centres_ED, spaces[name], "nearest")
            error = theory.assignment_error(scores_NE, drawn.labels_N)
            _scatter(axis, spaces[name].scaled(shown_N2), drawn.labels_N)
            axis.set(title=f"{title}\nassigned wrongly: {100 * error:.1f} %")
            axis.set(xlabel="feature 1 × its scale", ylabel="feature 2 × its scale")
            axis.set_aspect("equal", adjustable="datalim")
    legend(figure, axes[0, 0], loc="outside right center", columns=1, title="cluster", markerscale=2)
    return captioned(
        figure,
        "Tokens of two clusters as the AC router sees them, in two geometries (rows). Left: unscaled. Middle:"
        " each scaled by its own cluster's M; what counts is how many are assigned wrongly, not whether the "
        "colours lie apart. Right: the same M, tokens exchanged between the clusters, so that only M knows "
        "the cluster: colours that lie apart there were told apart by M, not by the tokens.",
    )
