"""The pieces of the tour notebook: hand-made gates, SNNL on points in the plane, a mixture to look at, the
space of the AC router, routing measures on routers of known quality.

Shapes: N samples, S seeds, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from moe_lib import metrics
from moe_lib.models.classifier import ClassifierConfig
from moe_lib.rng import generator
from moe_lib.snnl import SNNLConfig, soft_nearest_neighbor_loss
from moe_study import stats, theory, trust
from moe_study.data import Dataset, Split
from moe_study.data.planted import ClusterConfig, feature_clusters
from moe_study.evaluate import validation_measures
from moe_study.report.plots import FAULT_TITLES, PALETTE, captioned, new_figure
from moe_study.tasks import ClassifierTask, Objective
from moe_study.train import TrainConfig, fit

CLASS_COLOURS = PALETTE[1:5]
CLASS_MARKERS = ("o", "s", "^", "D")


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


def loss_figure(points_N2: Tensor, labels_N: Tensor, temperature: float) -> Figure:
    """Each point coloured by its own loss at one temperature."""
    figure, axes = new_figure(4.6, 3.6)
    loss_N = soft_nearest_neighbor_loss(points_N2, labels_N, temperature, "sqeuclidean", "none")
    picture = axes[0, 0].scatter(*points_N2.T.numpy(), c=loss_N, s=8, cmap="viridis", vmin=0, vmax=3)
    axes[0, 0].set_aspect("equal")
    axes[0, 0].set(xlabel="$x_1$", ylabel="$x_2$", title=f"T = {temperature:g}: mean {loss_N.mean():.2f}")
    figure.colorbar(picture, ax=axes[0, 0], label="loss of a point (nats)")
    return captioned(
        figure,
        f"The loss of each point at temperature {temperature:g}: dark points have neighbours of their own "
        "class.",
    )


def scaling_figure(ratio: float) -> Figure:
    """Two clusters, each tight along its own feature, as they are and as the scaling matrix M sees them."""
    draw = np.random.default_rng(0)
    figure, axes = new_figure(7.2, 3.4, 1, 2)
    for k, (centre, wide) in enumerate((((0.0, 0.0), (ratio, 1.0)), ((1.2, 1.2), (1.0, ratio)))):
        points_N2 = np.array(centre) + 0.4 * np.array(wide) * draw.normal(size=(150, 2))
        spread_2 = np.abs(points_N2 - points_N2.mean(0)).mean(0)
        scaled_N2 = points_N2 * spread_2.mean() / spread_2
        for axis, shown_N2 in zip(axes[0], (points_N2, scaled_N2), strict=True):
            axis.plot(*shown_N2.T, CLASS_MARKERS[k], color=CLASS_COLOURS[k], ms=3, mew=0, alpha=0.8)
    for axis, title in zip(axes[0], ("as they are", "scaled: each cluster by its own M"), strict=True):
        axis.set(title=title, xlabel="feature 1", ylabel="feature 2")
        axis.set_aspect("equal", adjustable="datalim")
    return captioned(
        figure,
        f"What M does: two clusters, each {ratio:g} times as wide along one feature as along the other. M "
        "divides each "
        "cluster's features by their own spread (mean absolute deviation), so a cluster becomes round.",
    )


def eps_form(points_ND: Tensor, labels_N: Tensor, temperature: float, eps: float = 1e-5) -> float:
    """SNNL the way the published code guards it: eps inside the sum and inside the logarithm."""
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


def snnl_figure(points_N2: Tensor, labels_N: Tensor) -> Figure:
    """The points, coloured by class, and then by their own loss at two temperatures."""
    figure, axes = new_figure(11, 3.6, 1, 3)
    _scatter(axes[0, 0], points_N2, labels_N)
    axes[0, 0].set_title("eight clusters, four classes")
    axes[0, 0].legend(loc="center", title="class")
    for axis, temperature in zip(axes[0, 1:], (0.05, 1.0), strict=True):
        loss_N = soft_nearest_neighbor_loss(points_N2, labels_N, temperature, "sqeuclidean", "none")
        picture = axis.scatter(*points_N2.T.numpy(), c=loss_N, s=8, cmap="viridis", vmin=0, vmax=3)
        axis.set_title(f"loss at T = {temperature:g}: mean {loss_N.mean():.2f}")
    figure.colorbar(picture, ax=axes[0, 1:], label="loss of a point (nats)")
    for axis in axes[0]:
        axis.set_aspect("equal")
        axis.set(xlabel="$x_1$", ylabel="$x_2$")
    return figure


def _scatter(axis: Any, points_N2: Tensor, labels_N: Tensor) -> None:
    for c in range(int(labels_N.max()) + 1):
        own = points_N2[labels_N == c].numpy()
        axis.plot(*own.T, CLASS_MARKERS[c], color=CLASS_COLOURS[c], ms=3, mew=0, alpha=0.8, label=str(c))


class Trained(NamedTuple):
    task: ClassifierTask
    measures: dict[str, float]


LIMIT = 1.75  # the plane that is drawn, and the range that uint8 covers


def _images(points_N2: Tensor) -> Tensor:
    """Points as two-pixel images, so that the study's own model and loop train on them unchanged."""
    scaled = ((points_N2 + LIMIT) / (2 * LIMIT) * 255).round().clamp(0, 255)
    return scaled.to(torch.uint8).view(-1, 1, 1, 2)


