"""The soft nearest neighbor loss (SNNL) and the rules for its temperature.

Formula: Frosst, Papernot, Hinton, "Analyzing and Improving Representations with the Soft Nearest
Neighbor Loss", ICML 2019 (arXiv 1902.01889), eq. 1; cosine form and annealing rule after the public
code of Agarap & Azcarraga (pt-snnl).

Shapes: N samples (anchors), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Distance = Literal["cosine", "sqeuclidean"]
Reduction = Literal["mean", "mean_all", "sum", "none"]


def soft_nearest_neighbor_loss(
    features_ND: Tensor,
    labels_N: Tensor,
    temperature: float | Tensor = 1.0,
    distance: Distance = "cosine",
    reduction: Reduction = "mean",
) -> Tensor:
    """How little of each sample's soft neighbourhood shares its label.

    For anchor i, with distances d and temperature T,

        loss_i = -log( sum_{j != i, y_j = y_i} exp(-d_ij / T)  /  sum_{j != i} exp(-d_ij / T) )

    computed as log(1 + q_i / p_i) from the log-masses of the same class (p) and of the others (q), so
    it neither caps nor turns NaN where the usual `eps` forms do. The sign is such that minimising
    it pulls classes together.

    Args:
        features_ND: [N, D], floating point. Sub-float32 types are computed in float32. A row of
            zeros has no direction: under "cosine" it is at distance 1 from everything.
        labels_N: [N] integer classes.
        temperature: positive; a 0-d tensor is differentiated through.
        distance: "cosine" (1 - cosine similarity, in [0, 2]) or "sqeuclidean".
        reduction: "mean" over the anchors that have a positive (another sample of their class);
            "mean_all" over all N (the authors'); "sum"; "none" gives [N], 0 for anchors without one.

    Returns:
        A 0-d tensor, or [N] for "none". Without any positive: 0, with zero gradients.

    Raises:
        ValueError: shapes, an option or the temperature are unusable, or (checked on the CPU only, where
            it costs nothing; on a GPU the loss is NaN) a feature is not finite.
    """
    if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1]:
        raise ValueError(
            f"expected features [N, D] and labels [N], got {tuple(features_ND.shape)} "
            f"and {tuple(labels_N.shape)}"
        )
    if distance not in ("cosine", "sqeuclidean"):
        raise ValueError(f"unknown distance {distance!r}; use 'cosine' or 'sqeuclidean'")
    if reduction not in ("mean", "mean_all", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}; use 'mean', 'mean_all', 'sum' or 'none'")
    if not isinstance(temperature, Tensor) or temperature.device.type == "cpu":
        value = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
        if not 0 < value < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {value}")
    if features_ND.device.type == "cpu" and not features_ND.isfinite().all():
        raise ValueError("features contain NaN or infinity: look at the learning rate and the inputs")

    if features_ND.dtype in (torch.float16, torch.bfloat16):
        features_ND = features_ND.float()
    with torch.autocast(features_ND.device.type, enabled=False):
        scores_NN = _distances(features_ND, distance) / -temperature

    itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    same_NN = labels_N[:, None] == labels_N[None, :]
    positive_NN, negative_NN = same_NN & ~itself_NN, ~same_NN
    has_positive_N, has_negative_N = positive_NN.any(1), negative_NN.any(1)
    # An empty side would give log 0 and NaN gradients. It gets the anchor itself as a stand-in, and
    # the outcome is masked: the loss of an anchor without negatives, or without positives, is 0.
    log_p_N = _log_mass(scores_NN, positive_NN | (itself_NN & ~has_positive_N[:, None]))
    log_q_N = _log_mass(scores_NN, negative_NN | (itself_NN & ~has_negative_N[:, None]))
    loss_N = nn.functional.softplus(log_q_N - log_p_N, threshold=100)
    loss_N = loss_N.where(has_positive_N & has_negative_N, loss_N.new_zeros(()))

    if reduction == "none":
        return loss_N
    if reduction == "sum":
        return loss_N.sum()
    if reduction == "mean_all":
        return loss_N.sum() / max(len(loss_N), 1)
    return loss_N.sum() / has_positive_N.sum().clamp(min=1)


def _distances(x_ND: Tensor, distance: Distance) -> Tensor:
    if distance == "cosine":
        # An exact power of two per row, so that no square under- or overflows and no digit changes.
        power_N1 = x_ND.detach().abs().amax(1, keepdim=True).frexp().exponent.clamp(min=-120)
        x_ND = x_ND * torch.exp2(-power_N1.to(x_ND.dtype))
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
        x_ND = x_ND / norm_N1.where(norm_N1 > 0, torch.ones_like(norm_N1))
        return 1 - x_ND @ x_ND.T
    x_ND = x_ND - x_ND.mean(0).detach()  # no distance changes, and less cancels below
    square_N = (x_ND * x_ND).sum(1)
    return (square_N[:, None] + square_N[None, :] - 2 * (x_ND @ x_ND.T)).clamp(min=0)


def _log_mass(scores_NN: Tensor, mask_NN: Tensor) -> Tensor:
    return scores_NN.masked_fill(~mask_NN, -torch.inf).logsumexp(1)


@dataclass(frozen=True)
class SNNLConfig:
    """How the SNNL enters training: `factor * SNNL` is added to the task's loss."""

    factor: float = 10.0
    schedule: Literal["fixed", "annealed", "learned"] = "annealed"
    temperature: float = 1.0  # the first epoch's
    distance: Distance = "cosine"
    layers: tuple[str, ...] = ("code",)  # of the extractor's activations
    combine: Literal["min", "sum", "mean"] = "min"  # over layers
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
        losses = torch.stack(
            [
                soft_nearest_neighbor_loss(
                    activations[name].flatten(1),
                    labels_N,
                    self.temperature(epoch),
                    self.config.distance,
                    self.config.reduction,
                )
                for name in self.config.layers
            ]
        )
        if self.config.combine == "min":
            return losses.amin()
        return losses.sum() if self.config.combine == "sum" else losses.mean()
