"""One function a figure; each takes result dictionaries or tensors and returns a matplotlib Figure.

Colours are Okabe and Ito's (told apart with any colour vision); where a colour means an arm it means
that arm in every figure.
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.optimize import linear_sum_assignment

from moe_study import stats, store
from moe_study.columns import Result, look_up
from moe_study.data import DATASETS
from moe_study.data.text import CORPORA
from moe_study.report.tables import FEWEST_SEEDS, by_arm

PALETTE = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999933")
ARM_STYLE = {  # colour, marker
    "base": (PALETTE[2], "o"),
    "snnl": (PALETTE[1], "s"),
    "dense": ("#a6761d", "o"),
    "dense-snnl": (PALETTE[3], "D"),
    "base-balance": (PALETTE[4], "^"),
    "snnl-shuffled": (PALETTE[5], "v"),
    "base-aux": (PALETTE[6], "D"),
    "uniform-gate": (PALETTE[7], "P"),
    "uniform-snnl": ("#7b3294", "X"),
    "snnl-weaker": ("#3d3d3d", ">"),
    "hash-gate": ("#2f4b2f", "P"),
    "hash-snnl": ("#c51b8a", "X"),
    "raw": (PALETTE[0], "X"),
    "snnl-pretrained": ("#8c564b", "<"),
    "ce-pretrained": ("#4b6e8c", ">"),
    "linear": ("#7f7f7f", "o"),
    "cosine": (PALETTE[2], "o"),
    "ac": (PALETTE[4], "s"),
    "ac-shuffled": (PALETTE[5], "v"),
    "ac-row": (PALETTE[6], "D"),
    "ac-pooled": (PALETTE[3], "P"),
    "ac-matched": (PALETTE[1], "^"),
    "ac-causal": (PALETTE[0], "X"),
    "hash": (PALETTE[7], "P"),
    "hash-token": ("#8c564b", "X"),
    "snnl-ac": (PALETTE[0], "D"),
}
RETINA = 2  # pixels of a picture per pixel of the page that shows it
OWN_COLOURS = ("#e6550d", "#31a354", "#756bb1", "#636363", "#3182bd", "#b5651d")
OWN_MARKERS = "^vD<>*"
STYLE: Any = {
    "figure.dpi": 96,
    "savefig.dpi": 96 * RETINA,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}
DATASET_TITLES = {name: info.title for name, info in (DATASETS | CORPORA).items()}


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes [rows, columns], in the project's style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def hide_from(axes: Any, count: int) -> None:
    """Of a grid of axes only the first `count` are shown."""
    for axis in axes.flat[count:]:
        axis.set_visible(False)


NO_RUNS = "no run that belongs here is finished yet"


def note(text: str) -> Figure:
    """In place of a figure that has nothing to show."""
    figure, axes = new_figure(6, 1)
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center")
    axes[0, 0].set_axis_off()
    return figure


def captioned(figure: Figure, text: str) -> Figure:
    """A figure with what to see in it; notebook and report set it below the figure."""
    figure.set_label(" ".join(text.split()))
    return figure


def interval(values_S: np.ndarray) -> tuple[float, float]:
    """The mean's 95 % t interval; below `FEWEST_SEEDS` the mean alone."""
    if len(values_S) < FEWEST_SEEDS:
        return values_S.mean(), values_S.mean()
    return stats.t_interval(values_S)


def too_few(counts: Iterable[int], missing: str = "interval") -> str:
    """For a caption, after numbers of seeds: what is not drawn of the least of them."""
    return f" (no {missing} below {FEWEST_SEEDS} seeds)" if min(counts) < FEWEST_SEEDS else ""


def seeds_in_words(
    results: Sequence[Result], arms: Sequence[str] | None = None, drawn: str | None = None
) -> str:
    """Of these arms: "10 seeds an arm", "3 to 10 seeds an arm"; of the "interval" or "band" that is drawn,
    whether some have too few seeds for it."""
    counts = sorted({len(group) for group in arms_of(results, arms).values()})
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    few = too_few(counts, drawn) if drawn else ""
    return f"{many} seed{'s' if counts[-1] > 1 else ''} an arm{few}"


