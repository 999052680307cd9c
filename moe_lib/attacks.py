"""Adversarial attacks in the L-infinity ball around images in [0, 1].

Shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Predict = Callable[[Tensor], Tensor]  # images [N, C, H, W] -> log-probabilities or logits [N, classes]


def _check(images_NCHW: Tensor, labels_N: Tensor, eps: float) -> None:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if images_NCHW.ndim != 4 or labels_N.shape != images_NCHW.shape[:1]:
        raise ValueError(
            f"expected images [N, C, H, W] and labels [N], got {tuple(images_NCHW.shape)} "
            f"and {tuple(labels_N.shape)}"
        )
    low, high = images_NCHW.min().item(), images_NCHW.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], got values from {low:g} to {high:g}")


def _loss_gradient(predict: Predict, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    """Of the cross-entropy summed over images; no parameter's gradient is touched."""
    with torch.enable_grad():
        images_NCHW = images_NCHW.detach().requires_grad_()
        loss = F.cross_entropy(predict(images_NCHW), labels_N, reduction="sum")
        return torch.autograd.grad(loss, images_NCHW)[0]


def _inside(attacked_NCHW: Tensor, images_NCHW: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(attacked_NCHW, images_NCHW - eps), images_NCHW + eps).clamp(0, 1)


def fgsm(predict: Predict, images_NCHW: Tensor, labels_N: Tensor, eps: float) -> Tensor:
    """One step of size `eps` along the sign of the gradient.

    Source: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.

    Args:
        predict: images -> log-probabilities or logits; called on all images at once.
        images_NCHW: [N, C, H, W] in [0, 1].
        labels_N: true classes.
        eps: radius, in units of intensity.

    Returns:
        Images in [0, 1], none further than `eps` from its original.

    Raises:
        ValueError: eps is negative, or images or labels do not fit.
    """
    _check(images_NCHW, labels_N, eps)
    step_NCHW = eps * _loss_gradient(predict, images_NCHW, labels_N).sign()
    return _inside(images_NCHW + step_NCHW, images_NCHW, eps)


def pgd(
    predict: Predict,
    images_NCHW: Tensor,
    labels_N: Tensor,
    eps: float,
    generator: torch.Generator,
    steps: int = 20,
    step_size: float | None = None,
) -> Tensor:
    """Projected gradient ascent from a random start.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018; 20
    steps of 0.15 eps as in the experiments with the AC router.

    Args:
        generator: a CPU generator, for the start.
        step_size: 0.15 * eps if None. For the other arguments, result and errors see `fgsm`.
    """
    _check(images_NCHW, labels_N, eps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    size = 0.15 * eps if step_size is None else step_size
    start = torch.rand(images_NCHW.shape, generator=generator, dtype=torch.float64) * 2 - 1
    attacked_NCHW = _inside(images_NCHW + eps * start.to(images_NCHW), images_NCHW, eps)
    for _ in range(steps):
        gradient_NCHW = _loss_gradient(predict, attacked_NCHW, labels_N)
        attacked_NCHW = _inside(attacked_NCHW + size * gradient_NCHW.sign(), images_NCHW, eps)
    return attacked_NCHW


@torch.no_grad()
def spsa(
    predict: Predict,
    images_NCHW: Tensor,
    labels_N: Tensor,
    eps: float,
    generator: torch.Generator,
    steps: int = 20,
    samples: int = 8,
    delta: float = 0.01,
) -> Tensor:
    """PGD with the gradient estimated from differences alone, so that a masked gradient does not stop it.

    Source: Uesato et al., "Adversarial Risk and the Dangers of Evaluating Against Weak Attacks", ICML 2018,
    with sign steps of 0.15 eps in the place of Adam's. The loss is the margin of the true class.

    Args:
        samples: pairs x ± delta * (random signs) a step.
        delta: size of the probe. For the other arguments, result and errors see `fgsm` and `pgd`.
    """
    _check(images_NCHW, labels_N, eps)
    if steps < 1 or samples < 1 or not delta > 0:
        raise ValueError(f"steps, samples and delta must be positive, got {steps}, {samples} and {delta}")

    def margin(probe_NCHW: Tensor) -> Tensor:
        scores_NC = predict(probe_NCHW)
        true_N = scores_NC.gather(1, labels_N[:, None])[:, 0]
        return scores_NC.scatter(1, labels_N[:, None], -torch.inf).amax(1) - true_N

    attacked_NCHW = images_NCHW
    for _ in range(steps):
        gradient_NCHW = torch.zeros_like(images_NCHW)
        for _ in range(samples):
            coin = torch.randint(0, 2, images_NCHW.shape, generator=generator) * 2 - 1
            direction_NCHW = coin.to(images_NCHW)
            probe_NCHW = delta * direction_NCHW
            difference_N = margin(attacked_NCHW + probe_NCHW) - margin(attacked_NCHW - probe_NCHW)
            gradient_NCHW += difference_N[:, None, None, None] * direction_NCHW
        attacked_NCHW = _inside(attacked_NCHW + 0.15 * eps * gradient_NCHW.sign(), images_NCHW, eps)
    return attacked_NCHW
