"""The soft nearest neighbor loss (SNNL) and the rules for its temperature.

Formula: Frosst, Papernot, Hinton, "Analyzing and Improving Representations with the Soft Nearest
Neighbor Loss", ICML 2019 (arXiv 1902.01889), eq. 1; cosine form and annealing rule after the public
code of Agarap & Azcarraga (pt-snnl).

Shapes: N samples (anchors), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_lib import parallel
from moe_lib.checks import (
    check_floating,
    check_labels,
    check_number,
    check_option,
    check_temperature,
)
from moe_lib.products import at_least_float32
from moe_lib.snnl.autograd import losses
from moe_lib.snnl.dense import Distance, Reduction, Route

Combine = Literal["min", "sum"]


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
    usual `eps` forms do. The sign is such that minimising it pulls classes together.

    Value and gradient are formed together, in float64 where float32 would lose the distances or the
    temperature's derivative. A second derivative (`create_graph=True`), torch.compile, torch.export and
    torch.func use `snnl.dense.plain`, the formula in torch's operators: it stays in the features' type and
    holds several N x N matrices. Under autocast, differentiate it outside: torch.func computes gradients in
    the type that is active then.

    Args:
        features_ND: [N, D], floating point. Sub-float32 types are computed in float32. A row of
            zeros has no direction: under "cosine" it is at distance 1 from everything.
        labels_N: [N] classes, of any integer type or bool.
        temperature: positive; a 0-d tensor is differentiated through.
        distance: "cosine" (1 - cosine similarity, in [0, 2]) or "sqeuclidean".
        reduction: "mean" over the anchors that have a positive (another sample of their class);
            "mean_all" over all N, as in the authors' code, where an anchor without one is not 0, though: with
            their eps = 1e-5 it adds -log(1e-5) / N = 11.5 / N; "sum"; "none" gives [N], 0 for such anchors.
        route: how it is computed, which changes time and memory alone: "dense" (N x N matrices), "panels"
            (half of one), "streaming" (none) or "fused" (none; on a GPU with Triton, up to 256 columns).
            "auto" chooses by N and device, and "fused" only where float32 has the digits: asked for by name,
            it stays in float32 and never waits.

    Returns:
        A 0-d tensor, or [N] for "none". Without any positive: 0, with zero gradients.

    Raises:
        ValueError: an argument is unusable. Values are checked on the CPU only, where it costs nothing;
            on a GPU the loss of features that are not finite is NaN.
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
    check_option(distance, "distance", get_args(Distance))
    check_option(reduction, "reduction", get_args(Reduction))
    check_option(route, "route", get_args(Route))
    check_temperature(temperature)
    layers = [_computable(features_ND) for features_ND in layers]
    for features_ND in layers:
        labels_N = check_labels(labels_N, features_ND.shape[0], like=features_ND)
    own = None
    if parallel.active():  # the samples of all processes; of "none" the own anchors' part
        labels_N, own = parallel.gather(labels_N)
        layers = [parallel.gather(features_ND)[0] for features_ND in layers]
    alike = len({features_ND.dtype for features_ND in layers}) == 1
    found = [
        losses(part, labels_N, temperature, distance, reduction, route)
        for part in ([layers] if alike else [[features_ND] for features_ND in layers])
    ]
    joined = found[0] if alike else torch.cat(found)
    return joined if own is None or reduction != "none" else joined[:, own]


def _computable(features_ND: Tensor) -> Tensor:
    remedy = ": flatten each sample with .flatten(1)"
    features_ND = check_floating(features_ND, "features", "N, D", finite=False, remedy=remedy)
    if not features_ND.shape[1]:
        raise ValueError(f"features must have at least one column, got {list(features_ND.shape)}")
    return at_least_float32(features_ND).contiguous()


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
        check_option(config.schedule, "schedule", ("fixed", "annealed", "learned"))
        check_option(config.combine, "combine", get_args(Combine))
        check_option(config.distance, "distance", get_args(Distance))
        check_option(config.reduction, "reduction", ("mean", "mean_all", "sum"))
        check_temperature(config.temperature)
        check_number(config.factor, "factor")
        if config.schedule == "learned" and not 1e-13 <= config.temperature <= 1e13:
            raise ValueError(f"a learned temperature must lie in 1e-13 to 1e13, got {config.temperature}")
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
        return losses_L.sum()
