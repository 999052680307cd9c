"""The soft nearest neighbor loss (SNNL) and the rules for its temperature.

Formula: Frosst, Papernot, Hinton, "Analyzing and Improving Representations with the Soft Nearest
Neighbor Loss", ICML 2019 (arXiv 1902.01889), eq. 1; cosine form and annealing rule after the public
code of Agarap & Azcarraga (pt-snnl).

Shapes: N samples (anchors), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe_lib.snnl.kernels import Distance, Reduction, Route, losses

Combine = Literal["min", "sum", "mean"]


def soft_nearest_neighbor_loss(
    features_ND: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor = 1.0,
    distance: Distance = "cosine",
    reduction: Reduction = "mean",
    route: Route = "auto",
) -> Tensor:
    """How little of each sample's soft neighbourhood shares its label.

    For anchor i, with distances d and temperature T,

        loss_i = -log( sum_{j != i, y_j = y_i} exp(-d_ij / T)  /  sum_{j != i} exp(-d_ij / T) )

    computed as log(1 + q_i / p_i) from the masses of the same class (p) and of the others (q), in
    logarithms where they leave the range of the type, so it neither caps nor turns NaN where the
    usual `eps` forms do. The sign is such that minimising it pulls classes together. The gradient is formed
    together with the value; there is no second derivative, and create_graph=True is an error.

    Args:
        features_ND: [N, D], floating point. Sub-float32 types are computed in float32. A row of
            zeros has no direction: under "cosine" it is at distance 1 from everything.
        labels_N: [N] integer classes.
        temperature: positive; a 0-d tensor is differentiated through.
        distance: "cosine" (1 - cosine similarity, in [0, 2]) or "sqeuclidean".
        reduction: "mean" over the anchors that have a positive (another sample of their class);
            "mean_all" over all N (the authors'); "sum"; "none" gives [N], 0 for anchors without one.
        route: how it is computed, which changes time and memory alone: "dense", "panels" or "streaming"
            (see `snnl_kernels`); "auto" chooses by N and device.

    Returns:
        A 0-d tensor, or [N] for "none". Without any positive: 0, with zero gradients.

    Raises:
        ValueError: shapes, an option or the temperature are unusable, or (checked on the CPU only, where
            it costs nothing; on a GPU the loss is NaN) a feature is not finite.
    """
    return _losses_of_layers([features_ND], labels_N, temperature, distance, reduction, route)[0]


def _losses_of_layers(
    layers: Sequence[Tensor],
    labels_N: Tensor,
    temperature: float | Tensor,
    distance: Distance,
    reduction: Reduction,
    route: Route = "auto",
) -> Tensor:
    """[L] (or [L, N] for "none") losses of L layers, as above; layers of one type are computed together."""
    for features_ND in layers:
        if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
            raise ValueError(
                f"expected features [N, D] and labels [N], got {tuple(features_ND.shape)} "
                f"and {tuple(labels_N.shape)}"
            )
    if distance not in ("cosine", "sqeuclidean"):
        raise ValueError(f"unknown distance {distance!r}; use 'cosine' or 'sqeuclidean'")
    if reduction not in ("mean", "mean_all", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; use 'mean', 'mean_all', 'sum' or 'none'")
    if route not in ("auto", "dense", "panels", "streaming"):
        raise ValueError(f"unknown route {route!r}; use 'auto', 'dense', 'panels' or 'streaming'")
    _check_temperature(temperature)
    layers = [_computable(features_ND) for features_ND in layers]
    if len({features_ND.dtype for features_ND in layers}) == 1:
        return losses(layers, labels_N, temperature, distance, reduction, route)
    parts = [losses([x_ND], labels_N, temperature, distance, reduction, route) for x_ND in layers]
    return torch.cat(parts)


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            raise ValueError(
                f"temperature must be a number or a 0-d tensor, got {temperature.ndim} dimensions"
            )
        if temperature.device.type != "cpu":
            return
        temperature = temperature.item()
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _computable(features_ND: Tensor) -> Tensor:
    if features_ND.dtype in (torch.float16, torch.bfloat16):
        features_ND = features_ND.float()
    if features_ND.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"features must be floating point, got {features_ND.dtype}")
    return features_ND.contiguous()


@dataclass(frozen=True)
class SNNLConfig:
    """How the SNNL enters training: `factor * SNNL` is added to the task's loss."""

    factor: float = 10.0
    schedule: Literal["fixed", "annealed", "learned"] = "annealed"
    temperature: float = 1.0  # the first epoch's
    distance: Distance = "cosine"
    layers: tuple[str, ...] = ("code",)  # of the extractor's activations
    combine: Combine = "min"  # over layers
    reduction: Reduction = "mean"


class LayerwiseSNNL(nn.Module):
    """The SNNL of one or several layers, under a temperature schedule.

    Temperature: "fixed" T; "annealed" T / (1 + epoch)^0.55, epoch from 0; "learned" exp of a parameter
    that starts at log T, so it stays positive.
    """

    def __init__(self, config: SNNLConfig) -> None:
        super().__init__()
        if config.schedule not in ("fixed", "annealed", "learned"):
            raise ValueError(f"unknown schedule {config.schedule!r}; use 'fixed', 'annealed' or 'learned'")
        if config.combine not in ("min", "sum", "mean"):
            raise ValueError(f"unknown combine {config.combine!r}; use 'min', 'sum' or 'mean'")
        if not 0 < config.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {config.temperature}")
        if not config.layers:
            raise ValueError("layers is empty: name at least one of the extractor's activations")
        self.config = config
        if config.schedule == "learned":
            self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())

    def temperature(self, epoch: int) -> float | Tensor:
        if self.config.schedule == "learned":
            return self.log_temperature.clamp(-30, 30).exp()
        if self.config.schedule == "annealed":
            return self.config.temperature / (1 + epoch) ** 0.55
        return self.config.temperature

    def forward(self, activations: Mapping[str, Tensor], labels_N: Tensor, epoch: int) -> Tensor:
        """Unweighted loss of the configured layers of `activations` (name -> [N, ...])."""
        missing = [name for name in self.config.layers if name not in activations]
        if missing:
            raise ValueError(
                f"no activation named {missing[0]!r}; the extractor has {', '.join(activations) or 'none'}"
            )
        layers = [activations[name].flatten(1) for name in self.config.layers]
        losses_L = _losses_of_layers(
            layers, labels_N, self.temperature(epoch), self.config.distance, self.config.reduction
        )
        if self.config.combine == "min":
            return losses_L.amin()
        return losses_L.sum() if self.config.combine == "sum" else losses_L.mean()
