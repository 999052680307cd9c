"""Common corruptions of images.

Kinds and strengths after Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, those of their CIFAR-10-C at every image size. They cut the result
to whole levels; here it is rounded, so that no corruption darkens by half a level.

Shapes: N images, C channels, H height, W width, O, I pixels of a side after and before,
R pixels read for one, B boxes.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from moe_lib.checks import check_tensor

# One value for each severity from 1 to 5; intensities run from 0 to 1.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation of Gaussian noise
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation of a Gaussian, pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # distances from a channel's mean are multiplied by this
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value (the largest channel)
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # side of the smaller image, as a share
    "jpeg": (80, 65, 58, 50, 40),  # quality
}
CORRUPTIONS = tuple(STRENGTHS)
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images_NCHW: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupt a batch of images.

    Args:
        images_NCHW: uint8, of 1 or 3 channels.
        name: one of `CORRUPTIONS`, of the strength that `STRENGTHS` states. A side of 8 pixels is too short
            to tell "pixelate" 1 from 2 and 3 from 4.
        severity: 1 to 5.
        generator: a CPU generator; "noise" alone draws from it.

    Returns:
        Images of the same shape, type and device.

    Raises:
        ValueError: an unknown name, a severity outside 1 to 5, or images of another type or shape.
    """
    if name not in STRENGTHS:
        raise ValueError(f"unknown corruption {name!r}; known: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    check_tensor(images_NCHW, "images", "N, C, H, W")
    if images_NCHW.dtype != torch.uint8 or images_NCHW.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 [N, 1 or 3, H, W], got {images_NCHW.dtype} {tuple(images_NCHW.shape)}"
        )
    strength = STRENGTHS[name][SEVERITIES.index(severity)]
    if name == "jpeg":
        return _jpeg(images_NCHW, int(strength))
    x_NCHW = images_NCHW.float() / 255
    if name == "noise":
        x_NCHW = x_NCHW + strength * torch.randn(x_NCHW.shape, generator=generator).to(x_NCHW.device)
    elif name == "contrast":
        mean_NC11 = x_NCHW.mean((2, 3), keepdim=True)
        x_NCHW = mean_NC11 + strength * (x_NCHW - mean_NC11)
    elif name == "brightness":
        x_NCHW = _brighter(x_NCHW, strength)
    else:
        along = _blurring if name == "blur" else _pixelating
        rows_OI, columns_OI = (along(side, strength).to(x_NCHW) for side in x_NCHW.shape[2:])
        x_NCHW = rows_OI @ x_NCHW @ columns_OI.T
    return (x_NCHW.clamp(0, 1) * 255).round().to(torch.uint8)


def _blurring(side: int, sigma: float) -> Tensor:
    """[O, I]: a Gaussian cut off at 4 sigma; beyond its border an image goes on as its outermost pixels."""
    radius = int(4 * sigma + 0.5)
    offset_R = torch.arange(-radius, radius + 1)
    weight_R = (-0.5 * (offset_R.double() / sigma) ** 2).softmax(0)
    read_OR = (torch.arange(side)[:, None] + offset_R).clamp(0, side - 1)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add(1, read_OR, weight_R.expand(side, -1))


def _brighter(x_NCHW: Tensor, amount: float) -> Tensor:
    """Raise the value, keep hue and saturation; black, which has neither, becomes grey."""
    value_N1HW = x_NCHW.amax(1, keepdim=True)
    raised_N1HW = (value_N1HW + amount).clamp(max=1)
    return torch.where(value_N1HW > 0, x_NCHW * raised_N1HW / value_N1HW, raised_N1HW)


def _pixelating(side: int, share: float) -> Tensor:
    """[O, I]: means over the pixels whose centres fall into each of `share * side` boxes, then enlarged to
    `side` again by the nearest box: Pillow's BOX filter, there and back, but for rounding. Pillow rounds to
    whole levels after each of the two; here the result is rounded once, at the end."""
    boxes = max(int(side * share), 1)
    centre_I = torch.arange(side, dtype=torch.float64) + 0.5
    edge_B1 = torch.arange(boxes)[:, None] * side / boxes
    inside_BI = ((centre_I > edge_B1) & (centre_I <= edge_B1 + side / boxes)).double()
    return (inside_BI / inside_BI.sum(1, keepdim=True))[(centre_I * boxes / side).long()]


def _jpeg(images_NCHW: Tensor, quality: int) -> Tensor:
    from PIL import Image  # a dependency of torchvision, whose own JPEG functions are deprecated

    images_NHWC = images_NCHW.permute(0, 2, 3, 1).cpu().numpy()
    decoded_NHWC = np.empty_like(images_NHWC)
    for image_HWC, decoded_HWC in zip(images_NHWC, decoded_NHWC, strict=True):
        file = io.BytesIO()
        grey = image_HWC.shape[2] == 1
        Image.fromarray(image_HWC[..., 0] if grey else image_HWC).save(file, "jpeg", quality=quality)
        decoded_HWC[:] = np.asarray(Image.open(file)).reshape(image_HWC.shape)
    return torch.from_numpy(decoded_NHWC).permute(0, 3, 1, 2).contiguous().to(images_NCHW.device)