def median_run(results: Sequence[Result], path: str = "routing.load.effective_experts") -> Result:
    """The run of the median seed; the lower of two."""
    ordered = sorted(results, key=lambda result: look_up(result, path) or 0.0)
    return ordered[(len(ordered) - 1) // 2]


TYPICAL_IN = {"task.accuracy": "accuracy", "routing.load.effective_experts": "effective experts"}


def at_one_seed(grouped: Mapping[str, Sequence[Result]]) -> dict[str, Result]:
    """A run of each arm, all of one seed: the one whose ranks in accuracy and effective experts are closest
    to the middle in the first two arms, `base` and `snnl` where they are there, so that figures with more
    arms show the same. Arms that share no seed are shown at their own of median accuracy."""
    distance: Counter[int] = Counter()
    for group in list(grouped.values())[:2]:
        for path in TYPICAL_IN:
            ordered = sorted(group, key=lambda result: look_up(result, path) or 0.0)
            for rank, result in enumerate(ordered):
                distance[result["run"]["seed"]] += abs(2 * rank - len(ordered) + 1)
    seeds = [{result["run"]["seed"] for result in group} for group in grouped.values()]
    shared = sorted(set.intersection(*seeds)) if seeds else []
    if not shared:
        return {arm: median_run(group, "task.accuracy") for arm, group in grouped.items()}
    seed = min(shared, key=distance.__getitem__)
    return {arm: next(r for r in group if r["run"]["seed"] == seed) for arm, group in grouped.items()}


def which_seed(chosen: Mapping[str, Result]) -> str:
    """What `at_one_seed` chose, in words."""
    seeds = {result["run"]["seed"] for result in chosen.values()}
    if len(seeds) == 1:
        medians, arms = (" and ".join(names) for names in (TYPICAL_IN.values(), list(chosen)[:2]))
        return f"seed {seeds.pop()} in every arm, the closest to the medians of {medians} of {arms}"
    return "each arm's seed of median accuracy"


def arm_style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm; one of your own gets a pair that depends on its name alone."""
    if arm in ARM_STYLE:
        return ARM_STYLE[arm]
    number = zlib.crc32(arm.encode())
    return OWN_COLOURS[number % len(OWN_COLOURS)], OWN_MARKERS[number // 97 % len(OWN_MARKERS)]


def arms_of(results: Sequence[Result], wanted: Sequence[str] | None = None) -> dict[str, list[dict]]:
    """Results by arm, in the order of ARM_STYLE; arms of your own follow, in the order of the results."""
    grouped = by_arm(results)
    names = dict.fromkeys(name for name in [*ARM_STYLE, *grouped] if name in grouped)
    return {name: grouped[name] for name in names if wanted is None or name in wanted}


def training_curves(results: Sequence[Result]) -> Figure:
    """Validation cross-entropy, accuracy and a measure of routing over epochs: mean, and range over seeds. A
    network of one expert has no line in the last."""
    if not results:
        return note(NO_RUNS)
    measured = "effective_experts" in results[0]["history"]["validation"]
    panels = [
        ("cross_entropy", "validation cross-entropy (nats)", 1.0),
        ("accuracy", "validation accuracy (%)", 100.0),
        ("effective_experts", "effective experts, validation", 1.0)
        if measured
        else ("information", "I(x;E), validation (nats)", 1.0),
    ]
    figure, axes = new_figure(9.8, 3.2, 1, 3)
    for axis, (key, title, scale) in zip(axes[0], panels, strict=True):
        for arm, group in arms_of(results).items():
            curves = [_curve(r["history"]["validation"], key) for r in group]
            if key != "effective_experts" or max(map(max, curves)) > 1:
                mean_and_range(axis, arm, curves, scale)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, axes[0, 0], 6)
    routing = "more experts at work" if measured else "a gate that tells more images apart"
    return captioned(
        figure,
        f"Training: does an arm learn faster (left), to a higher accuracy (middle), with {routing} (right)? "
        f"Lines are means over seeds, bands their range; {seeds_in_words(results, drawn='band')}.",
    )


def mean_and_range(axis: Any, arm: str, curves: Sequence[Sequence[float]], scale: float = 1.0) -> None:
    """Mean over seeds after each epoch, and their range as a band."""
    colour, marker = arm_style(arm)
    curves_SE = scale * np.array(curves, dtype=float)
    epochs = np.arange(1, curves_SE.shape[1] + 1)
    axis.plot(epochs, curves_SE.mean(0), color=colour, marker=marker, markersize=4, label=arm)
    if len(curves) >= FEWEST_SEEDS:
        axis.fill_between(epochs, curves_SE.min(0), curves_SE.max(0), color=colour, alpha=0.15, lw=0)


def live_curves(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Training loss against step, a line for each model trained so far."""
    figure, axes = new_figure(6.4, 3.0)
    for arm, values in losses.items():
        axes[0, 0].plot(range(1, len(values) + 1), values, color=arm_style(arm)[0], label=arm)
    axes[0, 0].set(xlabel="step", ylabel="training cross-entropy (nats)", xlim=(0, None), ylim=(0, None))
    if losses:
        axes[0, 0].legend()
    return captioned(figure, "Training loss of each batch, step by step: the lower, the better an arm fits.")


def _curve(validation: dict[str, list[float]], key: str) -> list[float]:
    if key == "information":
        pairs = zip(validation["marginal"], validation["per_sample"], strict=True)
        return [marginal - per_sample for marginal, per_sample in pairs]
    return validation[key]


def seeds_and_mean(
    axis: Any, row: int, values_S: np.ndarray, colour: str, marker: str, size: float, below: float
) -> tuple[float, float]:
    """Every seed a dot, below them the mean and its 95 % t interval, which is returned."""
    axis.plot(values_S, np.full(len(values_S), row), "o", color=colour, alpha=0.4, markersize=size, mew=0)
    ends = interval(values_S)
    axis.plot(ends, [row + below] * 2, color=colour, lw=2, solid_capstyle="butt")
    axis.plot(values_S.mean(), row + below, marker, color=colour, markersize=6)
    return ends


def accuracy_by_arm(results: Sequence[Result]) -> Figure:
    """Test accuracy at the last epoch: every seed a dot, the mean and its 95 % interval beside them."""
    grouped = arms_of(results)
    figure, axes = new_figure(7.5, 0.33 * len(grouped) + 1.0)
    axis = axes[0, 0]
    for row, (arm, group) in enumerate(grouped.items()):
        colour, marker = arm_style(arm)
        ends = [store.at_endpoint(dict(r), store.PRIMARY_ENDPOINT)["task"]["accuracy"] for r in group]
        values = np.array(ends) * 100
        seeds_and_mean(axis, row, values, colour, marker, size=5, below=0.22)
    axis.set_yticks(range(len(grouped)), [f"{arm} ({len(group)})" for arm, group in grouped.items()])
    axis.set(xlabel="test accuracy at the last epoch (%)", ylim=(len(grouped) - 0.4, -0.6))
    axis.grid(axis="x", alpha=0.3)
    return captioned(
        figure,
        "Test accuracy of every arm: each seed a dot, below them the mean and its 95 % t interval. Arms "
        f"whose dots lie apart differ; in brackets the number of seeds{too_few(map(len, grouped.values()))}.",
    )


SHARES: Any = {  # of every heatmap of gates; resampling would smear many rows across experts
    "cmap": "viridis", "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"
}  # fmt: skip


def write_values(axis: Any, shares: np.ndarray) -> None:
    """Each share of a heatmap in its cell, in an ink that shows."""
    for (row, column), value in np.ndenumerate(shares):
        ink = "black" if value > 0.6 else "white"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)


