"""Adversarial attacks in the L-infinity ball around images in [0, 1].

All raise the cross-entropy of the true class, summed over images. They call `predict` on all images at once:
what a model computes over a batch, it computes over this one.

Shapes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lib.checks import check_count, check_floating, check_labels, check_number

Predict = Callable[[Tensor], Tensor]  # images [N, C, H, W] -> log-probabilities or logits [N, K]
STEP = 0.15  # of eps, as in the experiments with the AC router


def fgsm(predict: Predict, images_NCHW: Tensor, labels_N: Tensor, eps: float) -> Tensor:
    """One step of size `eps` along the sign of the gradient.

    Source: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.

    Args:
        predict: images -> log-probabilities or logits; differentiable. No parameter's `.grad` is touched.
        images_NCHW: floating point, in [0, 1].
        labels_N: true classes.
        eps: radius, in units of intensity (2 / 255, say).

    Returns:
        Images in [0, 1], none further than `eps` from its original; the originals themselves if `eps` is 0.

    Raises:
        ValueError: eps is outside 0 to 1; images, labels or scores do not fit or are not finite.
    """
    labels_N = _check(images_NCHW, labels_N, eps)
    gradient_NCHW = _loss_gradient(predict, images_NCHW, labels_N)
    return _stepped(images_NCHW, eps, gradient_NCHW, _ball(images_NCHW, eps))


def pgd(
    predict: Predict,
    images_NCHW: Tensor,
    labels_N: Tensor,
    eps: float,
    generator: torch.Generator,
    steps: int = 20,
    step_size: float | None = None,
    random_start: bool = True,
) -> Tensor:
    """Steps along the sign of the gradient, each followed by a projection onto the ball.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.

    Args:
        generator: a CPU generator, for the start.
        step_size: in units of intensity; None: 0.15 * eps.
        random_start: start anywhere in the ball rather than at the image.
            For the other arguments, the result and the errors see `fgsm`.
    """
    labels_N = _check(images_NCHW, labels_N, eps)
    check_count(steps, "steps")
    size = STEP * eps if step_size is None else check_number(step_size, "step_size", least=0, above=True)
    attacked_NCHW, ball = images_NCHW, _ball(images_NCHW, eps)
    if random_start:
        # Drawn in float64, so that models of either precision are attacked from the same start.
        start = torch.rand(images_NCHW.shape, generator=generator, dtype=torch.float64) * 2 - 1
        attacked_NCHW = torch.clamp(images_NCHW + eps * start.to(images_NCHW), *ball)
    for _ in range(steps):
        gradient_NCHW = _loss_gradient(predict, attacked_NCHW, labels_N)
        attacked_NCHW = _stepped(attacked_NCHW, size, gradient_NCHW, ball)
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
    """Ascent without gradients: a model that only hides its gradient is not safe from it.

    The slope is estimated from differences along random signs: sum of (f(x + delta v) - f(x - delta v)) v,
    where f is the log-odds against the true class. They rise and fall with the cross-entropy but stay
    measurable where it vanishes. Source: Uesato et al., "Adversarial Risk and the Dangers of Evaluating
    Against Weak Attacks", ICML 2018. In the place of Adam, steps of 0.15 * eps along the sign of the sum of
    all estimates so far: in a small ball the slope hardly changes, and every query counts to the end.

    Weaker than `pgd` unless `samples` is large: with D values an image, an estimate from n pairs has a cosine
    of about sqrt(n / D) with the gradient.

    Args:
        predict: need not be differentiable; called 2 * steps * samples times.
        generator: a CPU generator, for the signs.
        samples: pairs of images a step.
        delta: length of the probe along each value, in units of intensity; probes may leave [0, 1].
            For the other arguments, the result and the errors see `fgsm`.
    """
    labels_N = _check(images_NCHW, labels_N, eps)
    check_count(steps, "steps")
    check_count(samples, "samples")
    check_number(delta, "delta", least=0, above=True)
    attacked_NCHW, slope_NCHW, ball = images_NCHW, torch.zeros_like(images_NCHW), _ball(images_NCHW, eps)
    for _ in range(steps):
        for _ in range(samples):
            coin = torch.randint(0, 2, images_NCHW.shape, generator=generator, dtype=torch.int8)
            sign_NCHW = (2 * coin - 1).to(images_NCHW)
            above_N = _log_odds(predict(attacked_NCHW + delta * sign_NCHW), labels_N)
            below_N = _log_odds(predict(attacked_NCHW - delta * sign_NCHW), labels_N)
            slope_NCHW += (above_N - below_N)[:, None, None, None] * sign_NCHW
        _check_finite(slope_NCHW)
        attacked_NCHW = _stepped(attacked_NCHW, STEP * eps, slope_NCHW, ball)
    return attacked_NCHW


def _check(images_NCHW: Tensor, labels_N: Tensor, eps: float) -> Tensor:
    """The labels, as int64."""
    check_number(eps, "eps")
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must lie in [0, 1], in units of intensity (2 / 255, not 2), got {eps}")
    check_floating(images_NCHW, "images", "N, C, H, W", finite=False)
    if images_NCHW.dtype.itemsize < 4:
        raise ValueError(
            f"images must be float32 or float64, got {images_NCHW.dtype}, in which small steps are lost: let "
            "`predict` cast them for a model in half precision"
        )
    if not images_NCHW.numel():
        raise ValueError(f"images must not be empty, got {list(images_NCHW.shape)}")
    labels_N = check_labels(labels_N, len(images_NCHW), like=images_NCHW)
    low, high = images_NCHW.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images must lie in [0, 1], got values from {low:g} to {high:g}")
    return labels_N


def _log_odds(scores_NK: Tensor, labels_N: Tensor) -> Tensor:
    """[N]: log((1 - p) / p) of the probability p of the true class; log-probabilities or logits alike."""
    if scores_NK.ndim != 2 or len(scores_NK) != len(labels_N) or scores_NK.shape[1] < 2:
        raise ValueError(
            f"predict must return scores [{len(labels_N)}, at least 2 classes], got {tuple(scores_NK.shape)}"
        )
    check_labels(labels_N, *scores_NK.shape)
    label_N1 = labels_N[:, None]
    return scores_NK.scatter(1, label_N1, -math.inf).logsumexp(1) - scores_NK.gather(1, label_N1)[:, 0]


def _loss_gradient(predict: Predict, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    """Of the cross-entropy summed over images.

    Written as softplus(log-odds), it keeps the gradient's sign where 1 - p is too small for p to show it.
    """
    # Copies, since tensors made under inference_mode take no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        images_NCHW, labels_N = images_NCHW.detach().clone().requires_grad_(), labels_N.clone()
        loss = F.softplus(_log_odds(predict(images_NCHW), labels_N)).sum()
        gradient_NCHW = torch.autograd.grad(loss, images_NCHW)[0]
    _check_finite(gradient_NCHW)
    return gradient_NCHW


def _check_finite(slope_NCHW: Tensor) -> None:
    low, high = torch.stack(slope_NCHW.aminmax()).tolist()  # NaN if any value is: one pass, one look
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = slope_NCHW[~slope_NCHW.isfinite()][0]
        raise ValueError(f"the scores that predict returns have no finite slope: {bad:g}")


def _ball(images_NCHW: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest value that each pixel may take."""
    return (images_NCHW - eps).clamp_(min=0), (images_NCHW + eps).clamp_(max=1)


def _stepped(attacked_NCHW: Tensor, size: float, slope_NCHW: Tensor, ball: tuple[Tensor, Tensor]) -> Tensor:
    """One step along the slope's sign, back into the ball."""
    return slope_NCHW.sign().mul_(size).add_(attacked_NCHW).clamp_(*ball)
