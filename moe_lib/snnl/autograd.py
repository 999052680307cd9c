"""The soft nearest neighbor loss as an operator of torch: which kernel runs, in which type, and its gradient.

Shapes: L layers, N samples (anchors), D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_lib.products import differentiable_gradient, on_host, traced
from moe_lib.snnl.dense import (
    RANGES,
    Distance,
    Options,
    Parts,
    Reduction,
    Route,
    dense,
    direct,
    plain,
)
from moe_lib.snnl.streaming import by_tiles

DENSE_UP_TO, PANELS_UP_TO = 512, 1536  # samples, on a CPU; measured
DENSE_UP_TO_GPU = 2048
FUSED_UP_TO = 256  # columns


def losses(
    layers: Sequence[Tensor],
    labels_N: Tensor,
    temperature: float | Tensor,
    distance: Distance,
    reduction: Reduction,
    route: Route,
) -> Tensor:
    """[L] losses of L layers [N, D_l] of one type (float32 or float64) and device; [L, N] for "none"."""
    if not labels_N.shape[0]:  # connected to features and temperature, as a sum over nothing is
        nothing = torch.stack([x_ND.sum(1) if reduction == "none" else x_ND.sum() for x_ND in layers])
        return nothing + 0 * temperature if isinstance(temperature, Tensor) else nothing
    if traced():
        return _plain_losses(distance, reduction, temperature, labels_N, *layers)
    if route == "auto":
        route = choose(labels_N.shape[0], labels_N.device.type)
    learned = isinstance(temperature, Tensor) and temperature.requires_grad
    options = Options(distance, reduction, route, torch.is_grad_enabled(), learned)
    return _SNNL.apply(options, temperature, labels_N, *layers)


def choose(num_samples: int, device: str) -> Route:
    """ "auto": by the kernels of a GPU, or streaming where they cannot be had."""
    if num_samples <= (DENSE_UP_TO if device == "cpu" else DENSE_UP_TO_GPU):
        return "dense"
    if device != "cpu":
        return "auto"
    return "panels" if num_samples <= PANELS_UP_TO else "streaming"


def _plain_losses(
    distance: Distance,
    reduction: Reduction,
    temperature: float | Tensor,
    labels_N: Tensor,
    *layers: Tensor,
) -> Tensor:
    with _without_autocast(labels_N.device.type):
        return torch.stack([plain(x_ND, labels_N, temperature, distance, reduction) for x_ND in layers])


class _SNNL(torch.autograd.Function):
    """Forms the gradient in the forward pass; for "none" in the backward pass, which knows the weights."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, temperature: float | Tensor, labels_N: Tensor, *layers: Tensor
    ) -> Tensor:
        later = options.reduction == "none"
        wanted = options.wanted and any(ctx.needs_input_grad)
        parts = _compute(
            options._replace(wanted=wanted and not later), layers, labels_N, temperature, weight_LN=None
        )
        if wanted:
            is_tensor = isinstance(temperature, Tensor)
            ctx.options, ctx.temperature = options, None if is_tensor else temperature
            saved = temperature if is_tensor else None, labels_N, parts.slope_L
            ctx.save_for_backward(*saved, *layers, *parts.gradients_ND)
        return parts.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        number, options = len(ctx.needs_input_grad) - 3, ctx.options
        temperature, labels_N, slope_L, *rest = ctx.saved_tensors
        temperature = ctx.temperature if temperature is None else temperature
        layers, gradients_ND = rest[:number], rest[number:]
        if torch.is_grad_enabled():  # a second derivative is asked for
            inputs = (options.distance, options.reduction, temperature, labels_N, *layers)
            found = differentiable_gradient(_plain_losses, inputs, grads[0])
            return None, *found[2:]
        scale_L = grads[0]
        if options.reduction == "none":
            largest = grads[0].abs().amax()
            largest = largest.where(largest > 0, 1)
            # The anchors' weights are at most 1, so that none leaves the range of the type.
            parts = _compute(options, layers, labels_N, temperature, weight_LN=grads[0] / largest)
            slope_L, gradients_ND = parts.slope_L, parts.gradients_ND
            scale_L = largest.expand(number)
        each = zip(gradients_ND, scale_L, layers, ctx.needs_input_grad[3:], strict=True)
        out = [(g_ND * scale).to(x_ND.dtype) if wanted else None for g_ND, scale, x_ND, wanted in each]
        slope = None if slope_L is None else (scale_L * slope_L).sum().to(temperature)
        return (None, slope, None, *out)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Products stay in the type of the features."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _compute(
    options: Options,
    layers: Sequence[Tensor],
    labels_N: Tensor,
    temperature: float | Tensor,
    weight_LN: Tensor | None,
) -> Parts:
    """`weight_LN`: the anchors' weights in the total; None: the reduction's."""
    if isinstance(temperature, Tensor):  # a GPU's stays there, where nothing else waits for it
        on_gpu = not on_host(temperature) and options.route in ("dense", "fused")
        temperature = temperature.detach().to(layers[0].dtype) if on_gpu else temperature.item()
    dtype = layers[0].dtype
    with _without_autocast(labels_N.device.type):
        if options.route == "fused":
            if reason := _not_fused(layers):
                raise ValueError(f"route='fused' {reason}: choose route='auto'")
            kernel = _fused
        else:
            # The derivative by the temperature is a small difference of large sums: it needs the digits.
            middle = _middle(options, layers)
            spread = _spread(options, middle, temperature)
            if dtype != torch.float64 and (options.learned or not spread <= RANGES[dtype].precise):
                layers = [x_ND.double() for x_ND in layers]
                weight_LN = None if weight_LN is None else weight_LN.double()
                middle = _middle(options, layers)
                spread = _spread(options, middle, temperature)
            if not spread <= RANGES[layers[0].dtype].precise:
                kernel = direct
            elif options.route == "dense":
                return _in_type(dtype, dense(options, middle, labels_N, temperature, weight_LN))
            else:
                kernel = _fused if options.route == "auto" and not _not_fused(layers) else by_tiles
            del middle
            temperature = float(temperature)
        weights = [None] * len(layers) if weight_LN is None else list(weight_LN)
        parts = [
            kernel(options, x_ND, labels_N, temperature, weight_N)
            for x_ND, weight_N in zip(layers, weights, strict=True)
        ]
    slopes = [part.slope_L for part in parts if part.slope_L is not None]
    joined = Parts(
        torch.cat([part.loss for part in parts]),
        [gradient_ND for part in parts for gradient_ND in part.gradients_ND],
        torch.cat(slopes) if slopes else None,
    )
    return _in_type(dtype, joined)