def train(points_N2: Tensor, labels_N: Tensor, arm: str, seed: int) -> Trained:
    """Train the study's classifier on planted points; `arm` is "base" or "snnl"."""
    order_N = torch.randperm(len(labels_N), generator=generator(seed, "planted split"))
    whole = Split(_images(points_N2)[order_N], labels_N[order_N])
    part = len(whole) // 5
    dataset = Dataset(
        "planted",
        train=whole.take(slice(2 * part, None)),
        validation=whole.take(slice(part, 2 * part)),
        test=whole.take(slice(part)),
        num_classes=int(labels_N.max()) + 1,
    )
    snnl = SNNLConfig(factor=1.0, schedule="fixed", temperature=0.3)
    config = TrainConfig(epochs=80, batch_size=64, learning_rate=1e-2)
    task = ClassifierTask(
        dataset,
        ClassifierConfig("mlp", 256, code_dim=2, num_experts=4, expert_hidden=8, gate_hidden=8),
        Objective(snnl=snnl if arm == "snnl" else None),
        seed=seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        dtype=torch.float64,
    )

    fit(task, config, lambda: validation_measures(task), label=f"tour/{arm} seed {seed}")
    output, codes_ND = task.predict(dataset.test)
    entropy = metrics.routing_entropy(output.routing.probs_NE, dataset.test.labels_N, dataset.num_classes)
    return Trained(
        task,
        {
            "accuracy": metrics.task_score(output.log_probs_NC, dataset.test.labels_N).accuracy,
            "SNNL of the code, T = 1": soft_nearest_neighbor_loss(codes_ND, dataset.test.labels_N).item(),
            "H(E)": entropy.marginal,
            "H(E|x)": entropy.per_sample,
            "I(c;E)": entropy.information_class,
            "cos outputs": metrics.output_similarity(output.expert_logits_NEC),
        },
    )


def trained_table(trained: dict[str, Trained]) -> pd.DataFrame:
    rows = {arm: result.measures for arm, result in trained.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm").round(3) + 0.0


def experts_figure(trained: dict[str, Trained], points_N2: Tensor, labels_N: Tensor) -> Figure:
    """Per arm: the data plane by preferred expert, and the code by class."""
    ticks = np.linspace(-LIMIT, LIMIT, 120)
    grid = torch.tensor(np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2))
    figure, axes = new_figure(8.4, 4 * len(trained), len(trained), 2)
    greys = ListedColormap(["#f2f2f2", "#d4d4d4", "#b0b0b0", "#8c8c8c"])
    for row, (arm, result) in zip(axes, trained.items(), strict=True):
        output, _ = result.task.predict(Split(_images(grid), torch.zeros(len(grid), dtype=torch.long)))
        preferred = output.routing.probs_NE.argmax(1).reshape(len(ticks), len(ticks)).numpy()
        row[0].imshow(
            preferred, origin="lower", extent=(-LIMIT, LIMIT) * 2, cmap=greys, vmin=0, vmax=3, alpha=0.9
        )
        for e in np.unique(preferred):
            inside = np.argwhere(preferred == e)
            y, x = ticks[np.median(inside, axis=0).astype(int)]
            row[0].text(x, y, f"expert {e}", fontsize=8, ha="center", bbox={"fc": "white", "lw": 0, "pad": 1})
        _scatter(row[0], points_N2, labels_N)
        row[0].set(title=f"{arm}: who is asked where", xlabel="$x_1$", ylabel="$x_2$")
        _, codes_ND = result.task.predict(Split(_images(points_N2), labels_N))
        _scatter(row[1], codes_ND, labels_N)
        row[1].set(title=f"{arm}: the code", xlabel="code 1", ylabel="code 2")
        row[1].legend(title="class", loc="best", fontsize=8)
    return figure


# ---------------------------------------------------------------------------- the space of the AC router

