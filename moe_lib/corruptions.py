"""Common corruptions of images.

Kinds and strengths after Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, those of their CIFAR-10-C.

Shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

# One value for each severity from 1 to 5, in units of intensity from 0 to 1 where it has a unit.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation of Gaussian noise
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation of a Gaussian, pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # distances from the mean are multiplied by this
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value (the largest channel)
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # side of the smaller image
    "jpeg": (80, 65, 58, 50, 40),  # quality
}
CORRUPTIONS = tuple(STRENGTHS)


def corrupt(images_NCHW: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupt a batch of images.

    Args:
        images_NCHW: [N, 1 or 3, H, W] uint8.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        generator: a CPU generator; "noise" alone draws from it.

    Returns:
        [N, C, H, W] uint8, on the images' device.

    Raises:
        ValueError: an unknown name, a severity outside 1 to 5, or images of another type or shape.
    """
    if name not in STRENGTHS:
        raise ValueError(f"unknown corruption {name!r}; known: {', '.join(CORRUPTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    if images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4 or images_NCHW.shape[1] not in (1, 3):
        raise ValueError(
            f"expected uint8 images [N, 1 or 3, H, W], got {images_NCHW.dtype} {tuple(images_NCHW.shape)}"
        )
    if not len(images_NCHW):
        return images_NCHW
    strength = STRENGTHS[name][severity - 1]
    if name == "jpeg":
        return torch.stack([tv.jpeg(image.cpu(), int(strength)) for image in images_NCHW]).to(
            images_NCHW.device
        )
    x_NCHW = images_NCHW.float() / 255
    if name == "noise":
        x_NCHW = x_NCHW + strength * torch.randn(x_NCHW.shape, generator=generator).to(x_NCHW.device)
    elif name == "blur":
        x_NCHW = tv.gaussian_blur(x_NCHW, [7, 7], [strength, strength])
    elif name == "contrast":
        mean_NC11 = x_NCHW.mean((2, 3), keepdim=True)
        x_NCHW = mean_NC11 + strength * (x_NCHW - mean_NC11)
    elif name == "brightness":  # hue and saturation stay; black has none and becomes grey
        value_N1HW = x_NCHW.amax(1, keepdim=True)
        raised_N1HW = (value_N1HW + strength).clamp(max=1)
        x_NCHW = torch.where(value_N1HW > 0, x_NCHW * raised_N1HW / value_N1HW.clamp(min=1e-6), raised_N1HW)
    else:
        size = images_NCHW.shape[2:]
        smaller = [max(int(side * strength), 1) for side in size]
        x_NCHW = F.interpolate(F.interpolate(x_NCHW, smaller, mode="area"), size, mode="nearest-exact")
    return (x_NCHW.clamp(0, 1) * 255).round().to(torch.uint8)
