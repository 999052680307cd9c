"""The soft nearest neighbor loss against its peers.

Peers are written down from their formulas (see `tests` for what each is compared with):
    authors     Agarap and Azcarraga's earlier public code (pt-snnl): cosine distance, eps in both fractions
    cleverhans  the same with squared Euclidean distance, as in the library of that name
    NCALoss     pytorch-metric-learning's, squared Euclidean; the package itself, where it is installed

Shapes: N samples, D width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Contestant, Row, Step, Work
from moe_lib.snnl import LayerwiseSNNL, SNNLConfig, soft_nearest_neighbor_loss
from moe_lib.snnl.autograd import DENSE_UP_TO
from moe_lib.snnl.dense import Distance, Route
from moe_study.replay import Replayed

Loss = Callable[[Sequence[Tensor], Tensor, float], Tensor]  # of layers: the sum of their losses
EPS = 1e-5
PACKAGES = ("pytorch-metric-learning",)
CLASSES = 10
COSINE_TEMPERATURE = 0.5


def ours(
    layers: Sequence[Tensor], labels_N: Tensor, temperature: float, distance: Distance, route: Route = "auto"
) -> Tensor:
    if len(layers) == 1:
        return soft_nearest_neighbor_loss(layers[0], labels_N, temperature, distance, route=route)
    activations = {str(number): features_ND for number, features_ND in enumerate(layers)}
    return _layerwise(temperature, distance, tuple(activations))(activations, labels_N, epoch=0)


@functools.cache
def _layerwise(temperature: float, distance: Distance, layers: tuple[str, ...]) -> LayerwiseSNNL:
    return LayerwiseSNNL(
        SNNLConfig(schedule="fixed", temperature=temperature, distance=distance, layers=layers, combine="sum")
    )


def authors(layers: Sequence[Tensor], labels_N: Tensor, temperature: float) -> Tensor:
    losses = []
    for features_ND in layers:
        unit_ND = F.normalize(features_ND, dim=1)
        losses.append(_with_eps(1 - unit_ND @ unit_ND.T, labels_N, temperature))
    return sum(losses[1:], losses[0])


def cleverhans(layers: Sequence[Tensor], labels_N: Tensor, temperature: float) -> Tensor:
    losses = []
    for features_ND in layers:
        square_N = features_ND.square().sum(1)
        distance_NN = square_N[:, None] + square_N - 2 * features_ND @ features_ND.T
        losses.append(_with_eps(distance_NN, labels_N, temperature))
    return sum(losses[1:], losses[0])


def _with_eps(distance_NN: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """mean_i -log(eps + sum_j [y_i = y_j] F_ij / (eps + sum_j F_ij)), F = exp(-d / T) off the diagonal."""
    mass_NN = torch.exp(-distance_NN / temperature) - torch.eye(
        len(labels_N), dtype=distance_NN.dtype, device=distance_NN.device
    )
    pick_NN = mass_NN / (EPS + mass_NN.sum(1, keepdim=True))
    same_NN = (labels_N[:, None] == labels_N).to(pick_NN.dtype)
    return -torch.log(EPS + (pick_NN * same_NN).sum(1)).mean()


def nca(layers: Sequence[Tensor], labels_N: Tensor, temperature: float) -> Tensor:
    losses = [_nca(temperature)(features_ND, labels_N) for features_ND in layers]
    return sum(losses[1:], losses[0])


@functools.cache
def _nca(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    distances = importlib.import_module("pytorch_metric_learning.distances")  # an optional extra
    losses = importlib.import_module("pytorch_metric_learning.losses")
    squares = distances.LpDistance(normalize_embeddings=False, p=2, power=2)
    return losses.NCALoss(softmax_scale=1 / temperature, distance=squares)


def has_nca() -> bool:
    return importlib.util.find_spec("pytorch_metric_learning") is not None


# ----------------------------------------------------------------------------------------- rows


def rows(quick: bool = False) -> list[Row]:
    """Time and memory of value and gradient. `quick`: a few small sizes, for a look at the machinery."""
    if quick:
        return [row(64, [16], rounds=3), row(600, [16], rounds=3)]
    return [
        row(100, [128] * 4, goal_time=2),
        row(256, [128]),
        row(512, [128]),
        row(512, [64 * 14 * 14, 128 * 6 * 6, 128], rounds=5),  # a CNN's activations on 32 x 32 pixels
        row(1024, [128], goal_time=3, goal_memory=5),
        row(2048, [128]),
        row(4096, [128], goal_time=10, goal_memory=12, goal_share=0.5, rounds=9),
        row(8192, [128], goal_time=10, goal_memory=25, goal_share=0.5, rounds=5),
        row(16384, [128], rounds=3),
        row(1024, [128], cold=50, goal_time=1.5),  # cosine temperature 0.01, as late in an annealing
        row(1024, [128], cold=200, goal_time=1.5),
    ]


def row(
    num_samples: int,
    widths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    cold: float = 1,
    fused: bool = False,
    replay: bool = False,
    **options: Any,
) -> Row:
    """
    Args:
        cold: what the usual temperature is divided by.
        fused: with the route that only a GPU has.
        replay: each as one CUDA graph; else Python launches each operation.
    """

    def contestant(name: str, loss: Loss, cosine: bool, peer: bool = False, matrices: int = 0) -> Contestant:
        build = partial(_build, num_samples, tuple(widths), loss, cosine, dtype, cold, replay)
        return Contestant(name, build, peer, bytes=4.0 * matrices * num_samples**2)

    contestants = [
        contestant("ours", partial(ours, distance="cosine"), cosine=True),
        contestant(
            "ours, squared Euclidean",
            partial(ours, distance="sqeuclidean", route="fused" if fused and replay else "auto"),
            cosine=False,
        ),
    ]
    if num_samples > DENSE_UP_TO and not replay:  # they read from the device, which no graph can
        for route in ("panels", "streaming"):
            loss = partial(ours, distance="cosine", route=route)
            contestants.append(contestant(f"ours, {route}", loss, cosine=True))
    if fused:
        contestants.append(
            contestant("ours, fused", partial(ours, distance="cosine", route="fused"), cosine=True)
        )
    contestants.append(contestant("authors", authors, cosine=True, peer=True, matrices=7))
    contestants.append(contestant("cleverhans", cleverhans, cosine=False, peer=True, matrices=7))
    if has_nca() and not replay:  # likewise
        contestants.append(contestant("NCALoss", nca, cosine=False, peer=True, matrices=6))
    # Each pair once: its distance, its exponential; and the product of the coefficients with the features.
    work = Work(gemm=sum(3.0 * num_samples**2 * dim for dim in widths), exp=len(widths) * num_samples**2 / 2)
    shape = f"D={widths[0]}" if len(set(widths)) == 1 else "D=" + "+".join(map(str, widths))
    if len(set(widths)) < len(widths):
        shape = f"{len(widths)} layers of {shape}"
    sizes = {"N": num_samples, "D": sum(widths) // len(widths), "layers": len(widths)}
    short = str(dtype).removeprefix("torch.")
    name = f"N={num_samples} {shape}" + ("" if dtype == torch.float32 else f" {short}")
    name += " as a graph" * replay
    name += "" if cold == 1 else f" T={COSINE_TEMPERATURE / cold:g}"
    return Row(name, sizes, work, tuple(contestants), dtype=short, **options)


def _build(
    num_samples: int,
    widths: Sequence[int],
    loss: Loss,
    cosine: bool,
    dtype: torch.dtype,
    cold: float,
    replay: bool,
    device: str,
) -> Step:
    """Value and gradient of the sum over layers of normal features; the temperature suits their distances."""
    draw = torch.Generator().manual_seed(0)
    labels_N = torch.randint(CLASSES, (num_samples,), generator=draw).to(device)
    layers = [torch.randn(num_samples, dim, generator=draw).to(device, dtype) for dim in widths]
    temperature = (COSINE_TEMPERATURE if cosine else 2.0 * max(widths)) / cold

    def work(*layers: torch.Tensor) -> dict[str, torch.Tensor]:
        features = [x_ND.detach().requires_grad_() for x_ND in layers]
        torch.autograd.grad(loss(features, labels_N, temperature), features)
        return {}

    replayed = Replayed(work, enabled=replay)
    return lambda: replayed(*layers)