ROUTER_STYLE = {  # colour, marker, line
    "M = I": (PALETTE[0], "o", "-"),
    "oracle M": (PALETTE[2], "s", "-"),
    "oracle M, 1 / variance": (PALETTE[6], "D", "-"),
    "M from labels, 0% wrong": (PALETTE[4], "^", "--"),
    "M from labels, 10% wrong": (PALETTE[3], "v", "-"),
    "M from labels, 30% wrong": (PALETTE[1], "P", "-"),
    "M from labels, 50% wrong": (PALETTE[5], "X", "-"),
    "oracle M, scored by k*": (PALETTE[2], "s", "-"),
    "M from labels": (PALETTE[1], "P", "-"),
    "repeat k*": ("#7f7f7f", "", ":"),
}


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
    axes[0, 0].legend(title="cluster", loc="best", fontsize=8)
    return figure


def assignment_figure(config: ClusterConfig, seeds: Sequence[int]) -> Figure:
    """Assignment error against noise, overlap, equal tightness and wrong earlier assignments."""
    figure, axes = new_figure(11, 7.6, 2, 2)
    sweeps: list[dict[float, ClusterConfig]] = [
        {x: replace(config, noise=x) for x in (0, 0.5, 1, 1.5, 2, 3)},
        {x: replace(config, separation=x) for x in (6, 5, 4, 3, 2, 1)},
        {x: replace(config, tight=x) for x in (0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5)},
    ]
    for axis, configs in zip(axes.flat, sweeps, strict=False):
        _error_lines(axis, theory.sweep(configs, seeds))
    axes[0, 0].set(title="corruption", xlabel="noise on every feature (standard deviation)")
    axes[0, 1].set(title="overlap: closer centres", xlabel="distance between centres")
    axes[1, 0].set(
        title="equal tightness, at the right end",
        xlabel=f"deviation along own features (others: {config.loose:g})",
    )
    axes[0, 1].invert_xaxis()
    shares = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
    _error_lines(axes[1, 1], theory.wrong_share_sweep(config, shares, seeds))
    axes[1, 1].set(xlabel="wrong earlier assignments k* (%)", title="wrong earlier assignments")
    axes[1, 1].set_xticks([0, 0.25, 0.5, 0.75], ["0", "25", "50", "75"])
    axes[1, 1].legend(fontsize=8)
    for axis in axes.flat:
        axis.set(ylabel="tokens wrongly assigned (%)", ylim=(0, 80))
        axis.axhline(100 * (1 - 1 / config.num_clusters), color="#bbbbbb", lw=0.8, zorder=0)
    axes[0, 0].text(0, 76, "chance", fontsize=8, color="#777777")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _error_lines(axis: Any, table: pd.DataFrame) -> None:
    """Mean over seeds and its 95 % t interval, a line for each router."""
    for router, rows in table.groupby("router", sort=False):
        colour, marker, line = ROUTER_STYLE[str(router)]
        groups = rows.groupby("value", sort=False)["error"]
        mean = 100 * groups.mean()
        interval = 100 * np.array([stats.t_interval(errors.to_numpy()) for _, errors in groups])
        axis.plot(mean.index, mean, line, marker=marker, ms=5, color=colour, label=router)
        axis.fill_between(mean.index, *interval.T, color=colour, alpha=0.12, lw=0)


# ------------------------------------------------------------------------------- which measure to trust

MEASURE_STYLE = {  # colour, marker, line
    "H(E)": (PALETTE[0], "o", "-"),
    "H(E|x)": (PALETTE[6], "v", "-"),
    "H(E|c)": (PALETTE[1], "s", "-"),
    "I(x;E)": (PALETTE[3], "D", "-"),
    "I(c;E) - null": (PALETTE[2], "P", "-"),
    "AMI(c, top-1)": (PALETTE[4], "^", "-"),
    "effective experts": (PALETTE[5], "X", "-"),
    trust.TRUTH: ("#7f7f7f", "", "--"),
}


def trust_figure(climbed: pd.DataFrame) -> Figure:
    """Every routing measure along every ladder away from the right router; mean over seeds."""
    figure, axes = new_figure(11, 6.8, 2, 3, sharey=True)
    ladders = [ladder for ladder in FAULT_TITLES if ladder != "alike"]  # leaves all routing as it is
    for axis, ladder in zip(axes.flat, ladders, strict=True):
        means = climbed[climbed["ladder"] == ladder].groupby("level").mean(numeric_only=True)
        for measure, (colour, marker, line) in MEASURE_STYLE.items():
            hollow = marker in "o^"  # these two often lie on another
            axis.plot(
                means.index, means[measure], line, marker=marker, ms=8 if hollow else 5,
                mfc="none" if hollow else None, color=colour, label=measure,
            )  # fmt: skip
        axis.set(title=f"{ladder}:\n{FAULT_TITLES[ladder]}")
        axis.set(xlabel="deviation / distance" if ladder == "overlap" else "level of the fault")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the measure's maximum")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