def _not_fused(layers: Sequence[Tensor]) -> str:
    """Why route "fused" cannot take these layers; "" where it can. It alone needs Triton, which comes with
    torch for CUDA; Triton's interpreter runs it on a CPU."""
    device, dtype, width = layers[0].device.type, layers[0].dtype, max(x_ND.shape[1] for x_ND in layers)
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"is for features on a GPU, these are on {device!r}"
    if dtype != torch.float32:
        return f"computes in float32, the features are {dtype}"
    if width > FUSED_UP_TO:
        return f"takes up to {FUSED_UP_TO} columns, features have {width}"
    return "" if find_spec("triton") else "needs the package triton, which is not installed"


def _fused(*arguments: Any) -> Parts:
    from moe_lib.snnl.fused import fused  # imports triton

    return fused(*arguments)


def _middle(options: Options, layers: Sequence[Tensor]) -> Sequence[Tensor]:
    """Under "sqeuclidean" features minus their mean: no squared distance changes, and less cancels."""
    return layers if options.distance == "cosine" else [x_ND - x_ND.mean(0) for x_ND in layers]


def _spread(options: Options, middle: Sequence[Tensor], temperature: float | Tensor) -> float:
    """A bound on scores in units of log 2: their rounding error is this times the type's.

    0 where a GPU would have to be waited for; infinite where the type has no number for 1 / T.
    """
    if isinstance(temperature, Tensor):
        return 0.0
    base2 = math.log2(math.e) / temperature
    if base2 > torch.finfo(middle[0].dtype).max:
        return math.inf
    if options.route == "dense" and not on_host(middle[0]):
        return 0.0
    if options.distance == "cosine":
        return base2
    largest = [torch.linalg.vector_norm(x_ND, dim=1).max().item() for x_ND in middle]
    return 4 * max(largest) ** 2 * base2


def _in_type(dtype: torch.dtype, parts: Parts) -> Parts:
    """The loss in the features' type; gradients stay in the type that they were formed in."""
    loss = parts.loss.to(dtype)
    if loss.dtype != parts.loss.dtype and on_host(loss) and not loss.isfinite().all():
        raise ValueError(
            f"features are too large for the temperature: the loss leaves the range of {dtype}; "
            "scale the features down, raise the temperature or use distance='cosine'"
        )
    return parts._replace(loss=loss)