def matched_order(gates_GE: np.ndarray, first_GE: np.ndarray) -> np.ndarray:
    """The experts in the order that is most like that of the first (Hungarian method); as they are, where
    the first has more or fewer."""
    if gates_GE.shape != first_GE.shape:
        return np.arange(gates_GE.shape[1])
    return linear_sum_assignment(first_GE.T @ gates_GE, maximize=True)[1]


def matched(gates_GE: np.ndarray, first_GE: np.ndarray) -> np.ndarray:
    """The columns (experts) in that order."""
    return gates_GE[:, matched_order(gates_GE, first_GE)]


def legend(figure: Figure, axes: Any, columns: int = 4, **options: Any) -> Any:
    """Below the figure: what one of its axes names, or some of them, each name once."""
    named: dict[str, Any] = {}
    for axis in np.ravel(axes):
        handles, labels = axis.get_legend_handles_labels()
        named |= zip(labels, handles, strict=True)
    place: Any = {"loc": "outside lower center", "frameon": False, "ncols": columns}
    return figure.legend(named.values(), named.keys(), **(place | options))


def target(path: str | Path) -> Path:
    """Where a figure named "profile/study/dataset/name" lies."""
    return store.figures_dir() / f"{path}.png"


def save(figure: Figure, path: str | Path, source: str = "computed in this notebook") -> None:
    """Write `path` (below the figures folder, without suffix) as PNG, which says in its text "Source" where
    its numbers come from."""
    drawn, packed, text = io.BytesIO(), io.BytesIO(), PngInfo()
    with mpl.rc_context(STYLE):
        figure.savefig(drawn, format="png")
    text.add_text("Source", source)
    picture = Image.open(drawn)  # opaque, and 256 colours are enough: it takes a quarter
    flat = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    flat.save(packed, "PNG", optimize=True, pnginfo=text, dpi=picture.info["dpi"])
    store.write_bytes(target(path), packed.getvalue())
